"""Which addresses of the host are offered to clients (spec connectivity D3)."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fzg.host.addresses import Assigned, Link, local_addresses, usable

UP, LOOPBACK, RUNNING = 0x1, 0x8, 0x40
LINKS = {1: Link("lo", UP | LOOPBACK | RUNNING), 2: Link("eth0", UP | RUNNING), 9: Link("tun-firezone", UP | RUNNING)}


def chosen(*addresses, links=LINKS, index=2, flags=0):
    assigned = [Assigned(index, ip_address(address), flags) for address in addresses]
    return [str(address) for address in usable(links, assigned, "tun-firezone")]


def test_addresses_of_interfaces_that_are_up_are_taken_in_the_kernels_order():
    assert chosen("192.0.2.9", "10.0.0.7", "2001:db8::2", "fd12::1") == [
        "192.0.2.9", "10.0.0.7", "2001:db8::2", "fd12::1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "address",
    ["127.0.0.2", "169.254.3.4", "100.64.0.1", "100.127.255.9", "::1", "fe80::1", "fd00:2021:1111::1"],
)
def test_loopback_link_local_and_tunnel_addresses_are_not(address):
    assert chosen(address) == []


def test_addresses_just_beside_the_tunnels_ranges_are():
    assert chosen("100.63.255.255", "100.128.0.0", "fd00:2021:1112::1") == [
        "100.63.255.255", "100.128.0.0", "fd00:2021:1112::1",
    ]  # fmt: skip


def test_those_of_loopback_and_of_the_tunnel_are_not_whatever_they_are():
    assert chosen("192.0.2.9", index=1) == chosen("192.0.2.9", index=9) == []
    assert chosen("192.0.2.9", index=77) == []


@pytest.mark.parametrize("flags", [0, UP, RUNNING])
def test_an_interface_that_is_down_or_without_a_carrier_has_none(flags):
    assert chosen("192.0.2.9", links={2: Link("eth0", flags)}) == []


@pytest.mark.parametrize("flags", [0x01, 0x08, 0x20, 0x40])
def test_temporary_duplicate_deprecated_and_tentative_ipv6_addresses_are_not_taken(flags):
    assert chosen("2001:db8::2", flags=flags) == []
    assert chosen("2001:db8::2", flags=0x80) == ["2001:db8::2"]


def test_a_second_ipv4_address_of_a_subnet_is_taken():
    assert chosen("192.0.2.9", flags=0x01) == ["192.0.2.9"]


def test_at_most_eight_of_each_family():
    many = [f"192.0.2.{n}" for n in range(1, 20)] + [f"2001:db8::{n:x}" for n in range(1, 20)]
    assert chosen(*many) == many[:8] + many[19:27]


def test_the_hosts_own_addresses_can_be_listed():
    for address in local_addresses("tun-firezone"):
        assert not address.is_loopback
        assert not address.is_link_local
