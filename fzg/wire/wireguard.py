"""WireGuard's four messages and TAI64N (whitepaper 5.4, spec connectivity 5.1). Integers are little-endian."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from fzg.wire import Malformed

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview


class MessageType(IntEnum):
    """The first four bytes; the three reserved ones are zero."""

    INITIATION = 1
    RESPONSE = 2
    COOKIE_REPLY = 3
    DATA = 4


TAG_SIZE = 16
MAC_SIZE = 16
KEY_SIZE = 32
TIMESTAMP_SIZE = 12

# Data message: type, receiver index, counter, then ciphertext and tag.
DATA_HEADER = struct.Struct("<IIQ")
DATA_OVERHEAD = DATA_HEADER.size + TAG_SIZE

_INITIATION = struct.Struct(f"<II{KEY_SIZE}s{KEY_SIZE + TAG_SIZE}s{TIMESTAMP_SIZE + TAG_SIZE}s{MAC_SIZE}s{MAC_SIZE}s")
_RESPONSE = struct.Struct(f"<III{KEY_SIZE}s{TAG_SIZE}s{MAC_SIZE}s{MAC_SIZE}s")
_COOKIE_REPLY = struct.Struct(f"<II24s{MAC_SIZE + TAG_SIZE}s")
_U32 = struct.Struct("<I")
_TAI64N = struct.Struct(">QI")

INITIATION_SIZE = _INITIATION.size
RESPONSE_SIZE = _RESPONSE.size
COOKIE_REPLY_SIZE = _COOKIE_REPLY.size

_EXACT_SIZES = {
    MessageType.INITIATION: INITIATION_SIZE,
    MessageType.RESPONSE: RESPONSE_SIZE,
    MessageType.COOKIE_REPLY: COOKIE_REPLY_SIZE,
}

# TAI64 labels begin at 2^62 for 1970 TAI; 10 leap seconds of 1972 and the 27 after it.
_TAI64_UNIX_EPOCH = (1 << 62) + 37
_NANOSECONDS = 1_000_000_000


def classify(data: Buffer) -> MessageType | None:
    """The message's type, or None if type, reserved bytes and length do not fit (spec 1.6 step 4). Cannot fail."""
    view = memoryview(data)
    if len(view) < 4:
        return None
    (number,) = _U32.unpack_from(view)
    if number == MessageType.DATA:
        return MessageType.DATA if len(view) >= DATA_OVERHEAD else None
    if number not in _EXACT_SIZES or len(view) != _EXACT_SIZES[number]:
        return None
    return MessageType(number)


def receiver_index(data: Buffer) -> int:
    """The receiver index of a response, a cookie reply or a data message."""
    kind = classify(data)
    if kind is None or kind is MessageType.INITIATION:
        raise Malformed("WireGuard message without a receiver index")
    offset = 8 if kind is MessageType.RESPONSE else 4
    (index,) = _U32.unpack_from(data, offset)
    return int(index)


class Initiation(NamedTuple):
    """Type 1, 148 bytes. `static` and `timestamp` are encrypted."""

    sender: int
    ephemeral: bytes
    static: bytes
    timestamp: bytes
    mac1: bytes = bytes(MAC_SIZE)
    mac2: bytes = bytes(MAC_SIZE)

    @classmethod
    def parse(cls, data: Buffer) -> Initiation:
        """From exactly one initiation."""
        _require(data, MessageType.INITIATION)
        return cls(*_INITIATION.unpack(data)[1:])

    def encode(self) -> bytes:
        """As it travels."""
        return _INITIATION.pack(MessageType.INITIATION, *self)


class Response(NamedTuple):
    """Type 2, 92 bytes. `empty` is the tag of an empty plaintext."""

    sender: int
    receiver: int
    ephemeral: bytes
    empty: bytes
    mac1: bytes = bytes(MAC_SIZE)
    mac2: bytes = bytes(MAC_SIZE)

    @classmethod
    def parse(cls, data: Buffer) -> Response:
        """From exactly one response."""
        _require(data, MessageType.RESPONSE)
        return cls(*_RESPONSE.unpack(data)[1:])

    def encode(self) -> bytes:
        """As it travels."""
        return _RESPONSE.pack(MessageType.RESPONSE, *self)


class CookieReply(NamedTuple):
    """Type 3, 64 bytes. `cookie` is encrypted."""

    receiver: int
    nonce: bytes
    cookie: bytes

    @classmethod
    def parse(cls, data: Buffer) -> CookieReply:
        """From exactly one cookie reply."""
        _require(data, MessageType.COOKIE_REPLY)
        return cls(*_COOKIE_REPLY.unpack(data)[1:])

    def encode(self) -> bytes:
        """As it travels."""
        return _COOKIE_REPLY.pack(MessageType.COOKIE_REPLY, *self)


class DataHeader(NamedTuple):
    """The 16 bytes before a data message's ciphertext."""

    receiver: int
    counter: int

    @classmethod
    def parse(cls, data: Buffer) -> DataHeader:
        """From a whole data message."""
        _require(data, MessageType.DATA)
        return cls(*DATA_HEADER.unpack_from(data)[1:])

    def encode(self) -> bytes:
        """As it travels."""
        return DATA_HEADER.pack(MessageType.DATA, *self)


def tai64n(unix_nanoseconds: int) -> bytes:
    """The 12 bytes of an initiation's timestamp; their order as bytes is the order in time."""
    seconds, nanoseconds = divmod(unix_nanoseconds, _NANOSECONDS)
    return _TAI64N.pack(_TAI64_UNIX_EPOCH + seconds, nanoseconds)


def _require(data: Buffer, kind: MessageType) -> None:
    if classify(data) is not kind:
        raise Malformed(f"not a WireGuard {kind.name.lower().replace('_', ' ')}")
