"""Candidate changes become messages: batching, order, and what an outage does to them (spec connectivity 3.18)."""

from __future__ import annotations

import pytest

from fzg.node.signalling import CandidateMessage, Signalling
from fzg.wire.candidate import Candidate, Kind
from fzg.wire.endpoint import Endpoint

ALICE, BOB = "11111111-2222-4333-8444-555555555555", "22222222-2222-4333-8444-555555555555"
TYPE_PREFERENCE = {Kind.HOST: 126, Kind.SRFLX: 100, Kind.RELAY: 2}


def candidate(kind, address, *, priority=None, ufrag="wxyz", foundation="1"):
    if priority is None:
        priority = TYPE_PREFERENCE[kind] << 24 | 65534 << 8 | 255
    return Candidate(foundation, 1, "udp", priority, Endpoint.of(address, 52625), kind, None, ufrag)


A = candidate(Kind.RELAY, "198.51.100.1")
B = candidate(Kind.RELAY, "198.51.100.2")
C = candidate(Kind.RELAY, "198.51.100.3")


def gone(added):
    """The form in which a withdrawn candidate is signalled: no ufrag, another priority (3.19)."""
    return Candidate("2", 1, "udp", 50331391, added.address, added.kind, None, None)


def texts(messages):
    """What was told, by client and direction, addresses only."""
    return [(each.client_id, each.added, [text.split()[4] for text in each.candidates]) for each in messages]


@pytest.mark.spec("CONN-63", "PORTAL-55")
def test_all_additions_of_a_client_are_one_message_best_first_and_each_once():
    signalling = Signalling()
    relay, host = candidate(Kind.RELAY, "198.51.100.1"), candidate(Kind.HOST, "192.0.2.1")
    reflexive = [candidate(Kind.SRFLX, f"203.0.113.{i}", foundation=str(i)) for i in (9, 3)]
    for each in (relay, *reflexive, host, relay, *reflexive):
        signalling.add(ALICE, each)
    (message,) = signalling.drain()
    assert message.client_id == ALICE
    assert message.added
    # Equal priorities by text, and the foundation comes first in it.
    expected = ["192.0.2.1", "203.0.113.3", "203.0.113.9", "198.51.100.1"]
    assert [text.split()[4] for text in message.candidates] == expected
    assert signalling.drain() == []


@pytest.mark.spec("PORTAL-56")
def test_additions_of_all_clients_come_before_invalidations_of_any():
    signalling = Signalling()
    signalling.invalidate(ALICE, gone(A))
    signalling.add(BOB, B)
    signalling.add(ALICE, C)
    signalling.invalidate(BOB, gone(A))
    assert texts(signalling.drain()) == [
        (ALICE, True, ["198.51.100.3"]),
        (BOB, True, ["198.51.100.2"]),
        (ALICE, False, ["198.51.100.1"]),
        (BOB, False, ["198.51.100.1"]),
    ]


@pytest.mark.spec("PORTAL-59", "CONN-64")
def test_while_held_opposites_cancel_and_the_rest_goes_out_on_release():
    signalling = Signalling()
    signalling.hold()
    signalling.add(ALICE, A)
    signalling.add(ALICE, B)
    signalling.invalidate(ALICE, gone(B))
    signalling.invalidate(ALICE, gone(C))
    signalling.hold()
    assert signalling.drain() == []
    signalling.release()
    assert texts(signalling.drain()) == [(ALICE, True, ["198.51.100.1"]), (ALICE, False, ["198.51.100.3"])]


def test_adding_cancels_an_untold_invalidation():
    signalling = Signalling()
    signalling.hold()
    signalling.invalidate(ALICE, gone(C))
    signalling.add(ALICE, C)
    signalling.release()
    assert texts(signalling.drain()) == [(ALICE, True, ["198.51.100.3"])]


@pytest.mark.spec("PORTAL-60")
def test_a_forgotten_client_is_told_nothing():
    signalling = Signalling()
    signalling.hold()
    signalling.add(ALICE, A)
    signalling.invalidate(ALICE, gone(C))
    signalling.add(BOB, B)
    signalling.forget(ALICE)
    signalling.release()
    assert texts(signalling.drain()) == [(BOB, True, ["198.51.100.2"])]


def test_one_address_reported_twice_keeps_the_better_priority():
    signalling = Signalling()
    for priority in (5, 9, 7):
        signalling.add(ALICE, candidate(Kind.SRFLX, "203.0.113.3", priority=priority))
    (message,) = signalling.drain()
    assert [text.split()[3] for text in message.candidates] == ["9"]


def test_what_was_given_back_goes_out_with_what_came_later():
    signalling = Signalling()
    signalling.add(ALICE, A)
    (unsent,) = signalling.drain()
    signalling.hold()
    signalling.give_back(unsent)
    signalling.add(ALICE, B)
    signalling.release()
    assert texts(signalling.drain()) == [(ALICE, True, ["198.51.100.1", "198.51.100.2"])]


def test_an_addition_given_back_after_its_withdrawal_is_told_neither_way():
    signalling = Signalling()
    signalling.add(ALICE, A)
    (unsent,) = signalling.drain()
    signalling.hold()
    signalling.invalidate(ALICE, gone(A))
    signalling.give_back(unsent)
    signalling.release()
    assert signalling.drain() == []


def test_a_withdrawal_given_back_stands_unless_the_candidate_returned():
    signalling = Signalling()
    unsent = CandidateMessage(
        ALICE, added=False, candidates=("candidate:2 1 udp 50331391 198.51.100.1 52625 typ relay",)
    )
    signalling.give_back(unsent)
    assert texts(signalling.drain()) == [(ALICE, False, ["198.51.100.1"])]
    signalling.add(ALICE, A)
    signalling.give_back(unsent)
    assert texts(signalling.drain()) == [(ALICE, True, ["198.51.100.1"])]


def test_messages_given_back_newest_first_have_the_effect_of_their_order():
    signalling = Signalling()
    signalling.add(ALICE, A)
    signalling.add(ALICE, B)
    (first,) = signalling.drain()
    signalling.invalidate(ALICE, gone(A))
    (second,) = signalling.drain()
    signalling.give_back(second)
    signalling.give_back(first)
    assert texts(signalling.drain()) == [(ALICE, True, ["198.51.100.2"])]
