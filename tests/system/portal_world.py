"""A portal connection with an application that records what it is told, for the tests of the driver."""

from __future__ import annotations

import socket as stdlib_socket

import gevent
import pytest

from fzg.portal.backoff import Reconnect
from fzg.portal.channel import Timing
from fzg.portal.dial import DialOptions
from fzg.portal.messages import (
    CreateAuthorization,
)
from fzg.portal.url import PortalUrl
from fzg.portal.websocket import Login, PortalConnection
from fzg.secret import Secret
from tests.lab.scripted_portal import ScriptedPortal, wait_until

TOKEN = ".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl"
CLIENT = "11111111-2222-4333-8444-555555555555"
RESOURCE = "99999999-8888-4777-8666-555555555555"
INIT = {"interface": {"ipv4": "100.71.4.9", "ipv6": "fd00:2021:1111::a:17"}}
REJECT = {"client_id": CLIENT, "resource_id": RESOURCE}
AUTHORIZATION = {
    "ref": "opaque",
    "client": {
        "id": CLIENT,
        "public_key": "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
        "preshared_key": "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU=",
        "ipv4": "100.66.1.2",
        "ipv6": "fd00:2021:1111::1:2",
    },
    "resource": {"type": "internet", "id": RESOURCE},
    "client_ice_credentials": {"username": "725z", "password": "latqe7iwpjyrccojsy4ywy"},
    "gateway_ice_credentials": {"username": "zzcf", "password": "up7vgqqtsogpiahklbaira"},
}
PROBLEM = {"content-type": "application/problem+json"}

# A twentieth of the specification's times: the exact ones are proved on the channel, in virtual time.
FAST = Timing(heartbeat_interval=0.5, join_timeout=0.25)


class Application:
    """Records what the connection reports, and answers authorizations as the core would."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.messages: list[object] = []
        self.unsent: list[object] = []
        self.error: Exception | None = None
        self.connection: PortalConnection | None = None
        self.busy = False

    def on_connected(self):
        self.log.append("connected")

    def on_message(self, message):
        wait_until(lambda: not self.busy, "the core to be idle again")
        self.log.append(type(message).__name__)
        self.messages.append(message)
        if isinstance(message, CreateAuthorization):
            self.connection.send(message.acknowledgement())

    def on_disconnected(self):
        self.log.append("disconnected")

    def on_unsent(self, messages):
        self.log.append("unsent")
        self.unsent.extend(messages)

    def on_fatal(self, error):
        self.log.append("fatal")
        self.error = error


class Gateway:
    """A connection with its greenlet, ended with the test."""

    def __init__(self, url: str, **overrides):
        self.application = Application()
        options = {"resolve": lambda _host: ["127.0.0.1"], "mark": 0xFD002021} | overrides.pop("dialing", {})
        token = overrides.pop("token", TOKEN)
        reconnect = overrides.pop("reconnect", None) or Reconnect(random=bytes, max_partition=60.0)
        self.connection = PortalConnection(
            Login(
                url=PortalUrl.parse(url),
                token=Secret(token),
                external_id="edge-id",
                name="edge 1",
                public_key=bytes(range(32)),
                user_agent="Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0)",
            ),
            self.application,
            dialing=DialOptions(**options),
            reconnect=reconnect,
            **{"timing": FAST} | overrides,
        )
        self.application.connection = self.connection
        self.greenlet = gevent.spawn(self.connection.run)

    def wait_connected(self, times: int = 1):
        wait_until(lambda: self.application.log.count("connected") >= times, f"{times} joins")

    def wait_for(self, entry: str, times: int = 1):
        wait_until(lambda: self.application.log.count(entry) >= times, entry)


class Impatient(Reconnect):
    """The real policy with all waits shortened, so that tests of other things need not wait them out."""

    def handle_failure(self, retry_after=None):
        retry = super().handle_failure(retry_after)
        return retry and retry._replace(delay=retry.delay / 20)


@pytest.fixture(name="portal")
def portal_fixture():
    with ScriptedPortal() as scripted:
        yield scripted


@pytest.fixture(name="dial")
def dial_fixture(portal):
    started: list[Gateway] = []

    def start(url: str = "", **overrides) -> Gateway:
        overrides.setdefault("reconnect", Impatient(random=bytes, max_partition=60.0))
        started.append(Gateway(url or f"ws://127.0.0.1:{portal.port}", **overrides))
        return started[-1]

    yield start
    for gateway in started:
        gateway.connection.close(wait=0)
        gateway.greenlet.get(timeout=5)


class FullListener:
    """An address whose accept queue is full: further connection attempts stay unanswered, as through a black hole."""

    def __init__(self, port=0):
        self._port = port

    def __enter__(self):
        self._listener = stdlib_socket.create_server(("127.0.0.9", self._port), backlog=0)
        address = self._listener.getsockname()
        self._fillers = []
        for _ in range(4):
            filler = stdlib_socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            self._fillers.append(filler)
        return address

    def __exit__(self, *_):
        for filler in (self._listener, *self._fillers):
            filler.close()


def headers_of(request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.raw_items()}
