"""Orders to a running party: one JSON object per line over a Unix socket, which crosses network namespaces.

A request is `{"op": NAME, ...}`, the answer `{"ok": RESULT}` or `{"error": TEXT}`.
`op` NAME is the method `op_NAME` of the party.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class ControlError(Exception):
    """The party refused an order, or is not there."""


class Control:
    """The caller's side. Each call is a connection of its own, so any thread may call."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def call(self, op: str, /, *, wait: float = 30.0, **arguments: Any) -> Any:
        """Do `op` and return its result; `wait` seconds bound the whole call."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(wait)
            try:
                connection.connect(self.path)
                connection.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
                answer = json.loads(_read_line(connection))
            except (OSError, ValueError) as error:
                raise ControlError(f"{op} on {self.path}: {error!r}") from error
        if "error" in answer:
            raise ControlError(f"{op}: {answer['error']}")
        return answer["ok"]


async def call_async(path: str, op: str, **arguments: Any) -> Any:
    """As `Control.call`, from an event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: Control(path).call(op, **arguments))


class ControlThread:
    """The party's side for programs with a loop of their own: `post` runs each order where it is safe."""

    def __init__(self, path: str | Path, party: object, post: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        self._path = Path(path)
        self._path.unlink(missing_ok=True)
        run = post or (lambda function: function())

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    try:
                        answer = {"ok": run(lambda line=line: _dispatch(party, line))}
                    except Exception as error:
                        answer = {"error": repr(error)}
                    try:
                        self.wfile.write(json.dumps(answer).encode() + b"\n")
                    except OSError:
                        return

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self._server = Server(str(self._path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="control").start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


async def serve_control(path: str | Path, party: object) -> asyncio.AbstractServer:
    """The party's side for asyncio programs; `op_` methods may be coroutines."""
    Path(path).unlink(missing_ok=True)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    result = _dispatch(party, line)
                    if inspect.isawaitable(result):
                        result = await result
                    answer = {"ok": result}
                except Exception as error:
                    answer = {"error": repr(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    return await asyncio.start_unix_server(connected, str(path), limit=1 << 26)


def announce_ready(descriptor: int | None, **facts: Any) -> None:
    """Tell whoever started us that we serve: one JSON line on the inherited descriptor, or on stdout."""
    line = json.dumps(facts) + "\n"
    if descriptor is None:
        print(line, end="", flush=True)
        return
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _dispatch(party: object, line: bytes) -> Any:
    arguments = json.loads(line)
    operation = getattr(party, "op_" + arguments.pop("op"))
    return operation(**arguments)


def _read_line(connection: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            raise ConnectionError("the party closed the connection")
        data += part
    return bytes(data)
