"""From network to client: policy, never a reply."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from fzg.tunnel.events import Deliver
from fzg.tunnel.filters import IcmpFilter, TcpFilter
from fzg.tunnel.resources import CidrResource
from tests.unit.tunnel_world import (
    A4,
    A6,
    B4,
    GATEWAY4,
    GATEWAY6,
    P1,
    SCTP,
    A,
    B,
    C,
    World,
    control,
    echo,
    gre,
    icmp,
    ip,
    packed,
    resource_id,
    tcp,
    udp,
)

CIDR = ip_network("10.0.0.0/24")


@pytest.fixture
def world() -> World:
    world = World()
    world.cidr("10.0.0.0/24", TcpFilter(443, 443))
    world.drain()
    return world


@pytest.mark.spec("TUNNEL-29")
def test_unknown_destinations_are_dropped_without_a_reply(world):
    assert world.dropped(udp("10.0.0.5", "100.64.0.77", 1, 2)) == "NoPeerState"
    assert world.dropped(udp("10.0.0.5", "192.0.2.1", 1, 2)) == "NotAPeer"
    assert world.dropped(icmp("fe80::1", "ff02::16", 143, 0)) == "NotAPeer"
    assert world.drain() == []
    assert world.tunnel.dropped == {"NoPeerState": 1, "NotAPeer": 2}


@pytest.mark.spec("TUNNEL-30")
def test_the_gateways_own_packets_are_delivered_unfiltered(world):
    for own, gateway in ((A4, GATEWAY4), (A6, GATEWAY6)):
        for packet in (udp(gateway, own, 53535, 9), gre(gateway, own), tcp(gateway, own, 22, 1), echo(gateway, own, 3)):
            verdict = world.back(packet)
            assert isinstance(verdict, Deliver)
            assert (verdict.client_id, verdict.packet) == (A, packet)


@pytest.mark.spec("TUNNEL-31")
def test_replies_are_judged_by_the_port_of_the_resource(world):
    good = tcp("10.0.0.5", A4, 443, 55555)
    assert world.delivered(good) == good
    assert world.dropped(tcp("10.0.0.5", A4, 444, 443)) == "NotAllowed"
    assert world.dropped(tcp("10.1.0.5", A4, 443, 443)) == "NotAllowed"


@pytest.mark.spec("TUNNEL-32")
@pytest.mark.parametrize("has_internet", [True, False])
def test_other_clients_cannot_be_heard(world, has_internet):
    if has_internet:
        world.internet()
    world.cidr("100.64.0.0/10", number=9)
    assert world.dropped(udp(B4, A4, 1, 2)) == "NotAllowed"
    assert world.dropped(icmp(B4, A4, 3, 1, payload=udp(A4, "10.0.0.5", 1, 2))) == "NotAllowed"


@pytest.mark.spec("TUNNEL-33")
def test_icmp_errors_pass_whatever_the_filters_say(world):
    error = icmp("203.0.113.1", A4, 3, 1, payload=udp(A4, "10.0.0.5", 1, 2))
    verdict = world.back(error)
    assert isinstance(verdict, Deliver)
    assert verdict.packet == error
    assert verdict.flow is None


@pytest.mark.spec("TUNNEL-34")
def test_protocols_without_a_value_do_not_come_back():
    world = World()
    world.cidr("10.0.0.0/24")
    packets = [
        gre("10.0.0.5", A4),
        ip("10.0.0.5", A4, SCTP, bytes(12)),
        icmp("10.0.0.5", A4, 14, 0),
        icmp("10.0.0.5", A4, 5, 0),
    ]
    for packet in packets:
        assert world.dropped(packet) == "UnsupportedProtocol"
    assert world.delivered(udp("10.0.0.5", A4, 1, 2))


@pytest.mark.spec("TUNNEL-35")
def test_the_internet_answers_from_public_addresses_only():
    world = World()
    world.internet()
    assert world.delivered(udp("8.8.8.8", A4, 53, 2))
    assert world.dropped(udp("10.0.0.5", A4, 53, 2)) == "NotAllowed"


@pytest.mark.spec("TUNNEL-36")
def test_replies_stop_with_the_authorization(world):
    world.cidr("10.5.0.0/24", number=5)
    packet = tcp("10.0.0.5", A4, 443, 55555)
    assert world.delivered(packet)
    world.tunnel.reject(A, resource_id(1), world.now)
    assert world.dropped(packet) == "NotAllowed"
    assert world.delivered(udp("10.5.0.5", A4, 1, 2))


def test_echo_replies_need_an_icmp_filter(world):
    world.cidr("10.5.0.0/24", IcmpFilter(), number=5)
    assert world.delivered(echo("10.5.0.5", A4, 9, reply=True))
    assert world.dropped(echo("10.0.0.5", A4, 9, reply=True)) == "NotAllowed"


def test_a_control_packet_from_the_network_reaches_nobody(world):
    assert world.dropped(control(2)) == "NotAPeer"
    assert world.drain() == []


def test_the_later_of_two_clients_with_one_address_hears(world):
    world.grant(CidrResource(resource_id(1), CIDR, ()), client=C, ipv4=A4, ipv6=A6)
    verdict = world.back(tcp("10.0.0.5", A4, 443, 1))
    assert isinstance(verdict, Deliver)
    assert verdict.client_id == C
    world.cidr("10.0.0.0/24", TcpFilter(443, 443))
    assert world.back(tcp("10.0.0.5", A4, 443, 1)).client_id == A


def test_each_client_hears_only_what_it_may(world):
    world.cidr("10.7.0.0/24", client=B, number=9)
    assert world.back(udp("10.7.0.5", B4, 1, 2)).client_id == B
    assert world.dropped(udp("10.7.0.5", A4, 1, 2)) == "NotAllowed"
    assert world.dropped(tcp("10.0.0.5", B4, 443, 2)) == "NotAllowed"


def test_garbage_from_the_device_is_counted(world):
    assert world.dropped(b"") == "Malformed"
    assert world.dropped(b"\x45" * 30) == "Malformed"
    assert world.dropped(udp("10.0.0.5", A4, 1, 2, fragment=0x2000)) == "Fragment"


def test_new_gateway_addresses_are_exempt_and_those_a_client_was_met_with_stay_so_for_it(world):
    assert world.delivered(udp(GATEWAY4, A4, 1, 2))
    world.tunnel.set_gateway_addresses(packed("100.64.7.7"), packed(GATEWAY6))
    assert world.delivered(udp(GATEWAY4, A4, 1, 2))
    assert world.delivered(udp("100.64.7.7", A4, 1, 2))
    world.tunnel.set_gateway_addresses(packed("100.64.7.8"), packed(GATEWAY6))
    assert world.dropped(udp("100.64.7.7", A4, 1, 2)) == "NotAllowed"
    world.tunnel.forget(A)
    world.cidr("10.0.0.0/8")
    assert world.dropped(udp(GATEWAY4, A4, 1, 2)) == "NotAllowed"
    assert world.delivered(udp("100.64.7.8", A4, 1, 2))


def test_a_forged_proxy_source_is_dropped(world):
    world.dns("db.example")
    world.assign("db.example", [P1], ["10.0.0.1"])
    assert world.dropped(udp(P1, A4, 80, 1)) == "NotAllowed"
    assert world.dropped(icmp(P1, A4, 3, 1, payload=udp(A4, P1, 1, 80))) == "NotAllowed"
