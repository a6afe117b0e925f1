"""Repeats the tests of `tests/property` with one seed after the other, on all cores, for as long as told.

Each batch is what `make test` does: 500 runs of the two-sided simulation, 50,000 mutations of captures, and what
hypothesis draws for all others. It ends at the first failure, and says how to see it again.

Before that the packet engines' tests run, the native one built for AddressSanitizer and UBSan, and then compare both
engines for ten minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
from rich.console import Console

from tests.property.effort import MUTATIONS, RUNS

if TYPE_CHECKING:
    from collections.abc import Iterator

WANTED_RUNS = 50_000  # unless told how long
LAST_LINES = 80  # of a batch that failed
LONGEST_TEST = 900  # seconds; two batches at once on a busy machine
PAUSE = 0.5
SANITIZED_SECONDS = 660  # its suite takes one minute


@dataclass
class Batch:
    seed: int
    process: subprocess.Popen[str]
    output: IO[str]
    began: float

    @classmethod
    def start(cls, seed: int, selection: str) -> Batch:
        output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by `tell`
        command = [
            *(sys.executable, "-m", "pytest", "tests/property", "-q", "--show-capture=no", "-p", "no:cacheprovider"),
            *(f"--hypothesis-seed={seed}", "-o", f"timeout={LONGEST_TEST}", "-k", selection),
        ]
        environment = os.environ | {"FZG_SEED": str(seed), "FZG_SOAK": "1"}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True, start_new_session=True
        )
        return cls(seed, process, output, time.monotonic())

    def tell(self) -> list[str]:
        """What it wrote."""
        with self.output:
            self.output.seek(0)
            return self.output.read().splitlines()

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


@click.command(help=__doc__)
@click.option(
    "--minutes", type=click.FloatRange(min=0), help=f"How long; default: until {WANTED_RUNS:,} runs are done."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Repeat one batch; with --minutes the first of many.")
@click.option("--jobs", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default="one per core")
@click.option("--only", default="", metavar="EXPRESSION", help="Tests to repeat, as pytest -k has it.")
@click.option(
    "--sanitized", type=click.IntRange(0), help=f"Seconds under the sanitizers; default {SANITIZED_SECONDS}, 0: not."
)
def main(minutes: float | None, seed: int | None, jobs: int, only: str, sanitized: int | None) -> None:
    console = Console(stderr=True, highlight=False)
    if sanitized is None:
        sanitized = 0 if seed is not None or only else SANITIZED_SECONDS
    if sanitized:
        _sanitize(sanitized, console)
    began = time.monotonic()
    deadline = None if minutes is None else began + minutes * 60
    first = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    batches = 1 if seed is not None and minutes is None else None if minutes is not None else WANTED_RUNS // RUNS
    console.print(f"first seed {first}, {jobs} at once")
    running: list[Batch] = []
    seeds = iter(range(first, first + batches)) if batches else _count(first)
    done = 0
    try:
        with console.status("") as status:
            while True:
                while len(running) < jobs and (deadline is None or time.monotonic() < deadline):
                    if (following := next(seeds, None)) is None:
                        break
                    running.append(Batch.start(following, only))
                if not running:
                    break
                for batch in [each for each in running if each.process.poll() is not None]:
                    running.remove(batch)
                    _judge(batch, console)
                    done += 1
                    console.print(
                        f"seed {batch.seed}: {time.monotonic() - batch.began:.0f} s; {_progress(done, began)}"
                    )
                left = "" if deadline is None else f", {max(0.0, deadline - time.monotonic()):.0f} s left"
                status.update(f"seeds {', '.join(str(each.seed) for each in running)}; {_progress(done, began)}{left}")
                time.sleep(PAUSE)
    finally:
        for batch in running:
            batch.stop()
    print(f"nothing failed: {_progress(done, began)}")


def _sanitize(seconds: int, console: Console) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        console.print("without the sanitizers: there is no compiler (package gcc)", style="yellow")
        return
    console.print(f"the engines under AddressSanitizer and UBSan, {seconds} s")
    script = Path(__file__).resolve().parents[1] / "packaging" / "sanitized"
    if subprocess.run([script, sys.executable, str(seconds)], check=False).returncode:
        console.print("the sanitizers found something", style="red")
        sys.exit(1)


def _count(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _progress(batches: int, began: float) -> str:
    took = time.monotonic() - began
    return f"{batches * RUNS:,} runs, {batches * MUTATIONS:,} mutations in {took / 60:.1f} min"


def _judge(batch: Batch, console: Console) -> None:
    lines = batch.tell()
    if batch.process.returncode == 0:
        return
    for line in lines[-LAST_LINES:]:
        print(line)
    console.print(f"seed {batch.seed} failed; again, and shrunk where hypothesis draws:", style="red")
    console.print(f"  FZG_SEED={batch.seed} pytest tests/property --hypothesis-seed={batch.seed}")
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main(prog_name="python -m tests.soak")
