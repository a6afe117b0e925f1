"""A connection that is lost takes nothing of what its client may do (tunnel 5.8), nor its sessions (7.4)."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from tests.unit import policy_world
from tests.unit.tunnel_world import control, udp

CLIENT, OWN = "11111111-2222-4333-8444-555555555555", ("100.64.0.1", "fd00:2021:1111::1")
PROXY, REAL = "100.96.0.1", "10.2.0.1"
NAME, NETWORK, OTHER = (f"00000000-0000-4000-8000-{number:012x}" for number in (1, 2, 3))


def cidr(resource_id, address):
    return {"type": "cidr", "id": resource_id, "address": address, "name": "n", "filters": []}


def grant(world, resource, expires_at=None):
    world.portal("create_authorization", policy_world.authorization(CLIENT, *OWN, resource, expires_at))


def passes(world, destination, port=80):
    world.from_client(CLIENT, udp(OWN[0], destination, 5000, port))
    return bool(world.written())


@pytest.mark.spec("TUNNEL-75")
def test_after_a_failure_and_a_grant_of_something_else_all_that_was_granted_works_until_it_ends():
    world = policy_world.World()
    world.portal("init", policy_world.init())
    grant(world, {"type": "dns", "id": NAME, "address": "*.example.com", "name": "n", "filters": []})
    grant(world, cidr(NETWORK, "10.1.0.0/24"), int(world.unix) + 60)
    event = {"resource": NAME, "domain": "a.example.com", "proxy_ips": [PROXY]}
    world.from_client(CLIENT, control(0, json.dumps(event).encode()))
    world.resolved(world.resolutions.pop(), [ip_address(REAL)])
    assert passes(world, PROXY)
    assert passes(world, "10.1.0.5")

    world.node.fail(CLIENT)
    world.core.handle_timeout(world.now)
    world.drain()
    world.run(5.0)
    world.delivered()
    grant(world, cidr(OTHER, "10.3.0.0/24"))
    assert passes(world, "10.3.0.5")
    assert passes(world, "10.1.0.5")
    world.from_tun(udp(REAL, OWN[0], 80, 5000))
    ((_, answer, _),) = world.delivered()
    assert str(ip_address(answer[12:16])) == PROXY, "the session survived"
    assert passes(world, PROXY, 81)
    world.run(60.0)
    assert not passes(world, "10.1.0.5")
    assert passes(world, "10.3.0.5")
