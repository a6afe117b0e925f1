"""Storms of portal messages on the core: no authorization is lost or invented, by either engine (spec portal 2, 6).

What the portal did stands in `Grants`; what the gateway allows is asked by packets, in both directions, for every pair
that was ever authorized, and for pairs that never were. The same with the whole program is in `test_portal_tempest`.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from fzg.portal import messages
from fzg.portal.channel import Channel, Received
from tests.lab.grants import FOREVER_S, Device, Grants, Message, Pair, Resource, Storm
from tests.unit import policy_world
from tests.unit.dataplane_world import ENGINES, udp
from tests.unit.gateway_world import (
    close_worlds,  # noqa: F401
    memory_relay,
    world,
)
from tests.unit.test_gateway_scale import crowded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SEED = int(os.environ.get("FZG_SEED", "1"))
PER_SECOND = 200  # authorizations, as the issue has it
OTHERS = 0.3  # of them are followed by something else than an authorization
each_engine = pytest.mark.parametrize("make_engine", ENGINES, ids=[engine.__name__ for engine in ENGINES])


class Played:
    """A core that has joined, and the storm over it."""

    def __init__(self, make_engine: Any) -> None:
        self.world = policy_world.World(make_engine)
        self.storm = Storm(random.Random(SEED))
        self.heard = 0
        self.say(("init", policy_world.init()))

    @property
    def grants(self) -> Grants:
        return self.storm.grants

    def say(self, message: Message) -> None:
        """The portal says it and hears the answer."""
        self.world.portal(*message)
        self.listen()

    def listen(self) -> None:
        for ref in self.world.acknowledged[self.heard :]:
            self.grants.acknowledge(ref)
        self.heard = len(self.world.acknowledged)

    def init(self) -> Message:
        return "init", policy_world.init(authorizations=self.grants.snapshot(self.world.unix))

    def blow(self, seconds: float) -> int:
        """The storm for so long; how many authorizations that were."""
        count = int(seconds * PER_SECOND)
        for _ in range(count):
            self.say(self.storm.authorize(self.world.unix))
            if self.storm.rng.random() < OTHERS:
                self.say(self.storm.change(self.world.unix))
            self.world.run(1 / PER_SECOND)
        return count

    def passing(self, pairs: Iterable[tuple[Device, Resource]]) -> tuple[set[Pair], set[Pair]]:
        """Of these, what passes from the client, and what passes to it."""
        up, down = set(), set()
        by_client: dict[str, list[tuple[Device, Resource]]] = {}
        for device, resource in pairs:
            by_client.setdefault(device.id, []).append((device, resource))
        for client_id, mine in by_client.items():
            own = policy_world.socket.inet_aton(mine[0][0].ipv4)
            there = {resource.address.packed: (client_id, resource.id) for _, resource in mine}
            if client_id in self.world.node.lines:
                self.world.from_client(client_id, *(udp(source=own, destination=remote) for remote in there))
            up |= {there[packet[16:20]] for packet in self.world.written()}
            for remote in there:
                self.world.from_tun(udp(source=remote, destination=own, sport=53, dport=50_000))
            delivered = [(whom, packet) for whom, packet, _ in self.world.delivered() if packet[9] == 17]
            assert {whom for whom, _ in delivered} <= {client_id}
            down |= {there[packet[12:16]] for _, packet in delivered}
        return up, down

    def compare(self, *, every: int = 1) -> int:
        """Nothing is lost or invented, of all (or each so many-th) that was ever said; how many pairs pass."""
        rng = random.Random(SEED)
        pairs = list(self.storm.pairs.values())[::every]
        foreign = [(device, rng.choice(pairs)[1]) for device in self.storm.devices]
        self.world.run(0.003)  # off the full second, when grants end
        asked = {(device.id, resource.id) for device, resource in [*pairs, *foreign]}
        up, down = self.passing([*pairs, *foreign])
        now = self.world.unix
        for passing in (up, down):
            assert (self.grants.must_pass(now) & asked) - passing == set(), "lost"
            assert passing - self.grants.may_pass(now) == set(), "invented"
        return len(up)

    def clear(self) -> None:
        """All access ends; nothing is kept of it."""
        self.grants.table.clear()
        self.say(self.init())
        self.world.run(2.0)
        core = self.world.core
        assert core.tunnel.client_count == core.tunnel.nat_session_count == 0
        assert not self.world.node.lines
        assert not core._handles
        assert not core._clients
        assert core.poll_event() is None


@pytest.fixture(name="play")
def play_fixture() -> Iterator[Any]:
    played = []

    def play(make_engine: Any) -> Played:
        played.append(Played(make_engine))
        return played[-1]

    yield play
    for each in played:
        each.world.close()


@pytest.mark.slow
@each_engine
def test_two_hundred_authorizations_a_second_are_neither_lost_nor_invented(play: Any, make_engine: Any) -> None:
    """For half a minute, in virtual time; some are taken back, some expire, some come twice."""
    played, seconds = play(make_engine), 30
    for _ in range(2):
        assert played.blow(seconds / 2) == seconds * PER_SECOND / 2
        assert played.compare() > 500
    assert len(played.grants.must_pass(played.world.unix)) > seconds * PER_SECOND / 3
    assert len(played.storm.devices) > seconds * PER_SECOND / 2
    played.clear()


@pytest.mark.slow
@each_engine
def test_a_portal_that_restarts_every_two_seconds_leaves_nothing_lost_or_invented(play: Any, make_engine: Any) -> None:
    """What it says right before it goes does not arrive, and what it decides while it is away it says to nobody."""
    played = play(make_engine)
    storm, world = played.storm, played.world
    for _ in range(30):
        played.blow(1.4)
        for _ in range(storm.rng.randrange(20)):
            storm.authorize(world.unix)  # lost with the socket
            storm.change(world.unix)
        world.core.handle_portal_disconnected(world.now)
        world.run(0.6)
        for _ in range(20):
            storm.change(world.unix)
        world.core.handle_portal_connected(world.now)
        played.say(played.init())
    assert played.compare() > 1000
    played.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_engine",
    [pytest.param(engine, marks=[] if engine is ENGINES[-1] else pytest.mark.long) for engine in ENGINES],
    ids=[engine.__name__ for engine in ENGINES],
)
def test_an_init_with_twenty_thousand_pairs_is_taken_over_exactly(play: Any, make_engine: Any) -> None:
    """A thousand clients with twenty resources each, and a tenth more that `init` does not list any longer."""
    played = play(make_engine)
    storm, now = played.storm, played.world.unix
    pairs = []
    for number in range(1000):
        device = Device.make(0x1000 + number, storm.rng)
        storm.devices.append(device)
        for _ in range(22):
            resource = storm.new_resource()
            played.say(storm.authorization(device, resource, int(now) + FOREVER_S))
            pairs.append((device.id, resource.id))
    for pair in pairs[::11]:
        played.grants.reject(pair)  # the gateway hears of these by their absence only
    soon = pairs[1::11]
    for pair in soon:
        played.grants.set_expiry(pair, int(now) + 60, now)
    assert len(played.grants.table) == 20_000
    _, payload = played.init()
    for device in (Device.make(0x10000, storm.rng), *storm.devices[1:100]):
        other = Resource(1)
        storm.pairs[device.id, other.id] = (device, other)  # asked for, and never granted
        entry = {"client_id": device.id, "resource_id": other.id, "expires_at": int(now) + FOREVER_S}
        payload["authorizations"].append(entry)
    channel = Channel(now=0.0)
    text = json.dumps({"topic": "gateway", "event": "init", "ref": None, "payload": payload})
    began = time.process_time()
    channel.handle_frame(text, 0.0)
    received = channel.poll_event()
    assert isinstance(received, Received)
    played.world.core.handle_portal_message(received.message, played.world.now)
    played.world.drain()
    # Traffic stands still meanwhile: a sixth of a second as measured, a whole one would be felt.
    assert time.process_time() - began < 1.0
    assert played.compare() == 20_000
    assert played.world.core.tunnel.client_count == 1000

    played.say(("init", payload))  # the same again changes nothing (PORTAL-42)
    assert played.world.node.goodbyes == []
    played.world.run(61.0)
    played.compare(every=5)
    assert len(played.grants.may_pass(played.world.unix)) == 20_000 - len(soon)
    played.clear()
    assert len(played.world.node.goodbyes) == 1000


@pytest.mark.slow
def test_a_thousand_clients_without_a_relay_all_move_to_the_next() -> None:
    """While the portal was away all relays died; its `init` brings another, and one pass moves everybody."""
    w = crowded(1000)
    w.portal_goes()
    w.relays_presence(gone=w.relays)  # their allocations are lost, as when they do not answer
    assert all(each.relay_id is None for each in w.gateway.node.connections)
    later = memory_relay(w.net, 2)
    w.portal_returns(relays=[later])
    w.net.run(1.0)
    assert {each.relay_id for each in w.gateway.node.connections} == {later.id}


def test_authorizations_that_wait_for_a_relay_are_told_apart_by_what_the_portal_says_meanwhile() -> None:
    """Two hundred come before any relay has answered: those that were taken back are not granted afterwards."""
    w = world(latency=0.4).start(settle=0.0)
    rng = random.Random(SEED)
    storm = Storm(rng)
    w.gateway.on_frame = lambda message: None
    for _ in range(PER_SECOND // 2):
        event, payload = storm.authorize(w.net.now + policy_world.UNIX_OFFSET)
        w.gateway.portal(messages.decode(event, json.dumps(payload)))
        if rng.random() < OTHERS:
            event, payload = storm.change(w.net.now + policy_world.UNIX_OFFSET)
            w.gateway.portal(messages.decode(event, json.dumps(payload)))
    assert w.gateway.said(messages.AuthorizationCreated) == []
    w.net.run(1.0)
    tunnel = w.gateway.core.tunnel
    held = {
        pair
        for pair, (device, resource) in storm.pairs.items()
        if (client := tunnel._clients.get(device.id)) is not None
        and client.authorization(resource.id, w.net.now) is not None
    }
    assert held == storm.grants.may_pass(w.net.now + policy_world.UNIX_OFFSET)
