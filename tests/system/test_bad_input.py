"""What an operator, a host or a portal can get wrong: one clear line, the right exit status, never a traceback."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import gevent
import pytest
from gateway_process import INIT, TOKEN, inside, portal_in

from tests.lab.process import lab_environment
from tests.lab.program import gateway_command
from tests.lab.scripted_portal import Refusal, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

PROBLEM = {"content-type": "application/problem+json"}


def run(namespace, *arguments, **environment):
    """Runs a gateway that ends by itself; its status, standard output and standard error."""
    variables = {"PATH": os.environ["PATH"], **lab_environment(), "FIREZONE_ID": "x", **environment}
    done = subprocess.run(
        [*namespace.prefix(), *gateway_command(), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def errors(output):
    return [line for line in output.splitlines() if re.match(r"^\S+ ERROR ", line)]


# The operator


@pytest.mark.spec("OPS-14", "OPS-19")
def test_no_token(namespace):
    status, out, err = run(namespace)
    assert (status, err) == (1, "")
    (line,) = errors(out)
    assert "there is no token" in line
    for source in ("argument", "variable FIREZONE_TOKEN", "systemd credential FIREZONE_TOKEN"):
        assert source in line


@pytest.mark.spec("OPS-3")
@pytest.mark.parametrize("arguments", [["--nonsense"], ["-m", "90"], ["a", TOKEN]])
def test_usage_errors(namespace, arguments):
    status, out, err = run(namespace, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert TOKEN not in err


@pytest.mark.spec("OPS-20")
def test_a_filter_that_is_none(namespace):
    status, out, err = run(namespace, TOKEN, RUST_LOG="info,fzg=loud")
    assert (status, out) == (1, "")
    assert err == (
        "firezone-gateway: the log filter RUST_LOG cannot be used: 'fzg=loud' names no level;"
        " levels are off, error, warn, info, debug and trace\n"
    )


@pytest.mark.spec("OPS-19")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://portal.example", "has the scheme 'ftp'; use one of http, ws, https, wss"),
        ("portal.example", "has the scheme ''"),
        ("wss://", "has no host"),
        ("wss://portal.example:99999", "is not a URL"),
        ("wss://[::1", "is not a URL"),
        ("wss://portal example", "not a host name"),
    ],
)
def test_a_portal_url_that_cannot_be_dialled(namespace, url, said):
    status, out, _ = run(namespace, "-u", url, TOKEN)
    assert status == 1
    (line,) = errors(out)
    assert said in line


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({"FIREZONE_TOKEN": "\udcff\udcfe"}, 1, "the token has characters that no token has"),
        ({"FIREZONE_TOKEN": "bürö"}, 1, "the token has characters that no token has"),
        ({"FIREZONE_TOKEN": "a\x07b\x1b[2J"}, 1, "the token has characters that no token has"),
        ({"FIREZONE_NAME": "\udcff\udcfe"}, 2, "the value for --firezone-name is not UTF-8 text"),
        ({"FIREZONE_ID": "\udcff"}, 2, "the value for --firezone-id is not UTF-8 text"),
    ],
)
def test_bytes_that_are_no_text(namespace, environment, status, said):
    ended, out, err = run(namespace, **{"FIREZONE_TOKEN": TOKEN} | environment)
    assert ended == status
    assert said in (err if status == 2 else errors(out)[0])


def test_a_long_name_in_any_alphabet_is_cut_to_what_the_portal_takes(portal, start):
    gateway = start(portal=portal, FIREZONE_NAME="Büro " * 200)
    gateway.wait_ready()
    assert "&name=B%C3%BCro+B%C3%BCro" in portal.connection(0).request.path


# The host


@pytest.mark.spec("OPS-29")
def test_a_device_that_another_process_holds(namespace, portal, start):
    first = start(portal=portal)
    first.wait_ready()
    rules = namespace.run("nft", "list", "ruleset").stdout
    second = start(portal=portal, FIREZONE_ID="second", HEALTH_CHECK_ADDR="127.0.0.1:8081")
    line = second.fails()
    assert "TUN device tun-firezone" in line
    assert "busy" in line
    assert first.http("/readyz")[0] == 200
    assert namespace.run("nft", "list", "ruleset").stdout == rules
    assert namespace.address("tun-firezone") == "100.71.4.9"


@pytest.mark.spec("OPS-19")
@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        ("/dev/net/tun", "/dev/null", "/dev/net/tun is not the TUN driver's node"),
        ("/dev/net/tun", "/etc/hostname", "/dev/net/tun is not the TUN driver's node"),
        ("/dev/net", "/proc", "/dev/net/tun is missing and cannot be made"),
    ],
)
def test_a_node_that_is_no_tun(namespace, portal, start, target, source, said):
    namespace.bind(target, Path(source))
    line = start(portal=portal).fails()
    assert said in line
    assert portal.requests == []


@pytest.mark.spec("OPS-30")
def test_a_udp_port_that_is_taken(namespace, portal, start):
    with inside(namespace):
        sockets = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
    sockets[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for taken, address in zip(sockets, ("0.0.0.0", "::"), strict=True):
        taken.bind((address, 52625))
    gateway = start(portal=portal)
    gateway.wait_ready()
    assert gateway.terminate() == 0
    told = [line for line in gateway.lines if "52625" in line]
    assert len(told) == 2  # one per address family
    assert all(" INFO " in line for line in told)
    assert gateway.levels() == {"INFO"}
    for taken in sockets:
        taken.close()


@pytest.mark.spec("OPS-32")
def test_a_health_port_that_is_taken(namespace, portal, start):
    with inside(namespace):
        taken = socket.create_server(("127.0.0.1", 8080))
    gateway = start(portal=portal)
    gateway.says("Connected to the portal")
    (line,) = [line for line in gateway.lines if " WARN " in line]
    assert "address=127.0.0.1:8080" in line
    assert "Address already in use" in line
    assert gateway.terminate() == 0
    taken.close()


def test_a_host_without_ipv6(namespace, start):
    namespace.sysctl(ipv6__conf__all__disable_ipv6=1, ipv6__conf__default__disable_ipv6=1)
    with portal_in(namespace) as portal:
        gateway = start(portal=portal)
        gateway.wait_ready()
        assert namespace.address("tun-firezone") == "100.71.4.9"
        assert namespace.address("tun-firezone", ipv6=True) is None
        assert "100.64.0.0/11" in namespace.run("ip", "route", "show", "table", "all").stdout
        assert gateway.terminate() == 0
    assert "Traceback" not in gateway.output
    assert gateway.levels() <= {"INFO", "WARN"}


@pytest.mark.spec("OPS-21")
def test_a_host_without_nameservers(namespace, portal, start, tmp_path):
    namespace.bind("/etc", tmp_path)
    gateway = start(portal=portal, SSL_CERT_FILE=None, SSL_CERT_DIR=None)
    gateway.wait_ready()
    (line,) = [line for line in gateway.lines if " WARN " in line]
    assert "/etc/resolv.conf" in line
    assert gateway.terminate() == 0


@pytest.mark.spec("OPS-19")
def test_a_host_that_gives_no_identity(namespace, portal, start, tmp_path):
    namespace.bind("/etc", tmp_path)
    namespace.bind("/var/lib", Path("/proc"))
    line = start(portal=portal, FIREZONE_ID=None, SSL_CERT_FILE=None, SSL_CERT_DIR=None).fails()
    assert "FIREZONE_ID could not be read or stored; set FIREZONE_ID or give write access to /var/lib/firezone" in line


# The portal


@pytest.mark.spec("OPS-22")
def test_a_portal_that_nothing_listens_for(namespace, start):
    began = time.monotonic()
    gateway = start(FIREZONE_API_URL="ws://127.0.0.1:9")
    line = gateway.fails(patience=40)
    assert 15 <= time.monotonic() - began < 30
    assert len(re.findall("dialling again", gateway.output)) == 15
    assert "Connection refused" in line


@pytest.mark.spec("OPS-60")
def test_first_attempts_come_once_a_second_and_a_rate_limit_is_obeyed(portal, start):
    """Gateways behind one public address share the portal's bucket of one connection a second."""
    busy = '{"code":"rate_limit","detail":"Too many connections"}'
    portal.refusals = [Refusal(500), Refusal(409), Refusal(503, busy, PROBLEM | {"Retry-After": "3"}), Refusal(500)]
    start(portal=portal).wait_ready()
    gaps = [after - before for before, after in itertools.pairwise(portal.request_times)]
    assert len(gaps) == 4
    assert min(gaps) >= 0.98  # a request may be under way longer than the one after it
    assert 3.0 <= gaps[2] < 4.0
    assert max(gaps[0], gaps[1], gaps[3]) < 2.0


@pytest.mark.spec("OPS-25")
def test_a_wait_that_the_portal_asks_for_is_kept_and_costs_nothing_of_the_time_to_serve_on_without_it(portal, start):
    gateway = start(portal=portal, FIREZONE_MAX_PARTITION_TIME="1s")
    gateway.wait_ready()
    portal.refusals = [Refusal(429, "", {"Retry-After": "1"}), Refusal(503, "", {"Retry-After": "2"})]
    portal.connection(0).drop()
    portal.connection(1).frame("phx_join")
    asked, asked_again, let_in = portal.request_times[1:]
    assert 1.0 <= asked_again - asked < 2.0
    assert 2.0 <= let_in - asked_again < 3.0
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}


@pytest.mark.spec("OPS-23")
@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (Refusal(401, '{"code":"invalid_token"}', PROBLEM), "token"),
        (Refusal(401, '{"code":"unknown","detail":"The site is closed"}', PROBLEM), "The site is closed"),
        (Refusal(401, "<html>", {"content-type": "text/html"}), "no reason provided"),
    ],
)
def test_a_token_that_is_refused(portal, start, refusal, said):
    portal.refuse_always = [refusal]
    gateway = start(portal=portal)
    wait_until(lambda: portal.requests, "the dial")
    refused = time.monotonic()
    line = gateway.fails()
    assert time.monotonic() - refused < 2
    assert len(portal.requests) == 1
    assert said in line
    assert TOKEN not in gateway.output


@pytest.mark.spec("OPS-24")
def test_another_refusal_is_retried_and_its_code_and_detail_are_logged(portal, start):
    body = '{"code":"gateway_already_connected","detail":"Another connection is active"}'
    portal.refusals = [Refusal(409, body, PROBLEM)]
    gateway = start(portal=portal)
    gateway.wait_ready()
    (line,) = [line for line in gateway.lines if "409" in line]
    assert "gateway_already_connected" in line
    assert "Another connection is active" in line
    assert " INFO " in line


def test_a_join_that_is_refused(portal, start):
    portal.join_answer = {"status": "error", "response": {"reason": "site is full\n\x1b[31m"}}
    line = start(portal=portal).fails()
    assert "site is full" in line
    assert "\x1b" not in line


GARBAGE = [
    "no json at all",
    "[1,2,3]",
    "null",
    "{}",
    '{"topic":"gateway"}',
    '{"topic":1,"event":2,"payload":3,"ref":"x"}',
    '{"topic":"gateway","event":"surprise","ref":null,"payload":{"a":1}}',
    '{"topic":"gateway","event":"init","ref":null,"payload":null}',
    '{"topic":"gateway","event":"init","ref":null,"payload":{"interface":{"ipv4":7,"ipv6":[]}}}',
    '{"topic":"gateway","event":"init","ref":null,"payload":{"interface":{"ipv4":"300.1.1.1","ipv6":"::g"}}}',
    '{"topic":"gateway","event":"create_authorization","ref":null,"payload":{"client":"nobody"}}',
    '{"topic":"gateway","event":"reject_access","ref":null,"payload":[]}',
    '{"topic":"gateway","event":"ice_candidates","ref":null,"payload":{"client_id":"x","candidates":[1,null,{}]}}',
    '{"topic":"gateway","event":"relays_presence","ref":null,"payload":{"disconnected_ids":"all","connected":{}}}',
    '{"topic":"gateway","event":"phx_reply","ref":999999999999999999999999,"payload":{"status":"ok","response":{}}}',
    '{"topic":"gateway","event":"phx_reply","ref":null,"payload":{"status":"maybe"}}',
    '{"topic":"gateway","event":"disconnect","ref":null,"payload":{"reason":"boredom"}}',
    '{"topic":"gateway","event":"\\ud800","ref":null,"payload":"\\u0000\\u001b[31m"}',
    "[" * 50_000 + "]" * 50_000,
    '{"topic":"gateway","event":"surprise","ref":null,"payload":"' + "x" * 1_000_000 + '"}',
    '{"topic":"' + "y" * 1_000_000 + '","event":"z","payload":{},"ref":1}',
    "z" * 1_000_000,
]


def test_a_portal_that_sends_garbage(namespace, portal, start):
    portal.push_after_join = []
    gateway = start(portal=portal)
    connection = portal.connection(0)
    connection.frame("set_snownet_capabilities")
    for text in GARBAGE:
        connection.text(text)
    connection.binary(bytes(range(256)) * 4000)
    connection.push("init", INIT)
    gateway.wait_ready()
    assert len(portal.connections) == 1
    assert namespace.address("tun-firezone") == "100.71.4.9"
    assert gateway.terminate() == 0
    assert gateway.levels() <= {"INFO", "WARN"}
    assert max(map(len, gateway.lines)) < 1000
    skipped = [line for line in gateway.lines if "Skipped" in line]
    assert len(skipped) >= 15


@pytest.mark.parametrize(
    "fault",
    [
        lambda connection: connection.text(b"\xff\xfe"),
        lambda connection: connection.raw(b"\xff" * 100),
        lambda connection: connection.raw(b"\x81\x7f" + (1 << 40).to_bytes(8, "big")),
        lambda connection: connection.text('{"topic":"gateway","event":'),
        lambda connection: connection.end_of_stream(),
        lambda connection: connection.drop(),
        lambda connection: connection.close(1001, "going away \x1b[31m"),
    ],
    ids=["no UTF-8", "reserved bits", "a tebibyte", "truncated", "end of stream", "reset", "close"],
)
def test_a_connection_that_breaks_is_made_again(portal, start, fault):
    gateway = start(portal=portal)
    gateway.wait_ready()
    fault(portal.connection(0))
    portal.connection(1).frame("phx_join")
    assert gateway.http("/readyz")[0] == 200
    assert gateway.terminate() == 0
    assert gateway.levels() <= {"INFO", "WARN"}
    assert len([line for line in gateway.lines if "dialling again" in line]) == 1


def test_a_flood_of_frames_does_not_keep_it_from_ending(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    connection = portal.connection(0)

    def flood():
        text = '{"topic":"gateway","event":"init","ref":null,"payload":{"interface":{}}}'
        while not connection.ended:
            connection.text(text)
            gevent.sleep(0)

    flooding = gevent.spawn(flood)
    gevent.sleep(0.3)
    assert gateway.http("/readyz")[0] == 200
    gateway.process.send_signal(15)
    assert gateway.ends(patience=5) == 0
    flooding.kill()
