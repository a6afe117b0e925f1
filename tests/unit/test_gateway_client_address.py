"""The portal says where the client reached it from: our NAT is open before the client's first check."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from fzg.portal import messages
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import world

CLIENT_PUBLIC = "203.0.113.7"
CLIENT_PORT = 52625


@pytest.fixture
def nat_world():
    made = world(gateway="nat", client="nat").start()
    yield made
    made.close()


def told(address: str) -> messages.ClientAddress:
    return messages.ClientAddress(ip_address(address).packed)


def test_a_check_goes_to_the_clients_usual_port_before_its_candidates_come(nat_world):
    nat_world.gateway.portal(nat_world.authorization(address=told(CLIENT_PUBLIC)))
    now = nat_world.net.now
    nat_world.net.run(0.01)
    target = Endpoint.of(CLIENT_PUBLIC, CLIENT_PORT)
    checks = [payload for at, _, destination, payload in nat_world.net.log if at == now and destination == target]
    assert [stun.parse(check).method for check in checks] == [stun.Method.BINDING]


def test_no_channel_is_bound_for_an_address_that_nobody_signalled(nat_world):
    nat_world.gateway.portal(nat_world.authorization(address=told("198.51.100.77")))
    nat_world.net.run(5.0)
    targets = {peer for relay in nat_world.relays for peer in relay.channels.values()}
    assert Endpoint.of("198.51.100.77", CLIENT_PORT) not in targets


def test_the_first_check_of_a_client_behind_a_nat_succeeds(nat_world):
    assert nat_world.connect(address=told(CLIENT_PUBLIC)) < 0.05
    nat_world.net.run(0.1)
    assert nat_world.client.path.kind == "PeerToPeer"


def test_an_address_that_is_wrong_costs_nothing_but_the_attempt(nat_world):
    nat_world.connect(address=told("198.51.100.77"))
    nat_world.net.run(1.0)
    assert nat_world.client.path.kind == "PeerToPeer"


@pytest.mark.parametrize("subject", [None, 5, [], "203.0.113.7", {}, {"ip": None}, {"ip": 7}, {"ip": "here"}])
def test_a_subject_without_a_usable_address_is_as_good_as_none(subject, nat_world):
    payload = {
        "ref": "opaque",
        "client": {
            "id": "11111111-2222-4333-8444-555555555555",
            "public_key": "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
            "preshared_key": "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU=",
            "ipv4": "100.66.1.2",
            "ipv6": "fd00:2021:1111::1:2",
        },
        "resource": {"type": "internet", "id": "99999999-8888-4777-8666-555555555555"},
        "client_ice_credentials": {"username": "725z", "password": "latqe7iwpjyrccojsy4ywy"},
        "gateway_ice_credentials": {"username": "zzcf", "password": "up7vgqqtsogpiahklbaira"},
        "subject": subject,
    }
    assert messages.decode("create_authorization", json.dumps(payload).encode()).address == b""
