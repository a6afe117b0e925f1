"""`firezone-gateway status`: what the running gateway does, and why."""

from __future__ import annotations

import json
from typing import Any

import click

from fzg.commands.connection import RefusedError, ask


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, as_json: bool) -> None:
    """Show portal, relays and clients of the gateway that runs on this host."""
    shown = fetch()
    click.echo(json.dumps(shown, indent=None if as_json else 2))


def fetch() -> dict[str, Any]:
    """The whole status; `clients` is a list under that name."""
    lines = ask("status")
    shown: dict[str, Any] | None = next(lines, None)
    if shown is None:
        raise RefusedError("the gateway hung up without an answer; is it shutting down?")
    return shown | {"clients": [client for line in lines for client in line["clients"]]}
