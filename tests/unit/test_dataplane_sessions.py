"""Sessions, the replay window, payload rules and the times that WireGuard's timers need."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane.aead import Aead, SodiumAead
from fzg.dataplane.engine import Datagram, InnerPacket, SessionConfirmed
from fzg.dataplane.replay import ReplayWindow
from fzg.tunnel.tunnel import Drop, Tunnel
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import CLIENT, CLIENT6, GATEWAY, GATEWAY6, SERVER6, World, each_engine, ip, tcp, udp  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.usefixtures("each_engine")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def _inner(items: list) -> list[bytes]:
    return [item.packet for item in items if isinstance(item, InnerPacket)]


# Spec connectivity A.5.
CLIENT_SENDS = bytes.fromhex("a007faf842d83f5bd3be20a14e0ffcec34c84867b78b051980602713205922de")
CLIENT_RECEIVES = bytes.fromhex("d982d5cd10d34a7802b6c19fa441cd9164d70e4f4d62007ab416879ee8bd1b99")
KEEPALIVE = bytes.fromhex("04000000015634120000000000000000f1bce9fd9651b3f6b50c00179cbd1e01")


def test_the_specifications_keepalive_confirms_the_session_and_is_not_passed_on():
    engine = World.engine()
    engine.add_session(1, 0x12345601, 0x000ABC01, receive_key=CLIENT_SENDS, send_key=CLIENT_RECEIVES, now=1.0)
    assert engine.handle_datagram(Datagram(KEEPALIVE, CLIENT, GATEWAY, 0), 2.0) == [SessionConfirmed(0x12345601)]
    assert engine.handle_datagram(Datagram(KEEPALIVE, CLIENT, GATEWAY, 0), 2.0) == []
    assert engine.counters()["drop_replayed"] == 1


def test_the_client_side_makes_exactly_that_keepalive():
    engine = World.engine()
    engine.add_session(1, 0x000ABC01, 0x12345601, receive_key=CLIENT_RECEIVES, send_key=CLIENT_SENDS, now=1.0)
    engine.use_session(1, 0x000ABC01)
    assert engine.seal(1, b"", 1.0) == KEEPALIVE


@pytest.mark.parametrize("implementation", [Aead, SodiumAead])
def test_both_ciphers_agree_with_rfc_8439(implementation: type[Aead]):
    key, counter, text = bytes(range(32)), 0x0102030405060708, b"x" * 100
    received, plain, sealed = bytearray(300), bytearray(300), bytearray(300)
    cipher = implementation(received=received, plain=plain, sealed=sealed)
    sealed[7:107] = text
    cipher.seal(7, 100, counter, key)
    reference = SodiumAead(received=received, plain=plain, sealed=bytearray(sealed))
    received[11 : 11 + 116] = sealed[7:123]
    assert cipher.open(11, 116, counter, key)
    assert plain[:100] == text
    assert reference.open(11, 116, counter, key)
    assert not cipher.open(11, 116, counter + 1, key)
    received[12] ^= 1
    assert not cipher.open(11, 116, counter, key)


def test_the_first_authenticated_packet_is_announced_before_its_own_item(world: World):
    packet = udp()
    confirmed, inner = world.arrive(world.sealed(packet), ecn=2)
    assert confirmed == SessionConfirmed(0x5001)
    assert inner == InnerPacket(World.PEER, packet, 2, CLIENT, GATEWAY)
    assert _inner(world.arrive(world.sealed(packet))) == [packet]


@pytest.mark.spec("CONN-12")
def test_data_is_accepted_from_any_address(world: World):
    packet = udp()
    for source in (CLIENT, Endpoint(CLIENT.ip, 1), Endpoint(bytes((8, 8, 8, 8)), 53), GATEWAY6):
        assert _inner(world.arrive(world.sealed(packet), source=source)) == [packet]


def test_data_of_an_unknown_session_is_for_the_node(world: World):
    message = world.sealed(udp())
    world.gateway.remove_session(0x5001)
    assert world.arrive(message) == [Datagram(message, CLIENT, GATEWAY, 0)]


@pytest.mark.parametrize(
    "payload", [b"\x01" + bytes(147), b"\x04\0\0\0", b"\x04\0\0\1" + bytes(60), b"\0\1\0\0\x21\x12\xa4\x42"]
)
def test_whatever_is_not_data_is_for_the_node_unchanged(world: World, payload: bytes):
    assert world.arrive(payload, ecn=1) == [Datagram(payload, CLIENT, GATEWAY, 1)]


def test_forged_data_is_dropped_and_burns_no_counter(world: World):
    message = bytearray(world.sealed(udp()))
    message[-1] ^= 1
    assert world.arrive(bytes(message)) == []
    assert world.counters["drop_undecryptable"] == 1
    message[-1] ^= 1
    assert _inner(world.arrive(bytes(message))) == [udp()]


@pytest.mark.spec("CONN-71")
def test_data_goes_out_on_the_older_session_until_the_core_switches(world: World):
    assert world.gateway.seal(World.PEER, udp(), 1.0)[4:8] == (0x9005001).to_bytes(4, "little")
    world.handshake(2, use=False)
    assert world.gateway.seal(World.PEER, udp(), 1.0)[4:8] == (0x9005001).to_bytes(4, "little")
    assert world.arrive(world.client.seal(World.PEER, b"", 1.0)) == [SessionConfirmed(0x5002)]
    world.gateway.use_session(World.PEER, 0x5002)
    assert world.gateway.seal(World.PEER, udp(), 1.0)[4:8] == (0x9005002).to_bytes(4, "little")


@pytest.mark.spec("CONN-71")
def test_a_session_that_was_only_added_sends_nothing():
    engine = World.engine()
    engine.add_session(1, 0x12345601, 0x000ABC01, receive_key=CLIENT_SENDS, send_key=CLIENT_RECEIVES, now=1.0)
    assert engine.seal(1, udp(), 1.0) is None
    assert engine.seal(2, udp(), 1.0) is None


def test_the_previous_session_still_opens_after_a_rekey(world: World):
    message = world.sealed(udp())
    world.handshake(2)
    assert _inner(world.arrive(message)) == [udp()]


def test_a_removed_session_is_not_used_any_more(world: World):
    world.gateway.remove_session(0x5001)
    world.gateway.remove_session(0x5001)
    assert world.gateway.seal(World.PEER, udp(), 1.0) is None
    world.handshake(2)
    world.gateway.remove_peer(World.PEER)
    assert world.gateway.seal(World.PEER, udp(), 1.0) is None


# Payload rules.


@pytest.mark.spec("CONN-76")
@pytest.mark.parametrize("size", [28, 29, 1000, 1279, 1280])
def test_data_messages_are_the_packet_and_32_bytes(world: World, size: int):
    """Nothing is padded (D11 is not done): the outer length tells little, and 15 bytes a packet are 15 bytes."""
    packet = udp(bytes(size - 28))
    assert len(world.gateway.seal(World.PEER, packet, 1.0)) == size + 32
    assert len(world.gateway.seal(World.PEER, b"", 1.0)) == 32


@pytest.mark.spec("CONN-75")
@pytest.mark.parametrize("make", [lambda: udp(b"abc"), lambda: udp(b"abc", source=CLIENT6, destination=SERVER6)])
def test_a_padded_packet_is_cut_to_its_ip_length(world: World, make):
    packet = make()
    assert _inner(world.arrive(world.sealed(packet + bytes(13)))) == [packet]


@pytest.mark.spec("CONN-75")
@pytest.mark.parametrize("make", [lambda: udp(b"abc"), lambda: udp(b"abc", source=CLIENT6, destination=SERVER6)])
def test_a_packet_shorter_than_its_ip_length_is_rejected(world: World, make):
    assert _inner(world.arrive(world.sealed(make()[:-1]))) == []
    assert world.counters["drop_inner_truncated"] == 1


@pytest.mark.spec("TUNNEL-2")
def test_surplus_bytes_are_an_error_on_the_tun_and_padding_after_decryption(world: World):
    packet = udp(bytes(12))
    assert len(packet) == 40
    (outbound,) = world.read(packet + bytes(20))
    assert isinstance(Tunnel(now=1.0).handle_tun_packet(outbound.packet, 1.0), Drop)
    world.allow(packet, inbound=False)
    assert world.read(packet + bytes(20)) == [outbound]
    assert _inner(world.arrive(world.sealed(packet + bytes(20)))) == [packet]


@pytest.mark.parametrize("plaintext", [b"\x45" + bytes(18), b"\x60" + bytes(38), b"\x50" + bytes(60), b"\0"])
def test_a_plaintext_that_is_no_ip_packet_is_rejected(world: World, plaintext: bytes):
    assert _inner(world.arrive(world.sealed(plaintext))) == []
    assert world.counters["drop_inner_not_ip"] == 1


def test_a_packet_above_1280_bytes_is_rejected_and_one_of_1280_is_not(world: World):
    big = udp(bytes(1281 - 28))
    assert world.client.seal(World.PEER, big, 1.0) is None
    message = _raw_seal(big)
    assert _inner(world.arrive(message)) == []
    assert world.counters["drop_inner_oversized"] == 1
    assert len(_inner(world.arrive(world.sealed(udp(bytes(1280 - 28)))))[0]) == 1280


def _raw_seal(packet: bytes) -> bytes:
    from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt as encrypt

    key = bytes((1, 1, 5)) + bytes(29)
    return struct.pack("<IIQ", 4, 0x5001, 900) + encrypt(packet, None, struct.pack("<4xQ", 900), key)


# Replay.


def _sequence(world: World, counters: list[int]) -> list[bool]:
    """Which of these counters the gateway accepts, in this order."""
    session = world.client._sessions[0x9005001]
    results = []
    for counter in counters:
        session.next_counter = counter
        results.append(bool(_inner(world.arrive(world.sealed(udp())))))
    return results


@pytest.mark.spec("CONN-74")
def test_the_window_is_8192_counters_wide(world: World):
    assert _sequence(world, [20_000]) == [True]
    next_counter = 20_001
    assert _sequence(world, [0, next_counter - 8194, next_counter - 8193]) == [False] * 3
    assert _sequence(world, [next_counter - 8192] * 2) == [True, False]
    assert _sequence(world, [19_999, 19_999, 20_000, 20_001, 20_001]) == [True, False, False, True, False]


def test_a_jump_of_any_size_forgets_only_what_is_too_old():
    window = ReplayWindow()
    for counter in (0, 5, 8191, 8192, 8200, 16_500, 1 << 40, (1 << 64) - 1):
        assert window.accepts(counter)
        window.mark(counter)
        assert not window.accepts(counter)
        assert window.next == counter + 1
        if counter:
            assert window.accepts(counter - 1) == (counter - 1 != 8191)


# Times.


def test_activity_counts_the_first_unanswered_packet_and_the_last_of_each_kind(world: World):
    gateway, peer = world.gateway, World.PEER
    assert gateway.activity(peer) == (0.0, 0.0, 0.0, 0.0, 0.0, False, False)
    gateway.seal(peer, udp(), 3.0)
    gateway.seal(peer, udp(), 4.0)
    assert gateway.activity(peer) == (3.0, 0.0, 4.0, 0.0, 4.0, True, False)
    world.arrive(world.sealed(udp()), now=5.0)
    world.arrive(world.sealed(udp()), now=6.0)
    assert gateway.activity(peer) == (0.0, 5.0, 4.0, 6.0, 6.0, True, True)
    gateway.seal(peer, b"", 7.0)
    assert gateway.activity(peer) == (0.0, 0.0, 7.0, 6.0, 6.0, True, True)
    world.arrive(world.client.seal(peer, b"", 1.0), now=8.0)
    assert gateway.activity(peer) == (0.0, 0.0, 7.0, 8.0, 6.0, True, True)
    world.handshake(2)
    assert gateway.activity(peer) == (0.0, 0.0, 7.0, 8.0, 6.0, False, False)


def test_handshake_messages_answer_data_in_both_directions(world: World):
    gateway, peer = world.gateway, World.PEER
    gateway.seal(peer, udp(), 3.0)
    gateway.note_handshake(peer, sent=False, now=4.0)
    assert gateway.activity(peer)[:5] == (0.0, 0.0, 3.0, 4.0, 3.0)
    world.arrive(world.sealed(udp()), now=5.0)
    gateway.note_handshake(peer, sent=True, now=6.0)
    assert gateway.activity(peer)[:5] == (0.0, 0.0, 6.0, 5.0, 5.0)


def test_forwarded_packets_count_as_activity_too(world: World):
    up, down = tcp(b"up"), tcp(b"down", source=tcp()[16:20], destination=tcp()[12:16])
    world.allow(up, inbound=True)
    world.allow(down, inbound=False)
    world.arrive(world.sealed(up), now=10.0)
    assert world.gateway.activity(World.PEER)[:5] == (0.0, 10.0, 0.0, 10.0, 10.0)
    world.read(down, now=11.0)
    assert world.gateway.activity(World.PEER)[:5] == (11.0, 0.0, 11.0, 10.0, 11.0)


def test_an_ip_packet_of_another_protocol_reaches_the_policy_whole(world: World):
    gre = ip(tcp()[12:16], tcp()[16:20], 47, bytes(16))
    assert _inner(world.arrive(world.sealed(gre))) == [gre]
