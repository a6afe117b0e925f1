"""The operator's commands, one module each: `command` is what the word after `firezone-gateway` runs.

A command gets the options and variables of the gateway itself (operations 1.1) as its click context's `obj`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
import gevent

if TYPE_CHECKING:
    from collections.abc import Sequence

# A first argument that is exactly one of these is that command, anything else is the token (spec README, decisions).
COMMANDS = {
    "bundle": "fzg.commands.bundle",
    "capture": "fzg.commands.capture",
    "doctor": "fzg.commands.doctor",
    "drain": "fzg.commands.drain",
    "host-setup": "fzg.commands.host_setup",
    "id": "fzg.commands.id",
    "ready": "fzg.commands.ready",
    "status": "fzg.commands.status",
    "trace": "fzg.commands.trace",
}


def load(name: str) -> click.Command:
    """The command of this word; its module is imported only now."""
    command: click.Command = import_module(COMMANDS[name]).command
    return command


def run(name: str, arguments: Sequence[str], options: dict[str, Any]) -> int:
    """The exit code of one command; raises click's errors."""
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)  # what the user wishes needs no traceback
    try:
        code: int | None = load(name).main(
            args=list(arguments), prog_name=f"firezone-gateway {name}", standalone_mode=False, obj=options
        )
    except OSError as error:  # commands see to those of their own files, click to a reader that left
        raise click.ClickException(f"the output cannot be written: {error.strerror or error}") from error
    return code or 0
