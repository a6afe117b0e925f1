"""The Phoenix channel in virtual time (spec portal 1.7 to 1.11)."""

from __future__ import annotations

import json
import logging

import pytest

from fzg.portal.channel import MAX_REJOINS, Channel, Fatal, Hiccup, Joined, Received
from fzg.portal.messages import (
    AuthorizationCreated,
    BroadcastIceCandidates,
    NoRelays,
    RejectAccess,
    SetSnownetCapabilities,
)
from fzg.portal.problem import LoginFailed, TokenInvalid

CLIENT = "11111111-2222-4333-8444-555555555555"
REJECT = {"client_id": CLIENT, "resource_id": CLIENT}
START = 1000.0


class Portal:
    """Drives a channel as the socket would, and speaks as the portal would."""

    def __init__(self, *, capabilities=None, joined=True):
        self.now = START
        self.channel = Channel(now=START, capabilities=capabilities)
        self.sent: list[tuple[float, dict]] = []
        self.events: list[object] = []
        self.answering = True
        self.blocked = False
        if joined:
            self.drain()
            self.reply(0)

    def drain(self):
        while not self.blocked and (frame := self.channel.poll_transmit()) is not None:
            self.sent.append((self.now - START, json.loads(frame.text)))
            if self.answering and self.sent[-1][1]["event"] == "heartbeat":
                self.reply(self.sent[-1][1]["ref"], topic="phoenix")
        self.events.extend(iter(self.channel.poll_event, None))

    def text(self, text):
        self.channel.handle_frame(text, self.now)
        self.drain()

    def push(self, event, payload, **envelope):
        self.text(json.dumps({"topic": "gateway", "event": event, "ref": None, "payload": payload} | envelope))

    def reply(self, ref, status="ok", response=None, topic="gateway"):
        response = {} if response is None else response
        self.push("phx_reply", {"status": status, "response": response}, ref=ref, topic=topic)

    def send(self, message):
        accepted = self.channel.send(message)
        self.drain()
        return accepted

    def run_until(self, end):
        while (deadline := self.channel.poll_timeout()) is not None and deadline.at <= START + end:
            self.now = max(self.now, deadline.at)
            self.channel.handle_timeout(self.now)
            self.drain()
        self.now = START + end

    def names(self):
        return [frame["event"] for _, frame in self.sent]


def hiccup(portal):
    (cause,) = [event.cause for event in portal.events if isinstance(event, Hiccup)]
    return cause


@pytest.mark.spec("PORTAL-17", "PORTAL-18")
def test_the_join_is_the_first_frame_and_nothing_but_heartbeats_follows_until_it_is_answered():
    portal = Portal(joined=False)
    portal.channel._join_deadline = None  # a portal that is slow for longer than the join may take
    portal.drain()
    assert portal.sent == [(0.0, {"topic": "gateway", "event": "phx_join", "payload": None, "ref": 0})]
    assert portal.send(NoRelays())
    portal.run_until(20)
    assert portal.names() == ["phx_join", "heartbeat", "heartbeat"]
    assert not portal.channel.joined
    portal.reply(0)
    assert portal.channel.joined
    assert portal.names()[3:] == ["no_relays"]


def test_the_frame_of_the_specification_is_reproduced():
    channel = Channel(now=START)
    assert channel.poll_transmit().text == b'{"topic":"gateway","event":"phx_join","payload":null,"ref":0}'
    channel.handle_timeout(START + 4.9)
    assert channel.poll_transmit() is None


@pytest.mark.spec("PORTAL-19")
def test_refs_are_integers_that_grow_by_one_per_frame():
    portal = Portal(capabilities=SetSnownetCapabilities(iceless=False))
    portal.run_until(10)
    portal.send(AuthorizationCreated(ref="a"))
    portal.send(BroadcastIceCandidates(client_ids=(CLIENT,), candidates=("candidate:1 1 udp 5",)))
    assert [frame["ref"] for _, frame in portal.sent] == [0, 1, 2, 3, 4]
    assert portal.sent[1][1]["payload"] == {"iceless": False}
    assert all(set(frame) == {"topic", "event", "payload", "ref"} for _, frame in portal.sent)


@pytest.mark.parametrize("response", ["{}", "null", '{"anything":1}', "[]"])
@pytest.mark.parametrize("ref", ["0", '"0"'])
def test_the_join_reply_may_carry_any_response_and_a_decimal_string_as_ref(response, ref):
    portal = Portal(joined=False)
    portal.drain()
    portal.text(
        '{"topic":"gateway","event":"phx_reply","ref":REF,"payload":{"status":"ok","response":RESPONSE}}'.replace(
            "REF", ref
        ).replace("RESPONSE", response)
    )
    assert portal.events == [Joined()]


def test_a_reply_of_another_ref_or_topic_does_not_join():
    portal = Portal(joined=False)
    portal.drain()
    portal.reply(1)
    portal.reply(0, topic="phoenix")
    assert portal.events == []


@pytest.mark.spec("PORTAL-20")
def test_a_join_that_is_not_answered_for_five_seconds_is_a_hiccup():
    portal = Portal(joined=False)
    portal.drain()
    portal.run_until(4.99)
    assert portal.events == []
    portal.run_until(5.0)
    assert "join" in hiccup(portal)
    assert portal.channel.poll_timeout() is None


@pytest.mark.spec("PORTAL-21")
@pytest.mark.parametrize(
    "response", [{"reason": "disabled"}, {"reason": "unmatched topic"}, {}, {"reason": 7}, None, "x"]
)
def test_a_join_that_is_answered_with_an_error_is_fatal(response):
    portal = Portal(joined=False)
    portal.drain()
    portal.push("phx_reply", {"status": "error", "response": response}, ref=0)
    (fatal,) = portal.events
    assert isinstance(fatal, Fatal)
    assert isinstance(fatal.error, LoginFailed)
    if response == {"reason": "disabled"}:
        assert str(fatal.error) == "login failed: disabled"


@pytest.mark.spec("PORTAL-22")
def test_unmatched_topic_on_a_message_joins_again_and_holds_further_messages():
    portal = Portal(capabilities=SetSnownetCapabilities(iceless=False))
    portal.send(AuthorizationCreated(ref="lost"))
    portal.send(NoRelays())
    portal.reply(2, "error", {"reason": "unmatched topic"})
    assert portal.sent[-1][1] == {"topic": "gateway", "event": "phx_join", "payload": None, "ref": 4}
    portal.reply(3, "error", {"reason": "unmatched topic"})  # of a message older than the join
    portal.send(AuthorizationCreated(ref="held"))
    assert portal.names().count("phx_join") == 2
    assert portal.names()[-1] == "phx_join"
    portal.reply(4)
    assert portal.names()[-2:] == ["set_snownet_capabilities", "authorization_created"]
    assert portal.events == [Joined(), Joined()]
    portal.reply(3, "error", {"reason": "unmatched topic"})  # even later than the answer
    assert portal.names().count("phx_join") == 2


def lose_channel(portal):
    """The portal answers that there is none, and a join with ok."""
    portal.reply(portal.sent[-1][1]["ref"], "error", {"reason": "unmatched topic"})
    if portal.names()[-1] == "phx_join":
        portal.reply(portal.sent[-1][1]["ref"])


def test_a_portal_that_loses_the_channel_again_and_again_is_dialled_anew_rather_than_joined_without_pause():
    portal = Portal(capabilities=SetSnownetCapabilities(iceless=False))
    for _ in range(MAX_REJOINS):
        lose_channel(portal)
    assert portal.names().count("phx_join") == 1 + MAX_REJOINS
    lose_channel(portal)
    assert "again and again" in hiccup(portal)
    assert portal.names().count("phx_join") == 1 + MAX_REJOINS


def test_a_portal_that_loses_the_channel_now_and_then_is_joined_each_time():
    portal = Portal(capabilities=SetSnownetCapabilities(iceless=False))
    for number in range(1, 3 * MAX_REJOINS):
        portal.run_until(10 * number)
        portal.send(NoRelays())
        lose_channel(portal)
    assert portal.events == [Joined()] * 3 * MAX_REJOINS


def test_a_second_join_has_five_seconds_of_its_own():
    portal = Portal()
    portal.run_until(100)
    portal.send(NoRelays())
    portal.reply(portal.sent[-1][1]["ref"], "error", {"reason": "unmatched topic"})
    portal.run_until(104.9)
    assert portal.events == [Joined()]
    portal.run_until(105.0)
    assert "join" in hiccup(portal)


def test_an_id_that_came_from_the_portal_goes_back_as_plain_text():
    portal = Portal()
    portal.push("reject_access", REJECT)
    client_id = portal.events[1].message.client_id
    portal.send(BroadcastIceCandidates(client_ids=(client_id,), candidates=()))
    assert portal.sent[-1][1]["payload"]["client_ids"] == [CLIENT]


def test_other_error_replies_are_ignored():
    portal = Portal()
    portal.send(NoRelays())
    portal.reply(1, "error", {"reason": "unknown_message"})
    portal.reply(1, "error", {})
    portal.reply(77, "error", "x")
    assert portal.events == [Joined()]
    assert portal.channel.joined


@pytest.mark.spec("PORTAL-25", "PORTAL-28")
def test_answered_heartbeats_go_out_every_ten_seconds_for_an_hour_under_other_traffic():
    portal = Portal()
    for second in range(1, 3601):
        portal.run_until(second)
        portal.send(AuthorizationCreated(ref=str(second)))
    beats = [at for at, frame in portal.sent if frame["event"] == "heartbeat"]
    assert beats == [10.0 * n for n in range(1, 361)]
    assert portal.events == [Joined()]


def test_a_heartbeat_looks_as_specified():
    portal = Portal()
    portal.run_until(10)
    assert portal.sent[-1] == (10.0, {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": 1})


@pytest.mark.spec("PORTAL-26")
def test_the_fourth_unanswered_heartbeat_fails_the_connection_after_40_seconds():
    portal = Portal()
    portal.answering = False
    portal.run_until(39.99)
    assert portal.events == [Joined()]
    portal.run_until(1000)
    assert portal.names().count("heartbeat") == 4
    assert portal.sent[-1][0] == 40.0
    assert "heartbeats" in hiccup(portal)


@pytest.mark.spec("PORTAL-27")
def test_heartbeat_replies_with_foreign_refs_do_not_count():
    portal = Portal()
    portal.answering = False
    for second in range(1, 41):
        portal.run_until(second)
        portal.reply(9999, topic="phoenix")
    assert "heartbeats" in hiccup(portal)


def test_late_heartbeat_replies_count_and_data_does_not():
    portal = Portal()
    portal.answering = False
    portal.run_until(30)
    for ref in (1, 2, 3):
        portal.reply(ref, topic="phoenix")
    portal.run_until(69.9)
    assert portal.events == [Joined()]
    for _ in range(50):
        portal.push("reject_access", REJECT)
    portal.run_until(70)
    assert "heartbeats" in hiccup(portal)


def test_a_blocked_writer_does_not_stop_the_liveness_check():
    portal = Portal()
    portal.blocked = True
    portal.run_until(39.99)
    assert portal.events == [Joined()]
    portal.run_until(40)
    assert "heartbeats" in hiccup(portal)


def test_a_writer_that_recovers_sends_one_heartbeat_and_no_burst():
    portal = Portal()
    portal.blocked = True
    portal.run_until(35)
    portal.blocked = False
    portal.drain()
    portal.run_until(45)
    assert [at for at, frame in portal.sent if frame["event"] == "heartbeat"] == [35.0, 40.0]
    assert portal.events == [Joined()]


def test_a_process_that_stood_still_sends_one_heartbeat_and_goes_on():
    portal = Portal()
    portal.now = START + 3605
    portal.channel.handle_timeout(portal.now)
    portal.drain()
    assert portal.names().count("heartbeat") == 1
    assert portal.channel.poll_timeout().at == START + 3615


def test_heartbeats_go_before_the_join_and_the_join_before_messages():
    channel = Channel(now=START)
    channel.send(NoRelays())
    channel._join_deadline = None
    channel.handle_timeout(START + 10)
    assert b"heartbeat" in channel.poll_transmit().text
    assert b"phx_join" in channel.poll_transmit().text
    assert channel.poll_transmit() is None


@pytest.mark.spec("PORTAL-61")
def test_equal_unsent_messages_are_queued_once_and_order_is_kept():
    portal = Portal(joined=False)
    portal.drain()
    for message in (NoRelays(), AuthorizationCreated(ref="a"), NoRelays(), AuthorizationCreated(ref="b"), NoRelays()):
        assert portal.send(message)
    portal.reply(0)
    assert portal.names() == ["phx_join", "no_relays", "authorization_created", "authorization_created"]
    portal.send(NoRelays())
    assert portal.names()[-1] == "no_relays"  # the first one is written: an equal one is new


def test_unsent_messages_are_told_in_order_and_refused_once_the_connection_is_over():
    portal = Portal()
    portal.blocked = True
    messages = [AuthorizationCreated(ref=name) for name in "abc"]
    for message in messages:
        portal.send(message)
    portal.push("phx_close", {})
    assert portal.channel.unsent() == messages
    assert not portal.send(NoRelays())


def test_the_queue_of_a_portal_that_reads_nothing_is_bounded_and_its_end_is_that_of_the_connection():
    portal = Portal()
    portal.blocked = True
    assert all(portal.channel.send(AuthorizationCreated(ref=str(n))) for n in range(16_384))
    assert portal.channel.send(AuthorizationCreated(ref="0"))  # an equal one waits already
    assert portal.channel.poll_event() is None
    assert not portal.channel.send(AuthorizationCreated(ref="one more"))
    assert portal.channel.poll_event() == Hiccup("the portal does not read what we send: 16384 messages wait")
    assert not portal.channel.send(AuthorizationCreated(ref="0"))
    assert len(portal.channel.unsent()) == 16_384


@pytest.mark.spec("PORTAL-35")
def test_disconnect_is_fatal_for_an_expired_token_only_and_beats_the_close_that_follows():
    portal = Portal()
    portal.push("disconnect", {"reason": "shutdown"})
    portal.push("disconnect", {})
    assert portal.events == [Joined()]
    portal.push("disconnect", {"reason": "token_expired"})
    portal.push("phx_close", {})
    assert len(portal.events) == 2
    assert isinstance(portal.events[1].error, TokenInvalid)


@pytest.mark.parametrize("payload", [{}, {"reason": "left"}, None])
def test_phx_close_is_a_hiccup_and_phx_error_nothing(payload):
    portal = Portal()
    portal.push("phx_error", payload)
    assert portal.events == [Joined()]
    portal.push("phx_close", payload)
    assert "closed the channel" in hiccup(portal)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "{", '"', '{"a":[1,2', '{"topic":"gateway","ev', '{"topic":"gateway","event":"x"', '{"a":tr'),
        *(
            '{"a":true',
            '{"a":-',
            '{"a":1.',
            '{"a":1e',
            '{"a":1e+',
            '{"topic":"gateway","event":"x","payload":{},"ref":-',
        ),
    ],
)
def test_a_truncated_frame_is_a_hiccup(text):
    portal = Portal()
    portal.text(text)
    assert "truncated" in hiccup(portal)


@pytest.mark.spec("PORTAL-23", "PORTAL-24")
@pytest.mark.parametrize("text", [
    "nonsense", "[]", "7", "null", '{"event":"init","payload":{}}', '{"topic":"gateway","payload":{}}',
    '{"topic":1,"event":"init"}', '{"topic":"gateway","event":"init","ref":1.5}', '{"topic":"g","event":"x","ref":"a"}',
    '{"topic":"g","event":"x","ref":"-1"}', '{"topic":"gateway","event":"init"}', '{"topic":"g","event":"\\ud800"}',
    '{"topic":"gateway","event":"init","payload":{"interface":{}}}', '{"topic":"gateway","event":"made","payload":[]}',
    '{"topic":"gateway","event":"phx_reply","payload":{"status":"ok"}}',
    '{"topic":"gateway","event":"phx_reply","ref":5,"payload":{"status":"maybe"}}',
    '{"topic":"gateway","event":"phx_reply","ref":5,"payload":7}', '{"topic":"g","event":"x"} trailing',
    '{"topic":"g","event":"x","payload":' + "[" * 100000 + "]" * 100000 + "}",
])  # fmt: skip
def test_a_frame_that_cannot_be_read_is_skipped_with_a_warning_and_the_next_one_is_handled(text, caplog):
    portal = Portal()
    portal.text(text)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert sum(portal.channel.skipped.values()) == 1
    portal.push("reject_access", REJECT | {"news": 1}, news={"a": []}, topic="whatever")
    assert portal.events == [Joined(), Received(RejectAccess(client_id=CLIENT, resource_id=CLIENT))]
