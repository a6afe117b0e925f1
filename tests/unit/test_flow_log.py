"""Which flows are logged, how they split and end, and what they carried (virtual time)."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from fzg.tunnel import flow_log
from fzg.tunnel.events import Deliver, Forward
from fzg.tunnel.resources import CidrResource
from fzg.tunnel.tunnel import Tunnel
from tests.unit.flow_log_world import UNIX, LoggedWorld, attribution, path
from tests.unit.tunnel_world import (
    A4,
    ACK,
    FIN,
    GATEWAY4,
    P1,
    RST,
    SYN,
    A,
    World,
    addresses,
    echo,
    gre,
    packed,
    ports,
    resource_id,
    tcp,
    udp,
)

SERVER = "10.0.0.7"


@pytest.fixture
def world() -> LoggedWorld:
    return LoggedWorld()


def up(flags=ACK, payload=b"", sport=5000):
    return tcp(A4, SERVER, sport, 80, flags, payload)


def down(flags=ACK, payload=b"", sport=5000):
    return tcp(SERVER, A4, 80, sport, flags, payload)


def connect(world, sport=5000):
    world.sent(up(SYN, sport=sport))
    world.received(down(SYN | ACK, sport=sport))
    return world.sent(up(sport=sport))


def numbers(record):
    """tx packets, rx packets, tx bytes, rx bytes."""
    figures = record.figures
    return figures.tx_packets, figures.rx_packets, figures.tx_bytes, figures.rx_bytes


@pytest.mark.spec("TUNNEL-91")
def test_a_tcp_connection_is_one_flow_from_syn_to_both_fins(world):
    connect(world)
    (started,) = world.look()
    assert started.figures is None
    assert started.flow_start == UNIX
    world.now += 1
    world.sent(up(ACK, b"x" * 100))
    world.received(down(ACK, b"y" * 300))
    world.sent(up(FIN | ACK))
    world.now += 1
    world.received(down(FIN | ACK))
    world.sent(up(ACK))
    assert world.look() == [], "it ends at the next sweep"
    (completed,) = world.sweep(0.7)
    assert numbers(completed) == (5, 3, 100, 300)
    assert completed.figures.flow_end == completed.figures.last_packet == UNIX + 2
    assert completed.flow_start == UNIX
    assert completed.stem == started.stem
    payload = completed.payload()
    assert (payload["inner_src_ip"], payload["inner_src_port"]) == (A4, 5000)
    assert (payload["inner_dst_ip"], payload["inner_dst_port"]) == (SERVER, 80)
    assert world.sweep(200) == []


@pytest.mark.spec("TUNNEL-92")
def test_a_lone_ack_after_closing_opens_nothing_and_neither_do_fin_and_rst(world):
    connect(world)
    world.sent(up(FIN | ACK))
    world.received(down(FIN | ACK))
    world.sweep()
    for flags in (ACK, FIN | ACK, RST, FIN):
        world.sent(up(flags))
    assert len(world.started()) == len(world.completed()) == 1


@pytest.mark.parametrize(("flags", "payload"), [(SYN, b""), (ACK, b"data"), (0, b""), (SYN | ACK, b"")])
def test_other_packets_open_a_flow_in_the_middle_of_a_connection(world, flags, payload):
    world.sent(up(flags, payload))
    assert len(world.started()) == 1


@pytest.mark.spec("TUNNEL-92")
def test_a_repeated_syn_does_not_split_but_one_after_data_does(world):
    world.sent(up(SYN), up(SYN))
    world.received(down(SYN | ACK), down(SYN | ACK))
    world.sent(up(ACK), up(ACK, b"data"))
    assert len(world.started()) == 1
    world.now += 5
    world.sent(up(SYN))
    first, second = world.started()
    assert (first.flow_start, second.flow_start) == (UNIX, UNIX + 5)
    (completed,) = world.sweep(0.5)
    assert numbers(completed) == (4, 2, 4, 0)
    assert completed.figures.flow_end == UNIX + 5
    assert completed.stem == first.stem != second.stem


@pytest.mark.spec("TUNNEL-93")
def test_udp_ends_after_more_than_120_seconds_without_a_packet(world):
    world.sent(udp(A4, SERVER, 5000, 53))
    world.run(60)
    world.received(udp(SERVER, A4, 53, 5000))
    world.run(119)
    assert world.completed() == []
    world.sweep(1)
    assert world.completed() == [], "exactly 120 s"
    (completed,) = world.sweep(1)
    assert numbers(completed) == (1, 1, 2, 2)
    assert completed.figures.last_packet == UNIX + 60
    assert completed.figures.flow_end == UNIX + 60 + 121, "the time of the sweep"


@pytest.mark.spec("TUNNEL-93")
def test_what_the_engine_carried_keeps_a_flow_alive(world):
    flow = world.sent(udp(A4, SERVER, 5000, 53))
    world.run(100)
    world.tunnel.handle_flow_report(flow.token, 7, 700, world.now)
    world.run(120)
    assert world.completed() == []
    (completed,) = world.sweep(1)
    assert numbers(completed) == (8, 0, 702, 0)
    assert completed.figures.last_packet == UNIX + 100


def test_the_engines_reports_count_in_their_direction(world):
    outward = connect(world)
    inward = world.received(down(ACK, b"y"))
    world.tunnel.handle_flow_report(outward.token, 10, 1000, world.now + 3)
    world.tunnel.handle_flow_report(inward.token, 20, 2000, world.now + 2)
    world.now += 3.5
    world.sent(up(RST))
    _, completed = world.sweep(0.5)
    assert numbers(completed) == (13, 22, 1000, 2001)
    assert completed.figures.flow_end == UNIX + 3.5


def test_an_rst_ends_the_flow_at_once_and_counts_and_the_engines_last_report_is_in(world):
    flow = connect(world)
    world.now += 2
    world.received(down(RST))
    assert world.look() == world.started()
    world.tunnel.handle_flow_report(flow.token, 5, 500, world.now - 0.1)
    (completed,) = world.sweep(0.9)
    assert numbers(completed) == (7, 2, 500, 0)
    assert completed.figures.flow_end == completed.figures.last_packet == UNIX + 2
    world.tunnel.handle_flow_report(flow.token, 5, 500, world.now)
    assert world.sweep(1) == []


def test_a_packet_that_was_not_sent_to_the_client_does_not_count(world):
    connect(world)
    assert isinstance(world.back(down(ACK, b"lost")), Deliver)
    world.sent(up(RST))
    _, completed = world.sweep()
    assert numbers(completed) == (3, 1, 0, 0)


def test_packets_for_the_client_never_open_a_flow_nor_change_the_outer_addresses(world):
    world.received(down(SYN), down(ACK, b"data"), udp(SERVER, A4, 53, 5000))
    assert world.look() == []
    world.sent(up(SYN))
    world.path = path(2)
    world.received(down(SYN | ACK))
    world.sweep(200)
    assert len(world.completed()[0].outers) == 1


def test_a_packet_that_belongs_to_no_flow_yet_is_looked_at_again_soon(world):
    ignored = world.sent(up(ACK))
    assert ignored.valid_until <= world.now + 0.1
    unknown = world.received(down(ACK, b"data"))
    assert unknown.valid_until <= world.now + 0.1
    assert connect(world).valid_until == world.now + 1.0


@pytest.mark.spec("TUNNEL-94")
def test_a_change_of_path_is_listed_and_the_seventeenth_splits_the_flow(world):
    world.sent(udp(A4, SERVER, 5000, 53))
    world.now += 1
    world.path = path(2)
    world.sent(udp(A4, SERVER, 5000, 53), udp(A4, SERVER, 5000, 53))
    for number in range(3, 17):
        world.now += 1
        world.path = path(number)
        world.sent(udp(A4, SERVER, 5000, 53))
    assert len(world.started()) == 1
    world.now += 1
    world.path = path(17)
    world.sent(udp(A4, SERVER, 5000, 53))
    assert [len(record.outers) for record in world.started()] == [1, 1]
    (completed,) = world.sweep()
    assert [str(outer.client) for outer in completed.outers] == [f"198.51.100.{n}:52625" for n in range(1, 17)]
    assert [outer.activated for outer in completed.outers] == [UNIX + second for second in range(16)]
    assert {str(outer.gateway) for outer in completed.outers} == {"203.0.113.9:52625"}
    assert numbers(completed) == (17, 0, 34, 0)
    assert completed.figures.flow_end == UNIX + 16
    world.run(122)
    assert len(world.completed()[1].outers) == 1


@pytest.mark.spec("TUNNEL-94")
def test_one_change_and_the_way_back_are_three_entries_in_order(world):
    for number in (1, 2, 1):
        world.path = path(number)
        world.sent(udp(A4, SERVER, 5000, 53))
    world.run(122)
    assert [outer.client.host[-1] for outer in world.completed()[0].outers] == ["1", "2", "1"]
    texts = world.completed()[0].payload()["outers"]
    assert texts[0] == {
        "src_ip": "198.51.100.1",
        "src_port": 52625,
        "dst_ip": "203.0.113.9",
        "dst_port": 52625,
        "path_activated_at": "2026-09-21T14:13:20Z",
    }


def test_after_a_split_late_reports_go_to_the_flow_that_took_its_place(world):
    flow = connect(world)
    world.sent(up(ACK, b"data"))
    world.sent(up(SYN))
    world.tunnel.handle_flow_report(flow.token, 1, 10, world.now)
    (first,) = [record for record in world.sweep(0.3) if record.figures]
    assert first.figures.tx_bytes == 14
    world.tunnel.handle_flow_report(flow.token, 2, 20, world.now)
    world.sent(up(RST))
    (second,) = world.sweep(0.3)
    assert second.figures.tx_bytes == 20
    world.sweep(10)
    assert world.tunnel.flow_log._by_token == {}


@pytest.mark.spec("TUNNEL-95")
def test_a_flow_to_a_name_has_the_real_ip_the_port_after_nat_and_the_name(world):
    world.name(P1, SERVER)
    world.sent(udp(A4, SERVER, 5000, 53))  # takes nothing of the NAT's, so the ports below are the NAT's choice
    for sport in (5000, 5001):
        world.sent(udp(A4, P1, sport, 53))
    second_proxy = "100.96.0.9"
    assert world.assign("db.example", [P1, second_proxy], [SERVER]) == "Active"
    verdict = world.out(udp(A4, second_proxy, 5000, 53))
    assert addresses(verdict.packet) == (A4, SERVER)
    nated = ports(verdict.packet)[0]
    assert nated != 5000
    answer = world.received(udp(SERVER, A4, 53, nated, b"answer"))
    assert answer.token & 1
    last = world.started()[-1].payload()
    assert (last["inner_dst_ip"], last["inner_src_port"], last["domain"]) == (SERVER, nated, "db.example")
    assert "domain" not in world.started()[0].payload()
    world.run(122)
    completed = {record.stem: record for record in world.completed()}[world.started()[-1].stem]
    assert numbers(completed) == (1, 1, 2, 6)


def test_the_session_behind_a_logged_flow_lives_on_the_engines_reports(world):
    world.name(P1, SERVER)
    flow = world.sent(udp(A4, P1, 5000, 53))
    world.received(udp(SERVER, A4, 53, 5000))
    for _ in range(10):
        world.run(100)
        world.tunnel.handle_timeout(world.now)
        world.tunnel.handle_flow_report(flow.token, 1, 1, world.now)
    assert world.tunnel.nat_session_count == 1
    world.run(119)
    world.tunnel.handle_timeout(world.now)
    assert world.tunnel.nat_session_count == 1
    world.run(3)
    world.tunnel.handle_timeout(world.now)
    assert world.tunnel.nat_session_count == 0


def test_what_is_no_tcp_or_udp_to_a_resource_is_never_logged(world):
    world.sent(echo(A4, SERVER, 7), gre(A4, SERVER), udp(A4, GATEWAY4, 5000, 53))
    world.received(echo(SERVER, A4, 7, reply=True), udp(GATEWAY4, A4, 53, 5000))
    world.out(udp(A4, "192.0.2.1", 5000, 53))
    world.tunnel.handle_inner_packet(A, b"\x45nonsense", 0, world.now, world.path)
    assert world.look() == []


def test_without_a_token_nothing_is_logged(world):
    world.cidr("10.1.0.0/16", number=5)
    world.sent(udp(A4, "10.1.0.1", 5000, 53))
    assert world.look() == []


def test_a_renewed_grant_brings_its_own_token_and_a_revoked_one_takes_it_away(world):
    world.sent(udp(A4, SERVER, 5000, 53))
    resource = CidrResource(resource_id(1), ip_network("10.0.0.0/24"))
    world.grant_logged(resource, policy_authorization_id="77777777-0000-4000-8000-00000000000f")
    world.sent(udp(A4, SERVER, 5001, 53))
    ids = [record.attribution.claims.policy_authorization_id[-1] for record in world.started()]
    assert ids == ["1", "f"]
    world.grant(resource)
    world.sent(udp(A4, SERVER, 5002, 53))
    assert len(world.started()) == 2


def test_logging_is_off_at_first_and_when_it_is_switched_off_all_flows_are_closed(world):
    assert Tunnel(now=0.0).flow_log.is_on is False
    world.sent(udp(A4, SERVER, 5000, 53))
    world.now += 3
    world.tunnel.flow_log.switch(on=False, now=world.now)
    (completed,) = world.completed()
    assert completed.figures.flow_end == UNIX + 3
    world.sent(udp(A4, SERVER, 5001, 53))
    world.received(udp(SERVER, A4, 53, 5000))
    assert len(world.look()) == 0


def test_the_end_of_the_gateway_closes_all_flows_including_those_that_wait_for_a_report(world):
    world.sent(udp(A4, SERVER, 5000, 53))
    connect(world)
    world.sent(up(RST))
    world.now += 4
    world.tunnel.flow_log.close_all(world.now)
    reset, live = world.completed()
    assert (reset.figures.flow_end, live.figures.flow_end) == (UNIX, UNIX + 4)


def test_a_wall_clock_that_goes_back_does_not_end_a_flow_before_its_start(world):
    world.sent(udp(A4, SERVER, 5000, 53))
    world.tunnel.flow_log.unix_offset -= 3600
    world.run(122)
    (completed,) = world.completed()
    assert completed.figures.flow_end == completed.figures.last_packet == completed.flow_start == UNIX


def test_a_client_that_uses_every_port_is_logged_up_to_its_limit(world, monkeypatch, caplog):
    monkeypatch.setattr(flow_log, "MAX_FLOWS_PER_CLIENT", 3)
    flows = [world.sent(udp(A4, SERVER, 5000 + number, 53)) for number in range(5)]
    assert all(isinstance(world.out(udp(A4, SERVER, 6000 + number, 53)), Forward) for number in range(3))
    assert len(world.started()) == 3
    assert [flow.token for flow in flows[3:]] == [0, 0]
    assert caplog.text.count("Too many flows") == 1
    world.run(122)
    assert len(world.completed()) == 3
    world.sent(udp(A4, SERVER, 7000, 53))
    assert len(world.started()) == 4


def test_when_no_flow_has_room_verdicts_stand_as_long_as_ever(world, monkeypatch):
    monkeypatch.setattr(flow_log, "MAX_FLOWS", 1)
    world.sent(udp(A4, SERVER, 5000, 53))
    assert world.sent(udp(A4, SERVER, 5001, 53)).valid_until == world.now + 1.0


def test_many_flows_end_in_turns(world, monkeypatch):
    monkeypatch.setattr(flow_log, "CLOSE_BUDGET", 10)
    for number in range(25):
        world.sent(udp(A4, SERVER, 5000 + number, 53))
    world.now += 121
    world.tunnel.handle_timeout(world.now)
    world.tunnel.handle_swept(world.now)
    assert len(world.completed()) == 10
    due = world.tunnel.poll_timeout()
    assert (due.reason, due.at) == ("flow logs", world.now + 0.01)
    for _ in range(2):
        world.now += 0.01
        world.tunnel.handle_timeout(world.now)
    assert len(world.completed()) == 25
    assert {record.figures.flow_end for record in world.completed()} == {UNIX + 121}
    assert world.tunnel.poll_timeout().reason != "flow logs"


def test_without_logging_a_packets_verdict_is_the_same():
    plain, logged = World(), LoggedWorld()
    plain.cidr("10.0.0.0/24")
    for packet in (up(SYN), up(ACK), up(ACK, b"data"), udp(A4, SERVER, 5000, 53), up(FIN)):
        assert plain.out(packet).packet == logged.out(packet).packet
    for packet in (down(ACK, b"data"), udp(SERVER, A4, 53, 5000)):
        assert plain.back(packet).packet == logged.back(packet).packet


def test_attribution_is_of_the_client_and_the_resource_that_admitted_the_packet(world):
    other = CidrResource(resource_id(9), ip_network("10.0.0.7/32"))
    world.grant_logged(other, resource_name="The one server")
    world.sent(udp(A4, SERVER, 5000, 53))
    assert world.started()[0].attribution == attribution(resource_name="The one server")
    assert world.started()[0].source == packed(A4)
    assert ip_address(world.started()[0].destination) == ip_address(SERVER)
