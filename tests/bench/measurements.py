"""What is measured of a program: each measurement takes a moment and gives values by figure name."""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import engine_throughput, slow_path
from tests.bench.steady import Watch
from tests.lab.resources import ECHO_PORT
from tests.unit.dataplane_world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.sites import Program, Site

Values = dict[str, float | list[float]]

TCP_SECONDS = 1  # nothing here has latency, so a stream is at full speed after milliseconds
SHARE_SECONDS = 2  # flows are decided anew each second
LOAD_SECONDS = 2  # queues take longer to fill
UDP_PAYLOAD = 1200
UDP_LOSS_PERCENT = 0.1  # what a rate may lose and still count (performance chapter 4)
UDP_FIRST_MBIT, UDP_SINGLE_FIRST_MBIT = 800.0, 400.0
UDP_STEP = 1.06
UDP_PROBES = 3  # of a run, and more only until one passes
UDP_PROBES_AT_MOST = 9  # doubling from the first rate, then halving what is between, comes within 4 %
ECHOES = 150
ECHOES_TO_WARM_UP = 10
UDP_MOST_MBIT = 12_000.0  # near what plain routing carries by TCP
UDP_SECONDS = 0.4  # 13,000 datagrams at 400 Mbit/s, of which 13 may be lost
UDP_PORT = 5300

UDP_SMALL_PAYLOAD = 36  # a packet of 64 bytes
UDP_SMALL_FIRST_MBIT = 12.0
UDP_SMALL_MOST_MBIT = 150.0  # half a million packets a second, one by one
PING_INTERVAL_S = 0.01
PROBE_INTERVAL_S = 0.02  # half of the handshakes a second from which a gateway asks for cookies
CALM_AFTER_S, CALM_FOR_S = 0.5, 0.5
REFUSED_PER_SECOND = 50_000  # more than twice the new flows that the core must be able to judge
CORE_SECONDS = 0.2  # of CPU, some 30,000 packets; making them takes several times as long
_FOREIGN = "100.95.0.1"
TURN_CONNECTIONS = 1000
TURN_PORT = 6000
_INTERFACE = "eth0"
_AROUND_S = 0.4
_WAYS = {"in": ("item_InnerPacket", "udp_rx_packets"), "out": ("item_OutboundPacket", "tun_rx_packets")}
"""From clients and to them: items for Python, and packets."""

_OPTIONS: Mapping[str, Sequence[str]] = {"up": (), "down": ("-R",)}


@dataclass(frozen=True)
class Measurement:
    """`names` are the figures that `run` gives values for. `warms_up`: its first run is worse than the others.

    `on_request`: left out unless figures are named.
    """

    title: str
    names: Sequence[str]
    run: Callable[[], Values]
    warms_up: bool = False
    on_request: bool = False


def tcp(site: Site, program: Program, *, streams: int, direction: str) -> Measurement:
    """Throughput of TCP, and for the gateway's end what it costs, how large its sends are and what Python saw."""
    throughput = program.figure(f"tcp{streams}", direction)
    cost = program.figure("cpu_s_per_gb", direction)
    segments = program.figure("segments", direction)
    errors = program.figure("udp_buffer_errors", direction)
    shares = {way: program.figure(f"python_percent_{way}", direction) for way in _WAYS}
    of_gateway = program.name == "gateway"
    waited = program.figure("cpu_wait_percent", direction)
    with_cost = streams == 1 and program.cost is not None
    with_shares = of_gateway and streams == 1
    counted = [errors, *([segments] if direction == "down" else [])] if of_gateway else []
    counted += shares.values() if with_shares else ()
    seconds = SHARE_SECONDS if with_shares else TCP_SECONDS
    options = (*_OPTIONS[direction], "-P", str(streams))

    def run() -> Values:
        errors_before = site.beside.udp_buffer_errors() if of_gateway else 0
        watch = Watch(site)
        cost_before = program.cost().cpu if program.cost is not None else 0.0
        waits_before, began = _cpu_wait_seconds(program.pid), time.monotonic()
        with watch if of_gateway else contextlib.nullcontext():
            end = site.lab.client.iperf3(*options, server=program.server, seconds=seconds)["end"]
        received = end["sum_received"]
        values: Values = {throughput: received["bits_per_second"] / 1e9}
        if with_cost and program.cost is not None:
            values[cost] = (program.cost().cpu - cost_before) / received["bytes"] * 1e9
            values[waited] = 100 * (_cpu_wait_seconds(program.pid) - waits_before) / (time.monotonic() - began)
        if of_gateway:
            values[errors] = site.beside.udp_buffer_errors() - errors_before
            grown = watch.grown(for_whole_seconds=with_shares)
            for way, (item, packets) in _WAYS.items() if with_shares else ():
                values[shares[way]] = 100 * grown.get(item, 0) / grown[packets]
            if direction == "down":
                values[segments] = grown["udp_tx_packets"] / grown["udp_tx_calls"]
        return values

    names = [throughput, *([cost, waited] if with_cost else []), *counted]
    return Measurement(f"TCP, {streams} {'stream' if streams == 1 else 'streams'}", names, run, streams == 1)


def tcp_both(site: Site, program: Program) -> Measurement:
    """The sum of TCP in both directions at once, one stream each."""
    name = program.figure("tcp_both")

    def run() -> Values:
        end = site.lab.client.iperf3("--bidir", server=program.server, seconds=TCP_SECONDS)["end"]
        directions = (end["sum_received"], end["sum_received_bidir_reverse"])
        return {name: sum(each["bits_per_second"] for each in directions) / 1e9}

    return Measurement("TCP, both directions", [name], run)


def under_load(site: Site, program: Program, *, direction: str) -> Measurement:
    """With 4 TCP streams: another client's echoes, and how long handshakes and ICE checks wait for their answers."""
    assert site.crowd is not None
    crowd, of_gateway = site.crowd, program.name == "gateway"
    echoes = program.figure("ping_p99_ms", direction)
    answers = {what: program.figure(f"{what}_p99_ms", direction) for what in ("stun", "handshake")}
    source = crowd.addresses[0] if of_gateway else ""

    def run() -> Values:
        if of_gateway:
            site.beside.begin_answers(_INTERFACE, seconds=LOAD_SECONDS + _AROUND_S)
            crowd.probe(seconds=LOAD_SECONDS, interval=PROBE_INTERVAL_S)
        site.crowd_outpost.begin_pings(program.server, seconds=LOAD_SECONDS, interval=PING_INTERVAL_S, source=source)
        try:
            site.lab.client.iperf3(*_OPTIONS[direction], "-P", "4", server=program.server, seconds=LOAD_SECONDS)
        finally:
            values: Values = {echoes: _p99(site.crowd_outpost.answer())}
            took = site.beside.answer() if of_gateway else {}
        return values | {answers[what]: _p99(each) for what, each in took.items()}

    return Measurement("under load", [echoes, *(answers.values() if of_gateway else ())], run)


def under_refusals(site: Site, program: Program) -> Measurement:
    """Another client's echoes while one sends packets under an address that is not its own; each is refused."""
    assert site.crowd is not None
    crowd = site.crowd
    echoes, refused = program.figure("refused_p99_ms"), program.figure("refused_kpps")

    def run() -> Values:
        before = site.counters()["item_InnerPacket"]
        began = time.monotonic()
        site.outpost.begin_flood(program.server, source=_FOREIGN, per_second=REFUSED_PER_SECOND, seconds=LOAD_SECONDS)
        site.crowd_outpost.begin_pings(
            program.server, seconds=LOAD_SECONDS, interval=PING_INTERVAL_S, source=crowd.addresses[0]
        )
        try:
            took: list[float] = site.crowd_outpost.answer()
        finally:
            site.outpost.answer()
        judged = site.counters()["item_InnerPacket"] - before
        return {echoes: _p99(took), refused: judged / (time.monotonic() - began) / 1e3}

    return Measurement("under refusals", [echoes, refused], run)


def calm(site: Site, program: Program) -> Measurement:
    """CPU of a program soon after load, with all its clients still connected."""
    name = program.figure("cpu_percent_after")
    assert program.pid is not None
    pid = program.pid

    def run() -> Values:
        site.lab.client.iperf3("-P", "4", server=program.server, seconds=TCP_SECONDS)
        time.sleep(CALM_AFTER_S)
        before, began = _cpu_seconds(pid), time.monotonic()
        time.sleep(CALM_FOR_S)
        return {name: 100 * (_cpu_seconds(pid) - before) / (time.monotonic() - began)}

    return Measurement("calm after load", [name], run)


def in_turn(site: Site, *, clients: int) -> Measurement:
    """TCP of as many connections from one client as from many, written to in turn."""
    program = site.programs[0]
    name = program.figure(f"turn{clients}", "up")

    def run() -> Values:
        assert site.crowd is not None
        sources = [site.crowd.addresses[number % clients] for number in range(TURN_CONNECTIONS)]
        site.resources.begin_sink(connections=len(sources), seconds=TCP_SECONDS)
        site.crowd_outpost.begin_pour(program.server, TURN_PORT, sources=sources, seconds=TCP_SECONDS + _AROUND_S)
        try:
            octets_per_second = site.resources.answer()
        finally:
            site.crowd_outpost.answer()
        return {name: octets_per_second * 8 / 1e9}

    return Measurement(f"{clients} clients in turn", [name], run)


def engine_alone(engine: Any, name: str) -> Measurement:
    """Packets of 64 bytes per second through an engine that is fed from memory, on one core."""
    figures = {direction: f"engine64_kpps.{direction}.{name}" for direction in _OPTIONS}

    def run() -> Values:
        values: Values = {}
        for direction, measure in (("up", engine_throughput.inbound), ("down", engine_throughput.outbound)):
            world = World(engine=engine)
            values[figures[direction]] = 1e-3 / measure(world, 64, engine_throughput.PACKETS[engine.__name__])
            world.close()
        return values

    return Measurement("engine alone", list(figures.values()), run)


def core_alone() -> Measurement:
    """Packets that the core decides in Python, on one core, and how much slower it is with full tables."""
    names = ["uncached_kpps.gateway", "new_flows_kps.gateway", "full_tables_ratio.gateway"]

    @functools.cache
    def core() -> slow_path.Core:
        logging.getLogger("fzg").setLevel(logging.ERROR)
        return slow_path.Core()

    @functools.cache
    def tables() -> tuple[slow_path.Tables, slow_path.Tables]:
        return slow_path.empty_and_full(slow_path.Core(1))

    def run() -> Values:
        values = (
            core().rate(slow_path.known_flows(core()), slow_path.both_ways, CORE_SECONDS) / 1e3,
            core().rate(slow_path.new_flows(core()), slow_path.from_clients, CORE_SECONDS) / 1e3,
            slow_path.slowdown(*tables(), CORE_SECONDS),
        )
        return dict(zip(names, values, strict=True))

    return Measurement("core alone", names, run)


@dataclass
class _Search:
    """The largest rate that arrives, looked for a few steps at a time around where it was last."""

    measure: Callable[[float], tuple[float, float]]
    rate: float
    most: float
    step: float = 2.0
    best: float = field(default=0.0)

    def run(self) -> float:
        """What arrived at the largest rate that lost no more than it may; the first run takes large steps."""
        best, passed_at, failed_at = 0.0, 0.0, self.most * 2
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
            if passed_at and failed_at <= self.most:
                rate = (passed_at * failed_at) ** 0.5
                if failed_at < passed_at * 1.04:
                    break
            else:
                rate = passed_at * self.step if passed_at else failed_at / self.step
        self.rate, self.step, self.best = passed_at or rate, UDP_STEP, best or self.best
        return best


def udp(site: Site, program: Program, *, direction: str, size: int = UDP_PAYLOAD, trains: bool = True) -> Measurement:
    """What arrives of datagrams with loss below 0.1 %: of 1200 bytes or in packets of 64, in trains or one by one."""
    is_small = size < UDP_PAYLOAD
    what = "udp64_kpps" if is_small else "udp1200_mbit" if trains else "udp1200_single_mbit"
    name = program.figure(what, direction)
    first, most = (UDP_SMALL_FIRST_MBIT, UDP_SMALL_MOST_MBIT) if is_small else (UDP_FIRST_MBIT, UDP_MOST_MBIT)
    if not (is_small or trains):
        first = UDP_SINGLE_FIRST_MBIT

    def measure(mbit: float) -> tuple[float, float]:
        load = {"size": size, "mbit": mbit, "seconds": UDP_SECONDS, "trains": trains}
        return site.outpost.datagrams_to(site.resources, program.server, UDP_PORT, back=direction == "down", **load)

    search = _Search(measure, rate=first, most=most)
    to_unit = 1e3 / 8 / size if is_small else 1.0
    on_request = not (is_small or trains)
    return Measurement(f"UDP, {size} bytes", [name], lambda: {name: search.run() * to_unit}, True, on_request)


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


def memory(program: Program) -> Values:
    """The most resident memory that the gateway's end has had."""
    status = Path(f"/proc/{program.pid}/status").read_text()
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {f"rss_mib.loaded.{program.name}": int(kibibytes) / 1024}


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1] if len(values) > 1 else values[0]


def _cpu_seconds(pid: int) -> float:
    """Exact to the nanosecond, of all threads that live."""
    return _schedstat(pid, 0)


def _cpu_wait_seconds(pid: int | None) -> float:
    """How long its threads were ready to run and had no core, all together."""
    return 0.0 if pid is None else _schedstat(pid, 1)


def _schedstat(pid: int, field_number: int) -> float:
    total = 0
    for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(stat.read_text().split()[field_number])
    return total / 1e9


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
