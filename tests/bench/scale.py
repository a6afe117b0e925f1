"""How the gateway bears many clients, many new ones, and strangers: `python -m tests.bench.scale`.

The gateway is the real program in a namespace, with a TUN; clients, portal and relay are beside it in another, without
a NAT between. A part begins with a gateway of its own.
"""

from __future__ import annotations

from gevent import monkey

if __name__ == "__main__":
    monkey.patch_all()

import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import click
import gevent
from rich.console import Console
from rich.table import Table

from tests.bench.figures import machine
from tests.bench.swarm import EXPIRES, Member, Swarm, percentile
from tests.lab.derivations import turn_credentials
from tests.lab.namespaces import Network, can_make_namespaces, user_namespace_command
from tests.lab.process import cost_of, lab_environment
from tests.lab.relay_client import RelayProcess
from tests.lab.scenario import available
from tests.lab.scripted_portal import wait_until
from tests.system.gateway_process import INIT, Gateway, inside, portal_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GATEWAY, CROWD, RELAY = "10.99.0.1", "10.99.0.2", "10.99.0.3"
RESOURCE = "10.98.0.1/32"
PORT = 52625

IDLE_CLIENTS = 1000
IDLE_FROM = 20  # clients that are there before memory is counted: the first of everything costs more
SETTLES_S = 45.0  # until clients and gateway are idle and the checks of the active time are over
IDLE_SECONDS = 20.0
NEW_PER_SECOND, NEW_SECONDS = 80, 10  # the handshake limiter allows 100
PINGING, PINGS_PER_SECOND, PING_SECONDS = 10, 20.0, 6.0
FLOODS = {"handshakes": 20_000, "junk": 50_000}  # datagrams a second
_FLOOD_STARTS_S = 1.5
_CONNECTS_S = 10.0  # patience


class Bound(NamedTuple):
    """What a figure is to reach."""

    text: str
    unit: str
    most: float | None = None
    least: float | None = None

    def is_met(self, value: float) -> bool:
        """Whether it does."""
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


BOUNDS = {
    "idle_cpu_percent": Bound(f"{IDLE_CLIENTS} idle clients, of one core", "%", most=5),
    "idle_kib": Bound("memory for each of them", "KiB", most=40),
    "setup_connected": Bound(f"clients connected, {NEW_PER_SECOND}/s for {NEW_SECONDS} s", "", least=800),
    "setup_ms": Bound("set-up, median", "ms", most=250),
    "setup_p99_ms": Bound("set-up, 99th percentile", "ms"),
    "setup_cpu_percent": Bound("meanwhile, of one core", "%"),
    **{
        f"{kind}_{name}": bound
        for kind, rate in FLOODS.items()
        for name, bound in {
            "sent_per_s": Bound(f"{kind} of strangers, {rate} wanted", "1/s", least=rate * 0.9),
            "quiet_p99_ms": Bound("round trip before them, 99th percentile", "ms"),
            "p99_ms": Bound("round trip under them, 99th percentile", "ms", most=10),
            "lost_percent": Bound("round trips lost", "%", most=1),
            "connect_s": Bound("a new client connects within", "s", most=6),
            "cpu_percent": Bound("meanwhile, of one core", "%"),
        }.items()
    },
}

Figures = dict[str, float]


class Site:
    """A gateway, joined to its portal and with an allocation, and a swarm that has no members yet."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            network = stack.enter_context(Network())
            self.outside, inner = network.namespace("crowd"), network.namespace("gateway")
            network.link(self.outside, "wire", inner, "wire")
            self.outside.ip(f"address add {CROWD}/24 dev wire", f"address add {RELAY}/24 dev wire")
            inner.ip(f"address add {GATEWAY}/24 dev wire", f"address add {RESOURCE} dev lo", "link set lo up")
            inner.sysctl(ipv4__conf__all__rp_filter=0)
            relay = RelayProcess(ipv4=RELAY, prefix=self.outside.prefix(), directory=network.directory)
            stack.callback(relay.close)
            self.portal = portal_in(inner)
            stack.callback(self.portal.stop)
            self.portal.push_after_join = []  # `init` needs the gateway's key, for its relay's password
            self.gateway = Gateway(inner, portal=self.portal, RUST_LOG="warn")
            stack.callback(self.gateway.stop)
            self.portal.connection(0).frame("phx_join")
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.portal.requests[-1].path).query)
            (key,) = query["public_key"]
            credentials = turn_credentials(key, relay.secret)
            listed = {
                "id": relay.id, "type": "turn", "addr": f"{RELAY}:3478", "expires_at": EXPIRES,
                "username": credentials.username, "password": credentials.password,
            }  # fmt: skip
            self.swarm = Swarm(
                portal=self.portal, gateway_key=b64decode(key), resource=RESOURCE, open_socket=self._open_socket
            )
            stack.callback(self.swarm.close)
            self.swarm.push("init", INIT | {"relays": [listed]})
            wait_until(relay.allocations, "an allocation")
            self.gateway.wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def rss_kib(self) -> float:
        """What the gateway holds."""
        return cost_of(self.gateway.pid).rss_mib * 1024

    def meter(self) -> Callable[[], float]:
        """Begins to measure; the result says how much of a core the gateway has used since, in percent."""
        cpu, began = cost_of(self.gateway.pid).cpu, time.monotonic()
        return lambda: (cost_of(self.gateway.pid).cpu - cpu) / (time.monotonic() - began) * 100

    def connect(self, count: int) -> list[Member]:
        """That many more clients, all connected."""
        members = self.swarm.invite_at(NEW_PER_SECOND, count)
        if late := self.swarm.wait(members, _CONNECTS_S):
            raise RuntimeError(f"{len(late)} of {count} clients are not connected: {dict(self.swarm.counts)}")
        return members

    def flood(self, kind: str, seconds: float) -> subprocess.Popen[str]:
        """Strangers begin to send."""
        arguments = [kind, str(FLOODS[kind]), str(seconds), GATEWAY, str(PORT), self.swarm.gateway_key.hex()]
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *self.outside.prefix(),
             sys.executable, "-m", "tests.bench.strangers", *arguments],
            env=dict(os.environ) | lab_environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _open_socket(self) -> socket.socket:
        with inside(self.outside):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setblocking(False)
        made.bind((CROWD, 0))
        return made


def idle(site: Site) -> Figures:
    """What clients cost that are there and say nothing."""
    site.connect(IDLE_FROM)
    gevent.sleep(1.0)
    before = site.rss_kib
    site.connect(IDLE_CLIENTS - IDLE_FROM)
    gevent.sleep(SETTLES_S)
    grown, used = site.rss_kib - before, site.meter()
    gevent.sleep(IDLE_SECONDS)
    return {"idle_cpu_percent": used(), "idle_kib": grown / (IDLE_CLIENTS - IDLE_FROM)}


def setup(site: Site) -> Figures:
    """From the portal's authorization to the client's session."""
    used = site.meter()
    members = site.swarm.invite_at(NEW_PER_SECOND, NEW_PER_SECOND * NEW_SECONDS)
    site.swarm.wait(members, _CONNECTS_S)
    share = used()
    took = [(member.established_at - member.asked_at) * 1000 for member in members if member.established_at]
    return {
        "setup_connected": float(len(took)),
        "setup_ms": statistics.median(took),
        "setup_p99_ms": percentile(took, 0.99),
        "setup_cpu_percent": share,
    }


def flooded(kind: str) -> Callable[[Site], Figures]:
    """Round trips of clients that are connected, and a new client, while strangers send."""

    def measure(site: Site) -> Figures:
        members = site.connect(PINGING)
        site.swarm.echoes(members, per_second=10, seconds=0.5)
        quiet, _ = site.swarm.echoes(members, per_second=PINGS_PER_SECOND, seconds=PING_SECONDS / 2)
        flood = site.flood(kind, _FLOOD_STARTS_S + PING_SECONDS + _CONNECTS_S)
        gevent.sleep(_FLOOD_STARTS_S)
        used = site.meter()
        took, lost = site.swarm.echoes(members, per_second=PINGS_PER_SECOND, seconds=PING_SECONDS)
        share = used()
        new = site.swarm.invite()
        site.swarm.wait([new], _CONNECTS_S)
        told, _ = flood.communicate()
        sent = json.loads(told)
        return {
            f"{kind}_sent_per_s": sent["sent"] / sent["seconds"],
            f"{kind}_quiet_p99_ms": percentile(quiet, 0.99),
            f"{kind}_p99_ms": percentile(took, 0.99),
            f"{kind}_lost_percent": lost * 100,
            f"{kind}_connect_s": new.established_at - new.asked_at if new.established_at else float("inf"),
            f"{kind}_cpu_percent": share,
        }

    return measure


PARTS: dict[str, Callable[[Site], Figures]] = {
    "setup": setup,
    "handshakes": flooded("handshakes"),
    "junk": flooded("junk"),
    "idle": idle,
}


def measure(part: str) -> Figures:
    """One part, with a gateway of its own."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), most))  # a socket for each client
    with Site() as site:
        return PARTS[part](site)


def table(figures: Figures) -> Table:
    """What was measured beside what is wanted."""
    made = Table(title="scale", title_justify="left")
    for heading in ("what", "measured", "bound", "unit", ""):
        made.add_column(heading, justify="right" if heading in {"measured", "bound"} else "left")
    for name, value in figures.items():
        bound = BOUNDS[name]
        limit = f"≤ {bound.most:g}" if bound.most is not None else f"≥ {bound.least:g}" if bound.least else ""
        verdict = "" if not limit else "met" if bound.is_met(value) else "missed"
        made.add_row(bound.text, f"{value:.4g}", limit, bound.unit, verdict)
    return made


@click.command(help=__doc__)
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts, separated by commas.")
@click.option("--output", default="build/scale.json", show_default=True, type=click.Path(path_type=Path))
def main(only: str, output: Path) -> None:
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench.scale", *sys.argv[1:])
        os.execvp(command[0], command)
    if (reason := available()) is not None:
        raise click.ClickException(f"the bench {reason}")
    about, figures = machine(), Figures()
    parts: Sequence[str] = only.split(",")
    with Console(stderr=True).status("") as status:
        for part in parts:
            status.update(f"scale: {part}")
            figures |= measure(part)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": about, "figures": figures}, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(table(figures))
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load_at_start']} at the start; also in {output}")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.scale")
