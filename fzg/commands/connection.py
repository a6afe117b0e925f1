"""The commands' side of the operator's socket (`fzg.ops.control`): find the running gateway, ask, read the answer."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fzg.ops.control import FILE, FOREIGNER, VARIABLE, places

if TYPE_CHECKING:
    from collections.abc import Iterator

# A gateway under full load answers within milliseconds; one that says nothing for this long is stuck or stopped.
PATIENCE = 15.0  # s


class NoGatewayError(click.ClickException):
    """No gateway runs here, as far as this user can see; the message says what to do."""


class DeniedError(click.ClickException):
    """A gateway may run here, but this user may not ask it; the message says who may."""


class RefusedError(click.ClickException):
    """The gateway answered that it cannot do it; the message is its sentence."""


def ask(request: str, /, *, patience: float = PATIENCE, **fields: Any) -> Iterator[dict[str, Any]]:
    """The lines of the answer as they come. `patience`: seconds without one, after which the gateway counts as stuck.

    Raises `NoGatewayError`, `DeniedError`, and `RefusedError` with what the gateway says against it.
    """
    with connect() as connection:
        connection.settimeout(patience)
        try:
            connection.sendall(json.dumps({"request": request, **fields}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer: dict[str, Any] = json.loads(line)
                    if "error" in answer:
                        sentence = printable(str(answer["error"]))
                        raise (DeniedError if sentence.startswith(FOREIGNER) else RefusedError)(sentence)
                    yield answer
        except TimeoutError as error:
            raise RefusedError(f"the gateway is there but said nothing for {patience:.0f} s") from error
        except (OSError, ValueError) as error:
            raise RefusedError(f"the gateway hung up: {error}") from error


def ask_once(request: str, /, **fields: Any) -> dict[str, Any]:
    """An answer of one line."""
    return first_of(ask(request, **fields))


def first_of(answer: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The first line of an answer. Raises `RefusedError` where there is none."""
    for line in answer:
        return line
    raise RefusedError("the gateway hung up without an answer; is it shutting down?")


def connect() -> socket.socket:
    """A connection to the gateway that runs here. Raises `NoGatewayError` and `DeniedError`."""
    looked = _candidates()
    denied: Path | None = None
    for path in looked:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(PATIENCE)
        try:
            connection.connect(str(path))
        except PermissionError:
            denied = denied or path
        except OSError:
            pass
        else:
            return connection
        connection.close()
    if denied is not None:
        raise DeniedError(f"{denied} is not yours to use: ask as root or as the user that runs the gateway")
    if not looked:
        raise NoGatewayError(f"{VARIABLE} is empty, so no gateway can be asked")
    tried = ", ".join(str(path) for path in looked)
    raise NoGatewayError(
        f"no gateway is running here (no one answers at {tried}); if yours uses another place, name it with {VARIABLE}"
    )


def printable(text: str) -> str:
    """Without what would steer a terminal: names come from the portal and from clients."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _candidates() -> list[Path]:
    """Where a gateway of this user may listen; root also looks where those of others do."""
    found = places(os.environ)
    if os.getuid() == 0 and VARIABLE not in os.environ:
        found += sorted(Path("/run/user").glob("*/firezone-gateway.sock"))
        found += sorted(path for path in Path("/tmp").glob(f"firezone-gateway-*/{FILE}") if _is_its_owners(path))  # noqa: S108 - checked
    return list(dict.fromkeys(found))


def _is_its_owners(path: Path) -> bool:
    """Whether the directory, which anybody may make in /tmp, is of the user that its name says."""
    try:
        return path.parent.lstat().st_uid == int(path.parent.name.rpartition("-")[2])
    except (OSError, ValueError):
        return False
