"""ICMP errors inside the tunnel: recognised (spec tunnel 2.3), generated (3.1) and translated for DNS NAT (4.2)."""

from __future__ import annotations

import struct
from enum import Enum, auto
from typing import NamedTuple

from fzg.wire import Malformed
from fzg.wire.checksum import internet_checksum, pseudo_header_sum
from fzg.wire.ip import (
    ECHO,
    ICMP_HEADER,
    IPV4_HEADER,
    IPV6_HEADER,
    MTU,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP,
    UDP,
    Packet,
    transport_offset,
)

ECHO_REQUEST = 8
ECHO_REQUEST_V6 = 128
UNREACHABLE = 3
TIME_EXCEEDED = 11
UNREACHABLE_V6 = 1
PACKET_TOO_BIG_V6 = 2
TIME_EXCEEDED_V6 = 3
FRAGMENTATION_NEEDED = 4  # code of UNREACHABLE

TTL = 20  # of generated errors, spec tunnel 1.4
_PORTS = 4  # bytes of embedded UDP or TCP that hold both ports
_QUOTED_IPV4 = 8  # bytes after the embedded IPv4 header, RFC 792
_QUOTED_IPV6 = MTU - IPV6_HEADER - ICMP_HEADER  # RFC 4443 2.4 (c)

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_ICMP = struct.Struct("!BBH4s")
_WORD = struct.Struct("!H")


class NotAnError(Enum):
    """Why a packet is not a recognised ICMP error."""

    OTHER = auto()
    """No ICMP at all, or an echo request or reply."""
    UNSUPPORTED = auto()
    """Another ICMP message, or an error whose embedded packet is not understood."""


class EmbeddedError(NamedTuple):
    """A recognised ICMP error. IPs and protocol values are those of the embedded packet, `embedded` its bytes."""

    type: int
    code: int
    rest: bytes  # the 4 bytes after the checksum
    source: bytes
    destination: bytes
    source_value: int
    destination_value: int
    embedded: bytes
    l4_offset: int  # inside `embedded`


def recognise(packet: Packet) -> EmbeddedError | NotAnError:
    """The three-valued test of spec tunnel 2.3."""
    if packet.source_value is not None or not packet.is_icmp:
        return NotAnError.OTHER
    data, start = packet.data, packet.l4_offset
    kind, code = data[start], data[start + 1]
    if packet.version == 4:
        if kind in (0, ECHO_REQUEST):
            return NotAnError.OTHER
        if kind not in (UNREACHABLE, TIME_EXCEEDED):
            return NotAnError.UNSUPPORTED
        embedded = _embedded_ipv4(data[start + ICMP_HEADER :])
    else:
        if kind in (ECHO_REQUEST_V6, ECHO_REQUEST_V6 + 1):
            return NotAnError.OTHER
        if kind not in (UNREACHABLE_V6, PACKET_TOO_BIG_V6, TIME_EXCEEDED_V6) or (kind == PACKET_TOO_BIG_V6 and code):
            return NotAnError.UNSUPPORTED
        embedded = _embedded_ipv6(data[start + ICMP_HEADER :])
    if embedded is None:
        return NotAnError.UNSUPPORTED
    return EmbeddedError(kind, code, bytes(data[start + 4 : start + 8]), *embedded)


def prohibited(packet: Packet) -> bytes:
    """The error that tells the sender to ask for a new authorization: v4 3/13, v6 1/1."""
    if packet.version == 4:
        return _refuse_ipv4(packet, code=13)
    return _refuse_ipv6(packet, code=1)


def network_unreachable(packet: Packet) -> bytes:
    """The error for a destination that authorization would not help to reach: v4 3/0, v6 1/3."""
    if packet.version == 4:
        return _refuse_ipv4(packet, code=0)
    return _refuse_ipv6(packet, code=3)


def translate(error: EmbeddedError, *, source: bytes, destination: bytes, source_value: int) -> bytes:
    """The error as the sender of the packet before NAT must see it (spec tunnel 4.2).

    `source` is the proxy IP, `destination` the client's, `source_value` the client's own port or identifier.
    """
    embedded = bytearray(error.embedded)
    value_offset = error.l4_offset + (4 if source_value >> 16 == PROTOCOL_ICMP else 0)
    _WORD.pack_into(embedded, value_offset, source_value & 0xFFFF)
    if len(source) == 4:
        embedded[16:20] = source
        keeps_rest = (error.type, error.code) == (UNREACHABLE, FRAGMENTATION_NEEDED)
        rest = error.rest if keeps_rest else bytes(4)
        return _ipv4(source, destination, error.type, error.code, rest, bytes(embedded))
    embedded[24:40] = source
    rest = error.rest if error.type == PACKET_TOO_BIG_V6 else bytes(4)
    return _ipv6(source, destination, error.type, error.code, rest, bytes(embedded))


def _refuse_ipv4(packet: Packet, code: int) -> bytes:
    quoted = bytes(packet.data[: packet.l4_offset + _QUOTED_IPV4])
    return _ipv4(packet.destination, packet.source, UNREACHABLE, code, bytes(4), quoted)


def _refuse_ipv6(packet: Packet, code: int) -> bytes:
    quoted = bytes(packet.data[:_QUOTED_IPV6])
    return _ipv6(packet.destination, packet.source, UNREACHABLE_V6, code, bytes(4), quoted)


def _ipv4(source: bytes, destination: bytes, kind: int, code: int, rest: bytes, payload: bytes) -> bytes:  # noqa: PLR0917
    total = IPV4_HEADER + ICMP_HEADER + len(payload)
    header = bytearray(_IPV4.pack(0x45, 0, total, 0, 0, TTL, PROTOCOL_ICMP, 0, source, destination))
    _WORD.pack_into(header, 10, internet_checksum(header) or 0xFFFF)
    checksum = internet_checksum(_ICMP.pack(kind, code, 0, rest) + payload) or 0xFFFF
    return bytes(header) + _ICMP.pack(kind, code, checksum, rest) + payload


def _ipv6(source: bytes, destination: bytes, kind: int, code: int, rest: bytes, payload: bytes) -> bytes:  # noqa: PLR0917
    length = ICMP_HEADER + len(payload)
    header = _IPV6.pack(0x60000000, length, PROTOCOL_ICMPV6, TTL, source, destination)
    pseudo = pseudo_header_sum(source, destination, PROTOCOL_ICMPV6, length)
    checksum = internet_checksum(_ICMP.pack(kind, code, 0, rest) + payload, pseudo) or 0xFFFF
    return header + _ICMP.pack(kind, code, checksum, rest) + payload


_Embedded = tuple[bytes, bytes, int, int, bytes, int]


def _embedded_ipv4(data: bytes | bytearray) -> _Embedded | None:
    if len(data) < IPV4_HEADER or data[0] >> 4 != 4:
        return None
    offset = (data[0] & 0x0F) * 4
    # A fragment other than the first has no ports.
    if not IPV4_HEADER <= offset <= len(data) or int.from_bytes(data[6:8], "big") & 0x1FFF:
        return None
    values = _embedded_values(data, offset, data[9], PROTOCOL_ICMP, ECHO_REQUEST)
    if values is None:
        return None
    return bytes(data[12:16]), bytes(data[16:20]), *values, bytes(data), offset


def _embedded_ipv6(data: bytes | bytearray) -> _Embedded | None:
    if len(data) < IPV6_HEADER or data[0] >> 4 != 6:
        return None
    try:
        protocol, offset = transport_offset(data, limit=len(data))
    except Malformed:
        return None
    values = _embedded_values(data, offset, protocol, PROTOCOL_ICMPV6, ECHO_REQUEST_V6)
    if values is None:
        return None
    return bytes(data[8:24]), bytes(data[24:40]), *values, bytes(data), offset


def _embedded_values(
    data: bytes | bytearray, offset: int, protocol: int, icmp: int, echo_request: int
) -> tuple[int, int] | None:
    rest = len(data) - offset
    if protocol in (PROTOCOL_TCP, PROTOCOL_UDP):
        if rest < _PORTS:
            return None
        source, destination = struct.unpack_from("!HH", data, offset)
        tag = TCP if protocol == PROTOCOL_TCP else UDP
        return tag | source, tag | destination
    if protocol == icmp and rest >= ICMP_HEADER and data[offset] == echo_request and data[offset + 1] == 0:
        value = ECHO | data[offset + 4] << 8 | data[offset + 5]
        return value, value
    return None
