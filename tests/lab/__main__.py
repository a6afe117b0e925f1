"""Command line of the lab: `python -m tests.lab COMMAND --help`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import click


@click.group(help=__doc__)
@click.option("--verbose", "-v", is_flag=True, help="Log at DEBUG.")
def main(verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)-5s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("websockets").setLevel(logging.CRITICAL)


_READY = click.option("--ready-fd", type=int, hidden=True, help="Descriptor for the readiness line (default: stdout).")
_CONTROL = click.option("--control", type=click.Path(path_type=Path), help="Unix socket for orders.")


@main.command()
@click.option("--listen", multiple=True, default=["127.0.0.1:8081"], show_default=True, help="HOST:PORT, repeatable.")
@click.option(
    "--token", "tokens", multiple=True, default=["lab-token"], show_default=True, help="A token that is accepted."
)
@click.option("--resource", "resources", multiple=True, help="cidr=NET, dns=PATTERN, internet (+ ,tcp=443 …) or JSON.")
@click.option("--store", type=click.Path(path_type=Path), help="File in which devices and authorizations survive.")
@click.option("--ledger", type=click.Path(path_type=Path), help="File for everything that is said.")
@click.option("--tls-dir", type=click.Path(path_type=Path), help="Serve wss; CA and certificates live here (ca.pem).")
@click.option("--tls-name", "tls_names", multiple=True, help="Names and addresses in the certificate.")
@_CONTROL
@_READY
def portal(listen, tokens, resources, store, ledger, tls_dir, tls_names, control, ready_fd):
    """Run the development portal."""
    from tests.lab.certificates import Authority
    from tests.lab.control import announce_ready, serve_control
    from tests.lab.portal import Portal
    from tests.lab.portal_account import Account, Ledger
    from tests.lab.store import Resource, Store

    async def run() -> None:
        devices = Store(store)
        for resource in map(Resource.parse, resources):
            devices.resources[resource.id] = resource
        devices.save()
        tls = Authority(tls_dir).server_context(list(tls_names) or ["localhost", "127.0.0.1"]) if tls_dir else None
        server = Portal(account=Account(store=devices, tokens=set(tokens), ledger=Ledger(ledger)), tls=tls)
        await server.start([_address(text) for text in listen])
        if control:
            await serve_control(control, server)
        announce_ready(ready_fd, ports=server.ports)
        await _stopped()
        await server.stop(code=1001)

    asyncio.run(run())


async def _stopped() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    main(prog_name="python -m tests.lab")
