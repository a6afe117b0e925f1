"""Hosts that have a network or an address of their own inside the range of clients' tunnel addresses."""

from __future__ import annotations

import re

import pytest
from gateway_process import portal_in

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

LAN = ("link add lan0 type veth peer name lan1", "link set lan0 up", "link set lan1 up")
RENUMBER = "Renumber that network"


def warnings_of(namespace, start, *commands):
    """What the whole program warns of in a namespace with these networks."""
    namespace.ip(*LAN, *commands)
    with portal_in(namespace) as portal:
        gateway = start(portal=portal)
        gateway.wait_ready()
        assert gateway.terminate() == 0
    return [line for line in gateway.lines if re.match(r"\S+ +WARN", line)]


@pytest.mark.parametrize(
    ("commands", "names", "remedy"),
    [
        (["route add 100.72.0.0/16 dev lan0"], "a route to 100.72.0.0/16 by lan0", RENUMBER),
        (["address add 100.72.3.4/24 dev lan0"], "a route to 100.72.3.0/24 by lan0", RENUMBER),
        (["route add 100.64.0.0/10 dev lan0"], "a route to 100.64.0.0/10 by lan0", RENUMBER),
        (["route add 100.95.255.255 dev lan0"], "a route to 100.95.255.255/32 by lan0", RENUMBER),
        (["route add 100.70.1.2 dev lan0 table 52"], "a route to 100.70.1.2/32 by lan0", RENUMBER),
        (["address add 100.72.3.4/32 dev lan0"], "the address 100.72.3.4 on lan0", "Remove that address"),
        (
            ["address add 100.72.3.4/32 dev lan0", "route add 100.72.3.5 dev lan0"],
            "a route to 100.72.3.5/32 by lan0",
            RENUMBER,
        ),
        (
            ["route add fd00:2021:1111::/64 dev lan0"],
            "a route to fd00:2021:1111::/64 by lan0, which overlaps fd00:2021:1111::/107",
            RENUMBER,
        ),
        (
            [f"route add 100.64.{n}.0/24 dev lan0" for n in range(5)],
            "100.64.0.0/24 by lan0, 100.64.1.0/24 by lan0, 100.64.2.0/24 by lan0 and 2 more",
            RENUMBER,
        ),
    ],
)
def test_an_overlap_is_one_warning_with_network_interface_and_remedy(namespace, start, commands, names, remedy):
    (warning,) = warnings_of(namespace, start, *commands)
    assert names in warning
    assert remedy in warning
    assert "the range of clients' tunnel addresses" in warning


def test_networks_beside_the_range_and_the_ways_to_everywhere_are_no_overlap(namespace, start):
    assert not warnings_of(
        namespace,
        start,
        "address add 100.63.255.1/24 dev lan0",
        "address add 100.96.0.1/11 dev lan0",
        "address add 10.0.0.1/8 dev lan0",
        "route add default via 10.0.0.2",
        "route add 64.0.0.0/2 via 10.0.0.2",
        "route add unreachable 100.64.0.0/10",
        "address add fd00:2021:1111::20:1/107 dev lan0 nodad",
        "route add ::/0 dev lan0",
    )


def test_what_the_gateway_makes_itself_is_no_overlap_not_even_what_a_killed_one_left(namespace, start):
    namespace.ip(
        *LAN,
        "route add 100.64.0.0/11 dev lan0 table 0x2021fd00",
        "route add 100.64.0.0/11 dev lan0 table 0x2021fd01",
        "rule add not fwmark 0xfd002021 lookup 0x2021fd00 priority 100",
    )
    with portal_in(namespace) as portal:
        for _ in range(2):
            gateway = start(portal=portal)
            gateway.wait_ready()
            assert not re.search(r"(?m)^\S+ +WARN", gateway.output)
            gateway.process.send_signal(9)
            gateway.ends()
