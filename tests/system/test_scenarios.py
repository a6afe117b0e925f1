"""What users do through a gateway (spec operations.md 5.2), with the standing assertion that nobody warns (5.4).

Not here: S4, S19 and S21, in which the gateway has no part; S11, S14 and S18, which need ICE-less mode.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from capture import Capture, without_offload

from tests.lab.namespaces import Nat
from tests.lab.process import wait_until
from tests.lab.scenario import PORTAL_PORT, TUN, Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
    pytest.mark.spec("OPS-37"),
]

MEGABYTE = 1_000_000
DNS_PORT = f":{53535:04X} "
BY_DNS = "http://dns.httpbin.search.test/get"
BY_IPV4, BY_IPV6 = "http://10.20.0.100/get", "http://[10:20::100]/get"
TEN_MEGABYTES = "http://download.httpbin/bytes?num=10000000"
SHA256_OF_TEN_MILLION_ZEROS = "f5e02aa71e67f41d79023a128ca35bad86cf7b6656967bfe0884b3a3c4325eaf"
STALL = ("--connect-timeout", "10", "--speed-limit", "102400", "--speed-time", "10")
RELAYED = {"RelayToPeer", "PeerToRelay", "RelayToRelay"}
FLOW_LOGS = {"FIREZONE_FLOW_LOGS": "true"}


def sha256_of(client, url, *options):
    """The checksum of what curl gets; it fails like curl does."""
    script = 'set -o pipefail; curl -sS "$@" | sha256sum'
    return client.run("bash", "-c", script, "bash", *options, url, timeout=90).stdout.split()[0]


class Flows:
    """The records of TCP flows to the download server that the gateway logs from now on."""

    def __init__(self, lab):
        self._process = lab.gateway.process
        self._from = 0
        all_ended = lambda: len(self.records("started")) == len(self.records("completed"))
        wait_until(all_ended, timeout=10, what="the flows of earlier tests are completed")
        self._from = len(self._process.log_text())

    def records(self, what):
        """The fields of all records, split as operators' tools do it (spec operations.md 1.8)."""
        text = self._process.log_text()[self._from :]
        lines = re.findall(rf"flow_logs: TCP flow {what} (.*)", text)
        fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return [each for each in fields if each["inner_dst_ip"] == "172.21.0.101"]

    def ended(self, count):
        """All that ended, once every one that began has; there must be `count`."""
        wait_until(lambda: len(self.records("completed")) >= count, timeout=5, what=f"{count} flows are completed")
        completed = self.records("completed")
        assert len(completed) == len(self.records("started")) == count
        return completed


@pytest.fixture(scope="module")
def direct():
    with Lab("direct", iperf3=shutil.which("iperf3") is not None, gateway_environment=FLOW_LOGS) as lab:
        without_offload(lab.places["gateway"].namespace, "eth0", "resources", "dns_resources")
        yield lab


@pytest.fixture(scope="module")
def relayed():
    with Lab("relayed", iperf3=shutil.which("iperf3") is not None, gateway_environment=FLOW_LOGS) as lab:
        yield lab


@pytest.fixture
def lab(request):
    """The lab of the test, `direct` unless parametrized; nobody warned in it since the test began."""
    lab = request.getfixturevalue(getattr(request, "param", "direct"))
    before = lab.warnings()
    lab.client.reset()
    yield lab
    assert lab.warnings()[len(before) :] == []


both_paths = pytest.mark.parametrize("lab", ["direct", "relayed"], indirect=True)


def look_up(client, name):
    """The IPv4 addresses that the client's resolver gives; empty when there is no such name."""
    found = client.run("getent", "ahostsv4", name, check=False)
    return {line.split()[0] for line in found.stdout.splitlines()}


def ping(client, name):
    """Whether the first IPv4 address of a name answers."""
    return client.ping(min(look_up(client, name)), timeout=5)


def test_s1_names_resolve_to_stand_ins_and_lead_to_the_resource(lab):
    client = lab.client
    assert ping(client, "dns.httpbin.search.test")
    fetched = client.curl(BY_DNS)
    assert fetched.ok
    assert '"server": "172.21.0.100"' in fetched.body
    assert all(address.startswith("100.96.0.") for address in look_up(client, "dns.httpbin.search.test"))
    assert look_up(client, "example.org") == set()


def test_s3_two_dns_resources(lab):
    assert ping(lab.client, "dns.httpbin.search.test")
    assert ping(lab.client, "download.httpbin")


@both_paths
def test_cidr_resources_by_both_families(lab):
    assert lab.client.curl(BY_IPV4).ok
    assert lab.client.curl(BY_IPV6).ok
    assert lab.client.ping("10.20.0.110", timeout=3)
    assert lab.client.ping("10:20::110", timeout=3)


@both_paths
def test_s9_ten_megabytes_arrive_as_they_were_sent_and_are_one_flow(lab):
    download_as_one_flow(lab)


def download_as_one_flow(lab):
    flows = Flows(lab)
    assert sha256_of(lab.client, TEN_MEGABYTES, *STALL) == SHA256_OF_TEN_MILLION_ZEROS
    (flow,) = flows.ended(1)
    assert flow["domain"] == "download.httpbin"
    assert int(flow["rx_bytes"]) >= 10 * MEGABYTE


@both_paths
@pytest.mark.needs("iperf3")
@pytest.mark.spec("OPS-63")
def test_iperf3_both_ways_and_a_gateway_that_sleeps_afterwards(lab):
    gateway = lab.gateway
    before = gateway.namespace.snmp()
    for options in ((), ("-R",)):
        report = lab.client.iperf3(*options, seconds=2)
        assert report["end"]["sum_received"]["bits_per_second"] > 20e6
    # The server answers UDP from its first address, whichever was asked.
    report = lab.client.iperf3("-u", "-b", "20M", "-l", "1200", server="10.20.0.100", seconds=1)
    assert report["end"]["sum"]["lost_percent"] < 5
    after = gateway.namespace.snmp()
    errors = {key: after[key] - before[key] for key in after if "error" in key.lower() and after[key] != before[key]}
    assert errors == {}
    idle_from = gateway.process.cost().cpu
    wait_until(lambda: gateway.process.state == "S", timeout=5, what="the gateway sleeps")
    threading.Event().wait(5)
    assert gateway.process.cost().cpu - idle_from < 0.05 * 5


@pytest.mark.parametrize("url", [BY_IPV4, BY_IPV6])
def test_s7_ecn_survives_in_both_directions(lab, url):
    client, gateway = lab.client.namespace, lab.places["gateway"].namespace
    client.sysctl(ipv4__tcp_ecn=1)
    lab.network.namespaces["resources"].sysctl(ipv4__tcp_ecn=1)
    try:
        assert lab.client.curl(url).ok  # the path is there
        with (
            Capture(gateway, TUN) as inner,
            Capture(gateway, "eth0") as outer,
            Capture(client, "tun-client") as received,
        ):
            assert lab.client.curl(url).ok
    finally:
        client.sysctl(ipv4__tcp_ecn=2)
        lab.network.namespaces["resources"].sysctl(ipv4__tcp_ecn=2)
    ect0 = 2
    http = lambda packets: [p for p in packets if p.protocol == 6 and 80 in p.ports]
    assert any(p.ecn == ect0 for p in http(inner.packets) if not p.outgoing), "none from the client"
    assert any(p.ecn == ect0 for p in http(inner.packets) if p.outgoing), "none from the resource"
    assert any(p.ecn == ect0 for p in http(received.packets) if not p.outgoing)
    tunnelled = [p for p in outer.packets if p.outgoing and p.protocol == 17 and p.transport[8] == 4]
    data = [p for p in http(inner.packets) if p.outgoing]
    assert sum(p.ecn == ect0 for p in tunnelled) == sum(p.ecn == ect0 for p in data)


def test_no_checksum_is_wrong_on_the_wire(lab):
    resources, router = lab.network.namespaces["resources"], lab.places["gateway"].router
    with (
        Capture(resources, "resources") as cidr,
        Capture(resources, "dns_resources") as names,
        Capture(router, "internal") as wire,
    ):
        for url in (BY_DNS, BY_IPV4, BY_IPV6, "http://dual.httpbin/get"):
            assert lab.client.curl(url).ok
        assert lab.client.download("http://download.httpbin/bytes?num=500000").bytes == 500_000
        lab.client.run("curl", "-sS", "--data-binary", "@/bin/bash", BY_IPV6)
        assert ping(lab.client, "dns.httpbin.search.test")
        assert lab.client.ping("10:20::110", timeout=3)
    gateway = lab.places["gateway"]
    # The others' packets still wait for their checksums there.
    ours = [packet for packet in wire.packets if packet.source in {gateway.ipv4, gateway.ipv6}]
    ours += [packet for packet in cidr.packets + names.packets if not packet.outgoing]
    assert {packet.protocol for packet in ours} >= {1, 6, 17, 58}
    assert {packet.version for packet in ours} == {4, 6}
    assert all(packet.complete for packet in ours)
    assert [packet for packet in ours if not packet.has_good_checksums()] == []


def test_s15_a_reset_download_ends_at_the_resource_too(lab):
    url = "http://download.httpbin/bytes?num=100000000"
    flows = Flows(lab)
    with Capture(lab.network.namespaces["resources"], "dns_resources") as seen:
        aborted = lab.client.curl(url, "-o", "/dev/null", "--limit-rate", "1M", "--max-time", "2")
        assert 0 < aborted.bytes < 100_000_000
        ended = lambda: [p for p in list(seen.packets) if not p.outgoing and p.protocol == 6 and p.transport[13] & 5]
        wait_until(ended, timeout=5, what="FIN or RST at the resource")
    (flow,) = flows.ended(1)
    assert max(500_000, 0.5 * aborted.bytes) < int(flow["rx_bytes"]) < 100_000_000
    assert lab.client.curl(BY_DNS).ok


def test_s16_three_names_of_one_address_from_one_source_port(lab):
    lab.client.namespace.sysctl(ipv4__ip_local_port_range="5555 5555")
    flows = Flows(lab)
    sizes = {"download": 5 * MEGABYTE, "alias": 7 * MEGABYTE, "alias2": 9 * MEGABYTE}
    try:
        # Resolved beforehand: three resolvers cannot share the one port either.
        known = {name: f"{name}.httpbin:80:{lab.client.resolve(name=f'{name}.httpbin')[0]}" for name in sizes}
        options = ("-o", "/dev/null", "--max-time", "15", "--resolve")
        with Capture(lab.network.namespaces["resources"], "dns_resources") as seen, ThreadPoolExecutor(3) as pool:
            jobs = {
                size: pool.submit(lab.client.curl, f"http://{name}.httpbin/bytes?num={size}", *options, known[name])
                for name, size in sizes.items()
            }
        for size, job in jobs.items():
            fetched = job.result()
            assert fetched.ok, fetched
            assert fetched.bytes == size
    finally:
        lab.client.namespace.sysctl(ipv4__ip_local_port_range="32768 60999")
    opened = [p for p in seen.packets if not p.outgoing and p.protocol == 6 and p.transport[13] & 0x12 == 2]
    assert {p.destination for p in opened} == {"172.21.0.101"}
    assert len({p.ports for p in opened}) == 3
    received = {flow["domain"]: int(flow["rx_bytes"]) for flow in flows.ended(3)}
    assert received.keys() == {f"{name}.httpbin" for name in sizes}
    for name, size in sizes.items():
        assert size <= received[f"{name}.httpbin"] <= size + MEGABYTE


@pytest.mark.spec("PORTAL-38")
@both_paths
def test_s2_and_s5_everything_goes_on_without_the_portal(lab):
    urls = (BY_DNS, BY_IPV4, BY_IPV6, "http://download.httpbin/get")
    assert all(lab.client.curl(url).ok for url in urls)
    lab.portal.stop()
    try:
        assert not lab.portal.state()["gateways"]
        assert all(lab.client.curl(url).ok for url in urls)
        assert look_up(lab.client, "dns.httpbin.search.test")
        assert sha256_of(lab.client, TEN_MEGABYTES, *STALL) == SHA256_OF_TEN_MILLION_ZEROS
    finally:
        come_back(lab)


@both_paths
def test_s6_a_portal_that_restarts_under_a_download_is_not_noticed(lab):
    assert all(lab.client.curl(url).ok for url in (BY_IPV4, BY_IPV6, "http://download.httpbin/get"))
    mark = lab.portal.mark()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(sha256_of, lab.client, TEN_MEGABYTES, *STALL, "--limit-rate", "6M")
        lab.portal.stop(code=1001)
        come_back(lab)
        assert job.result() == SHA256_OF_TEN_MILLION_ZEROS
    assert [e for e in lab.portal.entries(event="create_authorization") if e["n"] >= mark] == []
    assert lab.client.curl(BY_IPV4).ok
    assert lab.client.curl(BY_IPV6).ok


def come_back(lab):
    """The portal returns, and with it everybody."""
    lab.portal.start()

    def all_are_here():
        state = lab.portal.state()
        return state["gateways"] and state["clients"] and len(state["relays"]) == 2

    wait_until(all_are_here, timeout=15, what="all are at the portal again")


def test_s8_who_is_told_prohibited_may_ask_again(lab):
    client, portal = lab.client, lab.portal
    client.new_flow_on_prohibited(enabled=True)
    try:
        assert client.curl(BY_IPV4).ok
        assert client.curl(BY_IPV6).ok
        assert ping(client, "dns.httpbin.search.test")
        client_id = portal.wait_client()
        for resource in portal.state()["resources"].values():
            if resource["type"] == "cidr":
                portal.reject_access(client=client_id, resource=resource["id"])
        for url in (BY_IPV4, BY_IPV6):
            refused = client.curl(url)
            assert not refused.ok
            assert refused.seconds < 2
        assert client.curl(BY_IPV4).ok
        assert client.curl(BY_IPV6).ok
    finally:
        client.new_flow_on_prohibited(enabled=False)


def test_s20_a_gateway_that_restarts_says_goodbye_and_clients_come_back(lab):
    assert lab.client.curl(BY_IPV4).ok
    assert lab.client.curl(BY_IPV6).ok
    lab.restart_gateway()
    assert "goodbye" in {entry["what"] for entry in lab.client.log()}
    assert lab.client.curl(BY_IPV4, timeout=5).ok
    assert lab.client.curl(BY_IPV6, timeout=5).ok


# The rest needs a network of its own.


def test_s10_a_download_between_two_symmetric_nats_over_one_relay():
    with Lab("one-relay", gateway_environment=FLOW_LOGS) as lab:
        download_as_one_flow(lab)
        assert set(lab.client.paths()) <= RELAYED
        assert lab.warnings() == []


@pytest.mark.needs("turnserver")
@pytest.mark.parametrize("relays", [("coturn", "coturn"), ("coturn", "relay")], ids="-".join)
def test_a_download_over_coturn(relays):
    with Lab(gateway_nat=Nat.SYMMETRIC, client_nat=Nat.SYMMETRIC, relays=relays) as lab:
        assert lab.client.curl(BY_DNS).ok
        assert sha256_of(lab.client, TEN_MEGABYTES, *STALL) == SHA256_OF_TEN_MILLION_ZEROS
        assert set(lab.client.paths()) <= RELAYED
        assert lab.warnings() == []


@pytest.mark.spec("OPS-31", "TUNNEL-85")
def test_s12_a_gateway_without_ipv6():
    with Lab("no-ipv6", gateway_environment=FLOW_LOGS) as lab:
        download_as_one_flow(lab)
        assert lab.client.curl(BY_IPV4).ok
        gateway = lab.gateway
        assert gateway.run("ip", "-6", "route", "show", "table", "all", check=False).stdout == ""
        assert gateway.namespace.address(TUN, ipv6=True) is None
        for protocol, address_family in product(("udp", "tcp"), ("", "6")):
            sockets = gateway.run("cat", f"/proc/net/{protocol}{address_family}").stdout
            assert (DNS_PORT in sockets) is (address_family == "")
        assert lab.warnings() == []


def test_s13_a_download_with_a_fifth_of_the_clients_packets_lost():
    with Lab() as lab:
        assert lab.client.curl(BY_DNS).ok
        lab.places["client1"].router.nft(
            "table inet lossy {\nchain c {\ntype filter hook forward priority 0\n"
            'oifname "internet" numgen random mod 100 < 20 drop\n}\n}\n'
        )
        checksum = sha256_of(lab.client, TEN_MEGABYTES, "--speed-limit", "10240", "--speed-time", "30")
        assert checksum == SHA256_OF_TEN_MILLION_ZEROS
        assert lab.warnings() == []


def test_s17_a_download_survives_a_client_that_moves():
    size = 3 * MEGABYTE
    with Lab(gateway_environment=FLOW_LOGS) as lab, ThreadPoolExecutor(1) as pool:
        client = lab.client
        assert client.curl(BY_DNS).ok
        flows = Flows(lab)
        # Small enough that the download is under way when the client moves.
        client.namespace.sysctl(ipv4__tcp_rmem="4096 1000000 1000000")
        url = f"http://download.httpbin/bytes?num={size}"
        job = pool.submit(client.curl, url, "-o", "/dev/null", "--limit-rate", "700k", "--max-time", "40")
        received = lambda: client.status()["counters"].get("tun_tx_bytes", 0)
        wait_until(lambda: received() > MEGABYTE, timeout=10, what="the download is under way")
        lab.cut("client1")
        lab.roam("client1")
        lab.cut("client1", cut=False)
        client.network_reset()
        assert client.curl(BY_IPV4, timeout=10).ok
        (link,) = client.status()["links"]
        assert link["established_ms"] < 2000
        fetched = job.result()
        assert fetched.ok, fetched
        assert fetched.bytes == size
        (flow,) = flows.ended(1)
        assert len({(outer["src_ip"], outer["src_port"]) for outer in json.loads(flow["outers"])}) >= 2
        assert lab.warnings() == []


def test_everything_over_tls():
    with Lab("tls") as lab:
        assert lab.portal_url == f"wss://portal.test:{PORTAL_PORT}"
        assert lab.client.curl(BY_DNS).ok
        assert lab.client.curl(BY_IPV6).ok
        assert lab.warnings() == []
