"""The greenlets between descriptors, engine and core, over pipes and with an engine that does as the test says."""

from __future__ import annotations

import contextlib
import os
import socket

import gevent
import pytest

from fzg.dataplane.engine import Datagram, FlowReport, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.host import clock
from fzg.host.errors import HostError
from fzg.pumps import Pumps
from fzg.wire.endpoint import Endpoint

HERE = Endpoint.parse("192.0.2.1:52625")
THERE = Endpoint.parse("198.51.100.7:40000")


class Engine:
    """Gives what is in `turns`, and takes what it is given while there is `room`."""

    def __init__(self):
        self.room = True
        self.turns = []
        self.flushes = 0
        self.backlog = False
        self.queued, self.sent = [], []

    def transmit(self, transmit):
        self.queued.append(transmit)

    def receive_tun(self, now):
        if not self.turns:
            raise gevent.GreenletExit
        turn = self.turns.pop(0)
        if isinstance(turn, OSError):
            raise turn
        return turn

    def receive_udp(self, family, now):
        assert family == socket.AF_INET
        return self.receive_tun(now)

    def has_backlog(self, family):
        return self.backlog

    def flush(self):
        self.flushes += 1
        self.sent.extend(self.queued)
        self.queued.clear()
        return self.room

    def congested(self):
        return [self.writable]


class Gateway:
    def __init__(self):
        self.told, self.says = [], []

    def poll_transmit(self):
        return self.says.pop(0) if self.says else None

    def __getattr__(self, name):
        return lambda *arguments: self.told.append((name, *arguments))


@pytest.fixture
def descriptor():
    """One that is always readable."""
    number = os.eventfd(1)
    yield number
    os.close(number)


@pytest.fixture
def pumps():
    engine, gateway = Engine(), Gateway()
    pumps = Pumps(engine, gateway, settle=lambda: gateway.told.append("settle"))
    pumps.engine, pumps.gateway = engine, gateway
    return pumps


def test_control_comes_before_the_data_of_the_same_turn(pumps, descriptor):
    inner = InnerPacket(1, b"inner", 0, THERE, HERE)
    pumps.engine.turns = [[inner, SessionConfirmed(7), Datagram(b"stun", THERE, HERE, 0), FlowReport(1, 2, 3, 4.0)]]
    gevent.spawn(pumps.run_udp, descriptor, socket.AF_INET).join(timeout=5)
    assert [each[0] for each in pumps.gateway.told[:-1]] == [
        "handle_datagram",
        "handle_inner_packet",
        "handle_session_confirmed",
        "handle_flow_report",
    ]
    assert pumps.gateway.told[-1] == "settle"


def test_an_answer_does_not_wait_for_the_datagrams_behind_its_own(pumps, descriptor):
    sent_before = []

    def handle_datagram(payload, *_):
        sent_before.append(list(pumps.engine.sent))
        pumps.gateway.says.append(b"answer to " + payload)

    pumps.gateway.handle_datagram = handle_datagram
    pumps.engine.turns = [[Datagram(b"check", THERE, HERE, 0), Datagram(b"initiation", THERE, HERE, 0)]]
    gevent.spawn(pumps.run_udp, descriptor, socket.AF_INET).join(timeout=5)
    assert sent_before == [[], [b"answer to check"]]
    assert (pumps.gateway.says, pumps.gateway.told) == ([b"answer to initiation"], ["settle"])


def test_a_turn_that_the_engine_settled_alone_is_written_and_does_not_reach_the_core(pumps, descriptor):
    pumps.engine.turns = [[]]
    gevent.spawn(pumps.run_udp, descriptor, socket.AF_INET).join(timeout=5)
    assert (pumps.gateway.told, pumps.engine.flushes) == ([], 1)


def test_a_backlog_is_worked_on_though_nothing_arrives(pumps):
    silent, other = socket.socketpair()
    with silent, other:
        pumps.engine.turns, pumps.engine.backlog = [[OutboundPacket(b"one")], [OutboundPacket(b"two")]], True
        gevent.spawn(pumps.run_tun, silent.fileno()).join(timeout=5)
    assert [each[1] for each in pumps.gateway.told if each != "settle"] == [b"one", b"two"]


def test_the_tun_is_not_read_until_what_the_kernel_refused_is_written(pumps, descriptor):
    engine, moments = pumps.engine, []
    full, drain = socket.socketpair()
    with full, drain:
        full.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                full.send(bytes(65536))
        engine.writable, engine.room, engine.turns = full.fileno(), False, [[OutboundPacket(b"later")]]
        pumps._gateway.handle_outbound_packet = lambda _packet, now: moments.append(now)
        pumps.flush()
        flusher = gevent.spawn(pumps.run_flusher)
        tun = gevent.spawn(pumps.run_tun, descriptor)
        gevent.idle()
        gevent.idle()
        assert not moments, "read while the kernel took nothing"
        before = clock.now()
        engine.room = True
        drain.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                drain.recv(1 << 20)
        tun.join(timeout=5)
        flusher.kill()
    assert len(moments) == 1
    assert moments[0] >= before, "the core is told the time after the wait, for its clock must not go back"


def test_a_tun_that_is_gone_ends_the_pump_with_a_sentence(pumps, descriptor):
    pumps.engine.turns = [OSError(19, "No such device")]
    with pytest.raises(HostError, match=r"^the TUN device is gone: No such device; was it deleted\?$"):
        pumps.run_tun(descriptor)
