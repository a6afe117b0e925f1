"""What the client is told of our addresses: once, together, best first, only of its relay (spec connectivity 3.16)."""

from __future__ import annotations

import itertools
from ipaddress import ip_address

import pytest

from fzg.portal import messages
from fzg.wire import stun
from tests.unit.gateway_world import (
    addresses,
    close_worlds,  # noqa: F401
    kinds,
    memory_relay,
    priorities,
    signalled,
    withdrawn,
    world,
)

PLACEMENTS = ["public", "nat", "symmetric"]


def authorized(**kinds_of_world):
    """A connection whose client hears nothing, so that only what the gateway says counts."""
    w = world(**kinds_of_world).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    return w


def selected(w):
    return next(relay for relay in w.relays if relay.id == w.connection.relay_id)


def other(w):
    return next(relay for relay in w.relays if relay.id != w.connection.relay_id)


@pytest.mark.spec("CONN-63", "PORTAL-55", "PORTAL-47")
@pytest.mark.parametrize(("placement", "ipv6"), list(itertools.product(PLACEMENTS, [False, True])))
def test_two_relays_give_one_message(placement, ipv6):
    """All candidates follow the acknowledgement in the same pass, or 60 ms later where the path will be relayed."""
    w = world(gateway=placement, ipv6=ipv6).start()
    at = w.net.now
    w.connect()
    w.net.run(60.0)
    told = [(moment, message) for moment, message in w.gateway.frames if not isinstance(message, messages.NoRelays)]
    assert [type(message) for _, message in told] == [messages.AuthorizationCreated, messages.BroadcastIceCandidates]
    assert told[0][0] == at
    assert at <= told[1][0] <= at + (0.06 if placement == "symmetric" else 0.0)
    (texts,) = signalled(w.gateway)
    assert len(set(addresses(texts))) == len(texts)
    assert priorities(texts) == sorted(priorities(texts), reverse=True)
    reflexive = {"public": 0, "nat": 1, "symmetric": 2}[placement]
    expected = ["host"] * (1 + ipv6) + ["srflx"] * reflexive + ["relay"] * (1 + ipv6)
    assert kinds(texts) == expected
    assert all(text.endswith(f" ufrag {w.client.gateway_credentials.ufrag}") for text in texts)


def unanswered(**placement):
    w = world(gateway="symmetric", **placement).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.net.run(0.0)
    assert [type(message) for _, message in w.gateway.frames] == [messages.AuthorizationCreated]
    return w


def test_behind_a_symmetric_nat_candidates_wait_60_ms_for_a_client_that_says_nothing():
    w = unanswered()
    w.net.run(0.0599)
    assert signalled(w.gateway) == []
    w.net.run(0.0002)
    assert len(signalled(w.gateway)) == 1
    w.net.run(9.0)
    assert len(signalled(w.gateway)) == 1


def test_behind_a_symmetric_nat_candidates_go_out_with_the_bind_for_the_clients():
    w = unanswered(latency=0.01)
    sent = []
    w.net.lose = lambda source, destination, payload: sent.append(payload)
    w.candidates("candidate:1 1 udp 37748479 192.0.2.77 40000 typ relay raddr 0.0.0.0 rport 0 ufrag abc1")
    assert len(signalled(w.gateway)) == 1
    assert stun.Method.CHANNEL_BIND in {stun.parse(payload).method for payload in sent}


@pytest.mark.parametrize(
    ("gateway", "address", "waits"),
    [
        ("nat", "2001:db8:7::1", True),
        ("nat", "203.0.113.7", False),
        ("public", "2001:db8:7::1", False),
    ],
)
def test_behind_a_nat_that_cannot_be_opened_in_advance_candidates_wait(gateway, address, waits):
    """The client reached the portal by an IP version that the gateway does not have."""
    w = world(gateway=gateway).start()
    w.gateway.on_frame = lambda message: None
    w.authorize(address=messages.ClientAddress(ip_address(address).packed))
    w.net.run(0.03)
    assert len(signalled(w.gateway)) == (not waits)
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    assert len(signalled(w.gateway)) == 1


def test_a_connection_that_ends_while_its_candidates_wait_is_not_mentioned():
    w = unanswered()
    w.reject()
    w.net.run(1.0)
    assert signalled(w.gateway) == []


def test_candidates_that_waited_into_an_outage_go_out_after_it():
    w = unanswered()
    w.portal_goes()
    w.net.run(1.0)
    assert signalled(w.gateway) == []
    w.portal_returns()
    assert len(signalled(w.gateway)) == 1


@pytest.mark.spec("TURN-53")
def test_one_reflexive_address_seen_by_two_relays_is_told_once_and_two_are_told_both():
    (texts,) = signalled(authorized(gateway="nat").gateway)
    assert kinds(texts).count("srflx") == 1
    (texts,) = signalled(authorized(gateway="symmetric").gateway)
    assert kinds(texts).count("srflx") == 2


@pytest.mark.spec("CONN-37")
def test_relay_addresses_of_other_relays_are_never_told():
    w = authorized(relays=3)
    (texts,) = signalled(w.gateway)
    relayed = [address for address, kind in zip(addresses(texts), kinds(texts), strict=True) if kind == "relay"]
    assert len(relayed) == 1
    assert relayed[0].startswith(str(selected(w).v4).rpartition(":")[0])
    w.net.run(700.0)
    assert len(signalled(w.gateway)) == 1


def test_candidates_of_many_clients_are_one_message_each():
    w = world(gateway="nat").start()
    for _ in range(3):
        w.add_client()
    start = len(w.gateway.frames)
    for client in w.clients:
        w.authorize(client)
    w.net.run(5.0)
    broadcasts = w.gateway.said(messages.BroadcastIceCandidates)
    assert len(w.gateway.frames) - start == 8
    assert [message.client_ids for message in broadcasts] == [(client.client_id,) for client in w.clients]


def test_a_relay_added_later_says_nothing_to_existing_connections():
    w = authorized(gateway="symmetric")
    later = memory_relay(w.net, 2)
    w.relays_presence(*w.relays, later)
    w.net.run(5.0)
    assert len(w.gateway.node.relays.candidates(later.id)) == 5, "host, three reflexive, its relay address"
    assert len(signalled(w.gateway)) == 1
    assert withdrawn(w.gateway) == []


@pytest.mark.parametrize("of_selected", [True, False])
def test_a_later_address_of_the_selected_relay_only_is_one_message_with_only_that(of_selected):
    """The first IPv6 Bindings are lost: IPv6 becomes known with the retransmission, after the authorization."""
    w = world(gateway="nat", ipv6=True)
    silent = list(w.relays)
    w.net.lose = lambda source, destination, payload: destination in [relay.v6 for relay in silent]
    w.start(settle=0.5)
    w.gateway.on_frame = lambda message: None
    w.authorize()
    (first,) = signalled(w.gateway)
    assert kinds(first) == ["host", "srflx", "relay", "relay"]
    silent.remove(selected(w) if of_selected else other(w))
    w.net.run(0.7)
    assert [addresses(texts) for texts in signalled(w.gateway)[1:]] == [["[2001:db8:5::100]:52625"]] * of_selected


def test_a_rebooted_nat_gives_new_addresses_and_takes_only_the_relay_address():
    w = authorized(gateway="nat", relays=1)
    (first,) = signalled(w.gateway)
    w.gateway.nat.rebind()
    w.gateway.nat.taken.add(52625)
    w.net.run(60.0)
    later = [text for texts in signalled(w.gateway)[1:] for text in texts]
    assert sorted(kinds(later)) == ["relay", "srflx"]
    assert not set(addresses(later)) & set(addresses(first))
    assert [addresses(texts) for texts in withdrawn(w.gateway)] == [addresses(first)[-1:]]


@pytest.mark.spec("CONN-36", "TURN-50")
@pytest.mark.parametrize("ipv6", [False, True])
def test_the_removal_of_the_selected_relay_is_one_invalidation_and_one_message_of_only_new_candidates(ipv6):
    w = authorized(gateway="nat", ipv6=ipv6)
    old, new = selected(w), other(w)
    (before,) = signalled(w.gateway)
    w.relays_presence(new, gone=[old])
    at = w.net.now
    assert [type(message) for _, message in w.gateway.frames[2:]] == [
        messages.BroadcastIceCandidates,
        messages.BroadcastInvalidatedIceCandidates,
    ]
    assert {moment for moment, _ in w.gateway.frames[2:]} == {at}
    added, gone = signalled(w.gateway)[1], withdrawn(w.gateway)[0]
    families = 1 + ipv6
    assert kinds(added) == ["relay"] * families
    assert not set(addresses(added)) & set(addresses(before))
    assert sorted(addresses(gone)) == sorted(addresses(before)[-families:])
    assert all("ufrag" not in text for text in gone)
    w.net.run(30.0)
    assert len(w.gateway.frames) == 4
    assert w.connection.relay_id == new.id


@pytest.mark.spec("CONN-36", "TURN-51")
def test_when_no_relay_is_left_a_connection_moves_as_soon_as_one_is_usable():
    w = authorized(gateway="nat")
    w.relays_presence(gone=w.relays)
    w.net.run(1.5)
    assert len(withdrawn(w.gateway)) == 1
    later = memory_relay(w.net, 2)
    start = w.net.now
    w.relays_presence(later)
    w.net.run_until(lambda: len(signalled(w.gateway)) == 2)
    assert w.net.now - start < 0.01, "three round trips of 2 ms"
    w.net.run(5.0)
    _, added = signalled(w.gateway)
    assert kinds(added) == ["relay"]
    assert w.connection.relay_id == later.id


@pytest.mark.spec("TURN-49", "TURN-61")
@pytest.mark.parametrize("same_id", [True, False])
def test_a_relay_that_restarted_under_other_credentials_or_another_id_is_used_again(same_id):
    w = authorized(gateway="nat", relays=1)
    relay = w.relays[0]
    relay.restart("another secret")
    if not same_id:
        relay.id = "7c6a4d1e-90ab-4cde-8f01-23456789abcd"
    w.relays_presence(relay)
    w.net.run(5.0)
    assert len(w.gateway.node.relays) == 1
    assert w.connection.relay_id == relay.id
    (gone,) = withdrawn(w.gateway)
    first, second = signalled(w.gateway)
    assert addresses(gone) == addresses(first)[-1:]
    assert kinds(second) == ["relay"]
    assert len(relay.allocations) == 1


@pytest.mark.spec("TURN-47")
def test_a_repeated_relay_is_left_alone():
    w = authorized()
    sent = len(w.net.log)
    w.relays_presence(*w.relays)
    assert len(w.net.log) == sent
    assert len(w.gateway.frames) == 2


@pytest.mark.spec("CONN-38")
def test_host_and_reflexive_candidates_are_never_invalidated():
    w = authorized(gateway="symmetric", ipv6=True)
    w.gateway.nat.rebind()
    w.net.run(60.0)
    w.relays_presence(gone=w.relays)
    w.net.run(60.0)
    assert withdrawn(w.gateway)
    assert {kind for texts in withdrawn(w.gateway) for kind in kinds(texts)} == {"relay"}


def test_a_repeated_authorization_tells_what_is_current_and_nothing_that_is_gone():
    w = authorized(gateway="nat")
    old, new = selected(w), other(w)
    w.relays_presence(new, gone=[old])
    w.net.run(1.0)
    w.authorize()
    last = signalled(w.gateway)[-1]
    assert kinds(last) == ["host", "srflx", "relay"]
    assert addresses(last)[-1].startswith(str(new.v4).rpartition(":")[0])
    assert priorities(last) == sorted(priorities(last), reverse=True)
