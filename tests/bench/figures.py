"""What was measured: values by name, their summary, the table and the file (design 6)."""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# By the first part of a name; the longest that fits.
UNITS = {
    "tcp": "Gbit/s",
    "udp1200_mbit": "Mbit/s",
    "udp1200_single_mbit": "Mbit/s",
    "udp64_kpps": "1000/s",
    "engine64_kpps": "1000/s",
    "turn": "Gbit/s",
    "uncached_kpps": "1000/s",
    "new_flows_kps": "1000/s",
    "full_tables_ratio": "",
    "cpu_s_per_gb": "s/GB",
    "connect_ms": "ms",
    "connect_authorized_ms": "ms",
    "connect_established_ms": "ms",
    "authorize_ms": "ms",
    "rtt_ms": "ms",
    "rss_mib": "MiB",
    "segments": "packets",
    "ping_p99_ms": "ms",
    "refused_p99_ms": "ms",
    "refused_kpps": "1000/s",
    "stun_p99_ms": "ms",
    "handshake_p99_ms": "ms",
    "python_percent": "%",
    "cpu_wait_percent": "%",
    "cpu_percent_after": "%",
    "udp_buffer_errors": "",
}
_PARTS = ["up", "down", "idle", "loaded", "direct", "relayed", "gateway", "pure", "wireguard-go", "routing"]
_OTHERS = ("wireguard-go", "pure", "routing")
_ENOUGH_FOR_P95 = 20  # values, below which a 95th percentile is the maximum


class Figures:
    """Values by name, in the order in which names came first. `wanted`: patterns; others are not kept."""

    def __init__(self, wanted: Sequence[str] = ()) -> None:
        self._wanted = wanted
        self._values: dict[str, list[float]] = {}

    def wants(self, name: str) -> bool:
        """Whether this name was asked for: itself, its first parts (`tcp1.up`), or a pattern (`*.relayed.*`)."""
        return not self._wanted or any(
            name == each or name.startswith(each + ".") or fnmatch.fnmatchcase(name, each) for each in self._wanted
        )

    @property
    def is_selective(self) -> bool:
        """Whether figures were named."""
        return bool(self._wanted)

    def add(self, values: Mapping[str, float | Sequence[float]]) -> None:
        """Keep those that are wanted."""
        for name, value in values.items():
            if self.wants(name):
                self._values.setdefault(name, []).extend([value] if isinstance(value, int | float) else value)

    def median(self, name: str) -> float | None:
        """The median so far, if there is one."""
        values = self._values.get(name)
        return statistics.median(values) if values else None

    def summary(self) -> dict[str, dict[str, Any]]:
        """`{NAME: {"unit", "min", "median", "max", "runs"}}`, beside it the 95th percentile of many and the values."""
        summary = {}
        for name, values in sorted(self._values.items(), key=lambda item: _order(item[0])):
            entry: dict[str, Any] = {
                "unit": unit(name),
                "min": _rounded(min(values)),
                "median": _rounded(statistics.median(values)),
                "max": _rounded(max(values)),
                "runs": len(values),
            }
            if len(values) >= _ENOUGH_FOR_P95:
                entry["p95"] = _rounded(statistics.quantiles(values, n=20)[-1])
            entry["values"] = [_rounded(value) for value in values]
            summary[name] = entry
        return summary

    def table(self) -> Table:
        """The same for a terminal, with ratios to what was measured in the same run."""
        table = Table(title="min, median and max", title_justify="left")
        table.add_column("figure")
        for heading in ("unit", "min", "median", "max", "p95", "runs", *(f"÷ {other}" for other in _OTHERS)):
            table.add_column(heading, justify="right" if heading != "unit" else "left")
        section = ""
        for name, entry in self.summary().items():
            what = name.partition(".")[0]
            if section not in {"", what}:
                table.add_section()
            section = what
            numbers = [f"{entry[key]:g}" if key in entry else "" for key in ("min", "median", "max", "p95")]
            ratios = [self._ratio(name, other) for other in _OTHERS]
            table.add_row(name, entry["unit"], *numbers, str(entry["runs"]), *ratios)
        return table

    def write(self, path: Path, machine: Mapping[str, Any]) -> None:
        """The file of design 6."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "figures": self.summary()}, indent=1) + "\n")

    def _ratio(self, name: str, other: str) -> str:
        """The median divided by that of the other program in the same direction, on the other's own path."""
        parts = name.split(".")
        if parts[-1] == other or parts[-1] == "routing":
            return ""
        shared = [part for part in parts[1:-1] if part not in {"direct", "relayed"}]
        names = (".".join([parts[0], *shared, *path, other]) for path in ([], ["direct"]))
        theirs = next((median for median in map(self.median, names) if median), None)
        ours = self.median(name)
        return f"{ours / theirs:.3g}" if ours is not None and theirs else ""


def unit(name: str) -> str:
    """The unit of a figure."""
    what = name.partition(".")[0]
    return UNITS[max((key for key in UNITS if what.startswith(key)), key=len)]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _order(name: str) -> tuple[int, str, list[int]]:
    what, *rest = name.split(".")
    position = next((i for i, key in enumerate(UNITS) if what.startswith(key)), len(UNITS))
    return position, what, sorted(_PARTS.index(part) if part in _PARTS else len(_PARTS) for part in rest)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
