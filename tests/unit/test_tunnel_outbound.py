"""From client to network: validation, policy and refusals."""

from __future__ import annotations

import struct

import pytest

from fzg.tunnel.events import Drop, Forward, Reply
from fzg.tunnel.filters import IcmpFilter, TcpFilter, UdpFilter, UnknownFilter
from fzg.tunnel.tunnel import Tunnel
from tests.unit.tunnel_world import (
    A4,
    A6,
    B4,
    B6,
    GATEWAY4,
    GATEWAY6,
    GRE,
    P1,
    SCTP,
    SYN,
    A,
    B,
    World,
    addresses,
    checksums_hold,
    control,
    echo,
    gre,
    icmp,
    ip,
    packed,
    tcp,
    udp,
    v4,
    v6,
)

PROHIBITED4, NETWORK4, PROHIBITED6, NETWORK6 = (3, 13), (3, 0), (1, 1), (1, 3)


@pytest.fixture
def world() -> World:
    """A client that may use 10.0.0.0/24 and 2001:db8::/64 without filters."""
    world = World()
    world.cidr("10.0.0.0/24")
    world.cidr("2001:db8::/64", number=2)
    world.drain()
    return world


def drop_reason(world, packet):
    verdict = world.out(packet)
    return verdict.reason if isinstance(verdict, Drop) else None


# -- 13.1 parsing


@pytest.mark.spec("TUNNEL-1")
def test_packets_up_to_1280_bytes_pass(world):
    assert world.passes(udp(A4, "10.0.0.5", 1, 2, bytes(1280 - 28)))
    assert drop_reason(world, udp(A4, "10.0.0.5", 1, 2, bytes(1281 - 28))) == "Malformed"
    assert world.passes(udp(A6, "2001:db8::5", 1, 2, bytes(1280 - 48)))
    assert drop_reason(world, udp(A6, "2001:db8::5", 1, 2, bytes(1281 - 48))) == "Malformed"


def test_a_total_length_that_differs_from_the_packet_is_malformed(world):
    packet = udp(A4, "10.0.0.5", 1, 2, bytes(12))
    assert world.passes(packet)
    assert drop_reason(world, packet + bytes(20)) == "Malformed"
    assert world.dropped(udp("10.0.0.5", A4, 1, 2, bytes(12)) + bytes(20)) == "Malformed"


@pytest.mark.spec("TUNNEL-3")
def test_ipv4_fragments_are_dropped_without_a_reply(world):
    assert drop_reason(world, udp(A4, "10.0.0.5", 1, 2, fragment=0x2000)) == "Fragment"
    assert drop_reason(world, udp(A4, "10.0.0.5", 1, 2, fragment=185)) == "Fragment"
    assert world.passes(udp(A4, "10.0.0.5", 1, 2, fragment=0x4000))


@pytest.mark.spec("TUNNEL-4")
def test_atomic_ipv6_fragments_pass_and_others_do_not(world):
    inner = udp(A6, "2001:db8::5", 1, 2)[40:]
    assert world.passes(v6(A6, "2001:db8::5", 44, struct.pack("!BBHI", 17, 0, 0, 1) + inner))
    more = v6(A6, "2001:db8::5", 44, struct.pack("!BBHI", 17, 0, 1, 1) + inner)
    assert drop_reason(world, more) == "Fragment"


@pytest.mark.spec("TUNNEL-5")
def test_a_udp_length_below_the_bytes_present_is_malformed(world):
    assert drop_reason(world, v4(A4, "10.0.0.5", 17, struct.pack("!HHHH", 1, 2, 8, 0) + bytes(12))) == "Malformed"
    assert world.passes(v4(A4, "10.0.0.5", 17, struct.pack("!HHHH", 1, 2, 20, 0) + bytes(12)))


@pytest.mark.spec("TUNNEL-6")
def test_icmpv6_in_ipv4_is_malformed(world):
    assert drop_reason(world, v4(A4, "10.0.0.5", 58, bytes(20))) == "Malformed"


@pytest.mark.spec("TUNNEL-7")
def test_a_tcp_data_offset_below_5_is_malformed(world):
    assert drop_reason(world, tcp(A4, "10.0.0.5", 1, 2, data_offset=4)) == "Malformed"


@pytest.mark.spec("TUNNEL-8")
def test_a_wrong_checksum_passes(world):
    packet = bytearray(tcp(A4, "10.0.0.5", 1, 2))
    packet[36] ^= 0xFF
    assert world.passes(bytes(packet))


@pytest.mark.parametrize("packet", [b"", b"\0" * 40, b"\x50" + bytes(40), b"\xff" * 60])
def test_garbage_is_dropped_and_counted(world, packet):
    assert drop_reason(world, packet) == "Malformed"
    assert world.tunnel.dropped["Malformed"] == 1


# -- 13.2 policy


@pytest.mark.spec("TUNNEL-10")
def test_a_foreign_source_is_refused_to_the_sender(world):
    for source, expected in (("100.64.0.9", PROHIBITED4), (B4, PROHIBITED4), ("192.0.2.1", PROHIBITED4)):
        verdict = world.out(udp(source, "10.0.0.5", 1, 2))
        assert isinstance(verdict, Reply)
        assert addresses(verdict.packet) == ("10.0.0.5", source)
        assert (verdict.packet[20], verdict.packet[21]) == expected
    world.cidr("2001:db8::/32", number=8)
    assert world.passes(udp(A6, "2001:db8::5", 1, 2))
    for source in ("fd00:2021:1111::9", "2001:db8::1", "::"):
        assert world.refusal(udp(source, "2001:db8::5", 1, 2)) == PROHIBITED6


@pytest.mark.spec("TUNNEL-11")
def test_the_gateways_own_addresses_are_exempt_from_filters():
    world = World()
    world.cidr("10.0.0.0/24", TcpFilter(443, 443))
    for own, gateway in ((A4, GATEWAY4), (A6, GATEWAY6)):
        assert world.passes(udp(own, gateway, 1, 53535))
        assert world.passes(tcp(own, gateway, 1, 22, SYN))
        assert world.passes(gre(own, gateway))
        assert world.passes(echo(own, gateway, 1))
    assert world.refusal(udp("100.64.0.9", GATEWAY4, 1, 2)) == PROHIBITED4


@pytest.mark.spec("TUNNEL-12")
@pytest.mark.parametrize("with_internet", [False, True])
def test_other_clients_are_out_of_reach(world, with_internet):
    world.cidr("100.64.0.0/10", number=8)
    world.cidr("fd00:2021:1111::/64", number=9)
    world.cidr("10.0.0.0/24", client=B)
    if with_internet:
        world.internet()
    assert world.refusal(udp(A4, B4, 1, 2)) == PROHIBITED4
    assert world.refusal(udp(A4, A4, 1, 2)) == PROHIBITED4
    assert world.refusal(udp(A4, "100.95.255.255", 1, 2)) == PROHIBITED4
    assert world.refusal(udp(A6, B6, 1, 2)) == PROHIBITED6


@pytest.mark.spec("TUNNEL-13")
def test_an_ipv4_destination_without_resource_is_refused():
    world = World()
    world.cidr("10.9.0.0/24")
    packet = udp(A4, "10.0.0.5", 5000, 80, b"longer than eight")
    verdict = world.out(packet)
    assert isinstance(verdict, Reply)
    error = verdict.packet
    assert error[20:22] == bytes(PROHIBITED4)
    assert error[8] == 20
    assert addresses(error) == ("10.0.0.5", A4)
    assert error[28:] == packet[:28]
    assert checksums_hold(error)


@pytest.mark.spec("TUNNEL-14")
def test_an_ipv6_destination_without_resource_is_refused():
    world = World()
    world.cidr("10.9.0.0/24")
    packet = udp(A6, "2001:db8::5", 5000, 80, bytes(1280 - 48))
    verdict = world.out(packet)
    assert isinstance(verdict, Reply)
    error = verdict.packet
    assert len(error) == 1280
    assert error[40:42] == bytes(PROHIBITED6)
    assert error[7] == 20
    assert error[48:] == packet[:1232]
    assert checksums_hold(error)
    short = udp(A6, "2001:db8::5", 5000, 80)
    assert world.out(short).packet[48:] == short


@pytest.mark.spec("TUNNEL-15")
@pytest.mark.parametrize("destination", ["224.0.0.251", "239.255.255.250", "ff02::fb", "ff0e::1"])
def test_multicast_is_dropped_silently(destination):
    world = World()
    world.cidr("0.0.0.0/0")
    world.cidr("::/0", number=2)
    source = A6 if ":" in destination else A4
    assert drop_reason(world, udp(source, destination, 5353, 5353)) == "Multicast"
    assert world.drain() == []


@pytest.mark.spec("TUNNEL-16")
@pytest.mark.parametrize(
    "packet",
    [
        icmp(A4, "10.0.0.5", 3, 3, payload=udp("10.0.0.5", A4, 1, 2)),
        icmp(A4, "10.0.0.5", 11, 0, payload=udp("10.0.0.5", A4, 1, 2)),
        icmp(A4, GATEWAY4, 3, 3, payload=udp(GATEWAY4, A4, 53535, 2)),
        icmp(A6, "2001:db8::5", 1, 4, payload=udp("2001:db8::5", A6, 1, 2)),
        icmp(A6, "2001:db8::5", 2, 0, payload=udp("2001:db8::5", A6, 1, 2)),
        icmp(A6, "2001:db8::5", 3, 1, payload=udp("2001:db8::5", A6, 1, 2)),
        icmp("192.0.2.9", "10.0.0.5", 3, 3, payload=udp("10.0.0.5", A4, 1, 2)),
    ],
)
def test_icmp_errors_of_clients_are_dropped_without_a_reply(world, packet):
    assert drop_reason(world, packet) == "OutboundIcmpError"


def test_an_icmp_error_about_something_unknown_is_plain_icmp():
    world = World()
    world.cidr("10.0.0.0/24", IcmpFilter())
    world.cidr("10.1.0.0/24", TcpFilter(), number=2)
    for embedded in (udp("10.0.0.5", A4, 1, 2)[:23], gre("10.0.0.5", A4)):
        assert world.passes(icmp(A4, "10.0.0.5", 3, 3, payload=embedded))
        assert world.refusal(icmp(A4, "10.1.0.5", 3, 3, payload=embedded)) == PROHIBITED4


@pytest.mark.spec("TUNNEL-17")
def test_an_echo_reply_counts_as_echo():
    world = World()
    world.cidr("10.0.0.0/24", IcmpFilter())
    world.cidr("10.1.0.0/24", UdpFilter(), number=2)
    assert world.passes(echo(A4, "10.0.0.5", 7, reply=True))
    assert world.refusal(echo(A4, "10.1.0.5", 7, reply=True)) == PROHIBITED4
    verdict = world.out(echo(A4, "10.0.0.5", 7, reply=True))
    assert verdict.flow.key == (1, packed(A4), packed("10.0.0.5"), 7, 7)


@pytest.mark.spec("TUNNEL-18")
def test_a_port_range_is_inclusive_and_admits_nothing_else():
    world = World()
    world.cidr("10.0.0.0/24", TcpFilter(20, 100))
    for port in (20, 50, 100):
        assert world.passes(tcp(A4, "10.0.0.5", 1, port))
    refused = [tcp(A4, "10.0.0.5", 50, 19), tcp(A4, "10.0.0.5", 50, 101), udp(A4, "10.0.0.5", 50, 80)]
    for packet in [*refused, echo(A4, "10.0.0.5", 50), gre(A4, "10.0.0.5"), icmp(A4, "10.0.0.5", 13, 0)]:
        assert world.refusal(packet) == PROHIBITED4


@pytest.mark.spec("TUNNEL-19")
def test_no_filters_admit_everything(world):
    packets = [gre(A4, "10.0.0.5"), ip(A4, "10.0.0.5", SCTP, bytes(12)), icmp(A4, "10.0.0.5", 13, 0, payload=bytes(12))]
    for packet in packets:
        assert world.passes(packet)


@pytest.mark.spec("TUNNEL-20")
def test_an_icmp_filter_admits_all_icmp():
    world = World()
    world.cidr("10.0.0.0/24", IcmpFilter())
    world.cidr("2001:db8::/64", IcmpFilter(), number=2)
    assert world.passes(echo(A4, "10.0.0.5", 1))
    assert world.passes(icmp(A4, "10.0.0.5", 13, 0, payload=bytes(12)))
    assert world.passes(icmp(A6, "2001:db8::5", 139, 0))
    assert world.refusal(tcp(A4, "10.0.0.5", 1, 2)) == PROHIBITED4
    assert world.refusal(gre(A4, "10.0.0.5")) == PROHIBITED4


@pytest.mark.spec("TUNNEL-21")
def test_a_filter_without_ports_admits_all_ports():
    world = World()
    world.cidr("10.0.0.0/24", TcpFilter())
    assert world.passes(tcp(A4, "10.0.0.5", 1, 0))
    assert world.passes(tcp(A4, "10.0.0.5", 1, 65535))
    assert world.refusal(udp(A4, "10.0.0.5", 1, 65535)) == PROHIBITED4


@pytest.mark.parametrize("bad", [UnknownFilter(), TcpFilter(100, 20), UdpFilter(-1, 5), TcpFilter(5, 65536)])
def test_a_list_of_bad_filters_admits_nothing(bad):
    world = World()
    world.cidr("10.0.0.0/24", bad)
    for packet in (tcp(A4, "10.0.0.5", 1, 50), udp(A4, "10.0.0.5", 1, 2), echo(A4, "10.0.0.5", 1), gre(A4, "10.0.0.5")):
        assert world.refusal(packet) == PROHIBITED4


@pytest.mark.spec("TUNNEL-22", "TUNNEL-23")
def test_covering_resources_add_up():
    world = World()
    world.cidr("10.0.0.0/8", UdpFilter(53, 53), number=1)
    world.cidr("10.0.0.5/32", TcpFilter(443, 443), number=2)
    dns, https, other = udp(A4, "10.0.0.5", 1, 53), tcp(A4, "10.0.0.5", 1, 443), udp(A4, "10.0.0.5", 1, 54)
    assert world.passes(dns)
    assert world.passes(https)
    assert world.refusal(other) == PROHIBITED4
    world.tunnel.reject(A, "00000000-0000-4000-8000-000000000002", world.now)
    assert world.refusal(https) == PROHIBITED4
    assert world.passes(dns)


@pytest.mark.spec("TUNNEL-24")
def test_filters_of_names_and_networks_do_not_mix():
    world = World()
    world.dns("db.example", UdpFilter(80, 80), number=1)
    world.cidr("10.0.0.0/24", UdpFilter(443, 443), number=2)
    assert world.assign("db.example", [P1], ["10.0.0.1"], number=1) == "Active"
    assert world.passes(udp(A4, "10.0.0.1", 5, 443))
    assert world.refusal(udp(A4, "10.0.0.1", 5, 80)) == PROHIBITED4
    assert world.refusal(udp(A4, P1, 5, 443)) == PROHIBITED4
    assert addresses(world.translated(udp(A4, P1, 5, 80))) == (A4, "10.0.0.1")


@pytest.mark.spec("TUNNEL-25")
def test_the_internet_over_ipv4():
    world = World()
    world.internet()
    for packet in (udp(A4, "1.1.1.1", 1, 53), gre(A4, "1.1.1.1"), echo(A4, "1.1.1.1", 1), icmp(A4, "1.1.1.1", 13, 0)):
        assert world.passes(packet)
    excluded = "10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 127.0.0.1 169.254.1.1 240.0.0.1 255.255.255.255"
    for destination in excluded.split():
        assert world.refusal(udp(A4, destination, 1, 2)) == NETWORK4
    assert world.refusal(udp(A4, "100.127.0.1", 1, 2)) == PROHIBITED4
    for destination in ("172.32.0.1", "172.15.255.255", "0.1.2.3", "100.128.0.1", "100.63.255.255", "198.18.0.1"):
        assert world.passes(udp(A4, destination, 1, 2))


@pytest.mark.spec("TUNNEL-26")
def test_the_internet_over_ipv6():
    world = World()
    world.internet()
    for destination in ("fc00::1", "fdff::1", "fe80::1", "febf::1", "::1", "::ffff:1.2.3.4"):
        assert world.refusal(udp(A6, destination, 1, 2)) == NETWORK6
    for destination in ("2606:4700::1111", "64:ff9b::1", "2002::1", "fec0::1", "::", "::2"):
        assert world.passes(udp(A6, destination, 1, 2))


@pytest.mark.spec("TUNNEL-27")
def test_the_internet_leaves_names_to_their_own_filters():
    world = World()
    world.internet()
    world.dns("db.example", TcpFilter(443, 443))
    world.assign("db.example", [P1], ["10.0.0.1"])
    assert world.refusal(udp(A4, P1, 1, 443)) == PROHIBITED4
    assert addresses(world.translated(tcp(A4, P1, 1, 443))) == (A4, "10.0.0.1")


def test_the_internet_hides_networks_of_the_same_client(world):
    assert world.passes(udp(A4, "10.0.0.5", 1, 2))
    world.internet(number=3)
    assert world.refusal(udp(A4, "10.0.0.5", 1, 2)) == NETWORK4


@pytest.mark.spec("TUNNEL-28")
@pytest.mark.parametrize("hop", [0, 1, 64, 255])
def test_nothing_of_a_packet_to_a_network_changes(world, hop):
    assert world.passes(tcp(A4, "10.0.0.5", 40000, 443, payload=b"abc", ttl=hop, tos=0xB8, options=bytes(4)))
    assert world.passes(udp(A6, "2001:db8::5", 40000, 443, b"abc", hop_limit=hop, traffic_class=0xB8))


def test_the_sentinels_of_clients_have_no_route(world):
    world.internet()
    assert world.refusal(udp(A4, "100.100.111.1", 1, 53)) == PROHIBITED4


def test_a_proxy_address_covered_by_a_network_only_is_unreachable(world):
    world.cidr("100.96.0.0/11", number=7)
    assert world.refusal(udp(A4, P1, 1, 53)) == NETWORK4


def test_packets_of_unknown_clients_are_dropped(world):
    verdict = world.out(udp(A4, "10.0.0.5", 1, 2), client=B)
    assert verdict == Drop("NoPeerState")
    assert world.out(control(2), client=B) == Drop("NoPeerState")


def test_a_short_control_packet_is_an_ordinary_one(world):
    packet = v6("::", "::", 255, bytes(7))
    assert world.refusal(packet) == PROHIBITED6


@pytest.mark.spec("TUNNEL-53")
def test_congestion_experienced_outside_is_carried_inside(world):
    capable = udp(A4, "10.0.0.5", 1, 2, tos=0b10)
    marked = world.out(capable, ecn=3).packet
    assert marked[1] & 3 == 3
    assert checksums_hold(marked)
    assert world.out(capable, ecn=2).packet == capable
    assert world.out(capable, ecn=0).packet == capable
    not_capable = udp(A4, "10.0.0.5", 1, 2)
    assert world.out(not_capable, ecn=3).packet == not_capable
    assert world.out(udp(A6, GATEWAY6, 1, 2, traffic_class=1), ecn=3).packet[1] >> 4 & 3 == 3


def test_refusals_are_capped_at_a_thousand_a_second(world):
    packet = udp(A4, "192.0.2.1", 1, 2)
    verdicts = [type(world.out(packet)) for _ in range(1100)]
    assert verdicts.count(Reply) == 1000
    assert verdicts.count(Drop) == 100
    assert world.passes(udp(A4, "10.0.0.5", 1, 2))
    world.now += 1.0
    assert isinstance(world.out(packet), Reply)


def test_ten_thousand_resources_keep_their_own_filters():
    world = World()
    for number in range(10_000):
        third, fourth = divmod(number, 250)
        world.cidr(f"10.0.{third}.{fourth}/32", UdpFilter(number, number), number=number)
    for number in (0, 1, 4999, 9999):
        third, fourth = divmod(number, 250)
        assert world.passes(udp(A4, f"10.0.{third}.{fourth}", 1, number))
        assert world.refusal(udp(A4, f"10.0.{third}.{fourth}", 1, number + 1)) == PROHIBITED4


def test_many_resources_for_one_network_add_up():
    world = World()
    for number in range(300):
        world.cidr("10.0.0.0/24", UdpFilter(2 * number, 2 * number), number=number)
    for port in range(0, 600, 2):
        assert world.passes(udp(A4, "10.0.0.5", 1, port))
        assert world.refusal(udp(A4, "10.0.0.5", 1, port + 1)) == PROHIBITED4


def test_nothing_is_granted_before_the_gateway_has_addresses():
    tunnel = Tunnel(now=0.0)
    world = World()
    world.tunnel = tunnel
    assert world.cidr("10.0.0.0/24") is False
    assert world.out(udp(A4, "10.0.0.5", 1, 2)) == Drop("NoPeerState")


def test_protocol_numbers_without_ports_are_forwarded_but_not_cached(world):
    verdict = world.out(ip(A4, "10.0.0.5", GRE, b"\0\0\x08\0"))
    assert isinstance(verdict, Forward)
    assert verdict.flow is None
