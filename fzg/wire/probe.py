"""Path probes of connections without ICE: echo requests inside the tunnel (spec connectivity 6.7, tunnel 6.7)."""

from __future__ import annotations

from fzg.wire.checksum import internet_checksum, pseudo_header_sum
from fzg.wire.ip import ICMP_HEADER, IPV6_HEADER, PROTOCOL_ICMPV6

LENGTH = IPV6_HEADER + ICMP_HEADER  # there is no echo data
_ADDRESSES = slice(8, IPV6_HEADER)
_SOURCE = bytes.fromhex("01000000000000000000dead01ce0001")  # 100::dead:1ce:1
_DESTINATION = bytes.fromhex("01000000000000000000dead01ce0002")
_SUM = pseudo_header_sum(_SOURCE, _DESTINATION, PROTOCOL_ICMPV6, ICMP_HEADER)
_REQUEST, _REPLY = b"\x80\0", b"\x81\0"  # type and code


def answer(packet: bytes) -> bytes | None:
    """The reply to a probe: the same addresses, unswapped, identifier and sequence. None for any other packet."""
    if len(packet) != LENGTH or packet[_ADDRESSES] != _SOURCE + _DESTINATION or packet[6] != PROTOCOL_ICMPV6:
        return None
    message = packet[IPV6_HEADER:]
    if message[:2] != _REQUEST or internet_checksum(message, _SUM) != 0:
        return None
    numbers = message[4:]
    checksum = internet_checksum(_REPLY + numbers, _SUM)
    return packet[:IPV6_HEADER] + _REPLY + checksum.to_bytes(2) + numbers
