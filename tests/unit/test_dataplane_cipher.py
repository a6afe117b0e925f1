"""Both engines' ChaCha20-Poly1305 against a naive one, which is checked against RFC 8439."""

from __future__ import annotations

import os
import struct

import pytest

from fzg.dataplane.engine import Datagram, InnerPacket
from tests.unit.dataplane_world import CLIENT, GATEWAY, World, each_engine, udp  # noqa: F401

pytestmark = pytest.mark.usefixtures("each_engine")

MASK = 0xFFFF_FFFF
KEY = bytes(range(0x80, 0xA0))


def _quarter_round(state: list[int], a: int, b: int, c: int, d: int) -> None:
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[x] = state[x] + state[y] & MASK
        mixed = state[z] ^ state[x]
        state[z] = (mixed << bits | mixed >> 32 - bits) & MASK


def _block(key: bytes, nonce: bytes, counter: int) -> bytes:
    start = [
        *struct.unpack("<4I", b"expand 32-byte k"),
        *struct.unpack("<8I", key),
        counter,
        *struct.unpack("<3I", nonce),
    ]
    state = list(start)
    for _ in range(10):
        for column in range(4):
            _quarter_round(state, column, 4 + column, 8 + column, 12 + column)
        for column in range(4):
            _quarter_round(state, column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return struct.pack("<16I", *(one + other & MASK for one, other in zip(state, start, strict=True)))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def seal(key: bytes, nonce: bytes, plaintext: bytes, additional: bytes = b"") -> bytes:
    """RFC 8439 2.8, word by word."""
    stream = b"".join(_block(key, nonce, 1 + i) for i in range(-(-len(plaintext) // 64)))
    ciphertext = bytes(one ^ other for one, other in zip(plaintext, stream, strict=False))
    one_time = _block(key, nonce, 0)[:32]
    r = int.from_bytes(one_time[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    lengths = struct.pack("<QQ", len(additional), len(ciphertext))
    total = 0
    data = _padded(additional) + _padded(ciphertext) + lengths
    for at in range(0, len(data), 16):
        total = (total + int.from_bytes(data[at : at + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    total += int.from_bytes(one_time[16:], "little")
    return ciphertext + (total & (1 << 128) - 1).to_bytes(16, "little")


def test_the_naive_cipher_is_that_of_rfc_8439():
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    text += b"sunscreen would be it."
    sealed = seal(KEY, bytes.fromhex("070000004041424344454647"), text, bytes.fromhex("50515253c0c1c2c3c4c5c6c7"))
    assert sealed[:16] == bytes.fromhex("d31a8d34648e60db7b86afbc53ef7ec2")  # 2.8.2
    assert sealed[-16:] == bytes.fromhex("1ae10b594f09e26a7e902ecbd0600691")


def message(counter: int, packet: bytes, key: bytes = KEY) -> bytes:
    return struct.pack("<IIQ", 4, 7, counter) + seal(key, struct.pack("<4xQ", counter), packet)


def make_engine(key: bytes = KEY):
    engine = World.engine()
    engine.add_session(1, 7, 7, receive_key=key, send_key=key, now=1.0)
    engine.use_session(1, 7)
    return engine


def opened(engine, datagram: bytes) -> list[bytes]:
    items = engine.handle_datagram(Datagram(datagram, CLIENT, GATEWAY, 0), 1.0)
    return [item.packet for item in items if isinstance(item, InnerPacket)]


SIZES = (
    0,
    28,
    29,
    31,
    32,
    33,
    47,
    48,
    63,
    64,
    65,
    127,
    128,
    129,
    192,
    255,
    256,
    257,
    511,
    512,
    513,
    1023,
    1024,
    1279,
    1280,
)


@pytest.mark.parametrize("key", [KEY, bytes(32), b"\xff" * 32], ids=["counting", "zeros", "ones"])
def test_sealing_agrees_at_every_size(key: bytes):
    engine = make_engine(key)
    for counter, size in enumerate(SIZES):
        packet = udp(os.urandom(size - 28)) if size else b""
        assert engine.seal(1, packet, 1.0) == message(counter, packet, key)


@pytest.mark.parametrize("counter", [0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) + 5, (1 << 64) - 1])
def test_opening_agrees_at_every_counter(counter: int):
    packet = udp(b"\xff" * 200)
    engine = make_engine()
    assert opened(engine, message(counter, packet)) == [packet]
    assert opened(engine, message(counter, packet)) == []


@pytest.mark.parametrize("size", [28, 64, 1280])
def test_opening_agrees_at_sizes_of_one_and_many_blocks(size: int):
    packet = udp(os.urandom(size - 28))
    assert opened(make_engine(), message(3, packet)) == [packet]


def test_no_changed_bit_is_taken_for_genuine():
    engine = make_engine()
    genuine = message(0, udp(b"x"))
    for at in range(8, len(genuine)):  # type and index select the session
        for bit in range(8):
            forged = bytearray(genuine)
            forged[at] ^= 1 << bit
            assert opened(engine, bytes(forged)) == []
    for cut in range(1, len(genuine) - 32):
        assert opened(engine, genuine[:-cut]) == []
    assert opened(engine, genuine + b"\0") == []
    assert opened(engine, genuine) == [udp(b"x")]


PRIME = (1 << 130) - 5
EDGES = (
    0,
    1,
    4,
    5,
    (1 << 128) - 1,
    1 << 128,
    (1 << 128) + 1,
    (1 << 129) - 1,
    1 << 129,
    PRIME - 6,
    PRIME - 2,
    PRIME - 1,
)


def _with_sum(total: int, key: bytes, counter: int, blocks: int) -> bytes:
    """A plaintext for which Poly1305 ends at `total` before the last addition."""
    nonce = struct.pack("<4xQ", counter)
    r = int.from_bytes(_block(key, nonce, 0)[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    inverse = pow(r, -1, PRIME)
    wanted = total * inverse - int.from_bytes(struct.pack("<QQB", 0, 16 * blocks, 1), "little")
    while True:
        before = os.urandom(16 * (blocks - 1))
        reached = 0
        for at in range(0, len(before), 16):
            reached = (reached + int.from_bytes(before[at : at + 16] + b"\1", "little")) * r % PRIME
        last = (wanted * inverse - reached) % PRIME
        if last >> 128 == 1:  # one in four can be a block
            ciphertext = before + (last & (1 << 128) - 1).to_bytes(16, "little")
            stream = b"".join(_block(key, nonce, 1 + i) for i in range(-(-len(ciphertext) // 64)))
            return bytes(one ^ other for one, other in zip(ciphertext, stream, strict=False))


@pytest.mark.parametrize("blocks", [2, 5, 40, 80])
def test_the_authenticator_agrees_where_its_sum_is_at_an_edge(blocks: int):
    engine, opener = make_engine(), make_engine()
    for counter, total in enumerate(EDGES):
        plaintext = _with_sum(total, KEY, counter, blocks)
        expected = message(counter, plaintext)
        assert int.from_bytes(expected[-16:], "little") == (
            total + int.from_bytes(_block(KEY, struct.pack("<4xQ", counter), 0)[16:32], "little")
        ) % (1 << 128)
        assert engine.seal(1, plaintext, 1.0) == expected
        opened(opener, expected)
    assert "drop_undecryptable" not in opener.counters()


@pytest.mark.parametrize("tag", [bytes(16), b"\xff" * 16, b"\x80" + bytes(15), bytes(15) + b"\1"])
def test_no_tag_stands_for_any_other(tag: bytes):
    engine = make_engine()
    genuine = message(0, udp(b"x"))
    for forged in (genuine[:-16] + tag, genuine[:-16] + bytes(a ^ b for a, b in zip(genuine[-16:], tag, strict=True))):
        assert opened(engine, forged) == ([udp(b"x")] if forged == genuine else [])
    assert engine.counters()["drop_undecryptable"] >= 1
