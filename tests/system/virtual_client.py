"""Clients that only the portal knows of: the gateway offers them its candidates, and nobody answers."""

from __future__ import annotations

import base64
import os
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.lab.portal_client import Entry, PortalControl

ACKNOWLEDGED = "authorization_created"
ADDED = "broadcast_ice_candidates"
INVALIDATED = "broadcast_invalidated_ice_candidates"


class Candidate(NamedTuple):
    """The parts of a candidate line that say where it leads."""

    kind: str
    address: str
    port: int
    priority: int


def invite(portal: PortalControl, resource: str = "cidr", **changes: Any) -> dict[str, Any]:
    """Authorize a client that is not there for a resource of this kind, and wait for the gateway's candidates.

    Returns the payload of `create_authorization`.
    """
    payload: dict[str, Any] = portal.authorize(
        resource=resource_id(portal, resource),
        client_id=str(uuid.uuid4()),
        client_key=base64.b64encode(os.urandom(32)).decode(),
        changes=changes,
    )
    client_id = payload["client"]["id"]
    portal.wait_for(
        kind="gateway", direction="in", event=ADDED, predicate=lambda e: client_id in e["payload"]["client_ids"]
    )
    return payload


def resource_id(portal: PortalControl, wanted: str) -> str:
    """The id of the first resource of a kind, or with an address."""
    found = portal.state()["resources"].values()
    return next(r["id"] for r in found if wanted in {r["type"], r["address"]})


def said_about(portal: PortalControl, client_id: str, *, since: int = 0) -> list[Entry]:
    """All candidate messages of the gateway for this client."""
    return [
        entry
        for entry in portal.entries(kind="gateway", direction="in")
        if entry["n"] >= since
        and entry["event"] in {ADDED, INVALIDATED}
        and client_id in entry["payload"]["client_ids"]
    ]


def candidates(entry: Entry) -> list[Candidate]:
    """What a candidate message lists."""
    return [parse(text) for text in entry["payload"]["candidates"]]


def parse(text: str) -> Candidate:
    """One candidate line (spec connectivity.md 3.15)."""
    words = text.split()
    assert words[1:3] == ["1", "udp"]
    assert words[6] == "typ"
    return Candidate(words[7], words[4], int(words[5]), int(words[3]))
