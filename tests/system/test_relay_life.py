"""Relays that restart, move, leave and come back under connections that need them (operations.md 5.2, historic)."""

from __future__ import annotations

import time

import pytest

from tests.lab.process import wait_until
from tests.lab.scenario import Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"),
    pytest.mark.slow,
    pytest.mark.spec("OPS-62"),
]

WEB, BY_DNS = "http://10.20.0.100/get", "http://web.test/get"
RELAYED = {"RelayToPeer", "PeerToRelay", "RelayToRelay"}


@pytest.fixture
def lab():
    """Client and gateway, between whom every packet is dropped."""
    with Lab("blocked") as lab:
        goes_through(lab)
        assert set(lab.client.paths()) <= RELAYED
        yield lab
        assert lab.warnings() == []


def goes_through(lab, *, within=10.0):
    """Both kinds of resource can be reached; the way may take some seconds to heal."""
    begin = time.monotonic()
    while not all(lab.client.curl(url, timeout=3).ok for url in (WEB, BY_DNS)):
        assert time.monotonic() - begin < within, lab.tails()


def wait_relays(lab, ids):
    wait_until(lambda: set(lab.portal.state()["relays"]) == set(ids), timeout=5, what="the portal knows the relays")
    # Devices hear of it a second later (spec portal.md 5.4).
    wait_until(
        lambda: set(lab.portal.state()["gateways"][lab.gateway.id]["relays"]) == set(ids),
        timeout=5,
        what="the gateway is told",
    )


def authorizations(lab):
    return len(lab.portal.entries(kind="gateway", event="create_authorization"))


def test_both_relays_restart_with_new_credentials(lab):
    wait_relays(lab, [relay.restart() for relay in lab.relays])
    goes_through(lab)
    assert set(lab.client.paths()) <= RELAYED


def test_both_relays_come_back_at_new_addresses(lab):
    old = list(lab.relays)
    new = [lab.start_relay(number, program="relay") for number in (2, 3)]
    for relay in old:
        relay.process.stop()
    wait_relays(lab, [relay.id for relay in new])
    goes_through(lab)
    assert any(relay.carried().get("bytes_from_peers", 0) for relay in new)


def test_one_relay_leaves_and_then_the_other_and_then_they_return(lab):
    first, second = lab.relays
    first.process.stop()
    wait_relays(lab, [second.id])
    goes_through(lab)

    second.process.stop()
    wait_until(lambda: not lab.portal.state()["relays"], timeout=5, what="all relays are gone")
    assert not lab.client.curl(WEB, timeout=2).ok

    first.process.start()
    second.process.start()
    wait_relays(lab, [first.id, second.id])
    goes_through(lab)


def test_a_relayed_connection_does_not_need_the_portal(lab):
    before = authorizations(lab)
    lab.portal.stop(code=None)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        goes_through(lab, within=0)
    lab.portal.start()
    wait_until(lambda: lab.portal.state()["gateways"], timeout=15, what="the gateway is back")
    goes_through(lab)
    assert authorizations(lab) == before


def test_relays_that_restart_while_the_portal_is_away_are_found_again(lab):
    lab.portal.stop(code=None)
    for relay in lab.relays:
        relay.restart()
    lab.portal.start()
    wait_until(lambda: len(lab.portal.state()["relays"]) == 2, timeout=10, what="the relays are back")
    wait_until(
        lambda: lab.portal.state()["gateways"] and lab.portal.state()["clients"], timeout=15, what="all are back"
    )
    goes_through(lab)


@pytest.mark.long
@pytest.mark.needs("turnserver")
def test_a_coturn_that_hangs_is_left_for_the_other():
    """A server that neither answers nor leaves the portal."""
    with Lab("coturn") as lab:
        goes_through(lab)
        lab.relays[0].pause(paused=True)
        try:
            goes_through(lab, within=60)
        finally:
            lab.relays[0].pause(paused=False)
        assert lab.warnings() == []
