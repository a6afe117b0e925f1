"""An HTTP proxy that opens tunnels on request (RFC 9110 9.3.6), in the caller's gevent hub."""

from __future__ import annotations

from typing import Any, Self

import gevent
from gevent import socket
from gevent.server import StreamServer


class ConnectProxy:
    """Knows its own names: `hosts` maps what clients ask for to where that is. `authorization` is what it demands."""

    def __init__(self, hosts: dict[str, tuple[str, int]], *, host: str = "127.0.0.1", authorization: str = "") -> None:
        self.hosts = hosts
        self.authorization = authorization
        self.requests: list[str] = []
        """Head of every request."""
        self.answer: bytes | None = None
        """Sent in place of every answer; the connection is closed then."""
        self._server = StreamServer((host, 0), self._serve)
        self._server.start()
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(timeout=0)

    def _serve(self, client: Any, _address: Any) -> None:
        with client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                chunk = client.recv(1)  # what follows belongs to the tunnel
                if not chunk:
                    return
                head += chunk
            self.requests.append(head.decode())
            if self.answer is not None:
                client.sendall(self.answer)
                return
            request, *fields = head.decode().split("\r\n")
            method, target, _ = request.split(" ")
            if self.authorization and f"Proxy-Authorization: {self.authorization}" not in fields:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            if method != "CONNECT" or target not in self.hosts:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            try:
                server = socket.create_connection(self.hosts[target])
            except OSError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            with server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                gevent.joinall([gevent.spawn(_copy, client, server), gevent.spawn(_copy, server, client)], count=1)


def _copy(source: Any, destination: Any) -> None:
    try:
        while data := source.recv(65536):
            destination.sendall(data)
    except OSError:
        pass
