"""Access that ends under load: not one more packet once the gateway has been told (seen at its TUN and on its wire).

When the gateway has handled the portal's word cannot be seen, but when it has handled the next: the portal authorizes
somebody else right behind, and the acknowledgement of that is the moment from which nothing may pass.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time

import pytest
from capture import Capture, udp, without_offload
from virtual_client import invite, resource_id

from tests.lab.process import wait_until
from tests.lab.scenario import TUN, Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
]

PORT = 9000
CIDR4, CIDR6, NAMES = "10.20.0.0/16", "10:20::/64", "**.httpbin"
# Bytes of UDP payload on the wire that a datagram of the floods becomes, in either family, with and without channel
# header; ICMP errors are shorter, or 48 bytes longer as they quote it whole.
FLOODED = range(1000 + 8 + 28 + 32, 1000 + 8 + 48 + 32 + 4 + 1)
OFFERED = 1000  # packets a second, at least, that the gateway must go on refusing

# Two floods of numbered datagrams: from the client to a resource, and back from where the first one came.
FLOOD = """
import itertools, socket, struct, sys, time
role, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    if role == "resource":
        sock.bind((host, port))
        sock.connect(sock.recvfrom(2000)[1])
    else:
        sock.connect((host, port))
    start = time.monotonic()
    for number in itertools.count():
        try:
            sock.send(struct.pack("!Q", number) + bytes(1000))
        except OSError:
            pass  # an ICMP error that came back
        if (early := start + number / 2000 - time.monotonic()) > 0:
            time.sleep(early)
"""


@pytest.fixture(scope="module")
def lab():
    with Lab(iperf3=shutil.which("iperf3") is not None) as lab:
        without_offload(lab.places["gateway"].namespace, "eth0")
        yield lab


@pytest.fixture(autouse=True)
def fresh(lab):
    """A new connection, and nobody warns."""
    lab.client.reset()
    before = lab.warnings()
    yield
    lab.portal.settings(authorization_lifetime_s=14 * 86400)
    assert lab.warnings()[len(before) :] == []


@contextlib.contextmanager
def running(namespace, *command):
    with subprocess.Popen(
        [*namespace.prefix(), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def flooding(lab, address, name=None):
    """Both floods, through the stand-in of a name or to the address itself."""
    target = lab.client.resolve(name=name)[0] if name else address
    resources = lab.network.namespaces["resources"]
    with (
        running(resources, sys.executable, "-c", FLOOD, "resource", address, str(PORT)),
        running(lab.client.namespace, sys.executable, "-c", FLOOD, "client", target, str(PORT)),
    ):
        yield


class Watched:
    """The gateway's TUN, its wire, and what client and resource offer."""

    def __init__(self, lab, interface="resources"):
        gateway = lab.places["gateway"].namespace
        self.tun = Capture(gateway, TUN)
        self.wire = Capture(gateway, "eth0")
        self.client = Capture(lab.client.namespace, "tun-client")
        self.resource = Capture(lab.network.namespaces["resources"], interface)
        self.all = (self.tun, self.wire, self.client, self.resource)

    def __enter__(self):
        for capture in self.all:
            capture.__enter__()
        return self

    def __exit__(self, *error):
        for capture in self.all:
            capture.__exit__(*error)

    def passed_in(self):
        """What the gateway gave the resource."""
        return udp(list(self.tun.packets), PORT, outgoing=False)

    def passed_out(self):
        """What the gateway sent the client, by its size: it cannot be looked into."""
        sent = [p for p in list(self.wire.packets) if p.outgoing and p.protocol == 17]
        return [p for p in sent if len(p.transport) - 8 in FLOODED]

    def wait_flow(self):
        """Until the floods are in full swing."""
        wait_until(
            lambda: len(self.passed_in()) > 300 and len(self.passed_out()) > 100, timeout=10, what="both floods pass"
        )

    def verify(self, end, begin, ended):
        """Nothing passed after `ended`, though enough was offered until `end`; in was over a second after `begin`."""
        assert [p for p in self.passed_in() if p.at > ended] == []
        assert [p for p in self.passed_out() if p.at > ended] == []
        assert max(p.at for p in self.passed_in()) < begin + 1.0
        arrived = {self.client: self.passed_in(), self.resource: udp(self.client.packets, PORT, outgoing=False)}
        for offered, passed in arrived.items():
            after = [p for p in udp(offered.packets, PORT, outgoing=True) if ended < p.at < end]
            assert len(after) > OFFERED * (end - ended)
            # Of those not one arrived, later or elsewhere.
            assert max(map(number, passed)) < min(map(number, after))


def number(packet):
    """The number of a datagram of the floods."""
    return int.from_bytes(packet.transport[8:16], "big")


def boottime():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def told(lab, order):
    """Give the portal an order; when its frame left, and when the gateway had dealt with it."""
    mark = lab.portal.mark()
    order()
    begin = lab.portal.wait_for(since=mark, kind="gateway", direction="out")["at"]
    ref = invite(lab.portal, CIDR6)["ref"]
    is_answer = lambda entry: entry["payload"].get("ref") == ref
    entry = lab.portal.wait_for(is_answer, since=mark, kind="gateway", direction="in", event="authorization_created")
    return begin, entry["at"]


def omit_from_init(lab, client, resource):
    lab.portal.forget_authorization(client=client, resource=resource)
    lab.portal.send_init()


WAYS = {
    "reject_access": lambda lab, client, resource: lab.portal.reject_access(client=client, resource=resource),
    "init": omit_from_init,
    "filters": lambda lab, client, resource: lab.portal.set_filters(resource=resource, filters=[{"protocol": "icmp"}]),
}


# The first: connections that later tests break off keep asking for other resources.
def test_a_download_stops_when_the_last_grant_is_withdrawn_and_the_client_is_told_goodbye(lab):
    resource, client = resource_id(lab.portal, NAMES), lab.portal.wait_client()
    said = len(lab.client.log())
    url = "http://download.httpbin/bytes?num=100000000"
    gateway = lab.places["gateway"].namespace
    with running(lab.client.namespace, "curl", "-s", "-o", "/dev/null", "--limit-rate", "20M", url) as download:
        with Capture(gateway, TUN) as tun:
            wait_until(lambda: sum(len(p.data) for p in list(tun.packets)) > 5_000_000, timeout=15, what="a download")
            lab.portal.forbid(resource=resource)  # or the client would just ask again
            begin, ended = told(lab, lambda: lab.portal.reject_access(client=client, resource=resource))
            wait_until(lambda: boottime() > ended + 0.5, timeout=5, what="half a second passes")
        assert download.poll() is None
    lab.portal.forbid(resource=resource, forbidden=False)
    assert [p for p in tun.packets if not p.outgoing and p.protocol == 6 and p.at > ended] == []
    assert ended < begin + 1.0
    assert "goodbye" in {entry["what"] for entry in lab.client.log()[said:]}
    assert lab.client.status()["links"] == []
    assert lab.client.curl("http://download.httpbin/get").ok


@pytest.mark.spec("TUNNEL-36", "TUNNEL-76")
@pytest.mark.parametrize(
    ("way", "resource", "address", "name", "interface"),
    [
        ("reject_access", CIDR4, "10.20.0.100", None, "resources"),
        ("init", CIDR4, "10.20.0.100", None, "resources"),
        ("filters", CIDR4, "10.20.0.100", None, "resources"),
        ("reject_access", CIDR6, "10:20::100", None, "resources"),
        ("reject_access", NAMES, "172.21.0.101", "download.httpbin", "dns_resources"),
    ],
    ids=["reject", "init", "filters", "reject-ipv6", "reject-dns"],
)
def test_not_one_packet_passes_after_the_gateway_was_told(lab, way, resource, address, name, interface):
    other = "http://dns.httpbin.search.test/get"
    assert lab.client.curl(other).ok  # so that the connection outlives the grant
    resource = resource_id(lab.portal, resource)
    client = lab.portal.wait_client()
    try:
        with Watched(lab, interface) as seen, flooding(lab, address, name):
            seen.wait_flow()
            begin, ended = told(lab, lambda: WAYS[way](lab, client, resource))
            wait_until(lambda: boottime() > ended + 0.5, timeout=5, what="half a second passes")
            end = boottime()
            assert lab.client.curl(other).ok
        seen.verify(end, begin, ended)
    finally:
        lab.portal.set_filters(resource=resource, filters=[])


def test_an_expiry_ends_both_directions_on_the_second(lab):
    assert lab.client.curl("http://dns.httpbin.search.test/get").ok
    lab.portal.settings(authorization_lifetime_s=2)
    mark = lab.portal.mark()
    with Watched(lab) as seen, flooding(lab, "10.20.0.100"):
        seen.wait_flow()
        granted = lab.portal.wait_for(since=mark, event="create_authorization")["payload"]
        expires = granted["expires_at"] - time.time() + boottime()
        ended = expires + 1.0  # the next tick at the latest (spec tunnel.md 5.7)
        wait_until(lambda: boottime() > ended + 0.5, timeout=10, what="it expires")
        end = boottime()
    seen.verify(end, expires, ended)
    assert max(p.at for p in seen.passed_in()) > expires - 1.0


@pytest.mark.needs("iperf3")
@pytest.mark.parametrize("options", [(), ("-R",)], ids=["up", "down"])
def test_iperf3_stops_within_a_second(lab, options):
    assert lab.client.curl("http://dns.httpbin.search.test/get").ok
    resource, client = resource_id(lab.portal, CIDR4), lab.portal.wait_client()
    gateway = lab.places["gateway"].namespace
    load = ("iperf3", "-c", "10.20.0.110", "-t", "30", *options)
    with running(lab.client.namespace, *load), Capture(gateway, TUN) as tun, Capture(gateway, "eth0") as wire:
        bytes_passed = lambda: sum(len(p.data) for p in list(tun.packets))
        wait_until(lambda: bytes_passed() > 20_000_000, timeout=20, what="full load")
        begin, ended = told(lab, lambda: lab.portal.reject_access(client=client, resource=resource))
        wait_until(lambda: boottime() > begin + 1.2, timeout=5, what="a second passes")
    assert ended < begin + 1.0
    written = [p for p in tun.packets if not p.outgoing and p.protocol == 6 and p.destination == "10.20.0.110"]
    assert [p for p in written if p.at > ended] == []
    sent = [p for p in wire.packets if p.outgoing and p.protocol == 17 and len(p.data) > 1000]
    assert [p for p in sent if p.at > ended] == []


def test_clients_get_icmp_prohibited_for_what_they_lost_and_keep_the_rest(lab):
    client = lab.portal.wait_client()
    for url in ("http://10.20.0.100/get", "http://[10:20::100]/get", "http://dns.httpbin.search.test/get"):
        assert lab.client.curl(url).ok
    before = lab.client.status()["prohibited"]
    lab.portal.reject_access(client=client, resource=resource_id(lab.portal, CIDR4))
    invite(lab.portal, CIDR6)
    refused = lab.client.curl("http://10.20.0.100/get")
    assert refused.status == 0
    assert refused.seconds < 1
    assert lab.client.status()["prohibited"] > before
    assert lab.client.curl("http://[10:20::100]/get").ok
    assert lab.client.curl("http://dns.httpbin.search.test/get").ok
