"""The shipped file is as fast as what it was made of: the same laboratory twice, measured in turns."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.process import REPOSITORY, cost_of
from tests.lab.scenario import Lab

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "curl", "iperf3", "objdump", "strip"),
]

PAIRS = 15
SECONDS = 3
# Of the middle pair: single ones differ by more than this on a machine with two cores, frozen or not.
TOLERANCE = 0.05
FIGURES = REPOSITORY / "build" / "frozen_speed.json"


class Bench:
    """A running laboratory and its gateway's processes."""

    def __init__(self, lab):
        self.lab = lab
        launcher = lab.gateway.process.pid
        self.pids = [launcher]
        for pid in self.pids:
            self.pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def cpu(self):
        return sum(cost_of(pid).cpu for pid in self.pids)

    def measure(self, direction):
        """Mbit/s and the gateway's CPU seconds for a GB, over one TCP connection."""
        before = self.cpu()
        report = self.lab.client.iperf3(*(["-R"] if direction == "down" else []), seconds=SECONDS)
        received = report["end"]["sum_received"]
        return received["bits_per_second"] / 1e6, (self.cpu() - before) / (received["bytes"] / 1e9)


@contextlib.contextmanager
def bench(*command):
    with Lab("direct", iperf3=True, gateway_command=command, gateway_environment={"RUST_LOG": "info"}) as lab:
        assert lab.client.ping("10.20.0.110")
        yield Bench(lab)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_frozen_it_carries_as_much_for_as_little_as_unfrozen(frozen, direction):
    ratios, seen = [], {"frozen": [], "sources": []}
    with bench(frozen) as file, bench(sys.executable, "-m", "fzg") as sources:
        assert (len(file.pids), len(sources.pids)) == (2, 1)
        for each in (file, sources):
            each.measure(direction)  # the first is slower, whichever it is
        for turn in range(PAIRS):
            order = (("frozen", file), ("sources", sources))
            for name, one in order if turn % 2 else reversed(order):
                seen[name].append(one.measure(direction))
            ratios.append([a / b for a, b in zip(seen["frozen"][-1], seen["sources"][-1], strict=True)])
    throughput, cpu = (statistics.median(each) for each in zip(*ratios, strict=True))
    figures = {
        name: [round(statistics.median(each), 3) for each in zip(*values, strict=True)] for name, values in seen.items()
    }
    note(direction, {"throughput_ratio": throughput, "cpu_per_gb_ratio": cpu, "mbit_and_cpu_s_per_gb": figures})
    assert throughput >= 1 - TOLERANCE
    assert cpu <= 1 + TOLERANCE


def note(direction, figures):
    """Beside the other figures, for whoever wants to know them."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(known | {"commit": commit.stdout.strip(), direction: figures}, indent=1) + "\n")
