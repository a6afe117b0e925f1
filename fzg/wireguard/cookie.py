"""The sender's side of MAC1, MAC2 and cookie replies (whitepaper 5.4.4, 5.4.7). The receiver's is `gate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt
from nacl.exceptions import CryptoError

from fzg.wireguard.keys import cookie_key, keyed_mac, mac1_key

if TYPE_CHECKING:
    from fzg.wire.wireguard import CookieReply, Initiation, Response

# Whitepaper 5.4.7: the secret behind a cookie changes every two minutes.
COOKIE_LIFETIME_S = 120.0


class CookieJar:
    """Stamps the handshake messages to one peer and keeps the cookie that it asks for under load."""

    __slots__ = ("_cookie", "_cookie_key", "_expires", "_last_index", "_last_mac1", "_mac1_key")

    def __init__(self, remote_public: bytes) -> None:
        self._mac1_key = mac1_key(remote_public)
        self._cookie_key = cookie_key(remote_public)
        self._cookie: bytes | None = None
        self._expires = 0.0
        self._last_index: int | None = None
        self._last_mac1 = b""

    def stamp(self, message: Initiation | Response, now: float) -> bytes:
        """The message as it travels, with both MACs."""
        without_mac1 = message.encode()[:-32]
        mac1 = keyed_mac(self._mac1_key, without_mac1)
        self._last_index, self._last_mac1 = message.sender, mac1
        stamped = without_mac1 + mac1
        if self._cookie is None or now >= self._expires:
            return stamped + bytes(16)
        return stamped + keyed_mac(self._cookie, stamped)

    def handle_reply(self, reply: CookieReply, now: float) -> bool:
        """Keep the cookie if the reply answers our latest handshake message."""
        if reply.receiver != self._last_index:
            return False
        try:
            cookie = crypto_aead_xchacha20poly1305_ietf_decrypt(
                reply.cookie, self._last_mac1, reply.nonce, self._cookie_key
            )
        except CryptoError:
            return False
        self._cookie, self._expires = cookie, now + COOKIE_LIFETIME_S
        return True
