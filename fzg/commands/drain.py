"""`firezone-gateway drain`: before maintenance, send the clients to other gateways and end."""

from __future__ import annotations

import json
import sys

import click

from fzg.commands.connection import RefusedError, ask
from fzg.ops.drain import DEFAULT_TIMEOUT, LONGEST_TIMEOUT


@click.command(
    short_help="Send the clients to other gateways, then end.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, LONGEST_TIMEOUT),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="End after this time even if clients are left.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(*, timeout: float, as_json: bool) -> None:
    """Send the clients of the gateway that runs on this host to other gateways, then end it.

    It leaves the portal first, so that no client is sent here any more, says goodbye to each client until it is silent,
    and answers 503 on /readyz meanwhile. The gateway ends with status 0: a service manager that restarts it always (not
    only on failure) starts it again. The signal SIGUSR1 does the same. Interrupting this command does not stop it.
    """
    told = left = None
    for answer in ask("drain", timeout=timeout):
        if told is None:
            told = answer["clients"]
        if not as_json and answer["clients"] != left and not answer.get("done"):
            click.echo(f"clients left: {answer['clients']}", err=True)
        left = answer["clients"]
    if told is None or left is None:
        raise RefusedError("the gateway hung up without an answer; is it shutting down?")
    if as_json:
        click.echo(json.dumps({"clients": told, "left": left}))
    elif left:
        click.echo(f"The gateway ends; clients that did not go in time and were cut off: {left} of {told}")
    else:
        click.echo(f"The gateway ends; clients sent away: {told}")
    sys.exit(0)
