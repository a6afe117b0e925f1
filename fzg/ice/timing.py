"""When checks are sent and when a pair is given up (spec connectivity 3.2)."""

from __future__ import annotations

from collections import deque
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
    """The last `max_retransmits` attempts of a pair, and what follows from them."""

    __slots__ = ("_attempts", "_timing", "unanswered")

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._attempts: deque[Attempt] = deque()
        self.unanswered = 0  # the most recent consecutive ones

    def __len__(self) -> int:
        return len(self._attempts)

    def transaction_ids(self) -> list[bytes]:
        """The ids a response may still name."""
        return [attempt.transaction_id for attempt in self._attempts]

    def record(self, attempt: Attempt) -> list[bytes]:
        """Append an attempt; returns the ids that are forgotten for it."""
        self._attempts.append(attempt)
        self.unanswered += 1
        return self._trim()

    def answer(self, attempt: Attempt, now: float) -> None:
        """A valid response to `attempt` arrived."""
        attempt.answered = now
        self.unanswered = 0
        for recent in reversed(self._attempts):
            if recent.answered is not None:
                break
            self.unanswered += 1

    def set_timing(self, timing: Timing) -> list[bytes]:
        """Change the profile; returns the ids that are forgotten for it."""
        self._timing = timing
        return self._trim()

    def next_check(self, now: float) -> float:
        """When the next attempt is due: after the ladder, or, once answers stopped, the ladder from its start."""
        if not self._attempts:
            return now
        timing = self._timing
        step = len(self._attempts)
        # While the first unanswered attempt is young its answer may just be late.
        if self.unanswered and now - self._attempts[-self.unanswered].sent > timing.max_rto / 2:
            step = self.unanswered
        return self._attempts[-1].sent + timing.delay(step)

    def is_exhausted(self, now: float) -> bool:
        """True when a whole history of attempts and the time after the last went by without an answer."""
        limit = self._timing.max_retransmits
        return self.unanswered >= limit and now >= self._attempts[-1].sent + self._timing.delay(limit)

    def _trim(self) -> list[bytes]:
        forgotten = []
        while len(self._attempts) > self._timing.max_retransmits:
            forgotten.append(self._attempts.popleft().transaction_id)
        self.unanswered = min(self.unanswered, len(self._attempts))
        return forgotten
