"""Channels for a connection, relayed paths, and relays that restart or vanish under traffic (spec connectivity 4)."""

from __future__ import annotations

import pytest

from fzg.node.path import PathKind
from fzg.node.relayed import MAX_CHANNELS, ChannelShare
from fzg.portal import messages
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    SETTLED,
    cidr,
    close_worlds,  # noqa: F401
    memory_relay,
    udp,
    withdrawn,
    world,
)

CHANNEL_BIND = 9
PEER = Endpoint.of("192.0.2.77", 40000)


def line(kind, address="192.0.2.77", port=40000):
    return f"candidate:1 1 udp 1686109951 {address} {port} typ {kind} raddr 0.0.0.0 rport 0 ufrag abc1"


def authorized(**kinds_of_world):
    w = world(**kinds_of_world).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.net.run(SETTLED)
    return w


def relayed(**kinds_of_world):
    """Connected with symmetric NATs on both sides: relay to relay."""
    w = world(gateway="symmetric", client="symmetric", **kinds_of_world).start()
    w.connect()
    assert w.connection.path.kind is PathKind.RELAY_TO_RELAY
    assert w.traffic_flows()
    return w


def serving(w):
    return next(relay for relay in w.relays if relay.id == w.connection.relay_id)


def gateway_binds(w, relay):
    gateway = [client for client in relay.allocations if relay.users.get("gateway") == client]
    return [peer for client, peer in relay.binds if client in gateway]


# -- which channels, and when


@pytest.mark.spec("CONN-65", "TURN-36")
@pytest.mark.parametrize("kind", ["srflx", "prflx", "relay"])
def test_a_candidate_that_is_no_host_is_bound_on_the_selected_relay_at_once(kind):
    w = authorized()
    log = len(w.net.log)
    w.candidates(line(kind))
    (bind,) = [(target, payload) for _, _, target, payload in w.net.log[log:]]
    assert bind[0] == serving(w).v4
    assert bind[1][:2] == bytes((0, CHANNEL_BIND))
    w.net.run(5.0)
    assert gateway_binds(w, serving(w)) == [PEER]
    assert [relay.binds for relay in w.relays if relay is not serving(w)] == [[]]


def test_a_client_that_names_addresses_without_end_leaves_channels_to_others():
    """A relay has 4096 numbers for all clients, and keeps each for 15 minutes."""
    w = authorized()
    other = w.add_client()
    w.candidates(line("host", port=1))
    for number in range(1000):
        text = line("srflx", f"192.0.2.{number % 250}", 1000 + number)
        w.candidates(text)
        w.candidates(text, added=False)
        w.net.run(0.01)
    channels = w.gateway.node.relays.status()[0].channels + w.gateway.node.relays.status()[1].channels
    assert channels == MAX_CHANNELS
    w.authorize(other)
    w.candidates(line("srflx", port=7).replace("abc1", "abc2"), client=other)
    w.net.run(SETTLED)
    assert any(Endpoint.of("192.0.2.77", 7) in gateway_binds(w, relay) for relay in w.relays)
    w.candidates(line("srflx", port=9))
    w.net.run(SETTLED)
    assert not any(Endpoint.of("192.0.2.77", 9) in gateway_binds(w, relay) for relay in w.relays)


def test_an_address_leaves_a_clients_share_when_the_relay_may_give_its_number_to_others():
    share = ChannelShare()
    addresses = [Endpoint.of("192.0.2.77", port) for port in range(MAX_CHANNELS + 2)]
    assert all(share.admits(address, 0.0) for address in addresses[:MAX_CHANNELS])
    assert share.admits(addresses[0], 500.0)
    assert not share.admits(addresses[-1], 899.9)
    assert share.admits(addresses[-1], 900.0)
    assert share.admits(addresses[0], 900.0)


@pytest.mark.spec("CONN-65", "TURN-36")
def test_a_host_candidate_is_not_bound_by_its_arrival():
    w = authorized()
    log = len(w.net.log)
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    assert w.net.log[log:] == []


@pytest.mark.spec("CONN-66")
def test_the_first_packet_to_an_address_without_a_channel_binds_and_the_next_is_sent_behind_the_bind():
    """A check from the relay candidate to a host address; the answer to the bind takes longer than the retry.

    Private addresses are bound like others (D9 is not done): a relay may stand in the client's network, and one that
    refuses is asked once a minute.
    """
    w = authorized()
    w.net.latency = 1.0
    log, start = len(w.net.log), w.net.now
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    w.net.run(0.3)
    to_relay = [
        (round(moment - start, 3), payload[0])
        for moment, _, target, payload in w.net.log[log:]
        if target == serving(w).v4
    ]
    assert to_relay == [(0.0, 0), (0.25, 0x40)]
    assert not any(payload[:2] == b"\1\t" for _, _, _, payload in w.net.log[log:] if payload[0] == 1)


def test_a_bind_leaves_before_what_needs_its_channel():
    """The relay would drop ChannelData that overtakes its ChannelBind (turn 3.2)."""
    w = authorized(gateway="symmetric")
    log = len(w.net.log)
    w.candidates(line("relay"), line("srflx", "192.0.2.78"), line("relay", "192.0.2.79"))
    w.net.run(0.0)
    seen = [payload for _, _, target, payload in w.net.log[log:] if target == serving(w).v4]
    assert [payload[0] for payload in seen] == [0, 0, 0, 0x40, 0x40, 0x40]


def test_what_turn_sends_goes_before_what_connections_send():
    w = authorized(gateway="symmetric")
    core, now = w.gateway.core, w.net.now
    text = line("relay")
    core.handle_portal_message(
        messages.IceCandidates(
            client_id=messages.Id(w.client.client_id), candidates=messages.Candidates([text])
        ), now
    )  # fmt: skip
    core.handle_timeout(now)
    sent = []
    while (transmit := core.poll_transmit()) is not None:
        sent.append(transmit.payload)
    assert sent[0][:2] == bytes((0, CHANNEL_BIND))
    assert 0x40 in [payload[0] for payload in sent]


def test_a_migrated_connection_binds_its_remote_candidates_on_the_new_relay_at_once():
    w = authorized()
    w.candidates(line("relay"))
    w.net.run(SETTLED)
    old, log = serving(w), len(w.net.log)
    w.relays_presence(gone=[old])
    assert serving(w) is not old
    sent = [
        payload for _, _, target, payload in w.net.log[log:] if target == serving(w).v4 and payload[1] == CHANNEL_BIND
    ]
    assert len(sent) == 1
    w.net.run(SETTLED)
    assert gateway_binds(w, serving(w)) == [PEER]


def test_a_migrated_relayed_path_leaves_through_the_new_relay_at_once():
    w = relayed()
    old = serving(w)
    w.relays_presence(gone=[old])
    path = w.gateway.engine._peers[w.connection.handle].path
    assert (path.destination, path.source) == (serving(w).v4, None)
    assert path.channel is not None
    w.relays_presence(gone=[serving(w)])
    assert w.gateway.engine._peers[w.connection.handle].path is None


# -- relayed paths


def test_goodbye_through_a_relay_leaves_before_the_allocation_is_deleted():
    w = relayed()
    w.gateway.core.shutdown(w.net.now)
    w.gateway.drain()
    w.net.run(SETTLED)
    goodbye = b"\x60" + bytes(4) + b"\x08\xff" + bytes(33) + b"\2" + bytes(7)
    assert goodbye in w.client.received
    assert all("gateway" not in relay.users or relay.users["gateway"] not in relay.allocations for relay in w.relays)


@pytest.mark.slow
def test_an_idle_relayed_path_stays_usable_for_hours():
    w = relayed()
    connection = w.connection
    for _ in range(3):
        w.net.run(1800.0)
        # The client may be between the end of its session and the next (5.3), up to 10 s.
        w.net.run_until(w.traffic_flows, limit=11.0)
    assert w.connection is connection


@pytest.mark.slow
def test_one_way_streams_keep_their_channel():
    """The engine carries the data; the core learns of it in time for the refresh at 240 s."""
    w = relayed()
    relay = serving(w)
    binds = len(relay.binds)
    lost = 0
    for _ in range(90):
        w.net.run(10.0)
        lost += not w.answers()
    assert lost == 0
    assert len(relay.binds) - binds >= 3


def test_the_channel_of_a_nominated_pair_is_bound_again_without_any_data():
    """No handshake either: only checks pass, which alone do not keep a channel."""
    w = world(gateway="symmetric", client="symmetric").start()
    w.net.lose = lambda source, destination, payload: b"\1\0\0\0" in (payload[:4], payload[4:8])
    w.authorize()
    w.net.run(1.0)
    peer = w.connection.path.destination
    w.net.parties.remove(w.client)
    assert gateway_binds(w, serving(w)).count(peer) == 1
    w.net.run(245.0)
    assert gateway_binds(w, serving(w)).count(peer) == 2
    w.net.parties.append(w.client)


@pytest.mark.spec("TURN-50")
def test_traffic_survives_the_removal_of_the_selected_relay():
    w = relayed()
    old = serving(w)
    w.relays_presence(*[relay for relay in w.relays if relay is not old], gone=[old])
    w.net.run(3.0)
    assert serving(w) is not old
    assert w.traffic_flows()
    assert len(withdrawn(w.gateway)) == 1


def test_traffic_resumes_when_the_only_relay_restarts():
    w = relayed(relays=1)
    relay = w.relays[0]
    relay.restart("another secret")
    w.relays_presence(relay)
    w.client.node.update_relays((), [relay.credentials(w.client.client_id)], w.net.now)
    w.client.drain()
    w.net.run(1.9)
    assert w.traffic_flows()


def test_traffic_resumes_when_the_relay_forgets_its_allocations():
    """Nothing tells but silence, and the next Refresh would be 240 s away: unanswered data makes both sides ask."""
    w = relayed(relays=1)
    relay = w.relays[0]
    relay.restart("secret")
    start = w.net.now
    w.net.run_until(lambda: w.traffic_flows() or len(relay.allocations) == 2, limit=20.0)
    if w.connection is None or w.client.node.connection("gateway") is None:
        w.connect()
    w.net.run_until(w.traffic_flows, limit=20.0)
    assert w.net.now - start < 40.0


def test_a_client_that_reconnects_over_a_relay_that_forgot_us_gets_through():
    """The gateway itself sends no data, and its channels to the client's relay seem to exist."""
    w = relayed()
    for relay in w.relays:
        relay.restart("secret")
    w.client.node.drop("gateway")
    start = w.net.now
    w.connect(limit=15.0)
    assert w.net.now - start < 3.0
    assert w.traffic_flows()


def test_no_relay_is_asked_while_connections_come_about_as_they_should():
    w = relayed()
    w.authorize(resource=cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6"))
    assert w.reaches(destination=bytes((192, 168, 0, 1)))
    w.net.run(20.0)
    public = w.gateway.nat.public
    assert not [payload for _, source, _, payload in w.net.log if source.ip == public and payload[:2] == b"\0\4"]


def test_a_silent_relay_is_left_for_another():
    w = relayed()
    dead = serving(w)
    dead.alive = False
    w.net.run(60.0)
    assert dead.id not in w.gateway.node.relays
    if w.connection is None or w.client.node.connection("gateway") is None:
        w.connect()
    assert w.traffic_flows()


@pytest.mark.spec("PORTAL-65")
def test_when_the_last_relay_stops_answering_the_portal_is_asked_once_and_its_answer_is_used():
    w = world(relays=1).start()
    w.relays[0].alive = False
    w.net.run(120.0)
    assert len(w.gateway.said(messages.NoRelays)) == 1
    later = memory_relay(w.net, 2)
    w.relays.append(later)
    w.relays_presence(later)
    w.client.node.update_relays((), [later.credentials(w.client.client_id)], w.net.now)
    w.client.drain()
    w.net.run(1.0)
    w.connect()
    assert w.traffic_flows()
    assert len(w.gateway.said(messages.NoRelays)) == 1


def test_the_portal_is_not_asked_when_it_took_the_last_relay_itself():
    w = world().start()
    w.relays_presence(gone=w.relays)
    w.net.run(60.0)
    assert w.gateway.said(messages.NoRelays) == []


@pytest.mark.spec("TURN-55")
def test_the_portal_is_asked_for_relays_once_a_second_at_most():
    w = world(relays=0).start()
    start = w.net.now
    for _ in range(50):
        w.authorize()
        w.net.run(0.1)
    moments = [round(at - start, 3) for at, message in w.gateway.frames if isinstance(message, messages.NoRelays)]
    assert moments == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.01)


@pytest.mark.spec("TURN-54")
def test_ten_minutes_without_the_portal_leave_relayed_traffic_alone():
    w = relayed()
    w.portal_goes()
    for _ in range(10):
        w.net.run(60.0)
        assert w.traffic_flows()
    w.portal_returns()
    w.net.run(5.0)
    assert w.traffic_flows()


def test_data_of_a_relayed_client_is_dropped_and_bound_when_the_channel_was_lost():
    w = relayed()
    w.net.run(5.0)
    relay = serving(w)
    w.relays_presence(gone=w.relays)
    assert w.gateway.core.counters["to client: no channel on the relay"] == 0
    w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000))
    assert w.gateway.core.counters["to client: no channel on the relay"] == 1
    sent = [payload for _, _, target, payload in w.net.log if target == relay.v4][-1]
    assert sent[0] == 0, "the last that the relay hears is the request to delete the allocation"
