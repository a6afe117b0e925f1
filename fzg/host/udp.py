"""The two UDP sockets (spec tunnel 9.5, connectivity 1.4)."""

from __future__ import annotations

import errno
import logging
import socket
from typing import NamedTuple

from gevent import monkey

from fzg.host.sysctl import RECEIVE_BUFFER_BYTES, SEND_BUFFER_BYTES
from fzg.mark import SOCKET_MARK, mark_socket

_LOG = logging.getLogger(__name__)

# Specification constants (tunnel 1.4).
PREFERRED_PORT = 52625
_SMALLEST_BUFFER = 64 * 1024
_LARGEST_BUFFER = 2**31 - 1  # a C int, which is what the kernel is told

# <linux/in.h>, <linux/in6.h>, <linux/udp.h>, <asm-generic/socket.h>: not all in Python's socket module.
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_PROBE = 3
_IP_PKTINFO = 8
_IP_RECVTOS = 13
_IPV6_ADDR_PREFERENCES = 72
_IPV6_PREFER_SRC_PUBLIC = 2
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SOL_UDP = 17
_UDP_GRO = 104

FAMILIES = (socket.AF_INET, socket.AF_INET6)

# The pumps wait by their own watchers: gevent's socket would switch greenlets inside the engine.
_Socket: type[socket.socket] = monkey.get_original("socket", "socket")


class MarkRefusedError(Exception):
    """SO_MARK could not be set: with it missing, tunnel traffic would loop into the tunnel."""


class UdpSocket(NamedTuple):
    """A bound, non-blocking socket. Buffer sizes are the kernel's own figures; `gro` says whether trains arrive."""

    family: int
    socket: socket.socket
    port: int
    send_buffer: int
    receive_buffer: int
    gro: bool


class Unbound(NamedTuple):
    """A family that is not there."""

    family: int
    error: OSError


def open_sockets(
    *,
    port: int = PREFERRED_PORT,
    mark: int | None = SOCKET_MARK,
    send_buffer: int = SEND_BUFFER_BYTES,
    receive_buffer: int = RECEIVE_BUFFER_BYTES,
    gro: bool = True,
) -> tuple[list[UdpSocket], list[Unbound]]:
    """Both sockets, or what became of them. Raises only `MarkRefusedError`, which is fatal (spec tunnel 9.5)."""
    bound: list[UdpSocket] = []
    unbound: list[Unbound] = []
    for family in FAMILIES:
        try:
            bound.append(
                open_socket(
                    family, port=port, mark=mark, send_buffer=send_buffer, receive_buffer=receive_buffer, gro=gro
                )
            )
        except OSError as error:
            unbound.append(Unbound(family, error))
        except MarkRefusedError:
            for opened in bound:
                opened.socket.close()
            raise
    return bound, unbound


def open_socket(
    family: int,
    *,
    port: int = PREFERRED_PORT,
    mark: int | None = SOCKET_MARK,
    send_buffer: int = SEND_BUFFER_BYTES,
    receive_buffer: int = RECEIVE_BUFFER_BYTES,
    gro: bool = True,
) -> UdpSocket:
    """The socket of one family on `port`, else on a free one. Raises OSError or `MarkRefusedError`."""
    udp = _Socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if mark is not None:
            _set_mark(udp, mark)
        if family == socket.AF_INET6:
            _set_ipv6_options(udp)
        else:
            _set_ipv4_options(udp)
        sizes = (
            _set_buffer(udp, socket.SO_SNDBUF, _SO_SNDBUFFORCE, send_buffer),
            set_receive_buffer(udp, receive_buffer),
        )
        takes_trains = gro and _enable_gro(udp)
        _bind(udp, family, port)
    except BaseException:
        udp.close()
        raise
    return UdpSocket(family, udp, udp.getsockname()[1], *sizes, takes_trains)


def _set_mark(udp: socket.socket, mark: int) -> None:
    try:
        mark_socket(udp, mark)
    except OSError as error:
        raise MarkRefusedError(f"cannot mark the UDP socket ({error.strerror}): needs root or CAP_NET_ADMIN") from error


def _set_ipv4_options(udp: socket.socket) -> None:
    udp.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    udp.setsockopt(socket.IPPROTO_IP, _IP_RECVTOS, 1)
    udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)


def _set_ipv6_options(udp: socket.socket) -> None:
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
    try:
        udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC)
    except OSError as error:
        _LOG.info("cannot prefer public IPv6 source addresses: %s", error.strerror)


def set_receive_buffer(udp: socket.socket, size: int) -> int:
    """Ask for `size` bytes; what the kernel made of it, which is double or less."""
    return _set_buffer(udp, socket.SO_RCVBUF, _SO_RCVBUFFORCE, size)


def _set_buffer(udp: socket.socket, option: int, forced_option: int, size: int) -> int:
    """Ask for `size` bytes, halving until the kernel agrees; what it set. The forced option ignores its limits."""
    size = min(size, _LARGEST_BUFFER)
    while size >= _SMALLEST_BUFFER:
        for attempt in (forced_option, option):
            try:
                udp.setsockopt(socket.SOL_SOCKET, attempt, size)
            except OSError:
                continue
            return udp.getsockopt(socket.SOL_SOCKET, option)
        size //= 2
    return udp.getsockopt(socket.SOL_SOCKET, option)


def _enable_gro(udp: socket.socket) -> bool:
    """Ask for trains of datagrams. Kernels before 5.12 have a faulty version, known by an option that is write-only."""
    try:
        udp.setsockopt(_SOL_UDP, _UDP_GRO, 1)
    except OSError:
        return False
    try:
        return bool(udp.getsockopt(_SOL_UDP, _UDP_GRO))
    except OSError:
        udp.setsockopt(_SOL_UDP, _UDP_GRO, 0)
        return False


def _bind(udp: socket.socket, family: int, port: int) -> None:
    wildcard = "::" if family == socket.AF_INET6 else "0.0.0.0"  # noqa: S104 - ICE learns the addresses in use
    try:
        udp.bind((wildcard, port))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # the family has no address at all, so another port would not help
            raise
        _LOG.debug("UDP port %d is taken (%s), using another", port, error.strerror)
        udp.bind((wildcard, 0))
