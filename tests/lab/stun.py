"""STUN as the test relay needs it, apart from the gateway's codec so that neither hides a mistake of the other."""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct

COOKIE = 0x2112A442
BINDING, ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND = 0x001, 0x003, 0x004, 0x008, 0x009
REQUEST, INDICATION, SUCCESS, ERROR = 0, 1, 2, 3
METHODS = {1: "binding", 3: "allocate", 4: "refresh", 6: "send", 8: "create_permission", 9: "channel_bind"}

USERNAME, MESSAGE_INTEGRITY, ERROR_CODE, CHANNEL_NUMBER, LIFETIME = 0x0006, 0x0008, 0x0009, 0x000C, 0x000D
XOR_PEER_ADDRESS, REALM, NONCE, XOR_RELAYED_ADDRESS = 0x0012, 0x0014, 0x0015, 0x0016
REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT, XOR_MAPPED_ADDRESS = 0x0017, 0x0019, 0x0020
ADDITIONAL_ADDRESS_FAMILY, SOFTWARE = 0x8000, 0x8022

REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    437: "Allocation Mismatch",
    438: "Stale Nonce",
    440: "Address Family not Supported",
    443: "Peer Address Family Mismatch",
    500: "Server Error",
    508: "Insufficient Capacity",
}


class Message:
    """A received message: the first value of each attribute, and the offset of the signature."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 20:
            raise ValueError("shorter than a header")
        kind, length, cookie = struct.unpack_from("!HHI", data)
        if kind & 0xC000 or cookie != COOKIE or length % 4 or length + 20 != len(data):
            raise ValueError("not STUN")
        self.data = data
        self.method = (kind & 0x000F) | (kind & 0x00E0) >> 1 | (kind & 0x3E00) >> 2
        self.message_class = (kind & 0x0010) >> 4 | (kind & 0x0100) >> 7
        self.transaction_id = data[8:20]
        self.attributes: dict[int, bytes] = {}
        self.integrity_at: int | None = None
        offset = 20
        while offset < len(data):
            attribute, size = struct.unpack_from("!HH", data, offset)
            if offset + 4 + size > len(data):
                raise ValueError("an attribute passes the end")
            if attribute == MESSAGE_INTEGRITY and self.integrity_at is None:
                self.integrity_at = offset
            if self.integrity_at is None or attribute == MESSAGE_INTEGRITY:
                self.attributes.setdefault(attribute, data[offset + 4 : offset + 4 + size])
            offset += 4 + size + -size % 4

    def signed_with(self, key: bytes) -> bool:
        """Whether MESSAGE-INTEGRITY is there and right."""
        if self.integrity_at is None:
            return False
        head = self.data[:2] + struct.pack("!H", self.integrity_at - 20 + 24) + self.data[4 : self.integrity_at]
        return hmac.compare_digest(self.attributes[MESSAGE_INTEGRITY], hmac.digest(key, head, hashlib.sha1))


def encode(
    method: int,
    message_class: int,
    transaction_id: bytes,
    attributes: list[tuple[int, bytes]],
    key: bytes | None = None,
) -> bytes:
    """A message, signed if there is a key."""
    kind = (method & 0x00F) | (method & 0x070) << 1 | (method & 0xF80) << 2
    kind |= (message_class & 1) << 4 | (message_class & 2) << 7
    body = b"".join(struct.pack("!HH", t, len(value)) + value + bytes(-len(value) % 4) for t, value in attributes)
    header = struct.pack("!HHI", kind, len(body) + (24 if key else 0), COOKIE) + transaction_id
    if key is None:
        return header + body
    signature = hmac.digest(key, header + body, hashlib.sha1)
    return header + body + struct.pack("!HH", MESSAGE_INTEGRITY, 20) + signature


def encode_address(address: tuple[str, int], transaction_id: bytes) -> bytes:
    """The value of an XOR-…-ADDRESS attribute."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    mask = struct.pack("!I", COOKIE) + transaction_id
    mixed = bytes(a ^ b for a, b in zip(packed, mask, strict=False))
    return struct.pack("!BBH", 0, 2 if len(packed) == 16 else 1, port ^ (COOKIE >> 16)) + mixed


def decode_address(value: bytes, transaction_id: bytes) -> tuple[str, int]:
    """The inverse of `encode_address`; ValueError if it is none."""
    if len(value) not in {8, 20} or value[1] != (1 if len(value) == 8 else 2):
        raise ValueError("not an address")
    mask = struct.pack("!I", COOKIE) + transaction_id
    packed = bytes(a ^ b for a, b in zip(value[4:], mask, strict=False))
    port = struct.unpack_from("!H", value, 2)[0] ^ (COOKIE >> 16)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), port


def error_value(code: int) -> bytes:
    """The value of ERROR-CODE."""
    return struct.pack("!HBB", 0, code // 100, code % 100) + REASONS.get(code, "Error").encode()
