"""The local and remote candidates of one agent, bounded (spec connectivity 3.9, 3.10, 3.17)."""

from __future__ import annotations

import hashlib
from collections import Counter
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final, TypeVar

from fzg.ice.priority import local_priority
from fzg.wire.candidate import COMPONENT, Candidate, Kind, never_added_priority, related_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fzg.wire.endpoint import Endpoint

MAX_LOCAL: Final = 64
"""Live local candidates: a dozen are usual; the peer or a relay could report a new mapped address every time."""

MAX_REMOTE: Final = 64
"""Live remote candidates (spec connectivity D10): a client has about ten, each is paired with up to four of ours."""

MAX_DISCARDED: Final = 64
"""Discarded candidates remembered on either side, so that a connection of months does not grow with each relay."""

OPTIMISTIC_PER_CANDIDATE: Final = 2
"""Spec connectivity 3.17."""


class LocalCandidate:
    """One of ours. `base` is what we send from; a passive one answers, and is checked from where it was contacted."""

    __slots__ = ("address", "base", "discarded", "foundation", "kind", "passive", "priority")

    def __init__(self, kind: Kind, address: Endpoint, base: Endpoint, priority: int, *, passive: bool = False) -> None:
        self.kind = kind
        self.passive = passive
        self.address = address
        self.base = base
        self.priority = priority
        self.discarded = False
        self.foundation = foundation_of(kind, address)

    @property
    def answers_requests(self) -> bool:
        """Requests arrive at sockets and at relay addresses, nowhere else."""
        return self.kind is Kind.HOST or self.kind is Kind.RELAY

    def wire(self, ufrag: str) -> Candidate:
        """As it is signalled."""
        related = related_for(self.kind, self.address)
        return Candidate(
            self.foundation, COMPONENT, "udp", self.priority, self.address, self.kind, related=related, ufrag=ufrag
        )


class RemoteCandidate:
    """One of the peer's. A provisional one was guessed or learned from a request and never signalled."""

    __slots__ = ("address", "discarded", "kind", "priority", "provisional")

    def __init__(self, kind: Kind, address: Endpoint, priority: int, *, provisional: bool) -> None:
        self.kind = kind
        self.address = address
        self.priority = priority
        self.provisional = provisional
        self.discarded = False


class LocalCandidates:
    """Ours, in the order they were added."""

    def __init__(self) -> None:
        self._all: list[LocalCandidate] = []
        self._added: Counter[tuple[Kind, bool]] = Counter()

    def __iter__(self) -> Iterator[LocalCandidate]:
        """The live ones."""
        return (candidate for candidate in self._all if not candidate.discarded)

    def __bool__(self) -> bool:
        """Whether there ever was one."""
        return bool(self._all)

    def at(self, address: Endpoint) -> LocalCandidate | None:
        """The candidate on which requests to `address` arrive; live ones first, discarded ones too."""
        found = None
        for candidate in self._all:
            if candidate.address == address and candidate.answers_requests:
                if not candidate.discarded:
                    return candidate
                found = candidate
        return found

    def knows(self, address: Endpoint) -> bool:
        """Whether any of ours, of whatever kind, is or was at `address`."""
        return any(candidate.address == address for candidate in self._all)

    def rank(self, kind: Kind, address: Endpoint, *, family_mismatch: bool) -> int:
        """The priority of the next candidate of its kind and family."""
        index = self._added[kind, address.is_ipv4]
        return local_priority(kind, ipv4=address.is_ipv4, index=index, family_mismatch=family_mismatch)

    def same(self, address: Endpoint, base: Endpoint) -> list[LocalCandidate]:
        """Those that a candidate with this address and base would duplicate, discarded ones included."""
        return [candidate for candidate in self._all if candidate.address == address and candidate.base == base]

    @property
    def is_full(self) -> bool:
        """Whether one has to give way before another can be appended."""
        return sum(1 for _ in self) >= MAX_LOCAL

    def evict(self, in_use: Callable[[LocalCandidate], bool]) -> bool:
        """Discard the oldest reflexive one that is not in use; false when there is none."""
        oldest = next((old for old in self if old.kind in _REFLEXIVE and not in_use(old)), None)
        if oldest is None:
            return False
        oldest.discarded = True
        return True

    def append(self, candidate: LocalCandidate) -> None:
        """Add as the newest."""
        self._all.append(candidate)
        self._added[candidate.kind, candidate.address.is_ipv4] += 1
        _forget_discarded(self._all)


class RemoteCandidates:
    """The peer's, in the order they became known."""

    def __init__(self) -> None:
        self._all: list[RemoteCandidate] = []

    def __iter__(self) -> Iterator[RemoteCandidate]:
        """The live ones."""
        return (candidate for candidate in self._all if not candidate.discarded)

    def __bool__(self) -> bool:
        """Whether there ever was one."""
        return bool(self._all)

    def __len__(self) -> int:
        """How many are live."""
        return sum(1 for _ in self)

    def at(self, address: Endpoint) -> RemoteCandidate | None:
        """The live one at `address`, the highest priority if several."""
        return max(self.all_at(address), key=lambda candidate: candidate.priority, default=None)

    def all_at(self, address: Endpoint) -> list[RemoteCandidate]:
        """The live ones at `address`."""
        return [candidate for candidate in self if candidate.address == address]

    def was_discarded(self, address: Endpoint) -> bool:
        """Whether the peer withdrew a candidate at `address`."""
        return any(candidate.discarded and candidate.address == address for candidate in self._all)

    def find(self, kind: Kind, address: Endpoint) -> RemoteCandidate | None:
        """The signalled or guessed one of this kind at `address`, discarded or not."""
        return next((one for one in self._all if one.address == address and one.kind is kind), None)

    @property
    def is_full(self) -> bool:
        """Whether one has to give way before another can be appended."""
        return len(self) >= MAX_REMOTE

    def evict(
        self, is_nominated: Callable[[RemoteCandidate], bool], is_paired: Callable[[RemoteCandidate], bool]
    ) -> RemoteCandidate | None:
        """Remove the oldest provisional one that is not in use, else the oldest without pairs; None if there is none.

        Signalled ones lose their pairs when nothing answers there any more: peers seldom withdraw an old address.
        """
        oldest = next((old for old in self if old.provisional and not is_nominated(old)), None)
        oldest = oldest or next((old for old in self if not is_paired(old)), None)
        if oldest is not None:
            self._all.remove(oldest)
        return oldest

    def append(self, candidate: RemoteCandidate) -> None:
        """Add as the newest."""
        self._all.append(candidate)
        _forget_discarded(self._all)

    def optimistic(self) -> list[Endpoint]:
        """Guesses that are not known yet: a reflexive address with the port of a host candidate, IPv4 only."""
        known = {candidate.address for candidate in self._all}
        guesses: list[Endpoint] = []
        for ip in dict.fromkeys(one.address.ip for one in self if one.kind is Kind.SRFLX and one.address.is_ipv4):
            for host in self:
                if host.kind is not Kind.HOST or not host.address.is_ipv4:
                    continue
                guess = host.address._replace(ip=ip)
                if guess not in known:
                    known.add(guess)
                    guesses.append(guess)
                    if len(guesses) == OPTIMISTIC_PER_CANDIDATE:
                        return guesses
        return guesses


def withdrawn(kind: Kind, address: Endpoint) -> Candidate:
    """The form in which one of ours is signalled as invalid: unranked and without ufrag (spec connectivity 3.19)."""
    priority = never_added_priority(kind, address)
    related = related_for(kind, address)
    return Candidate(foundation_of(kind, address), COMPONENT, "udp", priority, address, kind, related=related)


def foundation_of(kind: Kind, address: Endpoint) -> str:
    """An opaque token; it depends on nothing that the line does not show anyway."""
    return hashlib.blake2s(f"{kind.value} {address}".encode(), digest_size=8).hexdigest()


def is_valid_local(address: Endpoint) -> bool:
    """Spec connectivity 3.9: loopback and IPv6 link-local pass."""
    ip = address.address
    if ip.is_multicast or ip.is_unspecified:
        return False
    return not (address.is_ipv4 and (ip.is_link_local or ip == _BROADCAST))


_REFLEXIVE: Final = (Kind.SRFLX, Kind.PRFLX)
_BROADCAST: Final = IPv4Address(0xFFFFFFFF)
_Either = TypeVar("_Either", LocalCandidate, RemoteCandidate)


def _forget_discarded(candidates: list[_Either]) -> None:
    discarded = [candidate for candidate in candidates if candidate.discarded]
    for candidate in discarded[: max(len(discarded) - MAX_DISCARDED, 0)]:
        candidates.remove(candidate)
