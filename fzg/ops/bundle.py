"""What the running gateway gives to a support archive, besides its status (served as the request `bundle`)."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from fzg.ops import logs
from fzg.secret import MASK
from fzg.tunnel.resources import InternetResource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fzg.gateway import Gateway

# Searches for one secret in one line, about 60 ns each: as for clients, no packet waits longer than 2 ms for a turn.
SEARCHES_A_TURN = 20_000
LINES_A_TURN = 100
# Too short to be a secret, and found everywhere.
_SHORTEST_SECRET = 4


def contribution(gateway: Gateway, settings: Mapping[str, Any], secrets: list[str]) -> Iterator[dict[str, Any]]:
    """Settings, then what must be replaced by pseudonyms, by kind; then the log. `secrets` appear in none of it."""
    yield {"settings": dict(settings)}
    yield {"names": {kind: sorted(names) for kind, names in _names(gateway).items()}}
    hidden = [each for each in (*secrets, *_secrets(gateway)) if len(each) >= _SHORTEST_SECRET]
    lines = logs.recent_lines()
    step = max(1, min(LINES_A_TURN, SEARCHES_A_TURN // (len(hidden) + 1)))
    for start in range(0, len(lines), step):
        yield {"log": [_masked(line, hidden) for line in lines[start : start + step]]}


def _masked(line: str, hidden: list[str]) -> str:
    for secret in hidden:
        if secret in line:
            line = line.replace(secret, MASK)
    return line


def _secrets(gateway: Gateway) -> Iterator[str]:
    """Every credential in use, as a log line could have it."""
    for connection in gateway.node.connections:
        identity = connection.identity
        yield identity.local.password.reveal()
        yield identity.remote.password.reveal()
        yield base64.b64encode(identity.preshared_key.reveal()).decode()
    for relay in gateway.node.relays.in_use():
        yield relay.username
        yield relay.password.reveal()


def _names(gateway: Gateway) -> dict[str, set[str]]:
    """Texts that name something of a customer, and that no pattern can recognise."""
    resources: set[str] = set()
    domains: set[str] = set()
    for client_id in gateway.client_ids:
        client = gateway.tunnel.client(client_id)
        if client is None:
            continue
        domains.update(client.proxies.names)
        for authorization in client.authorizations:
            resource = authorization.resource
            if not isinstance(resource, InternetResource):
                resources.add(resource.name)
                resources.add(str(getattr(resource, "address", "")))
    return {"resource": resources - {""}, "name": domains}
