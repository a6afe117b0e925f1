"""`firezone-gateway status`: what the running gateway does, and why."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import click

from fzg.commands.connection import NoGatewayError, RefusedError, ask, first_of, printable
from fzg.node.path import PathKind
from fzg.ops import drops
from fzg.settings import SettingError, parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

# Half a second of a core's time with a thousand clients; people do not read faster than this either.
DEFAULT_REFRESH = 2.0  # s
SHORTEST_REFRESH = 0.2  # s
UNFOLDED = 200  # columns: the widest of our tables
_PATHS = {
    PathKind.PEER_TO_PEER: "direct",
    PathKind.RELAY_TO_PEER: "our relay",
    PathKind.PEER_TO_RELAY: "client's relay",
    PathKind.RELAY_TO_RELAY: "both relays",
}
_ORIGINS = {
    drops.FROM_CLIENT: "from client",
    drops.TO_CLIENT: "to client",
    drops.RELAY: "by relay",
    drops.ENGINE: "by engine",
}
MOST_NAMED = 5  # clients in one sentence: as many as fit into a line


class _Seconds(click.ParamType[float, Any]):
    """A plain number of seconds, or a duration as other options take it."""

    name = "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value) if not isinstance(value, str) or value[-1:].isdigit() else parse_duration(value)
        except (ValueError, SettingError):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        if not SHORTEST_REFRESH <= seconds <= 86_400:
            self.fail(f"{value} is not between {SHORTEST_REFRESH:g} s and a day", param, ctx)
        return seconds


@click.command(short_help="Show portal, relays and clients.", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one line per refresh.")
@click.option(
    "--watch",
    type=_Seconds(),
    is_flag=False,
    flag_value=f"{DEFAULT_REFRESH:g}",
    metavar="[SECONDS]",
    help=f"Refresh until interrupted, by default every {DEFAULT_REFRESH:g} seconds.",
)
def command(*, as_json: bool, watch: float | None) -> None:
    """Show portal, relays and clients of the gateway that runs on this host, and why clients are relayed."""
    if watch is None:
        shown = fetch()
        if as_json:
            click.echo(json.dumps(shown, indent=2))
        else:
            _console().print(render(shown))
        return
    try:
        if as_json:
            while True:
                click.echo(json.dumps(fetch()))
                time.sleep(watch)
        _watch(watch)
    except KeyboardInterrupt:
        pass


def fetch() -> dict[str, Any]:
    """The whole status; `clients` is a list under that name."""
    lines = ask("status")
    return first_of(lines) | {"clients": [client for line in lines for client in line["clients"]]}


def _console() -> Console:
    """As wide as the terminal; where nobody looks nothing needs to be folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else UNFOLDED)


def _watch(seconds: float) -> None:
    from rich.live import Live

    console = _console()
    first = render(fetch())
    if not console.is_terminal:  # a file or a pipe: one after the other
        console.print(first, "", sep="\n")
        while True:
            sys.stdout.flush()
            time.sleep(seconds)
            console.print(_anew(), "", sep="\n")
    with Live(first, console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(seconds)
            live.update(_anew(), refresh=True)


def _anew() -> RenderableType:
    """Who watches an upgrade sees the gateway go and come again."""
    try:
        return render(fetch())
    except (NoGatewayError, RefusedError) as error:
        return f"[red]{_plain(error.message)}[/]"


# -- for people


def render(shown: Mapping[str, Any]) -> RenderableType:
    """Tables of everything; only what deserves attention is coloured."""
    from rich.console import Group

    parts: list[RenderableType] = [_summary(shown), "", _relays(shown["relays"])]
    if shown["clients"]:
        parts += ["", _clients(shown["clients"])]
        parts += _why_relayed(shown["clients"])
    if shown["drops"]:
        parts += ["", _drops(shown["drops"])]
    return Group(*parts)


def _summary(shown: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    portal, nat = shown["portal"], shown["nat"]
    table = Table.grid(padding=(0, 2))
    ready = "[green]ready[/]" if shown["ready"] else f"[red]not ready[/]: {_plain(shown['not_ready_because'])}"
    engine = "native engine" if shown["engine"] == "native" else "engine in Python (slower)"
    table.add_row("Gateway", f"{shown['version']}, {engine}, up {duration(shown['uptime'])}, {ready}")
    table.add_row("Portal", f"{_plain(portal['host'])}, {_portal_state(portal)}")
    table.add_row("NAT", f"{nat['kind']}: {nat['explained']}")
    if nat["seen_at"]:
        table.add_row("Seen at", ", ".join(nat["seen_at"]))
    table.add_row("Clients", _clients_by_path(shown))
    return table


def _clients_by_path(shown: Mapping[str, Any]) -> str:
    clients = shown["clients"]
    direct = sum(each.get("relayed") is False for each in clients)
    relayed = sum(each.get("relayed") is True for each in clients)
    counted = {"direct": direct, "relayed": relayed, "not connected": len(clients) - direct - relayed}
    named = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
    return f"{shown['client_count']}: {named}" if named else str(shown["client_count"])


def _portal_state(portal: Mapping[str, Any]) -> str:
    if portal["state"] == "connected":
        return f"[green]connected[/] for {duration(portal['connected_for'])}"
    parts = [f"[red]{portal['state']}[/]"]
    if portal["partition_age"] is not None:
        parts.append(f"away for {duration(portal['partition_age'])}")
    if portal["next_attempt_in"] is not None:
        parts.append(f"next attempt in {duration(portal['next_attempt_in'])}")
    if portal["last_error"]:
        parts.append(f"last error: {_plain(portal['last_error'])}")
    return ", ".join(parts)


def _relays(relays: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not relays:
        return "[red]No relays[/]: no client can connect until the portal sends some"
    table = _table("Relay", "Address", "State", "Round trip", "Chosen", "Clients")
    for each in relays:
        round_trip = f"{each['rtt_ms']:.1f} ms" if each["rtt_ms"] is not None else "no answer yet"
        chosen = "yes" if each["chosen"] else "no"
        addresses = "\n".join(each["addresses"])
        table.add_row(_short(each["id"]), addresses, each["state"], round_trip, chosen, str(each["clients"]))
    return table


def _clients(clients: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Two lines a client, so that all of it fits into 80 columns."""
    table = _table("Client", "State", "Path", "From client", "To client")
    for each in clients:
        path = _PATHS.get(each["path"], each["path"] or "-")
        resources = "1 resource" if each["resources"] == 1 else f"{each['resources']} resources"
        age = f" {duration(each['age'])}" if each["age"] is not None else ""
        table.add_row(
            f"{_short(each['id'])}\n{resources}",
            f"{each['state']}{age}\nhandshake {duration(each['handshake_age'])}",
            (f"[yellow]{path}[/]" if each.get("relayed") else path) + f"\n{each.get('remote', '')}",
            f"{amount(each['received']['bytes'])}\n{packets(each['received']['packets'])}",
            f"{amount(each['sent']['bytes'])}\n{packets(each['sent']['packets'])}",
        )
    return table


def _why_relayed(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason."""
    found: dict[str, list[str]] = {}
    for each in clients:
        if each.get("relayed_because"):
            found.setdefault(each["relayed_because"], []).append(_short(each["id"]))
    sentences = []
    for reason, ids in found.items():
        named = ", ".join(ids[:MOST_NAMED])
        if len(ids) > MOST_NAMED:
            named += f" and {len(ids) - MOST_NAMED} more"
        sentences.append(f"  {named} {'is' if len(ids) == 1 else 'are'} relayed because {_plain(reason)}")
    return sentences


def _drops(counted: Mapping[str, int]) -> RenderableType:
    table = _table("Count", "Dropped", "Because")
    for name, total in counted.items():
        table.add_row(f"{total:,}", _plain(_origin(name)), _plain(drops.meaning(name)))
    return table


def _origin(name: str) -> str:
    """Where it was lost."""
    for prefix, where in _ORIGINS.items():
        if name.startswith(prefix):
            return where
    return "on arrival"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # Addresses may be folded; the rest is read across, or copied to other commands.
        foldable = column in {"Path", "Address", "Because"}
        justify: Literal["left", "right"] = "right" if column in {"Count", "Clients"} else "left"
        table.add_column(column, overflow="fold", justify=justify, no_wrap=not foldable)
    return table


def duration(seconds: float | None) -> str:
    """`4.2s`, `3m07s`, `5h02m`, `3d04h`; `-` for None."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86_400}d{whole // 3600 % 24:02}h"


def amount(total: float) -> str:
    """`1.5 MiB`."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if total < 1024:
            break
        total, unit = total / 1024, larger
    return f"{total:.0f} B" if unit == "B" else f"{total:.1f} {unit}"


def packets(total: int) -> str:
    """`1 packet`, `2,345 packets`, `12.3 M packets`."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if total >= size:
            return f"{total / size:,.1f} {unit} packets"
    return "1 packet" if total == 1 else f"{total:,} packets"


def _short(identity: str) -> str:
    """The first part of a UUID: enough to tell, and to give to other commands."""
    return _plain(identity[:8])


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))
