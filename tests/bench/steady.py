"""What the gateway counts while a load is steady: after its connections opened and before they end.

Opening and closing segments are for Python by design. On a connection of a second they would stand for themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Self

from tests.lab.control import ControlError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.sites import Site

_EVERY_S = 0.05
_LEAST_SHARE = 0.5  # of the busiest interval: in less than that the load is not under way
_PACKETS = ("udp_rx_packets", "tun_rx_packets")

Sample = tuple[float, "Mapping[str, int]"]


class Watch:
    """Takes the site's counters again and again within its `with` block."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._samples: list[Sample] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def grown(self, *, for_whole_seconds: bool = False) -> Mapping[str, int]:
        """By how much each counter grew while the load was steady."""
        window = steady(self._samples)
        if for_whole_seconds:
            window = whole_seconds(window)
        (_, first), (_, last) = window[0], window[-1]
        return {name: total - first.get(name, 0) for name, total in last.items()}

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            with contextlib.suppress(ControlError):
                self._samples.append((time.monotonic(), self._site.counters()))


def steady(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those from the first busy interval to the last, without these two, in which it began and ended."""
    rates = [
        (_packets(after) - _packets(before)) / max(at - began, 1e-6)
        for (began, before), (at, after) in itertools.pairwise(samples)
    ]
    busy = [number for number, rate in enumerate(rates) if rate >= _LEAST_SHARE * max(rates)]
    if len(busy) < 3:
        raise RuntimeError(f"{len(samples)} looks at the gateway's counters found no steady load")
    return samples[busy[0] + 1 : busy[-1] + 1]


def whole_seconds(samples: Sequence[Sample]) -> Sequence[Sample]:
    """As many of them as make up full seconds: in each, a flow is decided anew once."""
    began = samples[0][0]
    seconds = int(samples[-1][0] - began)
    if not seconds:
        raise RuntimeError(f"the load was steady for {samples[-1][0] - began:.2f} s, which is not enough")
    end = next(number for number, (at, _) in enumerate(samples) if at >= began + seconds)
    return samples[: end + 1]


def _packets(counters: Mapping[str, int]) -> int:
    return sum(counters.get(name, 0) for name in _PACKETS)
