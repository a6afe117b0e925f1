"""The ICE agent of one connection: candidates in, checks out, a send path as the result (spec connectivity 3)."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from fzg.ice import binding
from fzg.ice.candidates import (
    LocalCandidate,
    LocalCandidates,
    RemoteCandidate,
    RemoteCandidates,
    is_valid_local,
    withdrawn,
)
from fzg.ice.pair import Nomination, Pair
from fzg.ice.priority import check_priority, pair_priority, priority_at_peer
from fzg.ice.role import Role
from fzg.ice.timing import CLIENT_DEFAULT, CLIENT_IDLE, SERVER_DEFAULT, SERVER_IDLE, Attempt, Timing
from fzg.sansio import Deadline, earliest
from fzg.wire.candidate import COMPONENT, Candidate, Kind, never_added_priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from fzg.sansio import Random
    from fzg.secret import Secret
    from fzg.wire import stun
    from fzg.wire.endpoint import Endpoint

__all__ = [
    "CLIENT_DEFAULT",
    "CLIENT_IDLE",
    "MAX_PAIRS",
    "SERVER_DEFAULT",
    "SERVER_IDLE",
    "Agent",
    "AgentState",
    "Check",
    "Credentials",
    "Event",
    "Nominated",
    "Role",
    "StateChanged",
    "Timing",
]

MAX_PAIRS: Final = 100
"""Spec connectivity 3.1; each pair costs a check every 15 s."""

LIVE: Final = 5.0
LIVE_IDLE: Final = 30.0
"""Seconds since a nominated pair was last heard in which it may replace a silent one (spec connectivity D1)."""

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """One side's user name fragment and password; the password's UTF-8 bytes are the integrity key."""

    ufrag: str
    password: Secret[str]


class AgentState(Enum):
    """Spec connectivity 3.14."""

    NEW = "new"
    CHECKING = "checking"
    CONNECTED = "connected"  # nominated, and another pair may still become better
    COMPLETED = "completed"  # nominated, and no other pair is left
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class Check:
    """A STUN message to send from `source`, a local socket or relay address; requests have a `transaction_id`."""

    source: Endpoint
    destination: Endpoint
    payload: bytes
    transaction_id: bytes | None = None


@dataclass(frozen=True, slots=True)
class Nominated:
    """The send path is now this one. Also emitted when only the kind of an end becomes known better."""

    source: Endpoint
    destination: Endpoint
    remote_kind: Kind
    local_kind: Kind


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The agent entered `state`."""

    state: AgentState


Event = Nominated | StateChanged


class Agent:
    """Full ICE, trickle only, one component; nomination is never final."""

    def __init__(
        self, *, role: Role, local: Credentials, remote: Credentials, timing: Timing, random: Random, now: float
    ) -> None:
        self.role = role
        self.state = AgentState.NEW
        self.dropped: Counter[str] = Counter()
        self.tie_breaker = int.from_bytes(random(8), "big")
        self._local = local
        self._remote = remote
        self._local_key = local.password.reveal().encode()
        self._remote_key = remote.password.reveal().encode()
        self._inbound_username = f"{local.ufrag}:{remote.ufrag}"
        self._outbound_username = f"{remote.ufrag}:{local.ufrag}"
        self._timing = timing
        self._random = random
        self._locals = LocalCandidates()
        self._remotes = RemoteCandidates()
        self._pairs: dict[tuple[Endpoint, Endpoint], Pair] = {}  # by local base and remote address
        self._attempts: dict[bytes, tuple[Pair, Attempt]] = {}  # by transaction id
        self._selected: Pair | None = None
        self._silent_at: float | None = None  # when the best nominated pair has to be judged again
        self._path: Nominated | None = None
        self._warned_of_pairs = False
        self._transmits: list[Check] = []  # emptied after each input; an empty deque holds 600 bytes
        self._events: list[Event] = []
        self._wake_at: float | None = now  # the first pass enters CHECKING
        self._deadline: Deadline | None = None
        self._deadline_is_known = False

    @property
    def local(self) -> Credentials:
        """Ours."""
        return self._local

    @property
    def remote(self) -> Credentials:
        """The peer's."""
        return self._remote

    @property
    def timing(self) -> Timing:
        """The profile in force."""
        return self._timing

    @property
    def path(self) -> Nominated | None:
        """The send path of the last `Nominated` event."""
        return self._path

    @property
    def pair_count(self) -> int:
        """How many pairs are being checked."""
        return len(self._pairs)

    @property
    def remote_candidate_count(self) -> int:
        """How many remote candidates are in use, learned and guessed ones included."""
        return len(self._remotes)

    def local_candidates(self) -> list[Candidate]:
        """Every current local candidate as it is signalled, peer-reflexive ones included."""
        return [candidate.wire(self._local.ufrag) for candidate in self._locals]

    def remote_candidates(self) -> list[RemoteCandidate]:
        """Every current remote candidate that was signalled; neither guesses nor learned addresses."""
        return [candidate for candidate in self._remotes if not candidate.provisional]

    def has_local(self, address: Endpoint) -> bool:
        """Whether checks that arrive at this address of ours are answered."""
        return self._locals.at(address) is not None

    def authenticates(self, message: stun.Message) -> bool:
        """Whether a request is the peer's."""
        return message.username == self._inbound_username and message.verify_integrity(self._local_key)

    def checked_from(self, address: Endpoint) -> float | None:
        """When the peer last checked us from this address of its own; None: never."""
        pairs = (pair for pair in self._pairs.values() if pair.remote.address == address)
        return max((pair.last_request for pair in pairs if pair.last_request is not None), default=None)

    def is_relayed(self, source: Endpoint) -> bool:
        """Whether what is sent from `source` has to go through our relay."""
        local = self._locals.at(source)
        return local is not None and local.kind is Kind.RELAY

    def add_local_candidate(
        self,
        kind: Kind,
        address: Endpoint,
        base: Endpoint,
        *,
        family_mismatch: bool = False,
        passive: bool = False,
        now: float,
    ) -> Candidate | None:
        """Offer one of ours; returns the form to signal, or None when it is unusable or redundant.

        Only a server-reflexive candidate has a base of its own. `family_mismatch`: see spec connectivity 3.8, relay.
        `passive`: form no pairs until a request arrives there, because what is sent from it may leave by a link that it
        does not belong to.
        """
        if kind is Kind.PRFLX:
            raise ValueError("peer-reflexive candidates are discovered, not added")
        if kind is not Kind.SRFLX:
            base = address
        if not is_valid_local(address) or address.is_ipv4 != base.is_ipv4:
            return None
        known = self._locals.at(address)
        if known is not None and known.passive and not known.discarded and kind is Kind.HOST and not passive:
            known.passive = False
            self._pair_local(known, now)
            return None
        candidate = self._admit_local(kind, address, base, family_mismatch=family_mismatch)
        if candidate is None:
            return None
        candidate.passive = passive
        if not passive:
            self._pair_local(candidate, now)
        return candidate.wire(self._local.ufrag)

    def invalidate_local_candidate(self, address: Endpoint, now: float) -> Candidate | None:
        """A relay address of ours is gone; returns the form to signal as invalid, or None when it was not in use."""
        candidate = next((one for one in self._locals if one.kind is Kind.RELAY and one.address == address), None)
        if candidate is None:
            return None
        candidate.discarded = True
        self._remove_pairs(lambda pair: pair.local is candidate)
        self._settle(now)
        return withdrawn(candidate.kind, candidate.address)

    def add_remote_candidate(self, candidate: Candidate, now: float) -> bool:
        """A candidate was signalled; false when it is ignored or nothing new."""
        if candidate.component != COMPONENT or candidate.transport != "udp":
            return False
        if candidate.ufrag is not None and candidate.ufrag != self._remote.ufrag:
            return False
        known = self._remotes.find(candidate.kind, candidate.address)
        if known is not None and not known.discarded and not known.provisional:
            if any(pair.remote is known for pair in self._pairs.values()):
                return False
            return self._pair_remote(known, now)  # its pairs have died since; try again
        remote = self._learn_remote(candidate, known)
        if remote is None:
            return False
        self._pair_remote(remote, now)
        self._add_optimistic(now)
        self._select(now)  # learning a candidate's real priority can reorder what is nominated
        self._wake(now)
        return True

    def guess_remote(self, address: Endpoint, now: float) -> bool:
        """Check an address that the peer may turn out to have, directly; False when nothing of ours can reach it."""
        if not self._remotes.is_full and not self._remotes.all_at(address):
            self._guess(address, now, relayed=False)
        return any(pair.remote.address == address for pair in self._pairs.values())

    def invalidate_remote_candidate(self, candidate: Candidate, now: float) -> bool:
        """The peer withdrew a candidate: matched by address and kind (spec connectivity 3.19, D12)."""
        known = self._remotes.find(candidate.kind, candidate.address)
        if known is None or known.discarded:
            return False
        known.discarded = True
        self._remove_pairs(lambda pair: pair.remote is known)
        for other in self._remotes.all_at(known.address):
            self._pair_remote(other, now)
        self._settle(now)
        return True

    def set_timing(self, timing: Timing, now: float) -> None:
        """Change the check profile; what is due is computed anew from each pair's last check."""
        if timing == self._timing:
            return
        self._timing = timing
        for pair in self._pairs.values():
            pair.history.set_timing(timing)
            pair.schedule(now)
        self._wake(now)

    def handle_message(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> None:
        """A STUN message for this agent came from `source` to `destination`, our socket or relay address."""
        if binding.is_request(message):
            refusal = self._handle_request(message, source, destination, now)
        elif binding.is_success(message):
            refusal = self._handle_success(message, source, now)
        elif binding.is_role_conflict(message):
            refusal = self._handle_role_conflict(message, now)
        else:
            refusal = "not a binding"
        if refusal is not None:
            self.dropped[refusal] += 1
            _LOG.debug("dropped STUN message from %s to %s: %s", source, destination, refusal)

    def handle_timeout(self, now: float) -> None:
        """Send every check that is due, give up pairs, and settle path and state."""
        deadline = self.poll_timeout()
        if deadline is None or now < deadline.at:
            return
        self._wake_at = None
        self._deadline_is_known = False
        due = [pair for pair in self._pairs.values() if pair.next_check <= now]
        due.sort(key=_check_order)
        for pair in due:
            if pair.is_possible(now):
                self._send_check(pair, now)
            else:
                _LOG.debug("pair of %s and %s does not answer", pair.local.base, pair.remote.address)
                self._remove(pair)
        self._settle(now)

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due."""
        if not self._deadline_is_known:
            self._deadline = self._next_deadline()
            self._deadline_is_known = True
        return self._deadline

    def poll_transmit(self) -> Check | None:
        """The next message to send."""
        return self._transmits.pop(0) if self._transmits else None

    def poll_event(self) -> Event | None:
        """The next change to act on."""
        return self._events.pop(0) if self._events else None

    # Candidates and pairs

    def _admit_local(
        self, kind: Kind, address: Endpoint, base: Endpoint, *, family_mismatch: bool
    ) -> LocalCandidate | None:
        """Spec connectivity 3.9, "Redundant": the candidate now in use for this address and base if it is a new one."""
        rivals = self._locals.same(address, base)
        live = next((rival for rival in rivals if not rival.discarded), None)
        revived = next((rival for rival in rivals if rival.kind is kind), None)
        if live is None and revived is not None:
            revived.discarded = False
            return revived
        priority = self._locals.rank(kind, address, family_mismatch=family_mismatch)
        if live is not None and priority < live.priority:
            return None
        candidate = LocalCandidate(kind, address, base, priority)
        if live is not None:
            live.discarded = True
            for pair in self._pairs.values():
                if pair.local is live:
                    pair.adopt(candidate, pair.remote, self._pair_priority(candidate, pair.remote))
        elif not self._make_room_for_local():
            return None
        self._locals.append(candidate)
        return candidate

    def _make_room_for_local(self) -> bool:
        def in_use(candidate: LocalCandidate) -> bool:
            return any(pair.local is candidate for pair in self._pairs.values())

        return not self._locals.is_full or self._locals.evict(in_use)

    def _learn_remote(self, candidate: Candidate, known: RemoteCandidate | None) -> RemoteCandidate | None:
        """Put a signalled candidate in the list: over a provisional one, over a withdrawn one, or as a new one."""
        provisional = next((one for one in self._remotes.all_at(candidate.address) if one.provisional), None)
        if provisional is not None:
            provisional.kind = candidate.kind
            provisional.priority = candidate.priority
            provisional.provisional = False
            self._rank_pairs(lambda pair: pair.remote is provisional)  # spec connectivity D5
            return provisional
        if known is not None:
            known.discarded = False
            known.priority = candidate.priority
            return known
        remote = RemoteCandidate(candidate.kind, candidate.address, candidate.priority, provisional=False)
        return remote if self._append_remote(remote) else None

    def _append_remote(self, remote: RemoteCandidate) -> bool:
        def is_nominated(candidate: RemoteCandidate) -> bool:
            return any(pair.remote is candidate and pair.is_nominated for pair in self._pairs.values())

        def is_paired(candidate: RemoteCandidate) -> bool:
            return any(pair.remote is candidate for pair in self._pairs.values())

        if self._remotes.is_full:
            evicted = self._remotes.evict(is_nominated, is_paired)
            if evicted is None:
                self.dropped["too many remote candidates"] += 1
                return False
            self._remove_pairs(lambda pair: pair.remote is evicted)
        self._remotes.append(remote)
        return True

    def _add_optimistic(self, now: float) -> None:
        """Guess forwarded ports (spec connectivity 3.17); a guess never displaces a candidate."""
        for guess in self._remotes.optimistic():
            if self._remotes.is_full:
                return
            self._guess(guess, now)

    def _guess(self, address: Endpoint, now: float, *, relayed: bool = True) -> None:
        remote = RemoteCandidate(Kind.SRFLX, address, never_added_priority(Kind.SRFLX, address), provisional=True)
        self._remotes.append(remote)
        self._pair_remote(remote, now, relayed=relayed)

    def _pair_local(self, local: LocalCandidate, now: float) -> None:
        for remote in self._remotes:
            self._add_pair(local, remote, now)
        self._wake(now)

    def _pair_remote(self, remote: RemoteCandidate, now: float, *, relayed: bool = True) -> bool:
        """Form pairs with every local candidate that can be checked from; true when there was any new one."""
        before = len(self._pairs)
        for local in list(self._locals):
            if local.kind is Kind.PRFLX or local.passive:  # a learned base is paired
                continue
            if relayed or local.kind is not Kind.RELAY:
                self._add_pair(local, remote, now)
        return len(self._pairs) != before

    def _add_pair(self, local: LocalCandidate, remote: RemoteCandidate, now: float) -> Pair | None:
        """The pair of this path, new or not; None when the families differ or there are better ones enough."""
        if local.base.is_ipv4 != remote.address.is_ipv4:
            return None
        priority = self._pair_priority(local, remote)
        pair = self._pairs.get((local.base, remote.address))
        if pair is not None:
            if priority > pair.priority:
                pair.adopt(local, remote, priority)
                if pair.nomination is Nomination.SENT:
                    pair.nominate(now)
                self._wake(now)
            return pair
        if len(self._pairs) >= MAX_PAIRS and not self._make_room_for_pair(priority):
            return None
        pair = Pair(local, remote, priority, self._timing, now)
        self._pairs[local.base, remote.address] = pair
        self._wake(now)
        return pair

    def _make_room_for_pair(self, priority: int) -> bool:
        """Drop the worst pair if it is worse than `priority`. A nominated pair is in use and not dropped."""
        if not self._warned_of_pairs:
            self._warned_of_pairs = True
            _LOG.warning("more than %d candidate pairs, keeping the best", MAX_PAIRS)
        self.dropped["too many pairs"] += 1
        spare = [pair for pair in self._pairs.values() if not pair.is_nominated]
        worst = min(spare, key=lambda pair: pair.priority, default=None)
        if worst is None or worst.priority >= priority:
            return False
        self._remove(worst)
        return True

    def _pair_priority(self, local: LocalCandidate, remote: RemoteCandidate) -> int:
        if self.role is Role.CONTROLLED:
            return pair_priority(remote.priority, local.priority)
        return pair_priority(local.priority, remote.priority)

    def _rank_pairs(self, concerned: Callable[[Pair], bool]) -> None:
        for pair in self._pairs.values():
            if concerned(pair):
                pair.priority = self._pair_priority(pair.local, pair.remote)

    def _remove_pairs(self, concerned: Callable[[Pair], bool]) -> None:
        for pair in [pair for pair in self._pairs.values() if concerned(pair)]:
            self._remove(pair)

    def _remove(self, pair: Pair) -> None:
        del self._pairs[pair.local.base, pair.remote.address]
        self._forget_attempts(pair.history.transaction_ids())
        self._deadline_is_known = False
        if pair is self._selected:
            self._selected = None

    def _forget_attempts(self, transaction_ids: list[bytes]) -> None:
        for transaction_id in transaction_ids:
            del self._attempts[transaction_id]

    # Messages

    def _handle_request(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> str | None:
        """Spec connectivity 3.5, in its order. Returns why there is no reply."""
        if message.username != self._inbound_username:
            return "foreign user name"
        if not message.verify_integrity(self._local_key):
            return "bad integrity"
        local = self._locals.at(destination)
        if local is None:
            return "no such local candidate"
        if not self._resolve_role(message, now):
            key = self._local_key
            self._reply(binding.role_conflict(message.transaction_id, key=key), local, source)
            return "role conflict"
        if self.role is Role.CONTROLLING and message.use_candidate:
            return "nominated by the controlled side"
        found = self._pairs.get((local.base, source)) or self._pair_from_request(
            local, source, message.priority or 0, now
        )
        if isinstance(found, str):
            return found
        found.last_request = now
        if message.use_candidate and not found.is_nominated:
            found.nominate(now)
        self._reply(binding.success(message.transaction_id, mapped=source, key=self._local_key), local, source)
        if found.nomination is Nomination.PENDING or not found.history:
            self._send_check(found, now)
        if found.is_nominated:
            self._settle(now)
        return None

    def _pair_from_request(self, local: LocalCandidate, source: Endpoint, priority: int, now: float) -> Pair | str:
        """A pair for a request whose path has none yet, or why there is to be none."""
        if local.discarded:
            return "local candidate is withdrawn"
        remote = self._remotes.at(source)
        if remote is None:
            if self._remotes.was_discarded(source):
                return "remote candidate is withdrawn"
            remote = RemoteCandidate(Kind.PRFLX, source, priority, provisional=True)
            if not self._append_remote(remote):
                return "too many remote candidates"
        return self._add_pair(local, remote, now) or "too many pairs"

    def _handle_success(self, message: stun.Message, source: Endpoint, now: float) -> str | None:
        """Spec connectivity 3.6 and D7. Returns why it is dropped."""
        found = self._attempts.get(message.transaction_id)
        if found is None:
            return "unknown transaction"
        if not message.verify_integrity(self._remote_key):
            return "bad integrity"
        pair, attempt = found
        if source != pair.remote.address:
            return "response from another address"
        mapped = message.xor_mapped_address
        if mapped is not None and not self._locals.knows(mapped) and self._make_room_for_local():
            self._locals.append(LocalCandidate(Kind.PRFLX, mapped, pair.local.base, attempt.priority))
        pair.history.answer(attempt, now)
        pair.last_answer = now
        pair.succeeded = True
        if attempt.nominating and pair.nomination is Nomination.SENT:
            pair.nomination = Nomination.SUCCEEDED
        pair.schedule(now)
        self._deadline_is_known = False
        self._settle(now)
        return None

    def _handle_role_conflict(self, message: stun.Message, now: float) -> str | None:
        """Spec connectivity 3.7. Returns why it is dropped."""
        found = self._attempts.get(message.transaction_id)
        if found is None:
            return "unknown transaction"
        if not message.verify_integrity(self._remote_key):
            return "bad integrity"
        pair, attempt = found
        if attempt.role is not self.role:
            return "role already switched"
        self._switch_role(now)
        pair.next_check = now
        return None

    def _resolve_role(self, message: stun.Message, now: float) -> bool:
        """False when the peer has to switch, because our tie-breaker is not the lower one."""
        theirs = message.ice_controlled if self.role is Role.CONTROLLED else message.ice_controlling
        if theirs is None:
            return True
        if self.tie_breaker >= theirs:
            return False
        self._switch_role(now)
        return True

    def _switch_role(self, now: float) -> None:
        self.role = self.role.opposite
        _LOG.info("ICE role conflict, the agent is now %s", self.role.value)
        self._rank_pairs(lambda _: True)
        self._wake(now)

    def _reply(self, payload: bytes, local: LocalCandidate, destination: Endpoint) -> None:
        self._transmits.append(Check(local.base, destination, payload))

    def _send_check(self, pair: Pair, now: float) -> None:
        attempt = Attempt(
            self._random(12),
            now,
            priority=check_priority(pair.local.priority),
            role=self.role,
            nominating=pair.is_nominated,
        )
        payload = binding.request(
            attempt.transaction_id,
            username=self._outbound_username,
            key=self._remote_key,
            role=self.role,
            tie_breaker=self.tie_breaker,
            priority=attempt.priority,
            nominate=pair.is_nominated and self.role is Role.CONTROLLING,
        )
        self._transmits.append(Check(pair.local.base, pair.remote.address, payload, attempt.transaction_id))
        self._attempts[attempt.transaction_id] = pair, attempt
        self._forget_attempts(pair.history.record(attempt))
        if pair.nomination is Nomination.PENDING:
            pair.nomination = Nomination.SENT
        pair.schedule(now)
        self._deadline_is_known = False

    # Path and state

    def _settle(self, now: float) -> None:
        """Choose the path and enter the state that follow from the pairs as they are."""
        self._select(now)
        if self.state is AgentState.NEW:
            self._enter(AgentState.CHECKING)
        nominated = any(pair.is_nominated for pair in self._pairs.values())
        possible = not self._locals or not self._remotes
        possible = possible or any(not pair.is_nominated and pair.is_possible(now) for pair in self._pairs.values())
        self._enter(_STATES[nominated, possible])

    def _select(self, now: float) -> None:
        """Choose the send path: nominate it when controlling, follow the nominations when controlled."""
        self._silent_at = None
        if self.role is Role.CONTROLLING:
            succeeded = [pair for pair in self._pairs.values() if pair.succeeded]
            best = max(succeeded, key=lambda pair: pair.priority, default=None)
            if best is not None and best is not self._selected:
                best.nominate(now)
                self._wake(now)
        else:
            best = self._best_nominated(now)
        if best is None:
            return
        self._selected = best
        path = Nominated(best.local.base, best.remote.address, best.remote.kind, best.local.kind)
        if path != self._path:
            self._path = path
            self._events.append(path)

    def _best_nominated(self, now: float) -> Pair | None:
        """The nominated pair of the highest priority, unless it is silent and another is live (D1).

        By the reckoning of the side that nominates: ours, which sees other candidates behind a NAT, may differ from it,
        and then each side would stay with another of two pairs that work.
        """
        nominated = [pair for pair in self._pairs.values() if pair.is_nominated]
        if len(nominated) <= 1:
            return nominated[0] if nominated else None
        nominated.sort(key=_rank_at_peer, reverse=True)
        best = nominated[0]
        self._silent_at = best.silent_at(now)
        self._deadline_is_known = False
        if not best.is_silent(now):
            return best
        window = LIVE_IDLE if self._timing.is_idle else LIVE
        live = next((pair for pair in nominated[1:] if pair.heard_within(window, now)), None)
        return live or self._selected or best

    def _enter(self, state: AgentState) -> None:
        if state is not self.state:
            self.state = state
            self._events.append(StateChanged(state))

    def _wake(self, now: float) -> None:
        """Something has to be looked at in the next pass, which is due at once."""
        if self._wake_at is None or now < self._wake_at:
            self._wake_at = now
        self._deadline_is_known = False

    def _next_deadline(self) -> Deadline | None:
        if self._wake_at is not None:
            return Deadline(self._wake_at, "ice input")
        if not self._pairs:
            return None
        check = Deadline(min(pair.next_check for pair in self._pairs.values()), "ice check")
        return check if self._silent_at is None else earliest(check, Deadline(self._silent_at, "ice silence"))


_STATES: Final = {  # by "any pair nominated" and "any other pair possible", spec connectivity 3.14
    (True, True): AgentState.CONNECTED,
    (True, False): AgentState.COMPLETED,
    (False, True): AgentState.CHECKING,
    (False, False): AgentState.DISCONNECTED,
}


def _rank_at_peer(pair: Pair) -> tuple[int, int]:
    """How the controlling side ranks the pair, then how we do."""
    remote = pair.remote
    theirs = priority_at_peer(remote.kind, remote.priority, ipv4=remote.address.is_ipv4)
    return pair_priority(theirs, pair.local.priority), pair.priority


def _check_order(pair: Pair) -> tuple[bool, float, int]:
    """Freshly nominated first, then by due time, then the better pair."""
    return pair.nomination is not Nomination.PENDING, pair.next_check, -pair.priority
