"""When each connection wants to be woken: one deadline per connection, the soonest first."""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fzg.node.connection import Connection
    from fzg.sansio import Deadline

# Superseded entries stay in the heap until their time or until they are the greater part of it.
SPARE_ENTRIES = 64


class Timers:
    """A heap whose superseded entries are skipped, so that the cost per connection does not grow with their number."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Connection]] = []
        self._armed: dict[Connection, tuple[int, Deadline]] = {}
        self._sequence = count()

    def __len__(self) -> int:
        return len(self._armed)

    def arm(self, connection: Connection, deadline: Deadline | None) -> None:
        """Wake the connection then, and at no other time."""
        if deadline is None:
            self.cancel(connection)
            return
        armed = self._armed.get(connection)
        if armed is not None and armed[1].at == deadline.at:
            return
        sequence = next(self._sequence)
        self._armed[connection] = sequence, deadline
        if len(self._heap) > 2 * len(self._armed) + SPARE_ENTRIES:
            self._heap = [(known.at, number, each) for each, (number, known) in self._armed.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (deadline.at, sequence, connection))

    def cancel(self, connection: Connection) -> None:
        """Do not wake the connection."""
        self._armed.pop(connection, None)

    def soonest(self) -> Deadline | None:
        """The next deadline."""
        while self._heap:
            _, sequence, connection = self._heap[0]
            armed = self._armed.get(connection)
            if armed is not None and armed[0] == sequence:
                return armed[1]
            heapq.heappop(self._heap)
        return None

    def take_due(self, now: float) -> list[Connection]:
        """The connections whose time has come, soonest first; they have to be armed again."""
        due = []
        while (deadline := self.soonest()) is not None and deadline.at <= now:
            connection = heapq.heappop(self._heap)[2]
            del self._armed[connection]
            due.append(connection)
        return due
