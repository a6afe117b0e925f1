from __future__ import annotations

import hashlib
import random
import struct

import pytest
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt

from fzg.wire.endpoint import Endpoint
from fzg.wireguard.gate import Admitted, CookieReply, Gate, Rejected, Verdict

GATEWAY_PUBLIC = bytes.fromhex("0faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20")
SOURCE = Endpoint(bytes((203, 0, 113, 7)), 40000)
NOW = 500.0


def mac(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2s(data, key=key, digest_size=16).digest()


def handshake(sender: int = 1, *, kind: int = 1, cookie: bytes | None = None) -> bytes:
    size = {1: 148, 2: 92}[kind]
    body = struct.pack("<II", kind, sender) + b"x" * (size - 8 - 32)
    body += mac(hashlib.blake2s(b"mac1----" + GATEWAY_PUBLIC).digest(), body)
    return body + (bytes(16) if cookie is None else mac(cookie, body))


def open_cookie(reply: bytes, message: bytes) -> bytes:
    assert len(reply) == 64
    kind, receiver = struct.unpack_from("<II", reply)
    assert kind == 3
    assert receiver == struct.unpack_from("<I", message, 4)[0]
    key = hashlib.blake2s(b"cookie--" + GATEWAY_PUBLIC).digest()
    return crypto_aead_xchacha20poly1305_ietf_decrypt(reply[32:], message[-32:-16], reply[8:32], key)


@pytest.fixture
def gate() -> Gate:
    return Gate(static_public=GATEWAY_PUBLIC, random=random.Random(3).randbytes, now=NOW)


def fill(gate: Gate, now: float, count: int = 100) -> None:
    for sender in range(count):
        assert gate.admit(handshake(sender), SOURCE, now) == Admitted()


def challenge(verdict: Verdict) -> bytes:
    assert isinstance(verdict, CookieReply)
    return verdict.message


@pytest.mark.parametrize("kind", [1, 2])
def test_a_message_with_a_wrong_mac1_is_rejected_and_not_counted(gate: Gate, kind: int) -> None:
    message = bytearray(handshake(kind=kind))
    message[-17] ^= 1
    for _ in range(200):
        assert gate.admit(bytes(message), SOURCE, NOW) == Rejected("wrong MAC1")
    fill(gate, NOW)
    assert gate.verdicts == {"wrong MAC1": 200, "admitted": 100}


@pytest.mark.parametrize(
    "message", [b"", bytes(148), struct.pack("<I", 3) + bytes(60), struct.pack("<I", 4) + bytes(60)]
)
def test_other_messages_are_rejected(gate: Gate, message: bytes) -> None:
    assert gate.admit(message, SOURCE, NOW) == Rejected("not a handshake message")


@pytest.mark.spec("CONN-81")
def test_the_101st_message_of_a_window_is_answered_with_a_cookie(gate: Gate) -> None:
    fill(gate, NOW, 60)
    for sender in range(40):
        assert gate.admit(handshake(sender, kind=2), SOURCE, NOW + 0.9) == Admitted()
    message = handshake(0x1234)
    assert len(open_cookie(challenge(gate.admit(message, SOURCE, NOW + 0.99)), message)) == 16


@pytest.mark.spec("CONN-81")
def test_a_retry_with_the_cookie_is_admitted_under_load(gate: Gate) -> None:
    fill(gate, NOW)
    message = handshake()
    cookie = open_cookie(challenge(gate.admit(message, SOURCE, NOW)), message)
    assert gate.admit(handshake(2, cookie=cookie), SOURCE, NOW + 0.5) == Admitted()
    assert isinstance(gate.admit(handshake(3), SOURCE, NOW + 0.5), CookieReply)


@pytest.mark.spec("CONN-81")
def test_service_is_normal_again_after_a_second(gate: Gate) -> None:
    fill(gate, NOW)
    assert isinstance(gate.admit(handshake(), SOURCE, NOW + 0.999), CookieReply)
    fill(gate, NOW + 1.0)


def test_a_window_begins_with_its_first_message_not_on_a_grid(gate: Gate) -> None:
    fill(gate, NOW + 0.8)
    assert isinstance(gate.admit(handshake(), SOURCE, NOW + 1.7), CookieReply)
    fill(gate, NOW + 1.8)
    assert isinstance(gate.admit(handshake(), SOURCE, NOW + 2.7), CookieReply)


def test_a_cookie_is_for_the_ip_and_not_for_the_port(gate: Gate) -> None:
    fill(gate, NOW)
    message = handshake()
    cookie = open_cookie(challenge(gate.admit(message, SOURCE, NOW)), message)
    elsewhere = Endpoint(bytes((203, 0, 113, 8)), 40000)
    assert gate.admit(handshake(cookie=cookie), Endpoint(SOURCE.ip, 1), NOW) == Admitted()
    assert isinstance(gate.admit(handshake(cookie=cookie), elsewhere, NOW), CookieReply)
    assert isinstance(gate.admit(handshake(cookie=cookie), Endpoint(bytes(16), 1), NOW), CookieReply)


def test_a_cookie_changes_every_128_seconds_from_the_start_of_the_gate(gate: Gate) -> None:
    def cookie_at(now: float) -> bytes:
        fill(gate, now)
        message = handshake()
        return open_cookie(challenge(gate.admit(message, SOURCE, now)), message)

    first = cookie_at(NOW)
    assert cookie_at(NOW + 127.9) == first
    second = cookie_at(NOW + 129.0)
    assert second != first
    assert isinstance(gate.admit(handshake(cookie=first), SOURCE, NOW + 129.0), CookieReply)
    assert gate.admit(handshake(cookie=second), SOURCE, NOW + 129.0) == Admitted()


def test_two_gates_have_different_secrets() -> None:
    cookies = set()
    for seed in (1, 2):
        gate = Gate(static_public=GATEWAY_PUBLIC, random=random.Random(seed).randbytes, now=NOW)
        fill(gate, NOW)
        message = handshake()
        cookies.add(open_cookie(challenge(gate.admit(message, SOURCE, NOW)), message))
    assert len(cookies) == 2


def test_the_cookie_is_the_keyed_hash_of_rotation_and_padded_address() -> None:
    secret = b"s" * 16
    gate = Gate(static_public=GATEWAY_PUBLIC, random=lambda n: b"s" * n, now=NOW)
    fill(gate, NOW + 300.0)
    message = handshake()
    cookie = open_cookie(challenge(gate.admit(message, SOURCE, NOW + 300.0)), message)
    assert cookie == mac(secret, struct.pack("<Q", 2) + SOURCE.ip + bytes(12))
