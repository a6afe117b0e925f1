"""Measures the gateway beside wireguard-go and plain routing in the same namespaces, interleaved, in one run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from rich.console import Console

from fzg.dataplane.pure import PureEngine
from tests.bench import measurements, targets
from tests.bench.figures import Figures, machine
from tests.bench.plot import draw
from tests.bench.sites import CLIENT_ENGINE, PURE, ROUTING, WIREGUARD_GO, Site, figure_name
from tests.interop.wireguard_go.program import missing
from tests.lab.control import ControlError
from tests.lab.namespaces import can_make_namespaces, user_namespace_command
from tests.lab.scenario import available
from tests.unit.dataplane_world import ENGINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.status import Status

    from tests.bench.measurements import Measurement

RUNS = 5  # that count; one more comes before them and is dropped
CONNECTIONS = 20  # of each kind, spread over the runs
DIRECTIONS = ("up", "down")
_PATHS = {WIREGUARD_GO: "direct", ROUTING: ""}
APART = ("connect_times", "nat_matrix", "scale", "two_threads")  # programs of their own, after the figures
CROWD = 100  # other clients that are connected all the time
_DIRECTED = (
    *(
        "tcp1",
        "tcp4",
        "udp1200_mbit",
        "udp1200_single_mbit",
        "udp64_kpps",
        "cpu_s_per_gb",
        "cpu_wait_percent",
        "segments",
        "ping_p99_ms",
        "stun_p99_ms",
    ),
    *("handshake_p99_ms", "python_percent_in", "python_percent_out", "udp_buffer_errors"),
    *("turn1", f"turn{measurements.TURN_CONNECTIONS}"),
)
_PLAIN = (
    "tcp_both",
    "cpu_percent_after",
    "refused_p99_ms",
    "refused_kpps",
    "rtt_ms",
    "connect_ms",
    "connect_authorized_ms",
    "connect_established_ms",
    "authorize_ms",
)
# How a measurement may fail: an echo without answer, a complaint of iperf3, an order that the lab refused.
_FAILURES = (RuntimeError, TimeoutError, ControlError, subprocess.TimeoutExpired)
LEAST_OF_ROUTING = 0.05
"""A wireguard-go below this share of plain routing is one without segmentation offload, and no yardstick."""


@click.command(help=__doc__)
@click.option("--only", default="", help=f"Figures to measure, e.g. tcp1,*.relayed.*; or {', '.join(APART)}.")
@click.option("--runs", default=RUNS, show_default=True, type=click.IntRange(1), help="How many runs count.")
@click.option("--output", default="build/bench.json", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--document", type=click.Path(path_type=Path, exists=True), help="Also renew performance.md and .svg there."
)
def main(only: str, runs: int, output: Path, document: Path | None) -> None:
    names = [each for each in only.split(",") if each]
    apart = [each for each in names if each in APART]
    if names == apart != []:
        sys.exit(_run_apart(apart))
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench", *sys.argv[1:])
        os.execvp(command[0], command)
    reason = available()
    if reason is not None:
        raise click.ClickException(f"the bench {reason}")
    # A terminated bench must clean up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    console = Console(stderr=True, highlight=False)
    figures = Figures([each for each in names if each not in apart])
    about = machine() | {"client_engine": CLIENT_ENGINE}
    try:
        failures = _measure(figures, about, runs, console)
    except pytest.fail.Exception as error:
        raise click.ClickException(str(error)) from error
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not figures.summary() and not failures:
        raise click.ClickException(f"no figure is called {only}")
    figures.write(output, about)
    picture = output.with_suffix(".svg")
    caption = f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}"
    drawn = draw(figures.summary(), f"{caption}, wireguard-go {about.get('wireguard_go', 'not measured')}")
    picture.write_text(drawn)
    if document is not None:
        targets.document(document, figures, about, drawn)
    # Wide enough for all columns where the output is a file.
    printer = Console(width=None if sys.stdout.isatty() else 140)
    printer.print(figures.table())
    if (reached := targets.table(figures)) is not None:
        printer.print(reached)
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}")
    print(f"client with the {CLIENT_ENGINE} engine, wireguard-go {about.get('wireguard_go', 'not measured')}")
    print(f"also in {output} and {picture}; {about['seconds']:.0f} s, {runs} runs after one that was dropped")
    _check_yardstick(figures)
    if _run_apart(apart) or failures:
        sys.exit(1)


def _run_apart(names: Sequence[str]) -> int:
    """Run these programs one after the other; 1 if any failed."""
    codes = [subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=False).returncode for name in names]
    return int(any(codes))


def _measure(figures: Figures, about: dict[str, Any], runs: int, console: Console) -> list[str]:
    """Measure what is wanted; what could not be measured."""
    began = time.monotonic()
    failures: list[str] = []
    spent: Counter[str] = Counter()
    with contextlib.ExitStack() as stack, console.status("") as status:
        sites = _build(figures, about, stack, status)
        if sites:
            figures.add({"rss_mib.idle.gateway": sites[0].idle.rss_mib})
        for plan in (_plan(sites, runs), _plan_of_many(sites)):
            wanted = [
                each
                for each in plan
                if any(map(figures.wants, each.names)) and (figures.is_selective or not each.on_request)
            ]
            if wanted and plan and plan[0].title.endswith("in turn"):
                status.update(f"connecting {measurements.TURN_CONNECTIONS} clients")
                sites[0].add_crowd(measurements.TURN_CONNECTIONS)
                sites[0].resources.listen(sites[0].programs[0].server, measurements.TURN_PORT)
            for run in range(runs + 1):
                for number, each in enumerate(wanted, 1):
                    if not run and not each.warms_up:
                        continue
                    stage = f"run {run} of {runs}" if run else "warming up"
                    status.update(f"{stage}, {number}/{len(wanted)}: {each.title}, {each.names[0]}")
                    started = time.monotonic()
                    try:
                        values = each.run()
                    except _FAILURES as error:
                        failures.append(f"{each.names[0]}, {stage}: {error}")
                        continue
                    finally:
                        spent[each.title] += time.monotonic() - started
                    if run:
                        figures.add(values)
            for program in sites[0].programs if sites and plan and plan[0].title == "TCP, 1 stream" else ():
                if program.pid is not None:
                    figures.add(measurements.memory(program))
    about["seconds_by_measurement"] = {title: round(seconds, 1) for title, seconds in spent.items()}
    about["load_at_end"] = round(os.getloadavg()[0], 2)
    about["seconds"] = round(time.monotonic() - began, 1)
    return failures


def _build(figures: Figures, about: dict[str, Any], stack: contextlib.ExitStack, status: Status) -> list[Site]:
    """Sites for what is wanted: the gateway's direct one first, with the programs beside it."""
    sites = []
    beside = [program for program in (WIREGUARD_GO, ROUTING) if _is_wanted(figures, _PATHS[program], program)]
    for path, program in (("direct", "gateway"), ("relayed", "gateway"), ("direct", PURE)):
        is_first = not sites and program == "gateway"
        if _is_wanted(figures, path, program) or (is_first and path == "direct" and beside):
            status.update(f"building the {path} network of the {program}")
            sites.append(stack.enter_context(Site(path, engine="pure" if program == PURE else CLIENT_ENGINE)))
    if sites and sites[0].path == "direct" and sites[0].program_name == "gateway":
        status.update(f"connecting {CROWD} clients")
        sites[0].add_crowd(CROWD)
    if ROUTING in beside:
        sites[0].add_routing()
    if WIREGUARD_GO in beside and (reason := missing()) is not None:
        status.console.print(f"without wireguard-go: {reason}")
    elif WIREGUARD_GO in beside:
        status.update("building and starting wireguard-go")
        about["wireguard_go"] = sites[0].add_wireguard_go()
    return sites


def _plan(sites: list[Site], runs: int) -> list[Measurement]:
    """One run: what is compared comes one after the other."""
    each = [(site, program) for site in sites for program in site.programs]
    tunnels = [one for one in each if one[1].name in {"gateway", WIREGUARD_GO}]
    direct = [one for one in each if one[1].path == "direct"]
    with_neighbour = [one for one in tunnels if one[0].crowd is not None]
    plan = []
    for direction in DIRECTIONS:
        plan += [measurements.tcp(*one, streams=1, direction=direction) for one in each]
    for direction in DIRECTIONS:
        plan += [measurements.tcp(*one, streams=4, direction=direction) for one in tunnels if one in direct]
    plan += [measurements.tcp_both(*one) for one in tunnels if one in direct]
    for direction in DIRECTIONS:
        plan += [measurements.under_load(*one, direction=direction) for one in with_neighbour]
    plan += [measurements.under_refusals(*one) for one in with_neighbour if one[1].name == "gateway"]
    plan += [measurements.calm(*one) for one in with_neighbour if one[1].name == "gateway"]
    for direction in DIRECTIONS:
        plan += [measurements.udp(*one, direction=direction) for one in direct]
    for direction in DIRECTIONS:
        small = measurements.UDP_SMALL_PAYLOAD
        pair = [one for one in direct if one in tunnels]
        plan += [measurements.udp(*one, direction=direction, size=small, trains=False) for one in pair]
        plan += [measurements.udp(*one, direction=direction, trains=False) for one in pair]
    plan += [measurements.round_trip(*one) for one in each if one[1].name != PURE]
    count = -(-CONNECTIONS // runs)
    plan += [measurements.connections(one[0], one[1], count=count) for one in tunnels if one[1].name == "gateway"]
    plan += [measurements.core_alone()]
    plan += [measurements.engine_alone(engine, PURE if engine is PureEngine else "gateway") for engine in ENGINES]
    return plan


def _plan_of_many(sites: list[Site]) -> list[Measurement]:
    """Apart, since the gateway has more clients then."""
    if not sites or sites[0].crowd is None:
        return []
    return [measurements.in_turn(sites[0], clients=clients) for clients in (1, measurements.TURN_CONNECTIONS)]


def _is_wanted(figures: Figures, path: str, program: str) -> bool:
    """Whether any figure of this program over this path was asked for, before there is anything to measure."""
    directed = [figure_name(what, direction, path, program) for what in _DIRECTED for direction in DIRECTIONS]
    plain = [figure_name(what, "", path, program) for what in _PLAIN]
    return any(map(figures.wants, [*directed, *plain, *(f"rss_mib.{state}.{program}" for state in ("idle", "loaded"))]))


def _check_yardstick(figures: Figures) -> None:
    for direction in DIRECTIONS:
        theirs = figures.median(f"tcp1.{direction}.direct.{WIREGUARD_GO}")
        routing = figures.median(f"tcp1.{direction}.routing")
        if theirs is not None and routing is not None and theirs < LEAST_OF_ROUTING * routing:
            raise click.ClickException(
                f"{WIREGUARD_GO} carries {theirs:.2f} Gbit/s {direction}, under {LEAST_OF_ROUTING} of plain routing's"
                f" {routing:.2f}: it is no yardstick"
            )


if __name__ == "__main__":
    main(prog_name="python -m tests.bench")
