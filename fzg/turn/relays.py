"""The set of relays: portal updates, demultiplexing, choice by round-trip time, candidates (spec turn 1.9, 2.9, 4)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.sansio import Deadline, earliest, random_unit
from fzg.turn.allocation import Allocation, State
from fzg.turn.events import CONSUMED, NoRelays, Outbox, Relay, RelayRemoved, Use
from fzg.turn.rtt import threshold
from fzg.wire import Malformed, channel_data, stun
from fzg.wire.candidate import Kind, never_added_priority

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Collection, Iterable

    from fzg.sansio import Random, Transmit
    from fzg.turn.events import Consumed, Event, LocalCandidate, Route, Unwrapped
    from fzg.wire.endpoint import Endpoint

_LOG = logging.getLogger(__name__)

FORMER_SOCKETS: Final = 64  # spec turn 1.9
MAX_RELAYS: Final = 32  # the portal lists two; unlisted ones that live are kept besides (spec turn 4.1)
MAX_USERNAME: Final = 508  # bytes, RFC 8489 14.3


class RelayStatus(NamedTuple):
    """One relay for status displays. `rtt` in seconds.

    `mapped`: our sockets, and where this relay sees them. `is_near`: new connections may get this relay.
    """

    id: str
    state: State
    rtt: float | None
    relayed: tuple[Endpoint, ...]
    channels: int
    sockets: tuple[Endpoint, ...]
    mapped: tuple[tuple[Endpoint, Endpoint], ...]
    is_near: bool


class RelaySet:
    """One allocation per relay id; every relay that lives is kept. Relay sockets are distinct."""

    def __init__(
        self,
        *,
        random: Random,
        realm: str = "firezone",
        software: str = "firezone-gateway",
        accept_unsigned_errors: bool = True,
    ) -> None:
        self._random = random
        self._realm = realm
        self._software = software
        self._accept_unsigned_errors = accept_unsigned_errors
        self._outbox = Outbox()
        self._allocations: dict[str, Allocation] = {}
        self._by_socket: dict[Endpoint, Allocation] = {}
        self._former: dict[Endpoint, None] = {}

    # -- inputs

    def update(self, removed: Collection[str], relays: Collection[Relay], now: float) -> None:
        """What `init` or `relays_presence` says: remove, add or replace, and probe what is not listed."""
        for relay_id in removed:
            allocation = self._allocations.get(relay_id)
            if allocation is not None:
                self._remove(allocation, now)
        listed: set[str] = set()
        for relay in merge(relays):
            if self._upsert(relay, listed, now):
                listed.add(relay.id)
        for relay_id, allocation in self._allocations.items():
            if relay_id not in listed:
                allocation.probe(now)

    def handle_datagram(
        self, payload: bytes, source: Endpoint, local: Endpoint, now: float
    ) -> Unwrapped | Consumed | None:
        """Sort out one datagram; None: it is not from a relay, go on with it as it is (spec turn 1.9)."""
        allocation = self._by_socket.get(source)
        if allocation is None and source not in self._former:
            return None
        try:
            first = payload[0] if payload else 0xFF
            if first < 4:
                message = stun.parse(payload)
                if allocation is not None:
                    allocation.handle_message(message, local, now)
                    if allocation.state is State.DEAD:
                        self._bury(allocation)
                return CONSUMED
            if 0x40 <= first <= 0x4F:
                number, data = channel_data.parse(payload)
                unwrapped = None if allocation is None else allocation.handle_channel_data(number, data, now)
                return unwrapped or CONSUMED
        except Malformed:
            pass
        return None

    def is_relay(self, source: Endpoint) -> bool:
        """Whether this is a socket of a relay in use."""
        return source in self._by_socket

    def is_former(self, source: Endpoint) -> bool:
        """Whether this was a socket of one of the last relays that went away."""
        return source in self._former

    def bind_channel(self, relay_id: str, peer: Endpoint, now: float) -> None:
        """Have a channel to `peer` soon; unknown relays and pointless binds are ignored (spec turn 3.2)."""
        allocation = self._allocations.get(relay_id)
        if allocation is not None:
            allocation.bind(peer, now)

    def route(self, relay_id: str, peer: Endpoint, now: float, *, use: Use = Use.DATA) -> Route | None:
        """How to send to `peer` now. None: not possible, what was to be sent is lost, and a bind was started."""
        allocation = self._allocations.get(relay_id)
        return None if allocation is None else allocation.route(peer, use, now)

    def nominate(self, relay_id: str, peer: Endpoint, *, nominated: bool) -> None:
        """Keep the channel of a nominated pair bound without data, or no longer (spec turn 3.4)."""
        allocation = self._allocations.get(relay_id)
        if allocation is not None:
            allocation.nominate(peer, nominated=nominated)

    def doubt(self, relay_id: str, now: float) -> None:
        """A relayed path fell silent. A relay that lost its state drops data without a word (spec turn 5.5)."""
        allocation = self._allocations.get(relay_id)
        if allocation is not None:
            allocation.doubt(now)

    def note_data(self, relay_id: str, number: int, *, sent: bool, received: bool, now: float) -> None:
        """Data that did not pass here went over a channel since the last call. Call before `handle_timeout`."""
        allocation = self._allocations.get(relay_id)
        if allocation is not None:
            allocation.note_data(number, sent=sent, received=received, now=now)

    def shutdown(self, now: float) -> None:  # noqa: ARG002 - inputs take the time
        """Have every relay forget its allocation, without waiting. Nothing follows but what `poll_transmit` gives."""
        for allocation in self._allocations.values():
            allocation.delete()
        self._allocations.clear()
        self._by_socket.clear()

    # -- questions

    def sample(self, now: float) -> str | None:  # noqa: ARG002 - questions take the time, like inputs
        """The relay for a new connection, at random among the near ones; None before any has answered."""
        near = self._near()
        return near[int(random_unit(self._random) * len(near))] if near else None

    def candidates(self, selected: str) -> list[LocalCandidate]:
        """Host and reflexive candidates of all relays and the relay candidates of one, best first, each once."""
        found: dict[tuple[Kind, Endpoint, Endpoint], LocalCandidate] = {}
        for allocation in self._allocations.values():
            for candidate in allocation.reflexive_candidates():
                found.setdefault((candidate.kind, candidate.address, candidate.base), candidate)
        relay = self._allocations.get(selected)
        for candidate in [] if relay is None else relay.relay_candidates():
            found[candidate.kind, candidate.address, candidate.base] = candidate
        return sorted(found.values(), key=lambda local: never_added_priority(local.kind, local.address), reverse=True)

    def reported_count(self, selected: str) -> int:
        """How many candidates the relays reported for a connection, before each is taken once."""
        relay = self._allocations.get(selected)
        reflexive = sum(len(allocation.reflexive_candidates()) for allocation in self._allocations.values())
        return reflexive + (0 if relay is None else len(relay.relay_candidates()))

    @property
    def nat_maps_by_destination(self) -> bool:
        """Whether relays see one socket of ours at different addresses, as behind a symmetric NAT (RFC 4787 4.1)."""
        mapped: dict[Endpoint, Endpoint] = {}
        return any(
            mapped.setdefault(candidate.base, candidate.address) != candidate.address
            for allocation in self._allocations.values()
            for candidate in allocation.reflexive_candidates()
            if candidate.kind is Kind.SRFLX and candidate.address != candidate.base  # a relay on our side of the NAT
        )

    @property
    def is_behind_nat(self) -> bool:
        """Whether some relay sees us at another address than ours, so that what we did not ask for stays outside."""
        return any(
            candidate.kind is Kind.SRFLX and candidate.address != candidate.base
            for allocation in self._allocations.values()
            for candidate in allocation.reflexive_candidates()
        )

    @property
    def is_probing(self) -> bool:
        """Whether some relay may still answer for the first time (spec connectivity D6)."""
        return any(allocation.state is State.PROBING for allocation in self._allocations.values())

    @property
    def counters(self) -> Counter[str]:
        """What was dropped, by reason."""
        return self._outbox.counters

    def status(self) -> list[RelayStatus]:
        """The relays as they are."""
        near = self._near()
        return [
            RelayStatus(
                relay_id,
                one.state,
                one.rtt,
                tuple(one.relayed.values()),
                one.channel_count,
                one.relay.sockets,
                tuple((each.base, each.address) for each in one.reflexive_candidates() if each.kind is Kind.SRFLX),
                relay_id in near,
            )
            for relay_id, one in self._allocations.items()
        ]

    def in_use(self) -> list[Relay]:
        """The relays as the portal described them."""
        return [allocation.relay for allocation in self._allocations.values()]

    def __contains__(self, relay_id: str) -> bool:
        return relay_id in self._allocations

    def __len__(self) -> int:
        return len(self._allocations)

    # -- time and output

    def handle_timeout(self, now: float) -> None:
        """Do everything that is due."""
        for allocation in list(self._allocations.values()):
            deadline = allocation.poll_timeout()
            if deadline is not None and deadline.at <= now:
                allocation.handle_timeout(now)
                if allocation.state is State.DEAD:
                    self._bury(allocation)

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due."""
        return earliest(*(allocation.poll_timeout() for allocation in self._allocations.values()))

    def poll_transmit(self) -> Transmit | None:
        """The next datagram, in order of production."""
        transmits = self._outbox.transmits
        return transmits.popleft() if transmits else None

    def poll_event(self) -> Event | None:
        """The next event."""
        events = self._outbox.events
        return events.popleft() if events else None

    # -- membership

    def _near(self) -> list[str]:
        """The relays among which `sample` chooses."""
        timed = [(allocation.rtt, allocation) for allocation in self._allocations.values()]
        known = [(rtt, allocation) for rtt, allocation in timed if rtt is not None]
        # A suspended relay cannot carry a relayed connection (DEV 15).
        active = [(rtt, allocation) for rtt, allocation in known if allocation.state is State.ACTIVE]
        choices = active or known
        if not choices:
            return []
        limit = threshold([rtt for rtt, _ in choices])
        return [allocation.relay.id for rtt, allocation in choices if rtt <= limit]

    def _upsert(self, relay: Relay, listed: set[str], now: float) -> bool:
        """Hold this relay as described; false if it cannot be."""
        known = self._allocations.get(relay.id)
        if known is not None and known.relay == relay:
            return True
        if not relay.sockets or not 0 < len(relay.username.encode()) <= MAX_USERNAME:
            _LOG.warning("relay %s cannot be used: no address, or a username of unusable length", relay.id)
            return known is not None
        neighbours = [self._by_socket[socket] for socket in relay.sockets if socket in self._by_socket]
        if any(other.relay.id in listed for other in neighbours):
            _LOG.warning("relay %s is ignored: another one is listed with its address", relay.id)
            return known is not None
        if known is None and not neighbours and len(self._allocations) >= MAX_RELAYS:
            _LOG.warning("relay %s is ignored: there are %d already", relay.id, MAX_RELAYS)
            return False
        # A relay that restarted comes back with another id at the same socket: never two objects for one 5-tuple.
        for other in neighbours if known is None else [known, *neighbours]:
            if other.relay.id in self._allocations:
                self._remove(other, now, replaced=True)
        allocation = Allocation(
            relay,
            realm=self._realm,
            software=self._software,
            accept_unsigned_errors=self._accept_unsigned_errors,
            random=self._random,
            outbox=self._outbox,
            now=now,
        )
        self._allocations[relay.id] = allocation
        for socket in relay.sockets:
            self._by_socket[socket] = allocation
            _LOG.info("TURN server added", extra={"rid": relay.id, "address": str(socket)})
        return True

    def _remove(self, allocation: Allocation, now: float, *, replaced: bool = False) -> None:
        """Take an allocation out on the portal's word; the relay is told once."""
        allocation.delete()
        allocation.close(now)
        self._forget(allocation)
        if not replaced:
            _LOG.info("TURN server removed", extra={"rid": allocation.relay.id})
        self._outbox.events.append(RelayRemoved(allocation.relay.id, replaced=replaced, failed=False))

    def _bury(self, allocation: Allocation) -> None:
        """Take a dead allocation out."""
        self._forget(allocation)
        self._outbox.events.append(RelayRemoved(allocation.relay.id, replaced=False, failed=True))
        if not self._allocations:
            self._outbox.events.append(NoRelays())

    def _forget(self, allocation: Allocation) -> None:
        del self._allocations[allocation.relay.id]
        for socket in allocation.relay.sockets:
            del self._by_socket[socket]
            self._former.pop(socket, None)
            self._former[socket] = None
            if len(self._former) > FORMER_SOCKETS:
                del self._former[next(iter(self._former))]


def merge(relays: Iterable[Relay]) -> list[Relay]:
    """One relay per id, whatever the order: the first socket of each family, the last credentials (spec turn 2.1)."""
    merged: dict[str, Relay] = {}
    for relay in relays:
        known = merged.get(relay.id)
        if known is None:
            merged[relay.id] = relay
            continue
        if (known.ipv4 and relay.ipv4) or (known.ipv6 and relay.ipv6):
            _LOG.warning("relay %s is listed with two addresses of one family", relay.id)
        ipv4, ipv6 = known.ipv4 or relay.ipv4, known.ipv6 or relay.ipv6
        merged[relay.id] = Relay(relay.id, ipv4, ipv6, relay.username, relay.password)
    return list(merged.values())
