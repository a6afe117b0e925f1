"""Challenges, nonces and which responses count (spec turn 2.5, 2.6)."""

from __future__ import annotations

import pytest
from scripted_relay import (
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    HOST4,
    NONCE,
    REALM,
    REFRESH,
    RELAY_ID,
    USERNAME,
    Network,
    ScriptedRelay,
    peer,
)

from fzg.turn import CandidateAdded, CandidateInvalidated, ChannelChanged, NoRelays, RelayRemoved
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint

GONE = [RelayRemoved(RELAY_ID, replaced=False, failed=True), NoRelays()]


def ids(network: Network, method: int) -> list[bytes]:
    return [sent.message.transaction_id for sent in network.requests(method)]


def success(request: stun.Message, *, key: bytes | None) -> bytes:
    """A complete Allocate success."""
    attributes = [
        (0x0016, stun.xor_address(Endpoint.parse("198.51.100.66:50000"), request.transaction_id)),
        (0x000D, stun.uint32(600)),
    ]
    return stun.encode(3, 2, request.transaction_id, attributes, integrity_key=key)


def error(request: stun.Message, code: int, *attributes: tuple[int, bytes], key: bytes | None = None) -> bytes:
    return stun.encode(
        request.method,
        3,
        request.transaction_id,
        [(0x0009, stun.error_code(code, "reason")), *attributes],
        integrity_key=key,
    )


@pytest.mark.spec("TURN-21")
@pytest.mark.parametrize("method", [REFRESH, CHANNEL_BIND])
def test_stale_nonce_is_answered_with_the_new_one(method: int) -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.nonces[HOST4] = b"fresh"
    if method == CHANNEL_BIND:
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
    else:
        network.set.update([], [], network.now)
    network.run(1)
    first, again = network.sent
    assert (first.method, again.method) == (method, method)
    assert again.message.transaction_id != first.message.transaction_id
    assert again.message.nonce != first.message.nonce
    assert again.at - first.at <= 0.1
    assert again.message.verify_integrity(relay.key)


@pytest.mark.spec("TURN-21")
def test_allocate_with_a_stale_nonce_is_repeated_with_the_new_one() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors[REFRESH] = [(437, True)]
    network.set.update([], [], network.now)
    network.run(0.04)  # the 437 is here and Allocate on its way
    network.clear()
    relay.forget()
    relay.silent_to = {ALLOCATE}
    network.run(0.5)
    relay.silent_to = set()
    relay.nonces[HOST4] = b"fresh"
    network.run(2)
    allocates = network.requests(ALLOCATE)
    stale, fresh = allocates[-2:]
    assert fresh.message.nonce != stale.message.nonce
    assert fresh.message.transaction_id != stale.message.transaction_id
    assert fresh.at - stale.at <= 0.1
    assert network.set.status()[0].state.value == "active"


@pytest.mark.spec("TURN-22")
def test_fourth_challenge_in_a_row_ends_the_request() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    relay.always_stale = True
    network.run(0.01)
    network.run(1)
    binds = network.requests(CHANNEL_BIND)
    assert len(binds) == 4
    assert len(set(ids(network, CHANNEL_BIND))) == 4
    network.run(4)
    assert len(network.requests(CHANNEL_BIND)) == 4


@pytest.mark.spec("TURN-22")
def test_allocate_that_is_challenged_for_ever_ends_like_one_without_answer() -> None:
    relay = ScriptedRelay()
    relay.always_stale = True
    network = Network([relay]).connect().run(20)
    assert len(network.requests(ALLOCATE)) == 4
    assert [event for _, event in network.events][-2:] == GONE


@pytest.mark.spec("TURN-23")
def test_refused_credentials_of_allocate_remove_the_relay_with_one_no_relays() -> None:
    relay = ScriptedRelay()
    network = Network([relay])
    relay.password = "another"
    network.set.update([], [ScriptedRelay().relay], network.now)
    relay.wrong_key = ScriptedRelay().key  # so that the refusal itself verifies
    network.run(5)
    assert len(network.requests(ALLOCATE)) == 2
    assert [event for _, event in network.events if not isinstance(event, CandidateAdded)] == GONE
    assert network.set.poll_timeout() is None


@pytest.mark.spec("TURN-23")
def test_refused_credentials_of_refresh_remove_the_relay() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.wrong_key = relay.key
    relay.password = "another"
    network.run(300)
    assert network.event_types() == ["CandidateInvalidated", "CandidateInvalidated", "RelayRemoved", "NoRelays"]


@pytest.mark.parametrize("attributes", [[], [(REALM, b"firezone")], [(NONCE, b"nonce")]])
def test_401_to_channel_bind_without_realm_and_nonce_is_a_refused_peer(attributes: list[tuple[int, bytes]]) -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent_to = {CHANNEL_BIND}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.drain()
    assert relay.ipv4 is not None
    network.deliver(error(network.sent[0].message, 401, *attributes), relay.ipv4)
    network.run(0.1)
    assert RELAY_ID in network.set
    assert [event.sendable for event in network.all(ChannelChanged)] == [True, False]
    network.clear()
    network.set.bind_channel(RELAY_ID, peer(1), network.now + 59)
    network.drain()
    assert network.sent == []


def test_401_to_channel_bind_with_realm_and_nonce_refuses_the_credentials() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent_to = {CHANNEL_BIND}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.drain()
    assert relay.ipv4 is not None
    challenge = [(REALM, b"firezone"), (NONCE, b"nonce")]
    network.deliver(error(network.sent[0].message, 401, *challenge), relay.ipv4)
    network.run(0.1)
    assert RELAY_ID not in network.set


@pytest.mark.spec("TURN-24")
@pytest.mark.parametrize("key", [None, b"another key"])
def test_forged_success_makes_no_allocation_and_the_genuine_one_does(key: bytes | None) -> None:
    relay = ScriptedRelay(families="4")
    network = Network([relay]).connect()
    network.run(0.085)  # the authenticated Allocate is on its way
    request = network.requests(ALLOCATE)[-1].message
    assert request.nonce is not None
    assert relay.ipv4 is not None
    network.set.handle_datagram(success(request, key=key), relay.ipv4, HOST4, network.now)
    network.drain()
    assert network.set.status()[0].relayed == ()
    network.run(0.1)
    assert [str(address) for address in network.set.status()[0].relayed] == ["198.51.100.7:49153"]
    assert ids(network, ALLOCATE)[-1] == request.transaction_id


@pytest.mark.spec("TURN-25")
@pytest.mark.parametrize("method", [ALLOCATE, REFRESH, CHANNEL_BIND])
def test_forged_mismatch_changes_nothing(method: int) -> None:
    relay = ScriptedRelay(families="4")
    network = Network([relay])
    assert relay.ipv4 is not None
    if method == ALLOCATE:
        network.connect().run(0.085)
    else:
        network.active()
        relay.silent_to = {method}
        if method == REFRESH:
            network.set.update([], [], network.now)
        else:
            network.set.bind_channel(RELAY_ID, peer(1), network.now)
        network.drain()
    request = network.requests(method)[-1].message
    network.events.clear()
    count = len(network.sent)
    forged = error(request, 437, key=b"another key")
    assert network.set.handle_datagram(forged, relay.ipv4, HOST4, network.now) is not None
    network.drain()
    assert network.events == []
    assert len(network.sent) == count
    relay.silent_to = set()
    if method != REFRESH:  # the probe is not repeated
        network.run(2)
        assert network.set.status()[0].state.value == "active"
        assert not network.all(CandidateInvalidated)
        assert ids(network, method)[-1] == request.transaction_id


@pytest.mark.spec("TURN-26")
def test_challenge_for_another_realm_is_not_answered() -> None:
    relay = ScriptedRelay()
    relay.realm_in_challenge = "example.org"
    network = Network([relay]).connect().run(20)
    assert len(network.requests(ALLOCATE)) == 1
    assert not any(sent.message.get(USERNAME) for sent in network.sent)
    assert network.set.status()[0].state.value == "suspended"


@pytest.mark.spec("TURN-27")
@pytest.mark.parametrize("request_is", ["refresh", "bind"])
def test_restarted_relay_is_gone_8_seconds_after_the_next_authenticated_request(request_is: str) -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run(50)
    relay.restart("new secret")
    network.clear()
    if request_is == "bind":
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
        limit = 8.2
    else:
        limit = 300
    network.run(limit)
    assert network.requests(BINDING) or request_is == "bind"
    assert [event for _, event in network.events][-2:] == GONE
    asked = next(sent for sent in network.sent if sent.method != BINDING)
    assert network.events[-1][0] - asked.at <= 8.2


@pytest.mark.parametrize("code", [437, 486, 400])
def test_strict_mode_drops_unsigned_errors_other_than_challenges(code: int) -> None:
    relay = ScriptedRelay(families="4")
    network = Network([relay], accept_unsigned_errors=False).active()
    relay.silent_to = {CHANNEL_BIND}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.drain()
    assert relay.ipv4 is not None
    network.deliver(error(network.sent[0].message, code), relay.ipv4)
    network.run(0.1)
    assert [event.sendable for event in network.all(ChannelChanged)] == [True]
    assert network.set.counters["missing integrity"] == 1


@pytest.mark.parametrize("tamper", ["method", "indication", "no error code", "unknown transaction"])
def test_message_that_answers_nothing_is_consumed_without_effect(tamper: str) -> None:
    relay = ScriptedRelay(families="4")
    network = Network([relay]).active()
    relay.silent_to = {CHANNEL_BIND}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.drain()
    transaction = network.sent[0].message.transaction_id
    datagram = {
        "method": stun.encode(4, 2, transaction, [], integrity_key=relay.key),
        "indication": stun.encode(9, 1, transaction, [], integrity_key=relay.key),
        "no error code": stun.encode(9, 3, transaction, [], integrity_key=relay.key),
        "unknown transaction": stun.encode(9, 2, bytes(12), [], integrity_key=relay.key),
    }[tamper]
    assert relay.ipv4 is not None
    network.events.clear()
    assert network.set.handle_datagram(datagram, relay.ipv4, HOST4, network.now) is not None
    network.drain()
    assert network.events == []
    relay.silent_to = set()
    network.run(1.5)
    assert len(set(ids(network, CHANNEL_BIND))) == 1
    assert relay.channels


def test_nonce_survives_the_loss_of_the_allocation() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.forget()
    network.set.update([], [], network.now)
    network.run(1)
    assert all(sent.message.nonce is not None for sent in network.requests(ALLOCATE))
    assert network.set.status()[0].state.value == "active"


def test_newer_nonce_that_another_request_learned_is_used() -> None:
    relay = ScriptedRelay(families="4")
    network = Network([relay]).active()
    relay.silent_to = {CHANNEL_BIND}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.set.bind_channel(RELAY_ID, peer(2), network.now)
    network.drain()
    first, second = [sent.message for sent in network.sent]
    network.clear()
    assert relay.ipv4 is not None
    for request, nonce in ((first, b"newer"), (second, b"older")):
        stale = error(request, 438, (REALM, b"firezone"), (NONCE, nonce), key=relay.key)
        network.set.handle_datagram(stale, relay.ipv4, HOST4, network.now)
    network.drain()
    assert [sent.message.nonce for sent in network.sent] == [b"newer", b"newer"]
