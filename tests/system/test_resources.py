"""What may be reached through the gateway's process, and what it says to the rest."""

from __future__ import annotations

import json

import pytest
from capture import Capture
from virtual_client import resource_id

from tests.lab.scenario import NAME_SERVER, TUN, Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
]

WEB, ECHO = 80, 7
CIDR4, CIDR6, NAMES = "10.20.0.0/16", "10:20::/64", "*.test"
ONLY_WEB = [{"protocol": "tcp", "port_range_start": WEB, "port_range_end": WEB}]

# Says what becomes of one TCP connection or UDP echo: "ok", or the error's name.
PROBE = """
import errno, socket, sys
protocol, host, port, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
family = socket.AF_INET6 if ":" in host else socket.AF_INET
address = socket.getaddrinfo(host, port, family, kind)[0]
with socket.socket(address[0], kind) as sock:
    sock.settimeout(3)
    try:
        for _ in range(10):  # an error comes with the next packet
            sock.connect(address[4])
            if protocol == "udp":
                sock.send(bytes(size))
                assert sock.recv(2000) == bytes(size)
            break
        print("ok")
    except OSError as error:
        print(errno.errorcode.get(error.errno, repr(error)))
"""

# Asks a name server: `udp|tcp host port name type`; prints rcode, TC and the number of answers.
DNS = """
import dns.flags, dns.message, dns.query, dns.rcode, sys
transport, host, port, name, kind = sys.argv[1:]
ask = {"udp": dns.query.udp, "tcp": dns.query.tcp}[transport]
answer = ask(dns.message.make_query(name, kind), host, port=int(port), timeout=5)
print(dns.rcode.to_text(answer.rcode()), bool(answer.flags & dns.flags.TC), sum(map(len, answer.answer)))
"""

# One echo request from an address of the sender's choice; prints kind and code of the ICMP message that comes back.
SPOOFED = """
import socket, struct, sys
own, to = sys.argv[1:]
ipv6 = ":" in own
protocol = socket.IPPROTO_ICMPV6 if ipv6 else socket.IPPROTO_ICMP
with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_RAW, protocol) as sock:
    sock.bind((own, 0)); sock.settimeout(3)
    body = struct.pack("!HH", 7, 7)
    head = b"\\x80\\0\\0\\0" if ipv6 else b"\\x08\\0" + struct.pack("!H", 0xFFFF ^ 0x080E)
    sock.sendto(head + body, (to, 0))
    while True:
        packet = sock.recv(2000)
        message = packet if ipv6 else packet[(packet[0] & 15) * 4:]
        if message[0] not in (128, 8):
            print(message[0], message[1]); break
"""


@pytest.fixture(scope="module")
def lab():
    resources = (f"cidr={CIDR4}", f"cidr={CIDR6}", f"dns={NAMES}", f"cidr={NAME_SERVER}/32")
    with Lab(resources=resources) as lab:
        yield lab


@pytest.fixture(autouse=True)
def nobody_warns(lab):
    before = lab.warnings()
    yield
    assert lab.warnings()[len(before) :] == []


@pytest.fixture
def filtered(lab):
    """Sets filters of a resource by its address; afterwards all have none again."""
    changed = []

    def change(address, filters):
        resource = resource_id(lab.portal, address)
        changed.append(resource)
        lab.portal.set_filters(resource=resource, filters=filters)

    yield change
    for resource in changed:
        lab.portal.set_filters(resource=resource, filters=[])


def probe(lab, protocol, host, port, size=8):
    return lab.client.namespace.python(PROBE, protocol, host, str(port), str(size)).strip()


@pytest.mark.parametrize(
    ("resource", "host"),
    [(CIDR4, "10.20.0.100"), (CIDR6, "10:20::100"), (NAMES, "example.test")],
    ids=["ipv4", "ipv6", "dns"],
)
def test_a_filter_lets_through_what_it_names_and_refuses_the_rest_at_once(lab, filtered, resource, host):
    assert probe(lab, "tcp", host, ECHO) == probe(lab, "udp", host, ECHO) == "ok"
    prohibited = lab.client.status()["prohibited"]
    filtered(resource, ONLY_WEB)
    with Capture(lab.network.namespaces["resources"], "resources") as seen:
        assert probe(lab, "tcp", host, WEB) == "ok"
        refusal = "EACCES" if ":" in host else "EHOSTUNREACH"
        assert probe(lab, "tcp", host, ECHO) == refusal
        assert probe(lab, "udp", host, ECHO) == refusal
    assert {p.ports[1] for p in seen.packets if not p.outgoing and p.protocol in {6, 17}} == {WEB}
    assert lab.client.status()["prohibited"] > prohibited

    filtered(resource, [])
    assert probe(lab, "tcp", host, ECHO) == probe(lab, "udp", host, ECHO) == "ok"


@pytest.mark.parametrize("size", [1, 1000, 1232])
def test_udp_of_every_size_that_fits_is_echoed(lab, size):
    assert probe(lab, "udp", "10.20.0.100", ECHO, size) == "ok"
    assert probe(lab, "udp", "10:20::100", ECHO, size) == "ok"
    assert probe(lab, "udp", "example.test", ECHO, size) == "ok"


@pytest.mark.parametrize(
    ("address", "device", "to", "answer"),
    [
        ("100.64.0.9", "100.64.0.9/32", "10.20.0.100", "3 13"),
        ("192.0.2.7", "192.0.2.7/32", "10.20.0.100", "3 13"),
        ("fd00:2021:1111::9", "fd00:2021:1111::9/128", "10:20::100", "1 1"),
    ],
)
def test_a_source_that_is_not_the_clients_own_is_refused(lab, address, device, to, answer):
    assert lab.client.ping(to, timeout=5)
    lab.client.namespace.ip(f"address add {device} dev tun-client" + (" nodad" if ":" in device else ""))
    try:
        with Capture(lab.places["gateway"].namespace, TUN) as seen:
            assert lab.client.namespace.python(SPOOFED, address, to).strip() == answer
    finally:
        lab.client.namespace.ip(f"address delete {device} dev tun-client")
    assert [p for p in seen.packets if address in {p.source, p.destination}] == []


def test_names_without_an_address_of_the_family_are_unreachable_and_not_prohibited(lab):
    prohibited = lab.client.status()["prohibited"]
    lab.resources.call("set_records", name="four.test", addresses=["10.20.0.100"])
    lab.resources.call("delete_records", name="nothing.test")
    stand_ins = lab.client.resolve(name="four.test")
    four, six = stand_ins[0], stand_ins[-1]
    assert probe(lab, "tcp", four, WEB) == "ok"
    assert probe(lab, "tcp", six, WEB) == "EHOSTUNREACH"
    for stand_in in lab.client.resolve(name="nothing.test")[::4]:
        assert probe(lab, "tcp", stand_in, WEB) in {"EHOSTUNREACH", "ENETUNREACH"}
    assert lab.client.status()["prohibited"] == prohibited


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_name_server_behind_the_gateway_answers(lab, transport):
    def ask(name, kind):
        return lab.client.namespace.python(DNS, transport, NAME_SERVER, "53", name, kind).strip()

    assert ask("web.test", "A") == "NOERROR False 1"
    assert ask("nothing.invalid", "A") == "NXDOMAIN False 0"
    assert ask("big.test", "TXT") == ("NOERROR True 0" if transport == "udp" else "NOERROR False 15")


@pytest.mark.spec("TUNNEL-78", "TUNNEL-80")
@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_the_gateways_own_name_server_answers_clients(lab, transport):
    assert lab.client.ping("10.20.0.100", timeout=5)
    addresses = [lab.gateway.namespace.address(TUN), lab.gateway.namespace.address(TUN, ipv6=True)]
    for address in addresses:
        ask = lambda name, kind: lab.client.namespace.python(DNS, transport, address, "53535", name, kind).strip()
        assert ask("web.test", "A") == "NOERROR False 1"
        assert ask("big.test", "TXT") == ("NOERROR True 0" if transport == "udp" else "NOERROR False 15")


def test_the_gateways_own_address_answers(lab):
    assert lab.client.ping("10.20.0.100", timeout=5)
    assert lab.client.ping(lab.gateway.namespace.address(TUN), timeout=5)


def test_resources_see_the_gateways_address_unless_they_route_clients_themselves(lab):
    fetched = lab.client.curl("http://10.20.0.100/get")
    assert json.loads(fetched.body)["origin"] == "10.20.0.254"
    fetched = lab.client.curl("http://[10:20::100]/get")
    assert json.loads(fetched.body)["origin"] == "10:20::254"


def test_the_internet_resource_reaches_what_is_public_and_nothing_else():
    with Lab(resources=("internet",)) as lab:
        portal = lab.places["portal"]
        with Capture(lab.places["gateway"].namespace, TUN) as seen:
            assert lab.client.curl(f"http://{portal.public_ipv4}:8081/").status == 404
            assert lab.client.curl(f"http://[{portal.public_ipv6}]:8081/").status == 404
            assert lab.client.status()["prohibited"] == 0
            assert probe(lab, "tcp", "10.20.0.100", WEB) in {"ENETUNREACH", "EHOSTUNREACH"}
        reached = {p.destination for p in seen.packets if not p.outgoing and p.protocol == 6}
        assert reached == {portal.public_ipv4, portal.public_ipv6}
        assert lab.warnings() == []
