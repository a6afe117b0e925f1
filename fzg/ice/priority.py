"""Ranks of our own candidates and of pairs (spec connectivity 3.8, 3.11)."""

from __future__ import annotations

from typing import Final

from fzg.wire.candidate import TYPE_PREFERENCE, Kind, candidate_priority

_FIRST_LOCAL_PREFERENCE: Final = {Kind.HOST: 65534, Kind.PRFLX: 49150, Kind.SRFLX: 32766, Kind.RELAY: 16382}
"""Of the first IPv4 candidate of a kind; IPv6 has one more."""

_FAMILY_MISMATCH_PENALTY: Final = 1000
"""For a relay address whose family is not that of the socket on which we reach the relay."""


def local_priority(kind: Kind, *, ipv4: bool, index: int, family_mismatch: bool = False) -> int:
    """The priority of the `index`-th (from 0) local candidate of its kind and family."""
    preference = _FIRST_LOCAL_PREFERENCE[kind] + (not ipv4) - 2 * index
    if kind is Kind.RELAY and family_mismatch:
        preference -= _FAMILY_MISMATCH_PENALTY
    return candidate_priority(kind, max(preference, 0))  # thousands of candidates in one agent's life all tie last


def priority_at_peer(kind: Kind, priority: int, *, ipv4: bool) -> int:
    """What the peer gives the candidate from which it checks, where we know a remote one of this kind and priority.

    Behind a reflexive address is a host's, or in a check that came before the candidates perhaps a relay's, which the
    local preference in PRIORITY tells.
    """
    match kind:
        case Kind.SRFLX:
            return local_priority(Kind.HOST, ipv4=ipv4, index=0)
        case Kind.PRFLX:
            is_relay = (priority >> 8 & 0xFFFF) <= _FIRST_LOCAL_PREFERENCE[Kind.RELAY] + 1
            return TYPE_PREFERENCE[Kind.RELAY if is_relay else Kind.HOST] << 24 | priority & 0xFFFFFF
        case _:
            return priority


def check_priority(priority: int) -> int:
    """The PRIORITY attribute of a check: as if the local candidate were peer-reflexive (RFC 8445 7.1.1)."""
    return TYPE_PREFERENCE[Kind.PRFLX] << 24 | priority & 0xFFFFFF


def pair_priority(controlling: int, controlled: int) -> int:
    """RFC 8445 6.1.2.3, from the two candidates' priorities."""
    return (min(controlling, controlled) << 32) + 2 * max(controlling, controlled) + (controlling > controlled)
