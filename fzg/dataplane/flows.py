"""Flow entries: verdicts of the policy for packets that are identical in all that the policy looks at.

A key is bytes: source IP, destination IP, the two ports (an echo identifier stands for both), protocol number.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from fzg.dataplane.engine import FlowKey, FlowReport, Rewrite
from fzg.wire import checksum
from fzg.wire.ip import (
    ICMP_HEADER,
    IPV4_HEADER,
    IPV6_HEADER,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_FIN,
    TCP_HEADER,
    TCP_RST,
    TCP_SYN,
    UDP_HEADER,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from fzg.dataplane.sessions import Peer

# Version and IHL, total length, fragment bits, protocol, addresses with ports.
_IPV4 = struct.Struct(">BxHxxHxBxx12s")
_IPV6 = struct.Struct(">4xHBx36s")
_PORTS_AND_PROTOCOL = struct.Struct(">HHB")
_WORD = struct.Struct(">H")

_IPV4_WITHOUT_OPTIONS = 0x45
# More-Fragments and offset (spec tunnel 2.1).
_IPV4_FRAGMENT_BITS = 0x3FFF

_TCP_SUFFIX = bytes((PROTOCOL_TCP,))
_UDP_SUFFIX = bytes((PROTOCOL_UDP,))
_ICMP_SUFFIX = bytes((PROTOCOL_ICMP,))
_ICMPV6_SUFFIX = bytes((PROTOCOL_ICMPV6,))

# Addresses, ports and protocol of an IPv4 key; one of IPv6 is longer.
IPV4_KEY_SIZE = 13

# Segments that open or end a connection are always for the policy (design 4).
_TCP_NEVER_CACHED = TCP_SYN | TCP_FIN | TCP_RST

# Entries live a second. This many are 65,536 packets a second of distinct 5-tuples, more than the policy can decide;
# a flood of them costs some 50 MB and no more.
MAX_FLOWS = 65_536

Buffer = bytes | bytearray | memoryview


def flow_key(data: Buffer, start: int, length: int) -> bytes | None:
    """The key of the IP packet at `start`, or None if such a packet can have no flow. Cannot fail.

    None: IP options, extension headers, fragments, lengths that disagree, ICMP other than echo, other protocols.
    """
    if length < IPV4_HEADER + ICMP_HEADER:
        return None
    if data[start] == _IPV4_WITHOUT_OPTIONS:
        _, total, fragment, protocol, tuple_ = _IPV4.unpack_from(data, start)
        if total != length or fragment & _IPV4_FRAGMENT_BITS:
            return None
        header, icmp, echo = IPV4_HEADER, PROTOCOL_ICMP, (8, 0)
    elif data[start] >> 4 == 6 and length >= IPV6_HEADER + ICMP_HEADER:
        payload, protocol, tuple_ = _IPV6.unpack_from(data, start)
        if payload + IPV6_HEADER != length:
            return None
        header, icmp, echo = IPV6_HEADER, PROTOCOL_ICMPV6, (128, 129)
    else:
        return None
    l4 = start + header
    if protocol == PROTOCOL_TCP:
        if length < header + TCP_HEADER or not TCP_HEADER <= (data[l4 + 12] >> 4) * 4 <= length - header:
            return None
        return bytes(tuple_ + _TCP_SUFFIX)
    if protocol == PROTOCOL_UDP:
        return bytes(tuple_ + _UDP_SUFFIX) if data[l4 + 4] << 8 | data[l4 + 5] == length - header else None
    if protocol == icmp and data[l4] in echo and data[l4 + 1] == 0:
        identifier = bytes(data[l4 + 4 : l4 + 6])
        suffix = _ICMP_SUFFIX if protocol == PROTOCOL_ICMP else _ICMPV6_SUFFIX
        return bytes(tuple_[:-4] + identifier + identifier + suffix)
    return None


def pack_key(key: FlowKey) -> bytes:
    """The same from the interface's form."""
    return key.source + key.destination + _PORTS_AND_PROTOCOL.pack(key.source_port, key.destination_port, key.protocol)


class Flow:
    """One entry, and what it carried since its last report."""

    __slots__ = (
        "inbound",
        "is_tcp",
        "key",
        "l4_offset",
        "last_packet",
        "packets",
        "payload_bytes",
        "peer",
        "token",
        "translated_key",
        "translation",
        "valid_until",
    )

    def __init__(
        self, peer: Peer, key: bytes, *, inbound: bool, rewrite: Rewrite | None, valid_until: float, token: int
    ) -> None:
        self.peer = peer
        self.key = key
        self.inbound = inbound
        self.translation = Translation(key, rewrite, inbound=inbound) if rewrite is not None else None
        self.translated_key = self.translation.key if self.translation is not None else key
        self.valid_until = valid_until
        self.token = token
        self.is_tcp = key[-1] == PROTOCOL_TCP
        self.l4_offset = IPV4_HEADER if len(key) == IPV4_KEY_SIZE else IPV6_HEADER
        self.packets = 0
        self.payload_bytes = 0
        self.last_packet = 0.0

    def admits(self, data: Buffer, start: int, now: float) -> bool:
        """Whether a packet with this flow's key is covered by the verdict now."""
        return self.valid_until > now and not (self.is_tcp and data[start + self.l4_offset + 13] & _TCP_NEVER_CACHED)

    def count(self, data: Buffer, start: int, length: int, now: float) -> None:
        """One packet of `length` bytes at `start` was carried. Payload is what follows the transport header."""
        payload = length - self.l4_offset
        if self.is_tcp:
            payload -= (data[start + self.l4_offset + 12] >> 4) * 4
        elif self.key[-1] == PROTOCOL_UDP:
            payload -= UDP_HEADER
        self.packets += 1
        self.payload_bytes += payload
        self.last_packet = now

    def report(self) -> FlowReport | None:
        """What was carried since the last call; None if nothing was."""
        if not self.packets:
            return None
        report = FlowReport(self.token, self.packets, self.payload_bytes, self.last_packet)
        self.packets = self.payload_bytes = 0
        return report


class Translation:
    """DNS NAT of one flow, with the change of each checksum worked out beforehand (spec tunnel 2.4)."""

    __slots__ = (
        "_change",
        "_checksum_at",
        "_ip",
        "_ip_at",
        "_ip_change",
        "_is_ipv4",
        "_is_udp",
        "_port",
        "_port_at",
        "key",
    )

    def __init__(self, key: bytes, rewrite: Rewrite, *, inbound: bool) -> None:
        size = len(rewrite.ip)
        self._is_ipv4 = size == 4
        if len(key) != 2 * size + _PORTS_AND_PROTOCOL.size:
            raise ValueError("a rewrite cannot change the IP family")
        source, destination = key[:size], key[size : 2 * size]
        source_port, destination_port, protocol = _PORTS_AND_PROTOCOL.unpack_from(key, 2 * size)
        addresses_at = 12 if self._is_ipv4 else 8
        l4 = addresses_at + 2 * size
        self._ip = rewrite.ip
        self._ip_at = addresses_at + size if inbound else addresses_at
        self._ip_change = checksum.difference(destination if inbound else source, rewrite.ip)
        self._port = _WORD.pack(rewrite.port)
        self._is_udp = protocol == PROTOCOL_UDP
        is_echo = protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6)
        if is_echo:
            self._port_at, self._checksum_at = l4 + 4, l4 + 2
        else:
            self._port_at, self._checksum_at = l4 if inbound else l4 + 2, l4 + (6 if self._is_udp else 16)
        self._change = (source_port if inbound else destination_port) - rewrite.port
        if protocol != PROTOCOL_ICMP:  # ICMPv4 alone has no pseudo header
            self._change += self._ip_change
        if inbound or is_echo:
            source_port = rewrite.port
        if not inbound or is_echo:
            destination_port = rewrite.port
        addresses = source + rewrite.ip if inbound else rewrite.ip + destination
        self.key = addresses + _PORTS_AND_PROTOCOL.pack(source_port, destination_port, protocol)

    def apply(self, packet: bytearray, start: int = 0) -> None:
        """Rewrite the packet at `start` in place."""
        at = start + self._ip_at
        packet[at : at + len(self._ip)] = self._ip
        at = start + self._port_at
        packet[at : at + 2] = self._port
        if self._is_ipv4:
            _update(packet, start + 10, self._ip_change)
        at = start + self._checksum_at
        if self._is_udp and packet[at] == packet[at + 1] == 0:
            return  # "not computed" stays
        _update(packet, at, self._change)


class FlowTable:
    """All entries: those towards the network by client, those towards clients by key alone."""

    def __init__(self, drops: Counter[str]) -> None:
        self.outbound: dict[bytes, Flow] = {}
        self._peers: set[Peer] = set()
        self._count = 0
        self._reports: list[FlowReport] = []
        self._drops = drops

    def install(self, flow: Flow) -> None:
        """Add an entry or replace the one with its key; when the table is full the policy goes on deciding alone."""
        peer, key = flow.peer, flow.key
        old = peer.inbound.get(key) if flow.inbound else self.outbound.get(key)
        if old is not None:
            self._remove(old)
        elif self._count >= MAX_FLOWS:
            self._drops["flow_table_full"] += 1
            return
        if flow.inbound:
            peer.inbound[key] = flow
        else:
            peer.outbound[key] = flow
            self.outbound[key] = flow
        self._peers.add(peer)
        self._count += 1

    def revoke(self, peer: Peer) -> None:
        """Remove all entries of the peer; what they carried is in the next sweep."""
        for flow in (*peer.inbound.values(), *peer.outbound.values()):
            self._remove(flow)
        self._peers.discard(peer)

    def lapse(self, flow: Flow) -> FlowReport | None:
        """Remove an entry whose time is over, with its report."""
        report = flow.report()
        self._remove(flow)
        return report

    def sweep(self, now: float) -> list[FlowReport]:
        """Reports of all entries, and of removed ones; removes those whose time is over."""
        reports, self._reports = self._reports, []
        for flow in self._all():
            report = flow.report()
            if report is not None:
                reports.append(report)
            if flow.valid_until <= now:
                self._remove(flow)
        self._peers = {peer for peer in self._peers if peer.inbound or peer.outbound}
        return reports

    def _all(self) -> Iterator[Flow]:
        for peer in self._peers:
            yield from (*peer.inbound.values(), *peer.outbound.values())

    def _remove(self, flow: Flow) -> None:
        if flow.inbound:
            del flow.peer.inbound[flow.key]
        else:
            del flow.peer.outbound[flow.key]
            del self.outbound[flow.key]
        self._count -= 1
        report = flow.report()
        if report is not None:
            self._reports.append(report)


def _update(packet: bytearray, at: int, change: int) -> None:
    value = checksum.apply(packet[at] << 8 | packet[at + 1], change)
    packet[at] = value >> 8
    packet[at + 1] = value & 0xFF
