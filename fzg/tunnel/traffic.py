"""What one client sent and received: packets, and bytes after the transport header (as spec tunnel 10.3 counts)."""

from __future__ import annotations

from typing import Final

from fzg.wire.ip import PROTOCOL_TCP, PROTOCOL_UDP, UDP_HEADER

# A flow report says which flow it is of by a number of 63 bits. The lowest are the tunnel's own, enough for ten
# thousand new flows a second over 300 days; then the direction; the rest is the client's handle, of which 16 million
# are counted, and later ones not.
TOKEN_BITS: Final = 38
_TOKEN: Final = (1 << TOKEN_BITS) - 1
_HANDLE_SHIFT: Final = TOKEN_BITS + 1
_HANDLES: Final = 1 << (63 - _HANDLE_SHIFT)


class Traffic:
    """Totals since the client became known; refused packets are not counted."""

    __slots__ = ("received_bytes", "received_packets", "sent_bytes", "sent_packets")

    def __init__(self) -> None:
        self.received_packets = self.received_bytes = 0
        self.sent_packets = self.sent_bytes = 0

    def count(self, packets: int, payload_bytes: int, *, inbound: bool) -> None:
        """Add what came from the client (`inbound`), or what went to it."""
        if inbound:
            self.received_packets += packets
            self.received_bytes += payload_bytes
        else:
            self.sent_packets += packets
            self.sent_bytes += payload_bytes


def mark(token: int, handle: int, *, inbound: bool) -> int:
    """The tunnel's token together with the client and the direction."""
    return token | inbound << TOKEN_BITS | (handle << _HANDLE_SHIFT if handle < _HANDLES else 0)


def unmark(token: int) -> tuple[int, int, bool]:
    """The tunnel's token, the client's handle (0: not counted) and whether it is inbound."""
    return token & _TOKEN, token >> _HANDLE_SHIFT, bool(token >> TOKEN_BITS & 1)


def payload_length(packet: bytes) -> int:
    """Bytes after the transport header of a packet that `ip.parse` takes."""
    if packet[0] >> 4 == 4:
        start, protocol = (packet[0] & 0xF) * 4, packet[9]
    else:
        start, protocol = 40, packet[6]
    if protocol == PROTOCOL_TCP:
        start += (packet[start + 12] >> 4) * 4
    elif protocol == PROTOCOL_UDP:
        start += UDP_HEADER
    return len(packet) - start
