"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624, eqn. 3), on Python integers.

2^16 is 1 modulo 2^16 - 1, so the one's complement sum of 16-bit words is the big-endian number modulo 65535.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview


_FOLDS = tuple((bits, (1 << bits) - 1) for bits in (5120, 2560, 1280))  # halves, quarters and eighths of a packet
_WORTH_FOLDING = 320  # bytes: below, the division costs less


def congruent(data: Buffer) -> int:
    """A number that equals `data`, read as a big-endian number, modulo 65535, and is zero for zeros only.

    Adding up parts of a packet takes a third of the time that dividing all of it does.
    """
    value = int.from_bytes(data, "big")
    if len(data) > _WORTH_FOLDING:
        for bits, mask in _FOLDS:
            value = (value >> bits) + (value & mask)
    return value


def sum16(data: Buffer, initial: int = 0) -> int:
    """The folded one's complement sum of `data` plus `initial`, not complemented; an odd last byte is padded right."""
    value = congruent(data)
    if len(data) & 1:
        value <<= 8
    value += initial
    # Folding never turns a non-zero sum into zero.
    return value % 0xFFFF or (0xFFFF if value else 0)


def internet_checksum(data: Buffer, initial: int = 0) -> int:
    """The complement of `sum16`. It is 0 over data that contains its own valid checksum."""
    return 0xFFFF - sum16(data, initial)


def pseudo_header_sum(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo header of RFC 9293 3.1 or RFC 8200 8.1, as `initial` of the other functions."""
    value = int.from_bytes(source + destination, "big") + protocol + (length >> 16) + (length & 0xFFFF)
    return value % 0xFFFF or 0xFFFF


def update(old_checksum: int, removed: Buffer, added: Buffer) -> int:
    """The checksum after 16-bit aligned `removed` became `added`; 0x0000 is given as 0xFFFF (spec tunnel 2.4)."""
    return apply(old_checksum, difference(removed, added))


def difference(removed: Buffer, added: Buffer) -> int:
    """What `apply` takes; differences of several changes may be added up. Both arguments have even lengths."""
    return int.from_bytes(removed, "big") - int.from_bytes(added, "big")


def apply(old_checksum: int, change: int) -> int:
    """`old_checksum` after a `difference`; 0x0000 is given as 0xFFFF, which a verifier takes as equal."""
    return (old_checksum + change) % 0xFFFF or 0xFFFF
