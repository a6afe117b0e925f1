"""X25519 keys, the hash and the derivation of WireGuard (whitepaper 5.4), on libsodium and hashlib."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import blake2s
from typing import TYPE_CHECKING

from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError

from fzg.secret import Secret

if TYPE_CHECKING:
    from fzg.sansio import Random

KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An X25519 pair: a handshake's own, or the one that lives as long as the process (spec connectivity 1.2)."""

    private: Secret[bytes]
    public: bytes

    @classmethod
    def of(cls, private: Secret[bytes]) -> KeyPair:
        """From 32 random bytes; the multiplication clamps them (spec 1.2)."""
        return cls(private, crypto_scalarmult_base(private.reveal()))

    @classmethod
    def generate(cls, random: Random) -> KeyPair:
        """A fresh pair."""
        return cls.of(Secret(random(KEY_SIZE)))

    def exchange(self, public: bytes) -> bytes | None:
        """The Diffie-Hellman result; None if `public` is one of the few points that make it zero."""
        try:
            return crypto_scalarmult(self.private.reveal(), public)
        except CryptoError:
            return None


def digest(*parts: bytes) -> bytes:
    """HASH over the concatenation, 32 bytes."""
    return blake2s(b"".join(parts)).digest()


def keyed_mac(key: bytes, *parts: bytes) -> bytes:
    """MAC: keyed BLAKE2s of 16 bytes over the concatenation."""
    return blake2s(b"".join(parts), key=key, digest_size=16).digest()


def derive(chaining_key: bytes, data: bytes, count: int) -> list[bytes]:
    """KDF_n: `count` keys of 32 bytes (HKDF with HMAC-BLAKE2s)."""
    secret = hmac.digest(chaining_key, data, blake2s)
    keys = [hmac.digest(secret, b"\x01", blake2s)]
    for number in range(2, count + 1):
        keys.append(hmac.digest(secret, keys[-1] + bytes((number,)), blake2s))
    return keys


def mac1_key(public: bytes) -> bytes:
    """The key of MAC1 in messages to the owner of `public`."""
    return digest(b"mac1----", public)


def cookie_key(public: bytes) -> bytes:
    """The key that encrypts cookies sent by the owner of `public`."""
    return digest(b"cookie--", public)
