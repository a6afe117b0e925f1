"""Grants: expiry, revocation, resynchronisation, updates; and the flows that depend on them."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from fzg.sansio import Deadline
from fzg.tunnel import client as client_module
from fzg.tunnel import tunnel as tunnel_module
from fzg.tunnel.events import ClientEmpty, Deliver, Drop, Forward, Revoked
from fzg.tunnel.filters import TcpFilter, UdpFilter
from fzg.tunnel.resources import CidrResource, DnsResource, InternetResource
from tests.unit.tunnel_world import (
    A4,
    A6,
    ACK,
    B4,
    FIN,
    GATEWAY4,
    P1,
    RST,
    SYN,
    A,
    B,
    C,
    World,
    addresses,
    echo,
    icmp,
    packed,
    resource_id,
    tcp,
    udp,
)

PROHIBITED4 = (3, 13)
R1, R2, R3, R9 = (resource_id(number) for number in (1, 2, 3, 9))
TO1, TO2 = udp(A4, "10.1.0.1", 1, 2), udp(A4, "10.2.0.1", 1, 2)


@pytest.fixture
def world() -> World:
    """A holds r1 (10.1.0.0/16) and r2 (10.2.0.0/16), B holds r3 (10.3.0.0/16)."""
    world = World()
    world.cidr("10.1.0.0/16", number=1)
    world.cidr("10.2.0.0/16", number=2)
    world.cidr("10.3.0.0/16", number=3, client=B)
    world.drain()
    world.events.clear()
    return world


# -- 13.6


@pytest.mark.spec("TUNNEL-71")
def test_resources_expire_one_by_one(world):
    world.tunnel.set_expiry(A, R1, world.now + 10, world.now)
    world.run(9)
    assert world.passes(TO1)
    world.run(2)
    assert world.refusal(TO1) == PROHIBITED4
    assert world.passes(TO2)
    assert not any(isinstance(event, ClientEmpty) for event in world.events)


def test_a_packet_at_the_deadline_is_refused_without_waiting_for_the_tick(world):
    world.tunnel.set_expiry(A, R1, world.now + 0.5, world.now)
    world.now += 0.5
    assert world.refusal(TO1) == PROHIBITED4
    assert world.dropped(udp("10.1.0.1", A4, 1, 2)) == "NotAllowed"


@pytest.mark.spec("TUNNEL-72")
def test_an_expiry_in_the_past_is_accepted_and_means_refused():
    world = World()
    assert world.cidr("10.1.0.0/16", expires=world.now - 5) is True
    world.run(1.0)
    assert ClientEmpty(A) in world.events
    assert world.out(TO1) == Drop("NoPeerState")


@pytest.mark.spec("TUNNEL-73")
def test_the_last_rejection_forgets_the_client_at_once(world):
    world.tunnel.reject(A, R1, world.now)
    assert world.drain() == [Revoked(A)]
    world.tunnel.reject(A, R2, world.now)
    assert world.drain() == [Revoked(A), ClientEmpty(A)]
    assert world.out(TO1) == Drop("NoPeerState")
    assert world.dropped(udp("10.1.0.1", A4, 1, 2)) == "NoPeerState"
    world.tunnel.reject(A, R2, world.now)
    world.tunnel.reject(C, R2, world.now)
    world.tunnel.reject(B, R9, world.now)
    assert world.drain() == []


def test_any_rejection_forgets_a_client_that_a_resynchronisation_left_empty(world):
    world.tunnel.retain({}, world.now)
    world.drain()
    world.tunnel.reject(A, R9, world.now)
    assert world.drain() == [Revoked(A), ClientEmpty(A)]


@pytest.mark.spec("TUNNEL-74")
def test_a_resynchronisation_keeps_only_what_is_listed(world):
    world.tunnel.retain({A: {R1: world.now + 10}, C: {R9: None}}, world.now)
    assert world.drain() == [Revoked(A), Revoked(B)]
    assert world.passes(TO1)
    assert world.refusal(TO2) == PROHIBITED4
    assert world.refusal(udp(B4, "10.3.0.1", 1, 2), client=B) == PROHIBITED4
    world.run(1.0)
    assert ClientEmpty(B) in world.events
    assert world.tunnel.client_count == 1
    world.run(10)
    assert ClientEmpty(A) in world.events
    assert ClientEmpty(C) not in world.events


def test_a_resynchronisation_that_changes_nothing_leaves_flows_alone(world):
    expires = world.now + 100
    world.tunnel.set_expiry(A, R1, expires, world.now)
    world.drain()
    world.tunnel.retain({A: {R1: expires, R2: None}, B: {R3: None}}, world.now)
    assert world.drain() == []
    world.tunnel.retain({A: {R1: expires + 50, R2: None}, B: {R3: None}}, world.now)
    assert world.drain() == []
    world.tunnel.retain({A: {R1: expires - 50, R2: None}, B: {R3: None}}, world.now)
    assert world.drain() == [Revoked(A)]


def test_earlier_grants_outlive_the_next_one(world):
    world.cidr("10.9.0.0/16", number=9)
    for packet in (TO1, TO2, udp(A4, "10.9.0.1", 1, 2)):
        assert world.passes(packet)


@pytest.mark.spec("TUNNEL-76")
def test_an_updated_resource_brings_filters_and_nothing_else(world):
    world.tunnel.update_filters(CidrResource(R1, ip_network("10.77.0.0/16"), (UdpFilter(53, 53),)))
    assert world.drain() == [Revoked(A)]
    assert world.refusal(TO1) == PROHIBITED4
    assert world.passes(udp(A4, "10.1.0.1", 1, 53))
    assert world.refusal(udp(A4, "10.77.0.1", 1, 53)) == PROHIBITED4
    world.tunnel.update_filters(CidrResource(R1, ip_network("10.1.0.0/16"), ()))
    assert world.passes(TO1)
    world.drain()
    world.tunnel.update_filters(CidrResource(R1, ip_network("10.1.0.0/16"), ()))
    world.tunnel.update_filters(CidrResource(R9, ip_network("10.1.0.0/16"), ()))
    assert world.drain() == []


def test_updated_filters_reach_names_too():
    world = World()
    world.dns("*.example", UdpFilter(80, 80))
    world.assign("db.example", [P1], ["10.0.0.1"])
    world.translated(udp(A4, P1, 1, 80))
    world.tunnel.update_filters(DnsResource(R2, "*.other", (TcpFilter(80, 80),)))
    assert world.refusal(udp(A4, P1, 1, 80)) == PROHIBITED4
    assert world.translated(tcp(A4, P1, 1, 80))
    assert world.assign("web.example", [P1], ["10.0.0.1"]) == "Active"


@pytest.mark.spec("TUNNEL-77")
def test_new_tunnel_addresses_begin_anew(world):
    world.grant(CidrResource(R9, ip_network("10.9.0.0/16")), ipv4="100.64.0.44", ipv6=A6)
    assert Revoked(A) in world.drain()
    assert world.passes(udp("100.64.0.44", "10.9.0.1", 1, 2))
    assert world.refusal(udp("100.64.0.44", "10.1.0.1", 1, 2)) == PROHIBITED4
    assert world.refusal(udp(A4, "10.9.0.1", 1, 2)) == PROHIBITED4
    assert world.dropped(udp("10.9.0.1", A4, 1, 2)) == "NoPeerState"


# -- chapter 5


def test_a_renewed_grant_replaces_filters_and_expiry_but_not_the_network(world):
    renewed = CidrResource(R1, ip_network("10.88.0.0/16"), (UdpFilter(2, 2),))
    assert world.grant(renewed, expires=world.now + 5)
    assert world.drain() == [Revoked(A)]
    assert world.passes(TO1)
    assert world.refusal(udp(A4, "10.1.0.1", 1, 3)) == PROHIBITED4
    assert world.refusal(udp(A4, "10.88.0.1", 1, 2)) == PROHIBITED4
    world.run(6)
    assert world.refusal(TO1) == PROHIBITED4
    assert world.grant(renewed, expires=world.now + 100)
    assert world.passes(udp(A4, "10.88.0.1", 1, 2))


def test_a_longer_grant_leaves_flows_alone(world):
    world.cidr("10.1.0.0/16", number=1, expires=world.now + 100)
    assert world.drain() == [Revoked(A)]
    world.cidr("10.1.0.0/16", number=1, expires=world.now + 200)
    world.cidr("10.1.0.0/16", number=1, expires=None)
    assert world.drain() == []


def test_a_resource_that_changes_its_kind_stays_what_it_was(world):
    assert world.grant(DnsResource(R1, "*.example", ()), expires=world.now + 5)
    assert world.passes(TO1)
    assert world.assign("db.example", [P1], ["10.0.0.1"], number=1) == "Inactive"
    world.run(6)
    assert world.refusal(TO1) == PROHIBITED4


def test_the_internet_voids_flows_of_networks(world):
    world.internet(number=9)
    assert world.drain() == [Revoked(A)]


def test_an_expired_internet_gives_networks_back(world):
    world.internet(number=9, expires=world.now + 5)
    assert world.refusal(TO1) == (3, 0)
    world.now += 5
    assert world.passes(TO1)


def test_set_expiry_of_unknown_pairs_does_nothing(world):
    world.tunnel.set_expiry(C, R1, 0.0, world.now)
    world.tunnel.set_expiry(A, R3, 0.0, world.now)
    assert world.drain() == []
    world.run(2)
    assert world.tunnel.client_count == 2


def test_a_clock_that_goes_forward_takes_expiries_along(world):
    world.tunnel.set_expiry(A, R1, world.now + 100, world.now)
    world.drain()
    for ignored in (0.9, -50.0, 0.0):
        world.tunnel.handle_clock_step(ignored)
    assert world.drain() == []
    world.tunnel.handle_clock_step(60.0)
    assert world.drain() == [Revoked(A)]
    world.run(39)
    assert world.passes(TO1)
    world.run(1.5)
    assert world.refusal(TO1) == PROHIBITED4
    assert world.passes(TO2)


def test_a_clock_that_goes_forward_ends_clients_in_time():
    world = World()
    world.cidr("10.1.0.0/16", expires=world.now + 100)
    world.tunnel.handle_clock_step(60.0)
    world.run(39)
    assert ClientEmpty(A) not in world.events
    world.run(2)
    assert ClientEmpty(A) in world.events


def test_a_clock_step_leaves_sessions_alone():
    world = World()
    world.dns("*.example", expires=world.now + 10_000)
    world.assign("db.example", [P1], ["10.0.0.1"])
    world.translated(udp(A4, P1, 1, 80))
    world.tunnel.handle_clock_step(3000.0)
    world.run(30)
    assert world.tunnel.nat_session_count == 1


def test_forgetting_is_silent(world):
    world.tunnel.forget(A)
    world.tunnel.forget(C)
    assert world.drain() == [Revoked(A)]
    assert world.out(TO1) == Drop("NoPeerState")


def test_a_client_holds_a_limited_number_of_resources(world, monkeypatch):
    monkeypatch.setattr(client_module, "MAX_AUTHORIZATIONS", 3)
    assert world.cidr("10.9.0.0/16", number=9) is True
    assert world.cidr("10.10.0.0/16", number=10) is False
    assert world.cidr("10.9.0.0/16", number=9, expires=world.now + 1) is True


def test_there_is_a_limited_number_of_clients(world, monkeypatch):
    monkeypatch.setattr(tunnel_module, "MAX_CLIENTS", 2)
    assert world.grant(CidrResource(R1, ip_network("10.1.0.0/16")), client=C, ipv4="100.64.9.9", ipv6="::9") is False
    assert world.cidr("10.9.0.0/16", number=9) is True


# -- time


def test_nobody_to_look_after_means_no_deadline():
    world = World()
    assert world.tunnel.poll_timeout() is None
    world.now += 50
    world.cidr("10.1.0.0/16")
    assert world.tunnel.poll_timeout() == Deadline(world.now + 1.0, "tunnel housekeeping")
    world.tunnel.reject(A, R1, world.now)
    assert world.tunnel.poll_timeout() is None


def test_housekeeping_runs_once_a_second(world):
    assert world.tunnel.poll_timeout().at == world.now + 1.0
    world.tunnel.handle_timeout(world.now + 0.5)
    assert world.tunnel.poll_timeout().at == world.now + 1.0
    world.tunnel.handle_timeout(world.now + 1.2)
    assert world.tunnel.poll_timeout().at == world.now + 2.2


# -- flows


def flow(verdict):
    assert isinstance(verdict, Forward | Deliver), verdict
    return verdict.flow


def test_a_flow_to_a_network_holds_for_a_second(world):
    made = flow(world.out(TO1))
    assert made.key == (17, packed(A4), packed("10.1.0.1"), 1, 2)
    assert (made.rewrite, made.token) == (None, 0)
    assert made.valid_until == world.now + 1.0
    made = flow(world.back(udp("10.1.0.1", A4, 2, 1)))
    assert made.key == (17, packed("10.1.0.1"), packed(A4), 2, 1)
    assert made.valid_until == world.now + 1.0


def test_a_flow_ends_with_the_grant_that_admits_it(world):
    world.tunnel.set_expiry(A, R1, world.now + 0.25, world.now)
    assert flow(world.out(TO1)).valid_until == world.now + 0.25
    assert flow(world.back(udp("10.1.0.1", A4, 2, 1))).valid_until == world.now + 0.25
    assert flow(world.out(TO2)).valid_until == world.now + 1.0


def test_flows_of_names_carry_the_rewrite():
    world = World()
    world.dns("*.example", expires=World().now + 100)
    world.assign("db.example", [P1, "100.96.0.2"], ["10.0.0.1"])
    world.out(tcp(A4, P1, 5000, 80))
    out = flow(world.out(tcp(A4, "100.96.0.2", 5000, 80)))
    assert out.key == (6, packed(A4), packed("100.96.0.2"), 5000, 80)
    assert out.rewrite == (packed("10.0.0.1"), 5001)
    back = flow(world.back(tcp("10.0.0.1", A4, 80, 5001)))
    assert back.key == (6, packed("10.0.0.1"), packed(A4), 80, 5001)
    assert back.rewrite == (packed("100.96.0.2"), 5000)
    assert out.token
    assert back.token
    assert out.token != back.token


@pytest.mark.parametrize("flags", [SYN, SYN | ACK, FIN | ACK, RST, RST | ACK])
def test_packets_that_change_a_session_are_never_cached(world, flags):
    assert flow(world.out(tcp(A4, "10.1.0.1", 1, 2, flags))) is None
    assert flow(world.back(tcp("10.1.0.1", A4, 2, 1, flags))) is None
    assert flow(world.out(tcp(A4, GATEWAY4, 1, 2, flags))) is None
    world.dns("*.example", number=9)
    world.assign("db.example", [P1], ["10.0.0.1"], number=9)
    assert flow(world.out(tcp(A4, P1, 1, 2, flags))) is None
    assert flow(world.back(tcp("10.0.0.1", A4, 2, 1, flags))) is None


def test_tcp_data_and_echo_are_cached(world):
    assert flow(world.out(tcp(A4, "10.1.0.1", 1, 2, ACK, b"x"))) is not None
    assert flow(world.out(echo(A4, "10.1.0.1", 9))).key == (1, packed(A4), packed("10.1.0.1"), 9, 9)
    assert flow(world.out(udp(A4, GATEWAY4, 1, 53535))) is not None
    assert flow(world.back(udp(GATEWAY4, A4, 53535, 1))) is not None


def test_what_has_no_ports_is_not_cached(world):
    assert flow(world.out(icmp(A4, "10.1.0.1", 13, 0))) is None
    assert flow(world.back(icmp("203.0.113.1", A4, 3, 1, payload=TO1))) is None


def test_every_narrowing_revokes_before_the_next_packet(world):
    narrowings = [
        lambda: world.tunnel.set_expiry(A, R1, world.now + 10, world.now),
        lambda: world.tunnel.update_filters(CidrResource(R1, ip_network("10.1.0.0/16"), (UdpFilter(2, 2),))),
        lambda: world.tunnel.set_gateway_addresses(packed("100.64.0.200"), None),
        lambda: world.tunnel.handle_clock_step(2.0),
        lambda: world.tunnel.reject(A, R2, world.now),
        lambda: world.tunnel.retain({}, world.now),
    ]
    for narrow in narrowings:
        world.drain()
        narrow()
        assert Revoked(A) in world.drain()


@pytest.mark.parametrize("renew", ["grant", "init", "expiry"])
def test_an_internet_resource_that_comes_back_before_a_tick_saw_its_end_voids_what_networks_let_pass(world, renew):
    world.internet(number=9, expires=world.now + 0.2)
    world.drain()
    world.now += 0.3
    assert world.passes(TO1), "the network is consulted again"
    world.drain()
    later = world.now + 1000
    if renew == "grant":
        world.tunnel.grant(A, packed(A4), packed(A6), InternetResource(R9), later, world.now)
    elif renew == "init":
        world.tunnel.retain({A: {R1: None, R2: None, R9: later}, B: {R3: None}}, world.now)
    else:
        world.tunnel.set_expiry(A, R9, later, world.now)
    assert world.drain() == [Revoked(A)]
    assert world.refusal(TO1) == (3, 0)


def test_an_internet_resource_that_is_renewed_in_time_voids_nothing(world):
    world.internet(number=9, expires=world.now + 10)
    world.drain()
    world.tunnel.set_expiry(A, R9, world.now + 1000, world.now)
    assert world.drain() == []


def test_taking_over_an_address_revokes_the_previous_owner(world):
    world.grant(CidrResource(R9, ip_network("10.9.0.0/16")), client=C, ipv4=A4, ipv6=A6)
    assert Revoked(A) in world.drain()
    world.tunnel.forget(C)
    assert world.dropped(udp("10.1.0.1", A4, 2, 1)) == "NoPeerState"
    world.cidr("10.1.0.0/16", number=1)
    assert addresses(world.delivered(udp("10.1.0.1", A4, 2, 1))) == ("10.1.0.1", A4)


def test_the_previous_owner_of_an_address_takes_nothing_along(world):
    world.grant(CidrResource(R9, ip_network("10.9.0.0/16")), client=C, ipv4=A4, ipv6=A6)
    world.tunnel.forget(A)
    verdict = world.back(udp("10.9.0.1", A4, 2, 1))
    assert isinstance(verdict, Deliver)
    assert verdict.client_id == C
