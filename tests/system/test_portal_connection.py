"""The portal driver against a portal that misbehaves in every way that the specification names (portal 5.8, 8)."""

from __future__ import annotations

import json
import logging
import os
import socket as stdlib_socket
import time

import gevent
import pytest
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
from fzg.portal.channel import MAX_QUEUED, Timing
from fzg.portal.messages import (
    AuthorizationCreated,
    BroadcastIceCandidates,
    Init,
    NoRelays,
    RejectAccess,
)
from fzg.portal.problem import LoginFailed, TokenInvalid
from fzg.portal.websocket import State
from tests.lab.scripted_portal import Refusal, ScriptedPortal, wait_until


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


@pytest.mark.parametrize(
    "frame", [b"\x89\x7e\x00\x7e" + bytes(126), b"\x89\x81\x01\x02\x03\x04x"], ids=["long", "masked"]
)
def test_a_frame_that_no_server_may_send_is_refused_rather_than_answered(portal, dial, frame):
    gateway = dial()
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.raw(frame)
    gateway.wait_connected(2)
    assert connection.pongs == []
    assert connection.closed_with == (1002, "")


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


def test_a_message_larger_than_the_socket_takes_at_once_follows_as_fast_as_it_is_read(portal, dial):
    gateway = dial(timing=Timing(heartbeat_interval=60, join_timeout=60))
    gateway.wait_connected()
    started = time.monotonic()
    large = BroadcastIceCandidates(client_ids=(CLIENT,), candidates=("candidate:" + "y" * 20_000_000,))
    assert gateway.connection.send(large)
    portal.connection(0).frame("broadcast_ice_candidates")
    assert time.monotonic() - started < 5.0


def test_what_arrives_with_the_answer_to_the_upgrade_is_read(portal, dial):
    portal.early_data = b"\x89\x05hello"
    dial().wait_connected()
    wait_until(lambda: portal.connection(0).pongs == [b"hello"])


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
    gateway = dial(timing=Timing(heartbeat_interval=60, join_timeout=60))  # an answer would fall into a fragment
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
    wait_until(lambda: connection.ended)
    written = connection.events().count("broadcast_ice_candidates")
    assert written + len(returned) == len(batches)


@pytest.mark.slow
def test_a_portal_that_reads_nothing_while_more_and_more_is_said_is_dialled_anew(portal, dial):
    gateway = dial(timing=Timing(heartbeat_interval=60, join_timeout=60))
    gateway.wait_connected()
    connection = portal.connection(0)
    connection.frame("set_snownet_capabilities")
    connection.reading = False
    large = BroadcastIceCandidates(client_ids=(CLIENT,), candidates=("candidate:" + "y" * 20_000_000,))
    assert gateway.connection.send(large)
    sent = 0
    while gateway.connection.send(AuthorizationCreated(ref=str(sent))):
        sent += 1
    assert sent == MAX_QUEUED
    gateway.wait_for("unsent")
    assert gateway.application.log == ["connected", "disconnected", "unsent"]
    assert gateway.application.unsent == [large]
    connection.reading = True
    gateway.wait_connected(2)
    assert gateway.connection.send(NoRelays())
    portal.connection(1).frame("no_relays")


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
    connection = gateway.connection
    assert connection.joined_at is None
    assert connection.away_since is not None, "since it was made"
    gateway.wait_connected()
    assert (connection.away_since, connection.hiccups) == (None, 0)
    port = portal.port
    portal.stop()
    gateway.wait_for("disconnected")
    away_since = connection.away_since
    assert away_since >= connection.joined_at
    gateway.wait_for("disconnected", 2)
    assert (connection.away_since, connection.hiccups) == (away_since, 2), "a dial that fails does not begin it anew"
    with ScriptedPortal(port=port) as successor:
        successor.push_after_join = [("init", INIT)]
        gateway.wait_connected(2)
        gateway.wait_for("Init")
        assert successor.connection(0).frame("phx_join")["ref"] == 0
        assert connection.away_since is None
