"""The host's network as the gateway changes it, in namespaces; a resource at the other end of a cable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.namespaces import Network, can_make_namespaces

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (can_make_namespaces() and Path("/dev/net/tun").exists()), reason="needs root and /dev/net/tun"
    ),
]

PROCESS = Path(__file__).with_name("host_process.py")
GATEWAY_IPV4, GATEWAY_IPV6 = "10.9.0.1", "fd99::1"
RESOURCE_IPV4, RESOURCE_IPV6 = "10.9.0.2", "fd99::2"
TUNNEL = ("100.64.3.4", "fd00:2021:1111::3:4")

# Echoes every datagram and prints where it came from.
RESOURCE = """
import select, socket, sys
sockets = [socket.socket(f, socket.SOCK_DGRAM) for f in (socket.AF_INET, socket.AF_INET6)]
sockets[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
for s, a in zip(sockets, ("0.0.0.0", "::")):
    s.bind((a, 9000))
print("ready", flush=True)
while True:
    for s in select.select(sockets, [], [])[0]:
        data, peer = s.recvfrom(2000)
        s.sendto(data, peer)
        print(data.decode(), peer[0], flush=True)
"""

OURS = """\
table ip firezone-gateway {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 100.64.0.0/11 oifname != "tun-firezone" masquerade
	}
}
table ip6 firezone-gateway {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip6 saddr fd00:2021:1111::/107 oifname != "tun-firezone" masquerade
	}
}
"""

DOCKER = """\
table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		counter packets 0 bytes 0 jump DOCKER-USER
		iifname "docker0" accept
	}

	chain DOCKER-USER {
		return
	}
}
table ip6 filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
	}
}
"""

FIREWALLD = """\
table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct state invalid drop
		jump policies
	}

	chain policies {
		iifname "eth9" accept
		reject with icmpx admin-prohibited
	}
}
"""

HARMLESS = """\
table inet site {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "eth9" drop
		limit rate over 1000/second drop
		ct state established,related accept
	}
}
"""


class Host:
    """Runs `host_process.py` in the gateway's namespace and asks it to do things."""

    def __init__(self, namespace, *options, wrapper=()):
        self.namespace = namespace
        environment = dict(os.environ, PYTHONPATH=str(PROCESS.parents[2]))
        command = [*namespace.prefix(), *wrapper, sys.executable, str(PROCESS), *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, mode="auto"):
        """Prepare and configure as the gateway does; everything that was said."""
        said = self("prepare", mode)
        configured = self("configure", *TUNNEL)
        notes = [note for note in said["notes"] if not note.startswith("net.core.")]  # fixed in most namespaces
        return notes + configured["notes"], said["warnings"] + configured["warnings"]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


class World:
    def __init__(self, network):
        self.gateway = network.namespace("gateway")
        self.resource = network.namespace("resource")
        network.link(self.gateway, "lan0", self.resource, "eth0")
        self.gateway.ip(f"address add {GATEWAY_IPV4}/24 dev lan0", f"address add {GATEWAY_IPV6}/64 dev lan0 nodad")
        self.gateway.sysctl(  # a new namespace begins with the machine's own
            ipv4__ip_forward=0, ipv4__conf__all__src_valid_mark=0, ipv6__conf__all__forwarding=0
        )
        self.resource.ip(f"address add {RESOURCE_IPV4}/24 dev eth0", f"address add {RESOURCE_IPV6}/64 dev eth0 nodad")
        self.hosts = []
        self.server = subprocess.Popen(
            [*self.resource.prefix(), sys.executable, "-u", "-c", RESOURCE], stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout.readline() == "ready\n"

    def host(self, *options, **more):
        host = Host(self.gateway, *options, **more)
        self.hosts.append(host)
        return host

    def ruleset(self):
        return self.gateway.run("nft", "list", "ruleset").stdout

    def policy(self):
        """Everything of policy routing that a gateway may leave behind."""
        commands = ("ip rule", "ip -6 rule", "ip route show table 0x2021fd00", "ip -6 route show table 0x2021fd00")
        return [self.gateway.run(*command.split(), check=False).stdout for command in commands]

    def sysctl(self, key):
        return self.gateway.run("cat", f"/proc/sys/net/{key}").stdout.strip()

    def seen(self):
        """(original source, source that the resource saw) of its next datagram."""
        return tuple(self.server.stdout.readline().split())

    def close(self):
        for host in self.hosts:
            host.stop()
        self.server.kill()
        self.server.wait(10)
        self.server.stdout.close()


@pytest.fixture
def world():
    with Network() as network:
        made = World(network)
        try:
            yield made
        finally:
            made.close()


CLIENTS = [
    ("100.64.0.9", RESOURCE_IPV4, GATEWAY_IPV4),
    ("100.95.255.250", RESOURCE_IPV4, GATEWAY_IPV4),  # the other half of the range
    ("fd00:2021:1111::9", RESOURCE_IPV6, GATEWAY_IPV6),
    ("fd00:2021:1111::1f:fff0", RESOURCE_IPV6, GATEWAY_IPV6),
]


@pytest.mark.spec("OPS-47")
@pytest.mark.parametrize("options", [(), ("--gevent",)])
def test_packets_of_clients_leave_with_the_gateways_address_and_answers_come_back(world, options):
    host = world.host(*options)
    assert host.start() == ([], [])
    for source, destination, translated in CLIENTS:
        assert host("send", source, destination, 5) == {"answered": source}
        assert world.seen() == (source, translated)
    assert world.ruleset() == OURS
    settings = (
        "ipv4/ip_forward", "ipv4/conf/all/src_valid_mark", "ipv6/conf/all/disable_ipv6",
        "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding",
    )  # fmt: skip
    assert [world.sysctl(key) for key in settings] == ["1", "1", "0", "1", "1"]
    assert host.start() == ([], [])
    assert world.ruleset() == OURS


def test_without_masquerading_resources_see_the_clients_themselves(world):
    world.resource.ip(
        f"route add 100.64.0.0/11 via {GATEWAY_IPV4}", f"route add fd00:2021:1111::/107 via {GATEWAY_IPV6}"
    )
    host = world.host()
    host.start("auto")
    assert host.start("off") == ([], [])
    for source, destination, _ in CLIENTS:
        assert host("send", source, destination, 5) == {"answered": source}
        assert world.seen() == (source, source)
    assert world.ruleset() == ""


@pytest.mark.spec("TUNNEL-83", "TUNNEL-84", "OPS-45")
def test_device_addresses_rules_and_routes_are_those_of_the_specification(world):
    host = world.host()
    assert host.start() == ([], [])
    (device,) = json.loads(world.gateway.run("ip", "-j", "address", "show", "dev", "tun-firezone").stdout)
    assert (device["mtu"], device["txqlen"]) == (1280, 10000)
    assert "UP" in device["flags"]
    assert [(a["family"], a["local"], a["prefixlen"]) for a in device["addr_info"]] == [
        ("inet", "100.64.3.4", 32),
        ("inet6", "fd00:2021:1111::3:4", 128),
    ]
    for family in ("-4", "-6"):
        rules = json.loads(world.gateway.run("ip", "-d", "-j", family, "rule").stdout)
        ours = [rule for rule in rules if rule["priority"] == 100]
        assert len(ours) == 1
        assert ours[0]["not"] is None
        assert (ours[0]["src"], ours[0]["fwmark"], ours[0]["table"]) == ("all", "0xfd002021", "539098368")
        assert ours[0]["protocol"] == "kernel"
    assert "not from all fwmark 0xfd002021 lookup 539098368" in world.policy()[0]
    assert world.policy()[2].split() == ["100.64.0.0/11", "dev", "tun-firezone", "proto", "static"]
    assert world.policy()[3].startswith("fd00:2021:1111::/107 dev tun-firezone proto static")
    assert world.policy()[3].count("\n") == 1


@pytest.mark.spec("OPS-45")
def test_the_hosts_own_networks_stay_reachable_and_marked_sockets_avoid_the_tunnel(world):
    world.gateway.ip(f"route add default via {RESOURCE_IPV4}")
    world.host().start()
    script = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5);"
        f"s.sendto(b'own', ('{RESOURCE_IPV4}', 9000)); print(s.recv(9).decode())"
    )
    assert world.gateway.python(script) == "own\n"
    route = lambda *words: world.gateway.run("ip", "route", "get", *words).stdout
    assert "dev tun-firezone" in route("100.64.5.5")
    assert "dev lan0" in route("100.64.5.5", "mark", "0xfd002021")
    assert "dev lan0" in route("100.96.0.1")  # the range of addresses that clients make up


def test_configuring_again_replaces_addresses_and_restores_what_was_lost(world):
    host = world.host()
    host.start()
    before = world.policy()
    world.gateway.ip(
        "rule del priority 100",
        "route flush table 0x2021fd00",
        "route add 10.77.0.0/16 dev tun-firezone table 0x2021fd00",
    )
    world.gateway.ip("address add 10.1.1.1/32 dev tun-firezone")
    answer = host("configure", "100.64.9.9", "fd00:2021:1111::9:9")
    assert answer == {"ipv4": True, "ipv6": True, "notes": [], "warnings": []}
    assert world.policy() == before
    (device,) = json.loads(world.gateway.run("ip", "-j", "address", "show", "dev", "tun-firezone").stdout)
    assert [a["local"] for a in device["addr_info"]] == ["100.64.9.9", "fd00:2021:1111::9:9"]


@pytest.mark.spec("OPS-46")
@pytest.mark.parametrize("foreign", ["", DOCKER + FIREWALLD])
def test_a_restart_after_sigkill_neither_doubles_nor_leaks(world, foreign):
    world.gateway.nft(foreign)
    rules_before, policy_before = world.ruleset(), world.policy()
    host = world.host()
    host.start()
    rules_running, policy_running = world.ruleset(), world.policy()
    assert rules_running != rules_before
    host.kill()
    host = world.host()
    host.start()
    assert (world.ruleset(), world.policy()) == (rules_running, policy_running)
    host.kill()
    host = world.host()
    host.start()
    assert host("remove") == {"notes": [], "warnings": []}
    assert (world.ruleset(), world.policy()) == (rules_before, policy_before)
    assert host("remove") == {"notes": [], "warnings": []}


def test_a_start_without_masquerading_removes_the_masquerading_of_a_killed_one(world):
    host = world.host()
    host.start("auto")
    host.kill()
    world.host().start("off")
    assert world.ruleset() == ""


@pytest.mark.spec("OPS-47")
@pytest.mark.parametrize("foreign", [DOCKER, FIREWALLD, DOCKER + FIREWALLD], ids=["docker", "firewalld", "both"])
def test_foreign_chains_that_drop_get_two_tagged_accepts_at_their_head(world, foreign):
    world.gateway.nft(foreign)
    before = world.ruleset()
    host = world.host()
    notes, warnings = host.start()
    assert warnings == []
    assert len(notes) == before.count("hook forward")
    for source, destination, translated in CLIENTS:
        assert host("send", source, destination, 5) == {"answered": source}
        assert world.seen() == (source, translated)
    accepts = (
        '\t\tiifname "tun-firezone" accept comment "firezone-gateway"\n'
        '\t\toifname "tun-firezone" accept comment "firezone-gateway"\n'
    )
    lines = []
    for line in before.splitlines(keepends=True):
        lines += [line, accepts] if "hook forward" in line else [line]
    assert _uncounted(world.ruleset()) == "".join(lines) + OURS


def test_foreign_chains_that_only_drop_certain_packets_are_left_alone(world):
    world.gateway.nft(HARMLESS)
    before = world.ruleset()
    assert world.host().start() == ([], [])
    assert world.ruleset() == before + OURS


def test_accepts_that_somebody_else_made_are_not_doubled(world):
    world.gateway.nft(DOCKER)
    for family in ("ip", "ip6"):
        for direction in ("iifname", "oifname"):
            world.gateway.nft(f"insert rule {family} filter FORWARD {direction} tun-firezone counter accept\n")
    before = world.ruleset()
    world.host().start()
    assert world.ruleset() == before + OURS


def test_what_other_tools_flush_or_block_later_is_repaired(world):
    host = world.host()
    host.start()
    assert host("repair") == {"notes": [], "warnings": []}
    before = world.policy()
    world.gateway.nft("flush ruleset\n" + DOCKER)
    for family in ("-4", "-6"):
        world.gateway.run("ip", family, "rule", "del", "priority", "100")
    repaired = host("repair")
    assert (len(repaired["notes"]), repaired["warnings"]) == (2, [])
    assert world.policy() == before
    for source, destination, translated in CLIENTS:
        assert host("send", source, destination, 5) == {"answered": source}
        assert world.seen() == (source, translated)
    assert host("repair") == {"notes": [], "warnings": []}


@pytest.mark.spec("OPS-48")
@pytest.mark.parametrize("foreign", ["", DOCKER + FIREWALLD])
def test_an_ordinary_user_with_net_admin_alone_does_all_of_it(world, foreign):
    world.gateway.nft(foreign)
    before = world.ruleset(), world.policy()
    host = world.host("--only-net-admin")
    assert host("status") == {"uid": ["65534"] * 4, "effective": "0000000000001000"}
    _, warnings = host.start()
    assert warnings == []
    for source, destination, translated in CLIENTS:
        assert host("send", source, destination, 5) == {"answered": source}
        assert world.seen() == (source, translated)
    assert world.ruleset().endswith(OURS)
    assert host("remove") == {"notes": [], "warnings": []}
    assert (_uncounted(world.ruleset()), world.policy()) == before


def test_a_user_without_the_capability_is_told_what_to_do(world):
    host = world.host("--no-capability")
    said = host("prepare", "auto")
    sysctl = [warning for warning in said["warnings"] if "sysctl -w" in warning]
    assert len(sysctl) == 1
    assert "net.ipv4.ip_forward=1" in sysctl[0]
    assert any("iptables -t nat -A POSTROUTING -s 100.64.0.0/11 ! -o tun-firezone" in text for text in said["warnings"])
    assert "iptables" in host("prepare", "on")["error"]
    assert "CAP_NET_ADMIN" in host("configure", *TUNNEL)["error"]


def test_a_read_only_proc_is_one_warning_that_names_the_command(world):
    host = world.host(wrapper=["unshare", "-m", "sh", "-ec", 'mount -o bind,ro /proc/sys /proc/sys; exec "$@"', "sh"])
    _, warnings = host.start()
    assert len(warnings) == 1
    assert "Run: sudo firezone-gateway host-setup" in warnings[0]
    assert "sysctl -w net.ipv4.ip_forward=1 net.ipv4.conf.all.src_valid_mark=1" in warnings[0]
    assert world.ruleset() == OURS


def test_values_that_are_set_already_need_no_writable_proc(world):
    world.gateway.sysctl(
        ipv4__ip_forward=1, ipv4__conf__all__src_valid_mark=1, ipv6__conf__all__forwarding=1,
        ipv6__conf__default__forwarding=1,
    )  # fmt: skip
    host = world.host(wrapper=["unshare", "-m", "sh", "-ec", 'mount -o bind,ro /proc/sys /proc/sys; exec "$@"', "sh"])
    assert host.start() == ([], [])


@pytest.mark.spec("OPS-47")
def test_a_host_without_ipv6_serves_ipv4_and_stays_without_ipv6(world):
    world.gateway.sysctl(ipv6__conf__all__disable_ipv6=1, ipv6__conf__default__disable_ipv6=1)
    host = world.host()
    said = host("prepare", "auto")
    answer = host("configure", *TUNNEL)
    assert (answer["ipv4"], answer["ipv6"]) == (True, False)
    assert said["warnings"] + answer["warnings"] == []
    assert "IPv6 is disabled on this host" in answer["notes"][0]
    assert host("send", "100.64.0.9", RESOURCE_IPV4, 5) == {"answered": "100.64.0.9"}
    assert world.sysctl("ipv6/conf/all/disable_ipv6") == "1"
    rules, rules6, routes, routes6 = world.policy()
    assert "lookup 539098368" in rules
    assert "lookup 539098368" not in rules6
    assert routes
    assert not routes6


def test_without_any_usable_address_the_gateway_says_so_and_stops(world):
    world.gateway.sysctl(ipv6__conf__all__disable_ipv6=1, ipv6__conf__default__disable_ipv6=1)
    error = world.host()("configure", None, TUNNEL[1])["error"]
    assert "neither an IPv4 nor an IPv6 address" in error
    assert TUNNEL[1] in error


def test_a_network_of_the_host_inside_the_range_of_clients_is_a_warning(world):
    world.gateway.ip(
        "route add 100.72.0.0/16 dev lan0", "route add 100.128.0.0/16 dev lan0", "route add default dev lan0"
    )
    warnings = world.host()("prepare", "auto")["warnings"]
    assert len(warnings) == 1
    assert "100.72.0.0/16 by lan0, which overlaps 100.64.0.0/11" in warnings[0]


def test_rules_that_another_gateway_left_behind_are_removed(world):
    for priority, table in ((200, "0x2021fd01"), (300, "0x2021fd02")):
        for family in ("-4", "-6"):
            world.gateway.run(
                "ip", family, "rule", "add", "not", "fwmark", "0xfd002021", "lookup", table, "priority", str(priority)
            )
    world.host().start()
    rules, rules6, *_ = world.policy()
    assert "539098369" not in rules + rules6
    assert "539098370" not in rules + rules6


def _uncounted(ruleset):
    """Counters of foreign rules move while packets flow."""
    words = []
    for word in ruleset.split(" "):
        words.append("0" if word.isdigit() and words and words[-1] in ("packets", "bytes") else word)
    return " ".join(words)
