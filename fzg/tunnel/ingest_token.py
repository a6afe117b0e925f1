"""Flow-log tokens: who uses which resource, signed by the portal and only read by us (spec tunnel 10.2)."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import msgspec

from fzg.wire import Malformed

if TYPE_CHECKING:
    from fzg.secret import Secret

# Ours: real ones have about 1,200 bytes, and one is kept per authorization.
MAX_LENGTH: Final = 8192

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*")
_Unsigned = Annotated[int, msgspec.Meta(ge=0)]
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the token states; unknown claims are ignored."""

    account_id: str
    iat: _Unsigned
    exp: _Unsigned
    uploads_enabled: bool
    role: str
    initiator_device_id: str
    responder_device_id: str
    policy_authorization_id: str
    policy_id: str
    resource_id: str
    resource_name: str
    resource_address: str | None = None
    initiator_actor_id: str
    initiator_actor_name: str
    initiator_actor_email: str | None = None
    initiator_auth_provider_id: str | None = None
    initiator_client_version: str | None = None
    initiator_device_os_name: str | None = None
    initiator_device_os_version: str | None = None
    initiator_device_serial: str | None = None
    initiator_device_uuid: str | None = None
    initiator_device_identifier_for_vendor: str | None = None
    initiator_device_firebase_installation_id: str | None = None
    authorized_at: str
    authorization_expires_at: str


@dataclass(frozen=True, slots=True)
class Attribution:
    """To whom the flows of one authorization are put down. `token` is a credential: never logged."""

    claims: Claims
    token: Secret[str]


def parse(token: Secret[str]) -> Attribution:
    """The claims of an HS256 token with a signature; `Malformed` without them. The signature is not verified."""
    text = token.reveal()
    if len(text) > MAX_LENGTH:
        raise Malformed("flow-log token is too long")
    segments = text.split(".")
    if len(segments) != 3:
        raise Malformed("flow-log token has not three segments")
    header, payload, signature = (_decode(segment) for segment in segments)
    if not signature:
        raise Malformed("flow-log token has no signature")
    if _json(header, _Header).alg != "HS256":
        raise Malformed("flow-log token is not signed with HS256")
    return Attribution(_json(payload, Claims), token)


class _Header(msgspec.Struct):
    alg: str


def _decode(segment: str) -> bytes:
    if not _BASE64URL.fullmatch(segment):
        raise Malformed("flow-log token is not base64url")
    try:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except binascii.Error:
        raise Malformed("flow-log token is not base64url") from None


def _json(data: bytes, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # The message names a path and a type, never a value.
        raise Malformed(f"flow-log token: {str(error)[:100]}") from None
