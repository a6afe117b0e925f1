"""How long the event loop keeps others waiting: how late a timer of it fires."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

import gevent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A tenth of a thousandth of a core for four wake-ups a second; a stall is seen in the second in which it happens.
SAMPLE_INTERVAL: Final = 0.25  # s
# A gateway that is this late loses connectivity checks and heartbeats: supervisors must hear of it.
LONGEST_HEALTHY: Final = 2.0  # s
# From what one turn may take (1 ms, design 3) to what no client survives.
BUCKETS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5)  # s


class Histogram:
    """Counts by upper bound, as Prometheus wants them."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float] = BUCKETS) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bounds as text with the number of values up to each, `+Inf` last."""
        found, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found


class LoopLag:
    """Samples the lag from a greenlet of its own. `last` is the newest value, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` does not count the time in which the host was suspended, for which the loop is not to blame."""
        self.last = 0.0
        self.histogram = Histogram()
        self._clock = clock
        self._due = float("inf")
        self._greenlet: gevent.Greenlet | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether the loop got round to its timer in time, the last time and now."""
        return max(self.last, self._clock() - self._due) <= LONGEST_HEALTHY

    def start(self) -> None:
        """Begin to sample."""
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """Sample no more."""
        if self._greenlet is not None:
            self._greenlet.kill(block=False)

    def _run(self) -> None:
        while True:
            self._due = self._clock() + SAMPLE_INTERVAL
            gevent.sleep(SAMPLE_INTERVAL)
            self.last = max(0.0, self._clock() - self._due)
            self.histogram.observe(self.last)
