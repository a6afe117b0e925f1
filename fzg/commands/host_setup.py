"""`firezone-gateway host-setup`: what root does once for a gateway that runs as another user."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from fzg.host import facts, permanent
from fzg.host.errors import HostError
from fzg.host.masquerade import Masquerade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.host.permanent import Step


@click.command(
    "host-setup",
    short_help="As root: let this host forward packets.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--dry-run", is_flag=True, help="Print the files and commands instead, as a shell script.")
@click.option("--remove", is_flag=True, help="Take back what this command made, and nothing else.")
@click.pass_obj
def command(options: dict[str, Any], *, dry_run: bool, remove: bool) -> None:
    """Let this host forward packets and load the TUN driver at each boot; as root, once.

    A gateway with CAP_NET_ADMIN sets all this by itself whenever it starts. This is for hosts where it may not, or
    where it should be in files. Rules of the firewall are the gateway's own, at run time.

    IPv6 that is disabled on the host stays so, unless the gateway gets --masquerade on.
    """
    try:
        steps = (
            permanent.to_remove()
            if remove
            else permanent.to_set_up(enable_ipv6=Masquerade(options["masquerade"]) is Masquerade.ON)
        )
        if dry_run:
            _print(steps)
        elif steps:
            _carry_out(steps, remove=remove)
        else:
            click.echo("There is nothing to take back." if remove else "All is set up already.")
    except HostError as error:
        raise click.ClickException(str(error)) from error


def _print(steps: Sequence[Step]) -> None:
    for step in steps:
        click.echo(str(step))
    if not steps:
        click.echo("# nothing to do")


def _carry_out(steps: Sequence[Step], *, remove: bool) -> None:
    if os.getuid() != 0:
        arguments = " --remove" if remove else ""
        raise click.ClickException(
            f"this needs root: sudo {facts.command_path()} host-setup{arguments} (--dry-run shows what it would do)"
        )
    for step in steps:
        step.carry_out()
        click.echo(_said(step))


def _said(step: Step) -> str:
    if step.file is not None:
        return f"wrote {step.file.path}"
    if step.setting is not None:
        return f"set {step.setting}"
    return f"deleted {step.delete}" if step.delete is not None else f"loaded the module {step.module}"
