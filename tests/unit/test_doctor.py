"""Each of doctor's checks, over hosts that are only described."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from ipaddress import ip_address

import pytest

from fzg.commands import connection
from fzg.commands import doctor as doctor_command
from fzg.commands.doctor import live_from
from fzg.host.facts import Disk, HostFacts, TunNode, Unreadable, Way
from fzg.host.holders import Listener, Process
from fzg.host.input_chains import Obstacle
from fzg.host.nftables import Blocked, Survey
from fzg.host.reach import Answer, Portal
from fzg.ops.doctor import Live, Plan, Seen, State, examine
from fzg.wire.endpoint import Endpoint

NET_ADMIN = 1 << 12
GATEWAY = Process(77, "firezone-gateway")
SOMEBODY = Process(5, "nginx")
GOOD_DISK = Disk("/var/lib/firezone", 1 << 30, 100_000, read_only=False, no_exec=False, writable=True)
WALL = 1_795_437_862.0  # in 2026
HOST = HostFacts(
    interface="tun-firezone",
    kernel="6.1.0-9-amd64",
    uid=0,
    capabilities=(1 << 41) - 1,
    executable="/usr/bin/firezone-gateway",
    tun=TunNode(0, driver=True, can_make=False),
    addresses=(ip_address("192.0.2.7"),),
    ways={socket.AF_INET: Way("192.0.2.7", 1500), socket.AF_INET6: Way("2001:db8::7", 1500)},
    default_interfaces=("eth0",),
    sysctls={
        "net.ipv4.ip_forward": "1",
        "net.ipv4.conf.all.src_valid_mark": "1",
        "net.ipv6.conf.all.disable_ipv6": "0",
        "net.ipv6.conf.all.forwarding": "1",
        "net.ipv6.conf.default.forwarding": "1",
        "net.core.rmem_max": "16777216",
        "net.core.wmem_max": "4194304",
        "net.ipv4.conf.all.rp_filter": "0",
    },
    firewall=Survey((), (), ()),
    nameservers=("192.0.2.53",),
    disks={"state": GOOD_DISK, "temporary": GOOD_DISK._replace(path="/tmp")},
    wall=WALL,
)
PLAN = Plan(
    udp_port=52625,
    health_address="0.0.0.0",
    health_port=8080,
    token_source="the variable FIREZONE_TOKEN",
    identity="0123456789abcdef",
    identity_source="FIREZONE_ID",
)
PORTAL = Portal(
    "portal.test", 443, secure=True, addresses=("192.0.2.1",), trust="Certificates are checked against X.", ahead=0.2
)
LIVE = Live(pid=77, portal_connected=True, relays=(("192.0.2.9:3478", True),), clients=3)
RUNNING = {"link": "tun", "tun_holder": GATEWAY, "udp": (Listener("0.0.0.0", GATEWAY),)}
RUNNING |= {"health": (Listener("0.0.0.0", GATEWAY),), "firewall": Survey(("ip", "ip6"), (), ())}


def look(live=None, live_problem="", stuck="", portal=PORTAL, stun=(), plan=None, **host):
    """The checks by name, of a good host with these differences."""
    sysctls = HOST.sysctls | host.pop("sysctls", {})
    disks = HOST.disks | host.pop("disks", {})
    facts = replace(HOST, **host, sysctls=sysctls, disks=disks)
    seen = Seen(
        host=facts,
        plan=replace(PLAN, **plan or {}),
        portal=portal,
        stun=tuple(stun),
        live=live,
        live_problem=live_problem,
        stuck=stuck,
    )
    checks = list(examine(seen))
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert all(check.remedy or check.state in (State.OK, State.UNKNOWN) for check in checks)
    assert not any("\n" in check.seen + check.remedy or check.seen.endswith(".") for check in checks)
    return {check.name: check for check in checks}


def states(checks):
    return {name: check.state for name, check in checks.items() if check.state is not State.OK}


def test_a_good_host_before_the_start():
    assert states(look()) == {"portal-login": State.UNKNOWN, "udp-outbound": State.UNKNOWN}


def test_a_good_host_with_its_gateway():
    assert states(look(LIVE, **RUNNING)) == {}


def test_an_ordinary_user_beside_a_gateway_sees_no_failures():
    """What only root may read is unknown."""
    checks = look(
        live_problem="/run/firezone-gateway/control.sock is not yours to use: ask as root",
        uid=1000,
        capabilities=0,
        link="tun",
        udp=(Listener("0.0.0.0", None),),
        health=(Listener("0.0.0.0", None),),
        firewall=Unreadable("Operation not permitted"),
        disks={"state": GOOD_DISK._replace(writable=False)},
        token_file=Unreadable("Permission denied"),
        plan={"token_source": ""},
    )
    assert set(states(checks).values()) == {State.UNKNOWN}
    assert checks["tun-interface"].remedy == checks["masquerade"].remedy == checks["udp-port"].remedy == "ask as root"


@pytest.mark.parametrize(
    ("kernel", "state"),
    [("3.10.0-1160.el7", "fail"), ("4.9.0", "warn"), ("4.18.0-553.el8", "ok"), ("6.18.4", "ok"), ("odd", "unknown")],
)
def test_kernel(kernel, state):
    assert look(kernel=kernel)["kernel"].state == state


@pytest.mark.parametrize(
    ("host", "state", "remedy"),
    [
        ({"uid": 0}, "ok", ""),
        ({"uid": 9, "capabilities": NET_ADMIN}, "ok", ""),
        ({"uid": 9, "capabilities": 0}, "fail", "sudo setcap cap_net_admin+eip /usr/bin/firezone-gateway (or start"),
        ({"uid": 9, "capabilities": 0, "nosuid": True}, "fail", "move the file to one that is not, then: sudo setcap"),
        ({"uid": 9, "capabilities": 0, "no_new_privileges": True}, "fail", "AmbientCapabilities=CAP_NET_ADMIN"),
        ({"uid": 0, "capabilities": 0, "container": "docker"}, "fail", "--cap-add NET_ADMIN --device /dev/net/tun"),
        ({"uid": 0, "capabilities": 0, "container": "lxc"}, "fail", "lxc.cgroup2.devices.allow: c 10:200 rwm"),
    ],
)
def test_privilege(host, state, remedy):
    check = look(**host)["privilege"]
    assert check.state == state
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("node", "container", "state", "remedy"),
    [
        (TunNode(0, True, False), "", "ok", ""),
        (TunNode(errno.ENOENT, True, True), "", "warn", "mknod -m 0666 /dev/net/tun c 10 200"),
        (TunNode(errno.ENOENT, True, False), "", "fail", "sudo mkdir -p /dev/net && sudo mknod"),
        (TunNode(errno.ENOENT, False, False), "", "fail", "sudo modprobe tun && (sudo mkdir"),
        (TunNode(errno.ENOENT, True, False), "lxc", "fail", "lxc.mount.entry: /dev/net/tun dev/net/tun none bind"),
        (TunNode(errno.ENOENT, True, False), "podman", "fail", "--device /dev/net/tun"),
        (TunNode(errno.ENODEV, False, False), "", "fail", "sudo modprobe tun"),
        (TunNode(errno.EACCES, True, False), "", "fail", "sudo chmod 0666 /dev/net/tun"),
        (TunNode(errno.EPERM, True, False), "lxc", "fail", "rwm"),
        (TunNode(errno.EIO, True, False), "", "fail", "mknod"),
    ],
)
def test_tun_device(node, container, state, remedy):
    check = look(tun=node, container=container)["tun-device"]
    assert check.state == state
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("host", "live", "state", "said"),
    [
        ({"link": None}, None, "ok", "is free"),
        ({"link": "tun", "tun_holder": GATEWAY}, LIVE, "ok", "the running gateway's, pid 77"),
        ({"link": "tun", "tun_holder": GATEWAY}, None, "warn", "held by firezone-gateway (pid 77)"),
        ({"link": "bridge"}, None, "fail", "an interface of another kind (bridge)"),
        ({"link": "tun"}, None, "warn", "no process of this host's holds it"),
        ({"link": "tun", "uid": 9}, None, "unknown", "only root sees who holds it"),
        ({"link": None}, LIVE, "warn", "it was deleted"),
    ],
)
def test_tun_interface(host, live, state, said):
    check = look(live, **host)["tun-interface"]
    assert check.state == state
    assert said in check.seen


@pytest.mark.parametrize(
    ("plan", "host", "state", "said"),
    [
        ({}, {}, "ok", "given by the variable FIREZONE_TOKEN"),
        ({"token_source": "", "token_problem": "the token has characters that no token has"}, {}, "fail", "characters"),
        ({"token_source": ""}, {}, "fail", "the systemd credential FIREZONE_TOKEN"),
        ({"token_source": ""}, {"token_file": 40}, "ok", "/etc/firezone/gateway-token"),
        ({"token_source": ""}, {"token_file": 0}, "fail", "/etc/firezone/gateway-token is empty"),
        ({"token_source": ""}, {"token_file": Unreadable("Permission denied")}, "unknown", "Permission denied"),
        ({"token_source": ""}, RUNNING, "ok", "the gateway that runs has one"),
    ],
)
def test_token(plan, host, state, said):
    check = look(plan=plan, **host)["token"]
    assert check.state == state
    assert said in check.seen


MACHINE = {"identity_source": "/etc/machine-id"}


@pytest.mark.parametrize(
    ("plan", "host", "live", "state", "said"),
    [
        ({}, {}, None, "ok", "01234567… from FIREZONE_ID"),
        (MACHINE, {}, None, "ok", "derived from /etc/machine-id"),
        (MACHINE, {"container": "docker"}, None, "warn", "which all containers of one image share"),
        (MACHINE, {"machine_id_age": 90 * 86_400.0}, None, "warn", "90 days older than the host's SSH keys"),
        (MACHINE, {"machine_id_age": 60.0}, None, "ok", "derived"),
        ({"identity": "", "identity_source": ""}, {}, None, "ok", "one is made at the start"),
        ({}, {}, Live(portal_error="HTTP 409 (code=gateway_already_connected)"), "fail", "another gateway with this"),
    ],
)
def test_identity(plan, host, live, state, said):
    check = look(live, plan=plan, **host)["identity"]
    assert check.state == state
    assert said in check.seen


@pytest.mark.parametrize(
    ("udp", "live", "state", "said"),
    [
        ((), None, "ok", "is free"),
        ((Listener("0.0.0.0", GATEWAY),), LIVE, "ok", "is the running gateway's"),
        ((Listener("0.0.0.0", SOMEBODY),), LIVE, "warn", "taken by nginx (pid 5)"),
        ((Listener("0.0.0.0", SOMEBODY),), None, "warn", "taken by nginx (pid 5)"),
        ((Listener("0.0.0.0", None),), None, "warn", "a process that only root may see"),
    ],
)
def test_udp_port(udp, live, state, said):
    check = look(live, udp=udp)["udp-port"]
    assert check.state == state
    assert said in check.seen


@pytest.mark.parametrize(
    ("address", "health", "live", "state", "said"),
    [
        ("127.0.0.1", (), None, "ok", "TCP 127.0.0.1:8080 is free"),
        ("::1", (Listener("127.0.0.1", SOMEBODY),), None, "ok", "TCP [::1]:8080 is free"),
        ("127.0.0.1", (Listener("0.0.0.0", SOMEBODY),), None, "warn", "taken by nginx (pid 5)"),
        ("127.0.0.1", (Listener("127.0.0.1", GATEWAY),), LIVE, "ok", "answers for the running gateway"),
        ("127.0.0.1", (), LIVE, "warn", "nothing listens on TCP 127.0.0.1:8080"),
    ],
)
def test_health_port(address, health, live, state, said):
    check = look(live, health=health, plan={"health_address": address})["health-port"]
    assert check.state == state
    assert said in check.seen


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"read_only": True}, "on a read-only file system"),
        ({"free": 4096}, "is full (4 KiB left)"),
        ({"inodes": 3}, "3 inodes left"),
        ({"writable": False}, "may not write"),
    ],
)
def test_state_directory_matters_most_where_the_identity_is_to_be_kept_there(needed, change, said):
    plan = {"identity": "", "identity_source": ""} if needed else {}
    check = look(plan=plan, disks={"state": GOOD_DISK._replace(**change)})["state-directory"]
    assert check.state == ("fail" if needed else "warn")
    assert said in check.seen


@pytest.mark.parametrize(
    ("frozen", "change", "state"),
    [
        (True, {"no_exec": True}, "fail"),
        (False, {"no_exec": True}, "ok"),
        (True, {"free": 1 << 20}, "warn"),
        (False, {"free": 1 << 20}, "ok"),
        (True, {}, "ok"),
    ],
)
def test_temporary_directory_matters_to_the_one_file_form(frozen, change, state):
    check = look(frozen=frozen, disks={"temporary": GOOD_DISK._replace(path="/tmp", **change)})["temporary-directory"]
    assert check.state == state
    assert ("TEMP=/var/tmp" in check.remedy) is (state != "ok")


IPV4_ONLY = {socket.AF_INET: Way("192.0.2.7", 1500)}


@pytest.mark.parametrize(
    ("host", "ipv4", "ipv6"),
    [
        ({}, "ok", "ok"),
        ({"ways": IPV4_ONLY}, "ok", "ok"),
        ({"ways": IPV4_ONLY, "has_ipv6": False}, "ok", "warn"),
        ({"ways": IPV4_ONLY, "sysctls": {"net.ipv6.conf.all.disable_ipv6": "1"}}, "ok", "warn"),
        ({"ways": {socket.AF_INET6: Way("2001:db8::7", 1500)}}, "ok", "ok"),
        ({"ways": {}}, "fail", "ok"),
    ],
)
def test_families(host, ipv4, ipv6):
    checks = look(**host)
    assert (checks["ipv4"].state, checks["ipv6"].state) == (ipv4, ipv6)


@pytest.mark.parametrize(("mtu", "state"), [(1500, "ok"), (1364, "ok"), (1350, "warn"), (1280, "warn")])
def test_mtu(mtu, state):
    check = look(ways={socket.AF_INET6: Way("2001:db8::7", mtu)})["mtu"]
    assert check.state == state
    if state == "warn":
        assert check.remedy.startswith("sudo ip link set eth0 mtu 1364")


OFF = {"net.ipv4.ip_forward": "0"}


@pytest.mark.parametrize(
    ("host", "live", "state", "remedy"),
    [
        ({}, None, "ok", ""),
        ({"sysctls": OFF}, None, "ok", ""),
        ({"sysctls": OFF, "fixed_sysctls": frozenset(OFF)}, None, "fail", "sudo firezone-gateway host-setup"),
        ({"sysctls": OFF, "fixed_sysctls": frozenset(OFF), "uid": 9}, None, "warn", "sudo firezone-gateway host-setup"),
        ({"sysctls": OFF, **RUNNING}, LIVE, "fail", "sudo sysctl -w net.ipv4.ip_forward=1"),
        ({"sysctls": OFF, **RUNNING, "container": "docker"}, LIVE, "fail", "--sysctl net.ipv4.ip_forward=1"),
        (
            {"sysctls": {"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.all.forwarding": "0"}, **RUNNING},
            LIVE,
            "ok",
            "",
        ),
    ],
)
def test_forwarding(host, live, state, remedy):
    check = look(live, **host)["forwarding"]
    assert check.state == state
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("host", "state"),
    [
        ({"sysctls": {"net.ipv4.conf.all.rp_filter": "1"}}, "ok"),
        ({"sysctls": {"net.ipv4.conf.all.rp_filter": "1"}, "default_interfaces": ("eth0", "eth1")}, "warn"),
        ({"sysctls": {"net.ipv4.conf.eth1.rp_filter": "1"}, "default_interfaces": ("eth0", "eth1")}, "warn"),
        (
            {
                "sysctls": {"net.ipv4.conf.eth1.rp_filter": "1", "net.ipv4.conf.all.rp_filter": "2"},
                "default_interfaces": ("eth0", "eth1"),
            },
            "ok",
        ),
    ],
)
def test_reverse_path(host, state):
    assert look(**host)["reverse-path"].state == state


FORWARD = Blocked("ip filter FORWARD", ("iifname", "oifname"))
COMMANDS = (
    "sudo nft insert rule ip filter FORWARD iifname tun-firezone accept; "
    "sudo nft insert rule ip filter FORWARD oifname tun-firezone accept"
)


@pytest.mark.parametrize(
    ("tools", "named"), [(("Docker", "ufw"), "(Docker, ufw)"), ((), "(iptables, as Docker and ufw use it)")]
)
def test_a_forward_chain_that_drops_is_named_and_fails_only_while_the_gateway_runs(tools, named):
    before = look(firewall=Survey((), (FORWARD,), ()), firewall_tools=tools)["firewall-forward"]
    assert before.state is State.WARN
    assert f"ip filter FORWARD {named}" in before.seen
    now = look(LIVE, **RUNNING | {"firewall": Survey(("ip",), (FORWARD,), ())}, firewall_tools=tools)[
        "firewall-forward"
    ]
    assert now.state is State.FAIL
    assert now.remedy.startswith(COMMANDS)


def test_firewalld_is_known_by_its_table():
    chain = Blocked("inet firewalld filter_FORWARD", ("iifname",))
    assert "(firewalld)" in look(firewall=Survey((), (chain,), ()))["firewall-forward"].seen


def test_legacy_iptables_are_a_warning():
    check = look(legacy_firewall="This host has rules of the legacy iptables.")["firewall-forward"]
    assert check.state is State.WARN
    assert "sudo iptables-legacy -I FORWARD -i tun-firezone -j ACCEPT" in check.remedy


def test_an_input_chain_that_drops_clients_dns_queries():
    obstacle = Obstacle("inet filter input", "ufw allow in on tun-firezone to any port 53535")
    check = look(firewall=Survey((), (), (obstacle,)))["firewall-dns"]
    assert check.state is State.WARN
    assert "inet filter input" in check.seen
    assert check.remedy == "as root: ufw allow in on tun-firezone to any port 53535"


@pytest.mark.parametrize(
    ("live", "masqueraded", "plan", "state"),
    [
        (None, (), {}, "ok"),
        (LIVE, ("ip", "ip6"), {}, "ok"),
        (LIVE, (), {}, "fail"),
        (LIVE, (), {"masquerade": False}, "ok"),
    ],
)
def test_masquerade(live, masqueraded, plan, state):
    host = RUNNING | {"firewall": Survey(masqueraded, (), ())} if live else {}
    assert look(live, plan=plan, **host)["masquerade"].state == state


def test_overlaps_are_warnings():
    sentence = "This host has a route to 100.72.0.0/16 by lan0, which overlaps 100.64.0.0/11. Renumber that network."
    check = look(overlaps=(sentence,))["address-overlap"]
    assert (check.state, check.seen) == (State.WARN, sentence.partition(". ")[0])
    check = look(tunnel_addresses=("100.64.1.1 on tailscale0",))["address-overlap"]
    assert check.state is State.WARN
    assert "100.64.1.1 on tailscale0" in check.seen


def test_no_nameserver_is_a_warning():
    check = look(nameservers=(), dns_problem="/etc/resolv.conf names no usable nameserver (empty). Add a line.")
    assert check["nameservers"].state is State.WARN
    assert "add a line such as nameserver" in check["nameservers"].remedy


def test_small_buffers_are_mentioned_only():
    check = look(sysctls={"net.core.rmem_max": "212992"})["buffers"]
    assert check.state is State.OK
    assert "net.core.rmem_max=212992" in check.seen
    assert check.remedy == "sudo firezone-gateway host-setup"


@pytest.mark.parametrize(
    ("failed", "problem", "name", "remedy"),
    [
        ("name", "x has no addresses; check the nameservers", "portal-name", "check the nameservers"),
        ("connection", "no address accepted: a: b; c: d; let it out", "portal", "let it out"),
        (
            "certificate",
            "TLS fails: not yet valid; this host's clock says 2020; if that is wrong, set it: X",
            "portal-certificate",
            "this host's clock says 2020; if that is wrong, set it: X",
        ),
        ("certificate", "TLS fails: self-signed; nobody signed it; name the one", "portal-certificate", "name the one"),
        ("settings", "The variable is bad. Correct it.", "portal", "Correct it"),
    ],
)
def test_the_first_step_to_the_portal_that_fails_is_named(failed, problem, name, remedy):
    checks = look(portal=PORTAL._replace(failed=failed, problem=problem, ahead=None))
    assert states(checks)[name] == "fail"
    assert checks[name].remedy == remedy
    assert checks[name].seen.startswith("portal.test:443: ")


def test_a_portal_that_was_not_asked_is_unknown_and_a_bad_url_a_failure():
    assert look(portal=None)["portal"].state is State.UNKNOWN
    assert look(portal=None, plan={"portal_problem": "the portal URL has no host"})["portal"].state is State.FAIL


def test_a_connection_without_encryption_is_a_warning():
    assert look(portal=PORTAL._replace(secure=False))["portal-certificate"].state is State.WARN


@pytest.mark.parametrize(
    ("wall", "ahead", "state", "said"),
    [
        (WALL, 0.4, "ok", "as the portal's"),
        (WALL, None, "ok", "was not read"),
        (WALL, 45.0, "warn", "45 seconds ahead of"),
        (WALL, -100_000.0, "fail", "28 hours behind"),
        (0.0, None, "fail", "1970-01-01 00:00:00 UTC"),
    ],
)
def test_clock(wall, ahead, state, said):
    check = look(wall=wall, portal=PORTAL._replace(ahead=ahead))["clock"]
    assert check.state == state
    assert said in check.seen
    assert check.remedy == ("" if state == "ok" else "sudo timedatectl set-ntp true")


@pytest.mark.parametrize(
    ("live", "state", "said"),
    [
        (LIVE, "ok", "serves 3 clients"),
        (replace(LIVE, clients=1), "ok", "serves 1 client"),
        (Live(pid=1), "warn", "not connected to the portal yet"),
        (Live(pid=1, portal_error="no upgrade within 15 s"), "fail", "no upgrade within 15 s"),
        (None, "unknown", "shows when the gateway starts"),
    ],
)
def test_portal_login(live, state, said):
    check = look(live)["portal-login"]
    assert check.state == state
    assert said in check.seen


def test_a_gateway_that_does_not_answer_is_a_failure():
    check = look(stuck="the gateway is there but said nothing for 15 s")["portal-login"]
    assert check.state is State.FAIL
    assert "said nothing for 15 s" in check.seen
    assert "restart" in check.remedy


ANSWERED = Answer("192.0.2.9:3478", 0.02, Endpoint.parse("203.0.113.7:52625"))
SILENT = Answer("198.51.100.9:3478")


@pytest.mark.parametrize(
    ("live", "stun", "state", "said"),
    [
        (None, (), "unknown", "no relay is known"),
        (None, (ANSWERED,), "ok", "192.0.2.9:3478 answers in 20 ms, sees this host as 203.0.113.7:52625"),
        (None, (ANSWERED, SILENT), "warn", "no answer from 198.51.100.9:3478"),
        (None, (SILENT,), "fail", "UDP seems blocked: no answer from 198.51.100.9:3478"),
        (LIVE, (), "ok", "hears 192.0.2.9:3478"),
        (replace(LIVE, relays=(("192.0.2.9:3478", False),)), (), "fail", "hears none of its relays 192.0.2.9:3478"),
    ],
)
def test_udp_outbound(live, stun, state, said):
    check = look(live, stun=stun)["udp-outbound"]
    assert check.state == state
    assert said in check.seen


def test_a_status_of_a_gateway_is_read_and_what_is_missing_is_not_known():
    status = {
        "pid": 12,
        "portal": {"state": "connecting", "last_error": "HTTP 409"},
        "relays": [{"addresses": ["192.0.2.9:3478", "[2001:db8::9]:3478"], "rtt_ms": None}],
        "client_count": 4,
    }
    assert live_from(status) == Live(
        pid=12, portal_error="HTTP 409", relays=(("192.0.2.9:3478, [2001:db8::9]:3478", False),), clients=4
    )
    assert live_from({}) == Live()


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (connection.NoGatewayError("no gateway is running here"), (None, "", "")),
        (connection.DeniedError("/run/x is not yours to use"), (None, "/run/x is not yours to use", "")),
        (connection.RefusedError("the gateway hung up"), (None, "", "the gateway hung up")),
    ],
)
def test_a_gateway_that_is_not_there_may_not_be_asked_or_does_not_answer_are_three_things(monkeypatch, error, seen):
    def ask(_request):
        raise error

    monkeypatch.setattr(doctor_command, "ask_once", ask)
    assert doctor_command._live() == seen
