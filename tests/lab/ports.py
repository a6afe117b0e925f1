"""Ports for the servers of tests."""

from __future__ import annotations

import contextlib
import errno
import itertools
import secrets
import socket

_PORTS = range(10_000, 32_768)
"""Below `ip_local_port_range`: the kernel gives none of them to a socket that asks for any, so that a port that was
found free stays free until its server has it, and on all of its addresses."""


def free_port(*hosts: str) -> int:
    """A port that nobody has, over UDP and TCP, on any of the hosts (addresses of this machine)."""
    while True:
        port = _PORTS.start + secrets.randbelow(len(_PORTS))  # not `random`: hypothesis seeds it, in two runs alike
        with contextlib.ExitStack() as probes:
            try:
                for host, kind in itertools.product(hosts, (socket.SOCK_DGRAM, socket.SOCK_STREAM)):
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    probes.enter_context(socket.socket(family, kind)).bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        return port
