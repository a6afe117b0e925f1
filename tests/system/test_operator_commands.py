"""The operator's commands, asked of a gateway with a client, direct and relayed."""

from __future__ import annotations

import ipaddress
import json
import shlex
import signal
import stat
import struct
import subprocess
import time

import pytest

from tests.lab.process import wait_until
from tests.lab.program import gateway_command
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
    shown = wait_until(lambda: (found := status(lab))["clients"] and found, timeout=20, what="a client in status")
    (client,) = shown["clients"]
    if lab.scenario.gateway_nat.name == "SYMMETRIC":
        assert client["path"] == "RelayToRelay"
        assert client["relayed"] is True
        assert client["relayed_because"] == "our NAT maps by destination"
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

    client = wait_until(counted, timeout=20, what="300 kB to the client in status")
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


def packets_in(data: bytes) -> list[bytes]:
    assert struct.unpack("<IHHiIII", data[:24]) == (0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    packets, offset = [], 24
    while offset < len(data):
        seconds, _, length, original = struct.unpack_from("<IIII", data, offset)
        assert abs(seconds - time.time()) < 300
        assert length == original
        packets.append(data[offset + 16 : offset + 16 + length])
        offset += 16 + length
    return packets


@pytest.mark.parametrize("engine", ["native", "pure"])
def test_capture_sees_a_transfer_that_is_under_way_and_lets_it_go_on(engine, tmp_path):
    if engine == "native":
        pytest.importorskip("fzg.dataplane._native", reason="the native engine was not built")
    with Lab("direct", gateway_environment={"FIREZONE_ENGINE": engine}) as lab:
        assert lab.client.ping(SERVER)
        (client,) = status(lab)["clients"]
        assert status(lab)["engine"] == engine
        address = ipaddress.ip_address(client["addresses"][0]).packed
        file = tmp_path / "x.pcap"
        words = ["--client", client["id"][:8], "--count", "500", "--seconds", "60", "--output", str(file)]

        def sent():
            return status(lab)["clients"][0]["sent"]["bytes"]

        def carries_on_beyond(octets):
            wait_until(lambda: sent() > octets, timeout=30, what=f"{octets} bytes to the client")

        url = f"http://{SERVER}/bytes?num=1000000000"
        curl = [*lab.client.namespace.prefix(), "curl", "-s", "-o", "/dev/null", "--limit-rate", "4M", url]
        with subprocess.Popen(curl) as download:
            try:
                carries_on_beyond(1_000_000)
                done = json.loads(lab.gateway.command("capture", "--json", *words).stdout)
                carries_on_beyond(sent() + 1_000_000)
                assert download.poll() is None
            finally:
                download.kill()
        assert (done["ended"], done["captured"], done["missed"]) == ("count", 500, 0)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        packets = packets_in(file.read_bytes())
        assert len(packets) == 500
        assert sum(map(len, packets)) == done["bytes"]
        tcp = [packet for packet in packets if packet[0] >> 4 == 4 and packet[9] == 6]
        assert len(tcp) > 400
        assert {packet[12:16] == address for packet in tcp} == {True, False}, "both directions"
        assert all(address in (packet[12:16], packet[16:20]) for packet in tcp)


def test_capture_names_what_it_cannot_do_in_one_line(lab):
    for words, sentence in (
        (["--client", "00000000"], "no client here has an id that begins with '00000000'"),
        (["--client", status(lab)["clients"][0]["id"], "--output", "/nowhere/x"], "/nowhere/x cannot be written"),
    ):
        done = lab.gateway.command("capture", *words, check=False)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
    done = lab.gateway.command("capture", "--client", "1", "--count", "0", check=False)
    assert done.returncode == 2


def test_a_capture_goes_to_standard_output_and_ends_with_its_time(lab, tmp_path):
    (client,) = status(lab)["clients"]
    socket = lab.gateway.process.environment["FIREZONE_CONTROL_SOCKET"]
    command = f"{shlex.join(gateway_command())} capture --client {client['id']} --seconds 0.5 --output - > {tmp_path}/x"
    done = lab.gateway.run("env", f"FIREZONE_CONTROL_SOCKET={socket}", "sh", "-c", command)
    packets_in((tmp_path / "x").read_bytes())
    assert "the time was over" in done.stderr


@pytest.mark.spec("OPS-40")
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
            curl = ("curl", "-s", "-w", "%{http_code}", "http://127.0.0.1:8080/readyz")
            said = wait_until(
                lambda: "drained" in (text := lab.gateway.run(*curl, check=False).stdout) and text,
                timeout=5,
                what="/readyz names the drain",
            )
            assert said == "the gateway is being drained, clients left: 1\n503"
        assert process.wait(30) == 0
        log = process.log_text()
        assert lab.client.paths() == []
        assert log.index("Draining") < log.index("Closing the portal connection") < log.index("goodbye sent")
        assert " WARN " not in log
        assert " ERROR " not in log
