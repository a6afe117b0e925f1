"""A thousand clients: what a pass costs does not grow with them, and no table grows without bound."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fzg.ice.agent import Agent
from fzg.node.connection import Connection
from fzg.node.timers import Timers
from fzg.portal import messages
from fzg.sansio import Deadline
from fzg.secret import Secret
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.peer import Peer
from tests.unit.gateway_world import (
    ClientParty,
    close_worlds,  # noqa: F401
    world,
)

GATEWAY = Endpoint.of("203.0.113.5", 52625)


def stranger(number):
    """A client without a machine of its own, for authorizations by the thousand."""
    template = ClientParty.__new__(ClientParty)
    octets = number.to_bytes(4)
    template.__dict__.update(
        client_id=f"{number:08x}-2222-4333-8444-555555555555",
        static=SimpleNamespace(public=b"\x09" + octets + bytes(27)),
        preshared_key=bytes(32),
        ipv4=bytes((100, 80)) + octets[2:],
        ipv6=bytes.fromhex("fd002021111100000000000000") + octets[1:],
        gateway_credentials=SimpleNamespace(ufrag=f"g{number:x}", password=Secret("gateway-password-22-ch")),
        credentials=SimpleNamespace(ufrag=f"c{number:x}", password=Secret("client-password-22-chr")),
    )
    return template


def crowded(count):
    """`count` clients whose candidates never answer, besides the first, which is connected."""
    w = world().start()
    w.connect()
    quiet = w.gateway.on_frame
    w.gateway.on_frame = lambda message: None
    for number in range(2, count + 1):
        client = stranger(number)
        w.authorize(client)
        w.candidates(f"candidate:1 1 udp 2130706175 192.0.2.{number % 250} {number} typ host", client=client)
    w.gateway.on_frame = quiet
    return w


def calls_per_pass(w, monkeypatch, seconds):
    """How often connections and their parts are asked to do something, per pass of the core."""
    counts = {"pass": 0}
    for owner, name in [(Connection, "handle_timeout"), (Connection, "settle"), (Connection, "poll_timeout"),
                        (Agent, "handle_timeout"), (Peer, "handle_timeout")]:  # fmt: skip
        counts[f"{owner.__name__}.{name}"] = 0

        def counted(self, *arguments, _key=f"{owner.__name__}.{name}", _original=getattr(owner, name)):
            counts[_key] += 1
            return _original(self, *arguments)

        monkeypatch.setattr(owner, name, counted)
    handle_timeout = w.gateway.core.handle_timeout

    def one_pass(now):
        counts["pass"] += 1
        handle_timeout(now)

    w.gateway.core.handle_timeout = one_pass
    w.net.run(seconds)
    return counts


@pytest.mark.slow
def test_a_pass_costs_as_much_with_a_thousand_idle_clients_as_with_ten(monkeypatch):
    """Pairs that nobody answers are checked every 15 s at first: the passes in between must not touch them."""
    figures = {}
    for count in (10, 1000):
        w = crowded(count)
        w.net.run(20.0)
        with monkeypatch.context() as patch:
            counts = calls_per_pass(w, patch, 0.0)
            for _ in range(50):
                w.gateway.core.handle_timeout(w.net.now)
            figures[count] = {key: value for key, value in counts.items() if key != "pass"}
    assert figures[10] == figures[1000] == dict.fromkeys(figures[10], 0)


@pytest.mark.slow
def test_each_due_connection_is_looked_at_once_per_pass(monkeypatch):
    w = crowded(300)
    counts = calls_per_pass(w, monkeypatch, 60.0)
    checks = sum(len(connection.agent._pairs) for connection in w.gateway.node.connections)
    assert checks >= 300
    # 0, .25, .75, 1.75, 3.75, 7.75, 15.75, then every 15 s, and the timers of WireGuard and idleness.
    assert counts["Connection.handle_timeout"] < 300 * 14


@pytest.mark.slow
def test_tables_shrink_again_when_all_clients_are_gone():
    w = crowded(200)
    for number in range(2, 201):
        w.reject(stranger(number))
    w.net.run(15.0)
    node, core = w.gateway.node, w.gateway.core
    assert [len(table) for table in (node._connections, node._by_index, node._by_username, node._by_public_key)] == [
        1
    ] * 4
    assert len(node._timers) == 1
    assert len(node._timers._heap) < 100
    assert len(core._handles) == len(core._clients) == 1
    assert core.tunnel.client_count == 1
    assert len(node._requests) < 100


def test_timers_forget_what_was_superseded():
    timers = Timers()
    connections = [object(), object()]
    for moment in range(10_000):
        timers.arm(connections[moment % 2], Deadline(20_000.0 - moment, "earlier each time"))
    assert len(timers) == 2
    assert len(timers._heap) < 200
    assert timers.soonest() == Deadline(10_001.0, "earlier each time")
    assert timers.take_due(10_001.0) == [connections[1]]
    assert timers.take_due(10_001.0) == []
    assert timers.take_due(10_002.0) == [connections[0]]
    assert timers.soonest() is None


def test_timers_wake_at_the_latest_deadline_only():
    timers = Timers()
    connection = object()
    timers.arm(connection, Deadline(5.0, "first"))
    timers.arm(connection, Deadline(9.0, "second"))
    assert timers.take_due(8.0) == []
    timers.arm(connection, None)
    assert timers.take_due(99.0) == []
    timers.arm(connection, Deadline(9.0, "again"))
    timers.cancel(connection)
    assert timers.soonest() is None


def test_a_client_that_floods_checks_and_candidates_stays_within_bounds():
    w = world().start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    client = w.client
    key = client.gateway_credentials.password.reveal().encode()
    username = f"{client.gateway_credentials.ufrag}:{client.credentials.ufrag}".encode()
    for number in range(3000):
        request = stun.encode(
            1, 0, number.to_bytes(12), [(6, username), (0x802A, bytes(8)), (0x24, bytes(4))], integrity_key=key
        )
        w.gateway.receive(request, Endpoint.of("192.0.2.77", 1 + number), GATEWAY)
        if number % 100 == 0:
            texts = [
                f"candidate:1 1 udp 1686109951 198.51.100.{i} {1 + number} typ srflx raddr 0.0.0.0 rport 0"
                for i in range(100)
            ]
            w.candidates(*texts)
            w.net.run(0.01)
    w.net.run(20.0)
    agent, node = w.connection.agent, w.gateway.node
    assert agent.pair_count <= 100
    assert agent.remote_candidate_count <= 64
    assert len(node._requests) <= 100 * 10
    assert len(node._timers._heap) <= 200


def test_authorizations_that_wait_are_bounded():
    w = world()
    for relay in w.relays:
        relay.alive = False
    w.start(settle=0.0)
    for number in range(2, 1103):
        w.authorize(stranger(number))
    assert len(w.gateway.core._waiting) == 1000
    assert [type(message) for _, message in w.gateway.frames] == [messages.NoRelays]
    w.net.run(1.5)
    assert len(w.gateway.core._waiting) == 0
    assert len(w.gateway.said(messages.NoRelays)) <= 3


def test_the_deadline_is_the_soonest_of_all_parts_and_moves():
    """What the world asserts after each timer: here for a minute of everything at once."""
    w = world(gateway="symmetric", client="symmetric", ipv6=True).start()
    w.connect()
    previous = None
    for _ in range(2000):
        deadline = w.gateway.core.poll_timeout()
        assert deadline.at >= w.net.now - 1e-9
        assert deadline != previous
        previous = deadline
        w.net.run(deadline.at - w.net.now)


def test_a_deadline_that_does_not_move_after_it_fired_is_an_error(monkeypatch):
    """The contract of all timers; every world checks it after every timer that fires."""
    w = world().start()
    w.connect()
    monkeypatch.setattr(type(w.connection), "handle_timeout", lambda connection, now: None)
    with pytest.raises(AssertionError, match=r"deadline does not move: Deadline\(at=.*, reason='ice check'\)"):
        w.net.run(60.0)
