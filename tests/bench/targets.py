"""What the figures are to reach, and whether they do: for the terminal and for `docs/performance.md`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.bench.figures import Figures

_BEGIN, _END = "<!-- figures -->\n", "<!-- end of figures -->\n"


class Target(NamedTuple):
    """A bound on the median of `figure`, or on its ratio to the median of `beside`."""

    text: str
    figure: str
    bound: float
    is_least: bool = False
    """The bound is the least, not the most."""
    beside: str = ""

    def value(self, figures: Figures) -> float | None:
        """What was measured, None if it was not."""
        ours, theirs = figures.median(self.figure), figures.median(self.beside) if self.beside else 1.0
        return None if ours is None or not theirs else ours / theirs

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value >= self.bound if self.is_least else value <= self.bound


def _each_way(text: str, what: str, bound: float, *, path: str = "direct", least: bool = False,
              beside: str = "") -> list[Target]:  # fmt: skip
    return [
        Target(
            f"{text}, {direction}",
            f"{what}.{direction}.{path}.gateway",
            bound,
            least,
            f"{what}.{direction}.direct.{beside}" if beside else "",
        )
        for direction in ("up", "down")
    ]


TARGETS = (
    *_each_way("TCP, 1 stream, ÷ wireguard-go", "tcp1", 1.3, least=True, beside="wireguard-go"),
    *_each_way("TCP, 4 streams, ÷ wireguard-go", "tcp4", 1.3, least=True, beside="wireguard-go"),
    Target("TCP, both at once, ÷ wireguard-go", "tcp_both.direct.gateway", 1.3, True, "tcp_both.direct.wireguard-go"),
    *_each_way("CPU seconds per 10⁹ bytes, direct", "cpu_s_per_gb", 1.9),
    *_each_way("CPU seconds per 10⁹ bytes, relayed", "cpu_s_per_gb", 2.5, path="relayed"),
    Target("segments per send, direct", "segments.down.direct.gateway", 20, True),
    Target("segments per send, relayed", "segments.down.relayed.gateway", 20, True),
    *_each_way("UDP 1200 bytes, ÷ wireguard-go", "udp1200_mbit", 1.5, least=True, beside="wireguard-go"),
    *_each_way("UDP 1200 bytes, ÷ pure engine", "udp1200_mbit", 3, least=True, beside="pure"),
    *_each_way(
        "UDP 1200 bytes, one by one, ÷ wireguard-go", "udp1200_single_mbit", 1.5, least=True, beside="wireguard-go"
    ),
    *_each_way("UDP 64 bytes, ÷ wireguard-go", "udp64_kpps", 2, least=True, beside="wireguard-go"),
    Target("engine alone, 1000 packets/s, up", "engine64_kpps.up.gateway", 500, True),
    Target("engine alone, 1000 packets/s, down", "engine64_kpps.down.gateway", 500, True),
    *(
        target
        for way, name in (("in", "from clients"), ("out", "to clients"))
        for path in ("direct", "relayed")
        for target in _each_way(f"packets {name} that Python saw, %, {path}", f"python_percent_{way}", 0.1, path=path)
    ),
    Target("core alone, 1000 uncached packets/s", "uncached_kpps.gateway", 40, True),
    Target("core alone, 1000 new flows/s", "new_flows_kps.gateway", 20, True),
    Target("100,000 sessions, 10,000 resources ÷ none", "full_tables_ratio.gateway", 1.5),
    Target("ping p99 under refused packets, ms", "refused_p99_ms.direct.gateway", 10),
    Target("round trip, idle, ÷ wireguard-go", "rtt_ms.direct.gateway", 1.5, False, "rtt_ms.direct.wireguard-go"),
    *_each_way("ping p99 under 4 streams, ÷ wireguard-go", "ping_p99_ms", 0.5, beside="wireguard-go"),
    *_each_way("ICE check answered, p99, ms", "stun_p99_ms", 5),
    *_each_way("handshake answered, p99, ms", "handshake_p99_ms", 5),
    Target("memory, idle, MiB", "rss_mib.idle.gateway", 60),
    Target("memory, 100 clients, most, MiB", "rss_mib.loaded.gateway", 120),
    Target("1000 clients in turn ÷ 1", "turn1000.up.direct.gateway", 0.8, True, "turn1.up.direct.gateway"),
    Target("CPU after load, %", "cpu_percent_after.direct.gateway", 5),
    *_each_way("UDP buffer errors after TCP", "udp_buffer_errors", 0),
)


def table(figures: Figures) -> Table | None:
    """The targets whose figures were measured; None if there are none."""
    rows = _rows(figures)
    if not rows:
        return None
    made = Table(title="targets", title_justify="left")
    made.add_column("of medians")
    for heading in ("bound", "measured", ""):
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def document(directory: Path, figures: Figures, about: Mapping[str, object], picture: str) -> None:
    """Put the picture and the tables into `directory`: `performance.svg`, and `performance.md` between its marks."""
    (directory / "performance.svg").write_text(picture)
    lines = [
        f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}.\n",
        f"wireguard-go {about.get('wireguard_go', 'not measured')}.\n",
        f"Load of the machine, by others too: {about['load_at_start']} at first, {about['load_at_end']} at the end.\n",
        "\n| target, of medians | bound | measured | |\n| --- | ---: | ---: | --- |\n",
        *(f"| {' | '.join(row)} |\n" for row in _rows(figures)),
        "\n| figure | unit | min | median | max |\n| --- | --- | ---: | ---: | ---: |\n",
        *(
            f"| `{name}` | {each['unit']} | {each['min']:g} | {each['median']:g} | {each['max']:g} |\n"
            for name, each in figures.summary().items()
        ),
    ]
    page = directory / "performance.md"
    before, _, rest = page.read_text().partition(_BEGIN)
    page.write_text(before + _BEGIN + "".join(lines) + _END + rest.partition(_END)[2])


def _rows(figures: Figures) -> list[tuple[str, str, str, str]]:
    rows = []
    for target in TARGETS:
        value = target.value(figures)
        if value is not None:
            bound = f"{'≥' if target.is_least else '≤'} {target.bound:g}"
            rows.append((target.text, bound, f"{value:.3g}", "met" if target.is_met(value) else "missed"))
    return rows
