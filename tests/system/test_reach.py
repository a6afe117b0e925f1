"""How doctor asks portals and STUN servers, and what it makes of answers that are none."""

from __future__ import annotations

import contextlib
import socket

import gevent
import pytest
from gevent.server import DatagramServer, StreamServer

from fzg.host import reach
from fzg.portal.url import PortalUrl
from fzg.wire.endpoint import Endpoint
from tests.lab import stun

pytestmark = pytest.mark.slow

HERE = {"NO_PROXY": "*"}


@contextlib.contextmanager
def answering(data, *, linger=0.0):
    """A listener that answers each connection with these bytes; its port."""

    def serve(client, _address):
        with client, contextlib.suppress(OSError):
            if data is not None:
                client.recv(4096)
                client.sendall(data)
            gevent.sleep(linger)

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop(timeout=0)


def ask(port, environment=HERE):
    return reach.portal(PortalUrl.parse(f"ws://127.0.0.1:{port}/base"), environment, user_agent="test")


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 404 Not Found\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere\r\ndate:Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\nbody",
        b"HTTP/1.0 500 Oops\r\nX: 1\r\nDATE:   Sunday, 06-Nov-94 08:49:37 GMT \r\n\r\n",
    ],
)
def test_any_answer_tells_the_portals_time(head):
    with answering(head) as port:
        found = ask(port)
    assert (found.failed, found.problem) == ("", "")
    assert found.ahead > 86_400 * 365 * 20


@pytest.mark.parametrize(
    "date",
    [b"", b"Date: \r\n", b"Date: yesterday\r\n", b"Date: Sun, 06 Nov 99999 08:49:37 GMT\r\n", b"Date: \xff\xfe\r\n"],
)
def test_a_date_that_is_none_is_left_out(date):
    with answering(b"HTTP/1.1 200 OK\r\n" + date + b"\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n") as port:
        found = ask(port)
    assert (found.failed, found.ahead) == ("", None)


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"x" * 100_000])
def test_what_speaks_no_http_is_named_with_a_remedy(data):
    with answering(data) as port:
        found = ask(port)
    assert found.failed == "connection"
    assert "does not speak HTTP; check the port in FIREZONE_API_URL" in found.problem


def test_a_portal_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(reach, "_ANSWER_TIMEOUT", 0.2)
    with answering(None, linger=10) as port:
        found = ask(port)
    assert found.failed == "connection"
    assert found.problem.startswith("no answer within 0.2 s; let this host reach TCP port")


def test_a_proxy_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(reach, "_DIAL_TIMEOUT", 0.2)
    with answering(None, linger=10) as port:
        url = PortalUrl.parse("wss://portal.example")
        found = reach.portal(url, {"HTTPS_PROXY": f"http://127.0.0.1:{port}"}, user_agent="test")
    assert found.failed == "connection"
    assert found.problem.startswith("no connection within 0.2 s; let this host reach TCP port 443 there")


# STUN


class Server(DatagramServer):
    """Answers a binding request, unless it is among the first `deaf`; strangers' datagrams first."""

    def __init__(self, deaf=0, before=()):
        super().__init__("127.0.0.1:0")
        self.deaf, self.before, self.asked = deaf, before, 0
        self.start()

    def handle(self, data, address):
        self.asked += 1
        if self.asked <= self.deaf:
            return
        message = stun.Message(data)
        for noise in self.before:
            self.sendto(noise, address)
        mapped = stun.encode_address(address, message.transaction_id)
        self.sendto(
            stun.encode(stun.BINDING, stun.SUCCESS, message.transaction_id, [(stun.XOR_MAPPED_ADDRESS, mapped)]),
            address,
        )


@pytest.fixture
def server():
    started = []

    def start(**options):
        started.append(Server(**options))
        return started[-1], Endpoint.of("127.0.0.1", started[-1].server_port)

    yield start
    for one in started:
        one.stop(timeout=0)


def test_a_stun_server_tells_how_it_sees_us(server):
    _, endpoint = server()
    (answer,) = reach.stun_servers([endpoint])
    assert answer.server == str(endpoint)
    assert answer.mapped.host == "127.0.0.1"
    assert answer.seconds < 0.4


def test_a_lost_request_is_sent_again_and_noise_is_ignored(server):
    one, endpoint = server(deaf=2, before=(b"noise", b"\x01\x01\x00\x00\x21\x12\xa4\x42" + bytes(12)))
    (answer,) = reach.stun_servers([endpoint])
    assert answer.seconds is not None
    assert one.asked == 3


def test_servers_that_refuse_or_say_nothing_end_within_two_seconds(server):
    deaf, endpoint = server(deaf=99)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        closed = Endpoint.of(*gone.getsockname())
    with gevent.Timeout(2.5):
        answers = reach.stun_servers([endpoint, closed])
    assert [answer.seconds for answer in answers] == [None, None]
    assert deaf.asked == 3
