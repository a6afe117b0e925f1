"""ICE candidate lines as the portal carries them, and the priority formula (spec connectivity 3.8, 3.15)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint


class Kind(StrEnum):
    """Where a candidate's address comes from (RFC 8445 5.1.1); the value is the word on the wire."""

    HOST = "host"
    SRFLX = "srflx"
    PRFLX = "prflx"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One `candidate:` line; `related` is raddr and rport, `ufrag` the sender's, both optional."""

    foundation: str
    component: int
    transport: str
    priority: int
    address: Endpoint
    kind: Kind
    related: Endpoint | None = None
    ufrag: str | None = None


COMPONENT: Final = 1
"""The only component there is: one UDP flow (spec connectivity 3.1)."""

TYPE_PREFERENCE: Final = {Kind.HOST: 126, Kind.PRFLX: 110, Kind.SRFLX: 100, Kind.RELAY: 2}
"""RFC 8445 5.1.2.2, with relay at 2 instead of 0 (spec connectivity 3.8)."""


def parse(text: str) -> Candidate:
    """The candidate of one line; unknown extensions are skipped with their value. Raises only Malformed."""
    fields = text.split()
    if len(fields) < _FIXED_FIELDS:
        raise Malformed(f"candidate has {len(fields)} fields, {_FIXED_FIELDS} are required")
    head, component, transport, priority, host, port, typ, kind = fields[:_FIXED_FIELDS]
    if not head.startswith(_PREFIX):
        raise Malformed("candidate does not start with 'candidate:'")
    foundation = head[len(_PREFIX) :]
    if _FOUNDATION.fullmatch(foundation) is None:
        raise Malformed("candidate foundation is not 1 to 32 ice-chars")
    if transport.lower() not in _TRANSPORTS:
        raise Malformed("candidate transport is unknown")
    if typ != "typ":
        raise Malformed("candidate lacks 'typ'")
    if kind not in _KINDS:
        raise Malformed("candidate kind is unknown")
    related, ufrag = _parse_extensions(fields[_FIXED_FIELDS:])
    return Candidate(
        foundation,
        _number(component, 0xFFFF, "component"),
        transport.lower(),
        _number(priority, 0xFFFFFFFF, "priority"),
        _address(host, port),
        _KINDS[kind],
        related,
        ufrag,
    )


def encode(candidate: Candidate) -> str:
    """The line for a candidate, single spaces, extensions in the order raddr, rport, ufrag."""
    address = candidate.address
    line = (
        f"{_PREFIX}{candidate.foundation} {candidate.component} {candidate.transport} {candidate.priority}"
        f" {address.host} {address.port} typ {candidate.kind.value}"
    )
    if candidate.related is not None:
        line += f" raddr {candidate.related.host} rport {candidate.related.port}"
    if candidate.ufrag is not None:
        line += f" ufrag {candidate.ufrag}"
    return line


def priority_of(text: str) -> int | None:
    """The priority of a line that passes the portal's first check (prefix, u32 in the 4th field), else None."""
    fields = text.split(None, 4)
    if len(fields) < 4 or not text.startswith(_PREFIX):
        return None
    try:
        return _number(fields[3], 0xFFFFFFFF, "priority")
    except Malformed:
        return None


def candidate_priority(kind: Kind, local_preference: int) -> int:
    """RFC 8445 5.1.2.1 for our single component."""
    return TYPE_PREFERENCE[kind] << 24 | local_preference << 8 | 256 - COMPONENT


def never_added_priority(kind: Kind, address: Endpoint) -> int:
    """The priority of a candidate no agent has ranked: used to sort, and in invalidations (spec connectivity 3.8)."""
    return candidate_priority(kind, 65534 if address.is_ipv4 else 65535)


def related_for(kind: Kind, address: Endpoint) -> Endpoint | None:
    """The dummy raddr and rport that hide our private base; host and peer-reflexive candidates carry none."""
    if kind in (Kind.HOST, Kind.PRFLX):
        return None
    return Endpoint(bytes(len(address.ip)), 0)


_PREFIX: Final = "candidate:"
_FIXED_FIELDS: Final = 8  # candidate:foundation component transport priority address port typ kind
_FOUNDATION: Final = re.compile(r"[A-Za-z0-9+/]{1,32}")
_TRANSPORTS: Final = frozenset({"udp", "tcp", "ssltcp", "tls"})
_KINDS: Final = {kind.value: kind for kind in Kind}


def _parse_extensions(fields: list[str]) -> tuple[Endpoint | None, str | None]:
    if len(fields) % 2:
        raise Malformed("candidate extension has no value")
    extensions = dict(zip(fields[::2], fields[1::2], strict=True))
    related = None
    if "raddr" in extensions:
        related = _address(extensions["raddr"], extensions.get("rport", "0"))
    return related, extensions.get("ufrag")


def _address(host: str, port: str) -> Endpoint:
    if _HOST.fullmatch(host) is None:
        raise Malformed("candidate address is not an IP address without brackets and scope")
    return Endpoint.of(host, _number(port, 0xFFFF, "port"))


_HOST: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}")  # 45: the longest textual IPv6 address


def _number(text: str, maximum: int, name: str) -> int:
    # 10 digits hold every u32 (and int() of a very long text would raise something else)
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > maximum:
        raise Malformed(f"candidate {name} is not a decimal number up to {maximum}")
    return int(text)
