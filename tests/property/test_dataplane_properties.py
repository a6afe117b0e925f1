"""Optimised routines against naive twins: replay window, batches, splitting and coalescing, translation."""

from __future__ import annotations

import random
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fzg.dataplane.engine import Datagram, InnerPacket, OutboundPacket, Rewrite
from fzg.dataplane.flows import Flow, flow_key, pack_key
from fzg.dataplane.pure import PureEngine
from fzg.dataplane.replay import ReplayWindow
from fzg.dataplane.sessions import Peer
from fzg.sansio import Transmit
from fzg.wire import Malformed
from fzg.wire import ip as inner
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import (
    ACK,
    CLIENT,
    CLIENT4,
    CLIENT6,
    FIN,
    GATEWAY,
    PSH,
    SERVER4,
    SERVER6,
    SYN,
    World,
    checksums_are_valid,
    each_engine,  # noqa: F401
    echo,
    key_of,
    tcp,
    udp,
)

pytestmark = pytest.mark.usefixtures("each_engine")

addresses = st.sampled_from([
    {"source": CLIENT4, "destination": SERVER4}, {"source": CLIENT6, "destination": SERVER6},
])  # fmt: skip


# Replay.


@given(
    st.lists(
        st.one_of(st.integers(0, 300), st.integers(8000, 8500), st.integers(16_300, 16_600), st.integers(0, 2**64 - 1))
    )
)
@settings(deadline=None)
def test_the_replay_window_is_a_set_of_the_last_8192_counters(counters: list[int]) -> None:
    window, seen, following = ReplayWindow(), set(), 0
    for counter in counters:
        expected = counter >= following or (counter + 8192 >= following and counter not in seen)
        assert window.accepts(counter) is expected
        if expected:
            window.mark(counter)
            seen.add(counter)
            following = max(following, counter + 1)


@given(st.integers(0, 2**31), st.integers(1, 400))
@settings(max_examples=20, deadline=None)
def test_the_replay_window_agrees_on_long_disordered_streams(seed: int, spread: int) -> None:
    generator = random.Random(seed)
    window, seen, following, base = ReplayWindow(), set(), 0, 0
    for _ in range(3000):
        base += generator.choice((0, 1, 1, 1, generator.randrange(spread * 20)))
        counter = max(0, base - generator.randrange(spread * 25))
        expected = counter >= following or (counter + 8192 >= following and counter not in seen)
        assert window.accepts(counter) is expected
        if expected:
            window.mark(counter)
            seen.add(counter)
            following = max(following, counter + 1)


@given(st.integers(0, 2**31), st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_an_engine_accepts_what_a_set_of_the_last_8192_counters_does(seed: int, spread: int) -> None:
    generator = random.Random(seed)
    engine, client = World.engine(), PureEngine()
    engine.add_session(1, 7, 8, receive_key=bytes(32), send_key=bytes(32), now=1.0)
    client.add_session(1, 8, 7, receive_key=bytes(32), send_key=bytes(32), now=1.0)
    client.use_session(1, 8)
    seen: set[int] = set()
    packet, following, base = udp(), 0, 0
    for _ in range(3000):
        base += generator.choice((0, 1, 1, 1, generator.randrange(spread * 20)))
        counter = max(0, base - generator.randrange(spread * 25))
        expected = counter >= following or (counter + 8192 >= following and counter not in seen)
        client._sessions[8].next_counter = counter
        message = client.seal(1, packet, 1.0)
        items = engine.handle_datagram(Datagram(message, CLIENT, GATEWAY, 0), 1.0)
        assert any(isinstance(item, InnerPacket) for item in items) is expected
        if expected:
            seen.add(counter)
            following = max(following, counter + 1)


# UDP batches.


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.sampled_from([None, GATEWAY.ip]), st.sampled_from([0, 2]), st.integers(1, 1316)
        ),
        max_size=200,
    )
)
@settings(deadline=None)
def test_batches_keep_the_order_of_each_destination_and_the_kernels_limits(
    datagrams: list[tuple[int, bytes | None, int, int]],
) -> None:
    world = World()
    expected: dict[tuple[str, int], list[tuple[bytes | None, int, bytes]]] = {}
    for index, (host, source, ecn, size) in enumerate(datagrams):
        destination = Endpoint(bytes((10, 9, 8, host)), 7)
        payload = struct.pack(">I", index)[4 - min(4, size) :] + bytes(max(0, size - 4))
        world.gateway.transmit(Transmit(destination, payload, source, ecn))
        expected.setdefault((destination.host, 7), []).append((source, ecn, payload))
    assert world.gateway.flush()
    got: dict[tuple[str, int], list[tuple[bytes | None, int, bytes]]] = {}
    for sent in world.udp4.sent:
        assert len(sent.payloads) <= 64
        assert sum(map(len, sent.payloads)) <= 65535 - 68
        assert all(len(payload) == len(sent.payloads[0]) for payload in sent.payloads[:-1])
        assert len(sent.payloads[-1]) <= len(sent.payloads[0])
        got.setdefault(sent.address, []).extend((sent.source, sent.ecn, datagram) for datagram in sent.datagrams)
    assert got == expected
    world.close()


# TUN.

segment = st.tuples(
    st.integers(0, 1),  # connection
    st.sampled_from([0, 1, 50, 100, 100, 100, 100]),  # payload
    st.sampled_from([ACK, ACK, ACK, ACK | PSH, ACK | FIN, SYN]),
    st.sampled_from([0, 0, 0, 0, 3]),  # bytes lost before it
    st.booleans(),  # TCP or UDP
)


@given(addresses, st.lists(segment, max_size=40))
@settings(deadline=None)
def test_what_is_coalesced_and_split_again_is_what_was_queued_per_connection(
    fields: dict[str, bytes], segments: list[tuple[int, int, int, int, bool]]
) -> None:
    writer, reader = World(), World()
    expected: dict[bytes, list[bytes]] = {}
    sequences = [0xFFFF_FF00, 5]
    for number, (connection, size, flags, lost, is_tcp) in enumerate(segments):
        payload = bytes((number,)) * size
        if is_tcp:
            sequences[connection] = sequences[connection] + lost & 0xFFFF_FFFF
            packet = tcp(payload, **fields, sport=connection, seq=sequences[connection], flags=flags)
            sequences[connection] = sequences[connection] + size & 0xFFFF_FFFF
        else:
            packet = udp(payload, **fields, sport=connection)
        writer.gateway.write_tun(packet)
        expected.setdefault(bytes(pack_key(key_of(packet))), []).append(packet)
    got: dict[bytes, list[bytes]] = {}
    for write in writer.written():
        for item in reader.read(write[10:], write[:10]):
            assert isinstance(item, OutboundPacket)
            assert checksums_are_valid(item.packet)
            got.setdefault(bytes(pack_key(key_of(item.packet))), []).append(item.packet)
    assert {key: list(map(_without_id, packets)) for key, packets in got.items()} == {
        key: list(map(_without_id, packets)) for key, packets in expected.items()
    }
    writer.close()
    reader.close()


def _without_id(packet: bytes) -> bytes:
    """Identification and header checksum aside, which the kernel renumbers when it splits."""
    return packet if packet[0] >> 4 == 6 else packet[:4] + packet[6:10] + packet[12:]


@given(
    st.binary(max_size=200),
    st.sampled_from([0, 1, 4, 5, 3, 0x81]),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_no_read_from_the_tun_raises(
    packet: bytes, gso_type: int, size: int, start: int, offset: int, resembles_ip: bool
) -> None:
    world = World()
    if resembles_ip and packet:
        packet = bytes((0x45 if packet[0] & 1 else 0x60,)) + packet[1:]
    world.read(packet, struct.pack("=BBHHHH", 1, gso_type, 0, size, start, offset))
    world.close()


# Keys and translation.


@given(st.binary(max_size=80), st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_flow_key_is_given_only_for_packets_that_the_policy_would_parse(data: bytes, repair: bool) -> None:
    packet = bytearray(data)
    if repair and len(packet) >= 40:
        packet[0] = 0x45 if packet[0] & 1 else 0x60
        packet[9 if packet[0] == 0x45 else 6] = (6, 17, 1, 58)[packet[1] & 3]
        if packet[0] == 0x45:
            packet[2:4], packet[6:8] = struct.pack(">H", len(packet)), b"\x40\0"
        else:
            packet[4:6] = struct.pack(">H", len(packet) - 40)
    key = flow_key(bytes(packet), 0, len(packet))
    try:
        parsed = inner.parse(bytes(packet))
    except Malformed:
        assert key is None
        return
    if key is not None:
        assert parsed.source_value is not None
        assert parsed.destination_value is not None
        ports = struct.pack(">HH", parsed.source_value & 0xFFFF, parsed.destination_value & 0xFFFF)
        assert key == parsed.source + parsed.destination + ports + bytes((parsed.protocol,))


transports = st.sampled_from(
    [tcp, udp, lambda payload, **f: udp(payload, zero_checksum=True, **f), lambda _, **f: echo(9, **f)]
)


@given(
    transports,
    addresses,
    st.binary(max_size=30),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 0xFFFF),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_a_flow_translates_as_the_policy_does(
    make, fields: dict[str, bytes], payload: bytes, new: bytes, port: int, inbound: bool, broken: bool
) -> None:
    packet = bytearray(make(payload, **fields))
    if broken:
        packet[-1] ^= 0x55
    address = new[: len(fields["source"])]
    parsed = inner.parse(bytes(packet))
    expected = (inner.rewrite_to_network if inbound else inner.rewrite_to_client)(parsed, address, port)
    key = pack_key(key_of(bytes(packet)))
    flow = Flow(Peer(1), key, inbound=inbound, rewrite=Rewrite(address, port), valid_until=1.0, token=1)
    assert flow.translation is not None
    flow.translation.apply(packet)
    assert packet == expected
    assert flow.translated_key == flow_key(packet, 0, len(packet))


# Datagrams.


@given(st.binary(max_size=1400), st.integers(0, 3), st.sampled_from([CLIENT, Endpoint(bytes((203, 0, 113, 3)), 3478)]))
@settings(deadline=None)
def test_no_datagram_raises_and_none_vanishes_unless_it_is_ours(data: bytes, shape: int, source: Endpoint) -> None:
    engine = World.engine()
    engine.add_session(1, 7, 8, receive_key=bytes(32), send_key=bytes(32), now=1.0)
    engine.set_channel(Endpoint(bytes((203, 0, 113, 3)), 3478), 0x4000, usable=True)
    message = b"\4\0\0\0\7\0\0\0" + data
    payload = (data, message, b"\x40\0" + struct.pack(">H", len(message) & 0xFFFF) + message, b"\x40\0" + data)[shape]
    items = list(engine.handle_datagram(Datagram(payload, source, GATEWAY, 0), 1.0))
    counters = engine.counters()
    if not items:
        assert len(payload) > 1316 or not payload or counters["drop_undecryptable"] == 1
    else:
        assert items == [Datagram(payload, source, GATEWAY, 0)]


@given(st.lists(st.tuples(st.integers(1, 1280), st.booleans()), min_size=1, max_size=30), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_two_engines_exchange_any_packets_in_any_order(sizes: list[tuple[int, bool]], seed: int) -> None:
    world = World()
    packets = [udp(bytes(size), sport=number)[: size + 28] for number, (size, _) in enumerate(sizes) if size <= 1252]
    messages = [world.sealed(packet) for packet in packets]
    random.Random(seed).shuffle(messages)
    got: list[bytes] = []
    for message in messages * 2:
        world.udp4.put(message)
        got += [item.packet for item in world.gateway.receive_udp(socket.AF_INET, 1.0) if isinstance(item, InnerPacket)]
    assert sorted(got) == sorted(packets)
    world.close()
