"""Splitting what one TUN read returns, coalescing what one write takes (spec tunnel 9.2, 9.3)."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane.engine import OutboundPacket, Rewrite
from tests.unit.dataplane_world import (
    ACK,
    CLIENT4,
    CLIENT6,
    FIN,
    PSH,
    SERVER4,
    SERVER6,
    SYN,
    TCP,
    UDP,
    World,
    checksums_are_valid,
    each_engine,  # noqa: F401
    ip,
    naive_checksum,
    pseudo_header,
    tcp,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("each_engine")

V4 = {"source": CLIENT4, "destination": SERVER4}
V6 = {"source": CLIENT6, "destination": SERVER6}
BACK4 = {"source": SERVER4, "destination": CLIENT4}
BACK6 = {"source": SERVER6, "destination": CLIENT6}
FAMILIES = pytest.mark.parametrize("addresses", [BACK4, BACK6], ids=["v4", "v6"])

NEEDS_CSUM, TCPV4, TCPV6, UDP_L4 = 1, 1, 4, 5


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def vnet(gso_type: int, header: int, size: int, start: int, offset: int, flags: int = NEEDS_CSUM) -> bytes:
    return struct.pack("=BBHHHH", flags, gso_type, header, size, start, offset)


def partial(packet: bytes) -> bytes:
    """The packet as the kernel leaves it to us: the folded pseudo-header sum in the checksum field."""
    is_ipv4 = packet[0] >> 4 == 4
    l4 = 20 if is_ipv4 else 40
    protocol = packet[9] if is_ipv4 else packet[6]
    addresses = packet[12:20] if is_ipv4 else packet[8:40]
    half = len(addresses) // 2
    pseudo = pseudo_header(addresses[:half], addresses[half:], protocol, len(packet) - l4)
    at = l4 + (16 if protocol == TCP else 6)
    return packet[:at] + struct.pack(">H", naive_checksum(pseudo) ^ 0xFFFF) + packet[at + 2 :]


def items(outbound: list) -> list[bytes]:
    assert all(isinstance(item, OutboundPacket) for item in outbound)
    return [item.packet for item in outbound]


# Reading.


@FAMILIES
@pytest.mark.parametrize("options", [b"", b"\1\1\x08\x0a" + bytes(range(8))])
def test_a_tcp_super_packet_is_split_into_complete_segments(world: World, addresses: dict, options: bytes):
    payload = os.urandom(2 * 1000 + 333)
    sequence = 0xFFFF_FFFF - 500
    whole = tcp(payload, **addresses, options=options, seq=sequence, flags=FIN | PSH | ACK, ident=0xFFFF, tos=2)
    l4 = 20 if addresses is BACK4 else 40
    header = vnet(TCPV4 if l4 == 20 else TCPV6, 0, 1000, l4, 16)
    expected = [
        tcp(payload[at : at + 1000], **addresses, options=options, seq=sequence + at & 0xFFFF_FFFF, tos=2,
            flags=FIN | PSH | ACK if at == 2000 else ACK, ident=0xFFFF + at // 1000 & 0xFFFF)
        for at in (0, 1000, 2000)
    ]  # fmt: skip
    assert items(world.read(partial(whole), header)) == expected


@FAMILIES
def test_a_udp_super_packet_is_split_into_complete_datagrams(world: World, addresses: dict):
    payload = os.urandom(2 * 501 + 3)
    whole = udp(payload, **addresses, ident=7)
    header = vnet(UDP_L4, 0, 501, len(whole) - len(payload) - 8, 6)
    expected = [udp(payload[at : at + 501], **addresses, ident=7 + at // 501) for at in (0, 501, 1002)]
    assert items(world.read(partial(whole), header)) == expected


@FAMILIES
def test_a_hit_of_a_super_packet_is_sent_as_one_batch_in_order(world: World, addresses: dict):
    segments = [tcp(bytes((i,)) * 900, **addresses, seq=1 + 900 * i, ident=i) for i in range(4)]
    whole = partial(tcp(b"".join(bytes((i,)) * 900 for i in range(4)), **addresses, seq=1, ident=0))
    world.allow(segments[0], inbound=False, token=3)
    header = vnet(TCPV4 if addresses is BACK4 else TCPV6, 0, 900, 20 if addresses is BACK4 else 40, 16)
    assert world.read(whole, header) == []
    world.gateway.flush()
    assert world.udp4.sizes == [4]
    assert world.to_client() == segments
    (report,) = world.gateway.sweep(11.0)
    assert report[:3] == (3, 4, 3600)


@FAMILIES
def test_a_super_packet_is_translated_as_a_whole(world: World, addresses: dict):
    payload = os.urandom(2500)
    is_ipv4 = addresses is BACK4
    proxy = bytes((100, 96, 0, 1)) if is_ipv4 else bytes.fromhex("fd002021111180000000000000000001")
    whole = tcp(payload, **addresses, dport=7, seq=1)
    world.allow(whole, inbound=False, rewrite=Rewrite(proxy, 50000))
    assert world.read(partial(whole), vnet(TCPV4 if is_ipv4 else TCPV6, 0, 1200, 20 if is_ipv4 else 40, 16)) == []
    translated = {**addresses, "source": proxy, "dport": 50000}
    assert world.to_client() == [
        tcp(payload[at : at + 1200], **translated, seq=1 + at, ident=0x1234 + at // 1200) for at in (0, 1200, 2400)
    ]


@pytest.mark.parametrize("make", [tcp, udp])
@FAMILIES
def test_an_unfinished_checksum_is_completed(world: World, make, addresses: dict):
    for payload in (b"even", b"odd"):
        packet = make(payload, **addresses)
        l4 = 20 if addresses is BACK4 else 40
        header = vnet(0, 0, 0, l4, 16 if make is tcp else 6)
        assert items(world.read(partial(packet), header)) == [packet]
        assert items(world.read(packet)) == [packet]


def test_a_completed_udp_checksum_of_zero_becomes_ffff(world: World):
    for word in range(0x10000):
        packet = udp(struct.pack(">H", word), **BACK4)
        if packet[26:28] == b"\xff\xff":
            break
    assert items(world.read(partial(packet), vnet(0, 0, 0, 20, 6))) == [packet]
    whole = partial(udp(packet[28:] * 2, **BACK4))
    assert items(world.read(whole, vnet(UDP_L4, 0, 2, 20, 6)))[0][26:28] == b"\xff\xff"


@pytest.mark.parametrize(("packet", "header"), [
    (tcp(bytes(2000), **BACK4), vnet(TCPV4, 0, 0, 20, 16)),  # gso_size 0
    (tcp(b"", **BACK4), vnet(TCPV4, 0, 100, 20, 16)),  # no payload
    (tcp(bytes(2570), **BACK4), vnet(TCPV4, 0, 10, 20, 16)),  # 257 segments
    (tcp(bytes(2000), **BACK4), vnet(TCPV6, 0, 1000, 20, 16)),
    (tcp(bytes(2000), **BACK6), vnet(TCPV4, 0, 1000, 40, 16)),
    (udp(bytes(2000), **BACK4), vnet(TCPV4, 0, 1000, 20, 16)),
    (tcp(bytes(2000), **BACK4), vnet(UDP_L4, 0, 1000, 20, 6)),
    (tcp(bytes(2000), **BACK4), vnet(0x81, 0, 1000, 20, 16)),
    (udp(bytes(2000), **BACK4), vnet(3, 0, 1000, 20, 6)),
    (tcp(bytes(3000), **BACK4), vnet(TCPV4, 0, 1241, 20, 16)),  # segments of 1281 bytes
    (tcp(bytes(2000), **BACK4)[:32] + b"\x40" + tcp(bytes(2000))[33:], vnet(TCPV4, 0, 1000, 20, 16)),
    (tcp(**BACK4)[:39], vnet(TCPV4, 0, 1000, 20, 16)),
    (b"\x45" + bytes(10), vnet(TCPV4, 0, 1000, 20, 16)),
    (b"\x55" + tcp(bytes(2000), **BACK4)[1:], vnet(TCPV4, 0, 1000, 20, 16)),
    (b"\x41" + tcp(bytes(2000), **BACK4)[1:], vnet(TCPV4, 0, 1000, 20, 16)),
    (udp(**BACK4), vnet(0, 0, 0, 20, 8)),  # checksum field outside
    (udp(**BACK4), vnet(0, 0, 0, 60, 6)),
])  # fmt: skip
def test_a_malformed_read_is_dropped_alone(world: World, packet: bytes, header: bytes):
    assert world.read(packet, header) == []
    assert world.counters["drop_tun_malformed"] == 1
    assert items(world.read(udp(**BACK4))) == [udp(**BACK4)]


def test_ip_options_of_a_super_packet_are_kept_in_each_segment(world: World):
    plain = tcp(bytes(2000), **BACK4)
    options = b"\x94\x04\0\0"
    head = bytearray(b"\x46" + plain[1:20] + options)
    head[2:4] = struct.pack(">H", len(plain) + 4)
    packets = items(world.read(bytes(head) + plain[20:], vnet(TCPV4, 0, 1000, 24, 16)))
    assert [len(packet) for packet in packets] == [1044, 1044]
    for packet in packets:
        assert packet[20:24] == options
        assert naive_checksum(packet[:24]) == 0
        assert naive_checksum(pseudo_header(SERVER4, CLIENT4, TCP, 1020) + packet[24:]) == 0


# Writing.


def stream(count: int, *, size: int = 1000, start: int = 1, **fields) -> list[bytes]:
    """Consecutive segments of one connection."""
    return [
        tcp(bytes((i & 255,)) * size, seq=start + i * size & 0xFFFF_FFFF, ident=10 + i, **fields) for i in range(count)
    ]


def split_write(write: bytes) -> list[bytes]:
    """What the kernel makes of one write, after a look at every field of its header."""
    flags, gso_type, _header, _size, start, _offset = struct.unpack("=BBHHHH", write[:10])
    packet = write[10:]
    if gso_type == 0:
        assert write[:10] == bytes(10)
        return [packet]
    assert flags == NEEDS_CSUM
    is_ipv4 = packet[0] >> 4 == 4
    assert gso_type == {(True, TCP): TCPV4, (False, TCP): TCPV6}.get((is_ipv4, packet[9 if is_ipv4 else 6]), UDP_L4)
    assert start == (20 if is_ipv4 else 40)
    assert packet == partial(packet)  # the field holds the sum over the merged length
    if is_ipv4:
        assert naive_checksum(packet[:20]) == 0
        assert struct.unpack_from(">H", packet, 2) == (len(packet),)
    else:
        assert struct.unpack_from(">H", packet, 4) == (len(packet) - 40,)
    world = World()
    try:
        return items(world.read(packet, write[:10]))
    finally:
        world.close()


def write(world: World, packets: list[bytes]) -> list[list[bytes]]:
    for packet in packets:
        world.gateway.write_tun(packet)
    return [split_write(one) for one in world.written()]


@pytest.mark.parametrize("addresses", [V4, V6])
def test_consecutive_segments_become_one_write(world: World, addresses: dict):
    packets = stream(5, **addresses, options=b"\1\1\x08\x0a" + bytes(8))
    assert write(world, packets) == [packets]


@pytest.mark.parametrize("addresses", [V4, V6])
def test_a_shorter_datagram_or_segment_ends_a_write(world: World, addresses: dict):
    short = [*stream(2, **addresses), tcp(b"end", **addresses, seq=2001, ident=12)]
    after = tcp(bytes(1000), **addresses, seq=2004, ident=13)
    assert write(world, [*short, after]) == [short, [after]]
    datagrams = [udp(bytes(500), **addresses, ident=i) for i in range(3)] + [udp(b"end", **addresses, ident=3)]
    again = udp(bytes(500), **addresses, ident=4)
    assert write(world, [*datagrams, again]) == [datagrams, [again]]


def test_push_ends_a_write_and_is_kept(world: World):
    pushed = [*stream(2), tcp(bytes(1000), seq=2001, ident=12, flags=PSH | ACK)]
    after = tcp(bytes(1000), seq=3001, ident=13)
    assert write(world, [*pushed, after]) == [pushed, [after]]
    first = tcp(bytes(1000), seq=1, flags=PSH | ACK)
    assert write(world, [first, tcp(bytes(1000), seq=1001)]) == [[first], [tcp(bytes(1000), seq=1001)]]


FIRST = tcp(bytes(100), seq=1, ident=1)


@pytest.mark.parametrize("second", [
    tcp(bytes(100), seq=102), tcp(bytes(100), seq=1), tcp(bytes(101), seq=101), tcp(b"", seq=101),
    tcp(bytes(100), seq=101, ack=8), tcp(bytes(100), seq=101, window=501), tcp(bytes(100), seq=101, flags=SYN),
    tcp(bytes(100), seq=101, flags=ACK | FIN), tcp(bytes(100), seq=101, flags=ACK | 0x20),
    tcp(bytes(100), seq=101, flags=ACK | 0x40), tcp(bytes(100), seq=101, options=bytes(4)),
    tcp(bytes(100), seq=101, tos=3), tcp(bytes(100), seq=101, ttl=63), tcp(bytes(100), seq=101, fragment=0),
    tcp(bytes(100), seq=101, sport=1), tcp(bytes(100), seq=101, source=SERVER4), udp(bytes(100)),
])  # fmt: skip
def test_what_does_not_continue_a_connection_exactly_is_written_alone(world: World, second: bytes):
    assert write(world, [FIRST, second]) == [[FIRST], [second]]


@pytest.mark.parametrize("second", [
    tcp(bytes(100), seq=101, **V6, tos=1), tcp(bytes(100), seq=101, **V6, ttl=1),
])  # fmt: skip
def test_traffic_class_and_hop_limit_must_agree(world: World, second: bytes):
    first = tcp(bytes(100), seq=1, **V6)
    assert write(world, [first, second]) == [[first], [second]]


def test_the_flow_label_may_differ(world: World):
    first, second = tcp(bytes(100), seq=1, **V6), tcp(bytes(100), seq=101, **V6, flow_label=77)
    assert [len(packets) for packets in write(world, [first, second])] == [2]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("make", [lambda i: tcp(bytes(100), seq=1 + 100 * i), lambda i: udp(bytes(100))])
def test_a_wrong_checksum_is_never_repaired_by_merging(world: World, at: int, make):
    packets = [make(0), make(1)]
    packets[at] = packets[at][:-1] + b"\x99"
    assert write(world, packets) == [[packets[0]], [packets[1]]]


def test_a_missing_udp_checksum_stays_missing(world: World):
    packets = [udp(bytes(100), zero_checksum=True)] * 2
    assert write(world, packets) == [[packets[0]], [packets[1]]]


def test_connections_are_merged_apart_and_none_overtakes_itself(world: World):
    one, two = stream(3, sport=1), stream(3, sport=2)
    jump = tcp(bytes(1000), sport=1, seq=9001)
    mixed = [one[0], two[0], one[1], jump, two[1], one[2], two[2]]
    assert write(world, mixed) == [[one[0], one[1]], two, [jump], [one[2]]]


def test_packets_without_a_key_are_overtaken_by_nothing(world: World):
    one, two = stream(2)
    options = ip(CLIENT4, SERVER4, UDP, udp()[20:], fragment=0x2000)
    assert write(world, [one, options, two]) == [[one], [options], [two]]


def test_a_write_has_at_most_64_datagrams_and_65535_bytes(world: World):
    small = [udp(bytes(10), ident=i) for i in range(65)]
    assert [len(packets) for packets in write(world, small)] == [64, 1]
    large = stream(60, size=1240)
    assert [len(packets) for packets in write(world, large)] == [52, 8]


def test_a_write_has_fewer_parts_than_the_kernel_takes(world: World):
    for packet in stream(1100, size=1):
        world.gateway.write_tun(packet)
    assert [len(one) - 10 - 40 for one in world.written()] == [512, 512, 76]
    assert world.counters["tun_tx_packets"] == 1100
    assert "drop_tun_write_einval" not in world.counters


@pytest.mark.parametrize(("last", "packets"), [(695, [55]), (696, [54, 1])])
def test_a_write_may_have_65535_bytes_exactly(world: World, last: int, packets: list[int]):
    segments = [*stream(54, size=1200), tcp(bytes(last), seq=1 + 54 * 1200, ident=64)]
    assert [len(one) for one in write(world, segments)] == packets


def test_two_clients_of_one_connection_are_not_merged(world: World):
    world.handshake(peer=6)
    first, second = stream(2)
    world.allow(first, inbound=True)
    world.allow(first, inbound=True, peer=6)
    world.arrive(world.sealed(first))
    world.arrive(world.sealed(second, peer=6))
    assert [split_write(one) for one in world.written()] == [[first], [second]]


def test_forwarded_packets_are_merged_after_translation(world: World):
    proxy, real = bytes((100, 96, 0, 1)), bytes((93, 184, 216, 34))
    packets = stream(3, source=CLIENT4, destination=proxy)
    world.allow(packets[0], inbound=True, rewrite=Rewrite(real, 7))
    for packet in packets:
        world.arrive(world.sealed(packet))
    (written,) = [split_write(one) for one in world.written()]
    assert written == stream(3, source=CLIENT4, destination=real, sport=7)
    assert all(map(checksums_are_valid, written))


def test_without_offloads_nothing_is_merged():
    world = World(offloads=False)
    packets = stream(3)
    assert write(world, packets) == [[packet] for packet in packets]
    world.close()


# What a TUN may answer.


class Device:
    """Stands in for `os`: records writes, refuses those that the rule names."""

    def __init__(self, rule) -> None:
        self.rule = rule
        self.writes: list[bytes] = []
        self.calls = 0

    def writev(self, descriptor: int, parts) -> int:
        data = b"".join(parts)
        self.calls += 1
        code = self.rule(data)
        if code:
            raise OSError(code, os.strerror(code))
        self.writes.append(data)
        return len(data)


def is_merged(data: bytes) -> bool:
    return data[1] != 0


def device(world: World, monkeypatch: pytest.MonkeyPatch, rule) -> Device:
    fake = Device(rule)
    world.play_tun(monkeypatch, fake)
    return fake


def test_a_kernel_that_refuses_merged_writes_loses_nothing_and_sees_no_second_one(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    fake = device(world, monkeypatch, lambda data: errno.EINVAL if is_merged(data) else 0)
    packets = [*stream(3, sport=1), *stream(3, sport=2)]
    for packet in packets:
        world.gateway.write_tun(packet)
    assert world.gateway.flush()
    assert fake.writes == [bytes(10) + packet for packet in packets]
    assert fake.calls == 7
    for packet in packets:
        world.gateway.write_tun(packet)
    world.gateway.flush()
    assert fake.calls == 13
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_packet_that_is_refused_by_itself_does_not_end_merging(world: World, monkeypatch: pytest.MonkeyPatch):
    fake = device(world, monkeypatch, lambda data: errno.EINVAL)
    for packet in stream(3):
        world.gateway.write_tun(packet)
    assert world.gateway.flush()
    assert world.counters["drop_tun_write_einval"] == 3
    fake.rule = lambda data: 0
    assert write(world, []) == []
    for packet in stream(3):
        world.gateway.write_tun(packet)
    world.gateway.flush()
    assert len(fake.writes) == 1


def test_another_write_error_drops_that_write_only(world: World, monkeypatch: pytest.MonkeyPatch):
    fake = device(world, monkeypatch, lambda data: errno.EIO if is_merged(data) else 0)
    for packet in (*stream(3), udp()):
        world.gateway.write_tun(packet)
    assert world.gateway.flush()
    assert fake.writes == [bytes(10) + udp()]
    assert world.counters["drop_tun_write_eio"] == 3


def test_a_full_device_keeps_the_rest_queued_in_order(world: World, monkeypatch: pytest.MonkeyPatch):
    fake = device(world, monkeypatch, lambda data: errno.EAGAIN if fake.writes else 0)
    packets = [udp(), *stream(3), udp(b"last")]
    for packet in packets[:4]:
        world.gateway.write_tun(packet)
    assert not world.gateway.flush()
    assert world.gateway.congested() == [world.tun.fileno()]
    world.gateway.write_tun(packets[4])
    fake.rule = lambda data: 0
    assert world.gateway.flush()
    assert world.gateway.congested() == []
    assert [packet for one in fake.writes for packet in split_write(one)] == packets


def test_the_queue_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch):
    world.limit(monkeypatch, tun_packets=3)
    for packet in stream(5):
        world.gateway.write_tun(packet)
    assert world.counters["drop_tun_queue_full"] == 2
    assert len(write(world, [])[0]) == 3


def test_packets_without_a_key_are_overtaken_by_nothing_after_a_revocation_either(world: World):
    one, two = stream(2)
    options = ip(CLIENT4, SERVER4, UDP, udp()[20:], fragment=0x2000)
    revoked = udp(b"revoked")
    world.allow(revoked, inbound=True)
    for packet in (one, options):
        world.gateway.write_tun(packet)
    world.arrive(world.sealed(revoked))
    world.gateway.revoke(World.PEER)
    assert write(world, [two]) == [[one], [options], [two]]
