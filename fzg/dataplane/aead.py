"""ChaCha20-Poly1305 on buffers that live as long as the engine.

libsodium's own functions, called through PyNaCl's cffi module, work in place on fixed pointers; the public bindings
allocate and copy three times per packet and take more than twice as long. Should a future PyNaCl hide the module,
`Aead` falls back to the bindings.
"""

from __future__ import annotations

import struct
from typing import Any

from nacl import bindings
from nacl.exceptions import CryptoError

TAG_SIZE = 16

# WireGuard's nonce: four zero bytes, then the counter (whitepaper 5.4.6).
_NONCE = struct.Struct("<4xQ")


class Aead:
    """`open` turns ciphertext in `received` into plaintext at the start of `plain`; `seal` encrypts in `sealed`."""

    def __init__(self, *, received: bytearray, plain: bytearray, sealed: bytearray) -> None:
        self._received = received
        self._plain = plain
        self._sealed = sealed

    def open(self, offset: int, size: int, counter: int, key: bytes) -> bool:
        """Decrypt `size` bytes, tag included, at `offset` of `received`; False if they do not authenticate."""
        ciphertext = bytes(self._received[offset : offset + size])
        try:
            plaintext = bindings.crypto_aead_chacha20poly1305_ietf_decrypt(ciphertext, None, _NONCE.pack(counter), key)
        except CryptoError:
            return False
        self._plain[: len(plaintext)] = plaintext
        return True

    def seal(self, offset: int, size: int, counter: int, key: bytes) -> None:
        """Encrypt `size` bytes at `offset` of `sealed` in place; the tag follows them."""
        plaintext = bytes(self._sealed[offset : offset + size])
        self._sealed[offset : offset + size + TAG_SIZE] = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(
            plaintext, None, _NONCE.pack(counter), key
        )


class SodiumAead(Aead):
    """The same on raw pointers."""

    def __init__(self, *, received: bytearray, plain: bytearray, sealed: bytearray) -> None:
        from nacl import _sodium

        super().__init__(received=received, plain=plain, sealed=sealed)
        ffi: Any = _sodium.ffi
        self._null = ffi.NULL
        self._encrypt = _sodium.lib.crypto_aead_chacha20poly1305_ietf_encrypt
        self._decrypt = _sodium.lib.crypto_aead_chacha20poly1305_ietf_decrypt
        # from_buffer also pins the buffers' sizes, so that these pointers stay valid.
        self._received_at = ffi.from_buffer("unsigned char[]", received)
        self._plain_at = ffi.from_buffer("unsigned char[]", plain)
        self._sealed_at = ffi.from_buffer("unsigned char[]", sealed)

    def open(self, offset: int, size: int, counter: int, key: bytes) -> bool:
        """See `Aead.open`."""
        null = self._null
        source = self._received_at + offset
        nonce = _NONCE.pack(counter)
        return bool(self._decrypt(self._plain_at, null, null, source, size, null, 0, nonce, key) == 0)

    def seal(self, offset: int, size: int, counter: int, key: bytes) -> None:
        """See `Aead.seal`."""
        null = self._null
        at = self._sealed_at + offset
        self._encrypt(at, null, at, size, null, 0, null, _NONCE.pack(counter), key)


def make_aead(*, received: bytearray, plain: bytearray, sealed: bytearray) -> Aead:
    """The fastest there is."""
    try:
        return SodiumAead(received=received, plain=plain, sealed=sealed)
    except (ImportError, AttributeError):
        return Aead(received=received, plain=plain, sealed=sealed)
