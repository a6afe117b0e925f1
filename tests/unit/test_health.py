"""The HTTP endpoint of supervisors and load balancers, over real sockets on loopback."""

from __future__ import annotations

import http.client
import json
import logging
import socket

import gevent
import pytest
from gevent import socket as gevent_socket

from fzg.ops import health
from fzg.ops.health import Health
from fzg.wire.endpoint import Endpoint
from tests.lab.ports import free_port
from tests.unit.health_world import Gateway, threads_fixture  # noqa: F401


@pytest.fixture
def endpoint(threads):
    """A started server; calling it does one request and gives status, headers and body."""
    port = free_port("127.0.0.1")
    gateway = Gateway()
    server = Health(Endpoint.parse(f"127.0.0.1:{port}"), gateway.not_ready_because)
    server.start()

    def request(method, path, headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()

    def ask(method, path, **headers):
        return threads.apply(request, (method, path, headers))

    ask.gateway, ask.port, ask.server = gateway, port, server
    yield ask
    server.stop()


@pytest.mark.spec("OPS-39")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_healthz_is_200_and_empty_whether_ready_or_not(endpoint, method):
    endpoint.gateway.reason = "the portal has not been joined yet"
    status, headers, body = endpoint(method, "/healthz")
    assert (status, headers["Content-Length"], body) == (200, "0", b"")


@pytest.mark.spec("OPS-40")
def test_readyz_is_503_with_the_reason_until_the_gateway_is_ready(endpoint):
    endpoint.gateway.reason = "the portal has not been joined yet"
    status, _, body = endpoint("GET", "/readyz")
    assert (status, body) == (503, b"the portal has not been joined yet\n")
    assert endpoint("HEAD", "/readyz")[0::2] == (503, b"")
    endpoint.gateway.reason = None
    assert endpoint("GET", "/readyz")[0::2] == (200, b"")
    assert endpoint("HEAD", "/readyz")[0::2] == (200, b"")


@pytest.mark.spec("OPS-40")
def test_readyz_answers_in_json_where_that_is_asked_for(endpoint):
    endpoint.gateway.reason = "the portal has not been joined yet"
    status, headers, body = endpoint("GET", "/readyz", Accept="application/json")
    assert (status, headers["Content-Type"]) == (503, "application/json")
    assert json.loads(body) == {"ready": False, "reason": "the portal has not been joined yet"}
    assert endpoint("HEAD", "/readyz", Accept="application/json")[0::2] == (503, b"")
    endpoint.gateway.reason = None
    status, _, body = endpoint("GET", "/readyz", Accept="Application/JSON, text/plain;q=0.5")
    assert (status, json.loads(body)) == (200, {"ready": True})


@pytest.mark.spec("OPS-42")
def test_metrics_are_served_where_they_are_wanted_and_nowhere_else(endpoint):
    assert endpoint("GET", "/metrics")[0] == 404
    endpoint.server._render_metrics = lambda accept: (f"# {accept}\n".encode(), "text/plain; version=0.0.4")
    status, headers, body = endpoint("GET", "/metrics", Accept="text/plain")
    assert (status, headers["Content-Type"], body) == (200, "text/plain; version=0.0.4", b"# text/plain\n")
    assert endpoint("HEAD", "/metrics")[0::2] == (200, b"")
    assert endpoint("POST", "/metrics")[0] == 405


@pytest.mark.parametrize("path", ["/", "/metrics", "/metricsz", "/healthz/", "/readyz/x", "/HEALTHZ", "//healthz"])
def test_other_paths_are_not_found(endpoint, path):
    assert endpoint("GET", path)[0] == 404


def test_a_query_does_not_matter(endpoint):
    assert endpoint("GET", "/healthz?probe=1")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_other_methods_are_not_allowed(endpoint, method, path):
    status, headers, _ = endpoint(method, path)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"


@pytest.mark.spec("OPS-32")
def test_a_port_that_is_taken_is_a_warning_that_names_the_address(caplog):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = Health(Endpoint.parse(f"127.0.0.1:{port}"), Gateway().not_ready_because)
        server.start()
        server.stop()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.address == f"127.0.0.1:{port}"
    assert record.error == "Address already in use"


def test_an_address_that_the_host_does_not_have_is_a_warning_too(caplog):
    Health(Endpoint.parse("192.0.2.1:8080"), Gateway().not_ready_because).start()
    assert [record.address for record in caplog.records] == ["192.0.2.1:8080"]


def test_it_listens_on_ipv6(threads):
    port = free_port("127.0.0.1")
    server = Health(Endpoint.parse(f"[::1]:{port}"), Gateway().not_ready_because)
    server.start()
    with gevent_socket.create_connection(("::1", port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b" 200 " in connection.recv(100)
    server.stop()


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"G" * 20_000, b""])
def test_what_is_no_http_harms_nobody(endpoint, garbage, capfd):
    with gevent_socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        connection.sendall(garbage)
    assert endpoint("GET", "/healthz")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_silent_connections_give_their_places_back(endpoint, monkeypatch):
    monkeypatch.setattr(health, "MAX_CONNECTION_S", 0.2)
    silent = [gevent_socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(64)]
    gevent.sleep(0)
    assert endpoint("GET", "/healthz")[0] == 200
    for connection in silent:
        assert connection.recv(1) == b""
        connection.close()
