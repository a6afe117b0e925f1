"""`firezone-gateway id`: who this gateway is for the portal."""

from __future__ import annotations

import json
from typing import Any

import click

from fzg.portal import identity


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def command(options: dict[str, Any], *, as_json: bool) -> None:
    """Print the identity that a gateway started here and now would have, and what the portal calls it."""
    try:
        firezone_id = identity.firezone_id(options["firezone_id"])
    except identity.IdentityError as error:
        raise click.ClickException(str(error)) from error
    shown = {"firezone_id": firezone_id, "external_id": identity.external_id(firezone_id)}
    if as_json:
        click.echo(json.dumps(shown))
    else:
        click.echo("\n".join(f"{name:<12} {value}" for name, value in shown.items()))
