"""The relay set: portal updates, demultiplexing, sampling, candidates (spec turn 1.9, 2.9, 4)."""

from __future__ import annotations

import logging
from collections import Counter
from random import Random

import pytest
from scripted_relay import (
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    HOST4,
    MAPPED4,
    REFRESH,
    RELAY_ID,
    Network,
    ScriptedRelay,
    peer,
)

from fzg.secret import Secret
from fzg.turn import (
    CONSUMED,
    CandidateAdded,
    CandidateInvalidated,
    ChannelChanged,
    NoRelays,
    Relay,
    RelayRemoved,
    RelaySet,
)
from fzg.turn.rtt import threshold
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint


def two() -> Network:
    return Network([ScriptedRelay("a", number=1), ScriptedRelay("b", number=2)]).active()


def states(network: Network) -> dict[str, str]:
    return {status.id: status.state.value for status in network.set.status()}


class TestUpdate:
    @pytest.mark.spec("TURN-47")
    def test_entries_of_one_id_make_one_relay_in_any_order(self) -> None:
        a, b = ScriptedRelay("a", number=1), ScriptedRelay("b", number=2)
        entries = [
            Relay("a", a.ipv4, None, "user", Secret("first")),
            Relay("b", None, b.ipv6, b.username, Secret(b.password)),
            Relay("a", None, a.ipv6, a.username, Secret(a.password)),
            Relay("b", b.ipv4, None, b.username, Secret(b.password)),
        ]
        network = Network([a, b])
        network.set.update([], entries, network.now)
        network.drain()
        assert Counter(sent.destination for sent in network.sent) == Counter([*a.sockets, *b.sockets])
        network.run(1)
        assert states(network) == {"a": "active", "b": "active"}  # with the credentials of the last entry

    def test_second_address_of_one_family_is_ignored(self, caplog: pytest.LogCaptureFixture) -> None:
        a, b = ScriptedRelay("a", number=1, families="4"), ScriptedRelay("a", number=2, families="4")
        network = Network([a, b])
        network.set.update([], [a.relay, b.relay], network.now)
        network.run(1)
        assert {sent.destination for sent in network.sent} == {a.ipv4}
        assert "two addresses of one family" in caplog.text

    @pytest.mark.spec("TURN-48")
    def test_repeated_relay_is_not_touched(self) -> None:
        network = two()
        network.set.update([], [relay.relay for relay in network.relays], network.now)
        network.run(1)
        assert network.sent == []
        assert network.events == []

    @pytest.mark.spec("TURN-49")
    def test_other_password_replaces_the_relay_from_the_start(self) -> None:
        relay = ScriptedRelay()
        network = Network([relay]).active()
        network.set.bind_channel(RELAY_ID, peer(1), network.now)
        network.run(1)
        network.clear()
        old_key = relay.key
        successor = relay.relay.__class__(RELAY_ID, relay.ipv4, relay.ipv6, relay.username, Secret("another"))
        network.set.update([], [successor], network.now)
        network.drain()
        delete, *bindings = [sent.message for sent in network.sent]
        assert (delete.method, delete.lifetime, delete.verify_integrity(old_key)) == (REFRESH, 0, True)
        assert [message.method for message in bindings] == [BINDING, BINDING]
        assert network.event_types() == ["ChannelChanged"] + ["CandidateInvalidated"] * 2 + ["RelayRemoved"]
        assert network.all(RelayRemoved) == [RelayRemoved(RELAY_ID, replaced=True, failed=False)]
        relay.password = "another"
        network.run(2)
        assert states(network) == {RELAY_ID: "active"}
        assert not network.all(NoRelays)

    def test_other_address_replaces_the_relay(self) -> None:
        relay = ScriptedRelay("a", number=1)
        network = Network([relay, ScriptedRelay("a", number=9)]).connect()
        network.run(1)
        network.clear()
        moved = network.relays[1]
        network.set.update([], [moved.relay], network.now)
        network.run(1)
        assert states(network) == {"a": "active"}
        assert network.set.is_relay(moved.sockets[0])
        assert not network.set.is_relay(relay.sockets[0])

    @pytest.mark.spec("TURN-50")
    def test_disconnected_relay_is_invalidated_at_once_and_told(self) -> None:
        network = two()
        relayed = next(status.relayed for status in network.set.status() if status.id == "a")
        network.set.update(["a", "unknown"], [network.relays[1].relay], network.now)
        network.drain()
        assert network.all(CandidateInvalidated) == [CandidateInvalidated("a", address) for address in relayed]
        assert network.all(RelayRemoved) == [RelayRemoved("a", replaced=False, failed=False)]
        assert {at for at, _ in network.events} == {network.now}
        assert [(sent.method, sent.message.lifetime) for sent in network.sent] == [(REFRESH, 0)]
        assert network.set.sample(network.now) == "b"
        assert all(candidate.relay_id == "b" for candidate in network.set.candidates("b"))
        network.run(20)
        assert len(network.sent) == 1

    def test_portal_that_removes_the_last_relay_needs_no_reminder(self) -> None:
        network = Network([ScriptedRelay()]).active()
        network.set.update([RELAY_ID], [], network.now)
        network.run(1)
        assert not network.all(NoRelays)
        assert len(network.set) == 0

    @pytest.mark.spec("TURN-51")
    def test_unlisted_relay_is_gone_after_a_second_unless_it_answers(self) -> None:
        network = two()
        network.relays[0].silent = True
        begin = network.now
        third = ScriptedRelay("c", number=3)
        network.relays.append(third)
        network.set.update([], [third.relay], begin)
        network.run(3)
        (gone,) = [(at, event) for at, event in network.events if isinstance(event, RelayRemoved)]
        assert gone[1] == RelayRemoved("a", replaced=False, failed=True)
        assert 1.0 <= gone[0] - begin <= 1.2
        assert states(network) == {"b": "active", "c": "active"}
        assert [sent.destination for sent in network.requests(REFRESH)] == [relay.ipv4 for relay in network.relays[:2]]

    def test_unlisted_relay_with_a_refresh_in_flight_has_a_second_left(self) -> None:
        relay = ScriptedRelay()
        network = Network([relay]).active()
        network.run_until(network.start + 300)
        relay.silent = True
        network.run(1.3)
        begin = network.now
        network.clear()
        network.set.update([], [], begin)
        network.run(3)
        assert network.events[-1][0] - begin == pytest.approx(1.0)
        assert len(network.requests(REFRESH)) == 1

    def test_unlisted_suspended_relay_starts_over(self) -> None:
        relay = ScriptedRelay()
        relay.errors[ALLOCATE] = [(486, True)]
        network = Network([relay]).connect().run(2)
        relay.errors.clear()
        network.set.update([], [], network.now)
        network.run(1)
        assert states(network) == {RELAY_ID: "active"}

    def test_unlisted_relay_that_is_still_starting_is_left_alone(self) -> None:
        network = Network([ScriptedRelay()]).connect()
        network.set.update([], [], network.now)
        network.drain()
        assert network.methods() == [BINDING, BINDING]
        network.run(0.06)
        network.set.update([], [], network.now)
        network.drain()
        assert network.methods() == [BINDING, BINDING, ALLOCATE]

    @pytest.mark.spec("TURN-61")
    def test_new_id_at_the_socket_of_a_held_relay_replaces_it(self) -> None:
        relay = ScriptedRelay("old", number=1)
        network = Network([relay]).active()
        relay.restart("new secret")
        relay.id = "new"
        network.set.update([], [relay.relay], network.now)
        network.drain()
        assert states(network) == {"new": "probing"}
        assert network.all(RelayRemoved) == [RelayRemoved("old", replaced=True, failed=False)]
        allocations = {id(one) for one in network.set._by_socket.values()}
        assert allocations == {id(network.set._allocations["new"])}
        network.run(1)
        assert states(network) == {"new": "active"}
        assert not network.all(NoRelays)

    def test_two_listed_relays_on_one_socket_do_not_fight_for_it(self) -> None:
        first, second = ScriptedRelay("a", number=1), ScriptedRelay("b", number=1)
        network = Network([first])
        for _ in range(3):
            network.set.update([], [first.relay, second.relay], network.now)
            network.run(1)
        assert states(network) == {"a": "active"}
        assert len(network.requests(ALLOCATE)) == 2

    @pytest.mark.parametrize("username", ["", "x" * 509])
    def test_relay_with_an_impossible_username_is_ignored(self, username: str) -> None:
        network = Network([ScriptedRelay(username=username)]).connect()
        assert len(network.set) == 0

    def test_relay_without_address_is_ignored(self) -> None:
        network = Network([ScriptedRelay(families="")]).connect()
        assert len(network.set) == 0

    def test_number_of_relays_is_bounded(self) -> None:
        relays = [ScriptedRelay(str(number), number=number, families="4") for number in range(1, 60)]
        network = Network(relays).connect()
        assert len(network.set) == 32

    def test_requests_of_one_update_leave_in_order_of_the_list(self) -> None:
        network = Network([ScriptedRelay("a", number=1), ScriptedRelay("b", number=2)]).connect()
        expected = [socket for relay in network.relays for socket in relay.sockets]
        assert [sent.destination for sent in network.sent] == expected


class TestDemultiplexing:
    def test_datagram_from_elsewhere_goes_on(self) -> None:
        network = two()
        stranger = Endpoint.parse("198.51.100.99:3478")
        datagram = stun.encode(1, 0, bytes(12), [])
        assert network.set.handle_datagram(datagram, stranger, HOST4, network.now) is None

    @pytest.mark.spec("CONN-7")
    def test_stun_from_a_relay_never_reaches_ice(self) -> None:
        network = two()
        check = stun.encode(1, 0, bytes(12), [(0x0006, b"abcd:efgh"), (0x0024, bytes(4))], integrity_key=b"x")
        (socket, _) = network.relays[0].sockets
        assert network.set.handle_datagram(check, socket, HOST4, network.now) is CONSUMED

    @pytest.mark.parametrize("datagram", [b"", b"\1\0\0\0" + bytes(144), b"\4\0\0\0" + bytes(40), b"\x50\0\0\0"])
    def test_other_datagrams_from_a_relay_go_on(self, datagram: bytes) -> None:
        network = two()
        assert network.set.handle_datagram(datagram, network.relays[0].sockets[0], HOST4, network.now) is None

    @pytest.mark.spec("TURN-56", "CONN-11")
    def test_late_datagrams_of_a_removed_relay_are_swallowed_quietly(self, caplog: pytest.LogCaptureFixture) -> None:
        network = two()
        relay = network.relays[0]
        network.set.update(["a"], [network.relays[1].relay], network.now)
        network.drain()
        caplog.clear()
        for socket in relay.sockets:
            assert network.set.is_former(socket)
            for datagram in (stun.encode(1, 2, bytes(12), []), relay.channel_data(0x4000, b"late")):
                assert network.set.handle_datagram(datagram, socket, HOST4, network.now) is CONSUMED
            assert network.set.handle_datagram(b"\4\0\0\0" + bytes(40), socket, HOST4, network.now) is None
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    def test_64_former_sockets_are_remembered(self) -> None:
        relays = [ScriptedRelay(str(number), number=number, families="4") for number in range(1, 71)]
        network = Network(relays)
        for relay in relays:
            network.set.update([], [relay.relay], network.now)
            network.set.update([relay.id], [], network.now)
        known = [network.set.is_former(relay.sockets[0]) for relay in relays]
        assert known == [False] * 6 + [True] * 64

    @pytest.mark.slow
    @pytest.mark.spec("TURN-64")
    def test_a_million_random_datagrams_do_no_harm(self) -> None:
        network = two()
        network.set.bind_channel("a", peer(1), network.now)
        network.run(1)
        rng = Random(64)
        source = network.relays[0].sockets[0]
        templates = [
            stun.encode(method, kind, bytes(12), [(0x0009, bytes(8))]) for method in (1, 3, 4, 9) for kind in (2, 3)
        ]
        templates.append(network.relays[0].channel_data(0x4000, bytes(30)))
        handle = network.set.handle_datagram
        for index in range(1_000_000):
            if index % 4:
                datagram = rng.randbytes(rng.randrange(48))
            else:
                mutable = bytearray(rng.choice(templates))
                mutable[rng.randrange(len(mutable))] = rng.randrange(256)
                datagram = bytes(mutable)
            handle(datagram, source, HOST4, network.now)
        network.drain()
        allocation = network.set._allocations["a"]
        assert len(allocation._transactions) == 0
        assert allocation.channel_count == 1
        assert len(allocation._buffer) == 0
        assert len(network.set._former) == 0
        assert len(network.set.counters) < 20
        assert states(network) == {"a": "active", "b": "active"}


def ready(delays: dict[str, float], *, suspended: tuple[str, ...] = ()) -> Network:
    """Relays with these round-trip times, all allocated except for some."""
    relays = []
    for number, (name, delay) in enumerate(delays.items(), 1):
        relay = ScriptedRelay(name, number=number, families="4", delay=delay)
        if name in suspended:
            relay.errors[ALLOCATE] = [(486, True)]
        relays.append(relay)
    return Network(relays).connect().run(2)


class TestSampling:
    @pytest.mark.parametrize(
        ("milliseconds", "limit"),
        [
            ([20], 30),
            ([20, 31], 30),
            ([20, 30], 30),
            ([30, 200], 45),
            ([25, 25, 25], 31),
            ([10, 12, 14, 90], 19),
            ([30, 35, 200], 50),
            ([30, 30, 30, 31], 36),
            ([30, 40, 50, 60], 75),
        ],
    )
    def test_threshold_over_the_examples_of_the_specification(self, milliseconds: list[int], limit: int) -> None:
        assert threshold([one / 1000 for one in milliseconds]) * 1000 == pytest.approx(limit)

    @pytest.mark.spec("TURN-52")
    def test_near_relays_are_chosen_evenly_and_far_ones_never(self) -> None:
        network = ready({"a": 0.030, "b": 0.031})
        count = Counter(network.set.sample(network.now) for _ in range(10_000))
        assert all(4500 <= count[name] <= 5500 for name in ("a", "b"))
        network = ready({"a": 0.030, "b": 0.200})
        assert {network.set.sample(network.now) for _ in range(10_000)} == {"a"}
        unknown = ScriptedRelay("c", number=3)
        unknown.silent = True
        network.set.update([], [*[relay.relay for relay in network.relays], unknown.relay], network.now)
        assert {network.set.sample(network.now) for _ in range(1000)} == {"a"}

    @pytest.mark.spec("CONN-35")
    def test_far_one_of_three_is_never_chosen(self) -> None:
        network = ready({"a": 0.030, "b": 0.035, "c": 0.200})
        count = Counter(network.set.sample(network.now) for _ in range(1000))
        assert count["c"] == 0
        assert min(count["a"], count["b"]) >= 400

    @pytest.mark.spec("TURN-62")
    def test_active_relay_is_preferred_to_a_suspended_one(self) -> None:
        network = ready({"a": 0.030, "b": 0.030}, suspended=("b",))
        assert {network.set.sample(network.now) for _ in range(1000)} == {"a"}

    def test_suspended_relay_is_better_than_none(self) -> None:
        network = ready({"a": 0.030}, suspended=("a",))
        assert network.set.sample(network.now) == "a"

    def test_nothing_is_chosen_before_the_first_answer(self) -> None:
        network = Network([ScriptedRelay()]).connect()
        assert network.set.sample(network.now) is None
        assert network.set.is_probing
        network.run(1)
        assert network.set.sample(network.now) == RELAY_ID
        assert not network.set.is_probing


class TestCandidates:
    @pytest.mark.spec("TURN-53")
    def test_equal_reflexive_addresses_of_two_relays_are_one_candidate(self) -> None:
        network = two()
        kinds = Counter((one.kind.value, one.address.is_ipv4) for one in network.set.candidates("a"))
        assert kinds[("srflx", True)] == 1
        network.relays[1].mapped[4] = Endpoint.parse("203.0.113.5:41000")
        network.run(30)
        found = network.set.candidates("a")
        mapped = {one.address for one in found if one.kind == "srflx" and one.address.is_ipv4}
        assert mapped == {MAPPED4, Endpoint.parse("203.0.113.5:41000")}

    def test_only_the_selected_relay_gives_relay_candidates(self) -> None:
        network = two()
        for selected in ("a", "b"):
            relays = [one for one in network.set.candidates(selected) if one.kind == "relay"]
            assert {one.relay_id for one in relays} == {selected}
            assert len(relays) == 2
        assert [one for one in network.set.candidates("nobody") if one.kind == "relay"] == []

    def test_best_come_first(self) -> None:
        network = two()
        order = [(one.kind.value, one.address.is_ipv4) for one in network.set.candidates("a")]
        assert order == [
            ("host", False),
            ("host", True),
            ("srflx", False),
            ("srflx", True),
            ("relay", False),
            ("relay", True),
        ]


def test_failed_relay_leaves_the_others_and_asks_for_nothing() -> None:
    network = two()
    network.relays[0].silent = True
    network.run(60)
    assert states(network) == {"b": "active"}
    assert network.all(RelayRemoved) == [RelayRemoved("a", replaced=False, failed=True)]
    assert not network.all(NoRelays)


def test_unknown_relay_has_no_routes() -> None:
    network = two()
    network.set.bind_channel("nobody", peer(1), network.now)
    network.set.note_data("nobody", 0x4000, sent=True, received=True, now=network.now)
    network.set.nominate("nobody", peer(1), nominated=True)
    assert network.set.route("nobody", peer(1), network.now) is None
    network.run(1)
    assert network.sent == []


def test_channels_of_two_relays_are_independent() -> None:
    network = two()
    for name in ("a", "b"):
        network.set.bind_channel(name, peer(1), network.now)
    network.run(1)
    changes = [(event.relay_id, event.number) for event in network.all(ChannelChanged)]
    assert changes == [("a", 0x4000), ("b", 0x4000)]
    assert len(network.requests(CHANNEL_BIND)) == 2
    routes = {network.set.route(name, peer(1), network.now).relay for name in ("a", "b")}  # type: ignore[union-attr]
    assert routes == {relay.ipv4 for relay in network.relays}


def test_empty_set_waits_for_nothing() -> None:
    empty = RelaySet(random=Random(1).randbytes)
    assert empty.poll_timeout() is None
    assert empty.poll_transmit() is None
    assert empty.poll_event() is None
    empty.handle_timeout(5.0)


def test_no_timer_stays_in_the_past_over_a_day() -> None:
    network = two()
    network.set.bind_channel("a", peer(1), network.now)
    network.run(86_400)  # `Network.run` asserts that every deadline moves
    assert states(network) == {"a": "active", "b": "active"}
    assert not network.all(CandidateAdded)
