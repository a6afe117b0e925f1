"""The orchestrator builds a deployment, hands out its parties and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.lab.namespaces import NETNS, Nat, user_namespace_command
from tests.lab.process import REPOSITORY, lab_environment
from tests.lab.scenario import Host, Lab, available

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(available() is not None, reason=str(available())),
]

DNS_QUESTION = """
import sys, dns.message, dns.query, dns.rcode
ask = dns.query.tcp if sys.argv[3] == "tcp" else dns.query.udp
answer = ask(dns.message.make_query(sys.argv[1], sys.argv[2]), "172.21.0.53", timeout=3)
print(dns.rcode.to_text(answer.rcode()), bool(answer.flags & 0x0200), len(answer.to_wire()) > 2000)
"""


@pytest.fixture(scope="module")
def lab():
    with Lab(start_gateway=False, iperf3=shutil.which("iperf3") is not None) as lab:
        yield lab


@pytest.fixture(scope="module")
def gateway(lab):
    return Host("gateway", lab.places["gateway"])


def test_resources_are_one_hop_from_the_gateway_by_address_and_by_name(gateway):
    for url in ("http://10.20.0.100/get", "http://[10:20::100]/get", "http://dns.httpbin.search.test/get"):
        assert gateway.curl(url).ok
    assert gateway.download("http://download.httpbin/bytes?num=1000000").bytes == 1_000_000
    assert gateway.ping("10.20.0.110", timeout=3)
    assert gateway.ping("10:20::110", timeout=3)


def test_the_name_server_truncates_and_knows_what_does_not_exist(lab, gateway):
    def ask(*question: str) -> str:
        return gateway.namespace.python(DNS_QUESTION, *question).strip()

    assert ask("download.httpbin", "A", "udp") == "NOERROR False False"
    assert ask("nothing.test", "A", "udp") == "NXDOMAIN False False"
    assert ask("big.test", "TXT", "udp") == "NOERROR True False"
    assert ask("big.test", "TXT", "tcp") == "NOERROR False True"
    lab.resources.call("set_records", name="nothing.test", addresses=["192.0.2.1"])
    assert ask("nothing.test", "A", "udp") == "NOERROR False False"


def test_iperf3_can_be_run(gateway):
    report = gateway.iperf3(seconds=1)
    assert report["end"]["sum_received"]["bytes"] > 0


def test_both_relays_are_online_and_answer_from_behind_every_router(lab):
    assert len(lab.portal.state()["relays"]) == 2
    probe = (
        "import os, socket, sys\n"
        "from tests.lab import stun\n"
        "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, 2)\n"
        "s.settimeout(3); s.connect((sys.argv[1], 3478))\n"
        "s.send(stun.encode(stun.BINDING, stun.REQUEST, os.urandom(12), []))\n"
        "m = stun.Message(s.recv(2000))\n"
        "print(stun.decode_address(m.attributes[stun.XOR_MAPPED_ADDRESS], m.transaction_id)[0])\n"
    )
    for name in ("gateway", "client1"):
        place = lab.places[name]
        assert place.namespace.python(probe, lab.relays[0].ipv4).strip() == place.public_ipv4
        assert place.namespace.python(probe, lab.relays[1].ipv6).strip() == place.public_ipv6


def test_a_party_can_be_cut_off_and_can_roam(lab):
    ask = "curl -s -m 0.3 -o /dev/null -w %{http_code} http://203.0.113.10:8081/"
    client = Host("client1", lab.places["client1"])
    assert client.run(*ask.split()).stdout == "404"
    lab.cut("client1")
    assert client.run(*ask.split(), check=False).stdout == "000"
    lab.cut("client1", cut=False)
    lab.roam("client1", public=77)
    assert lab.places["client1"].public_ipv4 == "203.0.113.77"
    assert client.run(*ask.split()).stdout == "404"


@pytest.mark.parametrize("nat", [Nat.CONE, Nat.SYMMETRIC])
def test_client_and_gateway_meet_behind_any_router(nat):
    with Lab(gateway_nat=Nat.CONE, client_nat=nat) as lab:
        assert lab.client.ping("10.20.0.100", timeout=10)
        assert lab.client.curl("http://dns.httpbin.search.test/get").ok
        if nat is Nat.CONE:
            lab.client.wait_path("PeerToPeer")
        assert lab.warnings() == []


def test_an_interrupted_lab_leaves_nothing_behind():
    command = [sys.executable, "-m", "tests.lab", "up", "direct", "--no-gateway"]
    environment = dict(os.environ) | lab_environment()
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        mine = [path.name for path in NETNS.iterdir() if path.name.startswith(f"fzlab-{process.pid}.")]
        assert mine
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not any((NETNS / name).exists() for name in mine)


def test_a_whole_lab_runs_inside_a_user_namespace():
    source = textwrap.dedent("""
        from tests.lab.scenario import Lab
        with Lab() as lab:
            print(lab.client.curl("http://10.20.0.100/get", timeout=10).status)
    """)
    done = subprocess.run(
        user_namespace_command(sys.executable, "-c", source),
        capture_output=True,
        text=True,
        env=dict(os.environ) | lab_environment(),
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "200", done.stderr
