"""What `RUST_LOG=wire=trace` shows of datagrams and packets: everything but what is in them."""

from __future__ import annotations

import pytest

from fzg.dataplane.pure import PureEngine
from fzg.dataplane.select import engine_name
from fzg.ops.wire_trace import classified, described, traced
from fzg.wire import channel_data
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import (
    SERVER,
    SETTLED,
    close_worlds,  # noqa: F401
    world,
)

TRACE = 5
TARGETS = ("wire.net.send", "wire.net.recv", "wire.turn.send", "wire.turn.recv", "wire.dev.send", "wire.dev.recv")


def tracing(caplog, *targets):
    for target in targets:
        caplog.set_level(TRACE, logger=target)


def test_the_engine_stays_what_it_is_while_nobody_asks(caplog):
    tracing(caplog, "fzg", "wire.api", "wire.dns")
    engine = PureEngine()
    assert traced(engine) is engine


@pytest.mark.parametrize("target", TARGETS)
def test_one_target_is_enough(caplog, target):
    tracing(caplog, target)
    engine = PureEngine()
    wrapped = traced(engine)
    assert wrapped.observed is engine
    assert engine_name(wrapped) == "pure", "who asks which engine runs gets the right answer"
    assert wrapped.counters() == {}


def lines(caplog, target):
    return [record for record in caplog.records if record.name == target]


@pytest.mark.spec("OPS-35")
def test_a_client_s_packets_and_the_talk_with_its_relay_can_be_followed(caplog):
    tracing(caplog, "wire")
    w = world()
    core = w.gateway.core
    w.gateway.engine = core.engine = core.node._engine = core.node._relayed._engine = traced(core.engine)
    w.start()
    w.connect()
    w.net.run(SETTLED)
    there = udp(source=w.client.ipv4, destination=SERVER)
    back = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000)
    for _ in range(3):  # no flow takes them out of sight
        w.client.send(there)
        w.net.run(0.01)
        w.gateway.read_tun(back)
        w.net.run(0.01)
    sent = [record.getMessage() for record in lines(caplog, "wire.dev.send")]
    received = [record.getMessage() for record in lines(caplog, "wire.dev.recv")]
    assert sent == ["UDP 100.66.1.2:50000 > 10.0.0.5:53"] * 3
    assert received == ["UDP 10.0.0.5:53 > 100.66.1.2:50000"] * 3
    told = {record.getMessage() for record in lines(caplog, "wire.turn.send")}
    assert {"STUN allocate request", "STUN channel_bind request"} <= told
    heard = {record.getMessage() for record in lines(caplog, "wire.turn.recv")}
    assert {"STUN allocate error 401", "STUN allocate success"} <= heard
    net = {record.getMessage() for target in ("wire.net.send", "wire.net.recv") for record in lines(caplog, target)}
    assert {"STUN binding request", "STUN binding success", "WireGuard initiation", "WireGuard response"} <= net
    assert "WireGuard data: UDP 100.66.1.2:50000 > 10.0.0.5:53" in net
    (first, *_) = lines(caplog, "wire.net.recv")
    assert {"src", "dst", "num_bytes"} <= set(vars(first))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", ("unknown", False)),
        (b"\xff" * 40, ("unknown", False)),
        (b"\x04\0\0\0" + bytes(28), ("WireGuard data", False)),
        (b"\x01\0\0\0" + bytes(144), ("WireGuard initiation", False)),
        (channel_data.encode(0x4001, b"\x04\0\0\0" + bytes(28)), ("ChannelData 0x4001: WireGuard data", True)),
        (channel_data.encode(0x4001, b""), ("ChannelData 0x4001: unknown", True)),
    ],
)
def test_datagrams_are_named_by_kind(payload, words):
    assert classified(payload) == words


def test_a_packet_that_is_none_is_called_that():
    assert described(b"\x45").startswith("malformed: ")
