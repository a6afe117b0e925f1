"""Long-term credentials of one relay: the nonce, challenges, and which responses count (spec turn 2.5, 2.6)."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from fzg.wire import stun
from fzg.wire.stun import AttributeType, MessageClass, Method

if TYPE_CHECKING:
    from fzg.turn.events import Relay


class Integrity(Enum):
    """The judgement of a response by its MESSAGE-INTEGRITY."""

    ACCEPTED = "accepted"
    WRONG = "wrong integrity"
    MISSING = "missing integrity"


class Challenge(Enum):
    """What a 401 or 438 calls for."""

    ANSWER = "answer"
    REFUSED = "refused"
    FOREIGN_REALM = "foreign realm"
    UNANSWERABLE = "unanswerable"


class Authentication:
    """The nonce is shared by all requests of an allocation and lives until a challenge replaces it."""

    __slots__ = ("_accept_unsigned_errors", "_realm", "_username", "key", "nonce")

    def __init__(self, relay: Relay, realm: str, *, accept_unsigned_errors: bool) -> None:
        self._accept_unsigned_errors = accept_unsigned_errors
        self._realm = realm
        self._username = relay.username
        self.key = stun.long_term_key(relay.username, realm, relay.password.reveal())
        self.nonce: bytes | None = None

    def attributes(self) -> list[tuple[int, bytes]]:
        """What an authenticated request carries; nothing as long as no nonce is known."""
        if self.nonce is None:
            return []
        return [
            (AttributeType.USERNAME, self._username.encode()),
            (AttributeType.REALM, self._realm.encode()),
            (AttributeType.NONCE, self.nonce),
        ]

    def judge(self, message: stun.Message) -> Integrity:
        """Whether a response counts. Without integrity only a peer that guessed 96 bits could have forged it."""
        if message.method == Method.BINDING:
            return Integrity.ACCEPTED
        if message.has_integrity:
            return Integrity.ACCEPTED if message.verify_integrity(self.key) else Integrity.WRONG
        if message.message_class is MessageClass.SUCCESS:
            return Integrity.MISSING
        error = message.error
        challenge = error is not None and error.code in (401, 438)
        return Integrity.ACCEPTED if challenge or self._accept_unsigned_errors else Integrity.MISSING

    def handle_challenge(self, message: stun.Message, nonce: bytes | None) -> Challenge:
        """Learn from a 401 or 438 to a request that carried `nonce`."""
        realm = message.realm
        if realm is not None and realm != self._realm:
            return Challenge.FOREIGN_REALM
        stale = message.error is not None and message.error.code == 438
        if nonce is not None and not stale:
            return Challenge.REFUSED
        if stale and self.nonce is not None and self.nonce != nonce:
            return Challenge.ANSWER  # another request has learned a newer one
        self.nonce = message.nonce or self.nonce
        return Challenge.ANSWER if self.nonce is not None else Challenge.UNANSWERABLE
