"""What waits in the native engine: control first, clients by turns, bounds, and order within a connection."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from fzg.dataplane.engine import Datagram, InnerPacket, OutboundPacket
from tests.unit.dataplane_world import (
    ACK,
    CLIENT,
    CLIENT4,
    GATEWAY,
    RELAY,
    SERVER4,
    SYN,
    NativeEngine,
    World,
    in_turns,
    tcp,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.skipif(NativeEngine is None, reason="the native engine was not built")

FLOOD, OTHER = 5, 6
SIZE = 1000
TRAIN = 40
STUN = b"\0\1\0\0stun"


class Reads:
    """A TUN that gives what tests put in and takes everything."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.written: list[bytes] = []

    def readv(self, descriptor: int, buffers: Sequence[Any]) -> int:
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, "")
        read = self.waiting.pop(0)
        buffers[0][: len(read)] = read
        return len(read)

    def writev(self, descriptor: int, parts: Sequence[bytes]) -> int:
        self.written.append(b"".join(parts))
        return len(self.written[-1])


@pytest.fixture
def world() -> Iterator[World]:
    world = World(engine=NativeEngine)
    world.handshake(peer=OTHER)
    for peer in (FLOOD, OTHER):
        world.arrive(world.client.seal(peer, b"", 1.0))  # confirms the session
    yield world
    world.close()


def packet(peer: int, number: int) -> bytes:
    return udp(struct.pack(">I", number) + bytes(SIZE), sport=peer)


def number_of(inner: bytes) -> int:
    return int(struct.unpack_from(">I", inner, 28)[0])


def flood(world: World, trains: int, first: int = 0) -> None:
    for train in range(trains):
        numbers = range(first + train * TRAIN, first + (train + 1) * TRAIN)
        messages = [world.sealed(packet(FLOOD, number)) for number in numbers]
        world.udp4.put(b"".join(messages), stride=len(messages[0]))


def turn(world: World) -> list[Any]:
    return list(world.gateway.receive_udp(socket.AF_INET, 10.0))


def test_control_behind_a_flood_is_found_before_the_flood_is_served(world: World):
    flood(world, 50)
    world.udp4.put(STUN)
    items: list[Any] = []
    for _ in range(2):
        items += turn(world)
    assert Datagram(STUN, CLIENT, GATEWAY, 0) in items
    served = sum(isinstance(item, InnerPacket) for item in items)
    assert served < 50 * TRAIN * 0.7
    assert world.gateway.has_backlog(socket.AF_INET)
    while world.gateway.has_backlog(socket.AF_INET):
        served += len(turn(world))
    assert served == 50 * TRAIN
    assert "drop_udp_backlog_full" not in world.counters


def test_a_turn_that_finds_control_is_a_short_one(world: World):
    flood(world, 10)
    world.udp4.put(STUN)
    assert len(turn(world)) <= 1 + 64 + TRAIN


def test_another_client_waits_for_one_portion_of_the_flood_only(world: World):
    flood(world, 12)
    world.udp4.put(world.sealed(packet(OTHER, 1), peer=OTHER), source=RELAY)
    items = turn(world)
    position = next(i for i, item in enumerate(items) if item.peer == OTHER)
    assert position <= -(-65536 // SIZE) + TRAIN


def test_packets_for_the_core_end_a_turn_early_and_count_for_more(world: World):
    flood(world, 12)
    world.udp4.put(world.sealed(packet(OTHER, 1), peer=OTHER), source=RELAY)
    first = turn(world)
    assert len(first) <= 64 + TRAIN
    assert [item.peer for item in first].index(OTHER) <= 2 * TRAIN
    world.gateway.limit(judged=1 << 20, turn=1 << 20)
    assert len(turn(world)) == 12 * TRAIN + 1 - len(first)


def test_packets_for_hosts_that_the_core_judges_end_a_turn_early(world: World, monkeypatch: pytest.MonkeyPatch):
    device = Reads()
    world.play_tun(monkeypatch, device)
    device.waiting = [bytes(10) + udp(b"", source=SERVER4, destination=CLIENT4, sport=n) for n in range(1, 301)]
    device.waiting.append(bytes(10) + udp(b"", source=SERVER4, destination=bytes((100, 64, 0, 10)), sport=1))
    turns = [list(world.gateway.receive_tun(10.0))]
    while world.gateway.has_backlog(None):
        turns.append(list(world.gateway.receive_tun(10.0)))
    assert max(map(len, turns)) == 64
    assert sum(map(len, turns)) == 301
    (position,) = (i for i, items in enumerate(turns) if any(item.packet[19] == 10 for item in items))
    assert position <= 1


def test_a_flood_is_bounded_and_costs_nobody_else_anything(world: World):
    world.gateway.limit(backlog=1 << 20, turn=TRAIN)
    items: list[Any] = []
    for round_ in range(30):
        flood(world, 10, first=round_ * 10 * TRAIN)
        world.udp4.put(world.sealed(packet(OTHER, round_), peer=OTHER))
        items += turn(world)
    while world.gateway.has_backlog(socket.AF_INET):
        items += turn(world)
    assert [number_of(item.packet) for item in items if item.peer == OTHER] == list(range(30))
    numbers = [number_of(item.packet) for item in items if item.peer == FLOOD]
    assert numbers == sorted(numbers)
    assert len(numbers) + world.counters["drop_udp_backlog_full"] == 30 * 10 * TRAIN


def test_a_flood_of_tiny_datagrams_is_bounded_by_what_it_costs_to_keep(world: World):
    world.gateway.limit(backlog=100_000, turn=1)
    for _ in range(4):
        for number in range(2000):
            world.udp4.put(world.sealed(udp(sport=number)))
        while world.udp4.arrivals:
            turn(world)
    assert world.counters["drop_udp_backlog_full"] > 8000 - 2000


def test_clients_that_share_a_train_keep_their_order(world: World):
    world.gateway.set_channel(RELAY, 0x4005, usable=True)
    world.gateway.set_channel(RELAY, 0x4006, usable=True)
    for round_ in range(20):
        frames = []
        for number in range(round_ * 10, round_ * 10 + 10):
            peer = OTHER if number % 3 else FLOOD
            message = world.sealed(packet(peer, number), peer=peer)
            frames.append(struct.pack(">HH", 0x4000 + peer, len(message)) + message)
        world.udp4.put(b"".join(frames), stride=len(frames[0]), source=RELAY)
    items = turn(world)
    while world.gateway.has_backlog(socket.AF_INET):
        items += turn(world)
    for peer in (FLOOD, OTHER):
        numbers = [number_of(item.packet) for item in items if item.peer == peer]
        assert numbers == [number for number in range(200) if (OTHER if number % 3 else FLOOD) == peer]


def test_a_long_part_of_a_train_is_kept_too(world: World):
    world.gateway.set_channel(RELAY, 0x4005, usable=True)
    frames = []
    for number in range(40):
        message = world.sealed(packet(FLOOD, number)) if number < 30 else bytes(SIZE + 64)
        frames.append(struct.pack(">HH", 0x4005 if number < 30 else 0x4F00, len(message)) + message)
    world.udp4.put(b"".join(frames), stride=len(frames[0]), source=RELAY)
    items = in_turns(world.gateway, socket.AF_INET)
    assert [item.payload for item in items if isinstance(item, Datagram)] == frames[30:]
    assert [number_of(item.packet) for item in items if isinstance(item, InnerPacket)] == list(range(30))


def test_what_waits_is_decided_when_it_is_served(world: World):
    world.allow(packet(FLOOD, 0), inbound=True)
    flood(world, 30)
    assert turn(world) == []
    world.gateway.revoke(FLOOD)
    items = []
    while world.gateway.has_backlog(socket.AF_INET):
        items += turn(world)
    assert len(items) >= 15 * TRAIN
    assert all(isinstance(item, InnerPacket) for item in items)


def test_what_waits_for_a_session_that_ended_is_for_the_node(world: World):
    flood(world, 14)
    turn(world)
    world.gateway.remove_peer(FLOOD)
    items = []
    while world.gateway.has_backlog(socket.AF_INET):
        items += turn(world)
    assert items
    assert all(isinstance(item, Datagram) for item in items)


def test_towards_clients_too_the_other_waits_for_one_portion_only(world: World):
    tun = Reads()
    world.gateway.play_tun(tun)
    other = bytes((100, 64, 0, 77))
    for number in range(500):
        tun.waiting.append(bytes(10) + udp(os.urandom(SIZE), source=SERVER4, destination=CLIENT4, sport=number))
    tun.waiting.append(bytes(10) + udp(source=SERVER4, destination=other))
    items = list(world.gateway.receive_tun(10.0))
    assert OutboundPacket(udp(source=SERVER4, destination=other)) in items[: -(-65536 // SIZE) + 2]
    while world.gateway.has_backlog(None):
        items += world.gateway.receive_tun(10.0)
    ports = [struct.unpack_from(">H", item.packet, 20)[0] for item in items if item.packet[16:20] == CLIENT4]
    assert ports == list(range(500))


def test_the_backlog_of_one_direction_is_not_that_of_the_other(world: World):
    flood(world, 14)
    turn(world)
    assert world.gateway.has_backlog(socket.AF_INET)
    assert not world.gateway.has_backlog(None)


def of_flow(number: int) -> bytes:
    """A packet of one connection."""
    return udp(struct.pack(">I", number) + bytes(SIZE))


def train(world: World, packets: list[bytes], *, peer: int = FLOOD) -> None:
    messages = [world.sealed(each, peer=peer) for each in packets]
    world.udp4.put(b"".join(messages), stride=len(messages[0]))


def test_one_packet_of_a_flow_asks_for_the_verdict_and_the_others_wait_for_it(world: World):
    world.allow(of_flow(0), inbound=True, until=9.0)
    train(world, [of_flow(number) for number in range(TRAIN)])
    (item,) = turn(world)
    assert number_of(item.packet) == 0
    assert world.gateway.has_backlog(socket.AF_INET)
    world.allow(of_flow(0), inbound=True)
    assert turn(world) == []
    assert not world.gateway.has_backlog(socket.AF_INET)
    assert sum(len(write[38:]) // (SIZE + 4) for write in world.written()) == TRAIN - 1
    assert world.counters["udp_rx_packets"] == TRAIN
    assert "drop_replayed" not in world.counters


def test_without_a_verdict_the_others_follow_in_the_next_turn(world: World):
    for round_ in range(3):
        train(world, [of_flow(number) for number in range(TRAIN)])
        items = turn(world)
        assert len(items) == (TRAIN if round_ else 1)
        items += in_turns(world.gateway, socket.AF_INET)
        assert [number_of(item.packet) for item in items] == list(range(TRAIN))


def test_other_clients_do_not_wait_for_it(world: World):
    other = udp(bytes(SIZE), sport=OTHER)
    world.allow(other, inbound=True, peer=OTHER)
    train(world, [of_flow(number) for number in range(TRAIN)])
    train(world, [other] * TRAIN, peer=OTHER)
    assert len(turn(world)) == 1
    assert sum(len(write[38:]) // SIZE for write in world.written()) == TRAIN


def test_a_packet_that_waits_is_dropped_when_its_client_is_gone(world: World):
    train(world, [of_flow(number) for number in range(TRAIN)])
    assert len(turn(world)) == 1
    world.gateway.remove_peer(FLOOD)
    items = in_turns(world.gateway, socket.AF_INET)
    assert len(items) == TRAIN - 1
    assert all(isinstance(item, Datagram) for item in items)
    assert world.written() == []


def test_a_revocation_while_packets_wait_holds_for_them(world: World):
    world.allow(of_flow(0), inbound=True, until=9.0)
    train(world, [of_flow(number) for number in range(TRAIN)])
    assert len(turn(world)) == 1
    world.allow(of_flow(0), inbound=True)
    world.gateway.revoke(FLOOD)
    assert len(in_turns(world.gateway, socket.AF_INET)) == TRAIN - 1
    assert world.written() == []


def test_a_replayed_packet_of_a_flow_that_waits_is_dropped_once_and_for_all(world: World):
    messages = [world.sealed(of_flow(number)) for number in range(4)]
    world.udp4.put(b"".join([*messages, *messages]), stride=len(messages[0]))
    items = in_turns(world.gateway, socket.AF_INET)
    assert [number_of(item.packet) for item in items] == list(range(4))
    assert world.counters["drop_replayed"] == 4


def test_opening_and_closing_segments_wait_for_nothing(world: World):
    train(world, [tcp(bytes(SIZE), flags=SYN, seq=number) for number in range(TRAIN)])
    assert len(turn(world)) == TRAIN


def test_of_a_super_packet_one_segment_asks_for_the_verdict(world: World):
    device = Reads()
    world.gateway.play_tun(device)
    world.gateway.set_path(FLOOD, None, CLIENT, None)
    world.gateway.use_session(FLOOD, 0x1000 * FLOOD + 1)
    whole = tcp(os.urandom(100 * TRAIN), source=SERVER4, destination=CLIENT4, seq=7, flags=ACK)
    vnet = struct.pack("=BBHHHH", 1, 1, 0, 100, 20, 16)
    device.waiting = [vnet + whole, bytes(10) + tcp(b"last", source=SERVER4, destination=CLIENT4, flags=ACK)]
    (item,) = world.gateway.receive_tun(10.0)
    assert world.gateway.has_backlog(None)
    world.allow(whole, inbound=False, token=3)
    assert world.gateway.receive_tun(10.0) == []
    assert not world.gateway.has_backlog(None)
    packets = [item.packet, *world.to_client()]
    assert b"".join(each[40:] for each in packets) == whole[40:] + b"last"
    assert [struct.unpack_from(">I", each, 24)[0] for each in packets[:-1]] == [7 + 100 * n for n in range(TRAIN)]
    (report,) = world.gateway.sweep(10.0)
    assert (report.packets, report.payload_bytes) == (TRAIN, 100 * (TRAIN - 1) + 4)
    assert world.counters["tun_rx_packets"] == TRAIN + 1


def test_a_packet_that_waits_gets_its_checksum_once(world: World):
    device = Reads()
    world.gateway.play_tun(device)
    world.gateway.set_path(FLOOD, None, CLIENT, None)
    world.gateway.use_session(FLOOD, 0x1000 * FLOOD + 1)
    whole = udp(b"some bytes", source=SERVER4, destination=CLIENT4)
    pseudo = SERVER4 + CLIENT4 + struct.pack(">HH", 17, len(whole) - 20)
    total = sum(struct.unpack(">6H", pseudo))
    partial = whole[:26] + struct.pack(">H", (total & 0xFFFF) + (total >> 16)) + whole[28:]
    device.waiting = [struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 6) + partial] * 3
    items = world.gateway.receive_tun(10.0)
    world.allow(whole, inbound=False)
    assert world.gateway.receive_tun(10.0) == []
    assert [item.packet for item in items] + world.to_client() == [whole] * 3


def test_a_held_lane_is_served_next_and_only_after_the_verdict(world: World):
    """Another client's flood behind it does not come first."""
    world.gateway.limit(turn=TRAIN - 1)
    train(world, [of_flow(number) for number in range(TRAIN)])
    assert len(turn(world)) == 1
    world.allow(of_flow(0), inbound=True)
    other = udp(bytes(SIZE), sport=OTHER)
    world.allow(other, inbound=True, peer=OTHER)
    for _ in range(4):
        train(world, [other] * TRAIN, peer=OTHER)
    turn(world)
    assert {write[10 + 20 : 10 + 22] for write in world.written()} == {of_flow(0)[20:22]}


def test_what_is_held_counts_against_the_bound(world: World):
    world.gateway.limit(backlog=200_000)
    train(world, [of_flow(number) for number in range(TRAIN)])
    assert len(turn(world)) == 1
    for _ in range(10):
        train(world, [of_flow(number) for number in range(TRAIN)])
    items = in_turns(world.gateway, socket.AF_INET)
    assert world.counters["drop_udp_backlog_full"] + 1 + len(items) == 11 * TRAIN
