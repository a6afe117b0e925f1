"""Order and batches of what goes out by UDP, and what becomes of errors (spec tunnel 9.6, turn 6.2)."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane import udp_offload
from fzg.dataplane.pure import PureEngine
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import (
    CLIENT,
    CLIENT4,
    CLIENT6,
    GATEWAY,
    RELAY,
    SERVER4,
    SERVER6,
    FakeUdp,
    World,
    each_engine,  # noqa: F401
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("each_engine")

OTHER = Endpoint(bytes((198, 51, 100, 8)), 1234)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def transmit(
    world: World, *payloads: bytes, destination: Endpoint = CLIENT, source: bytes | None = None, ecn: int = 0
) -> None:
    for payload in payloads:
        world.gateway.transmit(Transmit(destination, payload, source, ecn))


def filled(count: int, size: int = 100) -> list[bytes]:
    return [bytes((i % 256,)) * size for i in range(count)]


def test_equal_datagrams_to_one_destination_become_one_call_and_a_shorter_one_ends_it(world: World):
    payloads = [*filled(5), b"short", *filled(2), b"longer" * 100]
    transmit(world, *payloads)
    assert world.gateway.flush()
    assert world.udp4.sizes == [6, 2, 1]
    assert [sent.segment for sent in world.udp4.sent] == [100, 100, 0]
    assert world.udp4.datagrams == payloads


def test_source_and_codepoint_separate_batches_but_never_change_the_order(world: World):
    a = GATEWAY.ip
    for payload, source, ecn in (
        (b"1", a, 0),
        (b"2", a, 0),
        (b"3", None, 0),
        (b"4", None, 2),
        (b"5", a, 0),
        (b"6", a, 0),
    ):
        transmit(world, payload, source=source, ecn=ecn)
    world.gateway.flush()
    assert [(b"".join(sent.payloads), sent.source, sent.ecn) for sent in world.udp4.sent] == [
        (b"12", a, 0), (b"3", None, 0), (b"4", None, 2), (b"56", a, 0),
    ]  # fmt: skip


def test_destinations_are_batched_apart(world: World):
    for payload in filled(3):
        transmit(world, payload, destination=CLIENT)
        transmit(world, payload, destination=OTHER)
    world.gateway.flush()
    assert world.udp4.sizes == [3, 3]
    assert [sent.address for sent in world.udp4.sent] == [(CLIENT.host, CLIENT.port), (OTHER.host, OTHER.port)]


def test_clients_behind_one_relay_share_a_batch(world: World):
    world.handshake(peer=6)
    packets = [udp(bytes(100), source=SERVER4, destination=CLIENT4, dport=port) for port in (1, 2)]
    for peer, packet in zip((5, 6), packets, strict=True):
        world.gateway.set_path(peer, None, RELAY, 0x4000 + peer)
        world.allow(packet, inbound=False, peer=peer)
        world.read(packet)
    world.gateway.flush()
    assert world.udp4.sizes == [2]
    assert [datagram[:4] for datagram in world.udp4.datagrams] == [b"\x40\x05\0\xa0", b"\x40\x06\0\xa0"]


def test_datagrams_of_the_core_keep_their_place_among_data(world: World):
    packet = udp(source=SERVER4, destination=CLIENT4)
    world.allow(packet, inbound=False)
    transmit(world, b"bind", source=GATEWAY.ip)
    world.read(packet)
    transmit(world, b"check", source=GATEWAY.ip)
    world.read(packet)
    world.gateway.flush()
    assert [len(datagram) for datagram in world.udp4.datagrams] == [4, 61, 5, 61]


@pytest.mark.parametrize("destination", [CLIENT, Endpoint(SERVER6, 1)])
def test_a_call_carries_at_most_49_full_datagrams_and_64_small_ones(world: World, destination: Endpoint):
    fake = world.udp4 if destination is CLIENT else world.udp6
    transmit(world, *filled(100, 1316), destination=destination)
    transmit(world, *filled(65, 10), destination=destination)
    world.gateway.flush()
    assert fake.sizes == [49, 49, 3, 64]
    assert all(sum(map(len, sent.payloads)) <= 65535 - 68 for sent in fake.sent)
    assert all(len(sent.payloads) <= 64 for sent in fake.sent)
    assert fake.datagrams == [*filled(100, 1316), *filled(65, 10)]


@pytest.mark.parametrize(("destination", "limit"), [(CLIENT, 65535 - 68), (Endpoint(SERVER6, 1), 65535 - 48)])
@pytest.mark.parametrize("surplus", [0, 1])
def test_a_call_carries_as_many_bytes_as_a_datagram_holds_and_not_one_more(
    world: World, destination: Endpoint, limit: int, surplus: int
):
    fake = world.udp4 if destination is CLIENT else world.udp6
    last = limit - 60 * 1080 + surplus
    transmit(world, *filled(60, 1080), bytes(last), destination=destination)
    world.gateway.flush()
    assert fake.sizes == ([61] if surplus == 0 else [60, 1])


def test_a_datagram_above_our_largest_size_is_the_kernels_to_judge(world: World):
    world.udp4.refuse = lambda sent: errno.EMSGSIZE if len(sent.payloads[0]) > 1400 else 0
    transmit(world, bytes(1317), bytes(9000), b"after")
    assert world.gateway.flush()
    assert world.udp4.datagrams == [bytes(1317), b"after"]
    assert world.counters["drop_udp_send_emsgsize"] == 1


def test_ipv6_names_source_and_codepoint_too(world: World):
    transmit(world, b"x", destination=Endpoint(SERVER6, 9), source=CLIENT6, ecn=1)
    world.gateway.flush()
    (sent,) = world.udp6.sent
    assert (sent.source, sent.ecn, sent.address) == (CLIENT6, 1, ("2001:db8::5", 9))


@pytest.mark.parametrize("why", ["switched off", "old kernel"])
def test_without_segmentation_each_datagram_has_a_call(why: str):
    world = World(segmentation=why != "switched off")
    if why == "old kernel":
        world.udp4 = FakeUdp(knows_segments=False)
        world.attach(socket.AF_INET, world.udp4, port=1)
    transmit(world, *filled(3))
    world.gateway.flush()
    assert [sent.segment for sent in world.udp4.sent] == [0, 0, 0]
    assert world.udp4.datagrams == filled(3)
    world.close()


@pytest.mark.spec("TURN-59")
@pytest.mark.parametrize("code", [0, errno.EIO])
def test_channel_data_for_three_peers_over_one_relay_arrives_complete_and_in_order(world: World, code: int):
    world.udp4.refuse = lambda sent: code if sent.segment else 0
    for peer in (5, 6, 7):
        if peer != world.PEER:
            world.handshake(peer=peer)
        world.gateway.set_path(peer, None, RELAY, 0x4000 + peer)
    for number in range(4):
        for peer in (5, 6, 7):
            packet = udp(bytes([number]) * 100, source=SERVER4, destination=CLIENT4, dport=peer)
            world.allow(packet, inbound=False, peer=peer)
            world.read(packet)
    world.gateway.flush()
    arrived = world.udp4.datagrams
    for peer in (5, 6, 7):
        mine = [datagram[4:] for datagram in arrived if datagram[:2] == bytes((0x40, peer))]
        counters = [int.from_bytes(message[8:16], "little") for message in mine]
        assert counters == [0, 1, 2, 3]
        assert all(len(message) == 128 + 32 for message in mine)
    assert len(arrived) == 12
    assert (max(world.udp4.sizes) == 1) == bool(code)


# Errors.


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EMSGSIZE])
def test_a_refused_batch_is_resent_singly_and_segmentation_stays_off(
    world: World, code: int, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    refused = []

    def refuse(sent):
        if sent.segment:
            refused.append(sent)
            return code
        return 0

    world.udp4.refuse = refuse
    transmit(world, *filled(3), b"end", *filled(4))
    assert world.gateway.flush()
    transmit(world, *filled(2))
    assert world.gateway.flush()
    assert world.udp4.datagrams == [*filled(3), b"end", *filled(4), *filled(2)]
    assert len(refused) == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EMSGSIZE])
def test_segmentation_survives_when_the_datagrams_are_refused_by_themselves(world: World, code: int):
    world.udp4.refuse = lambda sent: code if sent.source == CLIENT4 else 0
    transmit(world, *filled(3), source=CLIENT4)
    transmit(world, *filled(3), source=GATEWAY.ip)
    assert world.gateway.flush()
    assert world.udp4.sizes == [3]
    assert world.counters[f"drop_udp_send_{errno.errorcode[code].lower()}"] == 3


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENOBUFS])
def test_other_errors_drop_the_batch_and_are_counted_by_name(world: World, code: int):
    world.udp4.refuse = lambda sent: code if sent.address[0] == OTHER.host else 0
    transmit(world, *filled(3), destination=OTHER)
    transmit(world, *filled(3))
    assert world.gateway.flush()
    assert world.udp4.sizes == [3]
    assert world.counters[f"drop_udp_send_{errno.errorcode[code].lower()}"] == 3


def test_a_pending_icmp_error_costs_no_datagram(world: World):
    pending = [errno.ECONNREFUSED]
    world.udp4.refuse = lambda sent: pending.pop() if pending else 0
    transmit(world, *filled(3))
    assert world.gateway.flush()
    assert world.udp4.sizes == [3]
    assert world.counters["udp_icmp_errors"] == 1


@pytest.mark.parametrize("segmentation", [True, False])
def test_a_full_socket_keeps_the_rest_queued_in_order(segmentation: bool):
    world = World(segmentation=segmentation)
    world.udp4.refuse = lambda sent: errno.EAGAIN if len(world.udp4.datagrams) >= 2 else 0
    payloads = [b"a", *filled(3), b"z"]
    transmit(world, payloads[0], destination=OTHER)
    transmit(world, *payloads[1:4])
    transmit(world, b"six", destination=Endpoint(SERVER6, 1))
    assert world.gateway.flush() is segmentation
    assert world.udp6.datagrams == [b"six"]
    if not segmentation:
        assert world.gateway.congested() == [99]
    transmit(world, payloads[4])
    assert not world.gateway.flush()
    world.udp4.refuse = lambda sent: 0
    assert world.gateway.flush()
    assert world.gateway.congested() == []
    assert world.udp4.datagrams == payloads
    world.close()


def test_what_follows_to_a_destination_that_was_sent_to_before_the_socket_was_full_is_sent_too(world: World):
    world.udp4.refuse = lambda sent: errno.EAGAIN if world.udp4.sent else 0
    transmit(world, b"first", destination=OTHER)
    transmit(world, b"waits")
    assert not world.gateway.flush()
    transmit(world, b"later", destination=OTHER)
    world.udp4.refuse = lambda sent: 0
    assert world.gateway.flush()
    assert world.udp4.datagrams == [b"first", b"waits", b"later"]


def test_data_is_bounded_and_leaves_room_for_the_core(world: World, monkeypatch: pytest.MonkeyPatch):
    world.limit(monkeypatch, data=3, control=2)
    packet = udp(source=SERVER4, destination=CLIENT4)
    world.allow(packet, inbound=False)
    for _ in range(5):
        world.read(packet)
    assert world.counters["drop_udp_queue_full"] == 2
    transmit(world, b"1", b"2", b"3")
    assert world.counters["drop_udp_queue_full"] == 3
    world.gateway.flush()
    assert [len(datagram) for datagram in world.udp4.datagrams] == [61, 61, 61, 1, 1]
    world.read(packet)
    assert world.counters["drop_udp_queue_full"] == 3


def test_a_family_without_socket_drops_and_counts():
    world = World(families=(socket.AF_INET6,))
    world.gateway.transmit(Transmit(CLIENT, b"x"))
    assert world.counters["drop_udp_no_socket"] == 1
    packet = udp(source=SERVER4, destination=CLIENT4)
    world.allow(packet, inbound=False)
    assert world.read(packet) == []
    assert world.counters["drop_udp_no_socket"] == 2
    world.close()


def test_remembered_addresses_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch):
    if not isinstance(world.gateway, PureEngine):
        pytest.skip("not applicable: the native engine remembers no addresses")
    monkeypatch.setattr(udp_offload, "_MAX_CACHED_ADDRESSES", 4)
    for port in range(1, 20):
        world.udp4.put(b"x", source=Endpoint(CLIENT.ip, port))
        transmit(world, b"x", destination=Endpoint(CLIENT.ip, port))
    items = world.gateway.receive_udp(socket.AF_INET, 1.0)
    world.gateway.flush()
    assert [item.source.port for item in items] == [sent.address[1] for sent in world.udp4.sent] == list(range(1, 20))
    port = world.gateway._udp[socket.AF_INET]
    assert max(map(len, (port._sources, port._destinations, port._locals, port._ancillary))) <= 4
