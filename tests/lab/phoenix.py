"""A device of the portal by script: dial, join, say, expect (spec portal.md 1.7). Used by relays and by tests."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlencode, urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

if TYPE_CHECKING:
    from pathlib import Path

HEARTBEAT_S = 10.0
GATEWAY_AGENT = "Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0)"
CLIENT_AGENT = "Debian/12.0.0 headless-client/1.5.12 (x86_64; 6.1.0)"
RELAY_AGENT = "Debian/12.0.0 relay/1.6.1 (x86_64; 6.1.0)"
_AGENTS = {"gateway": GATEWAY_AGENT, "client": CLIENT_AGENT, "relay": RELAY_AGENT}


class PhoenixSocket:
    """One WebSocket to the portal. `kind` is gateway, client or relay; `query` becomes the URL's."""

    def __init__(
        self,
        url: str,
        kind: str,
        query: dict[str, str],
        *,
        token: str | None = "lab-token",
        path: str | None = None,
        user_agent: str | None = None,
        ca_file: Path | str | None = None,
        timeout: float = 10.0,
    ) -> None:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        path = path or (f"/{kind}/websocket" if kind == "relay" else f"/{kind}/v2/websocket")
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None) if scheme == "wss" else None
        self.topic = kind
        self.backlog: list[dict[str, Any]] = []
        self._ref = 0
        self._open = contextlib.ExitStack()
        dialled = connect(
            f"{scheme}://{parts.netloc}{path}?{urlencode(query, quote_via=quote)}",
            ssl=context,
            additional_headers={"X-Authorization": f"Bearer {token}"} if token else {},
            user_agent_header=user_agent or _AGENTS[kind],
            compression=None,
            proxy=None,
            open_timeout=timeout,
            ping_interval=None,
            close_timeout=1,
            max_size=None,
        )
        self._socket = self._open.enter_context(dialled)

    def send(self, event: str, payload: Any = None, *, topic: str | None = None) -> int:
        """Say something; returns its ref."""
        ref, self._ref = self._ref, self._ref + 1
        frame = {"topic": topic or self.topic, "event": event, "payload": payload, "ref": ref}
        self._socket.send(json.dumps(frame))
        return ref

    def send_raw(self, text: str | bytes) -> None:
        """Send a frame as it stands."""
        self._socket.send(text)

    def join(self, payload: Any = None) -> dict[str, Any]:
        """Join and return the reply's payload."""
        return self.reply_to(self.send("phx_join", payload))

    def reply_to(self, ref: int, *, timeout: float = 5.0) -> dict[str, Any]:
        """The payload of the reply to `ref`."""
        payload: dict[str, Any] = self.expect("phx_reply", ref=ref, timeout=timeout)
        return payload

    def expect(self, event: str, *, ref: int | None = None, timeout: float = 5.0) -> Any:
        """The payload of the next frame of this name; others wait in `backlog`."""
        deadline = time.monotonic() + timeout
        position = 0
        while True:
            while position < len(self.backlog):
                frame = self.backlog[position]
                if frame["event"] == event and ref in {None, frame["ref"]}:
                    del self.backlog[position]
                    return frame["payload"]
                position += 1
            frame = self.receive(max(deadline - time.monotonic(), 0))
            if frame is None:
                raise TimeoutError(f"no {event} within {timeout:g} s; there were {self.backlog}")
            self.backlog.append(frame)

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """The next frame, or None after `timeout` seconds."""
        try:
            frame: dict[str, Any] = json.loads(self._socket.recv(timeout=timeout))
        except TimeoutError:
            return None
        return frame

    def heartbeat(self) -> int:
        """Say a heartbeat; returns its ref."""
        return self.send("heartbeat", {}, topic="phoenix")

    def close(self, code: int = 1000) -> None:
        """Close with a close frame."""
        self._socket.close(code)
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RelayRegistration:
    """Keeps a relay joined from a thread of its own; redials after 0.2 s when the portal goes away."""

    def __init__(
        self,
        *,
        url: str,
        token: str,
        name: str,
        ipv4: str | None,
        ipv6: str | None,
        port: int,
        stamp_secret: str,
        ca_file: Path | str | None = None,
        registrar: str | None = None,
    ) -> None:
        self._url, self._token, self._ca_file = url, token, ca_file
        self._query = {"name": name, "port": str(port)}
        self._query |= {"ipv4": ipv4} if ipv4 else {}
        self._query |= {"ipv6": ipv6} if ipv6 else {}
        self._join = {"stamp_secret": stamp_secret} | ({"registrar": registrar} if registrar else {})
        self._stopped = threading.Event()
        self.joined = threading.Event()
        self._socket: PhoenixSocket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="portal")
        self._thread.start()

    def leave(self) -> None:
        """Close the socket and stay away."""
        self._stopped.set()
        if self._socket is not None:
            self._socket.close(1001)
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._stay()
            except (OSError, ConnectionClosed, TimeoutError, ValueError):
                pass
            except Exception:
                if self._stopped.is_set():
                    return
                raise
            self.joined.clear()
            self._stopped.wait(0.2)

    def _stay(self) -> None:
        with PhoenixSocket(
            self._url, "relay", self._query, token=self._token, ca_file=self._ca_file, timeout=5
        ) as socket:
            self._socket = socket
            if socket.join(self._join)["status"] != "ok":
                return
            self.joined.set()
            beat = time.monotonic() + HEARTBEAT_S
            while not self._stopped.is_set():
                socket.receive(max(beat - time.monotonic(), 0))
                if time.monotonic() >= beat:
                    socket.heartbeat()
                    beat += HEARTBEAT_S
