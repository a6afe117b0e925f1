"""From the gateway's start to its end, with the portal gone in between, and on hosts with peculiarities."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import socket
import time
from ipaddress import ip_address
from itertools import pairwise
from urllib.parse import parse_qs, urlsplit

import pytest
from capture import Capture
from gateway_process import inside
from virtual_client import ACKNOWLEDGED, invite

from tests.lab import stun
from tests.lab.namespaces import Nat
from tests.lab.process import wait_until
from tests.lab.scenario import DNS_RESOURCE_ADDRESSES, NAME_SERVER, RESOURCE_ADDRESSES, TUN, Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
]

WEB, WEB6, BY_DNS = "http://10.20.0.100/get", "http://[10:20::100]/get", "http://web.test/get"
LONG_DOWNLOAD = "http://download.httpbin/bytes?num=1000000000"


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab
        assert lab.warnings() == []


def host_state(lab):
    """What a gateway may change on a host, but for the system controls that it leaves set."""
    host = lab.places["gateway"].namespace
    commands = ("nft -s list ruleset", "ip rule", "ip -6 rule", "ip -br link", "ip route show table all")
    said = {command: host.run(*command.split(), check=False).stdout.splitlines() for command in commands}
    # A kernel that forwards IPv6 has anycast addresses.
    return {command: [line for line in lines if not line.startswith("anycast")] for command, lines in said.items()}


def client_goes_through(lab):
    for url in (WEB, WEB6, BY_DNS):
        fetched = lab.client.curl(url, timeout=10)
        assert fetched.ok, f"{url}: {fetched.error}\n{lab.tails()}"


def upgrades(lab, *, since=0):
    """The gateway's attempts to connect to the portal."""
    return [entry for entry in lab.portal.entries(direction="upgrade", kind="gateway") if entry["n"] >= since]


# --- start and end ---


@pytest.mark.spec("PORTAL-39", "TUNNEL-100")
def test_a_terminated_gateway_says_goodbye_to_everybody_and_leaves_nothing_behind():
    with Lab(start_gateway=False, clients=2, gateway_environment={"FIREZONE_FLOW_LOGS": "true"}) as lab:
        clean = host_state(lab)
        lab.start_gateway()
        for number in range(2):
            lab.start_client(number)
        client_goes_through(lab)
        assert lab.clients[1].curl(WEB, timeout=10).ok
        assert host_state(lab) != clean
        place = lab.client.namespace
        place.run("sh", "-c", f"curl -s -o /dev/null '{LONG_DOWNLOAD}' >/dev/null 2>&1 &")
        received = lambda: lab.client.status()["counters"].get("tun_tx_bytes", 0)
        wait_until(lambda: received() > 2_000_000, timeout=15, what="a download is under way")

        mark = lab.portal.mark()
        process = lab.gateway.process
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert time.monotonic() - begin < 2
        closed = lab.portal.wait_for(since=mark, direction="closed", kind="gateway")
        assert closed["reason"] == [1000, ""]
        for client in lab.clients:
            heard = lambda client=client: "goodbye" in {entry["what"] for entry in client.log()}
            wait_until(heard, timeout=2, what=f"{client.name} hears it")
        record = r"flow_logs: TCP flow completed .*inner_dst_ip=172\.21\.0\.101"
        assert len(re.findall(record, process.log_text())) == 1
        for relay in lab.relays:
            gateway = {lab.places["gateway"].public_ipv4, lab.places["gateway"].public_ipv6}
            wait_until(
                lambda relay=relay: not [a for a in relay.allocations() if a["client"][0] in gateway],
                timeout=2,
                what=f"the allocation on {relay.name} is deleted",
            )
        assert host_state(lab) == clean
        assert lab.warnings() == []


def test_a_gateway_that_was_killed_leaves_nothing_that_the_next_would_double():
    with Lab(start_gateway=False) as lab:
        clean = host_state(lab)
        lab.start_gateway()
        lab.start_client(0)
        client_goes_through(lab)
        running = host_state(lab)
        lab.gateway.process.kill()
        assert TUN not in " ".join(host_state(lab)["ip -br link"])
        lab.portal.wait_for(lambda _: not lab.portal.state()["gateways"], direction="closed", kind="gateway")

        lab.start_gateway()
        lab.client.reset()
        client_goes_through(lab)
        assert _without_flags(host_state(lab)) == _without_flags(running)
        assert lab.gateway.process.stop() == 0
        assert host_state(lab) == clean
        assert lab.warnings() == []


def _without_flags(state):
    """A device of the same name is another device."""
    links = [line.split()[:2] for line in state["ip -br link"]]
    return state | {"ip -br link": [(name.partition("@")[0], status) for name, status in links]}


@pytest.mark.spec("OPS-43")
def test_nothing_is_said_to_strangers():
    with Lab(start_gateway=False) as lab:
        gateway, client, portal = (lab.places[name] for name in ("gateway", "client1", "portal"))
        known = {getattr(place, name) for place in (client, portal) for name in ("public_ipv4", "public_ipv6")}
        known |= {client.ipv4, client.ipv6, NAME_SERVER}
        known |= {address for relay in lab.relays for address in (relay.ipv4, relay.ipv6)}
        resources = {interface.partition("/")[0] for interface in (*RESOURCE_ADDRESSES, *DNS_RESOURCE_ADDRESSES)}
        with contextlib.ExitStack() as stack:
            interfaces = ("eth0", "resources", "dns_resources")
            captures = [stack.enter_context(Capture(gateway.namespace, interface)) for interface in interfaces]
            lab.start_gateway()
            lab.start_client(0)
            client_goes_through(lab)
            assert lab.gateway.process.stop() == 0
        transports = {6, 17}  # the rest is the kernel's: neighbours, listeners
        sent = {
            str(ip_address(packet.destination))
            for capture in captures
            for packet in capture.packets
            if packet.outgoing and packet.protocol in transports
        }
        assert sent
        assert sent - {str(ip_address(address)) for address in known | resources} == set()


@pytest.mark.spec("PORTAL-6", "CONN-1")
def test_the_public_key_is_one_per_process(lab):
    for _ in range(2):
        mark = lab.portal.mark()
        assert lab.portal.drop(kind="gateway") == 1
        lab.portal.wait_for(since=mark, kind="gateway", direction="in", event="phx_join")
    lab.restart_gateway()
    keys = [parse_qs(urlsplit(entry["path"]).query)["public_key"][0] for entry in upgrades(lab)]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


@pytest.mark.spec("PORTAL-67")
def test_a_portal_without_the_v2_path_is_spoken_to_in_its_own_words():
    with Lab(start_gateway=False) as lab:
        lab.start_client(0)
        lab.portal.faults(without_v2=True)
        lab.start_gateway()
        client_goes_through(lab)
        assert {event["event"] for event in lab.portal.entries(kind="gateway", direction="out")} >= {"authorize_flow"}
        said = {event["event"] for event in lab.portal.entries(kind="gateway", direction="in")}
        assert "flow_authorized" in said
        assert ACKNOWLEDGED not in said
        assert [urlsplit(entry["path"]).path for entry in upgrades(lab)][-1] == "/gateway/websocket"
        assert lab.warnings() == []


# --- what init says ---


@pytest.mark.spec("PORTAL-45", "TUNNEL-90")
def test_a_second_init_moves_the_gateway_to_other_addresses_and_sessions_survive(lab):
    client_goes_through(lab)
    gateway = lab.gateway.namespace
    init = lab.portal.entries(kind="gateway", direction="out", event="init")[-1]["payload"]
    created = "Connection created"
    connections = lab.gateway.process.log_text().count(created)

    for interface in (init["interface"], {"ipv4": "100.64.77.7", "ipv6": "fd00:2021:1111::77:7"}):
        mark = lab.portal.mark()
        authorizations = [
            {"client_id": lab.portal.wait_client(), "resource_id": entry["payload"]["resource"]["id"],
             "expires_at": entry["payload"]["expires_at"]}
            for entry in lab.portal.entries(kind="gateway", event="create_authorization")
        ]  # fmt: skip
        lab.portal.push(
            kind="gateway", event="init", payload=init | {"interface": interface, "authorizations": authorizations}
        )
        lab.portal.wait_for(since=mark, direction="out", event="init")
        ipv6 = str(ip_address(interface["ipv6"]))
        wait_until(lambda: gateway.address(TUN) == interface["ipv4"], timeout=5, what="the IPv4 address")
        wait_until(lambda: gateway.address(TUN, ipv6=True) == ipv6, timeout=5, what="the IPv6 address")
        shown = gateway.run("ip", "-o", "address", "show", "dev", TUN).stdout
        assert [line.split()[3] for line in shown.splitlines()] == [f"{interface['ipv4']}/32", f"{ipv6}/128"]
        assert gateway.run("ip", "route", "show", "table", "0x2021fd00").stdout.split()[0] == "100.64.0.0/11"
        assert gateway.run("ip", "-6", "route", "show", "table", "0x2021fd00").stdout.split()[0] == (
            "fd00:2021:1111::/107"
        )
        for query in ("udp", "tcp"):
            listening = f"ss --no-header --listening --numeric --{query} sport = :53535"
            bound = lambda command=listening: {
                line.split()[-2] for line in gateway.run(*command.split()).stdout.splitlines()
            }
            wanted = {f"{interface['ipv4']}:53535", f"[{ipv6}]:53535"}
            wait_until(lambda bound=bound: bound() == wanted, timeout=5, what=f"the {query} server on both addresses")
        client_goes_through(lab)
    assert lab.gateway.process.log_text().count(created) == connections


@pytest.mark.spec("TUNNEL-89")
def test_masquerade_flags_of_the_portal_change_nothing(lab):
    client_goes_through(lab)
    before = host_state(lab)
    init = lab.portal.entries(kind="gateway", direction="out", event="init")[-1]["payload"]
    del init["authorizations"]
    config = {"ipv4_masquerade_enabled": False, "ipv6_masquerade_enabled": False}
    lab.portal.push(kind="gateway", event="init", payload=init | {"config": config})
    invite(lab.portal)
    client_goes_through(lab)
    assert host_state(lab) == before


# --- the portal ---


@pytest.mark.spec("OPS-26", "PORTAL-34")
def test_a_portal_that_stays_away_is_dialled_ever_slower_while_traffic_flows_until_the_budget_ends():
    # 0.5, 0.75, 1.125 and 1.6875 s, each up to twice as long: the fourth or fifth does not fit any more.
    with Lab(gateway_environment={"FIREZONE_MAX_PARTITION_TIME": "5s"}) as lab:
        client_goes_through(lab)
        lab.portal.refuse(status=500, kind="gateway")
        mark = lab.portal.mark()
        assert lab.portal.drop(kind="gateway") == 1
        lost = lab.portal.wait_for(since=mark, direction="closed", kind="gateway")["at"]
        process = lab.gateway.process
        answers = 0
        while len(upgrades(lab, since=mark)) < 2:
            assert lab.client.curl(WEB, timeout=2).ok
            answers += 1
        assert answers > 5
        assert process.wait(15) == 1
        times = [lost, *(entry["at"] for entry in upgrades(lab, since=mark))]
        delays = [later - earlier for earlier, later in pairwise(times)]
        assert 3 <= len(delays) <= 4
        for number, delay in enumerate(delays):
            base = 0.5 * 1.5**number
            assert base <= delay < 2 * base + 0.2
        wait_until(lambda: lab.client.status()["links"] == [], timeout=3, what="the client hears goodbye")
        assert len([line for line in lab.warnings() if line.startswith("gateway")]) == 1  # its last line
        assert " ERROR " in process.tail(3)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(180)])])
def test_a_direct_connection_survives_the_loss_of_portal_and_relays(seconds):
    with Lab() as lab:
        client_goes_through(lab)
        lab.client.wait_path("PeerToPeer")
        lab.portal.stop(code=None)
        for relay in lab.relays:
            relay.process.kill()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            client_goes_through(lab)
            assert lab.client.paths() == ["PeerToPeer"]
            time.sleep(min(1.0, seconds / 10))
        # After half a minute it is worth a word that relays do not answer.
        assert [line for line in lab.warnings() if "failed: no response" not in line] == []


# --- the host ---


@pytest.mark.spec("TUNNEL-86")
def test_a_busy_port_costs_nothing_but_the_number():
    with Lab(start_gateway=False) as lab:
        with inside(lab.places["gateway"].namespace):
            busy = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET6, socket.AF_INET)]
        for sock, address in zip(busy, ("::", "0.0.0.0"), strict=True):
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, 52625))
        try:
            lab.start_gateway()
            lab.start_client(0)
            client_goes_through(lab)
            lab.client.wait_path("PeerToPeer")
            (link,) = lab.client.status()["links"]
            offered = link["candidate_messages"][0]["candidates"]
            assert {line.split()[5] for line in offered if "typ host" in line}.isdisjoint({"52625"})
            lab.gateway.process.wait_for_log("port 52625 is taken")
            assert lab.warnings() == []
        finally:
            for sock in busy:
                sock.close()


@pytest.fixture
def multi_homed():
    """A public gateway with two links to the internet; it reaches relay 2 over the second."""
    with Lab(gateway_nat=Nat.NONE, gateway_families=(4,), start_gateway=False) as lab:
        host = lab.places["gateway"].namespace
        lab.network.attach_public(host, 41, interface="eth1", families=())
        host.ip(
            "address add 203.0.113.41/24 dev eth1",
            "route change 203.0.113.0/24 dev eth0 src 203.0.113.31",
            f"route add {lab.relays[1].ipv4}/32 dev eth1 src 203.0.113.41",
        )
        host.sysctl(ipv4__conf__all__arp_filter=1, ipv4__conf__all__rp_filter=0, ipv4__conf__eth1__rp_filter=0)
        lab.start_gateway()
        yield lab


@pytest.mark.spec("CONN-3")
def test_a_check_is_answered_from_the_address_that_it_came_to(multi_homed):
    lab = multi_homed
    authorization = invite(lab.portal)
    own, peer = authorization["gateway_ice_credentials"], authorization["client_ice_credentials"]
    username = f"{own['username']}:{peer['username']}".encode()
    attributes = [(stun.USERNAME, username), (0x802A, bytes(8)), (0x0024, (1 << 24).to_bytes(4, "big"))]
    with inside(lab.places["client1"].namespace):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(3)
        for address in ("203.0.113.31", "203.0.113.41"):
            request = stun.encode(stun.BINDING, stun.REQUEST, bytes(12), attributes, own["password"].encode())
            sock.sendto(request, (address, 52625))
            while True:
                data, source = sock.recvfrom(2000)
                message = stun.Message(data)
                if message.message_class == stun.SUCCESS:
                    break
            assert source == (address, 52625)


@pytest.mark.spec("TUNNEL-88")
def test_data_leaves_from_the_address_that_the_peer_contacted(multi_homed):
    lab = multi_homed
    router = lab.places["client1"].router
    router.nft("table ip first {\nchain c {\ntype filter hook forward priority 0\nip daddr 203.0.113.31 drop\n}\n}\n")
    lab.start_client(0)
    assert lab.client.curl(WEB, timeout=10).ok
    lab.client.wait_path("PeerToPeer", timeout=5)
    with Capture(router, "internet") as seen:
        assert lab.client.curl(BY_DNS, timeout=5).ok
    gateway = {"203.0.113.31", "203.0.113.41"}
    data = [p for p in seen.packets if p.protocol == 17 and p.transport[8] == 4 and {p.source, p.destination} & gateway]
    assert {p.source for p in data if not p.outgoing} == {"203.0.113.41"}
    assert {p.destination for p in data if p.outgoing} == {"203.0.113.41"}
    assert lab.warnings() == []


MARKS = """
table inet marks {
    set marked4 { type ipv4_addr . inet_service; flags dynamic; size 1000; }
    set marked6 { type ipv6_addr . inet_service; flags dynamic; size 1000; }
    set unmarked4 { type ipv4_addr . inet_service; flags dynamic; size 1000; }
    set unmarked6 { type ipv6_addr . inet_service; flags dynamic; size 1000; }
    chain output {
        type filter hook output priority 0
        oifname "tun-firezone" accept
        oifname "lo" accept
        meta l4proto != { tcp, udp } accept
        meta mark 0xfd002021 add @marked4 { ip daddr . th dport } accept
        meta mark 0xfd002021 add @marked6 { ip6 daddr . th dport } accept
        add @unmarked4 { ip daddr . th dport }
        add @unmarked6 { ip6 daddr . th dport }
    }
}
"""
ASK_GATEWAY = """
import dns.message, dns.query, sys
dns.query.udp(dns.message.make_query("web.test", "A"), sys.argv[1], port=53535, timeout=5)
"""


@pytest.mark.spec("TUNNEL-87")
def test_whatever_the_gateway_sends_of_its_own_carries_the_mark_that_keeps_it_out_of_the_tunnel():
    with Lab(start_gateway=False) as lab:
        host, portal = lab.places["gateway"].namespace, lab.places["portal"]
        host.nft(MARKS)
        lab.start_gateway()
        lab.start_client(0)
        client_goes_through(lab)
        lab.client.namespace.python(ASK_GATEWAY, lab.gateway.tunnel_ipv4)
        collector = 443  # nobody listens there
        init = lab.portal.entries(kind="gateway", direction="out", event="init")[-1]["payload"]
        uploads = {
            "api_url": f"https://{portal.public_ipv4}/",
            "upload_interval_secs": 1,
            "upload_batch_size": 10,
        }
        del init["authorizations"]
        lab.portal.push(kind="gateway", event="init", payload=init | {"flow_logs": uploads})
        granted = lab.portal.entries(event="create_authorization")[0]["payload"]
        token = granted["flow_logs_ingest_token"]
        lab.portal.authorize(
            resource=granted["resource"]["id"],
            client_id=granted["client"]["id"],
            changes={"flow_logs_ingest_token": with_uploads(token)},
        )
        assert lab.client.curl(WEB).ok
        gone = lambda: f"{portal.public_ipv4} . {collector}" in in_set(host, "marked4")
        wait_until(gone, timeout=15, what="an upload is tried")
        marked = in_set(host, "marked4") + in_set(host, "marked6")
        addresses = (*(f"{relay.ipv4} . 3478" for relay in lab.relays), f"{portal.public_ipv4} . 8081")
        for destination in (*addresses, f"{NAME_SERVER} . 53"):
            assert destination in marked
        assert re.search(r"203:0:113::30 . \d+", marked)
        assert "elements" not in in_set(host, "unmarked4") + in_set(host, "unmarked6")


def in_set(host, name):
    return host.run("nft", "list", "set", "inet", "marks", name).stdout


def with_uploads(token):
    """The same claims with uploads; gateways cannot check signatures."""
    head, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["uploads_enabled"] = True
    return ".".join((head, base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("="), signature))
