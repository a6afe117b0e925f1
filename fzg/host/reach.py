"""How far the portal and relays can be reached, without registering anything: no token, no upgrade.

Cooperative: waits with gevent.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import re
import ssl
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import gevent
from gevent import socket

from fzg.host.errors import HostError
from fzg.host.trust import trust_store
from fzg.mark import SOCKET_MARK, mark_socket
from fzg.portal import dial, remedy
from fzg.portal.dial import DialError, DialOptions
from fzg.portal.proxy import InvalidProxy, proxy_for
from fzg.wire import Malformed, stun

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fzg.portal.url import PortalUrl
    from fzg.wire.endpoint import Endpoint

# RFC 8489 6.2.1 begins at 500 ms; three tries tell a lost datagram from a blocked port.
_STUN_TRIES: Final = 3
_STUN_PAUSE: Final = 0.5
_DIAL_TIMEOUT: Final = dial.DIAL_TIMEOUT_S
_ANSWER_TIMEOUT: Final = 5.0  # the portal's TCP limit (operations 1.7)
_MAX_HEAD: Final = 16 * 1024
_DATE: Final = re.compile(rb"(?im)^date:[ \t]*(.+?)[ \t]*\r?$")


class Portal(NamedTuple):
    """What became of the way to the portal, step by step; the first problem ends it."""

    host: str
    port: int
    secure: bool
    proxy: str = ""
    addresses: tuple[str, ...] = ()
    trust: str = ""
    failed: str = ""
    """The step that failed: `settings`, `name`, `connection` or `certificate`; empty if none did."""
    problem: str = ""
    """One sentence with the remedy."""
    seconds: float = 0.0
    """From the first packet to the answer."""
    ahead: float | None = None
    """By how many seconds our clock is ahead of the portal's Date header; None without one."""


def portal(url: PortalUrl, environment: Mapping[str, str], *, user_agent: str) -> Portal:
    """Resolve, connect, shake hands, ask for the base path as any browser would. Up to half a minute."""
    found = Portal(url.host, url.port, url.secure)
    try:
        trusted = trust_store(environment)
        proxy = proxy_for(url.host, url.port, environment) if url.secure else None
    except (HostError, InvalidProxy) as error:
        return found._replace(failed="settings", problem=str(error))
    found = found._replace(proxy=str(proxy or ""), trust=trusted.description if url.secure else "")
    options = DialOptions(resolve=addresses_of, ssl_context=trusted.context, proxy=proxy)
    try:
        addresses = dial.find(url.host, options)
    except DialError as error:
        return found._replace(failed="name", problem=str(error))
    found = found._replace(addresses=tuple(addresses))
    began = time.monotonic()
    stream: Any = None  # a gevent socket, later a TLS socket
    try:
        with gevent.Timeout(
            _DIAL_TIMEOUT, DialError(f"no connection within {_DIAL_TIMEOUT:g} s")
        ):  # a proxy may be mute
            stream = dial.connect(addresses, url.host, url.port, options)
        with gevent.Timeout(_ANSWER_TIMEOUT, TimeoutError(f"no answer within {_ANSWER_TIMEOUT:g} s")):
            if url.secure:
                stream = trusted.context.wrap_socket(stream, server_hostname=url.host, do_handshake_on_connect=False)
                stream.do_handshake()
            ahead = _clock_offset(stream, url, user_agent)
    except ssl.SSLError as error:
        reason = (getattr(error, "verify_message", "") or error.reason or str(error)).rstrip(".")
        problem = f"TLS with {url.host} fails: {reason}; {remedy.for_tls(error, time.time())}"
        return found._replace(failed="certificate", problem=problem)
    except (DialError, OSError) as error:
        advice = "" if "; " in str(error) else f"; {remedy.for_connection(url.port)}"
        return found._replace(failed="connection", problem=f"{error}{advice}")
    finally:
        if stream is not None:
            stream.close()
    return found._replace(seconds=time.monotonic() - began, ahead=ahead)


def _clock_offset(stream: Any, url: PortalUrl, user_agent: str) -> float | None:
    path = f"{url.base_path}/"
    request = f"GET {path} HTTP/1.1\r\nHost: {url.authority}\r\nUser-Agent: {user_agent}\r\nConnection: close\r\n\r\n"
    stream.sendall(request.encode())
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD and (piece := stream.recv(4096)):
        head += piece
    if not head.startswith(b"HTTP/"):
        raise DialError(f"{url.host} does not speak HTTP; check the port in FIREZONE_API_URL")
    found = _DATE.search(head.partition(b"\r\n\r\n")[0])
    if found is None:
        return None
    try:
        theirs = email.utils.parsedate_to_datetime(found[1].decode("ascii", "replace")).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return time.time() - theirs


class Answer(NamedTuple):
    """What a STUN server made of us: how long it took and how it sees us; nothing if it did not answer."""

    server: str
    seconds: float | None = None
    mapped: Endpoint | None = None


def stun_servers(servers: Iterable[Endpoint]) -> list[Answer]:
    """Ask all at once for a binding; about two seconds where none answers."""
    asked = [gevent.spawn(_ask, server) for server in servers]
    gevent.joinall(asked)
    return [each.get() for each in asked]


def _ask(server: Endpoint) -> Answer:
    transaction = os.urandom(stun.TRANSACTION_ID_LENGTH)
    request = stun.encode(stun.Method.BINDING, stun.MessageClass.REQUEST, transaction, [])
    with socket.socket(server.family, socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
        with contextlib.suppress(OSError):  # without the capability the kernel refuses; then the rule is of no concern
            mark_socket(udp, SOCKET_MARK)
        udp.connect((server.host, server.port))
        for _ in range(_STUN_TRIES):
            began = time.monotonic()
            with contextlib.suppress(OSError):  # also an ICMP error for the try before
                udp.send(request)
            while (left := began + _STUN_PAUSE - time.monotonic()) > 0:
                udp.settimeout(left)
                try:
                    answer = stun.parse(udp.recv(2048))
                except TimeoutError:
                    break
                except (OSError, Malformed):
                    gevent.sleep(min(left, 0.05))  # a refusal comes at once, and would come again at once
                    continue
                if answer.transaction_id == transaction:
                    return Answer(str(server), time.monotonic() - began, answer.xor_mapped_address)
    return Answer(str(server))


def addresses_of(host: str) -> list[str]:
    """Addresses by the system's resolver, on gevent's resolver threads. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
