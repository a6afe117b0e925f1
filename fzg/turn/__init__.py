"""The TURN client: allocations on relays, their channels, and the set of relays (RFC 8656; spec turn)."""

from __future__ import annotations

from fzg.turn.events import (
    CONSUMED,
    CandidateAdded,
    CandidateInvalidated,
    ChannelChanged,
    Consumed,
    Event,
    LocalCandidate,
    NoRelays,
    Relay,
    RelayRemoved,
    Route,
    Unwrapped,
    Use,
)
from fzg.turn.relays import RelaySet, RelayStatus

__all__ = [
    "CONSUMED",
    "CandidateAdded",
    "CandidateInvalidated",
    "ChannelChanged",
    "Consumed",
    "Event",
    "LocalCandidate",
    "NoRelays",
    "Relay",
    "RelayRemoved",
    "RelaySet",
    "RelayStatus",
    "Route",
    "Unwrapped",
    "Use",
]
