"""What goes into and comes out of the relay set: records, results and events."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fzg.sansio import Transmit
    from fzg.secret import Secret
    from fzg.wire.candidate import Kind
    from fzg.wire.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Relay:
    """One relay as the portal describes it; at least one of the sockets is given (spec turn 2.1)."""

    id: str
    ipv4: Endpoint | None
    ipv6: Endpoint | None
    username: str
    password: Secret[str]

    @property
    def sockets(self) -> tuple[Endpoint, ...]:
        """The relay's own sockets, IPv4 first."""
        return tuple(socket for socket in (self.ipv4, self.ipv6) if socket is not None)


@dataclass(frozen=True, slots=True)
class LocalCandidate:
    """An address of ours that one relay revealed (spec turn 2.13). The base of a relay candidate is its address."""

    kind: Kind
    address: Endpoint
    base: Endpoint
    family_mismatch: bool
    relay_id: str


class Use(Enum):
    """What a route is asked for: it decides whether the channel is kept alive (spec turn 3.4)."""

    DATA = "data"
    CHECK = "check"
    """An ICE check or its answer: sent, but no reason to refresh the channel."""
    LOOKUP = "lookup"
    """Nothing is sent now."""


class Route(NamedTuple):
    """Send to `relay`, framed as ChannelData with this number."""

    relay: Endpoint
    channel: int


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """Payload of a ChannelData message: it came from `peer` to our `relayed` address."""

    payload: bytes
    peer: Endpoint
    relayed: Endpoint
    relay_id: str


class Consumed(Enum):
    """The datagram was for the relay client and is done with."""

    CONSUMED = "consumed"


CONSUMED = Consumed.CONSUMED


@dataclass(frozen=True, slots=True)
class CandidateAdded:
    """A relay revealed a new or changed address of ours."""

    relay_id: str
    candidate: LocalCandidate


@dataclass(frozen=True, slots=True)
class CandidateInvalidated:
    """A relayed address is no longer ours."""

    relay_id: str
    address: Endpoint


@dataclass(frozen=True, slots=True)
class RelayRemoved:
    """The relay is no longer in the set; `replaced` by a successor on its id or socket, or `failed` by itself."""

    relay_id: str
    replaced: bool
    failed: bool


@dataclass(frozen=True, slots=True)
class NoRelays:
    """The last relay failed (spec turn 4.5 a)."""


@dataclass(frozen=True, slots=True)
class ChannelChanged:
    """ChannelData of this number from these sockets carries traffic of `peer` from now on, or no longer does."""

    relay_id: str
    relay_sockets: tuple[Endpoint, ...]
    number: int
    peer: Endpoint
    sendable: bool
    receivable: bool


Event = CandidateAdded | CandidateInvalidated | RelayRemoved | NoRelays | ChannelChanged


@dataclass(slots=True)
class Outbox:
    """Output of all allocations in order of production, and counts of what was dropped by reason."""

    transmits: deque[Transmit] = field(default_factory=deque)
    events: deque[Event] = field(default_factory=deque)
    counters: Counter[str] = field(default_factory=Counter)
