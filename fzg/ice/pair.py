"""A local and a remote candidate, and what is known about the path between them (spec connectivity 3.11)."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from fzg.ice.timing import CheckHistory

if TYPE_CHECKING:
    from fzg.ice.candidates import LocalCandidate, RemoteCandidate
    from fzg.ice.timing import Timing

RECENT_REQUEST: Final = 15.0
"""Seconds an inbound request keeps a pair whose own checks all fail (spec connectivity 3.2)."""

SILENT_CHECKS: Final = 2
SILENT_REQUESTS: Final = 5.0
"""A pair with so many unanswered checks and so many seconds without a request is taken for dead (spec D1)."""


class Nomination(Enum):
    """How far nomination of a pair has come; it never goes back to `NONE`."""

    NONE = 0
    PENDING = 1  # our own check for it goes out ahead of all others
    SENT = 2
    SUCCEEDED = 3


class Pair:
    """One path. Its identity is (local base, remote address); the candidates behind it can change."""

    __slots__ = (
        "history",
        "last_answer",
        "last_request",
        "local",
        "next_check",
        "nomination",
        "priority",
        "remote",
        "succeeded",
    )

    def __init__(
        self, local: LocalCandidate, remote: RemoteCandidate, priority: int, timing: Timing, now: float
    ) -> None:
        self.local = local
        self.remote = remote
        self.priority = priority
        self.nomination = Nomination.NONE
        self.succeeded = False
        self.last_request: float | None = None
        self.last_answer: float | None = None
        self.next_check = now
        self.history = CheckHistory(timing)

    @property
    def is_nominated(self) -> bool:
        """True from the first nomination until the pair is removed."""
        return self.nomination is not Nomination.NONE

    def nominate(self, now: float) -> None:
        """Nominate, or nominate again; the next check is due at once and goes first."""
        self.nomination = Nomination.PENDING
        self.next_check = now

    def adopt(self, local: LocalCandidate, remote: RemoteCandidate, priority: int) -> None:
        """Put better candidates behind the same path; what was learned about the path stays."""
        self.local = local
        self.remote = remote
        self.priority = priority

    def schedule(self, now: float) -> None:
        """Recompute when the next check is due: after an attempt, a response or a change of timing."""
        self.next_check = now if self.nomination is Nomination.PENDING else self.history.next_check(now)

    def is_possible(self, now: float) -> bool:
        """False when the pair has to be removed, nominated or not."""
        if not self.history.is_exhausted(now):
            return True
        return self.last_request is not None and now < self.last_request + RECENT_REQUEST

    def is_silent(self, now: float) -> bool:
        """True when neither our checks are answered nor requests arrive any more."""
        if self.history.unanswered < SILENT_CHECKS:
            return False
        return self.last_request is None or now >= self.last_request + SILENT_REQUESTS

    def silent_at(self, now: float) -> float | None:
        """When the pair will count as silent unless something is heard; None if that is now or depends on checks."""
        if self.history.unanswered < SILENT_CHECKS or self.last_request is None:
            return None
        at = self.last_request + SILENT_REQUESTS
        return at if at > now else None

    def heard_within(self, seconds: float, now: float) -> bool:
        """True when a request or an answer arrived less than `seconds` ago."""
        return any(at is not None and now < at + seconds for at in (self.last_request, self.last_answer))
