"""`firezone-gateway capture`: the inner packets of one client as pcap."""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from fzg.commands.connection import PATIENCE, RefusedError, ask, first_of
from fzg.ops.capture import DEFAULT_COUNT, DEFAULT_SECONDS, LINKTYPE_RAW, MAX_COUNT, MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

# The classic format of libpcap, times in microseconds.
_MAGIC = 0xA1B2C3D4
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")
_SNAPLEN = 65_535
_REASONS = {
    "count": "the count was reached",
    "time": "the time was over",
    "client gone": "the client has left",
    "interrupted": "it was interrupted",
}


@click.command(
    short_help="Write packets of one client as pcap.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--client", required=True, metavar="ID", help="The client: its id or the beginning (see `status`).")
@click.option(
    "--count",
    type=click.IntRange(1, MAX_COUNT),
    default=DEFAULT_COUNT,
    show_default=True,
    help="End after this many packets.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, MAX_SECONDS, min_open=True),
    default=DEFAULT_SECONDS,
    show_default=True,
    help="End after this time.",
)
@click.option(
    "--output", metavar="FILE", help="Where to write; - is standard output. Default: a new file in this directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the capture.")
def command(*, client: str, count: int, seconds: float, output: str | None, as_json: bool) -> None:
    """Write packets that one client sends and gets, as it sees them, to a pcap file.

    They are the packets inside the tunnel, before and after the gateway's translation; those that the gateway refuses
    are among them. Meanwhile the client's traffic is several times slower. The file can be read by its owner only.
    """
    if output == "-" and as_json:
        raise click.UsageError("--json would be mixed with the packets on standard output; name a file with --output")
    lines = ask("capture", patience=seconds + PATIENCE, client=client, count=count, seconds=seconds)
    begun = first_of(lines)
    path = output or f"firezone-{begun['client'][:8]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.pcap"
    with _opened(path, replace=output is not None) as file:
        result = _write(file, lines)
    if as_json:
        click.echo(json.dumps({"file": path, "client": begun["client"], **result}))
        return
    missed = f", {result['missed']} missed" if result["missed"] else ""
    target = "standard output" if path == "-" else path
    click.echo(f"{target}: {result['captured']} packets{missed}; {_REASONS[result['ended']]}", err=path == "-")


def _write(file: BinaryIO, lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The capture as it comes, so that an interrupt keeps what is there."""
    file.write(_FILE_HEADER.pack(_MAGIC, 2, 4, 0, 0, _SNAPLEN, LINKTYPE_RAW))
    packets = octets = 0
    try:
        for line in lines:
            for moment, text in line.get("packets", ()):
                packet = base64.b64decode(text)
                whole = int(moment)
                micro = min(999_999, round((moment - whole) * 1e6))
                file.write(_RECORD_HEADER.pack(whole, micro, len(packet), len(packet)) + packet)
                packets, octets = packets + 1, octets + len(packet)
            file.flush()
            if "ended" in line:
                return line
    except KeyboardInterrupt:
        return {"ended": "interrupted", "captured": packets, "bytes": octets, "missed": 0}
    raise RefusedError(f"the gateway hung up after {packets} packets; is it shutting down?")


def _opened(path: str, *, replace: bool) -> BinaryIO:
    """For its owner only; a file that the user did not name is never overwritten."""
    if path == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if replace else os.O_EXCL)
    try:
        return os.fdopen(os.open(path, flags, 0o600), "wb")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}; name another with --output") from error
