"""Every secret that the portal derives, bit-exact (spec portal.md 5.2)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import NamedTuple
from uuid import UUID

GATEWAY_TURN_EXPIRY = 2145916800
"""2038-01-01T00:00:00Z, constant, so that a gateway's TURN credentials survive reconnects."""

INGEST_KEY = b"dev-ingest-key"


class TurnCredentials(NamedTuple):
    """Long-term credentials for one device on one relay; the realm is always `firezone`."""

    username: str
    password: str


class IceCredentials(NamedTuple):
    """What both sides of a pair use; each is a user name of 4 and a password of 22 characters."""

    client_username: str
    client_password: str
    gateway_username: str
    gateway_password: str


def relay_id(stamp_secret: str) -> str:
    """The UUID that the portal gives a relay; it changes with the secret, that is with every relay start."""
    digest = bytearray(hashlib.sha256(stamp_secret.encode()).digest()[:16])
    digest[6] = (digest[6] & 0x0F) | 0x40
    digest[8] = (digest[8] & 0x3F) | 0x80
    return str(UUID(bytes=bytes(digest)))


def turn_salt(public_key: str) -> str:
    """The salt of a device, from its public key as base64 text."""
    return _unpadded(hashlib.sha256(public_key.encode()).digest())


def turn_password(expiry: int | str, stamp_secret: str, salt: str) -> str:
    """The password that belongs to the user name `<expiry>:<salt>` on the relay with this secret."""
    return _unpadded(hashlib.sha256(f"{expiry}:{stamp_secret}:{salt}".encode()).digest())


def turn_credentials(public_key: str, stamp_secret: str, expiry: int = GATEWAY_TURN_EXPIRY) -> TurnCredentials:
    """What the portal hands to the device with this key for the relay with this secret."""
    salt = turn_salt(public_key)
    return TurnCredentials(f"{expiry}:{salt}", turn_password(expiry, stamp_secret, salt))


def long_term_key(username: str, password: str, realm: str = "firezone") -> bytes:
    """The MESSAGE-INTEGRITY key of RFC 8489 9.2.2."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


def preshared_key(
    *,
    client_psk_base: bytes,
    gateway_psk_base: bytes,
    client_id: str,
    gateway_id: str,
    client_public_key: str,
    gateway_public_key: str,
) -> str:
    """The WireGuard pre-shared key of a pair, as padded base64."""
    salt = f"WG_PSK|C_ID:{client_id}|G_ID:{gateway_id}|C_PK:{client_public_key}|G_PK:{gateway_public_key}"
    key = hashlib.pbkdf2_hmac("sha256", client_psk_base + gateway_psk_base, salt.encode(), 1, 32)
    return base64.b64encode(key).decode()


def ice_credentials(
    *, client_id: str, client_public_key: str, gateway_id: str, gateway_public_key: str
) -> IceCredentials:
    """The ICE credentials of a pair, cut from one digest."""
    digest = hashlib.sha256(f"{client_id}:{client_public_key}:{gateway_id}:{gateway_public_key}".encode()).digest()
    text = base64.b32encode(digest).decode().rstrip("=").lower()
    return IceCredentials(text[0:4], text[4:26], text[26:30], text[30:52])


def flow_log_token(claims: dict[str, object], key: bytes = INGEST_KEY) -> str:
    """A JWT (HS256) of the form that clients and gateways insist on."""
    header = _url(json.dumps({"alg": "HS256", "typ": "JWT"}, separators=(",", ":")).encode())
    body = _url(json.dumps(claims, separators=(",", ":")).encode())
    signature = hmac.digest(key, f"{header}.{body}".encode(), "sha256")
    return f"{header}.{body}.{_url(signature)}"


def _unpadded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
