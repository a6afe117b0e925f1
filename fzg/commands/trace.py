"""`firezone-gateway trace`: why does a packet of this 5-tuple pass or not."""

from __future__ import annotations

import json
from typing import Any

import click

from fzg.commands.connection import ask_once, printable

_THE_HOST_S_PART = "whether the host forwards and masquerades it: see `firezone-gateway doctor`"
_SIGNS = {"ok": "ok  ", "stop": "STOP", "note": "    "}


class _End(click.ParamType[tuple[str, int | None], Any]):
    """`10.0.0.1:443`, `[fd00::1]:443`, `fd00::1`, `10.0.0.1`, `name:443`."""

    name = "ADDRESS[:PORT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int | None]:
        if isinstance(value, tuple):
            return value
        host, port = value, ""
        if value.startswith("["):
            host, bracket, rest = value[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                self.fail(f"{value!r} has a bracket without its pair", param, ctx)
            port = rest[1:]
        elif value.count(":") == 1:
            host, _, port = value.partition(":")
        if port and not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
            self.fail(f"{port!r} is no port", param, ctx)
        return host, int(port) if port else None


@click.command(
    short_help="Explain why a packet passes or not.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("protocol", metavar="PROTOCOL")
@click.argument("source", type=_End(), metavar="SOURCE[:PORT]")
@click.argument("destination", type=_End(), metavar="DESTINATION[:PORT]")
@click.option("--client", metavar="ID", help="The client that sends it: its id or the beginning. Default: by SOURCE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    *,
    protocol: str,
    source: tuple[str, int | None],
    destination: tuple[str, int | None],
    client: str | None,
    as_json: bool,
) -> None:
    """Explain what the running gateway would do with a packet. Nothing is sent, counted or opened.

    PROTOCOL is tcp, udp, icmp or a number. SOURCE or DESTINATION is the tunnel address of a client, which decides the
    direction; DESTINATION may also be a name that the client has resolved. IPv6 with a port stands in brackets.

    \b
    firezone-gateway trace tcp 100.64.0.1 10.0.0.5:443
    firezone-gateway trace udp 100.64.0.1 wiki.example.com:53
    firezone-gateway trace tcp 10.0.0.5:443 100.64.0.1:50000
    """  # noqa: D301 - the backspace is click's word for lines that stay as they are
    answer = ask_once(
        "trace",
        protocol=protocol,
        source=source[0],
        source_port=source[1],
        destination=destination[0],
        destination_port=destination[1],
        client=client,
    )
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for step in answer["steps"]:
        click.echo(printable(f"{_SIGNS[step['outcome']]}  {step['check']:<12} {step['detail']}"))
    click.echo(printable(f"=>    {answer['direction']}: {answer['verdict']}"))
    if answer["remedy"]:
        click.echo(printable(f"      remedy: {answer['remedy']}"))
    if answer["passes"]:
        if answer["translated"]:
            click.echo(printable(f"      as {answer['translated']}"))
        if answer["direction"] == "to client":
            click.echo(f"      the client's connection: {answer['connection']}")
        else:
            click.echo(f"      not judged here: {_THE_HOST_S_PART}")
