"""When checks are sent and when a pair is given up (spec connectivity 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fzg.ice.role import Role


@dataclass(frozen=True, slots=True)
class Timing:
    """One retransmission profile: attempts remembered, longest and first interval in seconds."""

    max_retransmits: int
    max_rto: float
    initial_rto: float

    def delay(self, n: int) -> float:
        """Seconds from the n-th attempt of a series to the next."""
        if n <= 0:
            return 0.0
        return min(self.initial_rto * 2.0 ** min(n - 1, self.max_retransmits), self.max_rto)

    @property
    def is_idle(self) -> bool:
        """True for the flat profiles of a connection without traffic."""
        return self.initial_rto >= self.max_rto


SERVER_DEFAULT: Final = Timing(45, 15.0, 0.25)
SERVER_IDLE: Final = Timing(40, 25.0, 25.0)
CLIENT_DEFAULT: Final = Timing(12, 1.5, 0.25)
CLIENT_IDLE: Final = Timing(4, 25.0, 25.0)

ANSWERABLE: Final = 10.0
"""Seconds in which an answer to an attempt counts (spec connectivity 1.3)."""


class Attempt:
    """One connectivity check that was sent."""

    __slots__ = ("answered", "nominating", "priority", "role", "sent", "transaction_id")

    def __init__(self, transaction_id: bytes, sent: float, *, priority: int, role: Role, nominating: bool) -> None:
        self.transaction_id = transaction_id
        self.sent = sent
        self.priority = priority
        self.role = role
        self.nominating = nominating
        self.answered: float | None = None


class CheckHistory:
    """The last `max_retransmits` attempts of a pair, and what follows from them.

    Kept of them are their number, and ids for as long as an answer may come: a pair lives on hundreds of attempts.
    """

    __slots__ = ("_first_unanswered", "_last", "_length", "_recent", "_timing", "unanswered")

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._length = 0
        self._recent: list[Attempt] = []
        self._last = 0.0
        self._first_unanswered = 0.0
        self.unanswered = 0  # the most recent consecutive ones

    def __len__(self) -> int:
        return self._length

    def transaction_ids(self) -> list[bytes]:
        """The ids a response may still name."""
        return [attempt.transaction_id for attempt in self._recent]

    def record(self, attempt: Attempt) -> list[bytes]:
        """Append an attempt; returns the ids that are forgotten for it."""
        limit = self._timing.max_retransmits
        if not self.unanswered:
            self._first_unanswered = attempt.sent
        self._length = min(self._length + 1, limit)
        self.unanswered = min(self.unanswered + 1, limit)
        self._last = attempt.sent
        old = [one.transaction_id for one in self._recent if one.sent < attempt.sent - ANSWERABLE]
        self._recent = [*self._recent[len(old) :], attempt]
        return old

    def answer(self, attempt: Attempt, now: float) -> None:
        """A valid response to `attempt` arrived."""
        attempt.answered = now
        self.unanswered = 0
        for recent in reversed(self._recent):
            if recent.answered is not None:
                break
            self.unanswered += 1
            self._first_unanswered = recent.sent

    def set_timing(self, timing: Timing) -> None:
        """Change the profile."""
        self._timing = timing
        self._length = min(self._length, timing.max_retransmits)
        self.unanswered = min(self.unanswered, timing.max_retransmits)

    def next_check(self, now: float) -> float:
        """When the next attempt is due: after the ladder, or, once answers stopped, the ladder from its start."""
        if not self._length:
            return now
        timing = self._timing
        step = self._length
        # While the first unanswered attempt is young its answer may just be late.
        if self.unanswered and now - self._first_unanswered > timing.max_rto / 2:
            step = self.unanswered
        return self._last + timing.delay(step)

    def is_exhausted(self, now: float) -> bool:
        """True when a whole history of attempts and the time after the last went by without an answer."""
        limit = self._timing.max_retransmits
        return self.unanswered >= limit and now >= self._last + self._timing.delay(limit)
