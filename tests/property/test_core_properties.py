"""The whole core under arbitrary fortune: portal, relays, NATs, losses and forged datagrams in any order.

Whatever happens, nothing raises, no timer spins (the world asserts both), no packet passes that is not granted at that
moment, and when the weather clears every client gets through again.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fzg.portal import messages
from fzg.wire import Malformed, stun
from fzg.wire.endpoint import Endpoint
from tests.property.effort import MUTATIONS, SEED, share
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import (
    RESOURCE_ID,
    cidr,
    close_worlds,  # noqa: F401
    world,
)

PLACEMENTS = ("public", "nat", "symmetric")
NETWORKS = {"10.0.0.0/8": bytes((10, 0, 0, 5)), "192.168.0.0/16": bytes((192, 168, 7, 5))}
RESOURCES = [
    cidr(network, resource_id=RESOURCE_ID[:-1] + str(number)) for number, network in enumerate(NETWORKS, start=6)
]
FAR = 2_145_916_800

clients = st.integers(0, 1)
relays = st.integers(0, 2)
resources = st.integers(0, 1)
listed = st.sets(st.tuples(clients, resources))

STEPS = st.one_of(
    st.tuples(st.just("run"), st.sampled_from([0.001, 0.02, 0.3, 1.0, 5.0, 11.0, 26.0, 70.0])),
    st.tuples(st.just("authorize"), clients, resources),
    st.tuples(st.just("send"), clients, resources),
    st.tuples(st.just("answer"), clients, resources),
    st.tuples(st.just("reject"), clients, resources),
    st.tuples(st.just("goodbye"), clients),
    st.tuples(st.just("new_keys"), clients),
    st.tuples(st.just("lost_connection"), clients),
    st.tuples(st.just("snapshot"), listed),
    st.tuples(st.just("presence"), st.sets(relays), st.sets(relays)),
    st.tuples(st.just("relay_silent"), relays),
    st.tuples(st.just("relay_restarts"), relays, st.booleans()),
    st.tuples(st.just("portal"), st.booleans()),
    st.tuples(st.just("loss"), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    st.tuples(st.just("nat_reboots"), st.booleans()),
    st.tuples(st.just("addresses"), st.sets(st.sampled_from(["192.168.50.5", "203.0.113.5", "2001:db8:50::5"]))),
    st.tuples(st.just("garbage"), clients, st.binary(max_size=60)),
)


@dataclass
class Weather:
    """A world, what is granted in it by rights, and the chances of a datagram."""

    w: object
    seed: int
    granted: set[tuple[int, int]] = field(default_factory=set)
    lost: float = 0.0

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.w.add_client(self.random.choice(PLACEMENTS), started=False)
        self.w.start()
        to_client = self.w._to_client

        def on_frame(message):
            if isinstance(message, messages.AuthorizationCreated):
                client, resource = message.ref.split("/")
                self.granted.add((int(client), int(resource)))
                message = messages.AuthorizationCreated(ref=self.w.clients[int(client)].client_id)
            if isinstance(message, messages.NoRelays):
                self.w.net.at(self.w.net.now + self.w.portal_delay, self.list_relays)
            if self.w.portal_is_up:
                to_client(message)

        self.w.gateway.on_frame = on_frame
        self.w.net.lose = lambda source, destination, payload: self.random.random() < self.lost

    def list_relays(self):
        """The portal answers `no_relays` with those it knows (turn 4.5)."""
        if self.w.portal_is_up:
            self.w.relays_presence(*self.w.relays)

    def step(self, name, *arguments):
        getattr(self, name)(*arguments)
        self.check_written()

    def check_written(self):
        """Only what is granted now may have been written; every step ends in a quiet moment."""
        for packet in self.w.gateway.written():
            client = next(i for i, each in enumerate(self.w.clients) if each.ipv4 == packet[12:16])
            resource = next(i for i, server in enumerate(NETWORKS.values()) if server == packet[16:20])
            assert (client, resource) in self.granted

    def run(self, seconds):
        self.w.net.run(seconds)

    def authorize(self, client, resource):
        if self.w.portal_is_up:
            self.w.authorize(
                self.w.clients[client], resource=RESOURCES[resource], ref=f"{client}/{resource}", expires_at=FAR
            )

    def send(self, client, resource):
        party = self.w.clients[client]
        party.send(udp(source=party.ipv4, destination=list(NETWORKS.values())[resource]))

    def answer(self, client, resource):
        source = list(NETWORKS.values())[resource]
        destination = self.w.clients[client].ipv4
        self.w.gateway.read_tun(udp(source=source, destination=destination, sport=53, dport=50000))

    def reject(self, client, resource):
        if self.w.portal_is_up:
            self.check_written()
            self.w.reject(self.w.clients[client], RESOURCES[resource].id)
            self.granted.discard((client, resource))

    def goodbye(self, client):
        """If it arrives, everything of the client is gone; if it does not, nothing is."""
        party = self.w.clients[client]
        party.node.close("gateway", self.w.net.now)
        party.drain()
        for _ in range(20):
            self.w.net.run(0.01)
            self.check_written()
        if party.client_id not in self.w.gateway.core._handles:
            self.granted -= {(client, 0), (client, 1)}

    def loss(self, rate):
        self.lost = rate

    def new_keys(self, client):
        self.w.clients[client].preshared_key = self.random.randbytes(32)

    def lost_connection(self, client):
        self.w.clients[client].node.drop("gateway")

    def snapshot(self, listed):
        if self.w.portal_is_up:
            self.check_written()
            entries = tuple(
                messages.Authorization(
                    client_id=messages.Id(self.w.clients[client].client_id),
                    resource_id=RESOURCES[resource].id,
                    expires_at=FAR,
                )
                for client, resource in sorted(listed)
            )
            self.w.gateway.portal(self.w.init(authorizations=entries))
            self.granted &= listed

    def presence(self, connected, gone):
        if self.w.portal_is_up:
            self.w.relays_presence(*[self.w.relays[i] for i in connected], gone=[self.w.relays[i] for i in gone])

    def relay_silent(self, relay):
        self.w.relays[relay].alive = not self.w.relays[relay].alive

    def relay_restarts(self, relay, other_secret):
        secret = f"secret {self.random.random()}" if other_secret else self.w.relays[relay].secret
        self.w.relays[relay].restart(secret)

    def portal(self, up):
        if up and not self.w.portal_is_up:
            self.w.portal_returns()
        elif not up and self.w.portal_is_up:
            self.w.portal_goes()

    def nat_reboots(self, of_gateway):
        nat = self.w.gateway.nat if of_gateway else self.w.client.nat
        if nat is not None:
            nat.rebind()

    def addresses(self, listed):
        self.w.gateway.core.handle_local_addresses([Endpoint.of(address, 52625) for address in sorted(listed)])

    def garbage(self, client, payload):
        party = self.w.clients[client]
        path = party.path
        sources = [Endpoint.of("192.0.2.77", 4000), self.w.relays[0].v4]
        if path is not None:
            sources.append(Endpoint(party.addresses[0], 52625))
        local = Endpoint(self.w.gateway.addresses[0], 52625)
        self.w.gateway.receive(payload, self.random.choice(sources), local)
        self.w.candidates(f"candidate:1 1 udp 5 {payload[:30]!r} 1 typ host", client=party)

    def clears_up(self):
        """Relays serve, nothing is lost, and all sides know the relays as they are."""
        w = self.w
        self.lost = 0.0
        for relay in w.relays:
            relay.alive = True
        self.portal(up=True)
        w.gateway.portal(w.init())
        for client in w.clients:
            w._introduce(client)
        w.net.run(3.0)

    def assert_all_get_through(self):
        """A client that fails asks again, as real ones do; two minutes is twice what that takes in the worst case."""
        for number, client in enumerate(self.w.clients):
            self.w.net.run(0.01)
            deadline = self.w.net.now + 120.0
            while not self.w.traffic_flows(client):
                assert self.w.net.now < deadline, f"client {number} does not get through"
                self.w.net.run(1.0)
                if client.node.connection("gateway") is None or (number, 0) not in self.granted:
                    self.authorize(number, 0)
                    self.w.net.run(2.0)
                    client.send(udp(source=client.ipv4, destination=self.random.randbytes(4)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)
@given(
    steps=st.lists(STEPS, max_size=40),
    seed=st.integers(0, 2**32),
    gateway=st.sampled_from(PLACEMENTS),
    client=st.sampled_from(PLACEMENTS),
    ipv6=st.booleans(),
)
@pytest.mark.slow
def test_the_core_survives_any_sequence_of_events_and_recovers(steps, seed, gateway, client, ipv6):
    w = world(gateway=gateway, client=client, ipv6=ipv6, relays=3)
    weather = Weather(w, seed)
    try:
        weather.authorize(0, 0)
        weather.run(1.0)
        for step in steps:
            weather.step(*step)
        weather.clears_up()
        weather.assert_all_get_through()
    finally:
        w.close()


# -- forged datagrams


def captured():
    """Datagrams of every kind that reached a gateway: control of relays, checks, handshakes of both roles, data."""
    seen = []
    for placement in ("public", "symmetric"):
        w = world(gateway=placement, client=placement, ipv6=placement == "public").start()
        w.connect()
        assert w.traffic_flows()
        w.net.run(260.0)
        w.net.run_until(w.traffic_flows)
        # Data that stays unanswered makes the gateway the initiator.
        w.net.lose = lambda source, destination, payload: b"\4\0\0\0" in (payload[:4], payload[4:8])
        w.answers()
        w.net.run(16.0)
        own = {w.gateway.nat.public} if w.gateway.nat else set(w.gateway.addresses)
        seen += [payload for _, _, destination, payload in w.net.log if destination.ip in own]
    kinds = {payload[0] for payload in seen}
    assert kinds >= {0x00, 0x01, 0x02, 0x04, 0x40}
    return seen


def mutated(rng, payload):
    """The datagram with some of it flipped, cut, stretched or replaced."""
    data = bytearray(payload)
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(5):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data) + 1) :]
            case 2:
                data += rng.randbytes(rng.randint(1, 8))
            case 3 if len(data) >= 4:
                at = rng.randrange(len(data) - 3)
                data[at : at + 4] = rng.randbytes(4)
            case _ if len(data) >= 4:
                struct.pack_into("!H", data, 2, rng.randrange(1 << 16))
    return bytes(data)


def is_authentic(w, payload):
    """Whether it is a check that the client could have sent: those may be repeated from elsewhere."""
    try:
        message = stun.parse(payload)
    except Malformed:
        return False
    return message.verify_integrity(w.client.gateway_credentials.password.reveal().encode())


@pytest.mark.slow
def test_forged_datagrams_of_strangers_are_not_answered_and_change_nothing():
    rng = random.Random(SEED)
    w = world().start()
    w.connect()
    assert w.traffic_flows()
    datagrams = captured()
    local = Endpoint(w.gateway.addresses[0], 52625)
    strangers = [Endpoint.of(f"192.0.2.{i}", port) for i in range(1, 5) for port in (3478, 40000)]
    connection, path, log = w.connection, w.connection.path, len(w.net.log)
    forged = 0
    while forged < share(MUTATIONS, 30):
        original = rng.choice(datagrams)
        payload = mutated(rng, original)
        if payload == original or is_authentic(w, payload):
            continue
        forged += 1
        w.gateway.receive(payload, rng.choice(strangers), local)
        if forged % 50 == 0:
            # Real time passes: a flood of valid MAC1 would earn cookies.
            w.net.run(1.0)
            w.traffic_flows()
    assert not {target for _, _, target, _ in w.net.log[log:]} & set(strangers)
    assert w.connection is connection
    assert w.connection.path == path
    assert w.traffic_flows()


@pytest.mark.slow
def test_forged_datagrams_of_relays_and_clients_raise_nothing_and_go_to_nobody_else():
    rng = random.Random(SEED)
    w = world(gateway="public", client="symmetric").start()
    w.connect()
    assert w.traffic_flows()
    datagrams = captured()
    local = Endpoint(w.gateway.addresses[0], 52625)
    known = [relay.v4 for relay in w.relays] + [Endpoint(w.client.nat.public, 20_000 + i) for i in range(3)]
    log = len(w.net.log)
    for forged in range(share(MUTATIONS, 10)):
        w.gateway.receive(mutated(rng, rng.choice(datagrams)), rng.choice(known), local)
        if forged % 50 == 0:
            w.net.run(1.0)
    sent = {target.ip for _, source, target, _ in w.net.log[log:] if source.ip in w.gateway.addresses}
    assert sent <= {relay.v4.ip for relay in w.relays} | {w.client.nat.public, *w.client.addresses}
