"""What the tunnel says: verdicts about single packets, and events."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.tunnel.flow_log import Tally


class DropReason(StrEnum):
    """Names of drop counters; those of spec tunnel 11.5 where it has one."""

    MALFORMED = "Malformed"
    FRAGMENT = "Fragment"
    MULTICAST = "Multicast"
    NO_PEER_STATE = "NoPeerState"
    NOT_A_PEER = "NotAPeer"
    NOT_ALLOWED = "NotAllowed"
    OUTBOUND_ICMP_ERROR = "OutboundIcmpError"
    EXPIRED_NAT_SESSION = "ExpiredNatSession"
    UNSUPPORTED_PROTOCOL = "UnsupportedProtocol"
    NAT_EXHAUSTED = "NatExhausted"
    ICMP_RATE = "IcmpRate"


FlowKey = tuple[int, bytes, bytes, int, int]
"""Protocol, source, destination, source port, destination port; an echo identifier stands for both ports."""


class Flow(NamedTuple):
    """The same verdict holds for identical packets until `valid_until`. `rewrite` is the other IP and port of NAT."""

    key: FlowKey
    rewrite: tuple[bytes, int] | None
    token: int
    valid_until: float


class Forward(NamedTuple):
    """Write to the TUN. `flow` is for the direction from client to network."""

    packet: bytes
    flow: Flow | None


class Reply(NamedTuple):
    """Send back to the client that the packet came from."""

    packet: bytes


class Deliver(NamedTuple):
    """Send to this client. `flow` is for the direction from network to client.

    With a `tally`, say `handle_delivered` once it has been sent.
    """

    client_id: str
    packet: bytes
    flow: Flow | None
    tally: Tally | None = None


class Consumed(NamedTuple):
    """It was a control packet; events may follow."""


class Drop(NamedTuple):
    """Nothing is done with the packet."""

    reason: str


Verdict = Forward | Reply | Deliver | Consumed | Drop


@dataclass(frozen=True, slots=True)
class ResolveDomain:
    """Look up A and AAAA, and answer with `handle_resolved`."""

    request: int
    domain: str


@dataclass(frozen=True, slots=True)
class SendToClient:
    """An inner packet for the client, if it can be reached; lost otherwise."""

    client_id: str
    packet: bytes


@dataclass(frozen=True, slots=True)
class ClientEmpty:
    """The client has no authorization left and was forgotten: say goodbye and close its connection."""

    client_id: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client said goodbye and was forgotten: drop its connection and send nothing."""

    client_id: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """Packets that passed may not pass any more: void all flows of the client before the next packet."""

    client_id: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """A NAT session began that packets of these flows to the client belong to: void them before the next packet."""

    client_id: str
    keys: Sequence[FlowKey]


Event = ResolveDomain | SendToClient | ClientEmpty | ClientGone | Revoked | Claimed
