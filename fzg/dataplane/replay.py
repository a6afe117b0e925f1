"""The replay window of one WireGuard session (spec connectivity 5.8)."""

from __future__ import annotations

WINDOW_SIZE = 8192  # counters, spec connectivity 5.8

# One byte more than the window, so that clearing the byte that the newest counter enters spares the oldest valid one.
_RING_BYTES = WINDOW_SIZE // 8 + 1


class ReplayWindow:
    """Which counters were accepted. `next` is the highest accepted one plus one."""

    __slots__ = ("_ring", "next")

    def __init__(self) -> None:
        self.next = 0
        self._ring = bytearray(_RING_BYTES)

    def accepts(self, counter: int) -> bool:
        """Whether the counter is neither too old nor a duplicate; changes nothing."""
        if counter >= self.next:
            return True
        if counter + WINDOW_SIZE < self.next:
            return False
        return not self._ring[(counter >> 3) % _RING_BYTES] >> (counter & 7) & 1

    def mark(self, counter: int) -> None:
        """Record a counter that was accepted and whose packet authenticated."""
        ring = self._ring
        index = counter >> 3
        if counter >= self.next:
            newest = self.next - 1 >> 3
            if index > newest:
                self._clear(newest + 1, index)
            self.next = counter + 1
        ring[index % _RING_BYTES] |= 1 << (counter & 7)

    def _clear(self, first: int, last: int) -> None:
        if last - first >= _RING_BYTES:
            self._ring[:] = bytes(_RING_BYTES)
            return
        for index in range(first, last + 1):
            self._ring[index % _RING_BYTES] = 0
