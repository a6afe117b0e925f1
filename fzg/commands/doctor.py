"""`firezone-gateway doctor`: what stands in the way of a gateway here, and what to do about each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import gevent

from fzg.commands.connection import DeniedError, NoGatewayError, RefusedError, ask_once, printable
from fzg.host import facts, reach
from fzg.host.holders import is_elsewhere
from fzg.host.masquerade import Masquerade
from fzg.host.network import INTERFACE
from fzg.host.udp import PREFERRED_PORT
from fzg.ops import doctor
from fzg.ops.doctor import Check, Live, Plan, Seen, State
from fzg.portal import identity, user_agent
from fzg.portal.url import InvalidUrl, PortalUrl
from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COLOURS: Final = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red", State.UNKNOWN: "cyan"}
_STUN_PORT: Final = 3478
NARROWEST: Final = 30  # columns: below that the terminal itself folds better


@click.command(
    short_help="Find what keeps a gateway from working here.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--offline", is_flag=True, help="Leave the portal and all other hosts alone.")
@click.option(
    "--stun", "servers", multiple=True, metavar="HOST:PORT", help="Also ask this STUN server whether UDP gets out."
)
@click.pass_obj
def command(options: dict[str, Any], *, as_json: bool, offline: bool, servers: Sequence[str]) -> int:
    """Look for everything that keeps a gateway from working here; exits 1 if something does.

    Changes nothing, sends no token, and may be run before a gateway starts and while it runs, by any user. Give it the
    options and variables that the gateway gets.
    """
    asked = [] if offline else _endpoints(servers)
    plan = _plan(options, os.environ)
    live, live_problem, stuck = _live()
    host = facts.observe(INTERFACE, plan.udp_port, plan.health_port)
    portal = None
    if not offline and not plan.portal_problem:
        url = PortalUrl.parse(options["api_url"])
        asking = gevent.spawn(reach.portal, url, os.environ, user_agent=user_agent.host_user_agent())
        stun = reach.stun_servers(asked)
        portal = asking.get()
    else:
        stun = reach.stun_servers(asked)
    seen = Seen(
        host=host, plan=plan, portal=portal, stun=tuple(stun), live=live, live_problem=live_problem, stuck=stuck
    )
    checks = list(doctor.examine(seen))
    if as_json:
        click.echo(json.dumps({"checks": [check._asdict() for check in checks]}, ensure_ascii=False))
    else:
        _print(checks)
    return int(any(check.state is State.FAIL for check in checks))


def _print(checks: Sequence[Check]) -> None:
    """A line per check; on a terminal it is folded, and the remedy stands below."""
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR")
    width = max(len(check.name) for check in checks)
    for check in checks:
        word = f"{check.state:<7}"
        shown = click.style(word, fg=_COLOURS[check.state]) if colour else word
        text = printable(check.seen)
        if terminal:
            text = _folded(text, indent=len(word) + width + 4)
        if check.remedy:
            # A command has to be copied in one piece, so it is the terminal that folds it.
            text += f"\n{'':{len(word)}}  remedy: {check.remedy}" if terminal else f". Remedy: {check.remedy}"
        click.echo(f"{shown}  {check.name:<{width}}  {text}")
    counted = {state: sum(check.state is state for check in checks) for state in State}
    click.echo(", ".join(f"{count} {state}" for state, count in counted.items() if count))


def _folded(text: str, *, indent: int) -> str:
    """In as many lines as the terminal needs, all of them behind the columns of states and names."""
    room = max(NARROWEST, shutil.get_terminal_size().columns - indent)
    return f"\n{'':{indent}}".join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False))


def _plan(options: Mapping[str, Any], environment: Mapping[str, str]) -> Plan:
    ident, source = identity.peek(options["firezone_id"])
    token_source, token_problem = _token(options["token"], environment)
    problem = ""
    try:
        PortalUrl.parse(options["api_url"])
    except InvalidUrl as error:
        problem = str(error)
    return Plan(
        udp_port=PREFERRED_PORT,
        health_address=options["health_check_addr"].host,
        health_port=options["health_check_addr"].port,
        masquerade=Masquerade(options["masquerade"]) is not Masquerade.OFF,
        token_source=token_source,
        token_problem=token_problem,
        identity=ident,
        identity_source=source,
        portal_problem=problem,
        command=facts.command_path(),
    )


def _token(argument: str | None, environment: Mapping[str, str]) -> tuple[str, str]:
    """Which source has a token, or what is wrong with the one that counts; both empty if there is none."""
    variable, directory = environment.get("FIREZONE_TOKEN"), environment.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory) / "FIREZONE_TOKEN" if directory else None
    if argument is not None:
        source = "the argument"
    elif variable is not None:
        source = "the variable FIREZONE_TOKEN"
    elif credential is not None and os.access(credential, os.F_OK):
        source = "the systemd credential FIREZONE_TOKEN"
    else:
        return "", ""
    try:
        token = identity.find_token(argument, variable, credential.parent if credential else None)
    except identity.IdentityError as error:
        return "", str(error)
    return (source, "") if token.reveal() else ("", f"{source} is an empty token")


def _live() -> tuple[Live | None, str, str]:
    """What the running gateway says; or that this user may not ask it; or how it failed to answer."""
    try:
        live = live_from(ask_once("status"))
    except NoGatewayError:
        return None, "", ""
    except DeniedError as error:
        return None, error.message, ""
    except RefusedError as error:
        return None, "", error.message
    return (None, "", "") if is_elsewhere(live.pid) else (live, "", "")


def live_from(status: Mapping[str, Any]) -> Live:
    """The parts of a status that the checks look at; what is missing counts as not known."""
    portal = status.get("portal") or {}
    return Live(
        pid=int(status.get("pid") or 0),
        portal_connected=portal.get("state") == "connected",
        portal_error=str(portal.get("last_error") or ""),
        relays=tuple(
            (", ".join(map(str, relay.get("addresses") or ())), relay.get("rtt_ms") is not None)
            for relay in status.get("relays") or ()
        ),
        clients=int(status.get("client_count") or 0),
    )


def _endpoints(servers: Sequence[str]) -> list[Endpoint]:
    """All addresses of the servers that were named. Raises click's usage error."""
    found: list[Endpoint] = []
    for server in servers:
        host, colon, port = server.rpartition(":")
        if not colon or server.endswith("]"):
            host, port = server, str(_STUN_PORT)
        if not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) <= 0xFFFF:
            raise click.UsageError(f"--stun {server!r} is not HOST:PORT")
        try:
            found += [Endpoint.of(address, int(port)) for address in reach.addresses_of(host.strip("[]"))]
        except (socket.gaierror, UnicodeError, Malformed) as error:
            raise click.UsageError(f"--stun {server!r} has no address: {error}") from error
    return found
