"""An IP address with a UDP or TCP port, in the packed form that headers and sockets need."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from fzg.wire import Malformed


class Endpoint(NamedTuple):
    """`ip` is 4 or 16 network-order bytes; two endpoints are equal when their bytes are."""

    ip: bytes
    port: int

    @classmethod
    def of(cls, host: str, port: int) -> Endpoint:
        """From the textual host of a socket address; an IPv6 scope id is dropped (spec connectivity 1.4)."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return cls(socket.inet_pton(family, host.partition("%")[0]), port)
        except (OSError, ValueError) as error:  # ValueError: a zero byte, a lone surrogate
            raise Malformed(f"{host!r} is not an IP address") from error

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From `203.0.113.7:3478` or `[2001:db8::7]:3478`."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 0xFFFF:
            raise Malformed(f"{text!r} is not an address with a port")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if ":" not in host:
                raise Malformed(f"{text!r} has brackets around something that is not IPv6")
        elif ":" in host:
            raise Malformed(f"{text!r} is IPv6 without brackets")
        return cls.of(host, int(port))

    @property
    def is_ipv4(self) -> bool:
        """True for IPv4, false for IPv6."""
        return len(self.ip) == 4

    @property
    def family(self) -> int:
        """`socket.AF_INET` or `socket.AF_INET6`."""
        return socket.AF_INET if len(self.ip) == 4 else socket.AF_INET6

    @property
    def address(self) -> IPv4Address | IPv6Address:
        """The IP as an `ipaddress` object, for range tests."""
        return ip_address(self.ip)

    @property
    def host(self) -> str:
        """The IP as text, as socket calls want it."""
        return socket.inet_ntop(self.family, self.ip)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if len(self.ip) == 4 else f"[{self.host}]:{self.port}"
