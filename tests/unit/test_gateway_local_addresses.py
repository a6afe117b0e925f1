"""The host's own addresses as candidates (spec connectivity D3): offered, and answered when a client checks them."""

from __future__ import annotations

import pytest

from fzg.wire import stun
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import (
    addresses,
    close_worlds,  # noqa: F401
    kinds,
    priorities,
    signalled,
    world,
)

SEEN = Endpoint.of("203.0.113.5", 52625)  # from here the relays are reached
SECOND = Endpoint.of("192.168.50.5", 52625)
THIRD = Endpoint.of("2001:db8:50::5", 52625)
STRANGER = Endpoint.of("192.0.2.77", 40000)


@pytest.fixture
def w():
    w = world().start()
    w.gateway.addresses += [SECOND.ip, THIRD.ip]
    w.gateway.on_frame = lambda message: None
    w.gateway.core.handle_local_addresses([SECOND, SEEN, THIRD])
    return w


def check(w, *, key=None, nominate=False):
    """A client's Binding request."""
    ours, theirs = w.client.gateway_credentials, w.client.credentials
    username = f"{ours.ufrag}:{theirs.ufrag}".encode()
    attributes = [(0x06, username), (0x802A, bytes(8)), (0x24, (1862270719).to_bytes(4))]
    attributes += [(0x25, b"")] if nominate else []
    return stun.encode(1, 0, b"transaction1", attributes, integrity_key=key or ours.password.reveal().encode())


def answers(w, to):
    """The addresses from which the check was answered."""
    return [source for _, source, target, payload in w.net.log if target == to and payload[8:20] == b"transaction1"]


def test_they_are_offered_behind_the_one_that_the_relays_saw(w):
    w.authorize()
    (texts,) = signalled(w.gateway)
    hosts = [text for text in texts if kinds([text]) == ["host"]]
    assert addresses(hosts) == [str(THIRD), str(SEEN), str(SECOND)]
    assert priorities(hosts) == [2130706431, 2130706175, 2130705663]
    assert len(set(addresses(texts))) == len(texts)


@pytest.mark.spec("CONN-37")
def test_a_new_one_is_told_with_the_next_authorization_only(w):
    w.authorize()
    fourth = Endpoint.of("192.168.60.5", 52625)
    w.gateway.core.handle_local_addresses([SECOND, SEEN, THIRD, fourth])
    w.net.run(2.0)
    assert len(signalled(w.gateway)) == 1
    w.authorize()
    assert str(fourth) in addresses(signalled(w.gateway)[1])
    assert str(fourth) not in addresses(signalled(w.gateway)[0])


@pytest.mark.spec("CONN-38")
def test_one_that_is_gone_is_offered_no_more_and_not_withdrawn(w):
    w.authorize()
    other = w.add_client()
    w.gateway.core.handle_local_addresses([SEEN])
    w.net.run(2.0)
    w.authorize(other)
    first, second = signalled(w.gateway)
    assert str(SECOND) in addresses(first)
    assert str(SECOND) not in addresses(second)
    assert [type(message).__name__ for _, message in w.gateway.frames] == [
        "AuthorizationCreated", "BroadcastIceCandidates", "AuthorizationCreated", "BroadcastIceCandidates",
    ]  # fmt: skip


@pytest.mark.spec("CONN-3")
@pytest.mark.parametrize("local", [SEEN, SECOND])
def test_a_check_is_answered_from_the_address_it_came_to(w, local):
    w.authorize()
    w.gateway.receive(check(w), STRANGER, local)
    assert answers(w, STRANGER) == [local]


@pytest.mark.spec("CONN-3", "CONN-44")
def test_a_check_at_an_address_that_came_later_is_answered_and_the_path_may_lead_there(w):
    w.gateway.core.handle_local_addresses([SEEN])
    w.authorize()
    w.gateway.receive(check(w, nominate=True), STRANGER, SECOND)
    assert answers(w, STRANGER) == []
    w.gateway.core.handle_local_addresses([SEEN, SECOND])
    w.gateway.receive(check(w, nominate=True), STRANGER, SECOND)
    assert answers(w, STRANGER) == [SECOND]
    w.net.run(0.001)
    assert (w.connection.path.source, w.connection.path.destination) == (SECOND, STRANGER)
    assert len(signalled(w.gateway)) == 1


@pytest.mark.spec("CONN-44")
def test_a_check_at_an_address_that_is_not_the_hosts_causes_silence(w):
    w.authorize()
    for local in ("203.0.113.6", "127.0.0.1"):
        w.gateway.receive(check(w), STRANGER, Endpoint.of(local, 52625))
    w.gateway.receive(check(w), STRANGER, SECOND._replace(port=52626))
    assert answers(w, STRANGER) == []


def test_a_strangers_check_makes_no_candidate_of_an_address(w):
    w.gateway.core.handle_local_addresses([SEEN])
    w.authorize()
    w.gateway.core.handle_local_addresses([SEEN, SECOND])
    before = w.connection.agent.local_candidates()
    w.gateway.receive(check(w, key=b"guessed"), STRANGER, SECOND)
    assert answers(w, STRANGER) == []
    assert w.connection.agent.local_candidates() == before


def test_nothing_is_sent_from_one_that_no_client_contacted(w):
    w.authorize()
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host")
    w.net.run(5.0)
    sources = {source for _, source, target, _ in w.net.log if target == STRANGER}
    assert SEEN in sources
    assert sources.isdisjoint({SECOND, THIRD})


def test_one_that_a_relay_sees_later_is_checked_from_and_not_told_twice(w):
    """The selected relay's next answer arrives at the second address: the host's route to it changed."""
    w.authorize()
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host")
    relay = next(relay for relay in w.relays if relay.id == w.connection.relay_id)
    receive = w.gateway.receive
    w.gateway.receive = lambda payload, source, local: receive(payload, source, SECOND if source == relay.v4 else local)
    w.net.run(60.0)
    assert SECOND in {source for _, source, target, _ in w.net.log if target == STRANGER}
    assert [address for texts in signalled(w.gateway) for address in addresses(texts)].count(str(SECOND)) == 1
