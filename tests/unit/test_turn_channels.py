"""Channels: numbers, optimistic sending, refresh, cool-down, refused peers (spec turn 3)."""

from __future__ import annotations

import logging

import pytest
from scripted_relay import (
    ALLOCATE,
    CHANNEL_BIND,
    HOST4,
    REFRESH,
    RELAY_ID,
    Network,
    ScriptedRelay,
    peer,
)

from fzg.turn import CONSUMED, CandidateInvalidated, ChannelChanged, Route, Unwrapped, Use
from fzg.wire.endpoint import Endpoint

PEER6 = Endpoint.parse("[2001:db8:77::1]:52625")
DATA = b"\4\0\0\0" + bytes(60)
CHECK = bytes.fromhex("000100142112a4420102030405060708090a0b0c80220010666972657a6f6e652d67617465776179")


def binds(network: Network) -> list[tuple[int | None, Endpoint | None]]:
    return [(sent.message.channel_number, sent.message.xor_peer_address) for sent in network.requests(CHANNEL_BIND)]


def bound(relay: ScriptedRelay | None = None, *, count: int = 1) -> Network:
    """An active allocation with channels to the first peers."""
    network = Network([relay or ScriptedRelay()]).active()
    for number in range(count):
        network.set.bind_channel(RELAY_ID, peer(number), network.now)
    network.run(0.2)
    network.clear()
    return network


def socket_of(network: Network) -> Endpoint:
    socket = network.relays[0].ipv4
    assert socket is not None
    return socket


@pytest.mark.spec("TURN-35")
def test_numbers_count_up_and_the_4097th_peer_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    relay = ScriptedRelay(delay=0)
    network = Network([relay]).active()
    relay.silent_to = {CHANNEL_BIND}
    with caplog.at_level(logging.WARNING):
        for number in range(4097):
            network.set.bind_channel(RELAY_ID, peer(number), network.now)
        network.drain()
        assert [number for number, _ in binds(network)] == list(range(0x4000, 0x5000))
        for extra in range(10):
            network.set.bind_channel(RELAY_ID, peer(5000 + extra), network.now)
            assert network.set.route(RELAY_ID, peer(5000 + extra), network.now) is None
    assert len(network.requests(CHANNEL_BIND)) == 4096
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.spec("TURN-37")
def test_first_datagram_to_an_unbound_peer_is_lost_and_the_second_is_sent() -> None:
    network = Network([ScriptedRelay()]).active()
    assert network.set.route(RELAY_ID, peer(1), network.now) is None
    route = network.set.route(RELAY_ID, peer(1), network.now)
    assert route == Route(socket_of(network), 0x4000)
    network.drain()
    assert binds(network) == [(0x4000, peer(1))]
    (event,) = network.all(ChannelChanged)
    assert (event.number, event.peer, event.sendable, event.receivable) == (0x4000, peer(1), True, True)
    assert set(event.relay_sockets) == set(network.relays[0].sockets)


@pytest.mark.spec("TURN-38")
def test_peers_are_kept_until_there_is_an_allocation_and_bound_in_order() -> None:
    network = Network([ScriptedRelay()]).connect()
    for number in range(100):
        network.set.bind_channel(RELAY_ID, peer(number), network.now)
        network.set.bind_channel(RELAY_ID, peer(number // 2), network.now)
    network.drain()
    assert binds(network) == []
    network.run(1)
    assert binds(network) == [(0x4000 + number, peer(number)) for number in range(100)]
    assert network.methods().index(CHANNEL_BIND) > max(
        index for index, method in enumerate(network.methods()) if method == ALLOCATE
    )


def test_oldest_of_more_than_100_waiting_peers_is_lost() -> None:
    network = Network([ScriptedRelay()]).connect()
    for number in range(130):
        network.set.bind_channel(RELAY_ID, peer(number), network.now)
    network.run(1)
    assert [address for _, address in binds(network)] == [peer(number) for number in range(30, 130)]


@pytest.mark.spec("TURN-39")
def test_peer_of_a_family_that_was_not_allocated_causes_no_request() -> None:
    network = Network([ScriptedRelay(families="4")]).active()
    network.set.bind_channel(RELAY_ID, PEER6, network.now)
    assert network.set.route(RELAY_ID, PEER6, network.now) is None
    network.run(1)
    assert network.sent == []


def test_peer_of_the_other_family_than_ours_is_bound_when_it_was_allocated() -> None:
    network = Network([ScriptedRelay()]).active()
    network.set.bind_channel(RELAY_ID, PEER6, network.now)
    network.run(1)
    assert binds(network) == [(0x4000, PEER6)]
    relay = network.relays[0]
    network.deliver(relay.channel_data(0x4000, DATA), socket_of(network))
    network.run(0)
    (unwrapped,) = network.unwrapped
    assert isinstance(unwrapped, Unwrapped)
    assert unwrapped.relayed == network.set.status()[0].relayed[1]


@pytest.mark.spec("TURN-40")
class TestRefresh:
    def test_channel_with_traffic_is_bound_again_at_240_seconds_with_the_same_number(self) -> None:
        network = bound()
        begin = network.now
        for _ in range(12):
            network.run(80)
            network.set.note_data(RELAY_ID, 0x4000, sent=True, received=False, now=network.now)
        assert set(binds(network)) == {(0x4000, peer(0))}
        moments = [sent.at - begin for sent in network.requests(CHANNEL_BIND)]
        assert moments == pytest.approx([240, 480, 720, 960], abs=2)
        assert not network.all(ChannelChanged)

    @pytest.mark.parametrize("direction", ["sent", "received"])
    def test_either_direction_is_enough(self, direction: str) -> None:
        network = bound()
        begin = network.now
        if direction == "sent":
            assert network.set.route(RELAY_ID, peer(0), network.now) is not None
        else:
            network.deliver(network.relays[0].channel_data(0x4000, DATA), socket_of(network))
        network.run(300)
        assert [sent.at - begin for sent in network.requests(CHANNEL_BIND)] == pytest.approx([240], abs=2)

    def test_channel_without_traffic_is_never_bound_again(self) -> None:
        network = bound()
        network.run(2000)
        assert binds(network) == []

    def test_ice_checks_are_no_traffic_unless_the_pair_is_nominated(self) -> None:
        network = bound(count=2)
        network.set.nominate(RELAY_ID, peer(1), nominated=True)
        for _ in range(30):
            for number in range(2):
                network.set.route(RELAY_ID, peer(number), network.now, use=Use.CHECK)
                network.deliver(network.relays[0].channel_data(0x4000 + number, CHECK), socket_of(network))
            network.run(10)
        assert binds(network) == [(0x4001, peer(1))]
        network.set.nominate(RELAY_ID, peer(1), nominated=False)
        network.clear()
        network.run(400)
        assert binds(network) == []

    def test_traffic_that_comes_late_refreshes_at_once(self) -> None:
        network = bound()
        network.run(400)
        network.set.note_data(RELAY_ID, 0x4000, sent=False, received=True, now=network.now)
        network.run(1)
        assert binds(network) == [(0x4000, peer(0))]
        assert network.set.route(RELAY_ID, peer(0), network.now) is not None

    def test_idle_channel_lapses_at_600_seconds_and_keeps_its_number_until_900(self) -> None:
        network = bound(count=2)
        begin = network.now
        network.run(601)
        changes = [(event.number, event.sendable, event.receivable) for event in network.all(ChannelChanged)]
        assert changes == [(0x4000, False, False), (0x4001, False, False)]
        assert all(at - begin == pytest.approx(600, abs=0.5) for at, _ in network.events)
        network.clear()
        network.run(298)
        assert network.set.route(RELAY_ID, peer(0), network.now) is None
        network.drain()
        assert binds(network) == [(0x4000, peer(0))]
        assert network.set.route(RELAY_ID, peer(0), network.now) == Route(socket_of(network), 0x4000)
        network.run(2)
        network.relays[0].channels.clear()
        network.clear()
        assert network.set.route(RELAY_ID, peer(1), network.now) is None
        network.drain()
        assert binds(network) == [(0x4002, peer(1))]

    def test_route_does_not_wait_for_the_clock_to_lapse(self) -> None:
        network = bound()
        assert network.set.route(RELAY_ID, peer(0), network.now + 601) is None

    def test_channel_stays_usable_while_its_refresh_is_in_flight(self) -> None:
        network = bound()
        network.set.nominate(RELAY_ID, peer(0), nominated=True)
        network.run(239)
        network.relays[0].silent_to = {CHANNEL_BIND}
        network.run(3)
        assert len(network.requests(CHANNEL_BIND)) > 1
        assert network.set.route(RELAY_ID, peer(0), network.now) is not None

    def test_refresh_that_is_answered_after_the_lapse_makes_the_channel_usable_again(self) -> None:
        network = bound()
        network.run(599)
        network.relays[0].delay = 2.0
        network.set.note_data(RELAY_ID, 0x4000, sent=False, received=True, now=network.now)
        network.run(4)
        assert [event.receivable for event in network.all(ChannelChanged)] == [False, True]
        assert network.set.route(RELAY_ID, peer(0), network.now) == Route(socket_of(network), 0x4000)
        network.drain()
        assert {number for number, _ in binds(network)} == {0x4000}
        network.run(599)
        assert len(network.all(ChannelChanged)) == 2

    def test_refresh_that_fails_removes_the_channel(self) -> None:
        network = bound()
        network.set.nominate(RELAY_ID, peer(0), nominated=True)
        network.relays[0].errors[CHANNEL_BIND] = [(403, True)]
        network.run(245)
        assert [event.sendable for event in network.all(ChannelChanged)] == [False]
        assert network.set.route(RELAY_ID, peer(0), network.now) is None


class TestReceiving:
    @pytest.mark.spec("TURN-42", "CONN-10")
    @pytest.mark.parametrize("surplus", [0, 1, 2, 3])
    def test_payload_is_unwrapped_without_padding(self, surplus: int) -> None:
        network = bound()
        datagram = network.relays[0].channel_data(0x4000, DATA) + bytes(surplus)
        result = network.set.handle_datagram(datagram, socket_of(network), HOST4, network.now)
        relayed = network.set.status()[0].relayed[0]
        assert result == Unwrapped(DATA, peer(0), relayed, RELAY_ID)

    @pytest.mark.spec("TURN-42", "CONN-9")
    @pytest.mark.parametrize("surplus", [-1, 4])
    def test_other_lengths_are_not_channel_data(self, surplus: int) -> None:
        network = bound()
        datagram = network.relays[0].channel_data(0x4000, DATA) + bytes(4)
        assert network.set.handle_datagram(datagram[: 4 + len(DATA) + surplus], socket_of(network), HOST4, 0) is None

    def test_either_socket_of_the_relay_may_send_it(self) -> None:
        network = bound()
        for socket in network.relays[0].sockets:
            datagram = network.relays[0].channel_data(0x4000, DATA)
            assert isinstance(network.set.handle_datagram(datagram, socket, HOST4, network.now), Unwrapped)

    @pytest.mark.spec("CONN-10")
    def test_channel_whose_bind_is_in_flight_receives(self) -> None:
        network = Network([ScriptedRelay()]).active()
        network.relays[0].silent_to = {CHANNEL_BIND}
        network.set.bind_channel(RELAY_ID, peer(0), network.now)
        network.drain()
        datagram = network.relays[0].channel_data(0x4000, DATA)
        assert isinstance(network.set.handle_datagram(datagram, socket_of(network), HOST4, network.now), Unwrapped)

    @pytest.mark.spec("TURN-43")
    @pytest.mark.parametrize("source", ["198.51.100.7:3479", "198.51.100.8:3478", "[2001:db8:9::7]:53"])
    def test_other_addresses_are_not_unwrapped(self, source: str) -> None:
        network = bound()
        datagram = network.relays[0].channel_data(0x4000, DATA)
        assert network.set.handle_datagram(datagram, Endpoint.parse(source), HOST4, network.now) is None

    @pytest.mark.spec("CONN-10")
    def test_unknown_channel_is_dropped_and_counted(self) -> None:
        network = bound()
        datagram = network.relays[0].channel_data(0x4001, DATA)
        assert network.set.handle_datagram(datagram, socket_of(network), HOST4, network.now) is CONSUMED
        assert network.set.counters["unknown channel"] == 1

    def test_lapsed_channel_is_dropped(self) -> None:
        network = bound()
        network.run(600.5)
        datagram = network.relays[0].channel_data(0x4000, DATA)
        assert network.set.handle_datagram(datagram, socket_of(network), HOST4, network.now) is CONSUMED

    def test_empty_payload_is_ignored(self) -> None:
        network = bound()
        datagram = network.relays[0].channel_data(0x4000, b"")
        assert network.set.handle_datagram(datagram, socket_of(network), HOST4, network.now) is CONSUMED


class TestRefusals:
    @pytest.mark.spec("TURN-44")
    def test_forbidden_peer_is_not_asked_for_again_within_a_minute(self) -> None:
        network = Network([ScriptedRelay()]).active()
        network.relays[0].errors[CHANNEL_BIND] = [(403, True)]
        for _ in range(590):
            network.set.route(RELAY_ID, peer(0), network.now, use=Use.CHECK)
            network.run(0.1)
        assert len(network.requests(CHANNEL_BIND)) == 1
        for _ in range(30):
            network.set.route(RELAY_ID, peer(0), network.now, use=Use.CHECK)
            network.run(0.1)
        assert len(network.requests(CHANNEL_BIND)) == 2
        assert [event.sendable for event in network.all(ChannelChanged)] == [True, False, True, False]

    @pytest.mark.parametrize("code", [486, 500, 508])
    def test_other_errors_are_waited_out_for_five_seconds(self, code: int) -> None:
        network = Network([ScriptedRelay()]).active()
        network.relays[0].errors[CHANNEL_BIND] = [(code, True)]
        for _ in range(100):
            network.set.bind_channel(RELAY_ID, peer(0), network.now)
            network.run(0.1)
        assert len(network.requests(CHANNEL_BIND)) == 2

    def test_second_bad_request_is_waited_out_for_a_minute(self) -> None:
        network = Network([ScriptedRelay()]).active()
        network.relays[0].errors[CHANNEL_BIND] = [(400, True)]
        for _ in range(600):
            network.set.bind_channel(RELAY_ID, peer(0), network.now)
            network.run(0.1)
        assert len(network.requests(CHANNEL_BIND)) == 2

    def test_unsupported_family_is_not_asked_for_again_on_this_allocation(self) -> None:
        relay = ScriptedRelay()
        network = Network([relay]).active()
        relay.errors[CHANNEL_BIND] = [(443, True)]
        for _ in range(100):
            network.set.bind_channel(RELAY_ID, peer(0), network.now)
            network.run(3)
        assert len(network.requests(CHANNEL_BIND)) == 1
        relay.errors.clear()
        relay.forget()
        network.set.update([], [], network.now)
        network.run(1)
        network.set.bind_channel(RELAY_ID, peer(0), network.now)
        network.run(1)
        assert len(network.requests(CHANNEL_BIND)) == 2

    def test_refusals_are_bounded(self) -> None:
        relay = ScriptedRelay(delay=0)
        network = Network([relay]).active()
        relay.errors[CHANNEL_BIND] = [(403, True)]
        for number in range(1100):
            network.set.bind_channel(RELAY_ID, peer(number), network.now)
            network.run(0)
        allocation = network.set._allocations[RELAY_ID]
        assert len(allocation._refusals._until) == 1024


@pytest.mark.spec("TURN-58")
class TestManyBinds:
    def test_five_percent_loss_is_survived_by_all(self) -> None:
        network = self.run_with_loss(0.05)
        assert len(network.relays[0].channels) == 500
        assert all(network.set.route(RELAY_ID, peer(number), network.now) for number in range(500))

    def test_thirty_percent_loss_is_survived_by_the_allocation(self) -> None:
        network = self.run_with_loss(0.3)
        network.run(2)
        lost = [number for number in range(500) if not is_bound(network, number)]
        assert 0 < len(lost) < 30
        assert not network.all(CandidateInvalidated)
        network.relays[0].loss = 0
        network.run(6)
        for number in lost:
            assert network.set.route(RELAY_ID, peer(number), network.now) is None
        network.run(1)
        assert all(is_bound(network, number) for number in range(500))

    def run_with_loss(self, loss: float) -> Network:
        network = Network([ScriptedRelay()]).active()
        network.relays[0].loss = loss
        for number in range(500):
            network.set.bind_channel(RELAY_ID, peer(number), network.now)
            network.run(0.002)
        return network.run(7)


def is_bound(network: Network, number: int) -> bool:
    return peer(number) in network.relays[0].channels.values()


def test_numbers_go_on_after_a_new_allocation() -> None:
    network = bound(count=3)
    network.relays[0].forget()
    network.set.update([], [], network.now)
    network.run(1)
    network.clear()
    network.set.bind_channel(RELAY_ID, peer(7), network.now)
    network.drain()
    assert binds(network) == [(0x4003, peer(7))]


def test_lookup_of_a_route_is_no_traffic() -> None:
    network = bound()
    for _ in range(30):
        network.set.route(RELAY_ID, peer(0), network.now, use=Use.LOOKUP)
        network.run(20)
    assert binds(network) == []
    assert network.requests(REFRESH)


@pytest.mark.spec("TURN-54")
def test_allocation_and_channel_live_for_ten_minutes_without_the_portal() -> None:
    network = bound()
    for _ in range(600):
        assert network.set.route(RELAY_ID, peer(0), network.now) is not None
        network.deliver(network.relays[0].channel_data(0x4000, DATA), socket_of(network))
        network.run(1)
    assert len(network.requests(REFRESH)) == 2
    assert len(network.requests(CHANNEL_BIND)) == 2
    assert len(network.unwrapped) == 600
    assert network.events == []
