"""Command line of the lab: `python -m tests.lab COMMAND --help`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
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
    import asyncio

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


_RELAY_OPTIONS = (
    click.option("--portal-url", help="Portal to join, e.g. ws://203.0.113.10:8081; none: do not join."),
    click.option("--token", default="lab-token", show_default=True),
    click.option("--ca", type=click.Path(), help="PEM file of the portal's certificate authority."),
    click.option("--name", default="lab-relay", show_default=True),
    click.option("--ipv4", help="Public IPv4 address."),
    click.option("--port", default=3478, show_default=True),
    click.option("--secret", help="stamp_secret; random by default."),
    _CONTROL,
    _READY,
)


def _relay_options(command):
    for option in reversed(_RELAY_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.option("--ipv6", help="Public IPv6 address.")
@_relay_options
def relay(portal_url, token, ca, name, ipv4, ipv6, port, secret, control, ready_fd):
    """Run the test relay."""
    from tests.lab import derivations
    from tests.lab.control import ControlThread, announce_ready
    from tests.lab.phoenix import RelayRegistration
    from tests.lab.relay import Relay

    server = Relay(ipv4=ipv4, ipv6=ipv6, port=port, secret=secret)
    server.open()
    registrations = []

    def register():
        while registrations:
            registrations.pop().leave()
        if portal_url:
            registrations.append(
                RelayRegistration(
                    url=portal_url,
                    token=token,
                    name=name,
                    ipv4=ipv4,
                    ipv6=ipv6,
                    port=server.port,
                    stamp_secret=server.secret,
                    ca_file=ca,
                )
            )

    register()
    server.on_new_secret = register
    if control:
        ControlThread(control, server, server.post)
    if registrations and not registrations[0].joined.wait(15):
        raise click.ClickException("the portal did not let us join")
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    announce_ready(ready_fd, relay_id=derivations.relay_id(server.secret), port=server.port, secret=server.secret)
    server.run()
    for registration in registrations:
        registration.leave()


@main.command()
@click.option("--directory", type=click.Path(path_type=Path), required=True, help="For configuration, users and log.")
@click.option("--loopback-peers", is_flag=True, help="Relay to 127.0.0.0/8 too.")
@_relay_options
def coturn(portal_url, token, ca, name, ipv4, port, secret, directory, loopback_peers, control, ready_fd):
    """Run coturn as a relay."""
    from tests.lab import derivations
    from tests.lab.control import ControlThread, announce_ready
    from tests.lab.coturn import Coturn
    from tests.lab.phoenix import RelayRegistration

    secret = secret or os.urandom(32).hex()
    server = Coturn(directory, ipv4=ipv4, port=port, loopback_peers=loopback_peers)
    try:
        if control:
            ControlThread(control, server)
        registration = None
        if portal_url:
            registration = RelayRegistration(
                url=portal_url,
                token=token,
                name=name,
                ipv4=ipv4,
                ipv6=None,
                port=port,
                stamp_secret=secret,
                ca_file=ca,
                registrar=str(control),
            )
            if not registration.joined.wait(15):
                raise click.ClickException("the portal did not let us join")
        announce_ready(ready_fd, relay_id=derivations.relay_id(secret), port=port, secret=secret, server_pid=server.pid)
        _wait_for_signal()
        if registration is not None:
            registration.leave()
    finally:
        server.close()


@main.command()
@_CONTROL
@_READY
def resources(control, ready_fd):
    """Run web, echo and name servers (ports 80, 7 and 53 on all addresses)."""
    from tests.lab.control import ControlThread, announce_ready
    from tests.lab.resources import Resources

    servers = Resources()
    servers.start()
    if control:
        ControlThread(control, servers)
    announce_ready(ready_fd)
    _wait_for_signal()


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def client(arguments):
    """Run the development client (`python -m tests.lab.client`)."""
    os.execv(sys.executable, [sys.executable, "-m", "tests.lab.client", *arguments])


@main.command()
@click.argument("scenario", default="direct")
@click.option("--gateway", help="Command of the gateway, e.g. ./dist/firezone-gateway (default: python -m fzg).")
@click.option("--no-gateway", is_flag=True, help="Leave the gateway (and clients) out.")
@click.option("--no-clients", is_flag=True, help="Leave the clients out.")
@click.option("--iperf3", is_flag=True, help="Run an iperf3 server at 10.20.0.110.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where logs go (default: removed at the end).")
def up(scenario, gateway, no_gateway, no_clients, iperf3, directory):
    """Build SCENARIO and leave it running until Ctrl-C. See `scenarios`."""
    import shlex

    from tests.lab.namespaces import can_make_namespaces, user_namespace_command
    from tests.lab.scenario import NAMED, Lab, run_until_interrupted

    if not can_make_namespaces():
        # An ordinary user gets a user namespace; gateway and clients then need a /dev/net/tun that is open to all.
        command = user_namespace_command(sys.executable, "-m", "tests.lab", *sys.argv[1:])
        os.execvp(command[0], command)
    if scenario not in NAMED:
        raise click.BadParameter(f"{scenario} is none of {', '.join(NAMED)}")
    changes = {"start_gateway": not no_gateway, "start_clients": not no_clients, "iperf3": iperf3}
    if gateway:
        changes["gateway_command"] = shlex.split(gateway)
    # Started in the background of a shell, a process ignores interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A terminated lab must clean up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    run_until_interrupted(Lab(scenario, directory=directory, **changes))


@main.command()
@click.option("--gateway", default="", help="Command of the gateway (default: python -m fzg).")
def demo(gateway):
    """Show the gateway at work: direct and relayed paths, a filter, a revocation."""
    from rich.console import Console

    from tests.lab import demo_loopback
    from tests.lab.demo import show
    from tests.lab.namespaces import can_make_namespaces, can_use_user_namespace, user_namespace_command
    from tests.lab.scenario import available

    console = Console(highlight=False)
    if not can_make_namespaces() and can_use_user_namespace():
        command = user_namespace_command(sys.executable, "-m", "tests.lab", *sys.argv[1:])
        os.execvp(command[0], command)
    reason = available()
    try:
        if reason is None:
            show(console, gateway)
        else:
            demo_loopback.show(console, gateway, reason)
    except (demo_loopback.DemoError, TimeoutError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
def scenarios():
    """List the scenarios that have names."""
    from tests.lab.scenario import NAMED

    for name, scenario in NAMED.items():
        behind = f"gateway {scenario.gateway_nat}, client {scenario.client_nat}"
        click.echo(f"{name:12} {behind:36} relays: {' '.join(scenario.relays)}")


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


async def _stopped() -> None:
    import asyncio

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    main(prog_name="python -m tests.lab")
