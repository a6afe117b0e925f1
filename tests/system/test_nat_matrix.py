"""Every kind of NAT against every other: the best path there is, within seconds (real netfilter).

`make test` runs a covering selection: each kind at each end, and each outcome; `make test-all` all pairs.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest

from tests.lab.namespaces import Nat
from tests.lab.scenario import Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
]

RESOURCE = "http://10.20.0.100/get"
SAME_LAN = "same-lan"


class Place(NamedTuple):
    """A position in the network, and per IP version what stands before it."""

    nat: Nat
    ipv4: str
    ipv6: str


OPEN, CONE, SYMMETRIC, NONE = "open", "cone", "symmetric", ""
PLACES = {
    "public": Place(Nat.NONE, OPEN, OPEN),
    "port-preserving": Place(Nat.CONE, CONE, CONE),
    "symmetric": Place(Nat.SYMMETRIC, SYMMETRIC, SYMMETRIC),
    "two-nats": Place(Nat.DOUBLE, CONE, CONE),
    # A neighbour of the other party, behind its router. With two of them that is an ordinary one.
    SAME_LAN: Place(Nat.CONE, CONE, CONE),
    "ipv4-only": Place(Nat.CONE, CONE, NONE),
    "ipv6-only": Place(Nat.MOBILE, NONE, CONE),
    "dual-stack": Place(Nat.MOBILE, SYMMETRIC, CONE),
}
# Address and port dependent filtering, which all of them have, lets a hole be punched where at most one end has an
# unknown port and the other end is open to it (RFC 5128 3.3).
PUNCHABLE = {frozenset({OPEN}), frozenset({OPEN, CONE}), frozenset({OPEN, SYMMETRIC}), frozenset({CONE})}

SELECTION = {
    ("public", "symmetric"),
    ("port-preserving", "port-preserving"),
    ("port-preserving", "dual-stack"),
    ("symmetric", "port-preserving"),
    ("symmetric", "symmetric"),
    ("symmetric", SAME_LAN),
    ("two-nats", "ipv4-only"),
    (SAME_LAN, SAME_LAN),
    ("ipv4-only", "ipv6-only"),
    ("ipv6-only", "two-nats"),
    ("dual-stack", "public"),
}


def pairs():
    for gateway, client in product(PLACES, PLACES):
        chosen = (gateway, client) in SELECTION
        yield pytest.param(gateway, client, id=f"{gateway}~{client}", marks=[] if chosen else [pytest.mark.long])


def has_direct_path(gateway: str, client: str) -> bool:
    if SAME_LAN in (gateway, client):
        return True
    one, other = PLACES[gateway], PLACES[client]
    families = ((one.ipv4, other.ipv4), (one.ipv6, other.ipv6))
    return any(frozenset(family) in PUNCHABLE for family in families)


def families(place: Place) -> list[int]:
    return [version for version, nat in ((4, place.ipv4), (6, place.ipv6)) if nat]


def scenario(gateway: str, client: str) -> dict:
    # Who shares a network takes the other's place in the world.
    at_gateway = PLACES[client if gateway == SAME_LAN else gateway]
    at_client = PLACES[gateway if client == SAME_LAN else client]
    return {
        "gateway_nat": at_gateway.nat,
        "client_nat": at_client.nat,
        "gateway_families": families(at_gateway),
        "client_families": families(at_client),
        "same_lan": SAME_LAN in (gateway, client),
    }


def test_the_selection_has_every_place_at_both_ends_and_every_outcome():
    assert {gateway for gateway, _ in SELECTION} == set(PLACES)
    assert {client for _, client in SELECTION} == set(PLACES)
    assert {has_direct_path(*pair) for pair in SELECTION} == {True, False}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("gateway", "client"), list(pairs()))
def test_the_best_path_is_found(gateway, client):
    with Lab(**scenario(gateway, client)) as lab:
        fetched = lab.client.curl(RESOURCE, timeout=5)
        assert fetched.ok, f"{fetched.error}\n{lab.tails()}"
        if has_direct_path(gateway, client):
            lab.client.wait_path("PeerToPeer", timeout=5)
            assert lab.client.curl(RESOURCE, timeout=5).ok
        else:
            assert lab.client.ping("10.20.0.100", timeout=2)
            (path,) = lab.client.paths()
            assert path in {"RelayToPeer", "PeerToRelay", "RelayToRelay"}
        (link,) = lab.client.status()["links"]
        assert link["first_reply_ms"] < 3000
        assert lab.warnings() == []
