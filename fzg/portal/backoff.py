"""When to dial again, and when to give up (spec portal 1.13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from fzg.sansio import Random, random_unit

# Specification constants (portal 1.13)
INITIAL_DELAY_S: Final = 1.0
INITIAL_BUDGET_S: Final = 15.0
BASE_DELAY_S: Final = 0.5
GROWTH: Final = 1.5
MAX_BASE_DELAY_S: Final = 60.0
DEFAULT_MAX_PARTITION_S: Final = 24 * 3600.0


class Retry(NamedTuple):
    """Dial again after `delay` seconds; `budget` seconds of waiting are left after that."""

    delay: float
    budget: float


class Reconnect:
    """Two back-offs: an impatient one until the first join of this process, a patient one after it.

    A back-off lives from the first failure of an outage to the next join; its budget is the sum of the delays it
    handed out, not time.
    """

    def __init__(self, *, random: Random, max_partition: float = DEFAULT_MAX_PARTITION_S) -> None:
        self._random = random
        self._max_partition = max_partition
        self._joined_ever = False
        self._backoff: _Backoff | None = None
        self._asked_at_once = False

    def handle_joined(self) -> None:
        """The portal answered a join: the next outage starts anew, with the patient back-off."""
        self._joined_ever = True
        self._backoff = None
        self._asked_at_once = False

    def handle_failure(self, retry_after: float | None = None) -> Retry | None:
        """The wait before the next dial, None to give up. `retry_after` stands in for the delay and costs nothing."""
        if self._backoff is None:
            self._backoff = self._new_backoff()
        backoff = self._backoff
        if retry_after is None:
            delay = self._delay(backoff)
            if backoff.spent + delay > backoff.budget:
                return None
            backoff.spent += delay
            backoff.failures += 1
            return Retry(delay, backoff.budget - backoff.spent)
        at_once, again = retry_after == 0, self._asked_at_once
        self._asked_at_once = at_once
        if at_once:
            self._backoff = None  # a dial that is asked for at once discards the back-off
        if at_once and again:
            retry_after = INITIAL_DELAY_S  # a portal that says so each time must not make us dial without pause
        return Retry(retry_after, backoff.budget - backoff.spent)

    def _new_backoff(self) -> _Backoff:
        if self._joined_ever:
            return _Backoff(budget=self._max_partition, patient=True)
        return _Backoff(budget=INITIAL_BUDGET_S, patient=False)

    def _delay(self, backoff: _Backoff) -> float:
        if not backoff.patient:
            return INITIAL_DELAY_S
        # Beyond the exponent at which the cap is reached the power need not be computed, nor overflow.
        base = min(BASE_DELAY_S * GROWTH ** min(backoff.failures, 32), MAX_BASE_DELAY_S)
        return base + base * random_unit(self._random)


@dataclass(slots=True)
class _Backoff:
    budget: float
    patient: bool
    spent: float = 0.0
    failures: int = 0
