"""The clock of all deadlines, and jumps of the wall clock against it (spec README, Clocks)."""

from __future__ import annotations

import time
from typing import Final

# A smaller difference is drift or scheduling; what drifts adds up until it counts.
_STEP_SECONDS: Final = 1.0


def now() -> float:
    """Seconds of CLOCK_BOOTTIME: never set, and goes on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class StepDetector:
    """Compares the wall clock with the boot clock; call `check` once a second."""

    def __init__(self, now: float, wall: float) -> None:
        self._offset = wall - now

    @property
    def offset(self) -> float:
        """Unix time minus `now`, as of the last step."""
        return self._offset

    def check(self, now: float, wall: float) -> float | None:
        """By how many seconds the wall clock jumped since the last step; None while it is less than one second."""
        delta = wall - now - self._offset
        if abs(delta) < _STEP_SECONDS:
            return None
        self._offset += delta
        return delta
