"""A site with two gateways: a drained one sends its clients to the other."""

from __future__ import annotations

import json
import sys

import pytest

from tests.lab.namespaces import Nat
from tests.lab.portal_client import TOKEN
from tests.lab.process import Process, lab_environment, wait_until
from tests.lab.scenario import NAME_SERVER, PORTAL_PORT, Lab

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "curl"),
]

SERVER = "10.20.0.100"


def second_gateway(lab):
    """Another gateway behind a router of its own, with a way of its own to the resources."""
    place = lab.network.party("gateway2", Nat.CONE, public=41, private=41)
    place.namespace.file("/etc/resolv.conf", f"nameserver {NAME_SERVER}\n")
    resources = lab.network.namespaces["resources"]
    lab.network.link(place.namespace, "resources", resources, "resources2")
    resources.ip("address add 10.21.0.1/24 dev resources2")
    place.namespace.ip("address add 10.21.0.254/24 dev resources", f"route add {SERVER}/32 via 10.21.0.1")
    state = lab.directory / "gateway2-var-lib"
    state.mkdir()
    place.namespace.bind("/var/lib", state)
    first = lab.gateway.process.environment
    process = Process(
        "gateway2",
        [sys.executable, "-m", "fzg"],
        log=lab.directory / "gateway2.log",
        prefix=place.namespace.prefix(),
        environment=lab_environment()
        | {
            "FIREZONE_API_URL": f"ws://{lab.places['portal'].public_ipv4}:{PORTAL_PORT}",
            "FIREZONE_TOKEN": TOKEN,
            "FIREZONE_NAME": "second",
            "FIREZONE_ID": "second",
            "FIREZONE_CONTROL_SOCKET": str(lab.directory / "second.sock"),
            "HEALTH_CHECK_ADDR": "127.0.0.1:8080",
            "RUST_LOG": first.get("RUST_LOG", "info"),
        },
    )
    wait_until(lambda: "New routes set" in process.log_text(), timeout=20, what="the second gateway is ready")
    return process


@pytest.mark.parametrize("kind", ["direct", "relayed"])
def test_a_client_of_a_drained_gateway_goes_on_through_the_other(kind):
    with Lab(kind) as lab:
        assert lab.client.curl(f"http://{SERVER}/get").ok
        second = second_gateway(lab)
        try:
            done = lab.gateway.command("drain", "--json")
            assert json.loads(done.stdout) == {"clients": 1, "left": 0}
            assert lab.gateway.process.wait(15) == 0
            wait_until(
                lambda: lab.client.curl(f"http://{SERVER}/get", timeout=2).ok,
                timeout=10,
                what="the client reaches the resource through the other gateway",
            )
            assert "Access allowed" in second.log_text()
            assert {each["name"] for each in lab.portal.state()["gateways"].values()} == {"second"}
        finally:
            second.stop(timeout=15)
