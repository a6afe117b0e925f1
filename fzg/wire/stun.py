"""STUN messages (RFC 8489) with the attributes of TURN (RFC 8656) and ICE (RFC 8445); spec turn 1."""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Method(IntEnum):
    """RFC 8489 18.2 and RFC 8656 17; a `Message` may carry others."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009


class MessageClass(IntEnum):
    """The two class bits of the message type (RFC 8489 5)."""

    REQUEST = 0
    INDICATION = 1
    SUCCESS = 2
    ERROR = 3


class AttributeType(IntEnum):
    """Spec turn 1.2. Types below 0x8000 are comprehension-required; unknown ones are skipped all the same."""

    MAPPED_ADDRESS = 0x0001
    USERNAME = 0x0006
    MESSAGE_INTEGRITY = 0x0008
    ERROR_CODE = 0x0009
    UNKNOWN_ATTRIBUTES = 0x000A
    CHANNEL_NUMBER = 0x000C
    LIFETIME = 0x000D
    XOR_PEER_ADDRESS = 0x0012
    DATA = 0x0013
    REALM = 0x0014
    NONCE = 0x0015
    XOR_RELAYED_ADDRESS = 0x0016
    REQUESTED_ADDRESS_FAMILY = 0x0017
    EVEN_PORT = 0x0018
    REQUESTED_TRANSPORT = 0x0019
    DONT_FRAGMENT = 0x001A
    XOR_MAPPED_ADDRESS = 0x0020
    RESERVATION_TOKEN = 0x0022
    PRIORITY = 0x0024
    USE_CANDIDATE = 0x0025
    ADDITIONAL_ADDRESS_FAMILY = 0x8000
    ADDRESS_ERROR_CODE = 0x8001
    PASSWORD_ALGORITHMS = 0x8002
    SOFTWARE = 0x8022
    ALTERNATE_SERVER = 0x8023
    FINGERPRINT = 0x8028
    ICE_CONTROLLED = 0x8029
    ICE_CONTROLLING = 0x802A
    RESPONSE_ORIGIN = 0x802B
    OTHER_ADDRESS = 0x802C
    NETWORK_COST = 0xC057


class ErrorCode(NamedTuple):
    """ERROR-CODE: 300..699 and the reason phrase without padding."""

    code: int
    reason: str


MAGIC_COOKIE: Final = 0x2112A442
TRANSACTION_ID_LENGTH: Final = 12

_COOKIE_BYTES: Final = MAGIC_COOKIE.to_bytes(4, "big")
_FINGERPRINT_MASK: Final = 0x5354554E  # RFC 8489 14.7
_HEADER: Final = struct.Struct(">HHI")  # type, length, cookie; the transaction id follows
_HEADER_LENGTH: Final = _HEADER.size + TRANSACTION_ID_LENGTH
_ATTRIBUTE: Final = struct.Struct(">HH")
_UINT16: Final = struct.Struct(">H")
_UINT32: Final = struct.Struct(">I")
_UINT64: Final = struct.Struct(">Q")
_INTEGRITY_LENGTH: Final = 20
_FINGERPRINT_LENGTH: Final = 4
_FAMILY_IPV4: Final = 1
_FAMILY_IPV6: Final = 2
_MAX_USERNAME: Final = 512  # connectivity 3.4.3
_MAX_QUOTED: Final = 763  # REALM and NONCE, RFC 8489 14.9; also bounds what we echo to a server
_CLASSES: Final = tuple(MessageClass)


class Message:
    """A parsed message. Values are decoded on access; attributes behind MESSAGE-INTEGRITY do not exist."""

    __slots__ = ("_data", "_integrity_at", "_relayed", "_values", "message_class", "method", "transaction_id")

    def __init__(
        self,
        data: bytes,
        values: dict[int, bytes],
        relayed: tuple[bytes, ...],
        integrity_at: int | None,
    ) -> None:
        message_type = _UINT16.unpack_from(data)[0]
        self._data = data
        self._values = values
        self._relayed = relayed
        self._integrity_at = integrity_at
        self.method: int = message_type & 0x00F | message_type >> 1 & 0x070 | message_type >> 2 & 0xF80
        self.message_class: MessageClass = _CLASSES[message_type >> 4 & 1 | message_type >> 7 & 2]
        self.transaction_id: bytes = data[8:20]

    def get(self, attribute: int) -> bytes | None:
        """The raw value of the first occurrence."""
        return self._values.get(attribute)

    @property
    def username(self) -> str | None:
        """USERNAME."""
        value = self._values.get(AttributeType.USERNAME)
        return None if value is None else value.decode()

    @property
    def realm(self) -> str | None:
        """REALM; bytes that are not UTF-8 come out as replacement characters and so match no configured realm."""
        value = self._values.get(AttributeType.REALM)
        return None if value is None else value.decode(errors="replace")

    @property
    def nonce(self) -> bytes | None:
        """NONCE, opaque."""
        return self._values.get(AttributeType.NONCE)

    @property
    def software(self) -> str | None:
        """SOFTWARE, for logs."""
        value = self._values.get(AttributeType.SOFTWARE)
        return None if value is None else value.decode(errors="replace")

    @property
    def error(self) -> ErrorCode | None:
        """ERROR-CODE; NULs that a server counted into the reason are stripped."""
        value = self._values.get(AttributeType.ERROR_CODE)
        if value is None:
            return None
        return ErrorCode(value[2] * 100 + value[3], value[4:].decode(errors="replace").rstrip("\0"))

    @property
    def unknown_attributes(self) -> tuple[int, ...]:
        """The types that a 420 complains about."""
        value = self._values.get(AttributeType.UNKNOWN_ATTRIBUTES, b"")
        return tuple(_UINT16.unpack_from(value, offset)[0] for offset in range(0, len(value) - 1, 2))

    @property
    def xor_mapped_address(self) -> Endpoint | None:
        """XOR-MAPPED-ADDRESS; None when absent or unusable (spec turn 1.2)."""
        endpoint = self._address(self._values.get(AttributeType.XOR_MAPPED_ADDRESS))
        return endpoint if endpoint is not None and is_usable(endpoint) else None

    @property
    def xor_relayed_addresses(self) -> tuple[Endpoint, ...]:
        """Every usable XOR-RELAYED-ADDRESS in order: half a dual-stack allocation may come as `0.0.0.0:0`."""
        endpoints = (_unxor_address(value, self.transaction_id) for value in self._relayed)
        return tuple(endpoint for endpoint in endpoints if is_usable(endpoint))

    @property
    def xor_peer_address(self) -> Endpoint | None:
        """XOR-PEER-ADDRESS, whatever it is."""
        return self._address(self._values.get(AttributeType.XOR_PEER_ADDRESS))

    @property
    def lifetime(self) -> int | None:
        """LIFETIME in seconds."""
        return _unpack(_UINT32, self._values.get(AttributeType.LIFETIME))

    @property
    def channel_number(self) -> int | None:
        """CHANNEL-NUMBER, 0x4000..0x7FFF."""
        return _unpack(_UINT16, self._values.get(AttributeType.CHANNEL_NUMBER))

    @property
    def priority(self) -> int | None:
        """PRIORITY."""
        return _unpack(_UINT32, self._values.get(AttributeType.PRIORITY))

    @property
    def use_candidate(self) -> bool:
        """Whether USE-CANDIDATE is present."""
        return AttributeType.USE_CANDIDATE in self._values

    @property
    def ice_controlled(self) -> int | None:
        """The tie-breaker of ICE-CONTROLLED."""
        return _unpack(_UINT64, self._values.get(AttributeType.ICE_CONTROLLED))

    @property
    def ice_controlling(self) -> int | None:
        """The tie-breaker of ICE-CONTROLLING."""
        return _unpack(_UINT64, self._values.get(AttributeType.ICE_CONTROLLING))

    @property
    def has_integrity(self) -> bool:
        """Whether MESSAGE-INTEGRITY is present, valid or not."""
        return self._integrity_at is not None

    def verify_integrity(self, key: bytes) -> bool:
        """Check MESSAGE-INTEGRITY over the received bytes, in constant time. False when it is absent."""
        offset = self._integrity_at
        if offset is None:
            return False
        value = self._data[offset + 4 : offset + 4 + _INTEGRITY_LENGTH]
        return hmac.compare_digest(value, _integrity(self._data[:offset], key))

    def verify_fingerprint(self) -> bool:
        """Whether the last attribute is a right FINGERPRINT. Nothing we receive needs one (spec turn 1.4)."""
        offset = len(self._data) - 8
        if offset < _HEADER_LENGTH or self._data[offset : offset + 4] != _FINGERPRINT_HEADER:
            return False
        return self._data[offset + 4 :] == _fingerprint(self._data[:offset])

    def _address(self, value: bytes | None) -> Endpoint | None:
        return None if value is None else _unxor_address(value, self.transaction_id)

    def __repr__(self) -> str:
        try:
            method = Method(self.method).name
        except ValueError:
            method = f"{self.method:#05x}"
        return f"<{method} {self.message_class.name} {self.transaction_id.hex()}>"


def parse(data: bytes) -> Message:
    """Bytes to message; raises Malformed, which for a datagram means "not STUN" (spec turn 1.1, connectivity 3.4.3)."""
    if len(data) < _HEADER_LENGTH:
        raise Malformed("STUN message is shorter than its header")
    message_type, length, cookie = _HEADER.unpack_from(data)
    if message_type & 0xC000:
        raise Malformed("STUN message type has its top two bits set")
    if cookie != MAGIC_COOKIE:
        raise Malformed("STUN message has no magic cookie")
    if length & 3 or length + _HEADER_LENGTH != len(data):
        raise Malformed("STUN length does not match the datagram")
    data = bytes(data)
    end = len(data)
    values: dict[int, bytes] = {}
    relayed: list[bytes] = []
    integrity_at: int | None = None
    offset = _HEADER_LENGTH
    while offset < end:  # the length is a multiple of 4, so a header always fits
        attribute, size = _ATTRIBUTE.unpack_from(data, offset)
        if offset + 4 + size > end:
            raise Malformed("STUN attribute overruns the message")
        following = offset + 4 + (size + 3 & ~3)
        if integrity_at is None or attribute == AttributeType.FINGERPRINT:
            value = data[offset + 4 : offset + 4 + size]
            check = _CHECKS.get(attribute)
            if check is not None:
                check(value)
            if attribute == AttributeType.MESSAGE_INTEGRITY:
                integrity_at = offset
            elif attribute == AttributeType.XOR_RELAYED_ADDRESS:
                relayed.append(value)
            values.setdefault(attribute, value)
        offset = following
    return Message(data, values, tuple(relayed), integrity_at)


def encode(
    method: int,
    message_class: int,
    transaction_id: bytes,
    attributes: Iterable[tuple[int, bytes]],
    *,
    integrity_key: bytes | None = None,
    fingerprint: bool = False,
) -> bytes:
    """A message with the attributes in the given order, then MESSAGE-INTEGRITY and FINGERPRINT as asked for."""
    if len(transaction_id) != TRANSACTION_ID_LENGTH:
        raise ValueError("a STUN transaction id has 12 bytes")
    message_type = (
        method & 0x00F
        | (method & 0x070) << 1
        | (method & 0xF80) << 2
        | (message_class & 1) << 4
        | (message_class & 2) << 7
    )
    body = b"".join(
        _ATTRIBUTE.pack(attribute, len(value)) + value + bytes(-len(value) & 3) for attribute, value in attributes
    )
    message = _HEADER.pack(message_type, len(body), MAGIC_COOKIE) + transaction_id + body
    if integrity_key is not None:
        integrity = _integrity(message, integrity_key)
        message = _with_length(message, 4 + _INTEGRITY_LENGTH) + _INTEGRITY_HEADER + integrity
    if fingerprint:
        message = _with_length(message, 4 + _FINGERPRINT_LENGTH) + _FINGERPRINT_HEADER + _fingerprint(message)
    return message


def xor_address(endpoint: Endpoint, transaction_id: bytes) -> bytes:
    """The value of an XOR-*-ADDRESS attribute; an IPv6 one is valid for this transaction only."""
    family = _FAMILY_IPV4 if len(endpoint.ip) == 4 else _FAMILY_IPV6
    port = endpoint.port ^ MAGIC_COOKIE >> 16
    return bytes((0, family)) + _UINT16.pack(port) + _xor(endpoint.ip, transaction_id)


def error_code(code: int, reason: str) -> bytes:
    """The value of ERROR-CODE."""
    hundreds, number = divmod(code, 100)
    return bytes((0, 0, hundreds, number)) + reason.encode()


def uint16(value: int) -> bytes:
    """The value of CHANNEL-NUMBER: 16 bits and 16 zero bits."""
    return _UINT16.pack(value) + b"\0\0"


def uint32(value: int) -> bytes:
    """The value of LIFETIME or PRIORITY."""
    return _UINT32.pack(value)


def uint64(value: int) -> bytes:
    """The value of ICE-CONTROLLED or ICE-CONTROLLING."""
    return _UINT64.pack(value)


def long_term_key(username: str, realm: str, password: str) -> bytes:
    """The integrity key of TURN (RFC 8489 9.2.2); 16 bytes."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


def is_usable(endpoint: Endpoint) -> bool:
    """Whether a mapped or relayed address can be anybody's address (spec turn 1.2)."""
    ip = endpoint.ip
    if endpoint.port == 0 or not any(ip):
        return False
    if len(ip) == 4:
        link_local = ip[:2] == b"\xa9\xfe"
        multicast = ip[0] >> 4 == 0xE
        return not (link_local or multicast or ip == b"\xff\xff\xff\xff")
    return ip[0] != 0xFF


_INTEGRITY_HEADER: Final = _ATTRIBUTE.pack(AttributeType.MESSAGE_INTEGRITY, _INTEGRITY_LENGTH)
_FINGERPRINT_HEADER: Final = _ATTRIBUTE.pack(AttributeType.FINGERPRINT, _FINGERPRINT_LENGTH)


def _integrity(preceding: bytes, key: bytes) -> bytes:
    """HMAC-SHA1 over everything before the attribute, with the length as if the message ended with it."""
    covered = len(preceding) - _HEADER_LENGTH + 4 + _INTEGRITY_LENGTH
    return hmac.digest(key, b"".join((preceding[:2], _UINT16.pack(covered), preceding[4:])), "sha1")


def _fingerprint(preceding: bytes) -> bytes:
    """CRC-32 over everything before the attribute, with the length that includes it."""
    return _UINT32.pack(zlib.crc32(_with_length(preceding, 4 + _FINGERPRINT_LENGTH)) ^ _FINGERPRINT_MASK)


def _with_length(message: bytes, following: int) -> bytes:
    """The message with a header that counts `following` more bytes."""
    length = len(message) - _HEADER_LENGTH + following
    return b"".join((message[:2], _UINT16.pack(length), message[4:]))


def _xor(ip: bytes, transaction_id: bytes) -> bytes:
    key = (_COOKIE_BYTES + transaction_id)[: len(ip)]
    return (int.from_bytes(ip, "big") ^ int.from_bytes(key, "big")).to_bytes(len(ip), "big")


def _unxor_address(value: bytes, transaction_id: bytes) -> Endpoint:
    length = 4 if value[1] == _FAMILY_IPV4 else 16
    port = _UINT16.unpack_from(value, 2)[0] ^ MAGIC_COOKIE >> 16
    return Endpoint(_xor(value[4 : 4 + length], transaction_id), port)


def _unpack(layout: struct.Struct, value: bytes | None) -> int | None:
    if value is None:
        return None
    number: int = layout.unpack_from(value)[0]
    return number


def _sized(name: str, size: int) -> Callable[[bytes], None]:
    def check(value: bytes) -> None:
        if len(value) != size:
            raise Malformed(f"STUN {name} is not {size} bytes")

    return check


def _at_most(name: str, size: int) -> Callable[[bytes], None]:
    def check(value: bytes) -> None:
        if len(value) > size:
            raise Malformed(f"STUN {name} is more than {size} bytes")

    return check


def _check_address(value: bytes) -> None:
    if len(value) < 4:
        raise Malformed("STUN address is shorter than 4 bytes")
    if value[1] not in (_FAMILY_IPV4, _FAMILY_IPV6):
        raise Malformed("STUN address has an unknown family")
    if len(value) < (8 if value[1] == _FAMILY_IPV4 else 20):
        raise Malformed("STUN address is too short for its family")


def _check_username(value: bytes) -> None:
    if len(value) > _MAX_USERNAME:
        raise Malformed(f"STUN USERNAME is more than {_MAX_USERNAME} bytes")
    try:
        value.decode()
    except UnicodeDecodeError as error:
        raise Malformed("STUN USERNAME is not UTF-8") from error


def _check_error_code(value: bytes) -> None:
    if len(value) < 4:
        raise Malformed("STUN ERROR-CODE is shorter than 4 bytes")
    if value[0] or value[1] or not 3 <= value[2] <= 6 or value[3] > 99:
        raise Malformed("STUN ERROR-CODE is not in 300..699 or has reserved bits set")


def _check_channel_number(value: bytes) -> None:
    if len(value) != 4:
        raise Malformed("STUN CHANNEL-NUMBER is not 4 bytes")
    if value[0] >> 6 != 1:
        raise Malformed("STUN CHANNEL-NUMBER is not in 0x4000..0x7FFF")


_CHECKS: Final[dict[int, Callable[[bytes], None]]] = {
    AttributeType.USERNAME: _check_username,
    AttributeType.MESSAGE_INTEGRITY: _sized("MESSAGE-INTEGRITY", _INTEGRITY_LENGTH),
    AttributeType.ERROR_CODE: _check_error_code,
    AttributeType.CHANNEL_NUMBER: _check_channel_number,
    AttributeType.LIFETIME: _sized("LIFETIME", 4),
    AttributeType.XOR_PEER_ADDRESS: _check_address,
    AttributeType.REALM: _at_most("REALM", _MAX_QUOTED),
    AttributeType.NONCE: _at_most("NONCE", _MAX_QUOTED),
    AttributeType.XOR_RELAYED_ADDRESS: _check_address,
    AttributeType.XOR_MAPPED_ADDRESS: _check_address,
    AttributeType.PRIORITY: _sized("PRIORITY", 4),
    AttributeType.USE_CANDIDATE: _sized("USE-CANDIDATE", 0),
    AttributeType.FINGERPRINT: _sized("FINGERPRINT", _FINGERPRINT_LENGTH),
    AttributeType.ICE_CONTROLLED: _sized("ICE-CONTROLLED", 8),
    AttributeType.ICE_CONTROLLING: _sized("ICE-CONTROLLING", 8),
}
