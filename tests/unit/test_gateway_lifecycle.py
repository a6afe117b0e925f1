"""A connection from its authorization to its end: creation, reuse, replacement, time-outs (spec connectivity 2)."""

from __future__ import annotations

import struct

import pytest

from fzg.node.connection import ConnectionState
from fzg.portal import messages
from fzg.secret import Secret
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    SETTLED,
    ClientParty,
    cidr,
    close_worlds,  # noqa: F401
    signalled,
    udp,
    world,
)

HOST = "candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1"
HOST6 = "candidate:1 1 udp 2130706431 2001:db8::77 40000 typ host ufrag abc1"


def half_open(**kinds):
    """The gateway has its half of a connection and the client will never hear of it."""
    w = world(**kinds).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    return w


def acknowledged(w):
    return len(w.gateway.said(messages.AuthorizationCreated))


def wireguard_sent(w, since, kind):
    return [
        payload
        for moment, source, _, payload in w.net.log
        if moment >= since and source.ip == w.gateway.addresses[0] and payload[:4] == bytes((kind, 0, 0, 0))
    ]


# -- creation


@pytest.mark.spec("CONN-17", "PORTAL-47")
def test_the_acknowledgement_comes_first_then_one_message_with_all_candidates():
    w = half_open(gateway="nat")
    (at, first), (then, second) = w.gateway.frames
    assert first == messages.AuthorizationCreated(ref=w.client.client_id)
    assert isinstance(second, messages.BroadcastIceCandidates)
    assert second.client_ids == (w.client.client_id,)
    assert [text.split()[7] for text in second.candidates] == ["host", "srflx", "relay"]
    assert at == then == w.net.now


@pytest.mark.spec("CONN-18", "TURN-55", "PORTAL-48")
def test_without_a_relay_there_is_no_acknowledgement_and_no_access():
    w = world(relays=0).start()
    w.authorize()
    w.net.run(5.0)
    assert [type(message) for _, message in w.gateway.frames] == [messages.NoRelays]
    assert w.connection is None
    assert w.gateway.core.tunnel.client_count == 0
    assert list(w.gateway.core.node.connections) == []


@pytest.mark.spec("CONN-18")
def test_an_authorization_waits_a_second_at_most_for_a_relay_that_may_answer():
    w = world()
    for relay in w.relays:
        relay.alive = False
    w.start(settle=0.0)
    w.authorize()
    start = w.net.now
    assert w.gateway.frames == []
    w.net.run(0.99)
    assert w.gateway.frames == []
    w.net.run(3.0)
    assert [(round(at - start, 3), type(message)) for at, message in w.gateway.frames] == [(1.0, messages.NoRelays)]
    assert w.gateway.core.tunnel.client_count == 0


def test_an_authorization_that_waits_is_taken_up_with_the_first_answer_of_a_relay():
    """D6: the round trip of the relay is all that a cold start costs."""
    w = world(latency=0.02).start(settle=0.0)
    w.authorize()
    w.authorize(resource=cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6"), ref="second")
    start = w.net.now
    w.net.run_until(lambda: acknowledged(w) == 2)
    assert w.net.now - start == pytest.approx(0.04, abs=0.001)
    assert [message.ref for message in w.gateway.said(messages.AuthorizationCreated)] == [w.client.client_id, "second"]
    w.net.run_until(lambda: w.client.established)
    assert w.reaches()
    assert w.reaches(destination=bytes((192, 168, 0, 1)))
    assert w.gateway.said(messages.NoRelays) == []


def test_a_reused_connection_needs_no_relay():
    w = world().start()
    w.connect()
    w.relays_presence(gone=w.relays)
    w.authorize(ref="again")
    assert w.gateway.said(messages.AuthorizationCreated)[-1].ref == "again"
    w.authorize(ref="other keys", client=rekeyed(w.client))
    assert w.gateway.said(messages.AuthorizationCreated)[-1].ref == "again"
    assert w.connection.identity.preshared_key == Secret(w.client.preshared_key)


def test_iceless_mode_was_not_offered_and_is_not_acknowledged():
    w = half_open()
    w.authorize(use_iceless=True, ref="iceless")
    assert [message.ref for message in w.gateway.said(messages.AuthorizationCreated)] == [w.client.client_id]


# -- reuse and replacement


@pytest.mark.spec("CONN-19", "PORTAL-49")
def test_a_repeated_authorization_keeps_the_connection_and_signals_all_candidates_again():
    w = world(gateway="nat").start()
    w.connect()
    w.net.run(1.0)
    before, index, log = w.connection, w.connection.index, len(w.net.log)
    w.authorize(ref="again")
    assert w.connection is before
    assert w.connection.index == index
    first, second = signalled(w.gateway)
    assert first == second
    w.net.run(1.0)
    assert w.traffic_flows()
    assert not [payload for _, _, _, payload in w.net.log[log:] if payload[0] == 2], "no handshake was needed"


def rekeyed(client):
    """The same client after it changed one thing."""
    changed = object.__new__(ClientParty)
    changed.__dict__.update(client.__dict__)
    changed.preshared_key = bytes(31) + b"\1"
    return changed


@pytest.mark.spec("CONN-20", "PORTAL-49")
@pytest.mark.parametrize("what", ["static", "preshared_key", "gateway_credentials", "credentials"])
def test_another_key_or_credential_replaces_the_connection(what):
    w = world().start()
    w.connect()
    assert w.traffic_flows()
    index = w.connection.index
    w.client.send(udp(source=w.client.ipv4, destination=SERVER))
    old_datagram = w.net.log[-1][3]
    assert struct.unpack_from("<I", old_datagram, 4)[0] >> 8 == index
    w.net.run(SETTLED)
    w.client.send(udp(source=w.client.ipv4, destination=SERVER))
    unused = w.net.log[-1][3]
    changed = object.__new__(ClientParty)
    changed.__dict__.update(w.client.__dict__)
    other = ClientParty(w.net, [], number=9)
    setattr(changed, what, getattr(other, what))
    w.authorize(changed)
    assert w.connection.index != index
    assert w.connection.state is ConnectionState.CONNECTING
    w.gateway.written()
    w.gateway.receive(unused, w.net.log[-1][1], w.net.log[-1][2])
    assert w.gateway.written() == []
    assert w.gateway.node.counters["WireGuard: unknown session"] == 1


def test_a_replaced_connection_says_no_goodbye_and_works_with_the_new_keys():
    w = world().start()
    w.connect()
    w.net.run(1.0)
    log = len(w.net.log)
    w.client.preshared_key = bytes(31) + b"\1"
    w.connect()
    assert w.traffic_flows()
    assert not [
        payload
        for _, source, _, payload in w.net.log[log:]
        if source.ip == w.gateway.addresses[0] and len(payload) == 80
    ]


def test_a_client_that_lost_everything_comes_back_with_the_same_credentials():
    w = world().start()
    w.connect()
    w.client.node.drop("gateway")
    w.connect()
    assert w.traffic_flows()


def test_the_response_to_a_client_that_came_back_elsewhere_follows_its_nomination():
    """It initiates before it nominates, so the first response goes where it no longer is."""
    w = world(client="nat").start()
    w.connect()
    w.net.run(1.0)
    former = w.connection.path
    w.client.nat.rebind()
    w.client.nat.taken.add(52625)
    w.client.node.drop("gateway")
    log, start = len(w.net.log), w.net.now
    w.connect()
    assert w.net.now - start < 0.1
    assert w.connection.path != former
    responses = [(target, payload) for _, _, target, payload in w.net.log[log:] if payload[:4] == b"\2\0\0\0"]
    assert [target for target, _ in responses] == [former.destination, w.connection.path.destination]
    assert responses[0][1] == responses[1][1]
    assert w.traffic_flows()


# -- candidates in time


@pytest.mark.spec("CONN-21")
def test_without_a_remote_candidate_the_connection_fails_after_ten_seconds():
    w = half_open()
    w.net.run(9.9)
    assert w.connection is not None
    w.net.run(0.2)
    assert w.connection is None


@pytest.mark.spec("CONN-21")
def test_one_remote_candidate_prevents_that():
    w = half_open()
    w.net.run(9.8)
    w.candidates(HOST)
    w.net.run(60.0)
    assert w.connection is not None


@pytest.mark.spec("CONN-22", "PORTAL-57")
@pytest.mark.parametrize("bad", ["candidate:1 1 udp 5", "candidate:1 1 udp 5 192.0.2.300 1 typ host", "candidate:"])
def test_a_malformed_candidate_counts_for_nothing_and_harms_no_other(bad):
    w = half_open()
    w.candidates(bad)
    w.net.run(9.9)
    assert w.connection is not None
    w.net.run(0.2)
    assert w.connection is None
    w.authorize()
    w.candidates(bad, HOST, bad)
    w.net.run(20.0)
    assert w.connection.agent.remote_candidate_count == 1


@pytest.mark.spec("CONN-23", "PORTAL-58")
def test_candidates_of_unknown_clients_are_ignored():
    w = world().start()
    frames = len(w.gateway.frames)
    w.candidates(HOST)
    w.candidates(HOST, added=False)
    w.net.run(1.0)
    assert len(w.gateway.frames) == frames
    w.connect()
    assert w.traffic_flows()


@pytest.mark.spec("CONN-24")
def test_candidates_of_two_families_give_two_seconds_to_mend_that():
    w = half_open()
    w.candidates(HOST6)
    w.net.run(1.9)
    assert w.connection is not None
    w.candidates(HOST)
    w.net.run(30.0)
    assert w.connection is not None

    w = half_open()
    w.candidates(HOST6)
    w.net.run(1.99)
    assert w.connection is not None
    w.net.run(0.02)
    assert w.connection is None


@pytest.mark.spec("CONN-27")
def test_a_failed_connection_keeps_the_authorizations():
    w = world().start()
    w.connect()
    assert w.traffic_flows()
    w.client.node.drop("gateway")
    w.net.lose = lambda source, destination, payload: destination.ip in w.client.addresses
    w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000))
    w.net.run(40.0)
    assert w.connection is None, "WireGuard gave up"
    w.net.lose = lambda source, destination, payload: False
    w.client.node.update_relays((), [relay.credentials(w.client.client_id) for relay in w.relays], w.net.now)
    w.client.drain()
    w.net.run(1.0)
    w.connect(resource=cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6"))
    assert w.traffic_flows(), "the first resource is still granted"
    assert w.reaches(destination=bytes((192, 168, 0, 1)))


# -- while connecting


@pytest.mark.spec("CONN-31", "TUNNEL-37")
def test_user_packets_for_a_connecting_client_are_dropped_without_a_handshake():
    w = half_open()
    start = w.net.now
    for _ in range(5):
        w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000))
        w.net.run(1.0)
    assert w.gateway.core.counters["to client: still connecting"] == 5
    assert wireguard_sent(w, start, 1) == wireguard_sent(w, start, 4) == []


def nominate_late(w):
    """Let the client handshake first: its USE-CANDIDATE checks do not pass until `release`."""
    held = []
    released = False

    def lose(source, destination, payload):
        if not released and payload[:2] == b"\0\1" and b"\0\x25\0\0" in payload and source.ip in w.client.addresses:
            held.append((source, destination, payload))
            return True
        return False

    def release():
        nonlocal released
        released = True

    w.net.lose = lose
    return release


@pytest.mark.spec("CONN-33")
def test_an_initiation_before_the_nomination_is_answered_upon_the_nomination():
    w = world().start()
    release = nominate_late(w)
    w.authorize()
    start = w.net.now
    w.net.run(0.1)
    assert [payload for _, _, _, payload in w.net.log if payload[:4] == b"\1\0\0\0"], "the client initiated"
    assert wireguard_sent(w, start, 2) == []
    assert w.connection.state is ConnectionState.CONNECTING
    release()
    nominated = w.net.now + w.net.run_until(lambda: w.connection.state is ConnectionState.CONNECTED)
    w.net.run(0.01)
    responses = [
        (moment, target) for moment, source, target, payload in w.net.log
        if moment >= start and payload[:4] == b"\2\0\0\0"
    ]  # fmt: skip
    ((moment, target),) = responses
    assert moment == pytest.approx(nominated, abs=0.001)
    assert target == w.connection.path.destination
    assert sum(payload[:4] == b"\1\0\0\0" for _, _, _, payload in w.net.log) == 1, "no second initiation was needed"
    assert w.client.established


@pytest.mark.spec("CONN-32")
def test_a_nomination_flushes_the_latest_128_buffered_responses():
    w = world().start()
    release = nominate_late(w)
    w.authorize()
    w.net.run(SETTLED)
    peer = w.client.node.connection("gateway").peer
    answered = []
    for _ in range(129):
        # Spread over time, since more than 100 in a second would be answered with cookies.
        w.net.run(0.02)
        peer._attempt_began = None
        peer.initiate(w.net.now)
        initiation = peer.poll_transmit()
        answered.append(initiation[4:8])
        source, local = w.client.addresses[0], w.gateway.addresses[0]
        w.gateway.receive(initiation, Endpoint(source, 52625), Endpoint(local, 52625))
    start = w.net.now
    release()
    w.net.run_until(lambda: w.connection.state is ConnectionState.CONNECTED)
    assert [payload[8:12] for payload in wireguard_sent(w, start, 2)] == answered[-128:]


@pytest.mark.spec("CONN-34")
def test_a_gateway_that_sends_no_data_never_initiates():
    w = world(gateway="symmetric", client="symmetric").start()
    w.connect()
    w.reaches()
    w.gateway.nat.rebind()
    w.net.run(400.0)
    assert w.connection is not None
    public = w.gateway.nat.public
    plain = [payload for _, source, _, payload in w.net.log if source.ip == public]
    assert not [payload for payload in plain if b"\1\0\0\0" in (payload[:4], payload[4:8])]


# -- keys and indices


def test_connection_indices_are_unique_and_new_after_a_replacement():
    w = half_open()
    seen = {w.connection.index}
    for number in range(2, 20):
        other = ClientParty(w.net, [], number=number)
        w.authorize(other)
        seen.add(w.gateway.node.connection(other.client_id).index)
    w.client.preshared_key = bytes(32)
    w.authorize()
    seen.add(w.connection.index)
    assert len(seen) == 20
    assert all(0 <= index < 1 << 24 for index in seen)


def test_a_client_whose_authorization_cannot_be_recorded_gets_no_connection():
    """Before `init` there are no tunnel addresses, so nothing could be routed."""
    w = world()
    w.gateway.core.node.update_relays((), [relay.credentials("gateway") for relay in w.relays], w.net.now)
    w.gateway.drain()
    w.net.run(1.0)
    w.authorize()
    assert acknowledged(w) == 0
    assert w.connection is None
    w.start()
    w.connect()
    assert w.traffic_flows()
