"""Hosts whose own INPUT chains keep clients from the gateway's DNS server: said once, with the command that opens it.

What is said of each rule set is compared with what the kernel does with a client's packet.
"""

from __future__ import annotations

import contextlib
import itertools
import re

import gevent
import pytest
from gateway_process import inside, portal_in
from gevent import socket
from test_host_network import TUNNEL, Host

from tests.lab.namespaces import Network

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

PORT = 53535
NEW = itertools.count(9)
"""Clients that the kernel's connection tracking has not seen."""
NFT = "nft insert rule {} iifname tun-firezone meta l4proto '{{ tcp, udp }}' th dport 53535 accept"
FIREWALLD = """
table inet firewalld {
  chain filter_INPUT {
    type filter hook input priority 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_INPUT_ZONES
    reject with icmpx admin-prohibited
  }
  chain filter_INPUT_ZONES { goto filter_IN_public; }
  chain filter_IN_public { tcp dport 22 accept; meta l4proto { icmp, ipv6-icmp } accept; }
}
"""
UFW = """
table ip filter {
  chain INPUT { type filter hook input priority 0; policy drop; counter jump ufw-before-input; jump ufw-user-input; }
  chain ufw-before-input { iifname "lo" accept; ct state related,established accept; jump ufw-not-local; }
  chain ufw-not-local { fib daddr type local return; limit rate 3/minute log; drop; }
  chain ufw-user-input { tcp dport 22 accept; }
}
table ip6 filter {
  chain INPUT { type filter hook input priority 0; policy drop; jump ufw6-before-input; }
  chain ufw6-before-input { iifname "lo" accept; ct state related,established accept; }
}
"""


def chain(*rules, policy="drop"):
    body = "; ".join(("iifname lo accept", *rules))
    return f"table inet host {{ chain input {{ type filter hook input priority 0; policy {policy}; {body}; }}; }}"


BLOCKED = {
    "only established": chain("ct state established,related accept"),
    "map of states": chain("ct state vmap { established : accept, related : accept, invalid : drop }"),
    "other ports": chain("tcp dport { 22, 80-90 } accept", "udp dport != 53535 accept"),
    "other networks": chain("ip saddr 10.0.0.0/8 accept", "ip6 saddr fe80::/10 accept"),
    "other interfaces": chain("iifname { eth0, wg0 } accept"),
    "reject": chain("iifname tun-firezone reject", policy="accept"),
    "wildcard": chain('iifname "tun*" drop', policy="accept"),
    "carrier-grade NAT is bogus": chain("ip saddr 100.64.0.0/10 drop", "ip6 saddr fd00::/8 drop", policy="accept"),
    "marks": chain("meta mark 1 accept", "ct status dnat accept"),
}
OPEN = {
    "accepting": chain(policy="accept"),
    "by port": chain("meta l4proto { tcp, udp } th dport 53535 accept"),
    "by range of ports": chain("udp dport 53000-54000 accept", "tcp dport >= 53535 accept"),
    "by sets": chain("udp dport { 53, 53535 } accept", "tcp dport { 22, 50000-60000 } accept"),
    "by interface": chain('iifname { "eth0", "tun-firezone" } accept'),
    "by prefix of the interface": chain('iifname "tun*" accept'),
    "by exclusion": chain('iifname != "eth0" accept'),
    "by map": chain('iifname vmap { "eth0" : drop, "tun-firezone" : accept }'),
    "by network": chain("ip saddr 100.64.0.0/10 accept", "ip6 saddr fd00:2021:1111::/48 accept"),
    "local ones": chain("fib daddr type local accept"),
    "new ones": chain("ct state new udp dport 53535 accept", "ct state new tcp dport 53535 accept"),
    "a limit": chain("limit rate over 1000/second drop", policy="accept"),
}  # fmt: skip
UNKNOWN = {
    "concatenation": chain("iifname . th dport { tun-firezone . 53535 } accept"),
    "sampled": chain("numgen inc mod 1 0 accept"),
}
"""Let in by what is not understood: nothing is claimed."""


@pytest.fixture(scope="module")
def host():
    """The gateway's hands in a namespace without a firewall, echoes on the DNS port of both tunnel addresses."""
    with Network() as network:
        made = Host(network.namespace("gateway"))
        try:
            made.start()
            with echo_servers(made.namespace):
                yield made
        finally:
            made.stop()


@pytest.fixture
def tables(host):
    """Loads rules, and removes them in the end."""
    loaded = []

    def load(rules):
        loaded.extend(re.findall(r"table (\w+ \w+)", rules))
        host.namespace.nft(rules)
        return lambda: [_uncounted(host.namespace.run("nft", "list", "table", *each.split()).stdout) for each in loaded]

    yield load
    for each in loaded:
        host.namespace.run("nft", "delete", "table", *each.split())
    host("repair")


@contextlib.contextmanager
def echo_servers(namespace):
    """Answer on the DNS port of both tunnel addresses."""
    greenlets, sockets = [], []
    for address in TUNNEL:
        with inside(namespace):
            server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((address, PORT))
        sockets.append(server)
        greenlets.append(gevent.spawn(lambda s=server: [s.sendto(*s.recvfrom(2000)) for _ in iter(int, 1)]))
    try:
        yield
    finally:
        gevent.killall(greenlets)
        for server in sockets:
            server.close()


def let_in(host):
    """Whether a client's datagram is answered, per family."""
    answers = []
    number = next(NEW)
    for client, address in zip((f"100.64.0.{number}", f"fd00:2021:1111::{number}"), TUNNEL, strict=True):
        pending = gevent.get_hub().threadpool.spawn(host, "send", client, address, 0.5, PORT)
        answers.append(pending.get()["answered"] == client)
    return answers


def dns_warnings(warnings):
    return [each for each in warnings if "DNS server" in each]


@pytest.mark.parametrize("rules", [*BLOCKED.values(), UFW, FIREWALLD], ids=[*BLOCKED, "ufw", "firewalld"])
def test_a_chain_that_drops_questions_is_one_warning_and_stays_as_it_is(host, tables, rules):
    listing = tables(rules)
    before = listing()
    assert len(dns_warnings(host("repair")["warnings"])) == 1
    assert not all(let_in(host))
    assert listing() == before


@pytest.mark.parametrize("rules", [*OPEN.values(), *UNKNOWN.values(), ""], ids=[*OPEN, *UNKNOWN, "none"])
def test_of_a_chain_that_lets_questions_in_nothing_is_said(host, tables, rules):
    tables(rules)
    assert host("repair")["warnings"] == []
    assert let_in(host) == [True, True]


@pytest.mark.parametrize(
    ("rules", "names", "command"),
    [
        (chain(), ["inet host input"], NFT.format("inet host input")),
        (UFW, ["ip filter INPUT", "ip6 filter INPUT"], "ufw allow in on tun-firezone to any port 53535"),
        (
            FIREWALLD,
            ["inet firewalld filter_INPUT"],
            "firewall-cmd --permanent --add-port=53535/udp --add-port=53535/tcp && firewall-cmd --reload",
        ),
    ],
    ids=["nft", "ufw", "firewalld"],
)
def test_the_warning_names_the_chains_and_the_command_of_the_tool_that_keeps_them(host, tables, rules, names, command):
    tables(rules)
    (warning,) = dns_warnings(host("repair")["warnings"])
    assert f" {' and '.join(names)} drop" in warning
    assert warning.endswith(f"Run as root: {command}")


def test_the_command_opens_the_server_and_the_warning_comes_once_per_obstacle(host, tables):
    tables(chain())
    (warning,) = dns_warnings(host("repair")["warnings"])
    assert host("repair")["warnings"] == []
    host.namespace.run("sh", "-c", warning.split("Run as root: ")[1])
    assert host("repair")["warnings"] == []
    assert let_in(host) == [True, True]
    host.namespace.run("nft", "flush", "chain", "inet", "host", "input")
    assert dns_warnings(host("repair")["warnings"]) == [warning]


def test_the_gateway_itself_says_it_in_one_warning_and_leaves_the_chain_alone(namespace, start):
    namespace.nft(chain("ct state established,related accept"))
    before = namespace.run("nft", "list", "table", "inet", "host").stdout
    with portal_in(namespace) as portal:
        gateway = start(portal=portal)
        gateway.wait_ready()
        assert gateway.terminate() == 0
    warnings = [line for line in gateway.lines if re.match(r"\S+ +WARN", line)]
    assert len(warnings) == 1
    assert "The firewall chain inet host input drops what clients ask the gateway's DNS server" in warnings[0]
    assert warnings[0].endswith(NFT.format("inet host input"))
    assert namespace.run("nft", "list", "table", "inet", "host").stdout == before


def _uncounted(listing):
    return re.sub(r"packets \d+ bytes \d+", "", listing)
