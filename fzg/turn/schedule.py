"""Deadlines by key, soonest first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

K = TypeVar("K", bound="Hashable")


class Schedule(Generic[K]):
    """One deadline per key. Moving and cancelling are O(log n); superseded heap entries go away when they surface."""

    __slots__ = ("_heap", "_live", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._live: dict[K, int] = {}
        self._serial = 0

    def set(self, key: K, at: float) -> None:
        """Make `at` the key's only deadline."""
        self._serial += 1
        self._live[key] = self._serial
        heapq.heappush(self._heap, (at, self._serial, key))
        if len(self._heap) > 64 + 2 * len(self._live):  # deadlines that move often must not pile up
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def cancel(self, key: K) -> None:
        """Forget the key's deadline, if it has one."""
        self._live.pop(key, None)

    def clear(self) -> None:
        """Forget all deadlines."""
        self._heap.clear()
        self._live.clear()

    def soonest(self) -> float | None:
        """The first deadline."""
        heap = self._heap
        while heap:
            at, serial, key = heap[0]
            if self._live.get(key) == serial:
                return at
            heapq.heappop(heap)
        return None

    def pop_due(self, now: float) -> K | None:
        """Take one key whose deadline has come; it has none any more."""
        at = self.soonest()
        if at is None or at > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._live[key]
        return key
