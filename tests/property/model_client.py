"""A client's ICE written down from the specification (connectivity 3, 8) and nothing else: slow and plain.

It stands where `fzg.ice.agent.Agent` stands in `tests.unit.ice_world`, and shares only the formats with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fzg.ice.agent import Check
from fzg.sansio import Deadline
from fzg.wire import stun
from fzg.wire.candidate import Candidate, Kind

if TYPE_CHECKING:
    from fzg.ice.agent import Credentials
    from fzg.sansio import Random
    from fzg.wire.endpoint import Endpoint

INITIAL, MAXIMUM, REMEMBERED = 0.25, 1.5, 12
RECENT_REQUEST = 15.0
MAX_PAIRS = 100
TYPE_PREFERENCE = {Kind.HOST: 126, Kind.PRFLX: 110, Kind.SRFLX: 100, Kind.RELAY: 2}
LOCAL_PREFERENCE = {Kind.HOST: 65534, Kind.SRFLX: 32766, Kind.RELAY: 16382}


class Path(NamedTuple):
    source: Endpoint
    destination: Endpoint


@dataclass
class Attempt:
    transaction_id: bytes
    sent: float
    answered: bool = False


@dataclass
class Pair:
    base: Endpoint
    local_priority: int
    remote: Endpoint
    remote_priority: int
    priority: int
    attempts: list[Attempt] = field(default_factory=list)
    succeeded: bool = False
    nominated: bool = False
    urgent: bool = False
    due: float = 0.0
    requested: float = float("-inf")

    @property
    def unanswered(self) -> int:
        count = 0
        for attempt in reversed(self.attempts):
            if attempt.answered:
                break
            count += 1
        return count

    def schedule(self, now: float) -> None:
        """After each attempt and each answer (3.2)."""
        count = self.unanswered
        if not count or now - self.attempts[-count].sent <= MAXIMUM / 2:
            count = len(self.attempts)
        self.due = self.attempts[-1].sent + delay(count)

    def is_possible(self, now: float) -> bool:
        return (
            now < self.requested + RECENT_REQUEST
            or self.unanswered < REMEMBERED
            or now < self.attempts[-1].sent + delay(REMEMBERED)
        )


def delay(n: int) -> float:
    return min(INITIAL * 2 ** (n - 1), MAXIMUM)


class ModelClient:
    """Controlling. `keeps_provisional_priority`: as the reference, a pair that a check revealed keeps its rank."""

    def __init__(
        self, *, local: Credentials, remote: Credentials, random: Random, keeps_provisional_priority: bool = False
    ) -> None:
        self.local, self.remote = local, remote
        self.random = random
        self.keeps_provisional_priority = keeps_provisional_priority
        self.tie_breaker = random(8)
        self.locals: dict[Endpoint, tuple[Kind, int]] = {}
        self.reflexive: list[tuple[Endpoint, int]] = []
        self.remotes: dict[Endpoint, tuple[int, bool]] = {}  # priority, signalled
        self.pairs: dict[Path, Pair] = {}
        self.path: Path | None = None
        self.transmits: list[Check] = []

    def add_local_candidate(self, kind: Kind, address: Endpoint, base: Endpoint, *, now: float) -> None:
        rank = sum(k is kind and a.is_ipv4 == address.is_ipv4 for a, (k, _) in self.locals.items())
        preference = LOCAL_PREFERENCE[kind] + (not address.is_ipv4) - 2 * rank
        priority = TYPE_PREFERENCE[kind] << 24 | preference << 8 | 255
        if kind is Kind.SRFLX:
            self.reflexive.append((address, priority))
            return  # its pairs are those of its base
        self.locals[address] = (kind, priority)
        for remote in self.remotes:
            self._pair(address, remote)

    def local_candidates(self) -> list[Candidate]:
        known = [(kind, address, priority) for address, (kind, priority) in self.locals.items()]
        known += [(Kind.SRFLX, address, priority) for address, priority in self.reflexive]
        return [
            Candidate("f", 1, "udp", priority, address, kind, ufrag=self.local.ufrag)
            for kind, address, priority in known
        ]

    def add_remote_candidate(self, candidate: Candidate, now: float) -> None:
        priority, signalled = self.remotes.get(candidate.address, (0, False))
        if signalled and priority >= candidate.priority:
            return
        self.remotes[candidate.address] = (candidate.priority, True)
        for pair in self.pairs.values():
            if pair.remote == candidate.address and not self.keeps_provisional_priority:
                self._rank(pair, candidate.priority)
        for base in self.locals:
            self._pair(base, candidate.address)
        self._nominate(now)

    def handle_message(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> None:
        if message.message_class == stun.MessageClass.REQUEST:
            self._handle_request(message, source, destination, now)
        elif message.message_class == stun.MessageClass.SUCCESS:
            self._handle_success(message, now)

    def handle_timeout(self, now: float) -> None:
        for path, pair in list(self.pairs.items()):
            if not pair.is_possible(now):
                del self.pairs[path]
        self._nominate(now)
        due = [pair for pair in self.pairs.values() if pair.due <= now]
        for pair in sorted(due, key=lambda pair: (not pair.urgent, -pair.priority)):
            self._check(pair, now)

    def poll_timeout(self) -> Deadline | None:
        at = min((pair.due for pair in self.pairs.values()), default=None)
        return None if at is None else Deadline(at, "check")

    def poll_event(self) -> None:
        return None

    def poll_transmit(self) -> Check | None:
        return self.transmits.pop(0) if self.transmits else None

    def _handle_request(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> None:
        if message.username != f"{self.local.ufrag}:{self.remote.ufrag}" or destination not in self.locals:
            return
        if not message.verify_integrity(self.local.password.reveal().encode()):
            return
        if source not in self.remotes:
            self.remotes[source] = (message.priority, False)
        self._pair(destination, source)
        pair = self.pairs.get(Path(destination, source))
        if pair is None:
            return
        pair.requested = now
        attributes = [(0x0020, stun.xor_address(source, message.transaction_id))]
        key = self.local.password.reveal().encode()
        payload = stun.encode(1, 2, message.transaction_id, attributes, integrity_key=key, fingerprint=True)
        self.transmits.append(Check(destination, source, payload))

    def _handle_success(self, message: stun.Message, now: float) -> None:
        for pair in self.pairs.values():
            for attempt in pair.attempts:
                if attempt.transaction_id == message.transaction_id:
                    if message.verify_integrity(self.remote.password.reveal().encode()):
                        attempt.answered = True
                        pair.succeeded = True
                        pair.schedule(now)
                        self._nominate(now)
                    return

    def _nominate(self, now: float) -> None:
        best = max(
            (pair for pair in self.pairs.values() if pair.succeeded), key=lambda pair: pair.priority, default=None
        )
        if best is None or self.path == Path(best.base, best.remote):
            return
        self.path = Path(best.base, best.remote)
        best.nominated = best.urgent = True
        best.due = now

    def _pair(self, base: Endpoint, remote: Endpoint) -> None:
        path = Path(base, remote)
        if base.is_ipv4 != remote.is_ipv4 or path in self.pairs:
            return
        _, local_priority = self.locals[base]
        pair = self.pairs[path] = Pair(base, local_priority, remote, 0, 0)
        self._rank(pair, self.remotes[remote][0])
        if len(self.pairs) > MAX_PAIRS:
            del self.pairs[min(self.pairs, key=lambda each: self.pairs[each].priority)]

    def _rank(self, pair: Pair, remote_priority: int) -> None:
        pair.remote_priority = remote_priority
        g, d = pair.local_priority, remote_priority
        pair.priority = (min(g, d) << 32) + 2 * max(g, d) + (g > d)

    def _check(self, pair: Pair, now: float) -> None:
        _, priority = self.locals[pair.base]
        tid = self.random(12)
        attributes = [
            (0x0006, f"{self.remote.ufrag}:{self.local.ufrag}".encode()),
            (0x802A, self.tie_breaker),
            (0x0024, (110 << 24 | priority & 0xFFFFFF).to_bytes(4, "big")),
        ]
        if pair.nominated:
            attributes.append((0x0025, b""))
        key = self.remote.password.reveal().encode()
        payload = stun.encode(1, 0, tid, attributes, integrity_key=key, fingerprint=True)
        pair.urgent = False
        pair.attempts = [*pair.attempts, Attempt(tid, now)][-REMEMBERED:]
        pair.schedule(now)
        self.transmits.append(Check(pair.base, pair.remote, payload, tid))
