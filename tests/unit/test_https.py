from __future__ import annotations

import http.client
import ssl

import pytest
from gevent import ssl as gevent_ssl
from gevent.server import StreamServer

from fzg.host import https
from fzg.host.https import ConnectionLost, HttpsConnector, HttpsError
from fzg.portal.dial import DialOptions
from fzg.portal.proxy import Proxy
from fzg.secret import Secret
from tests.lab.certificates import Authority
from tests.lab.connect_proxy import ConnectProxy
from tests.lab.scripted_portal import wait_until

pytestmark = pytest.mark.needs("openssl")

NAME = "flows.example.com"
TOKEN = Secret("header.claims.signature")


@pytest.fixture(name="authority", scope="module")
def authority_fixture(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


class Server:
    """Answers every request with the next scripted bytes; None closes the connection, an empty answer is silence."""

    def __init__(self, authority, names):
        context = gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue(names))
        self.answers = []
        self.requests = []
        self.accepted = 0
        self._server = StreamServer(("127.0.0.1", 0), self._serve, ssl_context=context)
        self._server.start()
        self.port = self._server.server_port

    def _serve(self, connection, _address):
        self.accepted += 1
        file = connection.makefile("rb")
        while line := file.readline():
            headers = http.client.parse_headers(file)
            body = file.read(int(headers["content-length"]))
            self.requests.append((line.decode().strip(), dict(headers.items()), body))
            answer = self.answers.pop(0)
            if answer is None:
                return
            connection.sendall(answer)


@pytest.fixture(name="server")
def server_fixture(authority):
    server = Server(authority, [NAME])
    yield server
    server._server.stop(timeout=0)


@pytest.fixture(name="connector")
def connector_fixture(authority, server):
    return connector_to(server, authority)


def connector_to(server, authority, **changes):
    context = gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority.certificate)
    options = {"resolve": lambda _host: ["127.0.0.1"], "ssl_context": context, "mark": None} | changes
    return HttpsConnector(lambda _host: DialOptions(**options), user_agent="gateway/1.6.1", port=server.port)


def test_one_connection_carries_several_requests(connector, server):
    server.answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 7\r\n\r\nok",
        b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",
    ]
    connection = connector(NAME)
    first = connection.post("/ingestion/flow_logs", b'{"flow_logs":[]}', TOKEN)
    assert (first.status, first.header("retry-after"), first.header("location")) == (200, "7", "")
    assert connection.is_open
    assert connection.post("/x", b"{}", TOKEN).status == 500
    assert server.accepted == 1
    line, headers, body = server.requests[0]
    assert line == "POST /ingestion/flow_logs HTTP/1.1"
    assert headers["Host"] == NAME
    assert headers["Authorization"] == "Bearer header.claims.signature"
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"] == "gateway/1.6.1"
    assert body == b'{"flow_logs":[]}'
    connection.close()
    assert not connection.is_open


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 70_000,
    ],
)
def test_a_connection_that_ends_or_an_answer_that_does_not_is_not_used_again(connector, server, answer):
    server.answers = [answer]
    connection = connector(NAME)
    assert connection.post("/", b"{}", TOKEN).status == 200
    assert not connection.is_open


def test_a_closed_connection_is_told_from_an_answer_that_makes_no_sense(connector, server):
    server.answers = [None, b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"]
    with pytest.raises(ConnectionLost):
        connector(NAME).post("/", b"{}", TOKEN)
    for _ in range(2):
        with pytest.raises(HttpsError) as caught:
            connector(NAME).post("/", b"{}", TOKEN)
        assert not isinstance(caught.value, ConnectionLost)


def test_silence_ends_after_its_time(connector, server, monkeypatch):
    monkeypatch.setattr(https, "REQUEST_TIMEOUT", 0.05)
    server.answers = [b""]
    connection = connector(NAME)
    with pytest.raises(HttpsError):
        connection.post("/", b"{}", TOKEN)
    assert not connection.is_open


def test_a_token_that_is_no_header_value_is_not_quoted(connector):
    with pytest.raises(HttpsError) as caught:
        connector(NAME).post("/", b"{}", Secret("hunter2\r\nX: y"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("fault", ["name", "authority", "no address", "refused"])
def test_a_server_that_cannot_be_trusted_or_reached_is_an_error(server, authority, tmp_path, fault):
    changes = {
        "name": {},
        "authority": {"ssl_context": gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)},
        "no address": {"resolve": lambda _host: []},
        "refused": {"resolve": lambda _host: ["127.0.0.99"]},
    }[fault]
    with pytest.raises(HttpsError):
        connector_to(server, authority, **changes)("other.example" if fault == "name" else NAME)
    assert server.requests == []


def test_the_way_leads_through_the_proxy_if_there_is_one(server, authority):
    with ConnectProxy({f"{NAME}:{server.port}": ("127.0.0.1", server.port)}) as proxy:
        server.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
        connection = connector_to(server, authority, proxy=Proxy("127.0.0.1", proxy.port))(NAME)
        assert connection.post("/", b"{}", TOKEN).status == 200
        connection.close()
        assert len(proxy.requests) == 1
        wait_until(lambda: server.accepted == 1)
