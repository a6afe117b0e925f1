"""One Phoenix channel on one WebSocket, as the portal sees it (spec portal.md 1.7, V1 serializer)."""

from __future__ import annotations

import contextlib
import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    import asyncio

    from websockets.asyncio.server import ServerConnection

    from tests.lab.portal import Portal
    from tests.lab.store import Device


class Kind(StrEnum):
    """The three kinds of socket; the value is also the topic."""

    GATEWAY = "gateway"
    CLIENT = "client"
    RELAY = "relay"


class FrameError(Exception):
    """A frame over which the portal drops the socket."""


class Channel:
    """State of one socket: who is there, whether it joined, what it was told."""

    def __init__(
        self, portal: Portal, connection: ServerConnection, *, kind: Kind, v2: bool, number: int, query: dict[str, str]
    ) -> None:
        self.portal = portal
        self.connection = connection
        self.kind = kind
        self.topic = str(kind)
        self.v2 = v2
        self.number = number
        self.query = query
        self.user_agent = ""
        self.device: Device | None = None
        self.relay_id: str | None = None
        self.joined = False
        self.iceless = False
        self.remembered_relays: set[str] = set()
        self.presence_timer: asyncio.TimerHandle | None = None
        self.authorization_timers: dict[str, asyncio.TimerHandle] = {}

    def __str__(self) -> str:
        return f"{self.kind} socket #{self.number}"

    def identity(self) -> dict[str, Any]:
        """The ledger's columns that say who this is."""
        return {
            "kind": str(self.kind),
            "connection": self.number,
            "device": self.device.id if self.device else self.relay_id,
        }

    async def push(self, event: str, payload: object) -> None:
        """Send a message of our own accord."""
        await self.send({"topic": self.topic, "event": event, "ref": None, "payload": payload})

    async def reply(self, frame: dict[str, Any], *, error: str | None = None, response: object = None) -> None:
        """Answer a frame: ok, or an error with this reason."""
        status = (
            {"status": "error", "response": {"reason": error}}
            if error
            else {"status": "ok", "response": response or {}}
        )
        await self.send({"topic": frame["topic"], "event": "phx_reply", "ref": frame["ref"], "payload": status})

    async def send(self, frame: dict[str, Any] | str | bytes) -> None:
        """Send a frame; text and bytes go out as they are. A socket that is gone swallows it."""
        fields = frame if isinstance(frame, dict) else {"raw": frame if isinstance(frame, str) else frame.hex()}
        self.portal.account.ledger.add(direction="out", **self.identity(), **fields)
        with contextlib.suppress(ConnectionClosed):
            await self.connection.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def close(self, code: int | None, reason: str = "") -> None:
        """End the socket with a close frame, or with a TCP reset if `code` is None."""
        if code is None:
            self.abort()
            return
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            await self.connection.close(code, reason)

    def abort(self) -> None:
        """End the TCP connection without a close frame."""
        self.connection.transport.abort()

    def cancel_timers(self) -> None:
        """Nothing more happens on behalf of this channel."""
        if self.presence_timer is not None:
            self.presence_timer.cancel()
            self.presence_timer = None
        for timer in self.authorization_timers.values():
            timer.cancel()
        self.authorization_timers.clear()
