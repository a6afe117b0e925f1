"""A portal that misbehaves on request: one listener in the caller's own gevent hub, every act under the test's control.

The frames are coded by `websockets`, which shares nothing with the gateway's own WebSocket code. Left alone it behaves:
it accepts any upgrade, answers joins and heartbeats, and answers close frames.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket as stdlib_socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import gevent
from gevent.server import StreamServer
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from tests.lab.ports import free_port
from tests.lab.secrets import WATCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from gevent import ssl

_SILENT = logging.Logger("scripted portal", logging.CRITICAL)  # noqa: LOG001 - a log of its own, with the token in it

PATIENCE_S = 10.0
"""How long a test waits for something that ought to happen at once; only a failing test waits it out."""


def wait_until(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE_S) -> Any:
    """Lets the hub run until `condition` is true and returns its value; raises AssertionError after `patience`."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        gevent.sleep(0.002)
    return value


@dataclass(frozen=True)
class Refusal:
    """An answer other than 101 to an upgrade request."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    paths: str = ""
    """Only for requests whose path ends so; any when empty."""


class ScriptedPortal:
    """Listens on `host`; `connections` and `requests` grow with what arrives."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.request_times: list[float] = []
        self.accepted = 0
        self.connections: list[Connection] = []
        self.refusals: list[Refusal] = []
        self.refuse_always: list[Refusal] = []
        self.silent = False
        """Accept TCP connections and do nothing with them."""
        self.answer_joins = True
        self.answer_heartbeats = True
        self.join_answer: dict[str, Any] = {"status": "ok", "response": {}}
        self.early_data = b""
        """Bytes that leave in one segment with the answer to the upgrade."""
        self.push_after_join: list[tuple[str, Any]] = []
        self.on_frame: Callable[[dict[str, Any]], None] = lambda frame: None
        """Called with each text frame of the gateway, after it was noted."""
        self._silenced: list[Any] = []
        options = {"ssl_context": tls} if tls is not None else {}
        self._server = StreamServer((host, port or free_port(host)), self._serve, **options)
        self._server.start()
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the listener and everything that came through it."""
        self._server.stop(timeout=0)
        for connection in self.connections:
            connection.drop()
        for connection in self._silenced:
            connection.close()

    def connection(self, index: int) -> Connection:
        """The upgraded connection of this number, once it is there."""
        wait_until(lambda: len(self.connections) > index, f"connection {index}")
        return self.connections[index]

    def _serve(self, client: Any, _address: Any) -> None:
        self.accepted += 1
        if self.silent:
            self._silenced.append(client)
            gevent.sleep(PATIENCE_S * 10)
            return
        client.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        Connection(self, client).serve()

    def refusal_for(self, path: str) -> Refusal | None:
        """The scripted answer to a request for this path; one-time ones are used up."""
        where = path.partition("?")[0]
        for refusal in self.refusals:
            if where.endswith(refusal.paths):
                self.refusals.remove(refusal)
                return refusal
        return next((refusal for refusal in self.refuse_always if where.endswith(refusal.paths)), None)


class Connection:
    """One upgraded WebSocket as the portal sees it."""

    def __init__(self, portal: ScriptedPortal, client: Any) -> None:
        self.portal = portal
        self.frames: list[dict[str, Any]] = []
        self.frame_times: list[float] = []
        self.opcodes: list[Opcode] = []
        self.pongs: list[bytes] = []
        self.closed_with: tuple[int, str] | None = None
        self.ended = False
        self.reading = True
        self.request: Request | None = None
        self._client = client
        self._protocol = ServerProtocol(max_size=None, logger=_SILENT)

    def serve(self) -> None:
        """Reads until the gateway is gone."""
        try:
            while True:
                wait_until(lambda: self.reading, "reading again", PATIENCE_S * 10)
                data = self._client.recv(65536)
                if not data:
                    self._protocol.receive_eof()
                    break
                self._protocol.receive_data(data)
                for event in self._protocol.events_received():
                    self._handle(event)
                self._flush()
        except OSError:
            pass
        self.ended = True
        self._client.close()

    def push(self, event: str, payload: Any, **envelope: Any) -> None:
        """Any push, as the portal would frame it."""
        WATCH.add_message(payload)
        self.text(json.dumps({"topic": "gateway", "event": event, "ref": None, "payload": payload} | envelope))

    def reply(self, ref: Any, status: str, response: Any, topic: str = "gateway") -> None:
        """An answer to one of the gateway's frames."""
        self.push("phx_reply", {"status": status, "response": response}, ref=ref, topic=topic)

    def text(self, text: str | bytes) -> None:
        """One text frame with any content."""
        self._protocol.send_text(text.encode() if isinstance(text, str) else text)
        self._flush()

    def fragments(self, text: str, size: int) -> None:
        """One text message in many frames."""
        data = text.encode()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        self._protocol.send_text(pieces[0], fin=False)
        for piece in pieces[1:-1]:
            self._protocol.send_continuation(piece, fin=False)
        self._protocol.send_continuation(pieces[-1], fin=True)
        self._flush()

    def binary(self, data: bytes) -> None:
        """One binary frame."""
        self._protocol.send_binary(data)
        self._flush()

    def ping(self, data: bytes) -> None:
        """One ping."""
        self._protocol.send_ping(data)
        self._flush()

    def close(self, code: int, reason: str = "") -> None:
        """A close frame; the gateway is to answer it."""
        self._protocol.send_close(code, reason)
        self._flush()

    def raw(self, data: bytes) -> None:
        """Bytes that need not be a frame."""
        self._client.sendall(data)

    def end_of_stream(self) -> None:
        """Closes our side of the TCP connection without a close frame."""
        self._client.shutdown(stdlib_socket.SHUT_WR)

    def drop(self) -> None:
        """Resets the TCP connection."""
        if self.ended:
            return
        with contextlib.suppress(OSError):  # the server may have closed it already
            self._client.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.close()
        self.ended = True

    def events(self, *, heartbeats: bool = False) -> list[str]:
        """The names of what the gateway sent, heartbeats left out unless asked for."""
        return [frame["event"] for frame in self.frames if heartbeats or frame["event"] != "heartbeat"]

    def frame(self, event: str, index: int = 0) -> dict[str, Any]:
        """The gateway's frame of this name and number, once it is there."""

        def matching() -> list[dict[str, Any]]:
            return [frame for frame in self.frames if frame["event"] == event]

        wait_until(lambda: len(matching()) > index, f"{event} number {index}")
        return matching()[index]

    def _handle(self, event: Request | Frame) -> None:
        if isinstance(event, Request):
            self._handle_request(event)
            return
        self.opcodes.append(event.opcode)
        if event.opcode is Opcode.TEXT:
            self._handle_text(json.loads(bytes(event.data)))
        elif event.opcode is Opcode.PONG:
            self.pongs.append(bytes(event.data))
        elif event.opcode is Opcode.CLOSE:
            data = bytes(event.data)
            self.closed_with = (int.from_bytes(data[:2], "big"), data[2:].decode())

    def _handle_request(self, request: Request) -> None:
        self.request = request
        self.portal.requests.append(request)
        WATCH.add_request(request.path, request.headers.raw_items())
        self.portal.request_times.append(time.monotonic())
        refusal = self.portal.refusal_for(request.path)
        if refusal is None:
            self._protocol.send_response(self._protocol.accept(request))
            self._client.sendall(b"".join(self._protocol.data_to_send()) + self.portal.early_data)
            self.portal.connections.append(self)
            return
        headers = Headers({"Content-Length": str(len(refusal.body.encode())), "Connection": "close"} | refusal.headers)
        self._protocol.send_response(Response(refusal.status, "Refused", headers, refusal.body.encode()))
        self._flush()

    def _handle_text(self, frame: dict[str, Any]) -> None:
        self.frames.append(frame)
        self.frame_times.append(time.monotonic())
        if frame["event"] == "phx_join" and self.portal.answer_joins:
            answer = self.portal.join_answer
            self.reply(frame["ref"], answer["status"], answer["response"])
            if answer["status"] == "ok":
                for event, payload in self.portal.push_after_join:
                    self.push(event, payload)
        elif frame["event"] == "heartbeat" and self.portal.answer_heartbeats:
            self.reply(frame["ref"], "ok", {}, topic="phoenix")
        self.portal.on_frame(frame)

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._client.sendall(data)
            else:
                self._client.shutdown(stdlib_socket.SHUT_WR)
