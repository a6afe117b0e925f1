"""Prints the manual page firezone-gateway(8), made of the command line's own words."""

from __future__ import annotations

import inspect
import os
import sys
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING

import click

from fzg import commands
from fzg.cli import command
from fzg.settings import ENVIRONMENT
from fzg.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Not in --help, as with the original; an operator of a portal of his own needs it all the same.
_HIDDEN_BUT_USED = {"api_url": "The portal. Default: wss://api.firezone.dev. [env: FIREZONE_API_URL]"}

_EXIT_STATUS = (
    ("0", "A signal, or the end of a drain, asked for the end."),
    ("1", "It failed; one line at ERROR says why."),
    ("2", "The command line or a variable cannot be used."),
)
_SIGNALS = (
    ("SIGTERM, SIGINT", "Say goodbye to all clients and end."),
    ("SIGUSR1", "Drain, as the command of that name does."),
    ("SIGHUP", "Ignored."),
)
_FILES = (
    ("/etc/firezone/gateway-env", "Settings of the service, one NAME=value a line."),
    ("/etc/firezone/gateway-token", "The token, readable by root alone; the service gets it as a credential."),
    ("/etc/firezone/gateway-preset-env", "The identity that the package derives from the host; gateway-env wins."),
    ("/var/lib/firezone/gateway_id", "The identity of a gateway that nobody gave one."),
    ("/var/lib/firezone/flow_logs", "Flow records that wait for their upload."),
    ("/run/firezone-gateway/control.sock", "Where the service answers the commands: root and its own user."),
)


def page() -> str:
    """The page in roff, for man(7)."""
    day = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC).date()
    return "\n".join(_lines(day.isoformat())) + "\n"


def _lines(day: str) -> Iterator[str]:
    yield f'.TH FIREZONE-GATEWAY 8 "{day}" "firezone-gateway {VERSION}" "System Administration"'
    yield from (".SH NAME", r"firezone\-gateway \- let Firezone clients reach the resources of this network")
    yield from (".SH SYNOPSIS", r".B firezone\-gateway", r"[\fIOPTIONS\fR] [\fITOKEN\fR]", ".br")
    yield from (r".B firezone\-gateway", r"[\fIOPTIONS\fR] \fICOMMAND\fR [\fIARGUMENTS\fR]")
    yield from (".SH DESCRIPTION", *_paragraphs(command.help or ""))
    yield ".PP"
    yield _text("It needs root or CAP_NET_ADMIN. A first argument that is one of the commands below is that command.")
    yield from (".SH OPTIONS", *_options(command))
    yield ".SH COMMANDS"
    for name in sorted(commands.COMMANDS):
        own: click.Command = import_module(commands.COMMANDS[name]).command
        yield from (f".SS {_text(name)}", *_paragraphs(own.help or ""), *_options(own))
    yield ".SH EXIT STATUS"
    yield from _terms(_EXIT_STATUS)
    yield ".SH SIGNALS"
    yield from _terms(_SIGNALS)
    yield ".SH ENVIRONMENT"
    yield _text("Each option above names its variable; the command line wins. Besides:")
    yield from _terms([(variable.name, variable.meaning.replace("`", "")) for variable in ENVIRONMENT])
    yield ".SH FILES"
    yield from _terms(_FILES)
    yield from (".SH SEE ALSO", ".BR firezone (8)")


def _options(owner: click.Command) -> Iterator[str]:
    context = click.Context(owner)
    for option in owner.get_params(context):
        if not isinstance(option, click.Option):
            continue
        told = option.get_help_record(context)
        if told is not None:
            yield from _terms([told])
        elif option.name in _HIDDEN_BUT_USED:
            yield from _terms([(f"{', '.join(option.opts)} {option.metavar}", _HIDDEN_BUT_USED[option.name])])


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if number:
            yield ".PP"
        if paragraph.startswith("\b\n"):  # click's word for lines that stay as they are
            yield ".nf"
            yield from map(_text, paragraph.splitlines()[1:])
            yield ".fi"
        else:
            yield _text(paragraph)


def _terms(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    for term, meaning in pairs:
        yield from (".TP", rf"\fB{_text(term)}\fR", _text(meaning))


def _text(text: str) -> str:
    """One line of roff that prints this text."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", r"\-").replace("'", r"\(aq")
    return rf"\&{line}" if line.startswith(".") else line


if __name__ == "__main__":
    sys.stdout.write(page())
