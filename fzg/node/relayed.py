"""Which connections send through which channel of our relays, and what that asks of relays and engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fzg.sansio import Deadline
from fzg.turn.channels import COOL_DOWN_END

if TYPE_CHECKING:
    from fzg.dataplane.engine import Engine
    from fzg.node.connection import Connection
    from fzg.node.path import Path
    from fzg.turn.events import ChannelChanged
    from fzg.turn.relays import RelaySet
    from fzg.wire.endpoint import Endpoint

LOOK_INTERVAL = 5.0  # s between looks at what the engine carried over channels; a channel's refresh is due at 240 s

# Of the 4096 channel numbers that all clients share: twice the candidates that one may have at a time (D10).
MAX_CHANNELS = 128

Channel = tuple[str, "Endpoint"]
"""The relay's id, and the peer at the channel's far end."""


class ChannelShare:
    """The addresses for which one client made us bind channels, each as long as the relay may hold its number."""

    __slots__ = ("_used_at",)

    def __init__(self) -> None:
        self._used_at: dict[Endpoint, float] = {}  # latest last

    def admits(self, peer: Endpoint, now: float) -> bool:
        """Whether to bind `peer`: a client that names addresses without end must leave numbers to the others."""
        used_at = self._used_at
        if used_at.pop(peer, None) is None and len(used_at) >= MAX_CHANNELS:
            oldest = next(iter(used_at))
            if now < used_at[oldest] + COOL_DOWN_END:
                return False
            del used_at[oldest]
        used_at[peer] = now
        return True


class RelayedPaths:
    """Several connections may share a channel, when their clients share a relay address or a NAT."""

    def __init__(self, *, relays: RelaySet, engine: Engine, now: float) -> None:
        self._relays = relays
        self._engine = engine
        self._users: dict[Channel, dict[str, Connection]] = {}
        self._used_by: dict[str, Channel] = {}
        self._numbers: dict[Channel, int] = {}
        self._looked_at = now

    def __len__(self) -> int:
        return len(self._used_by)

    def track(self, connection: Connection, path: Path | None) -> None:
        """The connection sends by this path now; a channel in use stays bound without data too (turn 3.4)."""
        former = self._used_by.pop(connection.client_id, None)
        if former is not None:
            users = self._users[former]
            del users[connection.client_id]
            if not users:
                del self._users[former]
                self._relays.nominate(*former, nominated=False)
        if path is not None and path.relayed and connection.relay_id is not None:
            channel = (connection.relay_id, path.destination)
            self._used_by[connection.client_id] = channel
            self._users.setdefault(channel, {})[connection.client_id] = connection
            self._relays.nominate(*channel, nominated=True)

    def handle_channel_changed(self, event: ChannelChanged, now: float) -> None:
        """A channel was bound, or lost: the engine must know for all who send through it."""
        channel = (event.relay_id, event.peer)
        if event.sendable or event.receivable:
            self._numbers[channel] = event.number
        else:
            self._numbers.pop(channel, None)
        for connection in self._users.get(channel, {}).values():
            connection.relay_route_changed(now)

    def handle_timeout(self, now: float) -> None:
        """Tell relays what the engine carried, for refreshes and keep-alives (turn 2.8, 3.4). Call before theirs."""
        if now < self._looked_at + LOOK_INTERVAL:
            return
        since, self._looked_at = self._looked_at, now
        for (relay_id, peer), connections in self._users.items():
            number = self._numbers.get((relay_id, peer))
            if number is None:
                continue
            activities = [self._engine.activity(connection.handle) for connection in connections.values()]
            sent = any(activity.last_sent > since for activity in activities)
            received = any(activity.last_received > since for activity in activities)
            if sent or received:
                self._relays.note_data(relay_id, number, sent=sent, received=received, now=now)

    def poll_timeout(self) -> Deadline | None:
        """When to look again; None while nothing is relayed."""
        return Deadline(self._looked_at + LOOK_INTERVAL, "relayed activity") if self._users else None
