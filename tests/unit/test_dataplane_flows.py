"""What the engine settles by itself, what it hands to the policy, and in which order."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane.engine import Datagram, FlowReport, InnerPacket, OutboundPacket, Rewrite, SessionConfirmed
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import (
    ACK,
    CLIENT,
    CLIENT4,
    CLIENT6,
    FIN,
    GATEWAY,
    PSH,
    RELAY,
    RST,
    SERVER4,
    SERVER6,
    SYN,
    World,
    checksums_are_valid,
    each_engine,  # noqa: F401
    echo,
    ip,
    key_of,
    naive_checksum,
    tcp,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("each_engine")

NUMBER = 0x4001
V4 = {"source": CLIENT4, "destination": SERVER4}
V6 = {"source": CLIENT6, "destination": SERVER6}
BACK4 = {"source": SERVER4, "destination": CLIENT4, "sport": 443, "dport": 50000}
BACK6 = {"source": SERVER6, "destination": CLIENT6, "sport": 443, "dport": 50000}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.arrive(world.client.seal(World.PEER, b"", 1.0))  # confirms the session
    yield world
    world.close()


def _channel_data(message: bytes, *, number: int = NUMBER, surplus: int = 0) -> bytes:
    return struct.pack(">HH", number, len(message)) + message + bytes(surplus)


# Sizes and frames.


@pytest.mark.spec("CONN-4", "TUNNEL-9")
def test_a_datagram_of_1317_bytes_is_discarded_and_one_of_1316_is_not(world: World):
    assert world.arrive(bytes(1317)) == []
    world.udp4.put(bytes(1317))
    world.udp4.put(bytes(1317 * 3), stride=1317)
    assert world.gateway.receive_udp(socket.AF_INET, 10.0) == []
    assert world.counters["drop_udp_oversized"] == 5
    assert world.arrive(bytes(1316)) == [Datagram(bytes(1316), CLIENT, GATEWAY, 0)]
    world.udp4.put(bytes(1316))
    assert world.gateway.receive_udp(socket.AF_INET, 10.0) == [Datagram(bytes(1316), CLIENT, GATEWAY, 0)]


def test_an_empty_datagram_is_ignored(world: World):
    assert world.arrive(b"") == []
    world.udp4.put(b"")
    assert world.gateway.receive_udp(socket.AF_INET, 10.0) == []


@pytest.mark.spec("CONN-9")
def test_channel_data_is_unwrapped_with_up_to_three_surplus_bytes(world: World):
    world.gateway.set_channel(RELAY, NUMBER, usable=True)
    for surplus in range(4):
        (item,) = world.arrive(_channel_data(world.sealed(udp()), surplus=surplus), source=RELAY)
        assert item.packet == udp()
    message = world.sealed(udp())
    for wrong in (_channel_data(message, surplus=4), _channel_data(message)[:-1], _channel_data(message)[:3]):
        assert world.arrive(wrong, source=RELAY) == [Datagram(wrong, RELAY, GATEWAY, 0)]
    assert len(world.arrive(_channel_data(message), source=RELAY)) == 1


@pytest.mark.parametrize("channel_source", [(RELAY, NUMBER + 1), (CLIENT, NUMBER), (Endpoint(RELAY.ip, 3479), NUMBER)])
def test_channel_data_is_unwrapped_only_from_its_relay_and_number(world: World, channel_source: tuple[Endpoint, int]):
    source, number = channel_source
    world.gateway.set_channel(RELAY, NUMBER, usable=True)
    frame = _channel_data(world.sealed(udp()), number=number)
    assert world.arrive(frame, source=source) == [Datagram(frame, source, GATEWAY, 0)]


def test_a_channel_that_lapsed_is_for_the_node_again(world: World):
    world.gateway.set_channel(RELAY, NUMBER, usable=True)
    world.gateway.set_channel(RELAY, NUMBER, usable=False)
    frame = _channel_data(world.sealed(udp()))
    assert world.arrive(frame, source=RELAY) == [Datagram(frame, RELAY, GATEWAY, 0)]


@pytest.mark.parametrize("inner", [b"", b"\0\1\0\0", bytes(40), b"\1" + bytes(147)])
def test_channel_data_with_something_else_inside_is_for_the_node_whole(world: World, inner: bytes):
    world.gateway.set_channel(RELAY, NUMBER, usable=True)
    frame = _channel_data(inner)
    assert world.arrive(frame, source=RELAY) == [Datagram(frame, RELAY, GATEWAY, 0)]


@pytest.mark.spec("CONN-67")
def test_a_full_packet_makes_1312_bytes_directly_and_1316_through_a_relay(world: World):
    packet = udp(bytes(1280 - 28), source=SERVER4, destination=CLIENT4)
    world.allow(packet, inbound=False)
    assert world.read(packet) == []
    world.gateway.set_path(World.PEER, None, RELAY, NUMBER)
    assert world.read(packet) == []
    world.gateway.flush()
    direct, relayed = world.udp4.sent
    assert (len(direct.payloads[0]), direct.address, direct.source) == (1312, (CLIENT.host, CLIENT.port), GATEWAY.ip)
    assert (len(relayed.payloads[0]), relayed.address, relayed.source) == (1316, (RELAY.host, RELAY.port), None)
    assert relayed.payloads[0][:4] == struct.pack(">HH", NUMBER, 1312)
    assert world.opened(relayed.payloads[0][4:]) == packet


# ECN.


@pytest.mark.spec("CONN-68", "TUNNEL-53")
@pytest.mark.parametrize("addresses", [BACK4, BACK6])
@pytest.mark.parametrize("ecn", [0, 1, 2, 3])
def test_the_inner_codepoint_is_copied_to_the_outer_header(world: World, addresses: dict, ecn: int):
    packet = udp(**addresses, tos=0xB8 | ecn)
    world.allow(packet, inbound=False)
    world.read(packet)
    world.gateway.set_path(World.PEER, None, Endpoint(SERVER6, 9), None)
    world.read(packet)
    world.gateway.flush()
    assert [sent.ecn for sent in (*world.udp4.sent, *world.udp6.sent)] == [ecn, ecn]


@pytest.mark.spec("CONN-68", "TUNNEL-53")
@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize(("outer", "inner", "result"), [
    (3, 2, 3), (3, 1, 3), (3, 0, 0), (3, 3, 3), (0, 2, 2), (1, 2, 2), (2, 1, 1), (2, 0, 0),
])  # fmt: skip
def test_outer_congestion_marks_an_ect_packet_and_nothing_else(
    world: World, addresses: dict, outer: int, inner: int, result: int
):
    packet = tcp(b"data", **addresses, tos=0xB8 | inner)
    world.allow(packet, inbound=True)
    world.arrive(world.sealed(packet), ecn=outer)
    assert world.packets() == [tcp(b"data", **addresses, tos=0xB8 | result)]


def test_the_outer_codepoint_comes_with_what_the_policy_is_asked(world: World):
    world.udp4.put(world.sealed(udp()), ecn=3)
    (item,) = world.gateway.receive_udp(socket.AF_INET, 10.0)
    assert (item.ecn, item.source, item.local) == (3, CLIENT, GATEWAY)
    world.udp6.put(world.sealed(udp()), ecn=1, source=Endpoint(SERVER6, 7), local=Endpoint(CLIENT6, 52625))
    (item,) = world.gateway.receive_udp(socket.AF_INET6, 10.0)
    assert (item.ecn, item.source, item.local) == (1, Endpoint(SERVER6, 7), Endpoint(CLIENT6, 52625))


# Hits and misses.


@pytest.mark.parametrize("packet", [tcp(b"x"), udp(), echo(), echo(reply=True), tcp(b"x", **V6), udp(**V6), echo(**V6)])
def test_an_installed_flow_carries_its_packets_in_its_own_direction_only(world: World, packet: bytes):
    assert world.arrive(world.sealed(packet)) == [InnerPacket(World.PEER, packet, 0, CLIENT, GATEWAY)]
    world.allow(packet, inbound=True)
    assert world.arrive(world.sealed(packet)) == []
    assert world.packets() == [packet]
    assert world.read(packet) == [OutboundPacket(packet)]
    world.allow(packet, inbound=False)
    assert world.read(packet) == []
    assert world.to_client() == [packet]


def test_a_flow_of_one_client_carries_nothing_of_another(world: World):
    packet = udp()
    world.handshake(peer=6)
    world.allow(packet, inbound=True, peer=6)
    assert world.arrive(world.sealed(packet)) == [InnerPacket(World.PEER, packet, 0, CLIENT, GATEWAY)]
    confirmed = world.arrive(world.sealed(packet, peer=6))
    assert confirmed == [SessionConfirmed(0x6001)]
    assert world.packets() == [packet]


@pytest.mark.parametrize("other", [
    tcp(b"x", sport=50001), tcp(b"x", dport=80), tcp(b"x", source=SERVER4, destination=CLIENT4),
    udp(dport=443), tcp(b"x", destination=CLIENT4), tcp(b"x", **V6),
])  # fmt: skip
def test_another_five_tuple_is_a_miss(world: World, other: bytes):
    world.allow(tcp(b"x"), inbound=True)
    assert [item.packet for item in world.arrive(world.sealed(other))] == [other]


@pytest.mark.parametrize("flags", [SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, FIN | PSH | ACK])
@pytest.mark.parametrize("addresses", [V4, V6])
def test_segments_that_open_or_end_a_connection_are_for_the_policy(world: World, flags: int, addresses: dict):
    world.allow(tcp(**addresses), inbound=True)
    packet = tcp(**addresses, flags=flags)
    assert [item.packet for item in world.arrive(world.sealed(packet))] == [packet]
    world.allow(tcp(**addresses), inbound=False)
    assert world.read(packet) == [OutboundPacket(packet)]


@pytest.mark.parametrize("packet", [
    ip(CLIENT4, SERVER4, 17, udp()[20:], fragment=0x2000), ip(CLIENT4, SERVER4, 17, udp()[20:], fragment=5),
    ip(CLIENT4, SERVER4, 17, udp(b"abc")[20:-1]),  # UDP length disagrees
    ip(CLIENT4, SERVER4, 6, tcp()[20:32] + b"\x40" + tcp()[33:]),  # data offset 4
    ip(CLIENT4, SERVER4, 6, tcp()[20:32] + b"\xF0" + tcp()[33:]),  # header past the end
    ip(CLIENT4, SERVER4, 1, struct.pack(">BBHHH", 3, 1, 0, 77, 1) + udp()),  # ICMP error
    ip(CLIENT4, SERVER4, 1, struct.pack(">BBHHH", 8, 1, 0, 77, 1)),  # echo of another code
    ip(CLIENT4, SERVER4, 58, echo()[20:]), ip(CLIENT6, SERVER6, 1, echo()[20:]),
    b"\x46" + ip(CLIENT4, SERVER4, 17, b"\1\1\1\0" + udp()[20:])[1:],  # IP options
    ip(CLIENT6, SERVER6, 0, b"\x11\0" + bytes(6) + udp()[20:]),  # hop-by-hop options
    ip(CLIENT6, SERVER6, 44, b"\x11\0\0\0" + bytes(4) + udp()[20:]),
])  # fmt: skip
def test_packets_that_can_have_no_flow_never_match_one(world: World, packet: bytes):
    for allowed in (udp(), udp(b"abc"), tcp(), echo(), udp(**V6), echo(**V6)):
        world.allow(allowed, inbound=True)
        world.allow(allowed, inbound=False)
    assert [item.packet for item in world.arrive(world.sealed(packet))] == [packet]
    assert world.read(packet) == [OutboundPacket(packet)]
    assert world.written() == []


def test_a_wrong_transport_checksum_neither_stops_a_packet_nor_is_repaired(world: World):
    packet = bytearray(tcp(b"data"))
    packet[-1] ^= 1
    world.allow(bytes(packet), inbound=True)
    world.arrive(world.sealed(bytes(packet)))
    assert world.packets() == [packet]


def test_a_flow_ends_at_its_time_and_reports_before_the_policy_is_asked(world: World):
    packet = tcp(b"12345", options=b"\1" * 12)
    world.allow(packet, inbound=True, until=11.0, token=42)
    assert world.arrive(world.sealed(packet), now=10.5) == []
    assert world.arrive(world.sealed(packet), now=10.75) == []
    report, miss = world.arrive(world.sealed(packet), now=11.0)
    assert report == FlowReport(42, 2, 10, 10.75)
    assert miss.packet == packet
    assert world.gateway.sweep(12.0) == []


def test_a_sweep_reports_what_flows_carried_once_and_drops_those_that_lapsed(world: World):
    up, down = udp(b"abc"), udp(b"defgh", **BACK4)
    world.allow(up, inbound=True, until=20.0, token=1)
    world.allow(down, inbound=False, until=12.0, token=2)
    world.arrive(world.sealed(up))
    world.read(down)
    world.read(down)
    assert sorted(world.gateway.sweep(11.0)) == [FlowReport(1, 1, 3, 10.0), FlowReport(2, 2, 10, 10.0)]
    assert world.gateway.sweep(12.0) == []
    assert world.read(down, now=11.5) == [OutboundPacket(down)]
    world.arrive(world.sealed(up), now=13.0)
    world.allow(up, inbound=True, until=20.0, token=3)
    assert world.gateway.sweep(14.0) == [FlowReport(1, 1, 3, 13.0)]


def test_the_flow_table_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch):
    world.limit(monkeypatch, flows=2)
    for port in (1, 2, 3):
        world.allow(udp(dport=port), inbound=True)
    world.allow(udp(dport=2), inbound=True)
    assert [len(world.arrive(world.sealed(udp(dport=port)))) for port in (1, 2, 3)] == [0, 0, 1]
    assert world.counters["flow_table_full"] == 1
    world.gateway.revoke(World.PEER)
    world.allow(udp(dport=3), inbound=True)
    world.allow(udp(**BACK4), inbound=False)
    assert world.arrive(world.sealed(udp(dport=3))) == []
    world.allow(udp(dport=4), inbound=True)
    assert len(world.arrive(world.sealed(udp(dport=4)))) == 1


def test_after_a_miss_the_rest_of_the_connection_follows_in_order(world: World):
    data, fin, late, other = tcp(b"1"), tcp(b"2", seq=2, flags=FIN | ACK), tcp(b"3", seq=3), udp()
    for packet in (data, other):
        world.allow(packet, inbound=True)
        world.allow(packet, inbound=False)
    for packet in (data, fin, late, other):
        world.udp4.put(world.sealed(packet))
    items = world.gateway.receive_udp(socket.AF_INET, 10.0)
    assert [item.packet for item in items] == [fin, late]
    assert world.packets() == [data, other]
    for packet in (fin, late, other):
        world.kernel.send(bytes(10) + packet)
    assert world.read(late) == [OutboundPacket(fin), OutboundPacket(late), OutboundPacket(late)]
    assert world.to_client() == [other]


def test_without_a_path_or_a_session_outbound_packets_are_for_the_policy(world: World):
    packet = udp(**BACK4)
    world.allow(packet, inbound=False)
    world.gateway.clear_path(World.PEER)
    assert world.read(packet) == [OutboundPacket(packet)]
    world.gateway.set_path(World.PEER, None, CLIENT, None)
    assert world.gateway.handle_packet(packet, 10.0) == []
    world.gateway.use_session(World.PEER, None)
    assert world.gateway.handle_packet(packet, 10.0) == [OutboundPacket(packet)]
    assert world.to_client() == [packet]


# Revocation.


def test_revocation_voids_flows_and_takes_back_what_was_queued_under_them(world: World):
    up, down, foreign = udp(), udp(**BACK4), udp(sport=9)
    world.handshake(peer=6)
    world.gateway.set_path(6, None, CLIENT, None)
    for peer, packet, inbound in ((5, up, True), (5, down, False), (6, foreign, True), (6, udp(b"6", sport=6), False)):
        world.allow(packet, inbound=inbound, peer=peer)
    for message in (world.sealed(up), world.sealed(foreign, peer=6)):
        world.arrive(message)
    for packet in (down, udp(b"6", sport=6), down):
        world.read(packet)
    world.gateway.write_tun(udp(b"core"))
    world.gateway.transmit(Transmit(CLIENT, b"core"))
    world.gateway.revoke(World.PEER)
    assert world.counters["drop_revoked"] == 3
    assert world.packets() == [foreign, udp(b"core")]
    assert [len(datagram) for datagram in world.udp4.datagrams] == [29 + 32, 4]
    assert world.arrive(world.sealed(up)) == [InnerPacket(World.PEER, up, 0, CLIENT, GATEWAY)]
    assert world.read(down) == [OutboundPacket(down)]
    assert world.arrive(world.sealed(foreign, peer=6)) == []
    world.gateway.revoke(99)


def test_what_revoked_flows_carried_is_still_reported(world: World):
    world.allow(udp(b"abc"), inbound=True, token=9)
    world.arrive(world.sealed(udp(b"abc")))
    world.gateway.revoke(World.PEER)
    assert world.gateway.sweep(11.0) == [FlowReport(9, 1, 3, 10.0)]


def test_a_removed_peer_leaves_nothing_behind(world: World):
    world.allow(udp(), inbound=True)
    world.allow(udp(**BACK4), inbound=False)
    world.gateway.remove_peer(World.PEER)
    world.gateway.remove_peer(World.PEER)
    assert world.read(udp(**BACK4)) == [OutboundPacket(udp(**BACK4))]
    message = world.sealed(udp())
    assert world.arrive(message) == [Datagram(message, CLIENT, GATEWAY, 0)]


# DNS NAT.

PROXY4, PROXY6 = bytes((100, 96, 0, 1)), bytes.fromhex("fd002021111180000000000000000001")
REAL4, REAL6 = bytes((93, 184, 216, 34)), bytes.fromhex("20010db8000000000000000000001234")
FROM_REAL4, FROM_PROXY4 = ({"source": source, "destination": CLIENT4} for source in (REAL4, PROXY4))
FROM_REAL6, FROM_PROXY6 = ({"source": source, "destination": CLIENT6} for source in (REAL6, PROXY6))


@pytest.mark.parametrize(("sent", "written", "port"), [
    (tcp(b"data", destination=PROXY4), tcp(b"data", destination=REAL4, sport=7), 7),
    (udp(b"data", destination=PROXY4), udp(b"data", destination=REAL4, sport=50000), 50000),
    (echo(5, destination=PROXY4), echo(6, destination=REAL4), 6),
    (tcp(b"data", source=CLIENT6, destination=PROXY6), tcp(b"data", source=CLIENT6, destination=REAL6, sport=7), 7),
    (udp(b"dat", source=CLIENT6, destination=PROXY6), udp(b"dat", source=CLIENT6, destination=REAL6, sport=7), 7),
    (echo(5, source=CLIENT6, destination=PROXY6), echo(6, source=CLIENT6, destination=REAL6), 6),
])  # fmt: skip
def test_translation_towards_the_network_changes_destination_and_source_port(
    world: World, sent: bytes, written: bytes, port: int
):
    assert checksums_are_valid(sent)
    world.allow(sent, inbound=True, rewrite=Rewrite(REAL4 if sent[0] >> 4 == 4 else REAL6, port))
    assert world.arrive(world.sealed(sent)) == []
    assert world.packets() == [written]


@pytest.mark.parametrize(("read", "delivered", "port"), [
    (tcp(b"data", **FROM_REAL4, dport=7), tcp(b"data", **FROM_PROXY4, dport=50000), 50000),
    (udp(b"data", **FROM_REAL4), udp(b"data", **FROM_PROXY4, dport=8), 8),
    (echo(6, reply=True, **FROM_REAL4), echo(5, reply=True, **FROM_PROXY4), 5),
    (tcp(b"dat", **FROM_REAL6), tcp(b"dat", **FROM_PROXY6, dport=8), 8),
    (echo(6, reply=True, **FROM_REAL6), echo(5, reply=True, **FROM_PROXY6), 5),
])  # fmt: skip
def test_translation_towards_the_client_changes_source_and_destination_port(
    world: World, read: bytes, delivered: bytes, port: int
):
    world.allow(read, inbound=False, rewrite=Rewrite(PROXY4 if read[0] >> 4 == 4 else PROXY6, port))
    assert world.read(read) == []
    assert world.to_client() == [delivered]


def test_translation_keeps_a_missing_udp_checksum_missing_and_a_broken_one_broken(world: World):
    missing = udp(destination=PROXY4, zero_checksum=True)
    world.allow(missing, inbound=True, rewrite=Rewrite(REAL4, 50000))
    world.arrive(world.sealed(missing))
    assert world.packets() == [udp(destination=REAL4, zero_checksum=True)]
    broken = bytearray(udp(destination=PROXY4))
    broken[27] ^= 0x40
    world.arrive(world.sealed(bytes(broken)))
    (written,) = world.packets()
    assert naive_checksum(written[:20]) == 0
    assert written[:26] + written[28:] == udp(destination=REAL4)[:26] + udp(destination=REAL4)[28:]
    assert not checksums_are_valid(written)


def test_a_rewrite_to_the_other_family_is_refused(world: World):
    with pytest.raises(ValueError, match="family"):
        world.gateway.install_flow(5, key_of(udp()), inbound=True, rewrite=Rewrite(REAL6, 1), valid_until=20.0, token=1)


# Turns, and what is not attached.


def test_a_turn_is_bounded_however_much_waits(world: World, monkeypatch: pytest.MonkeyPatch):
    world.limit(monkeypatch, turn=64)
    for _ in range(2000):
        world.udp4.put(b"stun")
        world.udp6.put(world.sealed(udp()) * 64, stride=61, source=Endpoint(SERVER6, 7), local=Endpoint(CLIENT6, 9))
    for number in range(200):
        world.kernel.send(bytes(10) + udp(sport=number))
    assert 64 <= len(world.gateway.receive_udp(socket.AF_INET, 10.0)) <= 1024
    assert len(world.gateway.receive_tun(10.0)) == 64
    world.gateway.receive_udp(socket.AF_INET6, 10.0)
    assert 0 < world.counters["drop_replayed"] <= 128


def test_a_train_is_cut_at_its_stride(world: World):
    world.allow(tcp(b"x"), inbound=True)
    full = [tcp(bytes(1200), seq=1 + 1200 * i, ident=i) for i in range(3)]
    short = udp(b"short")
    world.udp4.put(b"".join(map(world.sealed, full)) + world.sealed(short), stride=len(full[0]) + 32)
    (item,) = world.gateway.receive_udp(socket.AF_INET, 10.0)
    assert item.packet == short
    assert len(world.written()) == 1
    assert world.counters["udp_rx_packets"] == 4


def test_receive_errors_are_counted_and_passed_over(world: World):
    world.udp4.arrivals.append(ConnectionRefusedError(111, ""))
    world.udp4.put(b"stun")
    assert world.gateway.receive_udp(socket.AF_INET, 10.0) == [Datagram(b"stun", CLIENT, GATEWAY, 0)]
    assert world.counters["udp_icmp_errors"] == 1
    world.udp4.arrivals.append(OSError(9, "Bad file descriptor"))
    with pytest.raises(OSError, match="Bad file"):
        world.gateway.receive_udp(socket.AF_INET, 10.0)


def test_a_tun_that_is_gone_raises(world: World):
    world.kernel.close()
    with pytest.raises(OSError, match="gone"):
        world.gateway.receive_tun(10.0)


def test_packets_above_the_mtu_and_empty_reads_are_dropped(world: World):
    assert world.read(bytes(1281)) == []
    assert world.read(b"") == []
    assert world.gateway.handle_packet(b"", 10.0) == []
    assert world.gateway.handle_packet(bytes(1281), 10.0) == []
    assert world.counters["drop_tun_malformed"] == 4


def test_a_tun_without_virtio_headers_works_too():
    world = World(vnet_hdr=False)
    world.allow(tcp(b"x"), inbound=True)
    world.allow(udp(**BACK4), inbound=False)
    for i in range(2):
        assert len(world.arrive(world.sealed(tcp(b"x", seq=1 + i)))) == (1 if i == 0 else 0)  # SessionConfirmed
    assert world.packets() == [tcp(b"x"), tcp(b"x", seq=2)]
    assert world.read(udp(**BACK4)) == []
    assert world.to_client() == [udp(**BACK4)]
    world.close()


def test_what_has_nowhere_to_go_is_counted():
    engine = World.engine()
    engine.write_tun(udp())
    engine.transmit(Transmit(CLIENT, b"x"))
    assert engine.flush()
    assert engine.counters() == {"drop_tun_not_attached": 1, "drop_udp_no_socket": 1}
