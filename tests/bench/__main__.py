"""Measures the gateway beside wireguard-go and plain routing in the same namespaces, interleaved, in one run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from rich.console import Console

from tests.bench import measurements
from tests.bench.figures import Figures, machine
from tests.bench.sites import CLIENT_ENGINE, ROUTING, WIREGUARD_GO, Site, figure_name
from tests.interop.wireguard_go.program import missing
from tests.lab.control import ControlError
from tests.lab.namespaces import can_make_namespaces, user_namespace_command
from tests.lab.scenario import available

if TYPE_CHECKING:
    from tests.bench.measurements import Measurement

RUNS = 5  # that count; one more comes before them and is dropped
CONNECTIONS = 30  # of each kind, spread over the runs
DIRECTIONS = ("up", "down")
_PATHS = {WIREGUARD_GO: "direct", ROUTING: ""}
_DIRECTED = ("tcp1", "tcp4", "udp1200_mbit", "cpu_s_per_gb", "segments")
_PLAIN = ("rtt_ms", "connect_ms", "connect_authorized_ms", "connect_established_ms", "authorize_ms")
# How a measurement may fail: an echo without answer, a complaint of iperf3, an order that the lab refused.
_FAILURES = (RuntimeError, TimeoutError, ControlError, subprocess.TimeoutExpired)
LEAST_OF_ROUTING = 0.05
"""A wireguard-go below this share of plain routing is one without segmentation offload, and no yardstick."""


@click.command(help=__doc__)
@click.option("--only", default="", help="Figures to measure, e.g. tcp1,connect_ms,*.relayed.* (default: all).")
@click.option("--runs", default=RUNS, show_default=True, type=click.IntRange(1), help="How many runs count.")
@click.option("--output", default="build/bench.json", show_default=True, type=click.Path(path_type=Path))
def main(only: str, runs: int, output: Path) -> None:
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench", *sys.argv[1:])
        os.execvp(command[0], command)
    reason = available()
    if reason is not None:
        raise click.ClickException(f"the bench {reason}")
    # A terminated bench must clean up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    console = Console(stderr=True, highlight=False)
    figures = Figures([each for each in only.split(",") if each])
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
    # Wide enough for all columns where the output is a file.
    Console(width=None if sys.stdout.isatty() else 140).print(figures.table())
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}")
    print(f"client with the {CLIENT_ENGINE} engine, wireguard-go {about.get('wireguard_go', 'not measured')}")
    print(f"also in {output}; {about['seconds']:.0f} s, {runs} runs after one that was dropped")
    _check_yardstick(figures)
    if failures:
        sys.exit(1)


def _measure(figures: Figures, about: dict[str, Any], runs: int, console: Console) -> list[str]:
    """Measure what is wanted; what could not be measured."""
    began = time.monotonic()
    failures: list[str] = []
    with contextlib.ExitStack() as stack, console.status("") as status:
        sites = []
        beside = [program for program in (WIREGUARD_GO, ROUTING) if _is_wanted(figures, _PATHS[program], program)]
        for path in ("direct", "relayed"):
            if _is_wanted(figures, path, "gateway") or (path == "direct" and beside):
                status.update(f"building the {path} network")
                sites.append(stack.enter_context(Site(path)))
        for site in sites[:1]:
            figures.add(measurements.memory(site.programs[0], "idle"))
        if ROUTING in beside:
            sites[0].add_routing()
        if WIREGUARD_GO in beside and (reason := missing()) is not None:
            console.print(f"without wireguard-go: {reason}")
        elif WIREGUARD_GO in beside:
            status.update("building and starting wireguard-go")
            about["wireguard_go"] = sites[0].add_wireguard_go()
        plan = [each for each in _plan(sites, runs) if any(map(figures.wants, each.names))]
        for run in range(runs + 1):
            for number, each in enumerate(plan, 1):
                stage = f"run {run} of {runs}" if run else "warming up"
                status.update(f"{stage}, {number}/{len(plan)}: {each.title}, {each.names[0]}")
                try:
                    values = each.run()
                except _FAILURES as error:
                    failures.append(f"{each.names[0]}, {stage}: {error}")
                    continue
                if run:
                    figures.add(values)
        for program in sites[0].programs if sites else ():
            if program.cost is not None:
                figures.add(measurements.memory(program, "loaded"))
    about["seconds"] = round(time.monotonic() - began, 1)
    return failures


def _plan(sites: list[Site], runs: int) -> list[Measurement]:
    """One run: what is compared comes one after the other."""
    each = [(site, program) for site in sites for program in site.programs]
    plan = []
    for streams in (1, 4):
        for direction in DIRECTIONS:
            of_all = each if streams == 1 else [one for one in each if one[1].path == "direct"]
            plan += [measurements.tcp(*one, streams=streams, direction=direction) for one in of_all]
    for direction in DIRECTIONS:
        plan += [measurements.udp(*one, direction=direction) for one in each if one[1].path == "direct"]
    plan += [measurements.round_trip(*one) for one in each]
    count = -(-CONNECTIONS // runs)
    plan += [measurements.connections(site, site.programs[0], count=count) for site in sites]
    return plan


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
