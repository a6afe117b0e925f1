"""Several `init` in a row, each with other tunnel addresses (spec portal 2.2)."""

from __future__ import annotations

import pytest
from gateway_process import INIT

from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.needs("root", "ip", "nft", "unshare", "tun"), pytest.mark.slow]


def test_the_addresses_of_the_last_init_stand_however_fast_they_change(namespace, portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    for number in range(1, 21):
        interface = {"ipv4": f"100.71.5.{number}", "ipv6": f"fd00:2021:1111::b:{number:x}"}
        portal.connection(0).push("init", INIT | {"interface": interface})

    def settled():
        assert gateway.process.running, gateway.output
        addresses = namespace.run("ip", "-o", "address", "show", "dev", "tun-firezone").stdout
        sockets = namespace.run("ss", "-lnutH").stdout
        return addresses.count("100.71.5.20/32") == 1 and all(
            sockets.count(served) == 2 for served in ("100.71.5.20:53535", "[fd00:2021:1111::b:14]:53535")
        )

    wait_until(settled, "the last addresses")
    assert "100.71.5.19" not in namespace.run("ip", "address").stdout
    assert gateway.http("/readyz")[0] == 200
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}
