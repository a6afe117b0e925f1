"""From a host name to an upgraded WebSocket: TCP to all addresses at once, TLS, HTTP upgrade (spec portal 1.3 to 1.6).

A proxy, if there is one, is asked for a tunnel first; it resolves the name then.

Cooperative: every function waits with gevent and may switch greenlets.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import io
import logging
import os
import ssl
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import gevent
from gevent import queue, socket

from fzg.mark import SOCKET_MARK, mark_socket
from fzg.portal import remedy
from fzg.portal.problem import Rejection, parse_rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fzg.portal.proxy import Proxy
    from fzg.portal.url import PortalUrl

_LOG = logging.getLogger(__name__)

# Specification constants (portal 1.5, 1.6)
CONNECT_TIMEOUT_S: Final = 5.0
DIAL_TIMEOUT_S: Final = 15.0

RESOLVE_TIMEOUT_S: Final = 10.0
"""As long as a look-up for a resource may take (2.4): longer ones would hide that the portal is unreachable."""

MAX_ADDRESSES: Final = 32
"""Sockets opened at once for one dial, whatever the DNS answers."""

MAX_HEAD: Final = 64 * 1024
"""Response line and headers; http.client allows as much for a single line."""

MAX_BODY: Final = 64 * 1024
"""Of a refusal; problem details are a few hundred bytes."""

BODY_TIMEOUT_S: Final = 2.0
"""The status is known by then and decides; a body that stalls may not delay it."""

# RFC 6455 section 1.3
_ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class DialError(Exception):
    """No WebSocket came about; the message says how far it got."""


class Rejected(DialError):  # noqa: N818 - the field's word
    """The upgrade was answered with something other than 101."""

    def __init__(self, rejection: Rejection) -> None:
        advice = remedy.for_rejection(rejection)
        super().__init__(f"{rejection}; {advice}" if advice else str(rejection))
        self.rejection = rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class DialOptions:
    """What a dial needs of its surroundings. The times are the specification's outside tests."""

    resolve: Callable[[str], Sequence[str]]
    """Addresses of a host name as text, looked up anew; may switch greenlets; OSError counts as none."""

    ssl_context: ssl.SSLContext | None = None
    """Trust for `wss`; made by the patched `ssl` module or by `gevent.ssl`, so that it does not block."""

    proxy: Proxy | None = None
    """Through which to connect; it resolves the names then."""

    mark: int | None = SOCKET_MARK
    connect_timeout: float = CONNECT_TIMEOUT_S
    dial_timeout: float = DIAL_TIMEOUT_S
    resolve_timeout: float = RESOLVE_TIMEOUT_S


class Stream(NamedTuple):
    """An upgraded connection, and what the portal sent behind the response head."""

    socket: socket.socket
    early_data: bytes


def dial(url: PortalUrl, target: str, headers: Mapping[str, str], options: DialOptions) -> Stream:
    """Resolves, connects and upgrades once. Raises DialError."""
    addresses = find(url.host, options)
    stream: Any = None  # a gevent socket, later a TLS socket around it: two unrelated types to mypy
    try:
        with gevent.Timeout(options.dial_timeout, DialError(f"no upgrade within {options.dial_timeout:g} s")):
            stream = connect(addresses, url.host, url.port, options)
            if url.secure:
                stream = _with_tls(stream, url.host, options.ssl_context)
                stream.do_handshake()
            early_data = _upgrade(stream, url.authority, target, headers)
    except BaseException as error:
        if stream is not None:
            stream.close()
        if isinstance(error, ssl.SSLError):
            advice = remedy.for_tls(error, time.time())
            raise DialError(f"connecting to {url.host} failed: {error}; {advice}") from error
        if isinstance(error, OSError):
            raise DialError(f"connecting to {url.host} failed: {error}") from error
        raise
    return Stream(stream, early_data)


def find(host: str, options: DialOptions) -> list[str]:
    """The addresses to connect to for `host`: its own, or those of the proxy. Raises DialError."""
    proxy = options.proxy
    addresses = resolve(host if proxy is None else proxy.host, options)
    if not addresses:
        named = host if proxy is None else f"the proxy {proxy.host}"
        raise DialError(f"{named} has no addresses; {remedy.NAME}")
    return addresses


def connect(addresses: Sequence[str], host: str, port: int, options: DialOptions) -> socket.socket:
    """A TCP connection to `host` by what `find` found, through the proxy if there is one. Raises DialError, OSError."""
    proxy = options.proxy
    if proxy is None:
        return connect_any(addresses, port, mark=options.mark, timeout=options.connect_timeout)
    try:
        connection = connect_any(addresses, proxy.port, mark=options.mark, timeout=options.connect_timeout)
    except DialError as error:
        raise DialError(f"the proxy {proxy} cannot be reached: {error}") from error
    try:
        _ask_for_tunnel(connection, proxy, host, port)
    except BaseException:
        connection.close()
        raise
    return connection


def resolve(host: str, options: DialOptions) -> list[str]:
    """The addresses of the portal, each once; an IP literal is its own address."""
    try:
        return [str(ip_address(host))]
    except ValueError:
        pass
    try:
        with gevent.Timeout(options.resolve_timeout, TimeoutError("timed out")):
            found = options.resolve(host)
    except OSError as error:
        _LOG.debug("The portal's host name could not be resolved: %s", error)
        return []
    return list(dict.fromkeys(found))[:MAX_ADDRESSES]


def connect_any(addresses: Sequence[str], port: int, *, mark: int | None, timeout: float) -> socket.socket:
    """The first TCP connection that any of the addresses accepts; the other attempts end. Raises DialError."""
    outcomes: queue.SimpleQueue[tuple[str, socket.socket | OSError]] = queue.SimpleQueue()
    failures: dict[str, str] = dict.fromkeys(addresses, f"no answer within {timeout:g} s")
    racers = [gevent.spawn(_connect, address, port, mark, outcomes) for address in addresses]
    try:
        with gevent.Timeout(timeout, _OutOfTimeError()):
            for _ in racers:
                address, outcome = outcomes.get()
                if not isinstance(outcome, OSError):
                    return outcome
                failures[address] = str(outcome)
    except _OutOfTimeError:
        pass
    finally:
        gevent.killall(racers)
        while not outcomes.empty():
            _, late = outcomes.get()
            if not isinstance(late, OSError):
                late.close()
    reasons = "; ".join(f"{address}: {why}" for address, why in failures.items())
    raise DialError(f"no address accepted: {reasons}; {remedy.for_connection(port)}")


class _OutOfTimeError(Exception):
    """The addresses had their time."""


def _connect(
    address: str, port: int, mark: int | None, outcomes: queue.SimpleQueue[tuple[str, socket.socket | OSError]]
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection: socket.socket | None = None
    delivered = False
    try:
        connection = socket.socket(family, socket.SOCK_STREAM)
        if mark is not None:
            try:
                mark_socket(connection, mark)
            except PermissionError:
                _LOG.debug("This process may not mark its portal socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect((address, port))
        outcomes.put((address, connection))
        delivered = True
    except OSError as error:
        outcomes.put((address, error))
    finally:
        if connection is not None and not delivered:
            connection.close()


def _ask_for_tunnel(connection: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """One CONNECT, one answer; after it the connection leads to `host`. Raises DialError."""
    connection.sendall(proxy.request(host, port))
    head, rest = _read_head(connection, f"the proxy {proxy}")
    status_line = head.partition(b"\r\n")[0].decode("latin-1")
    version, _, status = status_line.partition(" ")
    if not version.startswith("HTTP/1."):
        raise DialError(f"the proxy {proxy} does not speak HTTP")
    if status.startswith("407"):
        raise DialError(
            f"the proxy {proxy} wants other credentials ({status[:100]}); name it in HTTPS_PROXY as "
            "http://user:password@host:port, special characters as %40"
        )
    if not status.startswith("2"):
        raise DialError(f"the proxy {proxy} refused to connect to {host}:{port}: {status[:100]}")
    if rest:
        raise DialError(f"the proxy {proxy} sent more than its answer")


def _with_tls(connection: socket.socket, host: str, context: ssl.SSLContext | None) -> Any:
    """A TLS socket before its handshake, so that the caller has something to close when that is cut short."""
    if context is None:
        connection.close()
        raise DialError("there is no TLS context for a wss URL")
    return context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)


def _upgrade(connection: socket.socket, authority: str, target: str, headers: Mapping[str, str]) -> bytes:
    """One GET, one answer: redirects are refusals, cookies are not kept. Returns the bytes behind the head of a 101."""
    key = base64.b64encode(os.urandom(16))
    connection.sendall(_request(authority, target, key, headers))
    head, early_data = _read_head(connection, "the portal")
    status_line, _, fields = head.partition(b"\r\n")
    if status_line.split(b" ")[1:2] != [b"101"]:
        raise Rejected(_read_rejection(connection, head + early_data))
    answer = http.client.parse_headers(io.BytesIO(fields))
    if "websocket" not in _tokens(answer, "upgrade") or "upgrade" not in _tokens(answer, "connection"):
        raise DialError("the portal switched protocols, but not to WebSocket")
    expected = base64.b64encode(hashlib.sha1(key + _ACCEPT_GUID, usedforsecurity=False).digest())
    if not hmac.compare_digest(answer.get("sec-websocket-accept", "").strip().encode(), expected):
        raise DialError("the portal answered another upgrade than ours")
    return early_data


def _request(authority: str, target: str, key: bytes, headers: Mapping[str, str]) -> bytes:
    fields = {
        "Host": authority,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key.decode(),
        **headers,
    }
    lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def _read_head(connection: socket.socket, sender: str) -> tuple[bytes, bytes]:
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        if len(received) > MAX_HEAD:
            raise DialError(f"the answer of {sender} has no end")
        chunk = connection.recv(4096)
        if not chunk:
            raise DialError(f"{sender} closed the connection before it answered")
        received += chunk
    return bytes(received[: end + 4]), bytes(received[end + 4 :])


def _read_rejection(connection: socket.socket, received: bytes) -> Rejection:
    response = http.client.HTTPResponse(_Replayed(connection, received))  # type: ignore[arg-type]
    body = b""
    try:
        response.begin()
        with gevent.Timeout(BODY_TIMEOUT_S, TimeoutError("timed out")):
            while len(body) < MAX_BODY and (chunk := response.read1(MAX_BODY)):
                body += chunk
    except http.client.HTTPException as error:
        if response.status is None or not isinstance(response.status, int):
            raise DialError(f"the portal does not speak HTTP: {error!r}"[:300]) from error
    except OSError as error:
        _LOG.debug("The body of the portal's refusal is incomplete: %s", error)
    headers = {name.lower(): value for name, value in (response.headers or {}).items()}
    return parse_rejection(response.status, headers, body, time.time())


def _tokens(headers: http.client.HTTPMessage, name: str) -> list[str]:
    return [token.strip().lower() for value in headers.get_all(name, []) for token in value.split(",")]


class _Replayed(io.RawIOBase):
    """What was read from a socket already, then the socket; poses as a socket towards http.client."""

    def __init__(self, connection: socket.socket, received: bytes) -> None:
        self._connection = connection
        self._received = received

    def makefile(self, _mode: str) -> io.BufferedReader:
        """All that http.client asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._received[: len(buffer)]
        if data:
            self._received = self._received[len(data) :]
        else:
            data = self._connection.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)
