"""The channels of one allocation: numbers, ages, refreshes, refused peers (spec turn 3)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Final

from fzg.turn.schedule import Schedule
from fzg.wire.channel_data import FIRST_CHANNEL, LAST_CHANNEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fzg.wire.endpoint import Endpoint

LIFETIME: Final = 600.0  # RFC 8656 12: the relay unbinds then
COOL_DOWN_END: Final = 900.0  # until then the relay refuses the number to other peers and the peer other numbers
REFRESH_AGE: Final = 240.0  # the permission that a bind installs lives 300 s and gates what comes in (DEV 6)
RECENT_TRAFFIC: Final = 300.0  # peers this recent are bound again after healing (DEV 16)
REBOUND_PEERS: Final = 100
BUFFERED_PEERS: Final = 100
REFUSAL_SHORT: Final = 5.0
REFUSAL_LONG: Final = 60.0
REFUSED_PEERS: Final = 1024
"""A remote names any number of candidates; forgetting an old refusal costs one more ChannelBind."""


@dataclass(slots=True, eq=False)
class Channel:
    """One number bound to one peer. `bound_at` is the last success, or the first request as long as there is none."""

    number: int
    peer: Endpoint
    bound_at: float
    confirmed: bool = False
    binding: bool = True
    """A ChannelBind is in flight."""
    lapsed: bool = False
    """Unusable, but the relay may still hold the pair: the same number must be used again."""
    used: bool = False
    """Something other than ICE checks went through since the last success."""
    traffic_at: float = -inf


class Due(Enum):
    """What the clock asks of a channel."""

    REFRESH = "refresh"
    LAPSE = "lapse"


class ChannelTable:
    """Numbers are handed out cyclically, so that one comes back as late as possible, even across allocations."""

    __slots__ = ("_by_number", "_by_peer", "_nominated", "_pointer", "_schedule")

    def __init__(self) -> None:
        self._by_number: dict[int, Channel] = {}
        self._by_peer: dict[Endpoint, Channel] = {}
        self._nominated: set[Endpoint] = set()
        self._pointer = FIRST_CHANNEL
        self._schedule: Schedule[int] = Schedule()

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._by_number.values())

    def __len__(self) -> int:
        return len(self._by_number)

    def find(self, peer: Endpoint) -> Channel | None:
        """The peer's channel, usable or not."""
        return self._by_peer.get(peer)

    def usable(self, peer: Endpoint, now: float) -> Channel | None:
        """The peer's channel if something may be sent on it."""
        channel = self._by_peer.get(peer)
        return channel if channel is not None and _is_usable(channel, now) else None

    def receivable(self, number: int, now: float) -> Channel | None:
        """The channel of that number, from the moment its bind was sent: only the relay can know it."""
        channel = self._by_number.get(number)
        return channel if channel is not None and _is_usable(channel, now) else None

    def open(self, peer: Endpoint, now: float) -> Channel | None:
        """A channel for a peer without a usable one, to be bound now; None when all numbers are taken."""
        known = self._by_peer.get(peer)
        if known is not None and now < known.bound_at + COOL_DOWN_END:
            number = known.number
        else:
            if known is not None:
                self.remove(known)
            free = self._next_number()
            if free is None:
                return None
            number = free
        channel = Channel(number, peer, now)
        self._by_number[number] = self._by_peer[peer] = channel
        self._arm(channel)
        return channel

    def begin_refresh(self, channel: Channel) -> None:
        """A ChannelBind for a bound channel is being sent; it stays usable."""
        channel.binding = True
        self._arm(channel)

    def confirm(self, channel: Channel, now: float) -> None:
        """The ChannelBind succeeded."""
        channel.confirmed = True
        channel.binding = False
        channel.lapsed = False
        channel.used = False
        channel.bound_at = now
        self._arm(channel)

    def note(self, channel: Channel, now: float, *, data: bool) -> None:
        """Something went through; `data`: something other than an ICE check."""
        channel.traffic_at = now
        if data and not channel.used:
            channel.used = True
            self._arm(channel)

    def nominate(self, peer: Endpoint, *, nominated: bool) -> None:
        """Keep the peer's channel bound even without data, or no longer. Outlives the channel itself."""
        if nominated:
            self._nominated.add(peer)
        else:
            self._nominated.discard(peer)
        channel = self._by_peer.get(peer)
        if channel is not None:
            self._arm(channel)

    def retire(self, channel: Channel, now: float) -> None:
        """Its bind was given up, but the relay may have heard it: unusable, and the number stays the peer's."""
        channel.lapsed = True
        channel.binding = False
        channel.bound_at = now
        self._arm(channel)

    def remove(self, channel: Channel) -> None:
        """The relay does not have it."""
        if self._by_number.get(channel.number) is channel:
            del self._by_number[channel.number]
            del self._by_peer[channel.peer]
            self._schedule.cancel(channel.number)

    def clear(self) -> None:
        """The allocation is gone. The pointer goes on."""
        self._by_number.clear()
        self._by_peer.clear()
        self._schedule.clear()

    def recent_peers(self, now: float) -> list[Endpoint]:
        """Peers worth binding again on a new allocation, latest traffic first: recent traffic, or not yet answered."""
        channels = [
            channel
            for channel in self._by_number.values()
            if now - channel.traffic_at <= RECENT_TRAFFIC or (channel.binding and not channel.confirmed)
        ]
        channels.sort(key=lambda channel: channel.traffic_at, reverse=True)
        return [channel.peer for channel in channels[:REBOUND_PEERS]]

    def soonest(self) -> float | None:
        """When `pop_due` has something next."""
        return self._schedule.soonest()

    def pop_due(self, now: float) -> tuple[Channel, Due] | None:
        """One channel that must be refreshed, or has lapsed just now."""
        while (number := self._schedule.pop_due(now)) is not None:
            channel = self._by_number[number]
            if channel.lapsed:
                if now >= channel.bound_at + COOL_DOWN_END:
                    self.remove(channel)
                    continue
            elif now >= channel.bound_at + LIFETIME:
                channel.lapsed = True
                self._arm(channel)
                return channel, Due.LAPSE
            elif now >= channel.bound_at + REFRESH_AGE and self._is_wanted(channel):
                return channel, Due.REFRESH
            self._arm(channel, looked=True)
        return None

    def _is_wanted(self, channel: Channel) -> bool:
        return not channel.binding and (channel.used or channel.peer in self._nominated)

    def _arm(self, channel: Channel, *, looked: bool = False) -> None:
        """Wake at the refresh age even if unused: traffic that others carried is reported when we wake."""
        if channel.lapsed:
            at = channel.bound_at + COOL_DOWN_END
        elif self._is_wanted(channel) or not (looked or channel.binding):
            at = channel.bound_at + REFRESH_AGE
        else:
            at = channel.bound_at + LIFETIME
        self._schedule.set(channel.number, at)

    def _next_number(self) -> int | None:
        count = LAST_CHANNEL - FIRST_CHANNEL + 1
        if len(self._by_number) >= count:
            return None
        number = self._pointer
        while number in self._by_number:
            number = _following(number)
        self._pointer = _following(number)
        return number


class PeerBuffer:
    """Peers to bind once there is an allocation, each once, in order; the oldest is lost beyond 100."""

    __slots__ = ("_peers",)

    def __init__(self) -> None:
        self._peers: dict[Endpoint, None] = {}

    def __contains__(self, peer: Endpoint) -> bool:
        return peer in self._peers

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peers: Iterable[Endpoint]) -> None:
        """Append those that are not there yet."""
        for peer in peers:
            self._peers.setdefault(peer)
        while len(self._peers) > BUFFERED_PEERS:
            del self._peers[next(iter(self._peers))]

    def take(self) -> list[Endpoint]:
        """All of them; the buffer is empty then."""
        peers = list(self._peers)
        self._peers.clear()
        return peers


class Refusals:
    """Peers that the relay refused: not asked for again before their time (DEV 13)."""

    __slots__ = ("_bad_requests", "_until")

    def __init__(self) -> None:
        self._until: dict[Endpoint, float] = {}
        self._bad_requests: dict[Endpoint, None] = {}

    def is_refused(self, peer: Endpoint, now: float) -> bool:
        """Whether a bind must not be tried now."""
        until = self._until.get(peer)
        return until is not None and now < until

    def add(self, peer: Endpoint, until: float) -> None:
        """Not before `until`; infinity: not on this allocation."""
        self._until.pop(peer, None)
        self._until[peer] = until
        if len(self._until) > REFUSED_PEERS:
            del self._until[next(iter(self._until))]

    def add_bad_request(self, peer: Endpoint, now: float) -> None:
        """A 400: short the first time, as the allocation may be what is wrong, long from the second on."""
        again = peer in self._bad_requests
        self._bad_requests[peer] = None
        if len(self._bad_requests) > REFUSED_PEERS:
            del self._bad_requests[next(iter(self._bad_requests))]
        self.add(peer, now + (REFUSAL_LONG if again else REFUSAL_SHORT))

    def forgive(self, peer: Endpoint) -> None:
        """The peer was bound, or was not what was wrong."""
        self._until.pop(peer, None)
        self._bad_requests.pop(peer, None)

    def handle_new_allocation(self) -> None:
        """Those for the life of the old one no longer hold."""
        for peer in [peer for peer, until in self._until.items() if until == inf]:
            del self._until[peer]


def _is_usable(channel: Channel, now: float) -> bool:
    return not channel.lapsed and now < channel.bound_at + LIFETIME


def _following(number: int) -> int:
    return number + 1 if number < LAST_CHANNEL else FIRST_CHANNEL
