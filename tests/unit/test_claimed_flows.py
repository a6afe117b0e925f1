"""A client reaches one host by its address and by a name: a new session claims what passed untranslated until then."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from fzg.tunnel.untranslated import Untranslated
from tests.unit import policy_world
from tests.unit.dataplane_world import ENGINES
from tests.unit.tunnel_world import control, echo, packed, tcp, udp

CLIENT, OWN4, OWN6 = "11111111-2222-4333-8444-555555555555", "100.64.0.1", "fd00:2021:1111::1"
REAL, PROXY = "10.0.0.5", "100.96.0.1"
NETWORK, NAME = (f"00000000-0000-4000-8000-{number:012x}" for number in (1, 2))


@pytest.fixture(params=ENGINES, ids=[engine.__name__ for engine in ENGINES])
def world(request):
    world = policy_world.World(request.param)
    world.portal("init", policy_world.init())
    fields = {"name": "n", "filters": []}
    for resource in (
        {"type": "cidr", "id": NETWORK, "address": "10.0.0.0/24"},
        {"type": "dns", "id": NAME, "address": "*.example.com"},
    ):
        world.portal("create_authorization", policy_world.authorization(CLIENT, OWN4, OWN6, resource | fields))
    yield world
    world.close()


def assign(world):
    event = {"resource": NAME, "domain": "a.example.com", "proxy_ips": [PROXY]}
    world.from_client(CLIENT, control(0, json.dumps(event).encode()))
    world.resolved(world.resolutions.pop(), [ip_address(REAL)])
    world.delivered()


def sources(world):
    return [packet[12:16] for _, packet, _ in world.delivered()]


PAIRS = [
    (lambda to: udp(OWN4, to, 5000, 53), udp(REAL, OWN4, 53, 5000)),
    (lambda to: tcp(OWN4, to, 5000, 443), tcp(REAL, OWN4, 443, 5000)),
    (lambda to: echo(OWN4, to, 5000), echo(REAL, OWN4, 5000, reply=True)),
]


@pytest.mark.parametrize(("question", "answer"), PAIRS, ids=["udp", "tcp", "echo"])
@pytest.mark.parametrize("assigned_first", [True, False])
def test_answers_from_the_real_address_belong_to_a_session_from_its_first_packet_on(
    world, question, answer, assigned_first
):
    if assigned_first:
        assign(world)
    world.from_client(CLIENT, question(REAL))
    world.from_tun(answer, answer)  # the second by a cached flow
    assert sources(world) == [packed(REAL)] * 2
    if not assigned_first:
        assign(world)
    world.from_client(CLIENT, question(PROXY))
    world.from_tun(answer, answer)
    assert sources(world) == [packed(PROXY)] * 2


def test_a_session_leaves_other_flows_of_the_client_alone(world):
    assign(world)
    world.from_tun(udp(REAL, OWN4, 53, 4999), udp("10.0.0.6", OWN4, 53, 5000))
    counted = world.core.tunnel.poll_event
    world.from_client(CLIENT, udp(OWN4, PROXY, 5000, 53))
    assert counted() is None
    items = []
    world.kernel.send(bytes(10) + udp(REAL, OWN4, 53, 4999))
    world.kernel.send(bytes(10) + udp("10.0.0.6", OWN4, 53, 5000))
    items += world.engine.receive_tun(world.now)
    assert items == [], "both are still cached"


def test_what_may_be_cached_is_remembered_for_that_long_and_then_forgotten():
    flows = Untranslated(1.0)
    key = (17, b"real", b"ours", 53, 5000)
    for at, asked in ((10.0, 10.99), (20.0, 20.99), (30.9, 31.5)):
        flows.note(1, b"real", (17, b"other", b"ours", 1, 1), at - 0.5)
        flows.note(1, b"real", key, at)
        flows.note(2, b"real", key, asked)
        assert key in flows.take(1, b"real")
        assert flows.take(1, b"real") == []
    flows.prune(32.4)
    assert flows.take(2, b"real")
    flows.note(1, b"real", key, 40.0)
    flows.prune(42.0)
    assert flows.take(1, b"real") == []


def test_taking_the_newest_ones_leaves_the_older_ones_to_be_taken_or_forgotten():
    flows = Untranslated(1.0)
    key, other = (17, b"real", b"ours", 53, 5000), (17, b"real", b"ours", 53, 5001)
    flows.note(3, b"real", other, 10.0)
    flows.note(1, b"real", key, 10.5)
    flows.note(2, b"real", other, 11.0)
    assert flows.take(2, b"real") == [other]
    assert flows.take(1, b"real") == [key], "it may be cached until 11.5"
    flows.prune(13.0)
    assert flows.take(3, b"real") == []
