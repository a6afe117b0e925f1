"""What `make demo` shows: clients behind NATs reach private resources through the gateway, and keep doing so."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tests.lab.scenario import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = "http://dns.httpbin.search.test/get"
DOWNLOAD = "http://download.httpbin/bytes?num=50000000"
TITLES = {
    "direct": "Gateway and client behind port-preserving NATs: hole punching gives a direct path",
    "relay-relay": "Both behind symmetric NATs: packets go through relays",
}


def show(gateway: str = "") -> None:
    """Run the demonstration; RuntimeError or TimeoutError if something does not work."""
    console = Console(highlight=False)
    changes: dict[str, Any] = {"gateway_command": shlex.split(gateway)} if gateway else {}
    for scenario, title in TITLES.items():
        console.rule(title)
        with console.status("building portal, relays, routers, resources, gateway, client"):
            lab = Lab(scenario, **changes)
            lab.up()
        try:
            _tour(lab, console)
        finally:
            lab.down()


def _tour(lab: Lab, console: Console) -> None:
    client = lab.client

    def step(what: str, action: Callable[[], Any], result: Callable[[Any], str]) -> None:
        with console.status(what):
            value = action()
        console.print(f"  {what}: [green]{result(value)}")

    step("the gateway's address in the tunnel", lambda: lab.gateway.tunnel_ipv4, str)
    step(
        "first packet to a DNS resource", lambda: _fetched(lab, PAGE), lambda f: f"page after {f.seconds * 1000:.0f} ms"
    )
    link = client.status()["links"][0]
    step("connection", lambda: link, lambda a: f"established after {a['established_ms']:.0f} ms")
    step(
        "IPv6 network",
        lambda: _fetched(lab, "http://[10:20::100]/get"),
        lambda f: f"page after {f.seconds * 1000:.0f} ms",
    )
    step("download", lambda: _fetched(lab, DOWNLOAD), lambda f: f"{f.bytes * 8 / f.seconds / 1e6:.0f} Mbit/s")
    step("path", client.paths, lambda paths: str(paths[0]))
    lab.portal.stop()
    step(
        "the portal is gone, the page again", lambda: _fetched(lab, PAGE), lambda f: f"after {f.seconds * 1000:.0f} ms"
    )
    cost = lab.gateway.process.cost()
    console.print(f"  the gateway used {cost.cpu:.1f} s of CPU and holds {cost.rss_mib:.0f} MiB")


def _fetched(lab: Lab, url: str) -> Any:
    fetched = lab.client.download(url) if "bytes" in url else lab.client.curl(url)
    if not fetched.ok:
        raise RuntimeError(f"{url}: {fetched.error or fetched.status}\n{lab.tails()}")
    return fetched
