"""Time to the first reply through every pair of NATs, as a table: `python -m tests.bench.nat_matrix`.

Rows are what stands before the gateway, columns what stands before the client, as in `tests/system/test_nat_matrix.py`.
Each is the first connection of a fresh lab, by the client's clock: from its first packet to the first reply.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from tests.lab.namespaces import can_make_namespaces, user_namespace_command
from tests.lab.scenario import Lab, available
from tests.system.test_nat_matrix import PLACES, RESOURCE, has_direct_path, scenario

_SETTLED_S = 5.0  # within which a relayed path has given way to a direct one


class Reply(NamedTuple):
    """The first reply of a pair: when, and over what the connection runs in the end."""

    ms: float
    path: str
    as_expected: bool


@click.command(help=__doc__)
@click.option("--places", default=",".join(PLACES), help="Some of them, separated by commas (default: all).")
@click.option("--output", default="build/nat_matrix.json", show_default=True, type=click.Path(path_type=Path))
def main(places: str, output: Path) -> None:
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.bench.nat_matrix", *sys.argv[1:])
        os.execvp(command[0], command)
    if (reason := available()) is not None:
        raise click.ClickException(f"the bench {reason}")
    chosen = places.split(",")
    replies = {}
    with Console(stderr=True).status("") as status:
        for gateway, client in product(chosen, chosen):
            status.update(f"gateway {gateway}, client {client}")
            replies[gateway, client] = measure(gateway, client)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"~".join(pair): reply._asdict() for pair, reply in replies.items()}))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(chosen, replies))
    for direct in (True, False):
        times = [reply.ms for pair, reply in replies.items() if has_direct_path(*pair) is direct]
        if times:
            kind = "direct" if direct else "relayed"
            console.print(
                f"{kind}: {len(times)} pairs, median {statistics.median(times):.0f} ms, max {max(times):.0f} ms"
            )


def measure(gateway: str, client: str) -> Reply:
    """The first connection of a lab of this pair."""
    direct = has_direct_path(gateway, client)
    with Lab(**scenario(gateway, client)) as lab:
        fetched = lab.client.curl(RESOURCE, timeout=5)
        if direct:
            lab.client.wait_path("PeerToPeer", timeout=_SETTLED_S)
        (link,) = lab.client.status()["links"]
        (path,) = lab.client.paths()
        return Reply(link["first_reply_ms"], path, fetched.ok and (path == "PeerToPeer") is direct)


def table(places: list[str], replies: dict[tuple[str, str], Reply]) -> Table:
    """Milliseconds; `r` where the path ends up relayed, `!` where that is not what these NATs allow."""
    made = Table(title="time to first reply in ms (r: relayed), gateway down, client across", title_justify="left")
    made.add_column("gateway")
    for client in places:
        made.add_column(client, justify="right")
    for gateway in places:
        cells = (replies[gateway, client] for client in places)
        marks = (
            f"{one.ms:.0f}{'' if one.path == 'PeerToPeer' else ' r'}{'' if one.as_expected else ' !'}" for one in cells
        )
        made.add_row(gateway, *marks)
    return made


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.nat_matrix")
