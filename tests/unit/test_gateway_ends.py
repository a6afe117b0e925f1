"""Idle and awake, goodbye in both directions, shutdown (spec connectivity 2.6, 2.12)."""

from __future__ import annotations

import itertools

import pytest

from fzg.node.connection import ConnectionState
from fzg.portal import messages
from tests.unit.gateway_world import (
    CLIENT_ID,
    RESOURCE_ID,
    SERVER,
    SETTLED,
    cidr,
    close_worlds,  # noqa: F401
    udp,
    world,
)

GOODBYE = bytes.fromhex(
    "600000000008ff0000000000000000000000000000000000000000000000000000000000000000000200000000000000"
)


def connected(**kinds):
    w = world(**kinds).start()
    w.connect()
    assert w.traffic_flows()
    return w


def checks_of(w, party, since=0.0):
    """When this party sent connectivity checks to the other's address."""
    other = {w.gateway: w.client, w.client: w.gateway}[party]
    return [
        moment for moment, source, target, payload in w.net.log
        if moment >= since and source.ip in party.addresses and target.ip in other.addresses and payload[:2] == b"\0\1"
    ]  # fmt: skip


def data_sent(w, since):
    return [
        payload for moment, source, _, payload in w.net.log
        if moment >= since and source.ip in w.gateway.addresses and payload[:4] == b"\4\0\0\0"
    ]  # fmt: skip


def intervals(moments):
    return [round(later - sooner, 3) for sooner, later in itertools.pairwise(moments)]


# -- idle


@pytest.mark.spec("CONN-25")
def test_twenty_seconds_without_packets_slow_the_checks_down():
    w = connected()
    w.net.run(100.0)
    direct = sorted(set(checks_of(w, w.gateway, w.net.now - 90)))
    assert w.connection.state is ConnectionState.IDLE
    assert set(intervals(direct[-3:])) == {25.0}


@pytest.mark.spec("CONN-25")
@pytest.mark.parametrize("outwards", [True, False])
def test_one_packet_wakes_the_connection_and_overdue_checks_leave_at_once(outwards):
    w = connected()
    w.net.run(100.0)
    last = checks_of(w, w.gateway)[-1]
    w.net.run(last + 20.0 - w.net.now)
    start = w.net.now
    packet = w.reaches if outwards else w.answers
    assert packet()
    assert w.connection.state is ConnectionState.CONNECTED
    w.net.run(40.0)
    seen = sorted(set(checks_of(w, w.gateway, start)))
    assert seen[0] == pytest.approx(start, abs=0.01), "the last check was 20 s ago, 15 s is the interval"
    assert intervals(seen)[:1] == [15.0]


@pytest.mark.spec("CONN-25")
def test_a_packet_within_the_interval_counts_it_from_the_last_check():
    w = connected()
    w.net.run(100.0)
    last = checks_of(w, w.gateway)[-1]
    w.net.run(last + 5.0 - w.net.now)
    assert w.answers()
    w.net.run(20.0)
    seen = [moment for moment in checks_of(w, w.gateway) if moment > last]
    assert seen[0] == pytest.approx(last + 15.0, abs=0.001)


def test_a_packet_to_a_silent_client_sends_overdue_checks_at_once():
    w = connected()
    w.net.run(100.0)
    w.net.run(checks_of(w, w.gateway)[-1] + 20.0 - w.net.now)
    start = w.net.now
    w.net.lose = lambda source, destination, payload: True
    w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000))
    w.net.run(0.0)
    assert checks_of(w, w.gateway, start)


@pytest.mark.spec("CONN-26")
def test_keepalives_are_no_activity():
    """The packet at 0 makes the other side send a keepalive at 10 s; idle begins at 20 s all the same."""
    w = connected()
    w.net.run(100.0)
    assert w.reaches()
    start = w.net.now - SETTLED
    w.net.run(10.5)
    assert [len(payload) for payload in data_sent(w, start)] == [32]
    w.net.run(start + 19.9 - w.net.now)
    assert w.connection.state is ConnectionState.CONNECTED
    w.net.run(0.2)
    assert w.connection.state is ConnectionState.IDLE


@pytest.mark.spec("CONN-26")
def test_control_packets_are_activity():
    w = connected()
    w.net.run(100.0)
    assert w.connection.state is ConnectionState.IDLE
    unknown_event = GOODBYE[:40] + b"\x77" + GOODBYE[41:]
    w.client.send(unknown_event)
    w.net.run(SETTLED)
    assert w.connection.state is ConnectionState.CONNECTED


def test_steady_traffic_on_flows_keeps_the_connection_active():
    """The engine carries it; the core looks at its times."""
    w = connected()
    for _ in range(100):
        w.client.send(udp(source=w.client.ipv4, destination=SERVER))
        w.net.run(0.5)
        assert w.connection.state is ConnectionState.CONNECTED


# -- goodbye


@pytest.mark.spec("CONN-28", "PORTAL-62")
@pytest.mark.parametrize(("gateway", "client"), [("public", "public"), ("symmetric", "symmetric")])
def test_the_rejection_of_the_last_resource_says_goodbye_once(gateway, client):
    w = connected(gateway=gateway, client=client)
    start, received = w.net.now, len(w.client.received)
    w.reject()
    assert w.connection is None
    w.net.run(30.0)
    assert w.client.received[received:] == [GOODBYE]
    if gateway == "public":
        assert [len(payload) for payload in data_sent(w, start)] == [80]


@pytest.mark.spec("CONN-28")
def test_a_connecting_client_gets_no_goodbye():
    w = world().start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    log = len(w.net.log)
    w.reject()
    assert w.connection is None
    w.net.run(SETTLED)
    ours = [payload for _, source, _, payload in w.net.log[log:] if source.ip in w.gateway.addresses]
    assert [payload for payload in ours if payload[0] == 4] == []


def test_the_expiry_of_the_last_resource_says_goodbye():
    w = world().start()
    start = w.net.now
    w.connect(expires_at=int(1_790_000_000 + start + 5))
    assert w.traffic_flows()
    w.net.run(3.0)
    assert w.connection is not None
    w.net.run(start + 6.5 - w.net.now)
    assert w.connection is None
    assert w.client.received[-1] == GOODBYE


@pytest.mark.spec("CONN-29")
def test_a_received_goodbye_removes_connection_and_authorizations_and_sends_nothing():
    w = connected()
    w.client.send(GOODBYE)
    start = w.net.now
    w.net.run(SETTLED)
    assert w.connection is None
    assert w.gateway.core.tunnel.client_count == 0
    assert data_sent(w, start) == []
    w.net.run(5.0)
    assert data_sent(w, start) == []
    w.client.node.drop("gateway")
    w.connect(resource=cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6"))
    assert not w.reaches(), "the first resource is gone"
    assert w.reaches(destination=bytes((192, 168, 0, 1)))


@pytest.mark.spec("CONN-30")
def test_shutdown_says_goodbye_to_all_connected_clients_at_once():
    w = connected(gateway="nat")
    clients = [w.client, w.add_client(), w.add_client("symmetric"), w.add_client()]
    for client in clients[1:3]:
        w.connect(client)
    w.gateway.on_frame = lambda message: None
    w.authorize(clients[3])
    w.net.run(1.0)
    for client in clients:
        client.received.clear()
    w.gateway.core.shutdown(w.net.now)
    w.gateway.drain()
    w.net.parties.remove(w.gateway)
    w.net.run(SETTLED)
    assert [client.received for client in clients] == [[GOODBYE], [GOODBYE], [GOODBYE], []]
    assert list(w.gateway.node.connections) == []
    w.net.parties.append(w.gateway)


@pytest.mark.spec("TURN-57")
def test_shutdown_deletes_each_allocation_once():
    w = world().start()
    log = len(w.net.log)
    w.gateway.core.shutdown(w.net.now)
    w.gateway.drain()
    sent = [(target, payload[:2]) for _, _, target, payload in w.net.log[log:]]
    assert sent == [(relay.v4, b"\0\4") for relay in w.relays]
    w.net.run(SETTLED)
    assert not any("gateway" in relay.users and relay.users["gateway"] in relay.allocations for relay in w.relays)


def test_nothing_of_a_client_remains_after_its_end():
    w = connected(gateway="symmetric", client="symmetric")
    w.reject()
    w.net.run(15.0)
    node, core = w.gateway.node, w.gateway.core
    tables = (node._connections, node._by_index, node._by_username, node._by_public_key, node._relayed,
              node._homeless, node._requests, core._handles, core._clients, w.gateway.engine._peers,
              w.gateway.engine._sessions)  # fmt: skip
    assert [len(table) for table in tables] == [0] * len(tables)
    assert len(node._timers) == 0
    assert CLIENT_ID not in node.signalling._changes


def test_a_rejection_of_an_unknown_pair_changes_nothing():
    w = connected()
    w.reject(resource_id=RESOURCE_ID[:-1] + "7")
    w.gateway.portal(messages.RejectAccess(client_id=messages.Id(RESOURCE_ID), resource_id=messages.Id(RESOURCE_ID)))
    assert w.traffic_flows()
