"""What `make demo` shows: clients behind NATs reach private resources, and only what they may, directly and relayed."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from tests.lab.demo_loopback import DemoError
from tests.lab.process import wait_until
from tests.lab.scenario import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

WEB = "10.20.0.100"
NAME = "download.httpbin"
SIZE = 10_000_000
DIGEST = hashlib.sha256(bytes(SIZE)).hexdigest()
REFUSED_PORT = 7  # the resource's echo server, which its filter does not permit
RESOURCES = ("cidr=10.20.0.0/16,tcp=80,icmp", "dns=**.httpbin")
REVOCATION_LIMIT = 1.0  # s until a running download must have stopped
PINGS = 10
TOURS = {
    "direct": ("direct", "Both behind port-preserving NATs: hole punching gives a direct path"),
    "relayed": ("relay-relay", "Both behind symmetric NATs: packets travel over the relays"),
}
_OFFERED = re.compile(r"Candidates offered.* reported=(\d+) offered=(\d+)")


@dataclass
class Row:
    """One line of the table at the end."""

    path: str
    connect_ms: float
    round_trip_ms: float
    throughput_mbit: float
    checksum: str
    messages: int
    reported: int
    offered: int


def show(console: Console, gateway: str = "") -> None:
    """Run everything and print the table; raises `DemoError` for what did not work."""
    rows = []
    for name, (scenario, title) in TOURS.items():
        console.rule(title, align="left")
        command: dict[str, Any] = {"gateway_command": shlex.split(gateway)} if gateway else {}
        with console.status("starting portal, relays, routers, resources, gateway and client"):
            lab = Lab(scenario, tls=True, relays=("relay", "coturn"), resources=RESOURCES, **command)
            lab.up()
        try:
            rows.append(_Tour(lab, console).run(last=name == "relayed"))
        finally:
            lab.down()
    console.print(_table(rows))


class _Tour:
    """One scenario, step by step."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.lab = lab
        self.client = lab.client
        self.console = console

    def run(self, *, last: bool) -> Row:
        """All steps; those about policy only where the path is direct, since they do not depend on it."""
        first = self._step("ping 10.20.0.100, a CIDR resource", self._round_trips, lambda t: f"{t[0]:.1f} ms")
        link = self.client.status()["links"][0]
        self._step(f"http://{WEB}/, the same by HTTP", lambda: self._page(WEB), _ms)
        self._step(f"http://{NAME}/, a DNS resource", lambda: self._page(NAME), _ms)
        digest, seconds = self._step(f"{SIZE // 1_000_000} MB from {NAME}", self._download, _checked)
        path = self._step("path", lambda: self.client.paths()[0], str)
        expected = "RelayTo" if last else "PeerToPeer"
        if not path.startswith(expected):
            raise DemoError(f"the path is {path}, expected {expected}")
        if not last:
            self._step(
                f"port {REFUSED_PORT}, which the filter refuses", self._refused, lambda n: f"{n} times ICMP prohibited"
            )
            self._step(
                "access revoked under a running download", self._revoke, lambda t: f"stopped after {t * 1000:.0f} ms"
            )
        reported, offered = self._offered()
        return Row(
            path=path,
            connect_ms=link["first_reply_ms"],
            round_trip_ms=min(first),
            throughput_mbit=SIZE * 8 / seconds / 1e6,
            checksum="right" if digest == DIGEST else "WRONG",
            messages=sum(message["added"] for message in link["candidate_messages"]),
            reported=reported,
            offered=offered,
        )

    def _step(self, what: str, action: Callable[[], Any], result: Callable[[Any], str]) -> Any:
        with self.console.status(what):
            value = action()
        self.console.print(f"  {what}: [green]{result(value)}")
        return value

    def _round_trips(self) -> list[float]:
        """Milliseconds of several echoes; the first includes the connection's set-up."""
        source = f"import sys; from tests.lab.ping import ping\nfor _ in range({PINGS}): print(ping(sys.argv[1], 20.0))"
        done = self.client.run(sys.executable, "-c", source, WEB, timeout=60)
        times = [float(line) * 1000 for line in done.stdout.split() if line != "None"]
        if len(times) < PINGS:
            raise DemoError(f"only {len(times)} of {PINGS} pings were answered")
        return times

    def _page(self, host: str) -> float:
        fetched = self.client.curl(f"http://{host}/get", "-4")  # curl waits 200 ms between the families
        if not fetched.ok:
            raise DemoError(f"http://{host}/: {fetched.error or fetched.status}")
        return fetched.seconds

    def _download(self) -> tuple[str, float]:
        begin = time.monotonic()
        done = self.client.run(
            "sh", "-c", f"curl -4gsS --max-time 60 'http://{NAME}/bytes?num={SIZE}' | sha256sum", timeout=70
        )
        return done.stdout.split()[0], time.monotonic() - begin

    def _refused(self) -> int:
        before = self.client.status()["prohibited"]
        fetched = self.client.curl(f"http://{WEB}:{REFUSED_PORT}/", "--connect-timeout", "3", timeout=5)
        answered: int = self.client.status()["prohibited"] - before
        if fetched.ok or not answered:
            raise DemoError(f"port {REFUSED_PORT} was not refused: {fetched}")
        return answered

    def _revoke(self) -> float:
        """Seconds from the portal's order to the last byte that still came out of the client's tunnel."""
        portal = self.lab.portal
        resource = next(key for key, one in portal.state()["resources"].items() if one["type"] == "cidr")
        client = portal.wait_client()
        url = f"http://{WEB}/bytes?num=10000000000"
        command = [*self.client.namespace.prefix(), "curl", "-gsS", "-o", "/dev/null", "--max-time", "30", url]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as download:
            begin = self._received()
            wait_until(lambda: self._received() > begin + 1_000_000, timeout=10, what="the download flows")
            portal.forbid(resource=resource)
            order = time.monotonic()
            portal.reject_access(client=client, resource=resource)
            last, stopped = self._received(), order
            while time.monotonic() < order + 2 * REVOCATION_LIMIT:
                time.sleep(0.01)
                if (received := self._received()) > last:
                    last, stopped = received, time.monotonic()
            download.kill()
        if stopped > order + REVOCATION_LIMIT:
            raise DemoError("the download went on after its authorization was revoked")
        return stopped - order

    def _received(self) -> int:
        return int(self.client.status()["counters"].get("tun_tx_bytes", 0))

    def _offered(self) -> tuple[int, int]:
        """What the relays reported and what was signalled for the connection, from the gateway's own log."""
        found = _OFFERED.findall(self.lab.gateway.process.log.read_text())
        return (int(found[0][0]), int(found[0][1])) if found else (0, 0)


def _table(rows: list[Row]) -> Table:
    caption = (
        "messages: candidate messages for the connection; reported: what relays and the host named; sent: each once"
    )
    table = Table(title="What was seen", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("path", no_wrap=True)
    for heading in ("connect ms", "trip ms", "Mbit/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("SHA-256", no_wrap=True)
    for heading in ("messages", "reported", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.path,
            f"{row.connect_ms:.1f}",
            f"{row.round_trip_ms:.2f}",
            f"{row.throughput_mbit:.0f}",
            row.checksum,
            str(row.messages),
            str(row.reported),
            str(row.offered),
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _checked(result: tuple[str, float]) -> str:
    digest, seconds = result
    if digest != DIGEST:
        raise DemoError(f"the download has the SHA-256 {digest}, expected {DIGEST}")
    return f"{SIZE * 8 / seconds / 1e6:.0f} Mbit/s, SHA-256 right"
