"""The bench's own arithmetic: names, summaries, ratios, and the search for a rate without loss."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.bench.datagrams import in_time
from tests.bench.figures import Figures, unit
from tests.bench.measurements import UDP_PROBES, UDP_PROBES_AT_MOST, _Search
from tests.bench.steady import steady, whole_seconds

if TYPE_CHECKING:
    from pathlib import Path


def test_the_file_has_machine_and_figures_in_the_agreed_form(tmp_path: Path) -> None:
    figures = Figures()
    figures.add({"tcp1.up.direct.gateway": 0.5})
    figures.add({"tcp1.up.direct.gateway": 0.25, "connect_ms.direct.gateway": [8.0, 9.0]})
    figures.add({"tcp1.up.direct.gateway": 1.0})
    figures.write(tmp_path / "build" / "bench.json", {"cores": 2})
    written = json.loads((tmp_path / "build" / "bench.json").read_text())
    assert written["machine"] == {"cores": 2}
    entry = written["figures"]["tcp1.up.direct.gateway"]
    assert {key: entry[key] for key in ("unit", "min", "median", "max", "runs")} == {
        "unit": "Gbit/s",
        "min": 0.25,
        "median": 0.5,
        "max": 1.0,
        "runs": 3,
    }
    assert written["figures"]["connect_ms.direct.gateway"]["runs"] == 2


def test_only_what_was_asked_for_is_kept() -> None:
    figures = Figures(["tcp1", "*.relayed.gateway", "rtt_ms.routing"])
    assert figures.wants("tcp1.up.direct.gateway")
    assert figures.wants("connect_ms.relayed.gateway")
    assert figures.wants("rtt_ms.routing")
    assert not figures.wants("tcp14.up.direct.gateway")
    assert not figures.wants("rtt_ms.direct.gateway")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tcp4.up.routing", "Gbit/s"), ("connect_authorized_ms.direct.gateway", "ms"), ("rss_mib.idle.gateway", "MiB")],
)
def test_every_figure_has_a_unit(name: str, expected: str) -> None:
    assert unit(name) == expected


def test_ratios_compare_the_same_direction_only() -> None:
    figures = Figures()
    figures.add({"tcp1.up.relayed.gateway": 1.0, "tcp1.up.direct.wireguard-go": 2.0, "tcp1.down.routing": 5.0})
    assert figures._ratio("tcp1.up.relayed.gateway", "wireguard-go") == "0.5"
    assert not figures._ratio("tcp1.up.relayed.gateway", "routing")


@pytest.mark.parametrize("limit", [55.0, 200.0, 317.0, 900.0, 5000.0])
def test_the_search_ends_below_the_rate_that_loses_and_near_it(limit: float) -> None:
    asked: list[float] = []

    def measure(mbit: float) -> tuple[float, float]:
        asked.append(mbit)
        return min(mbit, limit), 0.0 if mbit <= limit else 1.0

    search = _Search(measure, rate=200.0, most=12000.0)
    found = [search.run() for _ in range(6)]
    assert max(found) <= limit
    assert found[0] >= limit / 1.1, "the runs that count begin too low to get there"
    assert found[-1] >= limit / 1.1
    assert len(asked) <= UDP_PROBES_AT_MOST + 5 * UDP_PROBES


def _samples(*rates: int) -> list[tuple[float, dict[str, int]]]:
    """One each tenth of a second, for so many packets between two."""
    totals = [sum(rates[:number]) for number in range(len(rates) + 1)]
    return [(number / 10, {"udp_rx_packets": total}) for number, total in enumerate(totals)]


def test_the_beginning_and_the_end_of_a_load_are_left_out() -> None:
    samples = _samples(0, 3, 70, 100, 90, 100, 60, 2, 0)
    assert list(steady(samples)) == samples[3:7]


def test_a_load_that_is_never_steady_is_said() -> None:
    with pytest.raises(RuntimeError, match="no steady load"):
        steady(_samples(0, 100, 100, 0))


def test_full_seconds_are_counted() -> None:
    samples = _samples(*[100] * 19)
    assert len(whole_seconds(samples)) == 11
    with pytest.raises(RuntimeError, match="not enough"):
        whole_seconds(samples[:10])


def test_what_comes_after_its_time_does_not_count() -> None:
    moments = [(0.0, 0), (1.0, 500), (1.5, 900), (1.6, 950)]
    assert in_time(moments, 1.55) == 900
    assert in_time(moments, 2.0) == 950
