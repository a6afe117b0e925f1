"""What crosses an interface of a namespace, with the kernel's time stamps, and whether its checksums are right."""

from __future__ import annotations

import array
import fcntl
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from gateway_process import inside

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.lab.namespaces import Namespace

_ETH_P_ALL, _OUTGOING = 3, 4
_SOL_PACKET, _PACKET_AUXDATA, _CSUM_NOT_READY = 263, 8, 8
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # <linux/ethtool.h>: transmit checksums, TSO, GSO, GRO
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58


class Packet(NamedTuple):
    """One IP packet. `at` is CLOCK_BOOTTIME; `outgoing` as seen from the namespace; `complete`: checksums are in."""

    at: float
    outgoing: bool
    data: bytes
    complete: bool

    @property
    def protocol(self) -> int:
        """The transport protocol."""
        return self.data[9] if self.version == 4 else self.data[6]

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.data[0] >> 4

    @property
    def source(self) -> str:
        """The source address."""
        return _address(self.data[12:16] if self.version == 4 else self.data[8:24])

    @property
    def destination(self) -> str:
        """The destination address."""
        return _address(self.data[16:20] if self.version == 4 else self.data[24:40])

    @property
    def ecn(self) -> int:
        """The ECN field."""
        return self.data[1] & 3 if self.version == 4 else self.data[1] >> 4 & 3

    @property
    def transport(self) -> bytes:
        """What follows the IP header."""
        return self.data[(self.data[0] & 15) * 4 :] if self.version == 4 else self.data[40:]

    @property
    def ports(self) -> tuple[int, int]:
        """Source and destination port."""
        return struct.unpack_from("!HH", self.transport)

    def is_udp(self, port: int) -> bool:
        """Whether it is UDP from or to this port."""
        return self.protocol == _UDP and port in self.ports

    def has_good_checksums(self) -> bool:
        """Whether all checksums are right; a fragment's are not looked at."""
        if self.version == 4:
            if _sum16(self.data[: (self.data[0] & 15) * 4]) != 0xFFFF:
                return False
            if struct.unpack_from("!H", self.data, 6)[0] & 0x3FFF:
                return True
        transport = self.transport
        if self.protocol == _UDP and transport[6:8] == b"\0\0":
            return self.version == 4  # none, which IPv4 allows
        if self.protocol == _ICMP:
            return _sum16(transport) == 0xFFFF
        if self.protocol not in {_TCP, _UDP, _ICMPV6}:
            return True
        addresses = self.data[12:20] if self.version == 4 else self.data[8:40]
        return _sum16(addresses + struct.pack("!II", len(transport), self.protocol) + transport) == 0xFFFF


class Capture:
    """Records an interface from `start` (or entering the context) to `stop`; `packets` may be read meanwhile."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        self.packets: list[Packet] = []
        with inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)  # nothing of any interface until bound
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.bind((interface, _ETH_P_ALL))
        self._until = float("inf")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._to_boottime = time.clock_gettime(time.CLOCK_BOOTTIME) - time.time()

    def stop(self) -> list[Packet]:
        """Take in what came until now, and no more."""
        self._until = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._thread.join()
        self._socket.close()
        return self.packets

    def _run(self) -> None:
        while True:
            if not select.select([self._socket], [], [], 0.02)[0]:
                if time.clock_gettime(time.CLOCK_BOOTTIME) > self._until + 0.02:
                    return
                continue
            data, ancillary, _, address = self._socket.recvmsg(1 << 17, 256)
            at, complete = 0.0, True
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = struct.unpack("qq", value[:16])
                    at = seconds + nanoseconds / 1e9 + self._to_boottime
                elif level == _SOL_PACKET and kind == _PACKET_AUXDATA:
                    complete = not struct.unpack_from("I", value)[0] & _CSUM_NOT_READY
            if at > self._until:
                return
            if data and data[0] >> 4 in {4, 6}:
                self.packets.append(Packet(at, address[2] == _OUTGOING, data, complete))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()


def without_offload(namespace: Namespace, *interfaces: str) -> None:
    """Let the kernel itself cut and sum what leaves through these interfaces, so that a capture sees the real wire."""
    with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for interface in interfaces:
            for command in _OFFLOADS:
                value = array.array("B", struct.pack("=II", command, 0))
                request = struct.pack("16sP16x", interface.encode(), value.buffer_info()[0])
                fcntl.ioctl(sock, _SIOCETHTOOL, request)


def udp(packets: Iterable[Packet], port: int, *, outgoing: bool) -> list[Packet]:
    """The UDP packets of one direction with this port at either end."""
    return [packet for packet in packets if packet.outgoing is outgoing and packet.is_udp(port)]


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _sum16(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
