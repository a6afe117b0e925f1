"""STUN transactions over UDP: identical retransmission on a fixed schedule (spec turn 2.3, 2.4)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from fzg.turn.schedule import Schedule
from fzg.wire.stun import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    from fzg.wire.endpoint import Endpoint

RETRANSMISSION: Final = (1.0, 1.5, 2.25, 3.375)
"""Seconds between sends: at 0, 1, 2.5 and 4.75; given up at 8.125."""
SINGLE_SHOT: Final = (1.0,)
"""The forced probe of a relay that an update did not list."""


class Purpose(IntEnum):
    """What a request is for."""

    BINDING = Method.BINDING
    ALLOCATE = Method.ALLOCATE
    REFRESH = Method.REFRESH
    DELETE = -1
    CHANNEL_BIND = Method.CHANNEL_BIND

    @property
    def method(self) -> int:
        """The STUN method; a delete is a Refresh with LIFETIME 0."""
        return Method.REFRESH if self is Purpose.DELETE else self.value


@dataclass(slots=True, eq=False)
class Transaction:
    """One request in flight. `nonce` is the one it carries: None for a bare request."""

    id: bytes
    purpose: Purpose
    destination: Endpoint
    datagram: bytes
    nonce: bytes | None
    started: float
    challenges: int = 0
    peer: Endpoint | None = None
    channel: int = 0
    intervals: tuple[float, ...] = RETRANSMISSION
    sends: int = 1
    next_at: float = 0.0
    wrong_integrity: bool = False
    """A reply came whose MESSAGE-INTEGRITY was made with another key."""


class Transactions:
    """The requests in flight of one allocation. Bounded: one per channel number and a handful besides."""

    __slots__ = ("_by_id", "_count", "_schedule")

    def __init__(self) -> None:
        self._by_id: dict[bytes, Transaction] = {}
        self._count: Counter[Purpose] = Counter()
        self._schedule: Schedule[bytes] = Schedule()

    def __len__(self) -> int:
        return len(self._by_id)

    def start(self, transaction: Transaction) -> None:
        """Its datagram was sent for the first time."""
        self._by_id[transaction.id] = transaction
        self._count[transaction.purpose] += 1
        transaction.next_at = transaction.started + transaction.intervals[0]
        self._schedule.set(transaction.id, transaction.next_at)

    def shorten(self, transaction: Transaction, now: float) -> None:
        """It was sent once more, and is given up a second from now (spec turn 2.9)."""
        transaction.intervals = SINGLE_SHOT
        transaction.sends += 1
        transaction.next_at = now + SINGLE_SHOT[0]
        self._schedule.set(transaction.id, transaction.next_at)

    def find(self, transaction_id: bytes) -> Transaction | None:
        """The request that a response belongs to."""
        return self._by_id.get(transaction_id)

    def first(self, purpose: Purpose) -> Transaction | None:
        """Some request of this purpose in flight."""
        if not self._count[purpose]:
            return None
        return next(transaction for transaction in self._by_id.values() if transaction.purpose is purpose)

    def in_flight(self, purpose: Purpose) -> bool:
        """Whether a request of this purpose is in flight."""
        return self._count[purpose] > 0

    def finish(self, transaction: Transaction) -> None:
        """Forget it; later responses are unknown."""
        if self._by_id.pop(transaction.id, None) is not None:
            self._count[transaction.purpose] -= 1
            self._schedule.cancel(transaction.id)

    def finish_unless(self, keep: Callable[[Transaction], bool]) -> None:
        """Forget all but those that `keep` wants."""
        for transaction in [transaction for transaction in self._by_id.values() if not keep(transaction)]:
            self.finish(transaction)

    def soonest(self) -> float | None:
        """When `pop_due` has something next."""
        return self._schedule.soonest()

    def pop_due(self, now: float) -> tuple[Transaction, bool] | None:
        """One request that must be sent again (False), or has been given up and forgotten (True)."""
        transaction_id = self._schedule.pop_due(now)
        if transaction_id is None:
            return None
        transaction = self._by_id[transaction_id]
        if transaction.sends >= len(transaction.intervals):
            self.finish(transaction)
            return transaction, True
        interval = transaction.intervals[transaction.sends]
        transaction.sends += 1
        # Instants are absolute, except after a pause of the whole process, which must not eat the later attempts.
        following = transaction.next_at + interval
        transaction.next_at = following if following > now else now + interval
        self._schedule.set(transaction_id, transaction.next_at)
        return transaction, False
