"""Fresh connections, one after the other, while ten other clients transfer data; targets beside what was measured.

`python -m tests.bench.connect_times`, and a part of `make bench`. The client answers the portal without a pause of its
own. A connection is new in every respect: keys, allocations, channels, mappings of both routers.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click
from rich.console import Console
from rich.table import Table

from tests.bench.measurements import _authorizations
from tests.bench.sites import GATEWAY_SERVER, Site
from tests.lab.namespaces import can_make_namespaces, user_namespace_command
from tests.lab.process import lab_environment
from tests.lab.scenario import available

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.namespaces import Namespace

OTHERS = 10
MBIT_EACH = 12.0  # of what they send; together above the 100 Mbit/s that they have to carry
_LOAD_PORT = 6001
_FINISHED_S = 2.0  # for the last answers to be on the wire
_AT_MOST_S = 0.5  # a connection with what precedes it
_INTERFACE = "eth0"
# Milliseconds: figure, path, percentile, at most.
TARGETS = (
    ("first reply", "direct", 50, 15.0),
    ("first reply", "direct", 99, 60.0),
    ("first reply", "relayed", 50, 30.0),
    ("first reply", "relayed", 95, 150.0),  # a lost first check shows as 250
    ("authorization → acknowledgement", "direct", 50, 1.5),
    ("authorization → acknowledgement", "relayed", 50, 1.5),
    ("check → answer", "direct", 50, 1.0),
    ("initiation → response", "direct", 50, 1.0),
)

Values = dict[str, list[float]]


@click.command(help=__doc__)
@click.option("--connections", default=100, show_default=True, type=click.IntRange(2), help="Of each kind.")
@click.option("--paths", default="direct,relayed", show_default=True)
@click.option("--output", default="build/connect_times.json", show_default=True, type=click.Path(path_type=Path))
def main(connections: int, paths: str, output: Path) -> None:
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench.connect_times", *sys.argv[1:])
        os.execvp(command[0], command)
    if (reason := available()) is not None:
        raise click.ClickException(f"the bench {reason}")
    measured, mbit = {}, {}
    with Console(stderr=True).status("") as status:
        for path in paths.split(","):
            status.update(f"{connections} {path} connections beside {OTHERS} clients")
            measured[path], mbit[path] = measure(path, connections)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"mbit": mbit, "ms": measured}))
    Console(width=None if sys.stdout.isatty() else 120).print(table(measured, mbit))


def measure(path: str, connections: int) -> tuple[Values, float]:
    """Milliseconds by figure, and how many Mbit/s the others carried meanwhile."""
    values: Values = {"first reply": [], "client authorized": [], "client established": []}
    with Site(path) as site:
        crowd = site.add_crowd(OTHERS)
        with Load(crowd.place.namespace, site.lab.network.namespaces["resources"], crowd.addresses) as load:
            site.connect()
            mark = site.lab.portal.mark()
            site.beside.begin_answers(_INTERFACE, seconds=connections * _AT_MOST_S + _FINISHED_S)
            load.start()
            for _ in range(connections):
                link = site.connect()
                values["first reply"].append(link["reply_ms"])
                values["client authorized"].append(link["authorized_ms"])
                values["client established"].append(link["established_ms"])
            mbit = load.finish()
            answers = site.beside.answer()
        own = _authorizations(site.lab.portal.entries(kind="gateway"), mark)
    values["authorization → acknowledgement"] = own
    if path == "direct":  # inside a relay's channels nothing can be told apart
        values["check → answer"], values["initiation → response"] = answers["stun"], answers["handshake"]
    return values, mbit


class Load:
    """What the others send to a resource."""

    def __init__(self, clients: Namespace, resources: Namespace, sources: Sequence[str]) -> None:
        self._stack = contextlib.ExitStack()
        where = (GATEWAY_SERVER, str(_LOAD_PORT))
        self._sink = self._run(resources, "sink", *where)
        self._pour = self._run(clients, "pour", *where, str(MBIT_EACH), *sources[:OTHERS])

    def start(self) -> None:
        """Count from here."""
        assert self._sink.stdin is not None
        self._sink.stdin.write("\n")
        self._sink.stdin.flush()

    def finish(self) -> float:
        """Mbit/s that arrived since `start`."""
        report = json.loads(self._sink.communicate()[0])
        assert report["connections"] == OTHERS
        return float(report["bytes"] * 8 / report["seconds"] / 1e6)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._pour, self._sink):
            process.kill()
            process.communicate()

    def _run(self, namespace: Namespace, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *namespace.prefix(), sys.executable, "-m", "tests.bench.load",
             *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ) | lab_environment(),
            text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"{arguments[0]} ended at once")
        return process


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of them do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def table(measured: dict[str, Values], mbit: dict[str, float]) -> Table:
    """Median and upper percentiles, the targets beside them."""
    loads = ", ".join(f"{path} {rate:.0f} Mbit/s" for path, rate in mbit.items())
    made = Table(title=f"connect times in ms, while {OTHERS} other clients carry: {loads}", title_justify="left")
    made.add_column("figure")
    made.add_column("path")
    for heading in ("count", "median", "p95", "p99", "max", "target"):
        made.add_column(heading, justify="right")
    for path, figures in measured.items():
        for figure, values in figures.items():
            if len(values) < 2:
                continue
            shown = [f"{percentile(values, each):.2f}" for each in (50, 95, 99)]
            targets = [(p, most) for name, where, p, most in TARGETS if (name, where) == (figure, path)]
            verdict = ", ".join(
                f"p{p} ≤ {most:g} {'✓' if percentile(values, p) <= most else '✗'}" for p, most in targets
            )
            made.add_row(figure, path, str(len(values)), *shown, f"{max(values):.1f}", verdict)
        made.add_section()
    return made


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.connect_times")
