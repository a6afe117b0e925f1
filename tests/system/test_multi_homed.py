"""A gateway with addresses that no relay sees: clients are told of them, and may use them (spec connectivity D3)."""

from __future__ import annotations

import socket

import pytest
from capture import Capture
from gateway_process import inside
from virtual_client import candidates, invite, said_about

from tests.lab import stun
from tests.lab.namespaces import Nat
from tests.lab.process import wait_until
from tests.lab.scenario import Lab

pytestmark = [pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "tun"), pytest.mark.slow]

FIRST, SECOND, THIRD = "203.0.113.31", "203.0.113.41", "203.0.113.42"
WEB = "http://10.20.0.110/hostname"


@pytest.fixture(scope="module")
def lab():
    """A public gateway with a second link to the internet, which nothing is routed over."""
    with Lab(gateway_nat=Nat.NONE, gateway_families=(4,), start_gateway=False) as lab:
        host = lab.places["gateway"].namespace
        lab.network.attach_public(host, 41, interface="eth1", families=())
        host.ip(f"address add {SECOND}/24 dev eth1", f"route change 203.0.113.0/24 dev eth0 src {FIRST}")
        host.sysctl(ipv4__conf__all__arp_filter=1, ipv4__conf__all__rp_filter=0, ipv4__conf__eth1__rp_filter=0)
        lab.start_gateway()
        yield lab


def hosts(lab, authorization):
    """The host candidates that this client was told."""
    messages = said_about(lab.portal, authorization["client"]["id"])
    return {each.address for message in messages for each in candidates(message) if each.kind == "host"}


def answer_from(lab, authorization, address):
    """The address from which the gateway answers the client's check of `address`; None when it does not."""
    own, peer = authorization["gateway_ice_credentials"], authorization["client_ice_credentials"]
    username = f"{own['username']}:{peer['username']}".encode()
    attributes = [(stun.USERNAME, username), (0x802A, bytes(8)), (0x0024, (1 << 24).to_bytes(4, "big"))]
    with inside(lab.places["client1"].namespace):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(0.5)
        for _ in range(6):
            request = stun.encode(stun.BINDING, stun.REQUEST, bytes(12), attributes, own["password"].encode())
            sock.sendto(request, (address, 52625))
            try:
                while True:
                    data, source = sock.recvfrom(2000)
                    if stun.Message(data).message_class == stun.SUCCESS:
                        return source
            except TimeoutError:
                continue
    return None


@pytest.mark.spec("CONN-3")
def test_an_address_that_no_relay_sees_is_offered_and_answers(lab):
    authorization = invite(lab.portal)
    assert {FIRST, SECOND} <= hosts(lab, authorization)
    for address in (FIRST, SECOND):
        assert answer_from(lab, authorization, address) == (address, 52625)


def test_neither_the_tunnel_nor_loopback_is_offered(lab):
    offered = hosts(lab, invite(lab.portal))
    assert not {address for address in offered if address.startswith(("127.", "100.", "169.254.", "fe80", "fd00:2021"))}


def test_a_client_connects_over_it_when_the_first_one_is_blocked(lab):
    router = lab.places["client1"].router
    router.nft(f"table ip first {{\nchain c {{\ntype filter hook forward priority 0\nip daddr {FIRST} drop\n}}\n}}\n")
    try:
        lab.start_client(0)
        assert lab.client.curl(WEB, timeout=10).ok
        lab.client.wait_path("PeerToPeer", timeout=10)
        with Capture(router, "internet") as seen:
            assert lab.client.curl(WEB, timeout=10).ok
        data = [p for p in seen.packets if p.protocol == 17 and p.transport[8] == 4]
        assert {p.destination for p in data if p.outgoing} == {SECOND}
        assert {p.source for p in data if not p.outgoing} == {SECOND}
    finally:
        router.nft("delete table ip first\n")


@pytest.mark.spec("CONN-44")
def test_one_that_comes_and_goes_is_noticed_and_told_with_the_next_authorization(lab):
    host = lab.places["gateway"].namespace
    before = invite(lab.portal)
    host.ip(f"address add {THIRD}/32 dev eth1")
    wait_until(lambda: THIRD in hosts(lab, invite(lab.portal)), timeout=5, what="the new address is offered")
    assert THIRD not in hosts(lab, before)
    assert answer_from(lab, before, THIRD) == (THIRD, 52625)
    host.ip(f"address del {THIRD}/32 dev eth1")
    wait_until(lambda: THIRD not in hosts(lab, invite(lab.portal)), timeout=5, what="it is offered no more")
    assert lab.warnings() == []
