"""The portal driver against a portal that misbehaves in every way that the specification names (portal 5.8, 8)."""

from __future__ import annotations

import json
import logging
import os
import socket as stdlib_socket
import struct
import time

import gevent
import pytest
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl

from fzg.portal.backoff import Reconnect
from fzg.portal.channel import Timing
from fzg.portal.dial import DialOptions
from fzg.portal.messages import (
    AuthorizationCreated,
    BroadcastIceCandidates,
    CreateAuthorization,
    Init,
    NoRelays,
    RejectAccess,
)
from fzg.portal.problem import AuthenticationFailed, LoginFailed, RetriesExhausted, TokenInvalid
from fzg.portal.url import PortalUrl
from fzg.portal.websocket import Login, PortalConnection, State
from fzg.secret import Secret
from tests.lab.certificates import Authority
from tests.lab.scripted_portal import Refusal, ScriptedPortal, wait_until

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


@pytest.fixture
def portal():
    with ScriptedPortal() as scripted:
        yield scripted


@pytest.fixture
def dial(portal):
    started: list[Gateway] = []

    def start(url: str = "", **overrides) -> Gateway:
        overrides.setdefault("reconnect", Impatient(random=bytes, max_partition=60.0))
        started.append(Gateway(url or f"ws://127.0.0.1:{portal.port}", **overrides))
        return started[-1]

    yield start
    for gateway in started:
        gateway.connection.close(wait=0)
        gateway.greenlet.get(timeout=5)


def headers_of(request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.raw_items()}


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


@pytest.mark.spec("PORTAL-17", "PORTAL-18", "PORTAL-19")
def test_join_comes_first_then_capabilities_then_messages_with_refs_from_zero_on_each_connection(portal, dial):
    portal.answer_joins = False
    gateway = dial(timing=Timing(heartbeat_interval=0.1, join_timeout=5))
    connection = portal.connection(0)
    assert connection.frame("phx_join") == {"topic": "gateway", "event": "phx_join", "payload": None, "ref": 0}
    assert gateway.connection.send(NoRelays())
    assert gateway.connection.state is State.JOINING
    connection.frame("heartbeat", 1)
    assert connection.events() == ["phx_join"]
    connection.reply(0, "ok", {})
    connection.frame("no_relays")
    assert connection.events() == ["phx_join", "set_snownet_capabilities", "no_relays"]
    assert connection.frame("set_snownet_capabilities")["payload"] == {"iceless": False}
    refs = [frame["ref"] for frame in connection.frames]
    assert refs == list(range(len(refs)))
    assert all(set(frame) == {"topic", "event", "payload", "ref"} for frame in connection.frames)
    assert {opcode.name for opcode in connection.opcodes} == {"TEXT"}
    connection.drop()
    assert portal.connection(1).frame("phx_join")["ref"] == 0


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
    with full_listener(portal.port) as dead:
        started = time.monotonic()
        addresses = [dead[0], "127.0.0.1"]
        gateway = dial(f"ws://portal.example:{portal.port}", dialing={"resolve": lambda _: addresses})
        gateway.wait_connected()
        assert time.monotonic() - started < 1.0


def test_all_addresses_black_holed_end_the_dial_after_the_connect_timeout_and_the_error_lists_each(dial, caplog):
    caplog.set_level(logging.INFO)
    with full_listener() as dead:
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


@pytest.mark.spec("PORTAL-30")
@pytest.mark.parametrize("status", [200, 301, 302, 400, 403, 404, 409, 429, 500, 502, 503])
def test_other_refusals_are_retried_and_their_body_is_logged(portal, dial, status, caplog):
    caplog.set_level(logging.INFO)
    headers = {"Location": f"http://127.0.0.1:{portal.port}/moved"} if status < 400 else PROBLEM
    body = '{"code":"gateway_already_connected","detail":"Another connection"}'
    portal.refusals = [Refusal(status, body, headers)] * 2
    gateway = dial()
    gateway.wait_connected()
    assert f"HTTP {status}" in caplog.text
    assert "gateway_already_connected" in caplog.text
    assert all(request.path.startswith("/gateway/") for request in portal.requests)
    assert gateway.application.error is None


@pytest.mark.slow
@pytest.mark.spec("PORTAL-31")
def test_retry_after_replaces_the_delay_and_the_body_may_be_chunked(portal, dial):
    portal.refusals = [Refusal(503, "", {"Retry-After": "1"})]
    gateway = dial(reconnect=Reconnect(random=bytes, max_partition=60.0))
    gateway.wait_connected()
    first, second = portal.request_times
    assert 0.95 < second - first < 1.5


def test_a_chunked_refusal_is_read_whole(dial, caplog):
    caplog.set_level(logging.INFO)

    def serve(client, _address):
        client.recv(4096)
        client.sendall(
            b"HTTP/1.1 409 Conflict\r\nContent-Type: application/problem+json\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'8\r\n{"code":\r\n7\r\n"twice"\r\n1\r\n}\r\n0\r\n\r\n'
        )
        client.close()

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve)
    server.start()
    gateway = dial(f"ws://127.0.0.1:{server.server_port}")
    gateway.wait_for("disconnected")
    assert "code=twice" in caplog.text
    server.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
        b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
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

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve)
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


# Misbehaviour while connected


@pytest.mark.slow
@pytest.mark.spec("PORTAL-20")
def test_a_join_without_answer_makes_the_gateway_dial_again(portal, dial, caplog):
    caplog.set_level(logging.INFO)
    portal.answer_joins = False
    gateway = dial()
    gateway.wait_for("disconnected")
    assert "the join was not answered" in caplog.text
    portal.answer_joins = True
    gateway.wait_connected()


@pytest.mark.spec("PORTAL-21")
def test_a_refused_join_is_fatal(portal, dial):
    portal.join_answer = {"status": "error", "response": {"reason": "disabled"}}
    gateway = dial()
    gateway.greenlet.get(timeout=5)
    assert isinstance(gateway.application.error, LoginFailed)
    assert "disabled" in str(gateway.application.error)
    assert len(portal.requests) == 1


@pytest.mark.spec("PORTAL-22")
def test_unmatched_topic_joins_again_on_the_same_socket(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    gateway.connection.send(NoRelays())
    connection.reply(connection.frame("no_relays")["ref"], "error", {"reason": "unmatched topic"})
    gateway.wait_connected(2)
    connection.frame("set_snownet_capabilities", 1)
    assert connection.events() == [
        "phx_join",
        "set_snownet_capabilities",
        "no_relays",
        "phx_join",
        "set_snownet_capabilities",
    ]
    assert len(portal.requests) == 1


@pytest.mark.slow
@pytest.mark.spec("PORTAL-26")
def test_withheld_heartbeat_replies_end_the_connection_with_the_fourth_and_a_new_one_follows(portal, dial):
    portal.answer_heartbeats = False
    started = time.monotonic()
    gateway = dial(timing=Timing(heartbeat_interval=0.1, join_timeout=5))
    gateway.wait_for("disconnected")
    assert 0.35 < time.monotonic() - started < 0.7
    connection = portal.connection(0)
    wait_until(lambda: connection.events(heartbeats=True).count("heartbeat") == 4)
    portal.answer_heartbeats = True
    gateway.wait_connected(2)


@pytest.mark.slow
def test_answered_heartbeats_keep_the_connection_up(portal, dial):
    gateway = dial(timing=Timing(heartbeat_interval=0.05, join_timeout=5))
    portal.connection(0).frame("heartbeat", 8)
    assert gateway.application.log == ["connected"]


@pytest.mark.spec("PORTAL-36")
@pytest.mark.parametrize("code", [1000, 1001, 1012, 3000])
def test_a_close_frame_is_answered_in_kind_and_leads_to_a_new_connection(portal, dial, code, caplog):
    caplog.set_level(logging.INFO)
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.close(code, "drain")
    gateway.wait_connected(2)
    assert connection.closed_with == (code, "drain")
    assert f"code={code} reason='drain'" in caplog.text
    assert gateway.application.log == ["connected", "disconnected", "connected"]


@pytest.mark.spec("PORTAL-36")
@pytest.mark.parametrize("how", ["drop", "end_of_stream", "phx_close", "truncated", "protocol error", "utf-8"])
def test_each_way_to_lose_the_connection_leads_to_a_new_one(portal, dial, how):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    match how:
        case "drop":
            connection.drop()
        case "end_of_stream":
            connection.end_of_stream()
        case "phx_close":
            connection.push("phx_close", {})
        case "truncated":
            connection.text('{"topic":"gateway","event":"in')
        case "protocol error":
            connection.raw(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
        case "utf-8":
            connection.text(b'{"topic":"\xff"}')
    gateway.wait_connected(2)
    assert gateway.application.log == ["connected", "disconnected", "connected"]


@pytest.mark.spec("PORTAL-35")
def test_disconnect_is_fatal_only_for_an_expired_token_even_when_the_channel_closes_right_after(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.push("disconnect", {"reason": "maintenance"})
    connection.push("reject_access", REJECT)
    gateway.wait_for("RejectAccess")
    connection.push("disconnect", {"reason": "token_expired"})
    connection.push("phx_close", {})
    gateway.greenlet.get(timeout=5)
    assert isinstance(gateway.application.error, TokenInvalid)
    assert gateway.application.log == ["connected", "RejectAccess", "fatal"]


@pytest.mark.spec("PORTAL-23", "PORTAL-24", "PORTAL-37")
def test_what_cannot_be_read_is_skipped_and_the_next_message_is_handled(portal, dial, caplog):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    for text in ("nonsense", "[]", '"x"', "17", '{"event":"init"}', '{"topic":"gateway","event":"init","payload":7}'):
        connection.text(text)
    connection.binary(b"\x00\x01")
    connection.ping(b"hello")
    connection.push("phx_error", {"reason": "channel_crash"})
    connection.push("made_up", {"x": 1})
    connection.push("request_connection", {})
    connection.push("init", {"interface": {"ipv4": "not an address", "ipv6": "::"}})
    connection.push("create_authorization", AUTHORIZATION | {"expires_at": "soon"})
    connection.push("init", INIT | {"news": [1, 2]}, news=True)
    gateway.wait_for("Init")
    assert gateway.application.log == ["connected", "Init"]
    assert isinstance(gateway.application.messages[0], Init)
    wait_until(lambda: connection.pongs == [b"hello"])
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 11


def test_an_answer_is_on_the_wire_within_100_ms(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    sent = time.monotonic()
    connection.push("create_authorization", AUTHORIZATION)
    assert connection.frame("authorization_created")["payload"] == {"ref": "opaque"}
    assert connection.frame_times[-1] - sent < 0.1


def test_a_message_leaves_in_the_pass_that_queued_it(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.frame("set_snownet_capabilities")
    connection.reading = False
    gateway.connection.send(NoRelays())
    # No greenlet has run since: the bytes are in the peer's socket already.
    raw = stdlib_socket.socket(fileno=os.dup(connection._client.fileno()))
    raw.setblocking(False)
    assert len(raw.recv(4096, stdlib_socket.MSG_PEEK)) > 20
    raw.close()
    connection.reading = True
    connection.frame("no_relays")


def test_a_message_in_many_fragments_and_one_with_large_frames_are_read(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    text = json.dumps({"topic": "gateway", "event": "reject_access", "ref": None, "payload": REJECT})
    connection.fragments(text, 7)
    connection.text(" " * 2_000_000 + text)
    gateway.wait_for("RejectAccess", 2)
    assert all(isinstance(message, RejectAccess) for message in gateway.application.messages)


def test_a_frame_above_the_limit_is_refused_with_1009_and_leads_to_a_new_connection(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.raw(b"\x81\x7f" + (16 * 1024 * 1024 + 1).to_bytes(8, "big"))
    gateway.wait_connected(2)
    assert connection.closed_with == (1009, "")


@pytest.mark.slow
def test_a_message_above_the_limit_in_fragments_is_refused_with_1009(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    piece = bytes(16 * 1024 * 1024)
    connection.raw(b"\x01\x7f" + len(piece).to_bytes(8, "big") + piece)
    for _ in range(3):
        connection.raw(b"\x00\x7f" + len(piece).to_bytes(8, "big") + piece)
    connection.raw(b"\x00\x01")
    gateway.wait_connected(2)
    assert connection.closed_with == (1009, "")


# Flow control


def test_heartbeats_go_on_while_the_core_is_busy_and_the_socket_is_read_no_further_than_128_messages(portal, dial):
    gateway = dial(timing=Timing(heartbeat_interval=0.1, join_timeout=5))
    gateway.wait_connected()
    gateway.application.busy = True
    connection = portal.connection(0)
    heartbeats = connection.events(heartbeats=True).count("heartbeat")
    for _ in range(200):
        connection.push("reject_access", REJECT)
    wait_until(gateway.connection._inbound.full, "the queue to fill")
    connection.frame("heartbeat", heartbeats + 1)
    assert gateway.connection._inbound.qsize() == 128
    gateway.application.busy = False
    gateway.wait_for("RejectAccess", 200)
    assert gateway.application.log.count("disconnected") == 0


@pytest.mark.slow
def test_a_portal_that_reads_nothing_is_still_read_and_then_given_up_and_unwritten_candidates_come_back(portal, dial):
    gateway = dial(timing=Timing(heartbeat_interval=0.3, join_timeout=5))
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.frame("set_snownet_capabilities")
    connection.reading = False
    batches = [
        BroadcastIceCandidates(client_ids=(CLIENT,), candidates=(f"candidate:{n} " + "x" * 4_000_000,))
        for n in range(4)
    ]
    for batch in batches:
        assert gateway.connection.send(batch)
    assert gateway.connection.send(AuthorizationCreated(ref="lost"))
    connection.push("reject_access", REJECT)
    gateway.wait_for("RejectAccess")
    gateway.wait_for("unsent")
    assert gateway.application.log[:4] == ["connected", "RejectAccess", "disconnected", "unsent"]
    returned = gateway.application.unsent
    assert returned == batches[len(batches) - len(returned) :]
    assert len(returned) >= 2
    connection.reading = True
    gateway.wait_connected(2)
    assert portal.connection(1).events()[:1] == ["phx_join"]


@pytest.mark.spec("PORTAL-61")
def test_an_equal_message_that_is_still_unsent_is_not_queued_twice(portal, dial):
    portal.answer_joins = False
    gateway = dial(timing=Timing(heartbeat_interval=5, join_timeout=5))
    connection = portal.connection(0)
    connection.frame("phx_join")
    for _ in range(3):
        assert gateway.connection.send(NoRelays())
    connection.reply(0, "ok", {})
    connection.frame("no_relays")
    gateway.connection.send(AuthorizationCreated(ref="last"))
    connection.frame("authorization_created")
    assert connection.events().count("no_relays") == 1


def test_a_message_is_refused_while_there_is_no_connection(dial):
    gateway = dial("ws://127.0.0.1:1")
    gateway.wait_for("disconnected")
    assert not gateway.connection.send(NoRelays())


# Shutdown


def test_close_sends_code_1000_and_returns_when_the_portal_answered(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    started = time.monotonic()
    gateway.connection.close()
    assert time.monotonic() - started < 0.3
    gateway.greenlet.get(timeout=1)
    wait_until(lambda: connection.closed_with == (1000, ""))
    assert gateway.application.log == ["connected"]
    assert gateway.connection.state is State.CLOSED
    gateway.connection.close()


def test_close_does_not_wait_for_a_portal_that_does_not_answer(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    portal.connection(0).reading = False
    started = time.monotonic()
    gateway.connection.close(wait=0.1)
    gateway.greenlet.get(timeout=1)
    assert time.monotonic() - started < 0.5
    portal.connection(0).reading = True


@pytest.mark.parametrize("phase", ["dial", "pause", "resolve"])
def test_close_cancels_a_dial_and_the_wait_for_one(portal, dial, phase):
    portal.silent = phase == "dial"
    portal.refuse_always = [Refusal(503, "", {"Retry-After": "60"})] if phase == "pause" else []
    dialing = {"resolve": lambda _: gevent.sleep(60)} if phase == "resolve" else {}
    gateway = dial(f"ws://portal.example:{portal.port}", dialing=dialing, reconnect=Reconnect(random=bytes))
    if phase == "pause":
        gateway.wait_for("disconnected")
    else:
        wait_until(lambda: portal.accepted or phase == "resolve")
        gevent.sleep(0.02)
    gateway.connection.close()
    gateway.greenlet.get(timeout=0.5)
    assert gateway.application.error is None


def test_an_error_of_the_application_surfaces_in_run(portal):
    gateway = Gateway(f"ws://127.0.0.1:{portal.port}")
    gateway.application.on_message = lambda _message: 1 / 0
    portal.connection(0).push("reject_access", REJECT)
    with pytest.raises(ZeroDivisionError):
        gateway.greenlet.get(timeout=5)


def test_a_portal_that_restarts_is_found_again(portal, dial):
    gateway = dial()
    gateway.wait_connected()
    port = portal.port
    portal.stop()
    gateway.wait_for("disconnected")
    with ScriptedPortal(port=port) as successor:
        successor.push_after_join = [("init", INIT)]
        gateway.wait_connected(2)
        gateway.wait_for("Init")
        assert successor.connection(0).frame("phx_join")["ref"] == 0


class full_listener:
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
