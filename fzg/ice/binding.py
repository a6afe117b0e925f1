"""The Binding messages of connectivity checks (spec connectivity 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fzg.ice.role import Role
from fzg.wire import stun
from fzg.wire.stun import AttributeType, MessageClass, Method

if TYPE_CHECKING:
    from fzg.wire.endpoint import Endpoint

ROLE_CONFLICT: Final = 487
"""RFC 8445 7.3.1.1."""


def is_request(message: stun.Message) -> bool:
    """Whether it is a Binding request with everything that a check must carry (spec connectivity 3.4.3)."""
    if message.message_class is not MessageClass.REQUEST or message.method != Method.BINDING:
        return False
    return message.has_integrity and message.priority is not None and bool((message.username or "").partition(":")[2])


def is_success(message: stun.Message) -> bool:
    """Whether it is a Binding success response with everything that an answer must carry."""
    if message.message_class is not MessageClass.SUCCESS or message.method != Method.BINDING:
        return False
    return message.has_integrity and message.get(AttributeType.XOR_MAPPED_ADDRESS) is not None


def is_role_conflict(message: stun.Message) -> bool:
    """Whether it is a 487 that can be authenticated."""
    if message.message_class is not MessageClass.ERROR or message.method != Method.BINDING:
        return False
    error = message.error
    return message.has_integrity and error is not None and error.code == ROLE_CONFLICT


def request(
    transaction_id: bytes, *, username: str, key: bytes, role: Role, tie_breaker: int, priority: int, nominate: bool
) -> bytes:
    """A check; `key` is the peer's password."""
    role_attribute = AttributeType.ICE_CONTROLLED if role is Role.CONTROLLED else AttributeType.ICE_CONTROLLING
    attributes: list[tuple[int, bytes]] = [
        (AttributeType.USERNAME, username.encode()),
        (role_attribute, stun.uint64(tie_breaker)),
        (AttributeType.PRIORITY, stun.uint32(priority)),
    ]
    if nominate:
        attributes.append((AttributeType.USE_CANDIDATE, b""))
    return stun.encode(
        Method.BINDING, MessageClass.REQUEST, transaction_id, attributes, integrity_key=key, fingerprint=True
    )


def success(transaction_id: bytes, *, mapped: Endpoint, key: bytes) -> bytes:
    """The answer to a check that came from `mapped`; `key` is our own password."""
    attributes = ((AttributeType.XOR_MAPPED_ADDRESS, stun.xor_address(mapped, transaction_id)),)
    return stun.encode(
        Method.BINDING, MessageClass.SUCCESS, transaction_id, attributes, integrity_key=key, fingerprint=True
    )


def role_conflict(transaction_id: bytes, *, key: bytes) -> bytes:
    """The answer to a check whose sender has to switch its role."""
    attributes = ((AttributeType.ERROR_CODE, stun.error_code(ROLE_CONFLICT, "Role Conflict")),)
    return stun.encode(
        Method.BINDING, MessageClass.ERROR, transaction_id, attributes, integrity_key=key, fingerprint=True
    )
