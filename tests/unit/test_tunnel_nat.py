"""DNS NAT: sessions, their ports and their time (virtual)."""

from __future__ import annotations

import struct

import pytest

from fzg.tunnel import nat
from fzg.tunnel.events import Deliver, Drop, Revoked
from fzg.tunnel.nat import Lookup, NatTable
from tests.unit.tunnel_world import (
    A4,
    A6,
    ACK,
    B4,
    FIN,
    P1,
    P2,
    P3,
    Q1,
    RST,
    SYN,
    B,
    World,
    addresses,
    checksums_hold,
    echo,
    gre,
    icmp,
    icmp_kind,
    packed,
    ports,
    tcp,
    udp,
)

SERVER, SERVER6 = "10.0.0.1", "2001:db8::5"
UDP_TAG = 17 << 16


@pytest.fixture
def world() -> World:
    """P1 and P2 both lead to one server."""
    world = World()
    world.dns("*.example")
    assert world.assign("db.example", [P1, P2, Q1], [SERVER, SERVER6]) == "Active"
    return world


def exchange(world, sport=5000, dport=80, proxy=P1):
    """One UDP packet each way."""
    out = world.translated(udp(A4, proxy, sport, dport))
    back = world.delivered(udp(SERVER, A4, dport, ports(out)[0]))
    assert addresses(back) == (proxy, A4)
    assert ports(back) == (dport, sport)


@pytest.mark.spec("TUNNEL-38")
def test_a_first_packet_and_its_answer(world):
    out = world.translated(udp(A4, P1, 1, 80, b"question"))
    assert (addresses(out), ports(out)) == ((A4, SERVER), (1, 80))
    assert checksums_hold(out)
    back = world.delivered(udp(SERVER, A4, 80, 1, b"answer"))
    assert (addresses(back), ports(back)) == ((P1, A4), (80, 1))
    assert checksums_hold(back)


def test_ipv6_and_tcp_alike(world):
    out = world.translated(tcp(A6, Q1, 5000, 443, SYN, b"hello"))
    assert (addresses(out), ports(out)) == ((A6, SERVER6), (5000, 443))
    assert checksums_hold(out)
    back = world.delivered(tcp(SERVER6, A6, 443, 5000, SYN | ACK))
    assert addresses(back) == (Q1, A6)
    assert checksums_hold(back)


@pytest.mark.spec("TUNNEL-39")
def test_two_proxies_of_one_server_are_told_apart_by_the_port(world):
    assert ports(world.translated(udp(A4, P1, 5000, 80))) == (5000, 80)
    assert ports(world.translated(udp(A4, P2, 5000, 80))) == (5001, 80)
    assert addresses(world.delivered(udp(SERVER, A4, 80, 5000)))[0] == P1
    back = world.delivered(udp(SERVER, A4, 80, 5001))
    assert (addresses(back), ports(back)) == ((P2, A4), (80, 5000))
    assert checksums_hold(back)
    assert ports(world.translated(udp(A4, P2, 5000, 80))) == (5001, 80)


@pytest.mark.spec("TUNNEL-40")
def test_ports_wrap_around_to_one(world):
    assert ports(world.translated(udp(A4, P1, 65535, 80)))[0] == 65535
    assert ports(world.translated(udp(A4, P2, 65535, 80)))[0] == 1
    back = world.delivered(udp(SERVER, A4, 80, 1))
    assert (addresses(back), ports(back)) == ((P2, A4), (80, 65535))


def test_port_zero_is_kept_if_free(world):
    assert ports(world.translated(udp(A4, P1, 0, 80)))[0] == 0
    assert ports(world.translated(udp(A4, P2, 0, 80)))[0] == 1


@pytest.mark.spec("TUNNEL-41")
def test_an_answered_udp_session_ends_after_120_seconds(world):
    start = world.now
    world.translated(udp(A4, P1, 5000, 80))
    world.run(30)
    world.delivered(udp(SERVER, A4, 80, 5000))
    world.run(119)
    assert world.now == start + 149
    assert world.tunnel.nat_session_count == 1
    world.run(2)
    assert world.tunnel.nat_session_count == 0
    assert world.dropped(udp(SERVER, A4, 80, 5000)) == "ExpiredNatSession"


def test_an_answer_just_in_time_prolongs_a_session(world):
    world.translated(udp(A4, P1, 5000, 80))
    world.run(30)
    world.delivered(udp(SERVER, A4, 80, 5000))
    world.run(119)
    assert addresses(world.delivered(udp(SERVER, A4, 80, 5000)))[0] == P1
    world.run(119)
    assert world.tunnel.nat_session_count == 1


@pytest.mark.spec("TUNNEL-42")
@pytest.mark.parametrize("make", [lambda: udp(A4, P1, 5000, 80), lambda: tcp(A4, P1, 5000, 80, SYN)])
def test_an_unanswered_session_ends_60_seconds_after_the_last_packet(world, make):
    world.translated(make())
    world.run(40)
    world.translated(make())
    world.run(59)
    assert world.tunnel.nat_session_count == 1
    world.run(2)
    assert world.tunnel.nat_session_count == 0


@pytest.mark.spec("TUNNEL-43")
def test_a_tcp_session_lives_for_two_hours_and_four_minutes(world):
    world.translated(tcp(A4, P1, 5000, 80, SYN))
    world.delivered(tcp(SERVER, A4, 80, 5000, SYN | ACK))
    world.run(10)
    world.translated(tcp(A4, P1, 5000, 80))
    world.run(7439)
    assert world.tunnel.nat_session_count == 1
    world.run(2)
    assert world.tunnel.nat_session_count == 0


@pytest.mark.spec("TUNNEL-44")
def test_fin_both_ways_ends_a_session_after_5_seconds(world):
    world.translated(tcp(A4, P1, 5000, 80, SYN))
    world.delivered(tcp(SERVER, A4, 80, 5000, SYN | ACK))
    world.translated(tcp(A4, P1, 5000, 80, FIN | ACK))
    world.run(100)
    assert world.tunnel.nat_session_count == 1
    world.delivered(tcp(SERVER, A4, 80, 5000, FIN | ACK))
    world.run(2)
    world.translated(tcp(A4, P1, 5000, 80))
    world.run(4)
    assert world.tunnel.nat_session_count == 1
    world.run(2)
    assert world.tunnel.nat_session_count == 0


@pytest.mark.spec("TUNNEL-45")
@pytest.mark.parametrize("by_client", [True, False])
def test_rst_ends_a_session_at_the_next_tick(world, by_client):
    world.translated(tcp(A4, P1, 5000, 80, SYN))
    world.delivered(tcp(SERVER, A4, 80, 5000, SYN | ACK))
    world.translated(tcp(A4, P1, 5000, 80))
    world.drain()
    if by_client:
        world.translated(tcp(A4, P1, 5000, 80, RST))
    else:
        world.delivered(tcp(SERVER, A4, 80, 5000, RST))
    world.run(1.01)
    assert world.tunnel.nat_session_count == 0
    assert world.dropped(tcp(SERVER, A4, 80, 5000)) == "ExpiredNatSession"
    world.translated(tcp(A4, P1, 5000, 80, SYN))
    assert world.delivered(tcp(SERVER, A4, 80, 5000, SYN | ACK))


def test_a_session_that_ends_under_a_cached_flow_revokes_it(world):
    world.now += 0.9
    world.translated(tcp(A4, P1, 5000, 80))
    world.translated(tcp(A4, P1, 5000, 80, RST))
    world.events.clear()
    world.run(0.2)
    assert Revoked in map(type, world.events)


def test_rst_on_the_first_packet_is_not_recorded(world):
    world.translated(tcp(A4, P1, 5000, 80, RST))
    world.run(5)
    assert world.tunnel.nat_session_count == 1


@pytest.mark.spec("TUNNEL-46")
def test_echo_identifiers_are_ports_and_clients_do_not_meet(world):
    world.dns("*.example", client=B)
    world.assign("db.example", [P1], [SERVER], client=B)
    for client, own in ((None, A4), (B, B4)):
        packet = echo(own, P1, 700)
        verdict = world.out(packet) if client is None else world.out(packet, client)
        assert addresses(verdict.packet) == (own, SERVER)
        assert verdict.packet[24:26] == struct.pack("!H", 700)
        assert checksums_hold(verdict.packet)
    second = world.translated(echo(A4, P2, 700))
    assert second[24:26] == struct.pack("!H", 701)
    assert checksums_hold(second)
    back = world.delivered(echo(SERVER, A4, 701, reply=True))
    assert addresses(back) == (P2, A4)
    assert back[24:26] == struct.pack("!H", 700)
    assert checksums_hold(back)
    verdict = world.back(echo(SERVER, B4, 700, reply=True))
    assert isinstance(verdict, Deliver)
    assert verdict.client_id == B
    assert world.dropped(echo(SERVER, B4, 701, reply=True)) == "NotAllowed"


@pytest.mark.spec("TUNNEL-47")
def test_a_refresh_moves_new_sessions_only(world):
    exchange(world, 5000)
    assert world.assign("db.example", [P1], ["10.0.0.2"]) == "Active"
    exchange(world, 5000)
    assert addresses(world.translated(udp(A4, P1, 6000, 80))) == (A4, "10.0.0.2")


@pytest.mark.spec("TUNNEL-48")
def test_a_proxy_that_changes_its_name_resets_everything(world):
    exchange(world, 5000)
    world.drain()
    world.events.clear()
    assert world.assign("other.example", [P1], ["10.0.0.9"]) == "Active"
    assert Revoked in map(type, world.events)
    assert addresses(world.translated(udp(A4, P1, 5000, 80))) == (A4, "10.0.0.9")
    assert world.dropped(udp(SERVER, A4, 80, 5000)) == "NotAllowed"
    assert icmp_kind(world.out(udp(A4, P2, 5000, 80)).packet) == (3, 13)


@pytest.mark.spec("TUNNEL-49")
def test_icmp_errors_about_a_session_are_translated(world):
    world.translated(udp(A4, P1, 5000, 80))
    sent = world.translated(udp(A4, P2, 5000, 80, b"question"))
    assert ports(sent)[0] == 5001
    back = world.delivered(icmp(SERVER, A4, 3, 3, payload=sent))
    assert addresses(back) == (P2, A4)
    assert icmp_kind(back) == (3, 3)
    assert back[8] == 20
    assert checksums_hold(back)
    embedded = back[28:]
    assert addresses(embedded) == (A4, P2)
    assert ports(embedded) == (5000, 80)
    assert len(embedded) == len(sent)


@pytest.mark.spec("TUNNEL-50")
def test_mtus_and_time_exceeded_are_translated_too(world):
    sent = world.translated(udp(A4, P1, 5000, 80))
    back = world.delivered(icmp("203.0.113.1", A4, 3, 4, struct.pack("!HH", 0, 1200), sent))
    assert icmp_kind(back) == (3, 4)
    assert back[26:28] == struct.pack("!H", 1200)
    back = world.delivered(icmp("203.0.113.1", A4, 11, 0, payload=sent))
    assert (icmp_kind(back), addresses(back)) == ((11, 0), (P1, A4))
    sent = world.translated(udp(A6, Q1, 5000, 80))
    back = world.delivered(icmp("2001:db8::99", A6, 2, 0, struct.pack("!I", 1280), sent))
    assert (icmp_kind(back), addresses(back)) == ((2, 0), (Q1, A6))
    assert back[44:48] == struct.pack("!I", 1280)
    assert checksums_hold(back)


def test_an_icmp_error_counts_as_an_answer(world):
    sent = world.translated(udp(A4, P1, 5000, 80))
    world.delivered(icmp("203.0.113.1", A4, 3, 1, payload=sent))
    world.run(100)
    assert world.tunnel.nat_session_count == 1


def test_an_icmp_error_about_an_ended_session_is_dropped(world):
    sent = world.translated(udp(A4, P1, 5000, 80))
    world.run(62)
    assert world.dropped(icmp("203.0.113.1", A4, 3, 1, payload=sent)) == "ExpiredNatSession"


@pytest.mark.slow
@pytest.mark.spec("TUNNEL-51")
def test_udp_checksums_of_zero(world):
    out = world.translated(udp(A4, P1, 5000, 80, checksum=0))
    assert out[26:28] == b"\0\0"
    back = world.delivered(udp(SERVER, A4, 80, 5000, checksum=0))
    assert back[26:28] == b"\0\0"
    # Of all ports, one makes the sum come out as zero.
    written = {world.translated(udp(A4, P1, port, 80, b"", checksum=0x1234))[26:28] for port in range(1, 3)}
    assert b"\0\0" not in written
    payloads = {world.translated(udp(A4, P1, 5000, 80, struct.pack("!H", n), checksum=n)) for n in range(1, 65536)}
    checksums = {packet[26:28] for packet in payloads}
    assert b"\0\0" not in checksums
    assert b"\xff\xff" in checksums


@pytest.mark.spec("TUNNEL-52")
def test_protocols_without_a_value_are_dropped_silently(world):
    for packet in (gre(A4, P1), icmp(A4, P1, 13, 0, payload=bytes(12))):
        assert world.out(packet) == Drop("UnsupportedProtocol")
    assert world.drain() == []


def test_flow_reports_keep_a_session_alive(world):
    verdict = world.out(udp(A4, P1, 5000, 80))
    back = world.back(udp(SERVER, A4, 80, 5000))
    for _ in range(5):
        world.run(100)
        world.tunnel.handle_flow_report(verdict.flow.token, 7, 7000, world.now - 0.5)
    world.run(119)
    assert world.tunnel.nat_session_count == 1
    world.tunnel.handle_flow_report(back.flow.token, 1, 100, world.now)
    world.run(119)
    assert world.tunnel.nat_session_count == 1
    world.run(3)
    assert world.tunnel.nat_session_count == 0
    world.tunnel.handle_flow_report(back.flow.token, 1, 100, world.now)
    assert world.tunnel.nat_session_count == 0


def test_a_report_about_answers_confirms_a_session(world):
    verdict = world.out(udp(A4, P1, 5000, 80))
    world.tunnel.handle_flow_report(verdict.flow.token | 1, 1, 100, world.now + 0.5)
    world.run(100)
    assert world.tunnel.nat_session_count == 1


# -- the table itself


@pytest.mark.slow
def test_a_full_range_of_ports_drops_the_next_session_quickly():
    table = NatTable()
    server = packed(SERVER)
    for port in range(65536):
        assert table.outgoing(UDP_TAG | port, packed(P1), server, 0, 0.0).outside_value == UDP_TAG | port
    assert table.outgoing(UDP_TAG | 7, packed(P2), server, 0, 0.0) is None
    assert table.outgoing(UDP_TAG | 7, packed(P2), packed("10.0.0.2"), 0, 0.0) is not None
    assert table.outgoing(6 << 16 | 7, packed(P2), server, 0, 0.0) is not None


def test_long_runs_of_used_ports_are_skipped():
    table = NatTable()
    server = packed(SERVER)
    for port in range(1, 2001):
        table.outgoing(UDP_TAG | port, packed(P1), server, 0, 0.0)
    for offset in range(50):
        entry = table.outgoing(UDP_TAG | (1 + offset), packed(P2), server, 0, 0.0)
        assert entry.outside_value == UDP_TAG | (2001 + offset)
    assert table.outgoing(UDP_TAG | 500, packed(P3), server, 0, 50.0).outside_value == UDP_TAG | 2051
    assert len(table.sweep(60.0, 10_000)) == 2050
    assert table.outgoing(UDP_TAG | 500, packed(P1), server, 0, 61.0).outside_value == UDP_TAG | 500


def test_ports_that_became_free_are_found_again():
    table = NatTable()
    server = packed(SERVER)
    for port in range(1, 1001):
        table.outgoing(UDP_TAG | port, packed(P1), server, 0, 0.0 if port != 7 else 30.0)
    assert table.outgoing(UDP_TAG | 1, packed(P2), server, 0, 30.0).outside_value == UDP_TAG | 1001
    assert len(table.sweep(60.0, 10_000)) == 999
    assert table.outgoing(UDP_TAG | 7, packed(P2), server, 0, 60.0).outside_value == UDP_TAG | 8
    assert table.outgoing(UDP_TAG | 7, packed(P3), server, 0, 60.0).outside_value == UDP_TAG | 9


def test_the_table_has_a_cap(monkeypatch):
    monkeypatch.setattr(nat, "MAX_ENTRIES", 3)
    table = NatTable()
    opened = [table.outgoing(UDP_TAG | port, packed(P1), packed(SERVER), 0, 0.0) for port in range(5)]
    assert [entry is not None for entry in opened] == [True, True, True, False, False]
    assert len(table) == 3


def test_the_memory_of_ended_sessions_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(nat, "MAX_EXPIRED", 2)
    table = NatTable()
    for port in (1, 2, 3):
        table.outgoing(UDP_TAG | port, packed(P1), packed(SERVER), 0, float(port))
    table.sweep(1000.0, 100)
    found = [table.incoming(UDP_TAG | port, packed(SERVER), 0, 1000.0) for port in (1, 2, 3)]
    assert found == [Lookup.UNKNOWN, Lookup.EXPIRED, Lookup.EXPIRED]
    assert table.outgoing(UDP_TAG | 3, packed(P1), packed(SERVER), 0, 1000.0)
    assert table.incoming(UDP_TAG | 3, packed(SERVER), 0, 1000.0).proxy == packed(P1)


def test_a_session_that_ended_twice_counts_from_its_second_end(monkeypatch):
    monkeypatch.setattr(nat, "MAX_EXPIRED", 2)
    table = NatTable()
    for now, port in ((0.0, 1), (1.0, 2), (1000.0, 1), (2000.0, 3)):
        table.outgoing(UDP_TAG | port, packed(P1), packed(SERVER), 0, now)
        table.sweep(now + 500.0, 100)
    found = [table.incoming(UDP_TAG | port, packed(SERVER), 0, 3000.0) for port in (1, 2, 3)]
    assert found == [Lookup.EXPIRED, Lookup.UNKNOWN, Lookup.EXPIRED]


def test_a_sweep_has_a_limit():
    table = NatTable()
    for port in range(10):
        table.outgoing(UDP_TAG | port, packed(P1), packed(SERVER), 0, 0.0)
    assert [len(table.sweep(60.0, 4)) for _ in range(4)] == [4, 4, 2, 0]


def test_ending_very_many_sessions_takes_several_turns(monkeypatch):
    monkeypatch.setattr("fzg.tunnel.tunnel.SWEEP_BUDGET", 10)
    world = World()
    world.dns("*.example", number=2)
    world.assign("db.example", [P1], [SERVER])
    for port in range(25):
        world.translated(udp(A4, P1, port, 80))
    start = world.now
    world.run(60.5)
    assert world.tunnel.nat_session_count == 0
    assert world.now == start + 60.5
