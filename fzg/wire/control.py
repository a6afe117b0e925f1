"""The control protocol between client and gateway inside the tunnel (spec tunnel 6)."""

from __future__ import annotations

import struct
import uuid
from enum import IntEnum, StrEnum
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from fzg.wire import Malformed
from fzg.wire.ip import PROTOCOL_CONTROL, Packet

HEADER = 8  # bytes between IP header and payload: type, then seven that nobody reads
_UNSPECIFIED = bytes(16)
_IPV6 = struct.Struct("!IHBB16s16s")
_DOMAIN_TEXT = 253  # characters that fit 255 octets of wire form, RFC 1035 2.3.4
_LABEL = 63


class EventType(IntEnum):
    """Event types; a receiver ignores all others."""

    ASSIGNED_IPS = 0
    DOMAIN_STATUS = 1
    GOODBYE = 2


class Status(StrEnum):
    """Whether packets to a domain's proxy IPs are translated now."""

    ACTIVE = "Active"
    INACTIVE = "Inactive"


class AssignedIps(NamedTuple):
    """Client to gateway. `resource` is a canonical UUID, `domain` as received, `proxy_ips` packed and unique."""

    resource: str
    domain: str
    proxy_ips: tuple[bytes, ...]


class DomainStatus(NamedTuple):
    """Gateway to client; `resource` and `domain` repeat those of `AssignedIps`."""

    resource: str
    domain: str
    status: Status


class Goodbye(NamedTuple):
    """Either direction: the sender forgets the connection."""


class Unknown(NamedTuple):
    """An event type that this version does not know."""

    type: int


Event = AssignedIps | DomainStatus | Goodbye | Unknown


def is_control(packet: Packet) -> bool:
    """Whether a valid inner packet is a control packet; one that is too short for an event is not (spec 6.1)."""
    return (
        packet.protocol == PROTOCOL_CONTROL
        and packet.source == _UNSPECIFIED
        and packet.destination == _UNSPECIFIED
        and len(packet.data) - packet.l4_offset >= HEADER
    )


def parse(packet: Packet) -> Event:
    """The event in a packet for which `is_control` holds; raises `Malformed` for a bad payload."""
    kind = packet.data[packet.l4_offset]
    payload = bytes(packet.data[packet.l4_offset + HEADER :])
    match kind:
        case EventType.ASSIGNED_IPS:
            return _assigned_ips(payload)
        case EventType.DOMAIN_STATUS:
            return _domain_status(payload)
        case EventType.GOODBYE:
            return Goodbye()
        case _:
            return Unknown(kind)


def encode(event: AssignedIps | DomainStatus | Goodbye) -> bytes:
    """The whole inner packet, checksum-free, hop limit 0."""
    match event:
        case AssignedIps(resource, domain, proxy_ips):
            assigned = _AssignedIps(resource, domain, [str(ip_address(ip)) for ip in proxy_ips])
            return _packet(EventType.ASSIGNED_IPS, msgspec.json.encode(assigned))
        case DomainStatus(resource, domain, status):
            return _packet(EventType.DOMAIN_STATUS, msgspec.json.encode(_DomainStatus(resource, domain, status.value)))
        case Goodbye():
            return _packet(EventType.GOODBYE, b"")


class _AssignedIps(msgspec.Struct):
    resource: str
    domain: str
    proxy_ips: list[str]


class _DomainStatus(msgspec.Struct):
    resource: str
    domain: str
    status: str


_ASSIGNED_IPS = msgspec.json.Decoder(_AssignedIps)
_DOMAIN_STATUS = msgspec.json.Decoder(_DomainStatus)


def _packet(kind: EventType, payload: bytes) -> bytes:
    header = _IPV6.pack(0x60000000, HEADER + len(payload), PROTOCOL_CONTROL, 0, _UNSPECIFIED, _UNSPECIFIED)
    return header + bytes((kind, 0, 0, 0, 0, 0, 0, 0)) + payload


def _assigned_ips(payload: bytes) -> AssignedIps:
    try:
        decoded = _ASSIGNED_IPS.decode(payload)
        proxy_ips = dict.fromkeys(ip_address(text).packed for text in decoded.proxy_ips)
    except (ValueError, RecursionError) as error:
        raise Malformed("AssignedIps payload is not the JSON it should be") from error
    return AssignedIps(_resource(decoded.resource), _domain(decoded.domain), tuple(proxy_ips))


def _domain_status(payload: bytes) -> DomainStatus:
    try:
        decoded = _DOMAIN_STATUS.decode(payload)
    except (ValueError, RecursionError) as error:
        raise Malformed("DomainStatus payload is not the JSON it should be") from error
    status = Status.ACTIVE if decoded.status == Status.ACTIVE else Status.INACTIVE
    return DomainStatus(_resource(decoded.resource), _domain(decoded.domain), status)


def _resource(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise Malformed("resource is not a UUID") from error


def _domain(text: str) -> str:
    name = text.removesuffix(".")
    if not name or len(name) > _DOMAIN_TEXT:
        raise Malformed("domain is empty or longer than 253 characters")
    # Escapes are refused: a quoted dot would count as one label for DNS and as two for the resource's pattern.
    if not name.isascii() or any(char <= " " or char in '\\"\x7f' for char in name):
        raise Malformed("domain has characters that no host name has")
    if not all(0 < len(label) <= _LABEL for label in name.split(".")):
        raise Malformed("domain has a label of 0 or more than 63 characters")
    return text
