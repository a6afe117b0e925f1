"""What a handshake message must pass before it costs any X25519 operation (spec connectivity 5.6, D4).

One gate per node: MAC1 depends only on our public key, and the limiter is shared by all connections.
"""

from __future__ import annotations

import hmac
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

from fzg.wire import wireguard as wire
from fzg.wireguard.keys import cookie_key, keyed_mac, mac1_key

if TYPE_CHECKING:
    from fzg.sansio import Random
    from fzg.wire.endpoint import Endpoint

# Spec 5.6: messages with a valid MAC1 per window; more are under load.
LIMIT = 100
WINDOW_S = 1.0
# Spec appendix B: the cookie of an address changes this often.
COOKIE_ROTATION_S = 128.0

_NONCE_SIZE = 24


@dataclass(frozen=True, slots=True)
class Admitted:
    """Process the message."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Drop the message; the reason is for counters and logs."""

    reason: str


@dataclass(frozen=True, slots=True)
class CookieReply:
    """We are under load: send `message` where the message came from, process nothing."""

    message: bytes


Verdict = Admitted | Rejected | CookieReply

_ADMITTED = Admitted()


class Gate:
    """Judges initiations and responses by MAC1, rate and MAC2."""

    __slots__ = ("_cookie_key", "_mac1_key", "_random", "_secret", "_start", "_used", "_window_start", "verdicts")

    def __init__(self, *, static_public: bytes, random: Random, now: float) -> None:
        self._mac1_key = mac1_key(static_public)
        self._cookie_key = cookie_key(static_public)
        self._random = random
        self._secret = random(16)
        self._start = now
        self._window_start: float | None = None
        self._used = 0
        self.verdicts: Counter[str] = Counter()

    def admit(self, message: bytes, source: Endpoint, now: float) -> Verdict:
        """Judge one initiation or response from `source` (through a relay: the channel's peer)."""
        verdict = self._judge(message, source, now)
        match verdict:
            case Admitted():
                self.verdicts["admitted"] += 1
            case CookieReply():
                self.verdicts["cookie reply"] += 1
            case Rejected(reason):
                self.verdicts[reason] += 1
        return verdict

    def _judge(self, message: bytes, source: Endpoint, now: float) -> Verdict:
        kind = wire.classify(message)
        if kind not in {wire.MessageType.INITIATION, wire.MessageType.RESPONSE}:
            return Rejected("not a handshake message")
        message = bytes(message)
        mac1 = message[-32:-16]
        if not hmac.compare_digest(mac1, keyed_mac(self._mac1_key, message[:-32])):
            return Rejected("wrong MAC1")
        if not self._count(now):
            return _ADMITTED
        cookie = self._cookie(source, now)
        if hmac.compare_digest(message[-16:], keyed_mac(cookie, message[:-16])):
            return _ADMITTED
        nonce = self._random(_NONCE_SIZE)
        sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(cookie, mac1, nonce, self._cookie_key)
        sender = int.from_bytes(message[4:8], "little")
        return CookieReply(wire.CookieReply(sender, nonce, sealed).encode())

    def _count(self, now: float) -> bool:
        """Count a message; True if it exceeds the window's limit. A window begins with a message, not on a grid."""
        if self._window_start is None or now - self._window_start >= WINDOW_S:
            self._window_start, self._used = now, 0
        self._used += 1
        return self._used > LIMIT

    def _cookie(self, source: Endpoint, now: float) -> bytes:
        """Proves that a peer receives at its IP; the port is left out because NATs change it."""
        rotation = int((now - self._start) // COOKIE_ROTATION_S)
        return keyed_mac(self._secret, rotation.to_bytes(8, "little"), source.ip.ljust(16, b"\0"))
