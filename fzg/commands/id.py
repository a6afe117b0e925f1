"""`firezone-gateway id`: who this gateway is for the portal."""

from __future__ import annotations

import json
import secrets
from typing import Any

import click

from fzg.portal import identity

NEW_ID = 32
"""Bytes: 64 hexadecimal digits, as operations 3.7 recommends."""


@click.command(short_help="Print the identity, or a new one.", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--new", is_flag=True, help="Print a fresh random id for FIREZONE_ID instead; nothing is stored.")
@click.pass_obj
def command(options: dict[str, Any], *, as_json: bool, new: bool) -> None:
    """Print the identity that a gateway started here and now would have, what the portal calls it, and whence it is.

    A host cloned from another has its machine id, and with that its identity: give each clone an id of its own, as in
    FIREZONE_ID=$(firezone-gateway id --new).
    """
    if new:
        firezone_id, source = secrets.token_hex(NEW_ID), "random"
    else:
        firezone_id, source = identity.peek(options["firezone_id"])
        if not firezone_id:
            raise click.ClickException(
                "there is no identity yet: the first start makes one and stores it, or set"
                " FIREZONE_ID=$(firezone-gateway id --new)"
            )
    shown = {"firezone_id": firezone_id, "external_id": identity.external_id(firezone_id), "source": source}
    if as_json:
        click.echo(json.dumps(shown))
    elif new:
        click.echo(firezone_id)
    else:
        click.echo("\n".join(f"{name:<12} {value}" for name, value in shown.items()))
