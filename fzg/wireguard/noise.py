"""The Noise_IKpsk2 handshake, both roles, as functions from message to message (whitepaper 5.4.2 to 5.4.5).

Messages leave here with empty MACs (see `cookie`) and arrive with MACs already checked (see `gate`).
What a peer gets wrong yields None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from fzg.wire import Malformed
from fzg.wire.wireguard import Initiation, Response
from fzg.wireguard.keys import KeyPair, derive, digest

_CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
_IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
_INITIAL_CHAINING_KEY = digest(_CONSTRUCTION)
_INITIAL_HASH = digest(_INITIAL_CHAINING_KEY, _IDENTIFIER)
# Every handshake key encrypts exactly once, so the counter is always zero.
_ZERO_NONCE = bytes(12)


@dataclass(frozen=True, slots=True)
class TransportKeys:
    """What the two directions of a session are sealed with; the repr shows none of it."""

    receive: bytes = field(repr=False)
    send: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PartialInitiation:
    """An initiation read up to the sender's static key: enough to find the connection."""

    remote_static: bytes
    sender_index: int
    ephemeral: bytes = field(repr=False)
    timestamp: bytes = field(repr=False)
    state: SymmetricState = field(repr=False)


@dataclass(frozen=True, slots=True)
class OpenedInitiation:
    """An authentic initiation; `timestamp` orders it among those of its sender."""

    sender_index: int
    timestamp: bytes
    ephemeral: bytes = field(repr=False)
    state: SymmetricState = field(repr=False)


@dataclass(frozen=True, slots=True)
class PendingInitiation:
    """An initiation of ours that waits for its response."""

    local_index: int
    ephemeral: KeyPair = field(repr=False)
    state: SymmetricState = field(repr=False)


class Established(NamedTuple):
    """The outcome of a handshake."""

    local_index: int
    remote_index: int
    keys: TransportKeys


class SymmetricState(NamedTuple):
    """Noise's running hash and chaining key. Immutable: a message that fails leaves nothing behind."""

    hash: bytes
    chaining_key: bytes

    def mix_hash(self, data: bytes) -> SymmetricState:
        """`data` went over the wire."""
        return SymmetricState(digest(self.hash, data), self.chaining_key)

    def mix_key(self, data: bytes) -> SymmetricState:
        """`data` is secret or an ephemeral key, and no cipher key is needed now."""
        return SymmetricState(self.hash, derive(self.chaining_key, data, 1)[0])

    def mix_cipher_key(self, data: bytes) -> tuple[SymmetricState, bytes]:
        """As `mix_key`, and the key for the next field."""
        chaining_key, key = derive(self.chaining_key, data, 2)
        return SymmetricState(self.hash, chaining_key), key

    def mix_preshared_key(self, data: bytes) -> tuple[SymmetricState, bytes]:
        """The psk2 token, and the key for the next field."""
        chaining_key, mixed, key = derive(self.chaining_key, data, 3)
        return SymmetricState(digest(self.hash, mixed), chaining_key), key

    def encrypt(self, key: bytes, plaintext: bytes) -> tuple[SymmetricState, bytes]:
        """The field as it travels."""
        ciphertext = crypto_aead_chacha20poly1305_ietf_encrypt(plaintext, self.hash, _ZERO_NONCE, key)
        return self.mix_hash(ciphertext), ciphertext

    def decrypt(self, key: bytes, ciphertext: bytes) -> tuple[SymmetricState, bytes] | None:
        """The field's content, None if it is not authentic."""
        try:
            plaintext = crypto_aead_chacha20poly1305_ietf_decrypt(ciphertext, self.hash, _ZERO_NONCE, key)
        except CryptoError:
            return None
        return self.mix_hash(ciphertext), plaintext


def identify(static: KeyPair, message: bytes) -> PartialInitiation | None:
    """Read the sender's static key: one X25519 operation."""
    try:
        initiation = Initiation.parse(message)
    except Malformed:
        return None
    state = _begin(static.public, initiation.ephemeral)
    shared = static.exchange(initiation.ephemeral)
    if shared is None:
        return None
    state, key = state.mix_cipher_key(shared)
    opened = state.decrypt(key, initiation.static)
    if opened is None:
        return None
    state, remote_static = opened
    return PartialInitiation(remote_static, initiation.sender, initiation.ephemeral, initiation.timestamp, state)


def authenticate(partial: PartialInitiation, shared: bytes) -> OpenedInitiation | None:
    """Check that the owner of the static key sent it. `shared` is the exchange of the two static keys."""
    state, key = partial.state.mix_cipher_key(shared)
    opened = state.decrypt(key, partial.timestamp)
    if opened is None:
        return None
    state, timestamp = opened
    return OpenedInitiation(partial.sender_index, timestamp, partial.ephemeral, state)


def respond(
    opened: OpenedInitiation, *, remote_public: bytes, preshared_key: bytes, local_index: int, ephemeral: KeyPair
) -> tuple[Response, Established] | None:
    """Answer an initiation: two X25519 operations. The session is the peer's to confirm."""
    ephemeral_shared, static_shared = ephemeral.exchange(opened.ephemeral), ephemeral.exchange(remote_public)
    if ephemeral_shared is None or static_shared is None:
        return None
    state = opened.state.mix_hash(ephemeral.public).mix_key(ephemeral.public)
    state = state.mix_key(ephemeral_shared).mix_key(static_shared)
    state, key = state.mix_preshared_key(preshared_key)
    state, empty = state.encrypt(key, b"")
    receive, send = derive(state.chaining_key, b"", 2)
    response = Response(local_index, opened.sender_index, ephemeral.public, empty)
    return response, Established(local_index, opened.sender_index, TransportKeys(receive, send))


def initiate(
    static: KeyPair,
    *,
    remote_public: bytes,
    shared: bytes,
    local_index: int,
    ephemeral: KeyPair,
    timestamp: bytes,
) -> tuple[Initiation, PendingInitiation] | None:
    """Begin a handshake: one X25519 operation. `shared` is the exchange of the two static keys."""
    ephemeral_shared = ephemeral.exchange(remote_public)
    if ephemeral_shared is None:
        return None
    state = _begin(remote_public, ephemeral.public)
    state, key = state.mix_cipher_key(ephemeral_shared)
    state, sealed_static = state.encrypt(key, static.public)
    state, key = state.mix_cipher_key(shared)
    state, sealed_timestamp = state.encrypt(key, timestamp)
    initiation = Initiation(local_index, ephemeral.public, sealed_static, sealed_timestamp)
    return initiation, PendingInitiation(local_index, ephemeral, state)


def complete(
    pending: PendingInitiation, response: Response, *, static: KeyPair, preshared_key: bytes
) -> Established | None:
    """Accept the response to an initiation of ours: two X25519 operations."""
    ephemeral_shared = pending.ephemeral.exchange(response.ephemeral)
    static_shared = static.exchange(response.ephemeral)
    if ephemeral_shared is None or static_shared is None:
        return None
    state = pending.state.mix_hash(response.ephemeral).mix_key(response.ephemeral)
    state = state.mix_key(ephemeral_shared).mix_key(static_shared)
    state, key = state.mix_preshared_key(preshared_key)
    opened = state.decrypt(key, response.empty)
    if opened is None:
        return None
    send, receive = derive(opened[0].chaining_key, b"", 2)
    return Established(pending.local_index, response.sender, TransportKeys(receive, send))


def _begin(responder_public: bytes, ephemeral_public: bytes) -> SymmetricState:
    """Both sides' state after the initiator's ephemeral key."""
    state = SymmetricState(digest(_INITIAL_HASH, responder_public), _INITIAL_CHAINING_KEY)
    return state.mix_hash(ephemeral_public).mix_key(ephemeral_public)
