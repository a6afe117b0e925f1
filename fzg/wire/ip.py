"""Inner IP packets: the validation of spec tunnel 2.1, protocol values of 2.2, NAT rewrites of 2.4 and ECN of 2.5.

A *protocol value* is the tagged 16-bit number that filters and NAT decide on, held in one integer: the transport's
tag (`TCP`, `UDP`, `ECHO`) in the upper half, port or echo identifier in the lower. Packets that have none carry None.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from fzg.sansio import EcnCodepoint
from fzg.wire import Malformed
from fzg.wire.checksum import apply, internet_checksum, pseudo_header_sum

if TYPE_CHECKING:
    Buffer = bytes | bytearray

# IANA protocol numbers.
PROTOCOL_ICMP = 1
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17
PROTOCOL_ICMPV6 = 58
PROTOCOL_CONTROL = 255  # spec tunnel 1.4

# Tags of protocol values.
ECHO = PROTOCOL_ICMP << 16
TCP = PROTOCOL_TCP << 16
UDP = PROTOCOL_UDP << 16

MTU = 1280  # largest inner packet, spec tunnel 1.2
IPV4_HEADER = 20
IPV6_HEADER = 40
UDP_HEADER = 8
TCP_HEADER = 20
ICMP_HEADER = 8

# TCP flag bits, byte 13 of the header.
TCP_FIN = 0x01
TCP_SYN = 0x02
TCP_RST = 0x04
TCP_ACK = 0x10

# Fixed IPv4 header, then the first 8 bytes of what follows when there are no options.
_IPV4_AND_L4 = struct.Struct("!BBHHHBBH4s4sHHHH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!4xHBB16s16s")
_PORTS = struct.Struct("!HHHH")
_WORD = struct.Struct("!H")

# More-Fragments and the offset; DF and the reserved bit do not matter (spec tunnel 2.1).
_IPV4_FRAGMENT_BITS = 0x3FFF
# Offset and M of the IPv6 fragment header without its two reserved bits (RFC 8200 4.5).
_IPV6_FRAGMENT_BITS = 0xFFF9
_FRAGMENT_HEADER = 44
# Headers of the form next-header, length, data that are walked to find the transport (spec tunnel 2.1).
_EXTENSION_HEADERS = frozenset({0, 43, _FRAGMENT_HEADER, 60, 135, 139, 140, 253, 254})

_IPV6_DESTINATION_OFFSET = 24


class Fragment(Malformed):
    """A well-formed fragment: dropped like the rest, but nothing worth a warning."""


class Packet:
    """One valid inner packet and where its parts are. `source` and `destination` are 4 or 16 bytes.

    `source_value` and `destination_value` are protocol values or None; `tcp_flags` is 0 unless the packet is TCP.
    """

    __slots__ = (
        "data",
        "destination",
        "destination_value",
        "l4_offset",
        "protocol",
        "source",
        "source_value",
        "tcp_flags",
        "version",
    )

    def __init__(  # noqa: PLR0917 - made for every packet
        self,
        data: Buffer,
        version: int,
        source: bytes,
        destination: bytes,
        protocol: int,
        l4_offset: int,
        source_value: int | None,
        destination_value: int | None,
        tcp_flags: int,
    ) -> None:
        self.data = data
        self.version = version
        self.source = source
        self.destination = destination
        self.protocol = protocol
        self.l4_offset = l4_offset
        self.source_value = source_value
        self.destination_value = destination_value
        self.tcp_flags = tcp_flags

    @property
    def is_icmp(self) -> bool:
        """Whether the transport is ICMP of the packet's family."""
        return self.protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6)

    @property
    def payload_length(self) -> int:
        """Bytes after the transport header: what flow records count (spec tunnel 10.3)."""
        rest = len(self.data) - self.l4_offset
        if self.protocol == PROTOCOL_UDP:
            return rest - UDP_HEADER
        if self.protocol == PROTOCOL_TCP:
            return rest - (self.data[self.l4_offset + 12] >> 4) * 4
        return rest

    def __repr__(self) -> str:
        return f"Packet(version={self.version}, protocol={self.protocol}, length={len(self.data)})"


def parse(data: Buffer) -> Packet:
    """A view of `data` if it passes spec tunnel 2.1; `Fragment` or another `Malformed` if not."""
    length = len(data)
    if not 0 < length <= MTU:
        raise Malformed(f"IP packet has {length} bytes")
    first = data[0]
    if first == 0x45:
        if length < IPV4_HEADER + 8:
            return _parse_ipv4(data)
        (
            _, _, total, _, fragment, _, protocol, _, source, destination, source_port, destination_port, third, _,
        ) = _IPV4_AND_L4.unpack_from(data)  # fmt: skip
        if total != length:
            raise Malformed("IPv4 total length differs from the packet's length")
        if fragment & _IPV4_FRAGMENT_BITS:
            raise Fragment("IPv4 fragment")
        if protocol == PROTOCOL_TCP:
            flags = _tcp_flags(data, IPV4_HEADER, length)
            return Packet(data, 4, source, destination, protocol, 20, TCP | source_port, TCP | destination_port, flags)
        if protocol == PROTOCOL_UDP:
            if third != length - IPV4_HEADER:
                raise Malformed("UDP length differs from the bytes that follow the IP header")
            return Packet(data, 4, source, destination, protocol, 20, UDP | source_port, UDP | destination_port, 0)
        return _other(data, 4, source, destination, protocol, IPV4_HEADER)
    if first >> 4 == 4:
        return _parse_ipv4(data)
    if first >> 4 == 6:
        return _parse_ipv6(data)
    raise Malformed(f"IP version {first >> 4}")


def rewrite_to_network(packet: Packet, destination: bytes, source_port: int) -> bytes:
    """A copy with another destination IP and source port or echo identifier, checksums updated (spec tunnel 2.4)."""
    offset = 16 if packet.version == 4 else _IPV6_DESTINATION_OFFSET
    return _rewrite(packet, offset, packet.destination, destination, packet.l4_offset, source_port)


def rewrite_to_client(packet: Packet, source: bytes, destination_port: int) -> bytes:
    """A copy with another source IP and destination port or echo identifier, checksums updated (spec tunnel 2.4)."""
    offset = 12 if packet.version == 4 else 8
    return _rewrite(packet, offset, packet.source, source, packet.l4_offset + 2, destination_port)


def ecn_of(data: Buffer) -> int:
    """The ECN codepoint of a valid IP packet."""
    return data[1] & 0b11 if data[0] >> 4 == 4 else data[1] >> 4 & 0b11


def mark_ce(data: bytes) -> bytes:
    """The packet with CE if it is ECT(0) or ECT(1); any other comes back as it is (spec tunnel 2.5)."""
    second = data[1]
    if data[0] >> 4 == 4:
        if second & 0b11 not in (EcnCodepoint.ECT0, EcnCodepoint.ECT1):
            return data
        marked = bytearray(data)
        marked[1] = second | EcnCodepoint.CE
        _WORD.pack_into(marked, 10, apply(int.from_bytes(data[10:12], "big"), second - marked[1]))
        return bytes(marked)
    if second >> 4 & 0b11 not in (EcnCodepoint.ECT0, EcnCodepoint.ECT1):
        return data
    return data[:1] + bytes((second | EcnCodepoint.CE << 4,)) + data[2:]


def has_valid_checksums(packet: Packet) -> bool:
    """Whether the IPv4 header, TCP, UDP and ICMP checksums are right; a UDP checksum of 0 is."""
    data, offset, protocol = packet.data, packet.l4_offset, packet.protocol
    if packet.version == 4 and internet_checksum(data[: (data[0] & 0x0F) * 4]) != 0:
        return False
    if protocol == PROTOCOL_ICMP:
        return internet_checksum(data[offset:]) == 0
    if protocol == PROTOCOL_UDP and data[offset + 6 : offset + 8] == b"\0\0":
        return True
    if protocol in (PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_ICMPV6):
        pseudo = pseudo_header_sum(packet.source, packet.destination, protocol, len(data) - offset)
        return internet_checksum(data[offset:], pseudo) == 0
    return True


def transport_offset(data: Buffer, *, limit: int) -> tuple[int, int]:
    """Protocol and offset of the transport of an IPv6 packet; raises `Malformed`, `Fragment`. `limit`: end of data."""
    following, offset = data[6], IPV6_HEADER
    while following in _EXTENSION_HEADERS:
        if offset + 8 > limit:
            raise Malformed("IPv6 extension header runs past the packet")
        if following == _FRAGMENT_HEADER:
            if int.from_bytes(data[offset + 2 : offset + 4], "big") & _IPV6_FRAGMENT_BITS:
                raise Fragment("IPv6 fragment")
            size = 8
        else:
            size = (data[offset + 1] + 1) * 8
        following = data[offset]
        offset += size
        if offset > limit:
            raise Malformed("IPv6 extension header runs past the packet")
    return following, offset


def _parse_ipv4(data: Buffer) -> Packet:
    length = len(data)
    if length < IPV4_HEADER:
        raise Malformed("IPv4 header is less than 20 bytes")
    first, _, total, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(data)
    header = (first & 0x0F) * 4
    if not IPV4_HEADER <= header <= length:
        raise Malformed("IPv4 header length is out of bounds")
    if total != length:
        raise Malformed("IPv4 total length differs from the packet's length")
    if fragment & _IPV4_FRAGMENT_BITS:
        raise Fragment("IPv4 fragment")
    return _transport(data, 4, source, destination, protocol, header)


def _parse_ipv6(data: Buffer) -> Packet:
    length = len(data)
    if length < IPV6_HEADER:
        raise Malformed("IPv6 header is less than 40 bytes")
    payload, protocol, _, source, destination = _IPV6.unpack_from(data)
    if payload + IPV6_HEADER != length:
        raise Malformed("IPv6 payload length differs from the packet's length")
    offset = IPV6_HEADER
    if protocol in _EXTENSION_HEADERS:
        protocol, offset = transport_offset(data, limit=length)
    return _transport(data, 6, source, destination, protocol, offset)


def _transport(data: Buffer, version: int, source: bytes, destination: bytes, protocol: int, offset: int) -> Packet:  # noqa: PLR0917
    length = len(data)
    if protocol == PROTOCOL_TCP:
        flags = _tcp_flags(data, offset, length)
        source_port, destination_port, _, _ = _PORTS.unpack_from(data, offset)
        return Packet(
            data, version, source, destination, protocol, offset, TCP | source_port, TCP | destination_port, flags
        )
    if protocol == PROTOCOL_UDP:
        if length - offset < UDP_HEADER:
            raise Malformed("UDP header is less than 8 bytes")
        source_port, destination_port, size, _ = _PORTS.unpack_from(data, offset)
        if size != length - offset:
            raise Malformed("UDP length differs from the bytes that follow the IP header")
        return Packet(
            data, version, source, destination, protocol, offset, UDP | source_port, UDP | destination_port, 0
        )
    return _other(data, version, source, destination, protocol, offset)


def _tcp_flags(data: Buffer, offset: int, length: int) -> int:
    if length - offset < TCP_HEADER:
        raise Malformed("TCP header is less than 20 bytes")
    header = (data[offset + 12] >> 4) * 4
    if header < TCP_HEADER or header > length - offset:
        raise Malformed("TCP data offset is out of bounds")
    return data[offset + 13]


def _other(data: Buffer, version: int, source: bytes, destination: bytes, protocol: int, offset: int) -> Packet:  # noqa: PLR0917
    value = None
    if protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
        if (protocol == PROTOCOL_ICMP) != (version == 4):
            raise Malformed("ICMP of the other IP family")
        if len(data) - offset < ICMP_HEADER:
            raise Malformed("ICMP header is less than 8 bytes")
        echo = (8, 0) if version == 4 else (128, 129)
        if data[offset] in echo and data[offset + 1] == 0:
            value = ECHO | data[offset + 4] << 8 | data[offset + 5]
    return Packet(data, version, source, destination, protocol, offset, value, value, 0)


def _rewrite(packet: Packet, ip_offset: int, old_ip: bytes, new_ip: bytes, port_offset: int, port: int) -> bytes:  # noqa: PLR0917
    data = bytearray(packet.data)
    protocol, l4 = packet.protocol, packet.l4_offset
    change = int.from_bytes(old_ip, "big") - int.from_bytes(new_ip, "big")
    data[ip_offset : ip_offset + len(new_ip)] = new_ip
    if packet.version == 4:
        _WORD.pack_into(data, 10, apply(data[10] << 8 | data[11], change))
    if protocol == PROTOCOL_TCP:
        checksum_offset = l4 + 16
    elif protocol == PROTOCOL_UDP:
        checksum_offset = l4 + 6
    else:
        # Echo: the identifier stands for both ports; ICMPv4 has no pseudo header.
        checksum_offset, port_offset = l4 + 2, l4 + 4
        if protocol == PROTOCOL_ICMP:
            change = 0
    checksum = data[checksum_offset] << 8 | data[checksum_offset + 1]
    change += (data[port_offset] << 8 | data[port_offset + 1]) - port
    _WORD.pack_into(data, port_offset, port)
    # Zero in UDP means "not computed" and stays.
    if checksum or protocol != PROTOCOL_UDP:
        _WORD.pack_into(data, checksum_offset, apply(checksum, change))
    return bytes(data)
