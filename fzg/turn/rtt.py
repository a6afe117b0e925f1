"""The smoothed round-trip time of a relay, and the choice among relays by it (spec turn 2.4, 4.2)."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_FEW_FACTOR: Final = 1.5  # of one or two relays: up to this multiple of the nearest
_DEVIATIONS: Final = 3
_LEAST_DEVIATION: Final = 0.002  # seconds


class RoundTrip:
    """Smoothed over clean samples. One from a retransmitted request (Karn) stands only until a clean one comes."""

    __slots__ = ("_provisional", "smoothed")

    def __init__(self) -> None:
        self.smoothed: float | None = None
        self._provisional = False

    def add(self, sample: float, *, retransmitted: bool) -> None:
        """A response arrived `sample` seconds after its request was first sent."""
        if retransmitted:
            if self.smoothed is None:
                self.smoothed = sample
                self._provisional = True
        elif self.smoothed is None or self._provisional:
            self.smoothed = sample
            self._provisional = False
        else:
            self.smoothed = self.smoothed * 7 / 8 + sample / 8


def threshold(times: Sequence[float]) -> float:
    """The largest round-trip time that may be chosen, given those of all relays (at least one), in seconds."""
    if len(times) <= 2:
        return _FEW_FACTOR * min(times)
    middle = median(times)
    deviation = median(abs(time - middle) for time in times)
    return middle + _DEVIATIONS * max(deviation, _LEAST_DEVIATION)
