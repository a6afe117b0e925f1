"""Whether a native thread for each direction would be faster: `python -m tests.bench.two_threads`.

A bare tunnel across a veth pair, TCP through it. An engine is for one thread, so each direction has its own, on the
same sockets, and either one thread serves both in turn or each has a thread. The interpreter's lock is released in the
engines. Both ends do the same.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from fzg.dataplane.engine import InnerPacket, OutboundPacket
from fzg.dataplane.select import make_engine
from fzg.host import tun, udp
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint
from tests.lab.namespaces import Network, can_make_namespaces, user_namespace_command
from tests.lab.process import cost_of, lab_environment, wait_until
from tests.unit.dataplane_world import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.lab.namespaces import Namespace

LINK, INSIDE = ("10.99.1.1", "10.99.1.2"), ("10.98.1.1", "10.98.1.2")
TUN = "tun-threads"
RUNS, SECONDS = 5, 2
PEER = 1
_FOREVER = 1e9
_LOADS = {"up": (), "down": ("-R",), "both": ("--bidir",)}


def main_of_end(number: int, threads: int) -> None:
    """Be one end until killed."""
    opened = udp.open_socket(socket.AF_INET, mark=None)
    device = tun.open_tun(name=TUN)
    engines = [make_engine() for _ in range(2)]  # from clients, to clients
    keys = [bytes((way,)) * 32 for way in (number, 1 - number)]
    for engine in engines:
        engine.attach_udp(socket.AF_INET, opened.socket, port=opened.port)
        engine.attach_tun(device.descriptor, offloads=device.offloads)
        engine.add_session(PEER, 7 + number, 8 - number, receive_key=keys[0], send_key=keys[1], now=1.0)
        engine.use_session(PEER, 7 + number)
        engine.set_path(PEER, None, Endpoint.of(LINK[1 - number], udp.PREFERRED_PORT), None)
    from_udp, from_tun = engines

    def serve_udp() -> None:
        for item in from_udp.receive_udp(socket.AF_INET, time.monotonic()):
            if isinstance(item, InnerPacket):
                install(from_udp, item.packet, inbound=True)
                from_udp.write_tun(item.packet, PEER)
        from_udp.flush()

    def serve_tun() -> None:
        for item in from_tun.receive_tun(time.monotonic()):
            if isinstance(item, OutboundPacket):
                install(from_tun, item.packet, inbound=False)
                sealed = from_tun.seal(PEER, item.packet, time.monotonic())
                from_tun.transmit(Transmit(Endpoint.of(LINK[1 - number], udp.PREFERRED_PORT), sealed))
        from_tun.flush()

    sides = {
        opened.socket.fileno(): (serve_udp, lambda: from_udp.has_backlog(socket.AF_INET)),
        device.descriptor: (serve_tun, lambda: from_tun.has_backlog(None)),
    }
    if threads == 1:
        _serve(sides)
        return
    for each in sides.items():
        threading.Thread(target=_serve, args=(dict([each]),), daemon=True).start()
    signal.pause()


def install(engine: Any, packet: bytes, *, inbound: bool) -> None:
    if packet[0] >> 4 == 4 and packet[9] in {6, 17}:  # the flow of a connection, once and for all
        flags = packet[33] if packet[9] == 6 else 0
        if not flags & 7:
            engine.install_flow(PEER, key_of(packet), inbound=inbound, rewrite=None, valid_until=_FOREVER, token=0)


def _serve(sides: dict[int, tuple[Callable[[], None], Callable[[], bool]]]) -> None:
    """Serve what is ready, in turn."""
    poll = select.poll()
    for descriptor in sides:
        poll.register(descriptor, select.POLLIN)
    while True:
        waits = not any(has_backlog() for _, has_backlog in sides.values())
        ready = {descriptor for descriptor, _ in poll.poll(None if waits else 0)}
        for descriptor, (serve, has_backlog) in sides.items():
            if descriptor in ready or has_backlog():
                serve()


class Tunnel:
    """Both ends in namespaces, with so many threads each."""

    def __init__(self, ends: Sequence[Namespace], threads: int) -> None:
        self.ends = ends
        environment = dict(os.environ) | lab_environment()
        self.processes = [
            subprocess.Popen(
                [*end.prefix(), sys.executable, "-m", "tests.bench.two_threads", "--end", f"{number},{threads}"],
                env=environment,
            )
            for number, end in enumerate(ends)
        ]
        for number, end in enumerate(ends):
            wait_until(lambda end=end: f" {TUN}" in end.run("ip", "-o", "link").stdout, timeout=20, what="the TUN")
            end.ip(
                f"address add {INSIDE[number]}/32 dev {TUN}",
                f"link set {TUN} mtu 1280 txqueuelen 10000 up",
                f"route add {INSIDE[1 - number]}/32 dev {TUN}",
            )
        wait_until(lambda: ends[0].run("ping", "-c1", "-W1", INSIDE[1], check=False).returncode == 0, timeout=20,
                   what="the tunnel")  # fmt: skip

    def measure(self, options: Sequence[str]) -> tuple[float, float]:
        """Gbit/s, and CPU seconds of both ends per 10⁹ bytes."""
        before: list[float] = []

        def measured() -> dict[str, Any] | None:
            before[:] = [cost_of(process.pid).cpu for process in self.processes]
            done = self.ends[0].run("iperf3", "-J", "-c", INSIDE[1], "-t", str(SECONDS), *options, check=False)
            report: dict[str, Any] = json.loads(done.stdout)
            return None if "error" in report else report["end"]  # the server may still be at the end of the run before

        end = wait_until(measured, timeout=20, what="a run of iperf3")
        received = [each for name, each in end.items() if name.startswith("sum_received")]
        octets = sum(each["bytes"] for each in received)
        spent = sum(cost_of(process.pid).cpu for process in self.processes) - sum(before)
        return sum(each["bits_per_second"] for each in received) / 1e9, spent / octets * 1e9

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@click.command(help=__doc__)
@click.option("--runs", default=RUNS, show_default=True, type=click.IntRange(1))
@click.option("--end", default="", hidden=True)
def main(runs: int, end: str) -> None:
    if end:
        main_of_end(*map(int, end.split(",")))
        return
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench.two_threads", *sys.argv[1:])
        os.execvp(command[0], command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    values: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with Network() as network:
        ends = [network.namespace(f"end{number}") for number in range(2)]
        network.link(ends[0], "eth0", ends[1], "eth0")
        for number, each in enumerate(ends):
            each.ip(f"address add {LINK[number]}/24 dev eth0", "link set eth0 up")
        server = subprocess.Popen([*ends[1].prefix(), "iperf3", "-s"], stdout=subprocess.DEVNULL)
        try:
            for run in range(runs + 1):  # the first is dropped
                for threads in (1, 2):
                    tunnel = Tunnel(ends, threads)
                    try:
                        for name, options in _LOADS.items():
                            measured = tunnel.measure(options)
                            if run:
                                values.setdefault((name, threads), []).append(measured)
                    finally:
                        tunnel.close()
        finally:
            server.kill()
            server.wait()
    table = Table(
        title=f"threads of each end, {len(os.sched_getaffinity(0))} cores, medians of {runs}", title_justify="left"
    )
    for heading in ("TCP, 1 stream", "threads", "Gbit/s", "CPU s per 10⁹ bytes, both ends"):
        table.add_column(heading)
    for (name, threads), each in values.items():
        rate, cost = (statistics.median(column) for column in zip(*each, strict=True))
        table.add_row(name, str(threads), f"{rate:.2f}", f"{cost:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.two_threads")
