"""The handshake of spec connectivity A.5, byte for byte, and the protocol's self-checks."""

from __future__ import annotations

import pytest

from fzg.secret import Secret
from fzg.wire.wireguard import Initiation, Response, tai64n
from fzg.wireguard import noise
from fzg.wireguard.cookie import CookieJar
from fzg.wireguard.keys import KeyPair, derive, digest
from fzg.wireguard.peer import HandshakeCompleted, Peer, identify
from tests.unit.wireguard_world import MemorySessions

CLIENT_PUBLIC = bytes.fromhex("7b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13")
GATEWAY_PUBLIC = bytes.fromhex("0faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20")
PSK = b"\x55" * 32
INITIATION = bytes.fromhex(
    "0100000001bc0a007b0d47d93427f8311160781c7c733fd89f88970aef490d8aa0ee19a4cb8a1b1481e498317da959fba4"
    "6669572516a5e6c021bfa620bb6c56ca0082e1feae14988c2c64d024c617734a263f76a008df04d0f94bad8ee75ee7e1c2"
    "68a15fd83962ae50c2bfd373f2991206eb3df798cfc97bc4ffd3dea9c84e5739f8b100000000000000000000000000000000"
)
RESPONSE = bytes.fromhex(
    "020000000156341201bc0a00ff2ee45601ec1b67310c7790404585ae697331eee1c1f8cf2419731c1fff3e6b0fccd50183"
    "3b40b574dcda1aec39889e91e04f19baa42cddf1dced6376b8f6c200000000000000000000000000000000"
)
CLIENT_SENDS_WITH = bytes.fromhex("a007faf842d83f5bd3be20a14e0ffcec34c84867b78b051980602713205922de")
CLIENT_RECEIVES_WITH = bytes.fromhex("d982d5cd10d34a7802b6c19fa441cd9164d70e4f4d62007ab416879ee8bd1b99")
KEEPALIVE = bytes.fromhex("04000000015634120000000000000000f1bce9fd9651b3f6b50c00179cbd1e01")
TIMESTAMP = 1_700_000_000_000_000_500

CLIENT = KeyPair.of(Secret(b"\x11" * 32))
GATEWAY = KeyPair.of(Secret(b"\x22" * 32))


def gateway_peer(engine: MemorySessions) -> Peer:
    return Peer(
        static=GATEWAY,
        remote_public=CLIENT_PUBLIC,
        preshared_key=Secret(PSK),
        connection_index=0x123456,
        peer=1,
        engine=engine,
        random=lambda n: b"\x44" * n,
        unix_offset=0.0,
        now=5.0,
    )


def test_static_keys_have_the_given_public_keys() -> None:
    assert (CLIENT.public, GATEWAY.public) == (CLIENT_PUBLIC, GATEWAY_PUBLIC)


def test_the_construction_hashes_to_the_known_values() -> None:
    chaining_key = digest(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
    assert chaining_key[:8].hex() == "60e26daef327efc0"
    assert digest(chaining_key, b"WireGuard v1 zx2c4 Jason@zx2c4.com")[:8].hex() == "2211b361081ac566"


def test_key_derivation_is_hkdf() -> None:
    one, two = derive(b"k" * 32, b"data", 1), derive(b"k" * 32, b"data", 3)
    assert one == two[:1]
    assert len({*two}) == 3


@pytest.mark.spec("CONN-69")
def test_the_gateway_answers_the_initiation_with_exactly_the_given_response() -> None:
    engine = MemorySessions()
    peer = gateway_peer(engine)
    partial = identify(GATEWAY, INITIATION)
    assert partial is not None
    assert partial.remote_static == CLIENT_PUBLIC
    assert peer.handle_initiation(partial, 5.0)
    assert peer.poll_transmit() == RESPONSE
    assert peer.poll_transmit() is None
    session = engine.sessions[0x12345601]
    assert session.receive_key == CLIENT_SENDS_WITH
    assert session.send_key == CLIENT_RECEIVES_WITH
    assert session.remote_index == 0x000ABC01


@pytest.mark.spec("CONN-70")
def test_the_keepalive_makes_the_session_usable_for_sending() -> None:
    engine = MemorySessions()
    peer = gateway_peer(engine)
    partial = identify(GATEWAY, INITIATION)
    assert partial is not None
    peer.handle_initiation(partial, 5.0)
    peer.poll_transmit()
    assert engine.seal(1, b"data", 5.0) is None
    opened = engine.open(KEEPALIVE, 5.1)
    assert opened is not None
    assert opened.packet == b""
    assert opened.confirmed == 0x12345601
    peer.handle_session_confirmed(opened.confirmed, 5.1)
    assert engine.seal(1, b"data", 5.2) is not None
    assert peer.poll_transmit() is None
    assert peer.poll_event() == HandshakeCompleted(5.1)


def test_the_client_makes_exactly_the_given_initiation_and_accepts_the_response() -> None:
    shared = CLIENT.exchange(GATEWAY_PUBLIC)
    assert shared is not None
    begun = noise.initiate(
        CLIENT,
        remote_public=GATEWAY_PUBLIC,
        shared=shared,
        local_index=0x000ABC01,
        ephemeral=KeyPair.of(Secret(b"\x33" * 32)),
        timestamp=tai64n(TIMESTAMP),
    )
    assert begun is not None
    message, pending = begun
    assert CookieJar(GATEWAY_PUBLIC).stamp(message, 0.0) == INITIATION
    established = noise.complete(pending, Response.parse(RESPONSE), static=CLIENT, preshared_key=PSK)
    assert established is not None
    assert established.remote_index == 0x12345601
    assert established.keys.send == CLIENT_SENDS_WITH
    assert established.keys.receive == CLIENT_RECEIVES_WITH


def test_the_timestamp_of_the_initiation_is_tai64n_with_nanoseconds() -> None:
    partial = identify(GATEWAY, INITIATION)
    shared = GATEWAY.exchange(CLIENT_PUBLIC)
    assert partial is not None
    assert shared is not None
    opened = noise.authenticate(partial, shared)
    assert opened is not None
    assert opened.timestamp == ((1 << 62) + 37 + 1_700_000_000).to_bytes(8, "big") + (500).to_bytes(4, "big")


@pytest.mark.parametrize("bit", range(0, (148 - 32) * 8, 7))
def test_no_changed_initiation_is_authentic(bit: int) -> None:
    message = bytearray(INITIATION)
    message[bit // 8] ^= 1 << (bit % 8)
    partial = identify(GATEWAY, bytes(message))
    shared = GATEWAY.exchange(CLIENT_PUBLIC)
    assert shared is not None
    if 4 <= bit // 8 < 8:  # the sender index is covered by MAC1 only
        assert partial is not None
    else:
        assert partial is None or noise.authenticate(partial, shared) is None


def test_an_ephemeral_key_of_low_order_is_dropped() -> None:
    message = Initiation.parse(INITIATION)._replace(ephemeral=bytes(32)).encode()
    assert identify(GATEWAY, message) is None
    assert GATEWAY.exchange(bytes(32)) is None


def test_no_key_shows_in_a_repr() -> None:
    partial = identify(GATEWAY, INITIATION)
    shared = GATEWAY.exchange(CLIENT_PUBLIC)
    assert partial is not None
    assert shared is not None
    opened = noise.authenticate(partial, shared)
    assert opened is not None
    answer = noise.respond(
        opened, remote_public=CLIENT_PUBLIC, preshared_key=PSK, local_index=1, ephemeral=KeyPair.generate(bytes)
    )
    assert answer is not None
    text = repr((GATEWAY, partial, opened, answer[1]))
    for secret in (b"\x22" * 32, partial.state.chaining_key, answer[1].keys.send, answer[1].keys.receive):
        assert repr(secret) not in text
