"""Start-up, candidates, lifetime and keep-alive of an allocation (spec turn 2.2, 2.3, 2.8, 2.13)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from scripted_relay import (
    ADDITIONAL_ADDRESS_FAMILY,
    ALLOCATE,
    BINDING,
    HOST4,
    HOST6,
    LIFETIME,
    MAPPED4,
    MAPPED6,
    NONCE,
    REALM,
    REFRESH,
    RELAY_ID,
    REQUESTED_TRANSPORT,
    USERNAME,
    Network,
    ScriptedRelay,
    peer,
)

from fzg.turn import CandidateAdded, CandidateInvalidated, NoRelays, RelayRemoved
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint

MESSAGE_INTEGRITY = 0x0008


def times(network: Network, method: int) -> list[float]:
    return [sent.at - network.start for sent in network.requests(method)]


@pytest.mark.spec("TURN-8")
def test_dual_stack_relay_gets_one_binding_on_each_address_at_once() -> None:
    network = Network([ScriptedRelay()]).connect()
    assert [str(sent.destination) for sent in network.sent] == ["198.51.100.7:3478", "[2001:db8:9::7]:3478"]
    assert network.methods() == [BINDING, BINDING]
    assert len({sent.message.transaction_id for sent in network.sent}) == 2
    assert all(sent.message.get(MESSAGE_INTEGRITY) is None for sent in network.sent)


@pytest.mark.spec("TURN-9")
def test_first_binding_success_decides_the_socket_and_a_later_one_only_adds_candidates() -> None:
    relay = ScriptedRelay()
    relay.delay_by_family = {4: 0.5, 16: 0.03}
    network = Network([relay]).connect().run(2)
    assert {str(sent.destination) for sent in network.requests(ALLOCATE)} == {"[2001:db8:9::7]:3478"}
    late = [event for at, event in network.events if at - network.start >= 0.5]
    assert [event.candidate.kind for event in late] == ["host", "srflx"]
    assert [event.candidate.address for event in late] == [HOST4, MAPPED4]
    assert len(network.requests(ALLOCATE)) == 2


@pytest.mark.spec("TURN-10")
def test_silent_relay_is_asked_four_times_and_gone_at_8_seconds() -> None:
    relay = ScriptedRelay()
    relay.silent = True
    network = Network([relay]).connect().run(20)
    for socket in relay.sockets:
        mine = [sent for sent in network.sent if sent.destination == socket]
        assert [sent.at - network.start for sent in mine] == pytest.approx([0, 1, 2.5, 4.75], abs=0.05)
        assert len({sent.payload for sent in mine}) == 1
    assert len(network.sent) == 8
    assert [event for _, event in network.events] == [RelayRemoved(RELAY_ID, replaced=False, failed=True), NoRelays()]
    assert [at - network.start for at, _ in network.events] == pytest.approx([8.125, 8.125], abs=0.1)
    assert network.set.poll_timeout() is None


@pytest.mark.spec("TURN-11")
def test_first_allocate_is_bare_and_the_second_authenticated() -> None:
    network = Network([ScriptedRelay()]).connect().run(1)
    bare, signed = [sent.message for sent in network.requests(ALLOCATE)]
    for attribute in (USERNAME, REALM, NONCE, MESSAGE_INTEGRITY):
        assert bare.get(attribute) is None
        assert signed.get(attribute) is not None
    for message in (bare, signed):
        assert message.get(REQUESTED_TRANSPORT) == bytes.fromhex("11000000")
        assert message.get(ADDITIONAL_ADDRESS_FAMILY) == bytes.fromhex("02000000")
        assert message.software == "firezone-gateway"
        assert message.lifetime is None
    assert bare.transaction_id != signed.transaction_id
    assert signed.verify_integrity(stun.long_term_key("2145916800:salt", "firezone", "password"))


def test_attributes_stand_in_the_order_of_the_reference() -> None:
    network = Network([ScriptedRelay()]).connect().run(1)
    types = []
    datagram = network.requests(ALLOCATE)[1].payload
    offset = 20
    while offset < len(datagram):
        types.append(int.from_bytes(datagram[offset : offset + 2], "big"))
        offset += 4 + (int.from_bytes(datagram[offset + 2 : offset + 4], "big") + 3 & ~3)
    assert types == [0x0019, 0x8000, 0x8022, 0x0006, 0x0014, 0x0015, 0x0008]


@pytest.mark.spec("TURN-12")
@pytest.mark.parametrize(("families", "relayed"), [("46", 2), ("4", 1), ("6", 1)])
def test_candidates_come_as_host_then_reflexive_then_relay(families: str, relayed: int) -> None:
    network = Network([ScriptedRelay(families=families)]).connect().run(1)
    kinds = [event.candidate.kind for event in network.all(CandidateAdded)]
    count = Counter(kinds)
    assert count == {"host": len(families), "srflx": len(families), "relay": relayed}
    assert kinds == ["host", "srflx"] * len(families) + ["relay"] * relayed


def test_candidates_carry_address_base_and_family_mismatch() -> None:
    network = Network([ScriptedRelay()]).connect().run(1)
    found = [
        (one.candidate.kind.value, one.candidate.address, one.candidate.base, one.candidate.family_mismatch)
        for one in network.all(CandidateAdded)
    ]
    relayed4, relayed6 = network.set.status()[0].relayed
    assert found == [
        ("host", HOST4, HOST4, False),
        ("srflx", MAPPED4, HOST4, False),
        ("host", HOST6, HOST6, False),
        ("srflx", MAPPED6, HOST6, False),
        ("relay", relayed4, relayed4, False),
        ("relay", relayed6, relayed6, True),
    ]


def test_mapped_address_of_the_other_family_is_ignored() -> None:
    relay = ScriptedRelay(families="4")
    relay.mapped[4] = MAPPED6
    network = Network([relay]).connect().run(1)
    assert [one.candidate.kind for one in network.all(CandidateAdded)] == ["host", "relay"]


@pytest.mark.spec("TURN-13")
def test_slow_relay_gives_one_allocation_although_requests_were_repeated() -> None:
    relay = ScriptedRelay(delay=1.4)
    network = Network([relay]).connect().run(6)
    assert network.set.status()[0].state.value == "active"
    assert len(network.requests(ALLOCATE)) > 2
    assert len({sent.message.transaction_id for sent in network.requests(ALLOCATE)}) == 2
    assert len(relay.allocations) == 1
    network.run(60)
    assert len(relay.allocations) == 1
    assert not network.all(CandidateInvalidated)


@pytest.mark.spec("TURN-14")
def test_round_trip_time_is_smoothed_by_an_eighth() -> None:
    relay = ScriptedRelay(families="4")
    relay.next_delays = [0.040, 0.200]  # the Binding and the bare Allocate
    network = Network([relay]).connect().run(0.1)
    assert network.set.status()[0].rtt == pytest.approx(0.040)
    network.run(0.15)
    assert network.set.status()[0].rtt == pytest.approx(0.060)


def test_sample_of_a_repeated_request_stands_only_until_a_clean_one() -> None:
    relay = ScriptedRelay(families="4", delay=1.2)
    network = Network([relay]).connect()
    network.run(1.2)
    assert network.set.status()[0].rtt == pytest.approx(1.2)
    relay.delay = 0.03
    network.run(3)
    assert network.set.status()[0].rtt == pytest.approx(0.03)
    relay.delay = 1.5
    network.run(40)
    assert network.set.status()[0].rtt == pytest.approx(0.03)


@pytest.mark.spec("TURN-15")
def test_refresh_goes_out_at_half_the_lifetime_without_allocate_attributes() -> None:
    network = Network([ScriptedRelay()]).connect().run(1000)
    refreshes = network.requests(REFRESH)
    assert [sent.at - network.start for sent in refreshes] == pytest.approx([300, 600, 900], abs=1)
    for sent in refreshes:
        for attribute in (REQUESTED_TRANSPORT, ADDITIONAL_ADDRESS_FAMILY, LIFETIME):
            assert sent.message.get(attribute) is None


@pytest.mark.parametrize(("lifetime", "expected"), [(1, 1.0), (100, 50.0), (3600, 1800.0)])
def test_refresh_follows_the_granted_lifetime_but_is_never_sooner_than_a_second(lifetime: int, expected: float) -> None:
    relay = ScriptedRelay()
    relay.lifetime = lifetime
    network = Network([relay]).connect().run(expected + 0.5)
    first = network.requests(REFRESH)
    if lifetime == 1:  # expires in the same instant, so that the allocation is asked for anew, once a second
        assert len(network.requests(ALLOCATE)) <= 4
    else:
        assert first[0].at - network.start == pytest.approx(expected + 0.12, abs=0.1)


@pytest.mark.spec("TURN-16")
def test_only_one_refresh_is_in_flight() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.silent_to = {REFRESH}
    relay.mapped[4] = Endpoint.parse("203.0.113.5:41000")
    network.run(26)  # the keep-alive reports the new mapping
    assert len(network.requests(REFRESH)) >= 1
    network.set.update([], [], network.now)  # a probe while the Refresh is unanswered
    network.set.update([], [], network.now)
    network.drain()
    ids = {sent.message.transaction_id for sent in network.requests(REFRESH)}
    assert len(ids) == 1


@pytest.mark.spec("TURN-17")
def test_unanswered_refresh_invalidates_relay_candidates_after_8_seconds() -> None:
    relay = ScriptedRelay()
    network, number = with_channel(relay)
    network.run_until(network.start + 299)
    relay.silent_to = {REFRESH}
    network.clear()
    assert relay.ipv4 is not None
    network.deliver(relay.channel_data(number, b"still alive"), relay.ipv4, delay=5)
    network.run(12)
    refresh = [sent for sent in network.requests(REFRESH) if sent.message.lifetime is None]
    assert len({sent.payload for sent in refresh}) == 1
    assert [sent.at - refresh[0].at for sent in refresh] == pytest.approx([0, 1, 2.5, 4.75])
    invalidated = [(at, event) for at, event in network.events if isinstance(event, CandidateInvalidated)]
    assert [event.address.is_ipv4 for _, event in invalidated] == [True, False]
    assert [at - refresh[0].at for at, _ in invalidated] == pytest.approx([8.125, 8.125])
    assert RELAY_ID in network.set  # it relayed data meanwhile, so it is asked for a new allocation
    assert network.requests(ALLOCATE)[0].at == invalidated[0][0]


def test_relay_that_falls_silent_is_gone_8_seconds_after_the_first_unanswered_request() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run_until(network.start + 299)
    relay.silent = True
    network.clear()
    network.run(20)
    assert network.event_types() == ["CandidateInvalidated", "CandidateInvalidated", "RelayRemoved", "NoRelays"]
    assert all(at - network.sent[0].at == pytest.approx(8.125) for at, _ in network.events)


@pytest.mark.spec("TURN-18")
def test_errors_to_refresh_let_the_lifetime_decide() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    relay.errors[REFRESH] = [(500, True)]
    network.run_until(network.start + 599)
    assert not network.all(CandidateInvalidated)
    refreshes = network.requests(REFRESH)
    gaps = [later.at - sooner.at for sooner, later in pairwise(refreshes)]
    assert all(gap >= 10 for gap in gaps)
    assert len(refreshes) >= 25
    network.clear()
    network.run(2)
    (at4, _), (at6, _) = [pair for pair in network.events if isinstance(pair[1], CandidateInvalidated)]
    assert at4 == at6 == pytest.approx(network.start + 600, abs=0.2)
    assert network.requests(ALLOCATE)[0].at == at4


@pytest.mark.spec("TURN-19")
class TestKeepAlive:
    def test_idle_allocation_sends_a_binding_every_25_seconds_to_the_active_socket(self) -> None:
        network = Network([ScriptedRelay()]).active().run_until(1280)
        bindings = network.requests(BINDING)
        assert times(network, BINDING) == pytest.approx([25 * n for n in range(1, 12)], abs=1)
        assert {str(sent.destination) for sent in bindings} == {"198.51.100.7:3478"}

    def test_traffic_in_both_directions_makes_it_unnecessary(self) -> None:
        network, number = with_channel()
        for _ in range(60):
            network.set.note_data(RELAY_ID, number, sent=True, received=True, now=network.now)
            network.run(2)
        assert network.requests(BINDING) == []

    def test_datagrams_through_the_set_count_too(self) -> None:
        relay = ScriptedRelay()
        network, number = with_channel(relay)
        for _ in range(60):
            assert network.set.route(RELAY_ID, peer(1), network.now) is not None
            assert relay.ipv4 is not None
            network.deliver(relay.channel_data(number, b"\4" + bytes(40)), relay.ipv4)
            network.run(2)
        assert len(network.unwrapped) == 60
        assert network.requests(BINDING) == []

    def test_one_way_traffic_does_not(self) -> None:
        network, number = with_channel()
        begin = network.now
        while network.now < begin + 130:
            network.set.note_data(RELAY_ID, number, sent=True, received=False, now=network.now)
            network.run(1)
        gaps = [sent.at - begin for sent in network.requests(BINDING)]
        assert gaps == pytest.approx([25, 50, 75, 100, 125], abs=1)


def with_channel(relay: ScriptedRelay | None = None) -> tuple[Network, int]:
    """An active allocation with one bound channel, to `peer(1)`."""
    network = Network([relay or ScriptedRelay()]).active()
    network.set.bind_channel(RELAY_ID, peer(1), network.now)
    network.run(0.5)
    number = network.requests(9)[0].message.channel_number
    assert number is not None
    network.clear()
    return network, number


@pytest.mark.spec("TURN-20")
def test_new_mapping_is_noticed_and_healed() -> None:
    relay = ScriptedRelay()
    network = Network([relay]).active()
    network.run_until(network.start + 24)
    network.clear()
    relay.mapped[4] = Endpoint.parse("203.0.113.5:41000")
    relay.forget()  # the relay knows no allocation at the new 5-tuple
    network.run(4)
    kinds = [event.candidate.kind for event in network.all(CandidateAdded)]
    assert kinds == ["srflx", "relay", "relay"]
    reported = next(at for at, event in network.events if isinstance(event, CandidateAdded))
    refresh = network.requests(REFRESH)
    assert refresh[0].at - reported <= 0.1
    assert refresh[0].message.lifetime is None
    assert len(network.all(CandidateInvalidated)) == 2
    announced = [at for at, event in network.events if isinstance(event, CandidateAdded)]
    assert announced[-1] - reported <= 1
    assert network.requests(REFRESH)[1:] == []


def test_unchanged_mapping_announces_nothing_again() -> None:
    network = Network([ScriptedRelay()]).active().run(200)
    assert network.events == []


def test_allocate_success_without_usable_address_suspends_but_keeps_the_relay() -> None:
    relay = ScriptedRelay()
    relay.relays = ""
    network = Network([relay]).connect().run(5)
    assert network.set.status()[0].state.value == "suspended"
    assert RELAY_ID in network.set


def test_long_pause_of_the_process_leaves_the_later_attempts_intact() -> None:
    relay = ScriptedRelay(families="4")
    relay.silent = True
    network = Network([relay]).connect()
    network.now += 3600
    network.set.handle_timeout(network.now)
    network.drain()
    assert len(network.set) == 1
    relay.silent = False
    network.run(3)
    assert network.set.status()[0].state.value == "active"


@pytest.mark.spec("TURN-57")
def test_shutdown_deletes_every_active_allocation_once() -> None:
    relays = [ScriptedRelay("a", number=1), ScriptedRelay("b", number=2)]
    network = Network(relays).active()
    suspended = ScriptedRelay("c", number=3)
    suspended.errors[ALLOCATE] = [(486, True)]
    network.relays.append(suspended)
    network.set.update([], [one.relay for one in network.relays], network.now)
    network.run(1)
    network.clear()
    network.set.shutdown(network.now)
    network.run(700)
    assert network.methods() == [REFRESH, REFRESH]
    assert [sent.message.lifetime for sent in network.sent] == [0, 0]
    assert not any(relay.allocations for relay in relays)
    assert network.set.poll_timeout() is None
