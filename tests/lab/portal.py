"""The development portal: gateway, client and relay sockets, and a ledger of all that is said (spec portal.md 5).

Beyond the specification a relay may name a `registrar` in its join, the control socket that must know a device's TURN
credentials before the device does (coturn needs it).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tests.lab.portal_channel import Channel, FrameError, Kind
from tests.lab.portal_orders import Orders
from tests.lab.ports import free_port

if TYPE_CHECKING:
    import ssl

    from tests.lab.portal_account import Account

_LOG = logging.getLogger("lab.portal")

IDLE_S = {Kind.GATEWAY: 37.0, Kind.CLIENT: 37.0, Kind.RELAY: 41.0}
_PATHS = {
    "/gateway/websocket": (Kind.GATEWAY, False),
    "/gateway/v2/websocket": (Kind.GATEWAY, True),
    "/client/websocket": (Kind.CLIENT, False),
    "/client/v2/websocket": (Kind.CLIENT, True),
    "/relay/websocket": (Kind.RELAY, True),
}
_MAX_MESSAGE_BYTES = 64 << 20


@dataclass(slots=True)
class Refusal:
    """Answer the next `count` upgrades of `kind` (None: of any, for ever) with this instead of accepting them."""

    status: int
    kind: str | None = None
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    count: int | None = None


@dataclass(slots=True)
class Faults:
    """What the portal does wrong on purpose. The sets hold socket kinds."""

    refusals: list[Refusal] = field(default_factory=list)
    hang_upgrade: set[str] = field(default_factory=set)
    withhold_join: set[str] = field(default_factory=set)
    withhold_heartbeats: set[str] = field(default_factory=set)
    withhold_init: set[str] = field(default_factory=set)
    join_errors: dict[str, str] = field(default_factory=dict)
    without_v2: bool = False
    rate_limit: bool = False


class Portal(Orders):
    """One portal; `start` listens, `orders.Orders` are the test hooks."""

    def __init__(self, *, account: Account, tls: ssl.SSLContext | None = None) -> None:
        self.account = account
        self.faults = Faults()
        self.channels: set[Channel] = set()
        self.ports: list[int] = []
        self._tls = tls
        self._addresses: list[tuple[str, int]] = []
        self._servers: list[Server] = []
        self._connections = 0
        self._last_connect: dict[tuple[str, str], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, addresses: list[tuple[str, int]]) -> None:
        """Listen on each (host, port); port 0 picks one, the same for all that have it."""
        picked = free_port(*(host for host, port in addresses if not port))
        self._addresses = [(host, port or picked) for host, port in addresses]
        for host, port in self._addresses:
            server = await serve(
                self._serve,
                host,
                port,
                ssl=self._tls,
                process_request=self._process_request,
                compression=None,
                ping_interval=None,
                open_timeout=None,
                close_timeout=1,
                max_size=_MAX_MESSAGE_BYTES,
                server_header=None,
            )
            self._servers.append(server)
        self.ports = [port for _, port in self._addresses]

    async def restart(self) -> None:
        """Listen again where `start` did."""
        if not self._servers:
            await self.start(self._addresses)

    async def stop(self, *, code: int | None = 1012) -> None:
        """Refuse connections from now on and end those that exist: with a close frame, or, for None, by a TCP reset."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close(close_connections=False)
        # All at once, and deaf to who leaves: a portal that goes away tells nobody that the relays went before.
        for channel in self.channels:
            self.account.leave(channel, announce=False)
        await asyncio.gather(*(channel.close(code) for channel in self.channels))

    def spawn(self, coroutine: Any) -> None:
        """Run in the background, kept alive until done."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the upgrade ---

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        kind, v2 = _PATHS.get(parts.path, (None, False))
        headers = list(request.headers.raw_items())
        self._connections += 1
        number = self._connections
        response = None
        if kind is not None and kind in self.faults.hang_upgrade:
            self._record_upgrade(number, kind, request.path, headers, None)
            await asyncio.Event().wait()
        if kind is None or (v2 and kind is not Kind.RELAY and self.faults.without_v2):
            response = _response(404, "Not Found", headers={"content-type": "text/plain"})
        else:
            response = self._refusal(kind, query, request) or self._check(kind, v2, query, request, connection)
        self._record_upgrade(number, kind, request.path, headers, response)
        if response is None:
            assert kind is not None
            channel = Channel(self, connection, kind=kind, v2=v2, number=number, query=query)
            channel.user_agent = request.headers.get("User-Agent", "")
            connection.lab_channel = channel  # type: ignore[attr-defined]
        return response

    def _record_upgrade(
        self, number: int, kind: str | None, path: str, headers: list[tuple[str, str]], response: Response | None
    ) -> None:
        self.account.ledger.add(
            direction="upgrade",
            kind=kind,
            connection=number,
            path=path,
            headers=headers,
            status=response.status_code if response else 101,
        )
        _LOG.info("upgrade #%d of %s: %d", number, kind, response.status_code if response else 101)

    def _refusal(self, kind: Kind, query: dict[str, str], request: Request) -> Response | None:
        for refusal in list(self.faults.refusals):
            if refusal.kind in {None, kind}:
                if refusal.count is not None:
                    refusal.count -= 1
                    if refusal.count <= 0:
                        self.faults.refusals.remove(refusal)
                return _response(refusal.status, refusal.body, headers=refusal.headers)
        return None

    def _check(
        self, kind: Kind, v2: bool, query: dict[str, str], request: Request, connection: ServerConnection
    ) -> Response | None:
        token = request.headers.get("X-Authorization", "").removeprefix("Bearer ") or query.get("token", "")
        if self.faults.rate_limit and not self._within_rate(str(connection.remote_address[0]), token):
            return _problem(503, "rate_limit", "Too many connections", {"Retry-After": "1"})
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
            return _response(403, "Forbidden")
        if not token:
            return _problem(401, "missing_token", "Missing token")
        if token not in self.account.tokens:
            return _problem(401, "invalid_token", "Invalid token")
        wrong = self.account.check_parameters(kind, query, request.headers.get("User-Agent", ""))
        if wrong is not None:
            return _problem(400, "invalid_connect_params", wrong)
        gateway = self.account.find_device(kind, query)
        if gateway is not None and gateway.id in self.account.gateways:
            return _problem(409, "gateway_already_connected", "Another connection for this gateway is active")
        return None

    def _within_rate(self, address: str, token: str) -> bool:
        now = time.monotonic()
        if now - self._last_connect.get((address, token), -1.0) < 1.0:
            return False
        self._last_connect[address, token] = now
        return True

    # --- one connection ---

    async def _serve(self, connection: ServerConnection) -> None:
        channel: Channel = connection.lab_channel  # type: ignore[attr-defined]
        if channel.kind is not Kind.RELAY:
            channel.device = self.account.connect_device(channel.kind, channel.query)
        self.channels.add(channel)
        reason: object = "idle"
        try:
            while True:
                async with asyncio.timeout(IDLE_S[channel.kind]):
                    frame = await connection.recv()
                if isinstance(frame, str):
                    await self._handle_frame(channel, frame)
        except TimeoutError:
            await channel.close(1000)
        except ConnectionClosed as closed:
            reason = [closed.rcvd.code, closed.rcvd.reason] if closed.rcvd else None
        except FrameError as error:
            reason = str(error)
            _LOG.warning("socket #%d dropped: %s", channel.number, error)
            channel.abort()
        finally:
            self.channels.discard(channel)
            self.account.leave(channel)
            self.account.ledger.add(direction="closed", **channel.identity(), reason=reason)
            _LOG.info("%s closed: %s", channel, reason)

    async def _handle_frame(self, channel: Channel, text: str) -> None:
        frame = json.loads(text)
        self.account.ledger.add(
            direction="in",
            **channel.identity(),
            topic=frame.get("topic"),
            event=frame.get("event"),
            payload=frame.get("payload"),
            ref=frame.get("ref"),
            keys=list(frame),
        )
        if not {"topic", "event", "payload", "ref"} <= frame.keys():
            raise FrameError("a frame without topic, event, payload or ref")
        match frame["topic"], frame["event"]:
            case "phoenix", "heartbeat":
                if channel.kind not in self.faults.withhold_heartbeats:
                    await channel.reply(frame)
            case channel.topic, "phx_join":
                await self._join(channel, frame)
            case _, _ if frame["topic"] != channel.topic or not channel.joined:
                await channel.reply(frame, error="unmatched topic")
            case _:
                await self.account.handle_message(channel, frame)

    async def _join(self, channel: Channel, frame: dict[str, Any]) -> None:
        if channel.kind in self.faults.withhold_join:
            return
        if channel.kind in self.faults.join_errors:
            await channel.reply(frame, error=self.faults.join_errors[channel.kind])
            return
        if channel.joined:
            await channel.push("phx_close", {})
        await self.account.join(channel, frame, send_init=channel.kind not in self.faults.withhold_init)


def _problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, "code": code}
    return _response(
        status, json.dumps(body), headers={"Content-Type": "application/problem+json; charset=utf-8"} | (headers or {})
    )


def _response(status: int, body: str, headers: dict[str, str] | None = None) -> Response:
    phrase = ""
    with contextlib.suppress(ValueError):
        phrase = HTTPStatus(status).phrase
    data = body.encode()
    wanted = Headers({"Content-Length": str(len(data)), "Connection": "close"} | (headers or {}))
    return Response(status, phrase, wanted, data)
