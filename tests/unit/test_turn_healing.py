"""Errors to Allocate, mismatches, time-outs and suspension (spec turn 2.7, 2.10 to 2.12)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from scripted_relay import (
    ADDITIONAL_ADDRESS_FAMILY,
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    HOST4,
    REFRESH,
    RELAY_ID,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    Network,
    ScriptedRelay,
    peer,
)

from fzg.turn import CandidateAdded, CandidateInvalidated, ChannelChanged, NoRelays
from fzg.wire.endpoint import Endpoint

DELETE = "delete"


def steps(network: Network) -> list[int | str]:
    """Our requests by method, deletes apart from other Refreshes, without retransmissions."""
    seen: set[bytes] = set()
    found: list[int | str] = []
    for sent in network.sent:
        if sent.payload[0] < 4 and sent.message.transaction_id not in seen:
            seen.add(sent.message.transaction_id)
            found.append(DELETE if sent.method == REFRESH and sent.message.lifetime == 0 else sent.method)
    return found


def state(network: Network) -> str:
    return network.set.status()[0].state.value


@pytest.mark.spec("TURN-28")
def test_mismatch_to_allocate_deletes_and_allocates_again() -> None:
    relay = ScriptedRelay(families="4")
    relay.allocations[HOST4] = {}  # left over from before a restart of ours
    network = Network([relay]).connect().run(1)
    assert steps(network) == [BINDING, ALLOCATE, ALLOCATE, DELETE, ALLOCATE]
    assert state(network) == "active"


def test_server_that_checks_for_a_mismatch_first_is_healed_from_a_bare_start() -> None:
    relay = ScriptedRelay(families="4")
    relay.allocations[HOST4] = {}
    relay.mismatch_before_authentication = True
    relay.linger = 1.0
    network = Network([relay]).connect().run(5)
    assert steps(network) == [BINDING, ALLOCATE, DELETE, DELETE, ALLOCATE, ALLOCATE]
    before, after = network.requests(ALLOCATE)[-2:]
    assert after.at - before.at == pytest.approx(1.24, abs=0.01)  # a round trip and the pause
    assert state(network) == "active"


@pytest.mark.spec("TURN-29")
def test_mismatch_to_refresh_allocates_without_a_delete() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.forget()
    network.set.update([], [], network.now)
    network.run(1)
    assert steps(network) == [REFRESH, ALLOCATE]
    assert network.event_types() == ["CandidateInvalidated"] * 2 + ["CandidateAdded"] * 2
    assert state(network) == "active"


@pytest.mark.spec("TURN-30")
def test_mismatch_to_channel_bind_allocates_and_binds_the_peer() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.forget()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(1)
    assert steps(network) == [CHANNEL_BIND, ALLOCATE, CHANNEL_BIND]
    assert [sent.message.xor_peer_address for sent in network.requests(CHANNEL_BIND)] == [peer(1), peer(1)]
    assert len(network.all(CandidateInvalidated)) == 2
    assert list(relay.channels.values()) == [peer(1)]


@pytest.mark.parametrize("code", [437, 441])
@pytest.mark.parametrize("method", [REFRESH, CHANNEL_BIND])
def test_relay_that_forgets_each_allocation_at_once_is_left_alone_ever_longer(method: int, code: int) -> None:
    """As behind an address that several servers share: one grants, another does not know of it."""
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run(60)
    relay.errors[method] = [(code, True)]
    network.clear()
    suspended: list[float] = []
    for second in range(240):
        before = state(network)
        if before == "active":
            if method == REFRESH:
                network.set.update([], [], network.now)
            else:
                network.set.bind_channel(RELAY_ID, peer(second), network.now)
        relay.forget()
        network.run(1)
        if state(network) == "suspended" and before != "suspended":
            suspended.append(network.now)
    assert len(network.requests(ALLOCATE)) <= 10
    assert [later - sooner for sooner, later in pairwise(suspended)] == pytest.approx([30, 60, 120], abs=3)
    assert len(network.all(CandidateInvalidated)) <= 16
    relay.errors.clear()
    network.run(300)
    assert state(network) == "active"


@pytest.mark.parametrize("method", [REFRESH, CHANNEL_BIND])
def test_relay_that_is_silent_about_a_lost_allocation_is_asked_for_another(method: int) -> None:
    """As pion is. A Binding tells it from a relay that is gone, whatever else is under way (DEV 14)."""
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run(30)
    relay.forget()
    relay.silent_to = {REFRESH, CHANNEL_BIND}
    network.clear()
    if method == REFRESH:
        network.set.doubt(RELAY_ID, network.now)
    else:
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
    while not network.requests(ALLOCATE):
        network.run(0.1)
        assert network.now - network.start < 60
    relay.silent_to = set()
    network.run(1)
    assert state(network) == "active"
    assert network.all(NoRelays) == []
    assert list(relay.channels.values()) == ([] if method == REFRESH else [peer(1)])


def test_silent_relay_is_removed_as_soon_as_ever_although_a_binding_asks_whether_it_lives() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent = True
    network.set.doubt(RELAY_ID, network.now)
    network.run(8.1)
    assert state(network) == "active"
    network.run(0.1)
    assert RELAY_ID not in network.set


@pytest.mark.spec("TURN-32")
def test_relay_that_says_mismatch_to_everything_is_left_alone_after_three_deletes() -> None:
    relay = ScriptedRelay()
    for method in (ALLOCATE, REFRESH, CHANNEL_BIND):
        relay.errors[method] = [(437, True)]
    relay.errors_before_authentication = True
    network = Network([relay]).connect()
    while state(network) != "suspended":
        network.run(0.1)
        assert network.now - network.start < 60
    done = steps(network)
    assert done.count(DELETE) == 3
    assert done.count(ALLOCATE) == 13
    network.clear()
    network.run(29)
    assert network.sent == []


@pytest.mark.spec("TURN-33")
@pytest.mark.parametrize("code", [300, 403, 486, 500])
def test_refused_allocation_keeps_the_relay_and_is_tried_again_later(code: int) -> None:
    relay = ScriptedRelay()
    relay.errors[ALLOCATE] = [(code, True)]
    network = Network([relay]).connect().run(1)
    assert state(network) == "suspended"
    suspended = network.requests(ALLOCATE)[-1].at + relay.delay
    candidates = network.set.candidates(RELAY_ID)
    assert [one.kind for one in candidates] == ["host", "host", "srflx", "srflx"]
    network.clear()
    network.run_until(1400)
    probes = [sent.at for sent in network.requests(BINDING) if sent.destination == relay.ipv4]
    pauses = [30, 60, 120]
    expected = suspended
    for at, pause in zip(probes, pauses, strict=True):
        expected += pause
        assert at == pytest.approx(expected, abs=1)
    assert len(candidates) == len(network.set.candidates(RELAY_ID))
    assert not network.all(CandidateInvalidated)
    relay.errors.clear()
    network.run(250)
    assert state(network) == "active"


def test_suspended_relay_is_never_bound_on() -> None:
    relay = ScriptedRelay()
    relay.errors[ALLOCATE] = [(486, True)]
    network = Network([relay]).connect()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(1)
    network.set.bind_channel(RELAY_ID, peer(2), network.now)
    assert network.set.route(RELAY_ID, peer(3), network.now) is None
    relay.errors.clear()
    network.run(40)
    assert state(network) == "active"
    assert network.requests(CHANNEL_BIND) == []


@pytest.mark.spec("TURN-34")
def test_dual_allocation_without_capacity_falls_back_to_one_family() -> None:
    relay = ScriptedRelay()
    relay.errors[ALLOCATE] = [(508, True)]
    relay.error_forever = False
    network = Network([relay]).connect().run(1)
    forms = [
        (message.get(REQUESTED_TRANSPORT), message.get(ADDITIONAL_ADDRESS_FAMILY))
        for message in (sent.message for sent in network.requests(ALLOCATE))
    ]
    transport, dual = bytes.fromhex("11000000"), bytes.fromhex("02000000")
    assert forms == [(transport, dual), (transport, dual), (transport, None)]
    assert state(network) == "active"


def test_ladder_goes_to_ipv6_only_after_440() -> None:
    relay = ScriptedRelay()
    relay.errors[ALLOCATE] = [(440, True), (440, True)]
    relay.error_forever = False
    network = Network([relay])
    network.connect()
    relay.errors[ALLOCATE].append((440, True))
    network.run(0.1)
    network.run(1)
    allocates = [sent.message for sent in network.requests(ALLOCATE)]
    assert [message.get(REQUESTED_ADDRESS_FAMILY) for message in allocates][:4] == [None, None, None, b"\2\0\0\0"]
    for message in allocates:
        assert message.get(REQUESTED_ADDRESS_FAMILY) is None or message.get(ADDITIONAL_ADDRESS_FAMILY) is None
    assert len(allocates) == 4
    assert state(network) == "suspended"


def test_ipv6_only_server_without_additional_family_is_reached_by_the_ladder() -> None:
    relay = ScriptedRelay()
    relay.relays = "6"
    relay.errors[ALLOCATE] = [(440, True)]
    relay.error_forever = False
    network = Network([relay]).connect().run(1)
    assert state(network) == "active"
    assert [address.is_ipv4 for address in network.set.status()[0].relayed] == [False]
    network.clear()
    relay.forget()
    network.set.update([], [], network.now)
    network.run(1)
    (again,) = network.requests(ALLOCATE)  # the form that worked is where the next attempt begins
    assert again.message.get(REQUESTED_ADDRESS_FAMILY) == b"\2\0\0\0"


@pytest.mark.parametrize(
    ("code", "unknown", "allocates"),
    [(420, (0x8000,), 3), (420, (0x0019,), 2), (405, (), 2), (442, (), 2), (400, (), 3)],
)
def test_allocate_that_the_server_does_not_understand_removes_the_relay(
    code: int, unknown: tuple[int, ...], allocates: int
) -> None:
    relay = ScriptedRelay()
    relay.errors[ALLOCATE] = [(code, True)]
    relay.unknown_attributes = unknown
    network = Network([relay]).connect().run(5)
    assert len(network.requests(ALLOCATE)) == allocates
    assert network.event_types()[-2:] == ["RelayRemoved", "NoRelays"]


def test_unsigned_400_after_a_success_is_no_reason_to_give_the_relay_up() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.forget()
    relay.errors[ALLOCATE] = [(400, False)]
    network.set.update([], [], network.now)
    network.run(2)
    assert state(network) == "suspended"


@pytest.mark.parametrize("method", [REFRESH, CHANNEL_BIND])
def test_420_to_other_requests_removes_the_relay(method: int) -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors[method] = [(420, True)]
    if method == REFRESH:
        network.set.update([], [], network.now)
    else:
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(1)
    assert RELAY_ID not in network.set
    assert network.all(NoRelays)


@pytest.mark.parametrize("method", [REFRESH, CHANNEL_BIND])
def test_five_tuple_of_other_credentials_is_waited_for_without_a_delete(method: int) -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors = {REFRESH: [(441, True)], CHANNEL_BIND: [(441, True)], ALLOCATE: [(441, True)]}
    if method == REFRESH:
        network.set.update([], [], network.now)
    else:
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(9)
    allocates = [sent.at for sent in network.requests(ALLOCATE)]
    gaps = [later - sooner for sooner, later in pairwise(allocates)]
    assert gaps[:3] == pytest.approx([1.24, 2.44, 4.84], abs=0.01)
    assert DELETE not in steps(network)[:5]
    relay.errors.clear()
    relay.forget()
    network.run(10)
    assert state(network) == "active"


@pytest.mark.spec("TURN-60")
def test_relay_that_ignores_one_channel_bind_keeps_its_allocation_and_other_channels() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.drop_channels = {0x4001}
    begin = network.now
    for number in range(3):
        network.set.bind_channel(RELAY_ID, peer(number), begin)
    network.run(20)
    changes = [(event.number, event.sendable) for event in network.all(ChannelChanged)]
    assert changes == [(0x4000, True), (0x4001, True), (0x4002, True), (0x4001, False)]
    assert network.events[-1][0] - begin == pytest.approx(8.125)
    assert network.set.route(RELAY_ID, peer(0), network.now) is not None
    assert network.set.route(RELAY_ID, peer(2), network.now) is not None
    assert not network.all(CandidateInvalidated)
    assert [sent.message.lifetime for sent in network.requests(REFRESH)] == [None]


def test_peer_of_a_given_up_bind_keeps_its_number() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.drop_channels = {0x4000}
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(2)
    network.set.bind_channel(RELAY_ID, peer(2), network.now)
    network.run(6.2)
    network.set.bind_channel(RELAY_ID, peer(1), network.now)  # refused for five seconds
    network.run(6)
    relay.drop_channels = set()
    network.clear()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(1)
    assert [sent.message.channel_number for sent in network.requests(CHANNEL_BIND)] == [0x4000]
    assert network.set.route(RELAY_ID, peer(1), network.now) is not None


def test_silent_relay_is_removed_for_one_unanswered_channel_bind() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent = True
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(8.2)
    assert RELAY_ID not in network.set
    kinds = network.event_types()
    assert kinds == ["ChannelChanged"] * 2 + ["CandidateInvalidated"] * 2 + ["RelayRemoved", "NoRelays"]


def test_refresh_that_is_challenged_and_then_unanswered_leads_to_a_new_allocation() -> None:
    """As with pion, which forgot both nonce and allocation: it is alive, for it challenged."""
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.forget()
    relay.nonces.clear()
    network.set.update([], [], network.now)
    network.run(0)
    relay.silent_to = {REFRESH}
    network.run(8.5)
    assert steps(network) == [REFRESH, REFRESH, ALLOCATE]
    assert state(network) == "active"


@pytest.mark.spec("TURN-63")
def test_recently_used_peers_are_bound_again_after_healing() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    for number in range(10):
        network.set.bind_channel(RELAY_ID, peer(number), network.now)
    network.run(1)
    for number in range(5):
        assert network.set.route(RELAY_ID, peer(number), network.now) is not None
        network.run(0.1)
    relay.forget()
    network.clear()
    network.set.update([], [], network.now)
    network.run(2)
    assert steps(network) == [REFRESH, ALLOCATE] + [CHANNEL_BIND] * 5
    bound = [sent.message.xor_peer_address for sent in network.requests(CHANNEL_BIND)]
    assert bound == [peer(number) for number in (4, 3, 2, 1, 0)]


@pytest.mark.spec("TURN-45")
def test_bad_request_to_channel_bind_of_a_vanished_allocation_heals() -> None:
    relay = ScriptedRelay()
    relay.bind_without_allocation = 400  # as coturn answers
    network = Network([relay]).active()
    relay.forget()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(1)
    assert steps(network) == [CHANNEL_BIND, REFRESH, ALLOCATE, CHANNEL_BIND]
    assert list(relay.channels.values()) == [peer(1)]
    assert network.set.route(RELAY_ID, peer(1), network.now) is not None


def test_bad_requests_ask_for_the_allocation_at_most_every_ten_seconds() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors[CHANNEL_BIND] = [(400, True)]
    for number in range(20):
        network.set.bind_channel(RELAY_ID, peer(number), network.now)
        network.run(1)
    assert 2 <= len(network.requests(REFRESH)) <= 3


def test_expired_allocation_is_asked_for_at_once() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors[REFRESH] = [(500, True)]
    network.run_until(network.start + 599)
    relay.forget()
    network.clear()
    network.run(2)
    assert network.event_types() == ["CandidateInvalidated"] * 2 + ["CandidateAdded"] * 2
    assert [event.candidate.kind for event in network.all(CandidateAdded)] == ["relay", "relay"]


def test_binding_errors_of_both_families_remove_the_relay_at_once() -> None:
    relay = ScriptedRelay()
    relay.errors[BINDING] = [(500, False)]
    network = Network([relay]).connect().run(0.1)
    assert network.event_types() == ["RelayRemoved", "NoRelays"]


def test_binding_error_of_one_family_leaves_the_other() -> None:
    relay = ScriptedRelay()
    relay.errors[BINDING] = [(500, False), (200, False)]
    relay.error_forever = True
    relay.delay_by_family = {4: 0.02, 16: 0.2}
    network = Network([relay])
    network.set.update([], [relay.relay], network.now)
    relay.errors[BINDING] = [(500, False)]
    first = network.set.poll_transmit()
    assert first is not None
    for answer in relay.handle(first.payload, HOST4, network.now):
        network.deliver(answer, first.destination, 0.02)
    relay.errors.clear()
    network.run(2)
    assert state(network) == "active"
    assert {str(sent.destination) for sent in network.requests(ALLOCATE)} == {"[2001:db8:9::7]:3478"}


def test_keep_alive_that_is_not_answered_removes_the_relay_although_nothing_else_was_asked() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent = True
    network.run(40)
    asked = network.requests(BINDING)[0].at
    assert network.events[-1][0] - asked == pytest.approx(8.125)
    assert network.event_types()[-1] == "NoRelays"


def test_refresh_that_ends_the_allocation_leads_to_a_new_one() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.lifetime = 0
    network.set.update([], [], network.now)
    network.run(0.06)
    relay.lifetime = 600
    relay.forget()
    network.run(1)
    assert network.event_types() == ["CandidateInvalidated"] * 2 + ["CandidateAdded"] * 2
    assert state(network) == "active"


def test_mapping_that_changes_while_a_refresh_is_in_flight_causes_another() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run(24)
    relay.mapped[4] = Endpoint.parse("203.0.113.5:41000")
    network.run_until(network.start + 25.1)  # the keep-alive is on its way
    network.clear()
    relay.next_delays = [0.2]
    network.set.update([], [], network.now)  # a Refresh that is answered after the news
    network.run(2)
    assert steps(network) == [REFRESH, REFRESH]
    first, second = network.requests(REFRESH)
    assert second.at - first.at == pytest.approx(0.2)


def test_answer_after_the_end_of_a_request_is_ignored() -> None:
    relay = ScriptedRelay(families="4")
    relay.next_delays = [8.2, 8.2, 8.2, 8.2]
    network = Network([relay]).connect().run(30)
    assert network.event_types() == ["RelayRemoved", "NoRelays"]
    assert RELAY_ID not in network.set


def test_delete_that_is_refused_goes_on_with_allocate() -> None:
    relay = ScriptedRelay(families="4")
    relay.allocations[HOST4] = {}
    relay.errors[REFRESH] = [(500, True)]
    network = Network([relay]).connect().run(0.3)
    assert steps(network) == [BINDING, ALLOCATE, ALLOCATE, DELETE, ALLOCATE]
    relay.forget()
    network.run(2)
    assert state(network) == "active"


def test_channel_bind_challenged_for_another_realm_is_over() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.nonces.clear()
    relay.realm_in_challenge = "example.org"
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(3)
    assert steps(network) == [CHANNEL_BIND]
    assert [event.sendable for event in network.all(ChannelChanged)] == [True, False]
