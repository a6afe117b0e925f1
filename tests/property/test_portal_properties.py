"""No input from the portal or from a file gets more out of the portal package than it promises."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fzg.portal import messages
from fzg.portal.backoff import Reconnect
from fzg.portal.channel import Channel, Fatal, Hiccup
from fzg.portal.identity import _parse_stored, external_id
from fzg.portal.messages import NoRelays, decode
from fzg.portal.problem import parse_rejection, parse_retry_after
from fzg.portal.url import ApiPath, InvalidUrl, PortalUrl
from fzg.portal.user_agent import parse_os_release, user_agent
from fzg.wire import Malformed

CLIENT = "11111111-2222-4333-8444-555555555555"
EVENTS = [
    "init", "create_authorization", "authorize_flow", "ice_candidates", "invalidate_ice_candidates", "reject_access",
    "relays_presence", "resource_updated", "access_authorization_expiry_updated",
]  # fmt: skip
CONTROL = ["phx_reply", "phx_error", "phx_close", "disconnect", "made_up"]

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
    [CLIENT, "100.64.0.1", "fd00::1", "203.0.113.7:3478", "turn", "cidr", "dns", "tcp", "10.0.0.0/8", "ok", "error"]
)  # fmt: skip
keys = st.text(max_size=8) | st.sampled_from(
    ["interface", "ipv4", "ipv6", "relays", "id", "type", "addr", "username", "password", "expires_at", "client_id",
     "resource_id", "candidates", "filters", "protocol", "port_range_start", "address", "name", "status", "response",
     "reason", "client", "ref", "resource", "disconnected_ids", "connected", "authorizations"]
)  # fmt: skip
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=8), max_leaves=20
)


@given(st.sampled_from(EVENTS), trees)
def test_decode_raises_nothing_but_malformed(event, payload):
    try:
        message = decode(event, json.dumps(payload))
    except Malformed:
        return
    assert isinstance(message, messages.Inbound)


@given(st.sampled_from(EVENTS), st.binary(max_size=60))
def test_decode_of_any_bytes_raises_nothing_but_malformed(event, payload):
    with contextlib.suppress(Malformed):
        decode(event, payload)


frames = st.text(max_size=60) | st.builds(
    lambda event, ref, topic, payload: json.dumps({"topic": topic, "event": event, "ref": ref, "payload": payload}),
    st.sampled_from(EVENTS + CONTROL), st.none() | st.integers(-1, 6) | st.text(max_size=3) | leaves,
    st.sampled_from(["gateway", "phoenix"]), trees,
)  # fmt: skip
steps = st.lists(st.tuples(frames, st.floats(0, 30), st.booleans()), max_size=30)


@given(steps)
def test_a_channel_survives_any_portal_and_its_refs_grow_by_one(script):
    now = 0.0
    channel = Channel(now=now, capabilities=messages.SetSnownetCapabilities(iceless=False))
    sent, events = [], []
    for text, wait, queue in script:
        now += wait
        if queue:
            channel.send(NoRelays())
        channel.handle_timeout(now)
        deadline = channel.poll_timeout()
        assert deadline is None or deadline.at > now
        channel.handle_frame(text, now)
        sent.extend(json.loads(frame.text) for frame in iter(channel.poll_transmit, None))
        events.extend(iter(channel.poll_event, None))
    assert [frame["ref"] for frame in sent] == list(range(len(sent)))
    assert all(not isinstance(event, Hiccup | Fatal) for event in events[:-1])
    if sent:
        assert [frame["event"] for frame in sent if frame["event"] != "heartbeat"][:1] in (["phx_join"], [])


@given(
    st.lists(st.sampled_from([None, 0.0, 5.0]) | st.just("joined"), max_size=80),
    st.floats(1, 200),
    st.binary(min_size=7),
)
def test_no_outage_costs_more_than_its_budget_and_no_delay_exceeds_two_minutes(script, partition, noise):
    reconnect = Reconnect(random=lambda n: noise[:n], max_partition=partition)
    spent, limit = 0.0, 15.0
    for step in script:
        if step == "joined":
            reconnect.handle_joined()
            spent, limit = 0.0, partition
            continue
        retry = reconnect.handle_failure(step)
        if step == 0.0:
            spent = 0.0
        elif step is None and retry is not None:
            spent += retry.delay
            assert 0.5 <= retry.delay <= 120.0
            assert spent <= limit + 1e-6
            assert retry.budget == pytest.approx(limit - spent, abs=1e-6)


@given(st.text(max_size=80), st.floats(0, 4e9))
def test_retry_after_of_any_text_is_a_delay_of_at_most_a_day_or_nothing(value, now):
    delay = parse_retry_after(value, now)
    assert delay is None or 0.0 <= delay <= 86400.0


@given(
    st.integers(100, 999),
    st.dictionaries(st.sampled_from(["content-type", "retry-after"]), st.text(max_size=30)),
    st.binary(),
)
def test_any_refusal_is_one_printable_line(status, headers, body):
    rejection = parse_rejection(status, headers, body, 0.0)
    assert str(rejection).isprintable()
    assert rejection.body.isprintable()
    assert (rejection.fatal_error is not None) == (status == 401)


@settings(max_examples=200)
@given(st.text(max_size=60) | st.builds("wss://{}".format, st.text(max_size=60)))
def test_any_url_is_refused_or_gives_a_clean_request_line(text):
    try:
        url = PortalUrl.parse(text)
    except InvalidUrl:
        return
    line = url.target(ApiPath.V2, external_id=text, name=text, public_key=bytes(32)) if text.isprintable() else ""
    for part in (line, url.authority, url.base_path):
        assert part.isascii()
        assert not any(character.isspace() or not character.isprintable() for character in part)


@given(st.binary(max_size=300))
def test_any_identity_file_holds_a_printable_id_or_none(content):
    ident = _parse_stored(content)
    assert ident is None or (0 < len(ident) <= 255 and ident.isprintable())


@given(st.text(max_size=50))
def test_the_external_id_is_the_id_or_64_hex_digits(ident):
    sent = external_id(ident)
    assert sent == ident or (len(sent) == 64 and set(sent) <= set("0123456789abcdef"))


@given(st.text(max_size=200), st.text(max_size=20), st.text(max_size=20))
def test_any_host_gives_a_printable_ascii_user_agent(release, machine, kernel):
    text = user_agent(parse_os_release(release), raspberry_pi=False, machine=machine, kernel=kernel)
    assert text.isascii()
    assert text.isprintable()
    assert " gateway/" in text
