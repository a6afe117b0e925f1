"""`firezone-gateway ready`: whether the gateway on this host serves, for containers that have no curl."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fzg.wire.endpoint import Endpoint

TIMEOUT = 5.0  # s; the answer takes a millisecond, and supervisors give a probe some 5 to 30 s
_LONGEST_REASON = 4096  # bytes; more is not ours
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a listener on all addresses is asked


@click.command(
    short_help="Ask whether the gateway serves; for health checks.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.pass_obj
def command(options: dict[str, Any]) -> None:
    """Ask /readyz of the gateway on this host: 0 if it is ready, else 1 with the reason.

    Uses the address of --health-check-addr or HEALTH_CHECK_ADDR, so give it to both.
    """
    address: Endpoint = options["health_check_addr"]
    status, reason = ask(_LOOPBACK.get(address.host, address.host), address.port)
    if status != http.client.OK:
        raise click.ClickException(f"not ready: {reason}")
    click.echo("ready")


def ask(host: str, port: int) -> tuple[int, str]:
    """Status and first line of `/readyz`; 0 and what went wrong where nothing answers."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(_LONGEST_REASON).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or _printable(str(error)) or type(error).__name__
        return 0, f"nothing answers at {host}:{port} ({why}); does the gateway run, with this --health-check-addr?"
    finally:
        connection.close()
    text = body.splitlines()[0] if body else f"HTTP status {answer.status}"
    return answer.status, _printable(text)


def _printable(text: str) -> str:
    return "".join(each for each in text if each.isprintable())
