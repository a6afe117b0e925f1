"""Which addresses the internet resource covers, packet by packet through the gateway's process."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest
from capture import Capture
from gateway_process import inside

from tests.lab.scenario import TUN, Lab
from tests.lab.scripted_portal import wait_until
from tests.unit.tunnel_world import udp

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
]

CLIENT_TUN = "tun-client"
NETWORK, PROHIBITED = "network", "prohibited"
ANSWERS = {(4, NETWORK): (3, 0), (4, PROHIBITED): (3, 13), (6, NETWORK): (1, 3), (6, PROHIBITED): (1, 1)}
EXCLUDED = [
    *("10.0.0.0", "10.1.2.3", "10.255.255.255"),
    *("172.16.0.0", "172.31.255.255"),
    *("192.168.0.0", "192.168.255.255"),
    *("127.0.0.1", "127.255.255.255"),
    *("169.254.0.0", "169.254.169.254", "169.254.255.255"),
    *("240.0.0.0", "250.1.2.3", "255.255.255.255"),
    *("::1", "::ffff:0:0", "::ffff:1.1.1.1"),
    *("fc00::", "fd12:3456::1", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    *("fe80::1", "febf::1"),
]
OF_THE_TUNNEL = [
    *("100.64.0.0", "100.80.1.2", "100.95.255.255"),  # peers
    *("100.96.0.1", "100.127.255.255"),  # stand for names, but none was assigned
    *("fd00:2021:1111::1f:ffff", "fd00:2021:1111:8000::77"),
]
MULTICAST = ["224.0.0.1", "224.0.0.251", "239.255.255.255", "ff02::1", "ff0e::1"]
COVERED = [
    *("0.1.2.3", "1.1.1.1", "9.255.255.255", "11.0.0.0", "126.255.255.255", "128.0.0.1"),
    *("100.63.255.255", "100.128.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
    *("192.0.0.8", "192.0.2.1", "192.167.255.255", "192.169.0.0", "198.18.0.1", "223.255.255.255"),
    *("::2", "64:ff9b::1", "2001:db8::1", "2002::1", "2606:4700::1111", "fbff::1", "fe00::1", "fec0::1"),
]


@pytest.mark.spec("TUNNEL-25", "TUNNEL-26", "TUNNEL-12", "TUNNEL-15")
def test_every_excluded_range_is_refused_with_its_code_and_everything_beside_it_passes():
    expected = dict.fromkeys(EXCLUDED, NETWORK) | dict.fromkeys(OF_THE_TUNNEL, PROHIBITED)
    with Lab(resources=("internet",)) as lab:
        assert lab.client.curl(f"http://{lab.places['portal'].public_ipv4}:8081/").status == 404
        namespace, gateway = lab.client.namespace, lab.places["gateway"].namespace
        own = {4: namespace.address(CLIENT_TUN), 6: namespace.address(CLIENT_TUN, ipv6=True)}
        with Capture(namespace, CLIENT_TUN) as answers, Capture(gateway, TUN) as forwarded:
            send(namespace, own, [*MULTICAST, *COVERED, *expected])
            wait_until(lambda: len(errors(answers)) >= len(expected), f"all refusals, but {errors(answers)}")
        wanted = {text: ANSWERS[ip_address(text).version, name] for text, name in expected.items()}
        assert errors(answers) == {ip_address(text): answer for text, answer in wanted.items()}
        left = {p.destination for p in forwarded.packets if not p.outgoing and p.is_udp(4000)}
        assert {ip_address(each) for each in left} == {ip_address(text) for text in COVERED}
        assert lab.warnings() == []


def send(namespace, own, destinations):
    """One UDP packet to each, past the client's own kernel, which would not route some of them."""
    with inside(namespace):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    with sock:
        for text in destinations:
            version = ip_address(text).version
            ethertype = 0x0800 if version == 4 else 0x86DD
            sock.sendto(udp(own[version], text, 4001, 4000, b"x"), (CLIENT_TUN, ethertype, 0, 0, b""))


def errors(capture):
    """Source, and type and code, of the gateway's ICMP errors, which come from the destination; others are routers'."""
    asked = {ip_address(text) for text in [*MULTICAST, *COVERED, *EXCLUDED, *OF_THE_TUNNEL]}
    return {
        ip_address(p.source): tuple(p.transport[:2])
        for p in list(capture.packets)
        if not p.outgoing and p.protocol in {1, 58} and p.transport[0] in {1, 3} and ip_address(p.source) in asked
    }
