"""The operator's commands, asked of a gateway with a client, direct and relayed."""

from __future__ import annotations

import json
import signal

import pytest

from tests.lab.process import wait_until
from tests.lab.scenario import Lab

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "curl", "setpriv"),
]

SERVER = "10.20.0.100"


@pytest.fixture(scope="module", params=["direct", "relay-relay"])
def lab(request):
    with Lab(request.param) as lab:
        assert lab.client.ping(SERVER)
        yield lab


def status(lab):
    return json.loads(lab.gateway.command("status", "--json").stdout)


def test_status_names_the_client_s_path_and_why_it_is_relayed(lab):
    shown = wait_until(lambda: (found := status(lab))["clients"] and found, timeout=5, what="a client in status")
    (client,) = shown["clients"]
    if lab.scenario.gateway_nat.name == "SYMMETRIC":
        assert client["path"] == "RelayToRelay"
        assert client["relayed"] is True
        assert client["relayed_because"] == "our NAT maps by destination (see NAT above)"
        assert shown["nat"]["kind"] == "NAT, maps by destination"
    else:
        assert client["path"] == "PeerToPeer"
        assert client["relayed"] is False
        assert client["relayed_because"] is None
        assert shown["nat"]["kind"] == "NAT, maps independently of the destination"
        place = lab.places["client1"]
        assert client["remote"] in {f"{place.public_ipv4}:52625", f"[{place.public_ipv6}]:52625"}
    assert client["state"] == "connected"
    assert client["resources"] == 1
    assert client["handshake_age"] < 60
    assert shown["portal"]["state"] == "connected"
    assert len(shown["relays"]) == 2
    for relay in shown["relays"]:
        assert relay["state"] == "active"
        assert 0 < relay["rtt_ms"] < 1000
    assert any(relay["chosen"] for relay in shown["relays"])
    assert sum(relay["clients"] for relay in shown["relays"]) == 1


def test_status_counts_what_the_client_fetches(lab):
    (before,) = status(lab)["clients"]
    assert lab.client.curl(f"http://{SERVER}/bytes?num=300000", "-o", "/dev/null").status == 200

    def counted():
        (client,) = status(lab)["clients"]
        return client["sent"]["bytes"] - before["sent"]["bytes"] >= 300_000 and client

    client = wait_until(counted, timeout=5, what="300 kB to the client in status")
    assert client["sent"]["packets"] > before["sent"]["packets"] + 200
    assert client["received"]["packets"] > before["received"]["packets"]
    assert client["received"]["bytes"] < before["received"]["bytes"] + 100_000


def test_status_for_people_is_a_table_without_colour_codes_when_nobody_looks(lab):
    shown = lab.gateway.command("status").stdout
    (client,) = status(lab)["clients"]
    assert client["id"][:8] in shown
    assert "\x1b" not in shown
    assert ("is relayed because" in shown) == client["relayed"]


def trace(lab, *words):
    return json.loads(lab.gateway.command("trace", "--json", *words).stdout)


def test_trace_says_of_packets_what_becomes_of_them_and_touches_nothing(lab):
    (client,) = status(lab)["clients"]
    address = client["addresses"][0]
    before = status(lab)
    allowed = trace(lab, "tcp", address, f"{SERVER}:80")
    assert allowed["passes"] is True
    assert allowed["client"] == client["id"]
    assert allowed["connection"].endswith("connected")
    refused = trace(lab, "tcp", address, "10.99.0.1:80", "--client", client["id"][:8])
    assert refused["passes"] is False
    assert refused["steps"][-1] == {
        "check": "policy",
        "outcome": "stop",
        "detail": "no resource of the client covers 10.99.0.1",
    }
    after = status(lab)

    def from_client(shown):
        return {reason: total for reason, total in shown["drops"].items() if reason.startswith("from client")}

    assert from_client(after) == from_client(before)
    assert after["clients"][0]["nat_sessions"] == before["clients"][0]["nat_sessions"]
    assert lab.client.curl(f"http://{SERVER}/get").ok


def test_trace_knows_names_that_the_client_resolved(lab):
    assert lab.client.curl("http://dns.httpbin.search.test/get").ok
    (client,) = status(lab)["clients"]
    shown = trace(lab, "tcp", client["addresses"][0], "dns.httpbin.search.test:80")
    assert shown["passes"] is True
    assert "172.21.0.10" in shown["translated"]
    text = lab.gateway.command("trace", "tcp", client["addresses"][0], "dns.httpbin.search.test:80").stdout
    assert "stands for dns.httpbin.search.test" in text
    assert "from client: forwarded to the network" in text


@pytest.mark.parametrize(("kind", "way"), [("direct", "command"), ("relayed", "signal")])
def test_drain_sends_the_client_away_at_once_and_ends_with_status_0(kind, way):
    with Lab(kind) as lab:
        assert lab.client.ping(SERVER)
        process = lab.gateway.process
        if way == "command":
            done = lab.gateway.command("drain", "--json")
            assert json.loads(done.stdout) == {"clients": 1, "left": 0}
        else:
            process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == 0
        log = process.log_text()
        assert lab.client.paths() == []
        assert log.index("Draining") < log.index("Closing the portal connection") < log.index("goodbye sent")
        assert " WARN " not in log
        assert " ERROR " not in log
