"""The lines that an operator reads, in the order in which they come (spec operations 1.8)."""

from __future__ import annotations

import json
import re
import socket

import pytest
from gateway_process import INIT, Gateway, inside, portal_in

from tests.lab.process import wait_until
from tests.lab.scenario import Lab
from tests.lab.scripted_portal import wait_until as hub_wait_until
from tests.unit.dataplane_world import udp

pytestmark = [pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "tun"), pytest.mark.slow]

RELAY_ID = "2a8abfa8-cb99-4629-8437-854193ca6bca"
RELAY = {
    "id": RELAY_ID,
    "type": "turn",
    "addr": "127.0.0.1:3478",
    "username": "2145916800:kF8o3",
    "password": "4xl1v/gk+pPzA4xl1v/gk+pPzA",
    "expires_at": 2145916800,
}
HEALTHY_START = [
    "Logging started",
    "Flow-log uploader started",
    "Connected to the portal",
    "TURN server added",
    "New routes set",
]
SHUTDOWN = [
    "Signal received",
    "Shutting down",
    "Closing the portal connection",
    "Closed the portal connection",
    "Goodbye",
]


@pytest.fixture(scope="module")
def entries(lab_network):
    """What a gateway logs in JSON between its start and its end, with a relay that does not answer."""
    namespace = lab_network.namespace("healthy")
    with portal_in(namespace) as portal:
        portal.push_after_join = [("init", INIT | {"relays": [RELAY]})]
        gateway = Gateway(namespace, "--log-format", "json", portal=portal)
        try:
            gateway.says("New routes set")
            assert gateway.terminate() == 0
            yield gateway.entries()
        finally:
            gateway.stop()


def positions(entries, messages):
    said = [entry["message"] for entry in entries]
    for message in messages:
        assert message in said, f"{message!r} is not in {said}"
    return [said.index(message) for message in messages]


@pytest.mark.spec("OPS-34")
def test_a_healthy_start_and_a_stop_say_in_order_what_was_done(entries):
    where = positions(entries, HEALTHY_START + SHUTDOWN)
    assert where == sorted(where), [entry["message"] for entry in entries]
    assert entries[0]["message"] == HEALTHY_START[0]
    assert entries[-1]["message"] == SHUTDOWN[-1]
    assert {entry["level"] for entry in entries} == {"INFO"}


@pytest.mark.spec("OPS-34")
def test_what_programs_want_to_know_is_in_fields(entries):
    by_message = {entry["message"]: entry for entry in entries}
    assert {"arch", "os", "version", "system_uptime"} <= set(by_message["Logging started"])
    assert by_message["Connected to the portal"]["host"] == "127.0.0.1"
    added = by_message["TURN server added"]
    assert (added["rid"], added["address"]) == (RELAY_ID, "127.0.0.1:3478")
    assert by_message["New routes set"]["new_routes"] == ["100.64.0.0/11", "fd00:2021:1111::/107"]
    assert by_message["Signal received"]["signal"] == "SIGTERM"


def test_a_host_that_forbids_udp_gets_one_hint(namespace, portal, start):
    rule, drop = "type filter hook output priority 0;", "add rule inet refusing out udp dport 3478 drop"
    namespace.run("nft", f"add table inet refusing; add chain inet refusing out {{ {rule} }}; {drop}")
    portal.push_after_join = [("init", INIT | {"relays": [RELAY]})]
    gateway = start(portal=portal)
    hint = gateway.says(r"The host refuses to send UDP \(permission denied\): check the local firewall .*refused=(\d+)")
    assert int(hint[1]) >= 3

    def times(text):
        return gateway.output.count(text)

    portal.connection(0).push("relays_presence", {"disconnected_ids": [], "connected": [RELAY | {"password": "other"}]})
    hub_wait_until(lambda: times("TURN server added") == 2, "the relay is tried again")
    assert gateway.terminate() == 0
    assert times("check the local firewall") == 1
    assert "ERROR" not in gateway.output


def test_each_step_in_the_life_of_a_connection_is_a_line():
    with Lab(gateway_environment={"RUST_LOG": "info", "FIREZONE_LOG_FORMAT": "json"}) as lab:
        log = lab.gateway.process.log_text
        entries = lambda: [json.loads(line) for line in log().splitlines()]
        said = lambda message: [entry for entry in entries() if entry["message"] == message]
        assert lab.client.curl("http://10.20.0.100/get", timeout=10).ok
        client = lab.portal.wait_client()
        (allowed,) = [entry for entry in said("Access allowed") if entry["cid"] == client]
        assert re.fullmatch(r"\d+s|never", allowed["expires_in"])
        assert {entry["cid"] for entry in said("Connection created")} == {client}
        established = wait_until(lambda: said("Connection established"), timeout=5, what="it is established")
        assert established[0]["path"] in {"PeerToPeer", "PeerToRelay", "RelayToPeer", "RelayToRelay"}
        resource = allowed["rid"]
        lab.portal.reject_access(client=client, resource=resource)
        revoked = wait_until(lambda: said("Access revoked"), timeout=5, what="it is revoked")
        assert (revoked[0]["cid"], revoked[0]["rid"]) == (client, resource)
        wait_until(lambda: said("Connection closed: no authorization is left"), timeout=5, what="it is closed")
        assert {entry["level"] for entry in entries()} == {"INFO"}


def test_validate_checksums_tells_of_wrong_ones_that_the_network_sends(lab_network):
    namespace = lab_network.namespace("checksums")
    wrong = udp(source=bytes((10, 0, 0, 5)), destination=bytes((100, 64, 0, 9)))[:-1] + b"?"
    with portal_in(namespace) as portal:
        gateway = Gateway(namespace, "--validate-checksums", portal=portal)
        try:
            gateway.says("New routes set")
            with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                raw.sendto(wrong, ("100.64.0.9", 0))
            gateway.says(r" WARN .*A packet from the network has a wrong checksum protocol=UDP num_bytes=29")
        finally:
            gateway.stop()


def test_a_tun_device_that_is_deleted_ends_the_gateway_with_one_line(lab_network):
    namespace = lab_network.namespace("deleted")
    with portal_in(namespace) as portal:
        gateway = Gateway(namespace, portal=portal)
        try:
            gateway.says("New routes set")
            namespace.run("ip", "link", "delete", "tun-firezone")
            assert gateway.process.wait(timeout=15) == 1
            (line,) = [each for each in gateway.lines if " ERROR " in each]
            assert re.search(r"the TUN device is gone: .*; was it deleted\?", line)
        finally:
            gateway.stop()
