"""A client at the portal whose agent and tunnel are somebody else's: joining, authorizations, candidates."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from nacl.public import PrivateKey
from websockets.exceptions import ConnectionClosed

from tests.interop.loopback import PATIENCE_S
from tests.lab.phoenix import PhoenixSocket

if TYPE_CHECKING:
    from tests.interop.loopback import World


class PortalDevice(ABC):
    """An async context manager; subclasses say what an authorization and the gateway's candidates mean to them."""

    def __init__(self, world: World, *, external_id: str | None = None, key: PrivateKey | None = None) -> None:
        self.world = world
        self.key = key or PrivateKey.generate()
        self.external_id = external_id or str(uuid.uuid4())
        self.init: dict[str, Any] = {}
        self.authorization: dict[str, Any] = {}
        self.told: list[str] = []  # candidate lines of the gateway, as they came
        self._messages: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._join()
                await self.open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    # -- what a subclass does

    @abstractmethod
    async def open(self) -> None:
        """`init` is there: start whatever is needed before the first authorization."""

    @abstractmethod
    async def begin(self) -> None:
        """`authorization` came with other credentials than before: make a connection, and `tell` candidates."""

    @abstractmethod
    async def hear(self, lines: list[str]) -> None:
        """Candidates of the gateway."""

    @abstractmethod
    async def unhear(self, lines: list[str]) -> None:
        """Candidates that the gateway withdrew."""

    # -- what everybody sees

    @property
    def ipv4(self) -> str:
        """Its address in the tunnel."""
        return str(self.init["interface"]["ipv4"])

    @property
    def ipv6(self) -> str:
        """Its IPv6 address in the tunnel."""
        return str(self.init["interface"]["ipv6"])

    @property
    def id(self) -> str:
        """Its id at the portal."""
        clients = self.world.portal.state()["clients"]
        return next(key for key, client in clients.items() if client["external_id"] == self.external_id)

    async def authorize(self, resource: str) -> dict[str, Any]:
        """Ask for access and wait for the gateway's word."""
        self._portal.send("request_authorization", {"resource_id": resource, "connected_gateway_ids": []})
        answer: dict[str, Any] = await self.expect("authorization_created")
        known, self.authorization = self.authorization, answer
        if known.get("client_ice_credentials") != answer["client_ice_credentials"]:
            await self.begin()
        return answer

    def tell(self, lines: list[str]) -> None:
        """Our candidates to the gateway, in one message."""
        self._signal("new_gateway_ice_candidates", lines)

    def untell(self, lines: list[str]) -> None:
        """Candidates that we withdraw."""
        self._signal("invalidate_gateway_ice_candidates", lines)

    async def expect(self, wanted: str, *, timeout: float = PATIENCE_S) -> Any:
        """The payload of the portal's next message of this name."""
        async with asyncio.timeout(timeout):
            while True:
                event, payload = await self._messages.get()
                if event == wanted:
                    return payload
                assert event != "authorization_creation_failed", payload

    # -- inside

    def _signal(self, event: str, lines: list[str]) -> None:
        self._portal.send(event, {"gateway_id": self.authorization["gateway_id"], "candidates": lines})

    async def _join(self) -> None:
        query = {
            "external_id": self.external_id,
            "name": "foreign",
            "public_key": base64.b64encode(bytes(self.key.public_key)).decode(),
        }
        self._portal = await asyncio.to_thread(PhoenixSocket, self.world.portal.url, "client", query)
        self._stack.push_async_callback(asyncio.to_thread, self._portal.close)
        self._portal.send("phx_join")
        self._in_background(self._read_portal())
        self.init = await self.expect("init")

    def _in_background(self, work: Any) -> asyncio.Task[None]:
        """Until we leave, or it is cancelled."""
        task = asyncio.create_task(work)

        async def stop() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await task

        self._stack.push_async_callback(stop)
        return task

    async def _read_portal(self) -> None:
        while True:
            try:
                frame = await asyncio.to_thread(self._portal.receive, None)
            except ConnectionClosed:
                return
            assert frame is not None
            match frame["event"]:
                case "ice_candidates":
                    self.told += frame["payload"]["candidates"]
                    await self.hear(frame["payload"]["candidates"])
                case "invalidate_ice_candidates":
                    await self.unhear(frame["payload"]["candidates"])
                case event:
                    self._messages.put_nowait((event, frame["payload"]))
