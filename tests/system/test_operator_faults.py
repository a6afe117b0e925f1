"""Twelve faults that operators meet. For each, one line of `doctor` or of the log names the cause and the remedy."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from email.utils import formatdate

import pytest
from doctor_process import control_of, doctor
from gateway_process import INIT, TOKEN, inside, portal_in
from gevent import ssl
from test_host_network import DOCKER

from tests.lab.certificates import Authority
from tests.lab.process import REPOSITORY
from tests.lab.program import gateway_command
from tests.lab.scripted_portal import Refusal, ScriptedPortal

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private")
PROBLEM = {"content-type": "application/problem+json"}
DUPLICATE = Refusal(409, '{"code":"gateway_already_connected","detail":"Another connection is active"}', PROBLEM)
RELAY = {
    "id": "11111111-1111-1111-1111-111111111111",
    "type": "turn",
    "expires_at": 4102444800,
    "username": "4102444800:lab",
    "password": "s3cret",
}


def line_with(gateway, level, *parts):
    """The one kind of line at this level that has all parts; the first such."""
    for line in gateway.lines:
        if re.match(rf"^\S+ +{level} ", line) and all(part in line for part in parts):
            return line
    raise AssertionError(f"no {level} line with {parts} in\n{gateway.output}")


@pytest.fixture(name="wan", autouse=True)
def wan_fixture(lab_network, namespace):
    """The namespace with a way out to a router that answers nothing by itself."""
    number = len(lab_network.namespaces)
    router = lab_network.namespace(f"r{number}")
    lab_network.link(namespace, "wan0", router, "lan0")
    namespace.ip("address add 203.0.113.2/24 dev wan0", "route add default via 203.0.113.1")
    router.ip("address add 203.0.113.1/24 dev lan0")
    return router


# 1


@pytest.mark.spec("OPS-14", "OPS-19")
def test_no_token(namespace, portal, start):
    found = doctor(namespace, portal=portal, FIREZONE_TOKEN=None)
    assert found.failed() >= {"token"}
    assert found.status == 1
    for source in ("as argument", "variable FIREZONE_TOKEN", "systemd credential FIREZONE_TOKEN"):
        assert source in found["token"].seen
    assert "make a new token for the site in the portal and set FIREZONE_TOKEN to it" in found["token"].remedy
    gateway = start(portal=portal, FIREZONE_TOKEN=None)
    assert "there is no token: give it as argument, in the variable FIREZONE_TOKEN" in gateway.fails()


# 2


@pytest.mark.spec("OPS-19", "OPS-23")
def test_a_token_that_has_expired(portal, start):
    portal.refuse_always = [Refusal(401, '{"code":"invalid_token"}', PROBLEM)]
    gateway = start(portal=portal)
    line = gateway.fails()
    assert "the authentication token is invalid, expired or was revoked" in line
    assert "make a new token for the site in the portal and set FIREZONE_TOKEN to it" in line
    assert len(portal.requests) == 1
    assert TOKEN not in gateway.output


def test_a_token_that_expires_while_the_gateway_serves(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    portal.connection(0).push("disconnect", {"reason": "token_expired"})
    line = gateway.fails()
    assert "expired" in line
    assert "make a new token" in line


# 3


@pytest.mark.spec("OPS-24")
def test_another_gateway_has_the_same_identity(namespace, portal, start):
    portal.refuse_always = [DUPLICATE]
    gateway = start(portal=portal)
    gateway.says("gateway_already_connected")
    cause, remedy = "another gateway with this identity is online", "give each gateway its own FIREZONE_ID"
    line_with(gateway, "INFO", "HTTP 409", "detail=Another connection is active", cause, remedy)
    found = doctor(namespace, portal=portal, control=control_of(gateway))
    assert found.failed() == {"identity", "portal-login"}
    assert cause in found["identity"].seen
    assert remedy in found["identity"].remedy
    assert "HTTP 409" in found["portal-login"].seen
    assert remedy in found["portal-login"].remedy
    assert gateway.terminate() == 0  # its last line, 15 s later, would repeat the last attempt's, as of other failures


# 4


@pytest.fixture(name="blocked")
def blocked_fixture(namespace, wan, start):
    """A gateway whose relay is behind a router that drops UDP."""
    wan.nft("table inet f { chain in { type filter hook prerouting priority raw; meta l4proto udp drop\n }\n }\n")
    with portal_in(namespace) as portal:
        portal.push_after_join = [("init", INIT | {"relays": [RELAY | {"addr": "203.0.113.1:3478"}]})]
        gateway = start(portal=portal)
        gateway.wait_ready()
        yield gateway, portal


def test_udp_is_blocked(namespace, blocked):
    gateway, portal = blocked
    found = doctor(namespace, portal=portal, control=control_of(gateway))
    assert found.failed() == {"udp-outbound"}
    assert "UDP seems blocked" in found["udp-outbound"].seen
    assert "203.0.113.1:3478" in found["udp-outbound"].seen
    assert (
        "let UDP out of this host's network to any port (relays use 3478 and 49152-65535)"
        in found["udp-outbound"].remedy
    )
    gateway.says("relay .* failed: no response", patience=40)
    line_with(gateway, "WARN", "no response; if all relays do, UDP is blocked: let it out of this network to any port")


def test_udp_is_blocked_as_a_server_of_the_operators_shows(namespace, wan, portal):
    wan.nft("table inet f { chain in { type filter hook prerouting priority raw; meta l4proto udp drop\n }\n }\n")
    found = doctor(namespace, "--stun", "203.0.113.1:3478", portal=portal)
    assert found.failed() == {"udp-outbound"}
    assert found["udp-outbound"].seen == "UDP seems blocked: no answer from 203.0.113.1:3478"
    assert "let UDP out" in found["udp-outbound"].remedy


# 5


@pytest.mark.spec("OPS-22")
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("reject with tcp reset", "Connection refused"),
        ("drop", "no answer within 5 s"),
        ("reject with icmp admin-prohibited", "No route to host"),
    ],
    ids=["refused", "dropped", "prohibited"],
)
def test_a_firewall_keeps_the_portal_away(namespace, wan, start, rule, said):
    wan.nft(f"table ip f {{ chain in {{ type filter hook input priority 0; tcp dport 443 {rule}\n }}\n }}\n")
    url = "ws://203.0.113.1:443"
    found = doctor(namespace, FIREZONE_API_URL=url)
    assert found.failed() == {"portal"}
    assert "203.0.113.1" in found["portal"].seen
    assert said in found["portal"].seen
    remedy = "let this host reach TCP port 443 there, or name an HTTP proxy in HTTPS_PROXY"
    assert remedy in found["portal"].remedy
    gateway = start(FIREZONE_API_URL=url)
    gateway.says("dialling again")
    line_with(gateway, "INFO", said, remedy)


def test_the_portals_name_has_no_address(namespace, start):
    namespace.file("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    url = "wss://portal.invalid"
    found = doctor(namespace, FIREZONE_API_URL=url)
    assert found.failed() == {"portal-name"}
    assert "portal.invalid has no addresses" in found["portal-name"].seen
    assert "check the nameservers in /etc/resolv.conf" in found["portal-name"].remedy
    gateway = start(FIREZONE_API_URL=url)
    gateway.says("dialling again")
    line_with(gateway, "INFO", "portal.invalid has no addresses", "check the nameservers in /etc/resolv.conf")


# 6


def tls_portal(namespace, directory, *, days=(-1, 30)):
    """A portal behind TLS whose certificate is valid between these days from now, and its authority's file."""
    authority = Authority(directory)
    certificate, key = authority.issue(["127.0.0.1"])
    request = directory / "again.csr"
    openssl = lambda *words: subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    openssl(
        "req", "-new", "-key", key, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", request
    )
    first, last = (time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + day * 86_400)) for day in days)
    (directory / "index.txt").touch()
    (directory / "serial").write_text("1000\n")
    (directory / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=lab\n[lab]\ndatabase={directory}/index.txt\nserial={directory}/serial\n"
        f"new_certs_dir={directory}\ndefault_md=sha256\npolicy=any\ncopy_extensions=copy\n[any]\ncommonName=supplied\n"
    )
    openssl(
        "ca", "-batch", "-config", directory / "ca.cnf", "-cert", authority.certificate,
        "-keyfile", directory / "ca.key", "-startdate", first, "-enddate", last,
        "-in", request, "-out", certificate, "-notext",
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with inside(namespace):
        portal = ScriptedPortal(tls=context)
    return portal, {"FIREZONE_API_URL": f"wss://127.0.0.1:{portal.port}", "SSL_CERT_FILE": str(authority.certificate)}


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("days", "said"),
    [((2, 30), "certificate is not yet valid"), ((-30, -2), "certificate has expired")],
    ids=["behind", "ahead"],
)
def test_the_clock_is_wrong_as_the_certificate_shows(namespace, start, tmp_path, days, said):
    portal, environment = tls_portal(namespace, tmp_path, days=days)
    with portal:
        found = doctor(namespace, **environment)
        assert found.failed() == {"portal-certificate"}
        certificate = found["portal-certificate"]
        assert said in certificate.seen
        assert "this host's clock says 20" in certificate.remedy
        assert "set it: sudo timedatectl set-ntp true" in certificate.remedy
        gateway = start(**environment)
        gateway.says("dialling again")
        line_with(gateway, "INFO", said, "this host's clock says 20", "set it: sudo timedatectl set-ntp true")


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("offset", "state", "said"),
    [
        (-7200, "fail", "2 hours ahead of the portal's"),
        (86_400 * 40, "fail", "40 days behind the portal's"),
        (125, "warn", "2 minutes behind the portal's"),
        (0, "ok", "as the portal's"),
    ],
)
def test_the_clock_is_wrong_as_the_portals_date_shows(namespace, tmp_path, offset, state, said):
    portal, environment = tls_portal(namespace, tmp_path)
    portal.refuse_always = [Refusal(404, "", {"Date": formatdate(time.time() + offset, usegmt=True)})]
    with portal:
        found = doctor(namespace, **environment)
    assert found["clock"].state == state
    assert said in found["clock"].seen
    assert found["clock"].remedy == ("" if state == "ok" else "sudo timedatectl set-ntp true")
    assert found.failed() == ({"clock"} if state == "fail" else set())
    (request,) = portal.requests
    assert request.path == "/"  # no gateway's, and no token
    assert "x-authorization" not in request.headers


# 7


@pytest.mark.spec("OPS-47")
def test_dockers_policy_drops_what_is_forwarded(namespace, portal, start):
    namespace.nft(DOCKER)
    found = doctor(namespace, portal=portal)
    assert (found.status, found["firewall-forward"].state) == (0, "warn")
    assert "ip filter FORWARD (iptables, as Docker and ufw use it)" in found["firewall-forward"].seen
    assert (
        "drops forwarded packets; the gateway has its own accepted there when it starts"
        in found["firewall-forward"].seen
    )
    gateway = start(portal=portal)
    gateway.wait_ready()
    line_with(
        gateway, "INFO", "ip filter FORWARD drops forwarded packets: those of tun-firezone are now accepted there"
    )
    assert doctor(namespace, portal=portal, control=control_of(gateway))["firewall-forward"].state == "ok"
    namespace.nft("flush chain ip filter FORWARD\n")  # as a restart of Docker does
    found = doctor(namespace, portal=portal, control=control_of(gateway))
    assert found.failed() == {"firewall-forward"}
    assert "drops what clients send through this host" in found["firewall-forward"].seen
    commands = re.findall(r"sudo (nft insert rule [^;(]+?)(?:;| \()", found["firewall-forward"].remedy)
    assert len(commands) == 2
    for command in commands:
        namespace.run(*command.split())
    assert doctor(namespace, portal=portal, control=control_of(gateway))["firewall-forward"].state == "ok"


# 8


@pytest.mark.spec("OPS-31")
def test_the_host_has_no_ipv6(namespace, start):
    namespace.sysctl(ipv6__conf__all__disable_ipv6=1, ipv6__conf__default__disable_ipv6=1)
    with portal_in(namespace) as portal:
        found = doctor(namespace, portal=portal)
        assert (found.status, found["ipv6"].state) == (0, "warn")
        assert found["ipv6"].seen == "IPv6 is disabled on this host: clients reach IPv4 resources only"
        assert "sudo sysctl -w net.ipv6.conf.all.disable_ipv6=0" in found["ipv6"].remedy
        gateway = start(portal=portal)
        gateway.wait_ready()
        line_with(
            gateway, "INFO", "IPv6 is disabled on this host and stays so", "sysctl -w net.ipv6.conf.all.disable_ipv6=0"
        )
        assert namespace.address("tun-firezone") == "100.71.4.9"


# 9


@pytest.mark.spec("OPS-19")
def test_the_tun_node_is_missing(namespace, portal, start, tmp_path):
    namespace.bind("/dev/net", tmp_path)
    keep_mknod_away = ("setpriv", "--bounding-set=-mknod", "--inh-caps=-mknod")
    found = doctor(namespace, portal=portal, prefix=keep_mknod_away)
    assert found.failed() == {"tun-device"}
    assert found["tun-device"].seen == "/dev/net/tun is missing"
    assert re.search(
        r"mknod -m 0666 /dev/net/tun c 10 200|--device /dev/net/tun|10:200 rwm", found["tun-device"].remedy
    )
    asked = portal.accepted
    line = start(portal=portal, prefix=keep_mknod_away).fails()
    assert "/dev/net/tun is missing and cannot be made: Operation not permitted" in line
    assert "mknod -m 0666 /dev/net/tun c 10 200; a container has to be given it" in line
    assert portal.accepted == asked


# 10


def test_a_network_of_the_host_lies_in_the_range_of_clients(namespace, wan, portal, start):
    namespace.ip("route add 100.72.0.0/16 via 203.0.113.1")
    found = doctor(namespace, portal=portal)
    assert (found.status, found["address-overlap"].state) == (0, "warn")
    cause, remedy = "100.72.0.0/16 by wan0, which overlaps 100.64.0.0/11", "enumber that network"
    assert cause in found["address-overlap"].seen
    assert remedy in found["address-overlap"].remedy
    gateway = start(portal=portal)
    gateway.wait_ready()
    line_with(gateway, "WARN", cause, remedy)


# 11


@pytest.mark.spec("OPS-30", "OPS-32")
def test_the_ports_are_taken(namespace, portal, start):
    with inside(namespace):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("0.0.0.0", 52625))
        health = socket.create_server(("127.0.0.1", 8080))
    with udp, health:
        found = doctor(namespace, portal=portal)
        assert found.status == 0
        assert (found["udp-port"].state, found["health-port"].state) == ("warn", "warn")
        assert re.search(
            r"UDP port 52625 is taken by \S+ \(pid \d+\); the gateway uses another", found["udp-port"].seen
        )
        assert "sudo ss -lunp 'sport = :52625' shows who has it" in found["udp-port"].remedy
        assert re.search(r"TCP 127.0.0.1:8080 is taken by \S+ \(pid \d+\)", found["health-port"].seen)
        assert "--health-check-addr or HEALTH_CHECK_ADDR=" in found["health-port"].remedy
        gateway = start(portal=portal)
        gateway.says("Connected to the portal")
        line_with(gateway, "INFO", "UDP port 52625 is taken, using another; a port forwarding", "family=AF_INET ")
        line_with(
            gateway, "WARN", "choose another address with --health-check-addr or HEALTH_CHECK_ADDR", "127.0.0.1:8080"
        )


# 12


def test_the_disk_is_full(namespace, portal, start, tmp_path):
    script = "mount -t tmpfs -o size=64k none /var/lib; cat /dev/zero > /var/lib/fill 2> /dev/null || true; "
    full = (*OWN_MOUNTS, "sh", "-ec", script + 'exec "$@"', "sh")
    namespace.file("/etc/machine-id", "uninitialized\n")
    found = doctor(namespace, portal=portal, prefix=full, FIREZONE_ID=None)
    assert found.failed() == {"state-directory"}
    assert (
        found["state-directory"].seen
        == "the disk of /var/lib/firezone is full (0 KiB left), so the identity cannot be kept"
    )
    assert "free space: " in found["state-directory"].remedy
    assert "or set FIREZONE_ID" in found["state-directory"].remedy
    gateway = start(portal=portal, FIREZONE_ID=None, command=(*full, *gateway_command()))
    line = gateway.fails()
    assert "No space left on device" in line
    assert "set FIREZONE_ID or give write access to /var/lib/firezone" in line
    with_id = start(portal=portal, command=(*full, *gateway_command()))
    with_id.wait_ready()
    found = doctor(namespace, portal=portal, prefix=full, control=control_of(with_id))
    assert (found.status, found["state-directory"].state) == (0, "warn")


@pytest.mark.skipif(REPOSITORY.is_relative_to("/tmp"), reason="it covers /tmp, where this checkout lies")
def test_every_disk_is_full(namespace, portal, start):
    fill = "for place in /var/lib /tmp /var/tmp /run; do mount -t tmpfs -o size=16k none $place; "
    fill += "cat /dev/zero > $place/fill 2> /dev/null || true; done; cd /proc; "
    full = (*OWN_MOUNTS, "sh", "-ec", fill + 'exec "$@"', "sh")
    found = doctor(namespace, portal=portal, prefix=full, FIREZONE_CONTROL_SOCKET=None)
    assert found.status == 0
    assert found["state-directory"].state == "warn"
    assert "nearly full" in found["temporary-directory"].seen
    gateway = start(portal=portal, command=(*full, *gateway_command()), FIREZONE_CONTROL_SOCKET=None)
    gateway.wait_ready()
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}


def test_a_healthy_host_has_nothing_to_complain_about(namespace, wan, portal, start):
    namespace.sysctl(ipv4__ip_forward=0)
    found = doctor(namespace, portal=portal)
    assert found.failed() == set()
    assert found["forwarding"].seen.startswith("the gateway turns it on when it starts: net.ipv4.ip_forward=1")
    gateway = start(portal=portal)
    gateway.wait_ready()
    found = doctor(namespace, portal=portal, control=control_of(gateway))
    assert found.failed() == set()
    assert set(found.not_ok()) <= {"portal-certificate", "udp-outbound"}  # plain ws, and no relay
    assert found["portal-login"].seen == "the gateway is connected to the portal and serves 0 clients"
    upgraded = [request for request in portal.requests if "x-authorization" in request.headers]
    assert len(upgraded) == 1  # the gateway's: doctor sent no token, and disturbed nothing
