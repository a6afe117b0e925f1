"""What each client sent and received, whether its packets passed the core or the engine alone."""

from __future__ import annotations

import pytest

from fzg.dataplane.pure import PureEngine
from fzg.tunnel import traffic
from fzg.wire import ip as wire_ip
from tests.unit import tunnel_world as tw
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import CLIENT_ID, SERVER, SETTLED, close_worlds, world  # noqa: F401


@pytest.mark.parametrize("token", [0, 1, 5, (1 << 38) - 1])
@pytest.mark.parametrize("handle", [1, 77, (1 << 24) - 1])
@pytest.mark.parametrize("inbound", [True, False])
def test_a_marked_token_fits_the_engine_and_gives_back_its_parts(token, handle, inbound):
    marked = traffic.mark(token, handle, inbound=inbound)
    assert 0 <= marked < 1 << 63
    assert traffic.unmark(marked) == (token, handle, inbound)


def test_a_handle_beyond_the_last_costs_its_count_and_nothing_else():
    assert traffic.unmark(traffic.mark(9, 1 << 24, inbound=True)) == (9, 0, True)


@pytest.mark.parametrize(
    "packet",
    [
        tw.udp(tw.A4, "10.0.0.5", 1, 2, b"four"),
        tw.udp(tw.A6, "2001:db8::5", 1, 2, b""),
        tw.tcp(tw.A4, "10.0.0.5", 1, 2, payload=b"xyz"),
        tw.tcp(tw.A6, "2001:db8::5", 1, 2, payload=b"xyz"),
        tw.echo(tw.A4, "10.0.0.5", 7),
        tw.gre(tw.A4, "10.0.0.5"),
        tw.udp(tw.A4, "10.0.0.5", 1, 2, b"four", options=bytes(4)),
    ],
)
def test_the_payload_is_what_flow_records_count(packet):
    assert traffic.payload_length(packet) == wire_ip.parse(packet).payload_length


@pytest.mark.parametrize("engine", ["pure", "native"])
def test_packets_count_in_their_direction_whether_the_core_or_the_engine_let_them_pass(engine):
    if engine == "native":
        native = pytest.importorskip("fzg.dataplane._native", reason="the native engine was not built")
    w = world(make_engine=native.NativeEngine if engine == "native" else PureEngine).start()
    w.connect()
    w.net.run(SETTLED)
    there = udp(source=w.client.ipv4, destination=SERVER)
    back = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000)
    payload = wire_ip.parse(there).payload_length
    before = w.gateway.core.traffic(CLIENT_ID)
    assert (before.received_packets, before.sent_packets) == (0, 0)
    for _ in range(5):
        w.client.send(there)
        w.net.run(0.01)
    for _ in range(3):
        w.gateway.read_tun(back)
        w.net.run(0.01)
    w.net.run(1.1)  # the sweep
    carried = w.gateway.core.traffic(CLIENT_ID)
    assert (carried.received_packets, carried.received_bytes) == (5, 5 * payload)
    assert (carried.sent_packets, carried.sent_bytes) == (3, 3 * wire_ip.parse(back).payload_length)


def test_a_refused_packet_is_not_counted_and_a_client_that_is_gone_has_no_count():
    w = world().start()
    w.connect()
    w.net.run(SETTLED)
    w.client.send(udp(source=w.client.ipv4, destination=bytes((9, 9, 9, 9))))
    w.net.run(1.1)
    assert w.gateway.core.traffic(CLIENT_ID).received_packets == 0
    w.reject()
    w.net.run(0.1)
    assert w.gateway.core.traffic(CLIENT_ID) is None
