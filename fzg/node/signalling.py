"""Candidate messages: everything known at one moment goes out in one message per client (spec connectivity 3.18)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fzg.sansio import Deadline
from fzg.wire import candidate as candidate_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fzg.wire.candidate import Candidate, Kind
    from fzg.wire.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class CandidateMessage:
    """One message for the portal: candidates of ours that were added, or that are gone, best first."""

    client_id: str
    added: bool
    candidates: tuple[str, ...]


@dataclass(slots=True)
class _Changes:
    """What a client has not been told yet. A candidate stands in at most one of the two tables."""

    added: dict[tuple[Kind, Endpoint], Candidate] = field(default_factory=dict)
    invalidated: dict[tuple[Kind, Endpoint], Candidate] = field(default_factory=dict)


class Signalling:
    """Collects candidate changes per client; `drain` turns them into messages unless the portal is away.

    The same rules serve one pass of the loop and a long outage: adding cancels an untold invalidation, invalidating
    cancels an untold addition. The key is kind and address, since an invalidation's string differs from the addition's
    (3.19) and several relays may report one server-reflexive address.
    """

    def __init__(self) -> None:
        self._changes: dict[str, _Changes] = {}
        self._postponed: dict[str, float] = {}
        self._held = False

    def add(self, client_id: str, candidate: Candidate) -> None:
        """The client must learn of this candidate."""
        changes = self._changes.setdefault(client_id, _Changes())
        key = (candidate.kind, candidate.address)
        changes.invalidated.pop(key, None)
        known = changes.added.get(key)
        if known is None or known.priority < candidate.priority:
            changes.added[key] = candidate

    def invalidate(self, client_id: str, candidate: Candidate) -> None:
        """The client must forget this candidate."""
        changes = self._changes.setdefault(client_id, _Changes())
        key = (candidate.kind, candidate.address)
        if changes.added.pop(key, None) is None:
            changes.invalidated[key] = candidate

    def forget(self, client_id: str) -> None:
        """The client's connection ended: nothing about it is worth telling."""
        self._changes.pop(client_id, None)
        self._postponed.pop(client_id, None)

    def postpone(self, client_id: str, until: float) -> None:
        """Tell this client nothing before `until`, or before `announce`."""
        self._postponed[client_id] = until

    def announce(self, client_id: str) -> None:
        """What was postponed is due."""
        self._postponed.pop(client_id, None)

    @property
    def postponed(self) -> Mapping[str, float]:
        """The clients that wait, and until when."""
        return self._postponed

    def hold(self) -> None:
        """The portal is away; what is held stays held."""
        self._held = True

    def release(self) -> None:
        """The portal is back: the next `drain` gives out everything held."""
        self._held = False

    def poll_timeout(self) -> Deadline | None:
        """When a postponed message is due."""
        if not self._postponed:
            return None
        return Deadline(min(self._postponed.values()), "candidates wait for the client's")

    def drain(self) -> list[CandidateMessage]:
        """All messages due: additions first, clients in ascending order, then invalidations."""
        if self._held or not self._changes:
            return []
        changes = self._changes
        clients = sorted(changes.keys() - self._postponed.keys())
        self._changes = {client_id: changes[client_id] for client_id in self._postponed if client_id in changes}
        return [
            CandidateMessage(client_id, added, _best_first(table))
            for added in (True, False)
            for client_id in clients
            if (table := changes[client_id].added if added else changes[client_id].invalidated)
        ]

    def give_back(self, message: CandidateMessage) -> None:
        """A drained message was never written: it counts as older than all that is held. Newest first if several."""
        changes = self._changes.setdefault(message.client_id, _Changes())
        for text in message.candidates:
            candidate = candidate_line.parse(text)
            key = (candidate.kind, candidate.address)
            if not message.added:
                if key not in changes.added:
                    changes.invalidated.setdefault(key, candidate)
            elif changes.invalidated.pop(key, None) is None:
                changes.added.setdefault(key, candidate)


def _best_first(candidates: dict[tuple[Kind, Endpoint], Candidate]) -> tuple[str, ...]:
    ranked = sorted((-candidate.priority, candidate_line.encode(candidate)) for candidate in candidates.values())
    return tuple(text for _, text in ranked)
