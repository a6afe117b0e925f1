"""What is measured of a program: each measurement takes a moment and gives values by figure name."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab.resources import ECHO_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.sites import Program, Site

Values = dict[str, float | list[float]]

TCP_SECONDS = 1  # nothing here has latency, so a stream is at full speed after milliseconds
UDP_PAYLOAD = 1200
# The default of 208 KiB overflows while another process has the core, with or without a tunnel.
UDP_BUFFER = min(2 << 20, int(Path("/proc/sys/net/core/rmem_max").read_text()))
UDP_LOSS_PERCENT = 0.1  # what a rate may lose and still count (performance chapter 4)
UDP_FIRST_MBIT = 200.0
UDP_STEP = 1.15
UDP_PROBES = 2  # of a run, and more only until one passes
UDP_PROBES_AT_MOST = 6
ECHOES = 150
ECHOES_TO_WARM_UP = 10
# What sends UDP is not a tunnel's matter: iperf3 without segmentation cannot offer more.
UDP_MOST_MBIT = 3000.0

_OPTIONS: Mapping[str, Sequence[str]] = {"up": (), "down": ("-R",)}


@dataclass(frozen=True)
class Measurement:
    """`names` are the figures that `run` gives values for."""

    title: str
    names: Sequence[str]
    run: Callable[[], Values]


def tcp(site: Site, program: Program, *, streams: int, direction: str) -> Measurement:
    """Throughput of TCP, and of one stream what it costs the gateway's end, and how large its sends are."""
    throughput = program.figure(f"tcp{streams}", direction)
    cost = program.figure("cpu_s_per_gb", direction)
    # Sends of the gateway reach the client as they are, so that it can count what it receives with each call.
    segments = program.figure("segments", direction)
    with_cost = streams == 1 and program.cost is not None
    with_segments = streams == 1 and direction == "down" and program.name == "gateway" and program.path == "direct"

    def run() -> Values:
        counters = site.lab.client.status()["counters"] if with_segments else {}
        before = program.cost() if program.cost is not None else None
        options = [*_OPTIONS[direction], "-P", str(streams)]
        report = site.lab.client.iperf3(*options, server=program.server, seconds=TCP_SECONDS)
        received = report["end"]["sum_received"]
        values: Values = {throughput: received["bits_per_second"] / 1e9}
        if with_cost and before is not None and program.cost is not None:
            values[cost] = (program.cost().cpu - before.cpu) / received["bytes"] * 1e9
        if with_segments:
            after = site.lab.client.status()["counters"]
            calls, packets = (after[key] - counters.get(key, 0) for key in ("udp_rx_calls", "udp_rx_packets"))
            values[segments] = packets / calls
        return values

    names = [throughput, *([cost] if with_cost else []), *([segments] if with_segments else [])]
    return Measurement(f"TCP, {streams} {'stream' if streams == 1 else 'streams'}", names, run)


@dataclass
class _Search:
    """The largest rate that arrives, looked for a few steps at a time around where it was last."""

    measure: Callable[[float], tuple[float, float]]
    rate: float = UDP_FIRST_MBIT
    step: float = 2.0
    best: float = field(default=0.0)

    def run(self) -> float:
        """What arrived at the largest rate that lost no more than it may; the first run takes large steps."""
        best, passed_at, failed_at = 0.0, 0.0, UDP_MOST_MBIT * 2
        rate = self.rate
        for probe in range(UDP_PROBES_AT_MOST):
            if self.best and passed_at and probe >= UDP_PROBES:
                break
            arrived, lost = self.measure(rate)
            if lost <= UDP_LOSS_PERCENT:
                best, passed_at = max(best, arrived), max(passed_at, rate)
                if arrived < rate * 0.9:
                    break  # the sender is at its end
            else:
                failed_at = min(failed_at, rate)
            if passed_at and failed_at <= UDP_MOST_MBIT:
                rate = (passed_at * failed_at) ** 0.5
                if failed_at < passed_at * 1.04:
                    break
            else:
                rate = passed_at * self.step if passed_at else failed_at / self.step
        self.rate, self.step, self.best = passed_at or rate, UDP_STEP, best or self.best
        return best


def udp(site: Site, program: Program, *, direction: str) -> Measurement:
    """What arrives of datagrams of 1200 bytes, with loss below 0.1 %."""
    name = program.figure("udp1200_mbit", direction)

    def measure(mbit: float) -> tuple[float, float]:
        options = ("-u", "-w", str(UDP_BUFFER), "-l", str(UDP_PAYLOAD), "-b", f"{mbit:.0f}M", *_OPTIONS[direction])
        total = site.lab.client.iperf3(*options, server=program.server, seconds=1)["end"]["sum"]
        lost = total["lost_percent"]
        return total["bits_per_second"] / 1e6 * (1 - lost / 100), lost

    search = _Search(measure)
    return Measurement("UDP", [name], lambda: {name: search.run()})


def round_trip(site: Site, program: Program) -> Measurement:
    """The median round trip of a small datagram while nothing else happens."""
    name = program.figure("rtt_ms")

    def run() -> Values:
        site.outpost.echoes(program.server, ECHO_PORT, count=ECHOES_TO_WARM_UP)
        return {name: statistics.median(site.outpost.echoes(program.server, ECHO_PORT, count=ECHOES))}

    return Measurement("round trip", [name], run)


def connections(site: Site, program: Program, *, count: int) -> Measurement:
    """Fresh connections: from the client's first packet to its first reply, and how far it was when."""
    reply, authorized, established = (
        program.figure(what) for what in ("connect_ms", "connect_authorized_ms", "connect_established_ms")
    )
    own = program.figure("authorize_ms")

    def run() -> Values:
        mark = site.lab.portal.mark()
        links = [site.connect() for _ in range(count)]
        return {
            reply: [link["reply_ms"] for link in links],
            authorized: [link["authorized_ms"] for link in links],
            established: [link["established_ms"] for link in links],
            own: _authorizations(site.lab.portal.entries(kind="gateway")[-count * 8 :], mark),
        }

    return Measurement(f"{count} connections", [reply, authorized, established, own], run)


def memory(program: Program, state: str) -> Values:
    """Resident memory of the gateway's end in a state: `rss_mib.idle.gateway`."""
    assert program.cost is not None
    return {f"rss_mib.{state}.{program.name}": program.cost().rss_mib}


def _authorizations(entries: Sequence[Mapping[str, Any]], first: int) -> list[float]:
    """Milliseconds between what the portal told the gateway and its acknowledgement, as the portal sees it."""
    took, asked = [], None
    for entry in entries:
        if entry["n"] < first:
            continue
        if entry["event"] == "create_authorization":
            asked = entry["at"]
        elif entry["event"] == "authorization_created" and asked is not None:
            took.append((entry["at"] - asked) * 1000)
            asked = None
    return took
