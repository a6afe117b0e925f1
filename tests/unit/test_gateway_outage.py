"""The portal goes and returns: tunnels run on, candidates wait, and nothing stale is told (spec portal 1.14, 2.10)."""

from __future__ import annotations

import pytest

from fzg.portal import messages
from tests.unit.gateway_world import (
    SETTLED,
    addresses,
    close_worlds,  # noqa: F401
    kinds,
    memory_relay,
    signalled,
    withdrawn,
    world,
)


def authorized(**placement):
    """A connection that a remote candidate keeps; its client hears nothing."""
    w = world(**placement).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    w.net.run(SETTLED)
    return w


def selected(w):
    return next(relay for relay in w.relays if relay.id == w.connection.relay_id)


def relay_dies(w, relay):
    relay.alive = False
    while relay.id in w.gateway.node.relays:
        w.net.run(1.0)


@pytest.mark.spec("PORTAL-38")
@pytest.mark.parametrize("placement", ["public", "symmetric"])
def test_tunnels_run_on_without_the_portal(placement):
    w = world(gateway=placement, client=placement).start()
    w.connect()
    w.portal_goes()
    for _ in range(5):
        assert w.traffic_flows()
        w.net.run(120.0)
        w.net.run_until(w.traffic_flows, limit=11.0)
    w.portal_returns()
    assert w.traffic_flows()


@pytest.mark.spec("CONN-64", "PORTAL-59")
def test_after_an_outage_the_client_hears_what_is_left_of_all_changes():
    """Its relay A dies, then relay B that took over, then C serves: A was told, B never was."""
    w = authorized(relays=3, gateway="nat")
    a = selected(w)
    w.portal_goes()
    told = len(w.gateway.frames)
    relay_dies(w, a)
    b = selected(w)
    assert b is not a
    relay_dies(w, b)
    c = selected(w)
    assert c not in (a, b)
    assert len(w.gateway.frames) == told
    w.portal_returns(relays=[c])
    assert [type(message) for _, message in w.gateway.frames[told:]] == [
        messages.BroadcastIceCandidates,
        messages.BroadcastInvalidatedIceCandidates,
    ]
    (first, added), (gone,) = signalled(w.gateway), withdrawn(w.gateway)
    assert addresses(gone) == [addresses(first)[-1]]
    assert kinds(added) == ["relay"]
    assert addresses(added)[0].startswith(str(c.v4).rpartition(":")[0])
    w.net.run(5.0)
    assert len(w.gateway.frames) == told + 2


@pytest.mark.spec("CONN-64", "PORTAL-60")
def test_a_connection_that_ended_during_the_outage_is_not_mentioned():
    w = authorized(gateway="nat")
    w.portal_goes()
    relay_dies(w, selected(w))
    told = len(w.gateway.frames)
    w.gateway.node.drop(w.client.client_id)
    w.portal_returns()
    w.net.run(5.0)
    assert len(w.gateway.frames) == told


def test_becoming_disconnected_twice_keeps_what_is_held():
    w = authorized(gateway="nat")
    w.portal_goes()
    relay_dies(w, selected(w))
    w.portal_goes()
    w.portal_returns()
    assert len(withdrawn(w.gateway)) == 1


def test_unsent_messages_wait_for_the_next_connection():
    w = world(gateway="nat").start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    (unsent,) = w.gateway.said(messages.BroadcastIceCandidates)
    w.portal_goes()
    w.gateway.core.handle_unsent(unsent)
    w.portal_returns()
    assert w.gateway.said(messages.BroadcastIceCandidates) == [unsent, unsent]


@pytest.mark.spec("PORTAL-60")
def test_unsent_messages_of_a_connection_that_ended_are_dropped():
    w = world(gateway="nat").start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    (unsent,) = w.gateway.said(messages.BroadcastIceCandidates)
    w.reject()
    w.portal_goes()
    w.gateway.core.handle_unsent(unsent)
    w.portal_returns()
    assert w.gateway.said(messages.BroadcastIceCandidates) == [unsent]
    assert w.gateway.node.signalling._changes == {}


def test_relays_lost_during_the_outage_are_not_asked_for_since_init_brings_others():
    """E39."""
    w = world(relays=1).start()
    w.portal_goes()
    relay_dies(w, w.relays[0])
    later = memory_relay(w.net, 2)
    w.portal_returns(relays=[later])
    w.net.run(5.0)
    assert w.gateway.said(messages.NoRelays) == []
    assert later.id in w.gateway.node.relays


def test_an_authorization_that_waits_for_a_relay_is_answered_after_the_return_too():
    w = world(latency=0.3).start(settle=0.0)
    w.authorize()
    w.portal_goes()
    w.net.run(0.1)
    w.portal_returns()
    w.net.run(1.0)
    assert [message.ref for message in w.gateway.said(messages.AuthorizationCreated)] == [w.client.client_id]


def test_the_clock_of_expiries_runs_on_without_the_portal():
    w = world().start()
    start = w.net.now
    w.connect(expires_at=int(1_790_000_000 + start) + 10)
    w.portal_goes()
    assert w.traffic_flows()
    w.net.run(start + 12.0 - w.net.now)
    assert w.connection is None
    assert not w.reaches()


def test_a_forward_step_of_the_wall_clock_ends_authorizations_earlier():
    w = world().start()
    w.connect(expires_at=int(1_790_000_000 + w.net.now) + 1000)
    assert w.traffic_flows()
    w.gateway.core.handle_clock_step(-5000.0, w.net.now)
    w.net.run(3.0)
    assert w.traffic_flows()
    w.gateway.core.handle_clock_step(5000.0, w.net.now)
    w.net.run(3.0)
    assert w.traffic_flows(), "back to where it was"
    w.gateway.core.handle_clock_step(1001.0, w.net.now)
    assert not w.reaches()
    w.net.run(2.0)
    assert w.connection is None
