"""`doctor` itself: its output, the users who may run it, and that it leaves everything as it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from doctor_process import control_of, doctor
from gateway_process import TOKEN, inside
from test_host_network import DOCKER, FIREWALLD
from test_portal_dialling import tls_server

from tests.lab.certificates import Authority
from tests.lab.connect_proxy import ConnectProxy
from tests.lab.process import lab_environment
from tests.lab.program import gateway_command
from tests.lab.scenario import Lab
from tests.lab.scripted_portal import ScriptedPortal

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
NET_ADMIN = (*NOBODY, "--inh-caps=+net_admin", "--ambient-caps=+net_admin")
NAMES = [
    "kernel", "privilege", "tun-device", "tun-interface", "token", "identity", "udp-port", "health-port",
    "state-directory", "temporary-directory", "ipv4", "ipv6", "mtu", "forwarding", "reverse-path", "firewall-forward",
    "firewall-dns", "masquerade", "address-overlap", "nameservers", "buffers", "portal", "portal-certificate", "clock",
    "portal-login", "udp-outbound",
]  # fmt: skip


def run(namespace, *arguments, prefix=(), command=(), **environment):
    """A run that needs nobody in this process: status, standard output, standard error."""
    variables = {"PATH": os.environ["PATH"], "FIREZONE_CONTROL_SOCKET": "", **lab_environment(), **environment}
    done = subprocess.run(
        [*namespace.prefix(), *prefix, *(command or gateway_command()), *arguments],
        env=variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_line_for_each_check_with_its_remedy_and_a_summary(namespace):
    status, out, err = run(namespace, "doctor", "--offline", FIREZONE_ID="own", HEALTH_CHECK_ADDR="127.0.0.1:9")
    assert (status, err) == (1, "")
    *lines, summary = out.splitlines()
    rows = [re.match(r"(ok|warn|fail|unknown) +([a-z0-9-]+) +(\S.*)$", line) for line in lines]
    assert [row[2] for row in rows] == [name for name in NAMES if name != "portal-certificate"]
    token = next(row[3] for row in rows if row[2] == "token")
    assert re.match(r"there is no token .*\. Remedy: make a new token for the site in the portal", token)
    counts = {word: sum(row[1] == word for row in rows) for word in ("ok", "warn", "fail", "unknown")}
    assert summary == ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    assert counts["fail"] == 2  # no token, and no way out of this namespace


@pytest.mark.parametrize("source", ["variable", "credential"])
def test_the_token_shows_nowhere_wherever_it_comes_from(namespace, tmp_path, source):
    (tmp_path / "FIREZONE_TOKEN").write_text(TOKEN)
    given = {"variable": {"FIREZONE_TOKEN": TOKEN}, "credential": {"CREDENTIALS_DIRECTORY": str(tmp_path)}}[source]
    _, out, err = run(namespace, "doctor", "--offline", "--json", **given)
    check = next(check for check in json.loads(out)["checks"] if check["name"] == "token")
    assert check["state"] == "ok"
    assert source in check["seen"]
    assert TOKEN not in out + err


@pytest.mark.parametrize("arguments", [("--stun", "a:b"), ("--stun", "127.0.0.1:99999"), ("--nonsense",), ("extra",)])
def test_a_usage_error_is_one_line(namespace, arguments):
    status, out, err = run(namespace, "doctor", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_bad_portal_url_is_a_finding(namespace):
    found = doctor(namespace, FIREZONE_API_URL="ftp://portal.example")
    assert "portal" in found.failed()
    assert "has the scheme 'ftp'" in found["portal"].seen


# Who may run it


@pytest.mark.needs("setpriv")
@pytest.mark.usefixtures("open_node")
def test_an_ordinary_user_is_told_what_it_lacks_and_what_only_root_sees(namespace, portal):
    found = doctor(namespace, portal=portal, prefix=NOBODY)
    assert found.failed() == {"privilege", "ipv4"}
    assert "sudo setcap cap_net_admin+eip /" in found["privilege"].remedy
    for name in ("firewall-forward", "firewall-dns", "masquerade"):
        assert found[name].state == "unknown"
        assert found[name].remedy == "ask as root"


@pytest.mark.needs("setpriv")
@pytest.mark.usefixtures("open_node")
def test_a_user_with_the_capability_sees_the_firewall_and_needs_no_root(namespace, portal):
    namespace.nft(DOCKER + FIREWALLD)
    namespace.sysctl(ipv4__ip_forward=0)
    found = doctor(namespace, portal=portal, prefix=NET_ADMIN)
    assert found.failed() == {"ipv4"}
    assert found["privilege"].seen == "uid 65534 with CAP_NET_ADMIN"
    assert "inet firewalld filter_FORWARD (firewalld)" in found["firewall-forward"].seen
    assert "the gateway turns it on when it starts" in found["forwarding"].seen


@pytest.mark.needs("setpriv")
def test_an_ordinary_user_beside_a_running_gateway_sees_nothing_fail(namespace, portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    Path(control_of(gateway)).parent.chmod(0o755)
    found = doctor(namespace, portal=portal, prefix=NOBODY, control=control_of(gateway), FIREZONE_TOKEN=None)
    assert found.failed() <= {"ipv4"}
    assert found["portal-login"].state == "unknown"
    assert "ask as root" in found["portal-login"].seen + found["portal-login"].remedy
    assert found["privilege"].state == found["tun-interface"].state == "unknown"


@pytest.mark.needs("setpriv", "setcap", "objdump", "strip")
@pytest.mark.usefixtures("open_node")
def test_the_shipped_file_with_its_capability_examines_the_host_for_an_ordinary_user(namespace, portal, capable):
    namespace.nft(DOCKER)
    found = doctor(namespace, portal=portal, prefix=NOBODY, command=(capable,))
    assert found.failed() == {"ipv4"}
    assert found["privilege"].seen == "uid 65534 with CAP_NET_ADMIN"
    assert "ip filter FORWARD" in found["firewall-forward"].seen
    status, out, err = run(namespace, "host-setup", prefix=NOBODY, command=(capable,))
    assert (status, out) == (1, "")
    assert err.startswith(f"firezone-gateway: this needs root: sudo {capable} host-setup ")


# What it leaves


def test_it_changes_nothing(namespace, portal, tmp_path):
    namespace.bind("/var/lib", tmp_path)
    namespace.nft(DOCKER)
    namespace.sysctl(ipv4__ip_forward=0)
    state = lambda: (
        namespace.run("nft", "list", "ruleset").stdout,
        namespace.run("ip", "rule").stdout + namespace.run("ip", "route", "show", "table", "all").stdout,
        namespace.run("sh", "-c", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding").stdout,
        sorted(str(path) for path in tmp_path.rglob("*")),
    )
    before = state()
    doctor(namespace, "--stun", "127.0.0.1:3478", portal=portal, FIREZONE_ID=None)
    assert state() == before
    assert [request.path for request in portal.requests] == ["/"]


def test_a_port_is_not_taken_by_looking_at_it(namespace, portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    found = doctor(namespace, portal=portal, control=control_of(gateway))
    assert found["udp-port"].seen == "UDP port 52625 is the running gateway's"
    assert found["health-port"].seen == "TCP 127.0.0.1:8080 answers for the running gateway"
    assert re.match(r"tun-firezone is the running gateway's, pid \d+", found["tun-interface"].seen)
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}


# What stands between


def test_a_portal_behind_a_proxy(namespace, tmp_path):
    authority = Authority(tmp_path)
    with inside(namespace):
        portal = ScriptedPortal(tls=tls_server(authority, ["portal.example"]))
        proxy = ConnectProxy({"portal.example:443": ("127.0.0.1", portal.port)})
    environment = {
        "NO_PROXY": "",
        "no_proxy": "",
        "FIREZONE_API_URL": "wss://portal.example",
        "SSL_CERT_FILE": str(authority.certificate),
        "HTTPS_PROXY": f"http://edge:s3cret@127.0.0.1:{proxy.port}",
    }
    with portal, proxy:
        found = doctor(namespace, **environment)
        assert "portal" in found.checks, found.text
        assert f"through the proxy 127.0.0.1:{proxy.port}" in found["portal"].seen
        assert "s3cret" not in found.text
        found = doctor(namespace, **environment | {"HTTPS_PROXY": "socks5://127.0.0.1:1"})
        assert "a proxy with the scheme 'socks5'" in found["portal"].seen
        assert found["portal"].remedy == "only http:// can be used"
    found = doctor(namespace, **environment)
    assert "portal" in found.failed()
    assert f"the proxy 127.0.0.1:{proxy.port} cannot be reached" in found["portal"].seen


def test_a_certificate_of_an_authority_that_the_host_does_not_trust(namespace, tmp_path):
    authority = Authority(tmp_path)
    with inside(namespace):
        portal = ScriptedPortal(tls=tls_server(authority, ["127.0.0.1"]))
    with portal:
        found = doctor(namespace, FIREZONE_API_URL=f"wss://127.0.0.1:{portal.port}")
        assert "portal-certificate" in found.failed()
        assert "SSL_CERT_FILE=/path/ca.pem" in found["portal-certificate"].remedy
        trusting = {"SSL_CERT_FILE": str(authority.certificate)}
        found = doctor(namespace, FIREZONE_API_URL=f"wss://localhost:{portal.port}", **trusting)
        assert "not valid for 'localhost'" in found["portal-certificate"].seen
        assert "the certificate is for another name" in found["portal-certificate"].remedy
        found = doctor(namespace, FIREZONE_API_URL=f"ws://127.0.0.1:{portal.port}")
        assert "portal" in found.failed()


@pytest.mark.needs("setpriv")
def test_in_a_deployment_relays_answer_and_an_overview_is_green(tmp_path):
    with Lab("direct", start_clients=False) as lab:
        gateway = lab.gateway
        relay = lab.places["relay1"].public_ipv4
        control = gateway.process.environment["FIREZONE_CONTROL_SOCKET"]
        environment = {"FIREZONE_API_URL": lab.portal_url, "FIREZONE_ID": "lab-gateway", "control": control}
        found = doctor(gateway.namespace, "--stun", f"{relay}:3478", **environment)
        assert found.failed() == set(), found.text
        assert f"{relay}:3478 answers in" in found["udp-outbound"].seen
        assert "sees this host as" in found["udp-outbound"].seen
        found = doctor(gateway.namespace, **environment)
        assert "the running gateway hears" in found["udp-outbound"].seen
        assert found["masquerade"].seen == "clients' packets leave with this host's address"
        assert set(found.not_ok()) <= {"portal-certificate"}, found.text  # the lab's portal speaks plain ws
        assert lab.warnings() == []
