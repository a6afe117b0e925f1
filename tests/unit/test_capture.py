"""Captures: every packet of one client and of nobody else, bounded, and gone without a trace."""

from __future__ import annotations

import base64
import struct

import gevent
import pytest

from fzg.commands import capture as command
from fzg.ops import capture
from fzg.ops.control import Refused
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import CLIENT_ID, SERVER, SETTLED, close_worlds, world  # noqa: F401

native = pytest.importorskip("fzg.dataplane._native", reason="the native engine was not built")


def connected(make_engine=None):
    w = world(**({"make_engine": make_engine} if make_engine else {})).start()
    w.connect()
    w.net.run(SETTLED)
    w.there = udp(source=w.client.ipv4, destination=SERVER)
    w.back = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000)
    return w


def exchange(w, times):
    for _ in range(times):
        w.client.send(w.there)
        w.net.run(0.01)
        w.gateway.read_tun(w.back)
        w.net.run(0.01)


@pytest.mark.parametrize("make_engine", [None, native.NativeEngine])
def test_packets_of_flows_that_the_engine_settled_are_seen_too_and_settled_by_it_again_afterwards(make_engine):
    w = connected(make_engine)
    exchange(w, 3)
    seen = []
    tap = lambda packet, now: seen.append(packet)
    assert w.gateway.core.tap(CLIENT_ID, tap)
    exchange(w, 5)
    assert seen.count(w.there) == 5
    assert seen.count(w.back) == 5
    w.gateway.core.untap(CLIENT_ID, tap)
    exchange(w, 2)
    decided = []
    w.gateway.core.tunnel.handle_inner_packet = lambda *arguments: decided.append(arguments)
    w.client.send(w.there)
    w.net.run(0.01)
    assert decided == []
    assert len(seen) == 10


def test_a_refused_packet_and_the_error_that_answers_it_are_seen():
    w = connected()
    seen = []
    w.gateway.core.tap(CLIENT_ID, lambda packet, now: seen.append(packet))
    refused = udp(source=w.client.ipv4, destination=bytes((9, 9, 9, 9)))
    w.client.send(refused)
    w.net.run(0.1)
    assert seen[0] == refused
    assert len(seen) == 2
    assert seen[1][9] == 1  # ICMP


def test_one_client_s_capture_is_not_another_s():
    w = connected()
    second = w.add_client()
    w.connect(second)
    w.net.run(SETTLED)
    seen = []
    w.gateway.core.tap(second.client_id, lambda packet, now: seen.append(packet))
    exchange(w, 2)
    assert seen == []


def test_a_tap_goes_with_its_client_and_a_second_one_is_refused():
    w = connected()
    tap = lambda packet, now: None
    assert w.gateway.core.tap(CLIENT_ID, tap)
    assert not w.gateway.core.tap(CLIENT_ID, lambda packet, now: None)
    assert w.gateway.core.is_tapped(CLIENT_ID, tap)
    w.reject()
    w.net.run(0.1)
    assert not w.gateway.core.is_tapped(CLIENT_ID, tap)
    assert not w.gateway.core.tap(CLIENT_ID, tap)


def packets_of(lines):
    return [base64.b64decode(text) for line in lines for _, text in line.get("packets", ())]


def test_a_capture_ends_at_its_count():
    w = connected()
    lines = capture.capture(w.gateway.core, CLIENT_ID, count=3, seconds=60)
    assert next(lines) == {"client": CLIENT_ID, "linktype": 101}
    exchange(w, 5)
    rest = list(lines)
    assert packets_of(rest) == [w.there, w.back, w.there]
    assert rest[-1] == {"ended": "count", "captured": 3, "bytes": sum(map(len, packets_of(rest))), "missed": 0}
    assert w.gateway.core._taps == {}


def test_a_capture_ends_at_its_time():
    w = connected()
    lines = capture.capture(w.gateway.core, CLIENT_ID, count=3, seconds=0.05)
    assert [next(lines)["client"], *list(lines)] == [
        CLIENT_ID,
        {"ended": "time", "captured": 0, "bytes": 0, "missed": 0},
    ]


def test_a_capture_ends_with_its_client_and_when_nobody_wants_it_any_more():
    w = connected()
    lines = capture.capture(w.gateway.core, CLIENT_ID, count=3, seconds=60)
    next(lines)
    with pytest.raises(Refused, match="being captured already"):
        next(capture.capture(w.gateway.core, CLIENT_ID, count=3, seconds=60))
    lines.close()
    assert w.gateway.core._taps == {}
    lines = capture.capture(w.gateway.core, CLIENT_ID, count=3, seconds=60)
    next(lines)
    w.reject()
    w.net.run(0.1)
    assert list(lines)[-1]["ended"] == "client gone"


def test_a_reader_that_sleeps_misses_packets_but_takes_no_memory():
    taken = capture.Capture(1_000_000)
    for _ in range(10_000):
        taken.tap(bytes(1000), 1.0)
    assert taken.taken == (4 << 20) // 1000
    assert taken.missed == 10_000 - taken.taken
    assert len(packets_of(taken.lines())) == taken.taken
    taken.tap(bytes(1000), 1.0)
    assert len(packets_of(taken.lines())) == 1


def test_the_file_is_pcap_of_raw_ip(tmp_path):
    packet = bytes(range(40))
    lines = iter([{"packets": [[1_790_000_000.999999, base64.b64encode(packet).decode()]]}, {"ended": "count"}])
    with (tmp_path / "x").open("wb") as file:
        assert command._write(file, lines) == {"ended": "count"}
    data = (tmp_path / "x").read_bytes()
    assert struct.unpack("<IHHiIII", data[:24]) == (0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    assert struct.unpack("<IIII", data[24:40]) == (1_790_000_000, 999_999, 40, 40)
    assert data[40:] == packet


def test_waiting_for_packets_lets_others_run():
    taken = capture.Capture(10)
    gevent.spawn_later(0.01, taken.tap, b"x", 1.0)
    taken.wait(5.0)
    assert taken.taken == 1
