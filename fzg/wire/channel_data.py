"""ChannelData messages (RFC 8656 12.4; spec turn 3.3)."""

from __future__ import annotations

import struct
from typing import Final

from fzg.wire import Malformed

FIRST_CHANNEL: Final = 0x4000
LAST_CHANNEL: Final = 0x4FFF

_HEADER: Final = struct.Struct(">HH")  # number, length
_MAX_PADDING: Final = 3  # pion and eturnal pad to a multiple of 4 even over UDP


def parse(data: bytes) -> tuple[int, bytes]:
    """Channel number and payload; up to 3 bytes of padding are dropped. Raises Malformed."""
    if len(data) < _HEADER.size:
        raise Malformed("ChannelData is shorter than its header")
    number, length = _HEADER.unpack_from(data)
    if not FIRST_CHANNEL <= number <= LAST_CHANNEL:
        raise Malformed("ChannelData number is not in 0x4000..0x4FFF")
    surplus = len(data) - _HEADER.size - length
    if surplus < 0:
        raise Malformed("ChannelData is shorter than its length field")
    if surplus > _MAX_PADDING:
        raise Malformed("ChannelData has more than 3 bytes behind its payload")
    return number, bytes(data[_HEADER.size : _HEADER.size + length])


def encode(number: int, payload: bytes) -> bytes:
    """Header and payload without padding, which a Firezone relay's fast path would drop."""
    return _HEADER.pack(number, len(payload)) + payload
