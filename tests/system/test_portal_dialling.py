"""From a portal URL to an upgraded WebSocket, and every way in which that fails (portal 1.1 to 1.6, 1.12)."""

from __future__ import annotations

import logging
import os
import re
import socket as stdlib_socket
import struct
import time

import pytest
from gevent import server as gevent_server
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl
from portal_world import (  # noqa: F401 - pytest finds them by name
    AUTHORIZATION,
    CLIENT,
    INIT,
    PROBLEM,
    REJECT,
    TOKEN,
    FullListener,
    Gateway,
    Impatient,
    dial_fixture,
    headers_of,
    portal_fixture,
)

from fzg.portal.backoff import Reconnect
from fzg.portal.channel import Timing
from fzg.portal.dial import DialOptions
from fzg.portal.messages import (
    BroadcastIceCandidates,
)
from fzg.portal.problem import AuthenticationFailed, RetriesExhausted, TokenInvalid
from fzg.portal.websocket import State
from tests.lab.certificates import Authority
from tests.lab.scripted_portal import Refusal, ScriptedPortal


@pytest.mark.spec("PORTAL-1", "PORTAL-3", "PORTAL-8", "PORTAL-9")
def test_the_upgrade_request_has_the_three_parameters_the_token_header_and_nothing_else(portal, dial):
    dial(f"ws://127.0.0.1:{portal.port}/base/", token=TOKEN[:9] + "\n " + TOKEN[9:] + "\r\n")
    request = portal.connection(0).request
    assert request.path == (
        "/base/gateway/v2/websocket?external_id=edge-id&name=edge+1"
        "&public_key=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8%3D"
    )
    headers = headers_of(request)
    assert len(headers.pop("sec-websocket-key")) == 24
    assert headers == {
        "host": f"127.0.0.1:{portal.port}",
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "user-agent": "Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0)",
        "x-authorization": f"Bearer {TOKEN}",
    }


@pytest.mark.spec("PORTAL-11")
def test_the_token_reaches_no_log_line_at_any_level(portal, dial, caplog):
    caplog.set_level(logging.DEBUG)
    portal.refusals = [Refusal(500, "no"), Refusal(302, "", {"Location": "/elsewhere"})]
    gateway = dial()
    gateway.wait_connected()
    portal.connection(0).drop()
    gateway.wait_connected(2)
    assert "dialling again" in caplog.text
    assert "c2VjcmV0" not in caplog.text


@pytest.mark.spec("PORTAL-11", "OPS-5")
def test_a_token_that_the_portal_echoes_is_not_in_what_status_shows(portal, dial):
    portal.refuse_always = [Refusal(400, f'{{"detail":"what is {TOKEN}?"}}', PROBLEM)]
    gateway = dial()
    gateway.wait_for("disconnected")
    assert gateway.connection.last_error == "the portal answered HTTP 400 (detail=what is ***?)"
    portal.refuse_always = [Refusal(401, f'{{"detail":"what is {TOKEN}?"}}', PROBLEM)]
    gateway.greenlet.get(timeout=5)
    assert gateway.connection.last_error == f"{AuthenticationFailed('what is ***?')}"


@pytest.mark.spec("PORTAL-12")
def test_the_host_is_resolved_before_each_dial(portal, dial):
    answers = [["127.0.0.2"], [], ["127.0.0.1"], ["127.0.0.1"]]
    asked: list[str] = []

    def resolve(host):
        asked.append(host)
        return answers[len(asked) - 1]

    gateway = dial(f"ws://portal.example:{portal.port}", dialing={"resolve": resolve})
    gateway.wait_connected()
    assert asked == ["portal.example"] * 3  # a refused address, none, the right one
    assert gateway.application.log == ["disconnected", "disconnected", "connected"]
    portal.connection(0).drop()
    gateway.wait_connected(2)
    assert len(asked) == 4


@pytest.mark.spec("PORTAL-13")
def test_a_dead_address_does_not_delay_a_live_one(portal, dial):
    with FullListener(portal.port) as dead:
        started = time.monotonic()
        addresses = [dead[0], "127.0.0.1"]
        gateway = dial(f"ws://portal.example:{portal.port}", dialing={"resolve": lambda _: addresses})
        gateway.wait_connected()
        assert time.monotonic() - started < 1.0


def test_all_addresses_black_holed_end_the_dial_after_the_connect_timeout_and_the_error_lists_each(dial, caplog):
    caplog.set_level(logging.INFO)
    with FullListener() as dead:
        gateway = dial(
            f"ws://portal.example:{dead[1]}",
            dialing={"resolve": lambda _: [dead[0], "127.0.0.8"], "connect_timeout": 0.2},
        )
        gateway.wait_for("disconnected")
    assert f"{dead[0]}: no answer within 0.2 s" in caplog.text
    assert "127.0.0.8: [Errno 111]" in caplog.text


@pytest.mark.slow
@pytest.mark.spec("PORTAL-14")
def test_a_listener_that_stays_silent_is_given_up_after_the_dial_timeout(portal, dial, caplog):
    caplog.set_level(logging.INFO)
    portal.silent = True
    started = time.monotonic()
    gateway = dial(dialing={"dial_timeout": 0.3})
    gateway.wait_for("disconnected")
    assert 0.25 < time.monotonic() - started < 0.6
    assert "no upgrade within 0.3 s" in caplog.text
    portal.silent = False
    gateway.wait_connected()
    assert DialOptions(resolve=list).dial_timeout == 15.0
    assert DialOptions(resolve=list).connect_timeout == 5.0


@pytest.mark.spec("PORTAL-15")
@pytest.mark.skipif(os.geteuid() != 0, reason="marking a socket needs CAP_NET_ADMIN")
def test_the_socket_is_marked_and_does_not_delay_small_segments(portal, dial, monkeypatch):
    made: list[gevent_socket.socket] = []
    connect = gevent_socket.socket.connect

    def recording(self, address):
        made.append(self)
        return connect(self, address)

    monkeypatch.setattr(gevent_socket.socket, "connect", recording)
    dial().wait_connected()
    (ours,) = made
    assert ours.getsockopt(stdlib_socket.SOL_SOCKET, 36, 4) == struct.pack("=I", 0xFD002021)
    assert ours.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY) == 1


def test_a_process_that_may_not_mark_sockets_connects_without(portal, dial, monkeypatch):
    setsockopt = gevent_socket.socket.setsockopt

    def refusing(self, level, option, *value):
        if option == 36:
            raise PermissionError(1, "Operation not permitted")
        return setsockopt(self, level, option, *value)

    monkeypatch.setattr(gevent_socket.socket, "setsockopt", refusing)
    dial().wait_connected()


def test_an_ipv6_literal_is_dialled_without_resolving():
    with ScriptedPortal(host="::1") as portal:
        gateway = Gateway(f"ws://[::1]:{portal.port}", dialing={"resolve": lambda _: pytest.fail("resolved")})
        gateway.wait_connected()
        assert headers_of(portal.requests[0])["host"] == f"[::1]:{portal.port}"
        gateway.connection.close()
        gateway.greenlet.get(timeout=5)


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def tls_server(authority, names):
    context = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(names))
    return context


def tls_client(authority=None):
    context = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_CLIENT)
    if authority is not None:
        context.load_verify_locations(authority.certificate)
    return context


def test_messages_travel_both_ways_over_tls(authority):
    with ScriptedPortal(tls=tls_server(authority, ["portal.example"])) as portal:
        dialing = {"ssl_context": tls_client(authority), "resolve": lambda _: ["127.0.0.1"]}
        gateway = Gateway(f"wss://portal.example:{portal.port}", dialing=dialing)
        gateway.wait_connected()
        connection = portal.connection(0)
        big = {"client_id": CLIENT, "candidates": [], "padding": "x" * 1_000_000}
        connection.push("ice_candidates", big)
        connection.push("reject_access", REJECT)
        gateway.wait_for("RejectAccess")
        assert gateway.application.log == ["connected", "IceCandidates", "RejectAccess"]
        large = BroadcastIceCandidates(client_ids=(CLIENT,), candidates=("candidate:" + "y" * 8_000_000,))
        assert gateway.connection.send(large)
        assert len(connection.frame("broadcast_ice_candidates")["payload"]["candidates"][0]) == 8_000_010
        gateway.connection.close()
        gateway.greenlet.get(timeout=5)
        assert connection.closed_with == (1000, "")


def test_what_tls_has_decrypted_is_read_though_the_socket_is_empty(authority, monkeypatch):
    monkeypatch.setattr("fzg.portal.session.READ_TURN", 1)
    with ScriptedPortal(tls=tls_server(authority, ["portal.example"])) as portal:
        gateway = Gateway(
            f"wss://portal.example:{portal.port}",
            dialing={"ssl_context": tls_client(authority), "resolve": lambda _: ["127.0.0.1"]},
            timing=Timing(heartbeat_interval=60, join_timeout=60),
        )
        gateway.wait_connected()
        portal.connection(0).push("reject_access", REJECT)
        gateway.wait_for("RejectAccess")
        gateway.connection.close()
        gateway.greenlet.get(timeout=5)


@pytest.mark.spec("PORTAL-16")
@pytest.mark.parametrize("fault", ["untrusted", "mismatching"])
def test_a_certificate_that_is_not_ours_to_trust_is_refused_and_retried(authority, fault, caplog):
    caplog.set_level(logging.INFO)
    names = ["other.example"] if fault == "mismatching" else ["portal.example"]
    with ScriptedPortal(tls=tls_server(authority, names)) as portal:
        trust = tls_client(None if fault == "untrusted" else authority)
        gateway = Gateway(
            f"wss://portal.example:{portal.port}",
            dialing={"ssl_context": trust},
            reconnect=Impatient(random=bytes),
        )
        gateway.wait_for("disconnected", 2)
        assert portal.requests == []
        assert "certificate verify failed" in caplog.text
        assert "error" not in gateway.application.log
        gateway.connection.close()
        gateway.greenlet.get(timeout=5)


# Refused upgrades


@pytest.mark.spec("PORTAL-29")
@pytest.mark.parametrize(
    ("refusal", "error", "text"),
    [
        (Refusal(401, '{"code":"invalid_token"}', PROBLEM), TokenInvalid, "token"),
        (Refusal(401, '{"code":"missing_token"}', {"Content-Type": "Application/Problem+JSON; x=y"}), TokenInvalid, ""),
        (Refusal(401, '{"detail":"no entry"}', PROBLEM), AuthenticationFailed, "no entry"),
        (Refusal(401, "<html>nope</html>", {"Content-Type": "text/html"}), AuthenticationFailed, "no reason provided"),
        (Refusal(401, "not json", PROBLEM), AuthenticationFailed, "no reason provided"),
    ],
)
def test_401_is_fatal_without_a_second_request(portal, dial, refusal, error, text):
    portal.refusals = [refusal]
    gateway = dial()
    gateway.greenlet.get(timeout=5)
    assert type(gateway.application.error) is error
    assert text in str(gateway.application.error)
    assert len(portal.requests) == 1
    assert gateway.connection.state is State.CLOSED


def test_401_on_a_reconnect_is_fatal_too(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    portal.refusals = [Refusal(401)]
    portal.connection(0).drop()
    gateway.greenlet.get(timeout=5)
    assert isinstance(gateway.application.error, AuthenticationFailed)


@pytest.mark.spec("PORTAL-30", "OPS-24")
@pytest.mark.parametrize("status", [200, 301, 302, 400, 403, 404, 409, 429, 500, 502, 503])
def test_other_refusals_are_retried_and_their_body_is_logged(portal, dial, status, caplog):
    caplog.set_level(logging.INFO)
    headers = {"Location": f"http://127.0.0.1:{portal.port}/moved"} if status < 400 else PROBLEM
    body = '{"code":"gateway_already_connected","detail":"Another connection"}'
    portal.refusals = [Refusal(status, body, headers)] * 2
    gateway = dial()
    gateway.wait_connected()
    assert f"HTTP {status}" in caplog.text
    refusals = [record for record in caplog.records if "dialling again" in record.getMessage()]
    assert {record.body for record in refusals} == {body}
    assert all(re.fullmatch(r"\d+\.\d{3}s \d+\.\ds", f"{record.delay} {record.budget}") for record in refusals)
    assert all(request.path.startswith("/gateway/") for request in portal.requests)
    assert gateway.application.error is None


@pytest.mark.slow
@pytest.mark.spec("PORTAL-31")
def test_retry_after_replaces_the_delay_and_the_body_may_be_chunked(portal, dial):
    portal.refusals = [Refusal(503, "", {"Retry-After": "2"}), Refusal(503, "", {"Retry-After": "1.5"})]
    gateway = dial(reconnect=Reconnect(random=bytes, max_partition=60.0))
    gateway.wait_connected()
    first, second, third = portal.request_times
    assert 1.95 < second - first < 2.5
    assert 0.95 < third - second < 1.45  # what cannot be read leaves the delay as it is


def test_a_chunked_refusal_is_read_whole(dial, caplog):
    caplog.set_level(logging.INFO)

    def serve(client, _address):
        client.recv(4096)
        client.sendall(
            b"HTTP/1.1 409 Conflict\r\nContent-Type: application/problem+json\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'8\r\n{"code":\r\n7\r\n"twice"\r\n1\r\n}\r\n0\r\n\r\n'
        )
        client.close()

    server = gevent_server.StreamServer(("127.0.0.1", 0), serve)
    server.start()
    gateway = dial(f"ws://127.0.0.1:{server.server_port}")
    gateway.wait_for("disconnected")
    assert "code=twice" in caplog.text
    server.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
            b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"
        ),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 500 Broken\r\nContent-Length: 1000\r\n\r\nshort",
        b"",
        b"x" * 100_000,
    ],
)
def test_an_answer_that_is_no_upgrade_is_a_hiccup(dial, answer):
    def serve(client, _address):
        client.recv(4096)
        client.sendall(answer)
        client.close()

    server = gevent_server.StreamServer(("127.0.0.1", 0), serve)
    server.start()
    gateway = dial(f"ws://127.0.0.1:{server.server_port}")
    gateway.wait_for("disconnected", 2)
    assert gateway.application.error is None
    server.stop()


@pytest.mark.slow
@pytest.mark.spec("PORTAL-32")
def test_without_a_join_the_connection_gives_up_after_fifteen_retries_and_names_the_last_error(portal, dial):
    portal.refuse_always = [Refusal(500, "down")]
    gateway = dial()
    gateway.greenlet.get(timeout=10)
    assert len(portal.requests) == 16
    assert isinstance(gateway.application.error, RetriesExhausted)
    assert "HTTP 500" in str(gateway.application.error.__cause__)


@pytest.mark.slow
def test_a_portal_without_the_v2_path_is_dialled_on_the_v1_path_at_once_and_from_then_on(portal, dial):
    portal.refuse_always = [Refusal(404, "", paths="/v2/websocket")]
    gateway = dial(reconnect=Reconnect(random=bytes))
    gateway.wait_connected()
    assert "disconnected" not in gateway.application.log
    assert portal.request_times[1] - portal.request_times[0] < 0.5
    connection = portal.connection(0)
    connection.push("authorize_flow", AUTHORIZATION)
    assert connection.frame("flow_authorized")["payload"] == {"ref": "opaque"}
    connection.push("create_authorization", AUTHORIZATION)
    assert connection.frame("authorization_created")["payload"] == {"ref": "opaque"}
    # Portals of the v1 path may be older than the message, and crash on what they do not know.
    assert "set_snownet_capabilities" not in connection.events()
    connection.drop()
    gateway.wait_connected(2)
    paths = [request.path.partition("?")[0] for request in portal.requests]
    assert paths == ["/gateway/v2/websocket", "/gateway/websocket", "/gateway/websocket"]
