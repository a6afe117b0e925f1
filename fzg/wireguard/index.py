"""Connection indices: the upper 24 bits of every session index of a connection (spec connectivity 1.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

    from fzg.sansio import Random

INDEX_BITS = 24
_MASK = (1 << INDEX_BITS) - 1
# Taps 24, 23, 21, 20: a maximal Galois register, so that all 2^24 - 1 states come before one returns.
_TAPS = 0xD80000


class IndexAllocator:
    """Draws 24-bit indices in a scattered order without repetition for 2^24 - 1 draws."""

    __slots__ = ("_mask", "_state")

    def __init__(self, random: Random) -> None:
        self._state = _nonzero(random)
        self._mask = _nonzero(random)

    def next(self, in_use: Container[int] = ()) -> int:
        """The next index that is not `in_use`; raises RuntimeError if all of them are."""
        for _ in range(_MASK):
            state = self._state
            self._state = (state >> 1) ^ (_TAPS if state & 1 else 0)
            index = (state - 1) ^ self._mask
            if index not in in_use:
                return index
        raise RuntimeError("all 24-bit connection indices are in use")


class SessionIndices:
    """The 32-bit indices of one connection: its own 24 bits, then a counter that wraps and begins with 1."""

    __slots__ = ("_base", "_counter")

    def __init__(self, connection_index: int) -> None:
        if not 0 <= connection_index <= _MASK:
            raise ValueError(f"connection index {connection_index:#x} has more than 24 bits")
        self._base = connection_index << 8
        self._counter = 0

    def next(self) -> int:
        """Drawn for every initiation and response that is formatted."""
        self._counter = (self._counter + 1) & 0xFF
        return self._base | self._counter


def _nonzero(random: Random) -> int:
    while True:
        value = int.from_bytes(random(3), "big")
        if value:
            return value
