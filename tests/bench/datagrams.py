"""UDP at a given rate between two outposts: trains that the kernel splits (UDP_SEGMENT) and joins (UDP_GRO).

A sender of single datagrams spends 4 microseconds of kernel time on each before any tunnel sees it, and so does their
receiver: what would be measured is both ends. Here neither is the limit, for whichever program is between them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32  # <asm-generic/socket.h>
UDP_SEGMENT, UDP_GRO = 103, 104  # <linux/udp.h>
_BUFFER = 8 << 20  # octets: some 10 ms of the fastest of all programs
_MOST_SEGMENTS = 64  # of one send, as kernels before 6.9 have it
_MOST_OCTETS = 60_000  # so that a train is still one when each datagram has the headers of a tunnel, too
_TRAIN_S = 0.001  # a train is no more than what this time brings
_LEAST_PAUSE_S = 0.0001
_HELLO, _HELLO_S, _HELLOS = b"hello", 0.2, 25
_FIRST_S = 3.0  # until something must have come
_SILENCE_S = 0.15  # after which nothing more comes
_MOMENT_S = 0.001
_TIMEVAL = struct.Struct("@ll")
_LENGTH = struct.Struct("=i")

_open: dict[str, socket.socket] = {}


def bind(host: str, port: int) -> None:
    """Wait at an address, for `accept`."""
    _keep(socket.AF_INET6 if ":" in host else socket.AF_INET).bind((host, port))


def accept() -> None:
    """Answer whoever says hello, and have to do with nobody else from now on."""
    sock = _open["datagrams"]
    sock.settimeout(_HELLO_S * _HELLOS)
    _, address = sock.recvfrom(100)
    sock.connect(address)
    sock.send(_HELLO)
    sock.settimeout(None)


def connect(host: str, port: int) -> None:
    """Say hello until there is an answer."""
    sock = _keep(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.connect((host, port))
    sock.settimeout(_HELLO_S)
    for _ in range(_HELLOS):
        sock.send(_HELLO)
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            sock.recv(100)
            sock.settimeout(None)
            return
    raise TimeoutError(f"{host} does not answer at port {port}")


def send(size: int, mbit: float, seconds: float, trains: bool) -> tuple[int, float, float]:
    """Send datagrams of `size` bytes for a while; how many, and when the first and the last of them.

    Without `trains` each is a system call and a walk through the kernel, as from most programs.
    """
    sock = _open["datagrams"]
    per_second = mbit * 1e6 / 8 / size
    segments = max(1, min(_MOST_SEGMENTS, _MOST_OCTETS // size, int(per_second * _TRAIN_S))) if trains else 1
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size if segments > 1 else 0)
    train = bytes(size * segments)
    sent, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        ahead = sent / per_second - passed
        if ahead > 0:
            time.sleep(max(ahead, _LEAST_PAUSE_S))
            continue
        with contextlib.suppress(OSError):  # a full queue of the device: that one is lost
            sock.send(train)
        sent += segments
    return sent, began, time.monotonic()


def receive() -> list[tuple[float, int]]:
    """Count datagrams until no more come: moments, and how many there were by then."""
    sock = _open["datagrams"]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_FIRST_S))
    buffer, space = bytearray(1 << 16), socket.CMSG_SPACE(_LENGTH.size)
    received, moments = 0, [(0.0, 0)]
    with contextlib.suppress(BlockingIOError):
        while True:
            length, ancillary, _, _ = sock.recvmsg_into((buffer,), space)
            if not received:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_SILENCE_S))
            if ancillary:
                (stride,) = _LENGTH.unpack(ancillary[0][2])
                received += -(-length // stride)
            elif length != len(_HELLO):
                received += 1
            moment = moments[-1][0]
            if (now := time.monotonic()) > moment + _MOMENT_S:
                moments.append((now, received))
            else:
                moments[-1] = (moment, received)
    return moments


def in_time(moments: Sequence[Sequence[float]], end: float) -> float:
    """How many had come by `end`, of what `receive` tells."""
    return max(count for moment, count in moments if moment <= end)


def _keep(family: int) -> socket.socket:
    if (old := _open.pop("datagrams", None)) is not None:
        old.close()
    sock = _open["datagrams"] = socket.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, _BUFFER)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    return sock


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
