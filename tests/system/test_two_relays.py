"""Two relays, one message: what the gateway tells a client of its addresses, seen at the portal."""

from __future__ import annotations

import statistics
from ipaddress import ip_address

import pytest
from virtual_client import ACKNOWLEDGED, ADDED, INVALIDATED, candidates, invite, said_about

from tests.lab.scenario import Lab

pytestmark = [pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "tun"), pytest.mark.slow]

GATEWAY_PORT = 52625


@pytest.fixture(scope="module", params=["ipv4", "both"])
def lab(request):
    families = (4,) if request.param == "ipv4" else (4, 6)
    with Lab(gateway_families=families, start_clients=False) as lab:
        wait_allocations(lab, *lab.relays)
        yield lab


def wait_allocations(lab, *relays):
    for relay in relays:
        lab.gateway.process.wait_for_log(f"relay {relay.id}: allocation active")


def offered(message):
    return {(c.kind, c.address) for c in candidates(message)}


def of_relay(relay):
    """The relay candidates of a relay, as `offered` gives them."""
    return {("relay", relay.ipv4), ("relay", relay.ipv6)}


@pytest.mark.spec("CONN-17", "CONN-37", "CONN-63", "PORTAL-47", "PORTAL-55", "TURN-53")
def test_everything_known_goes_out_once_and_in_one_message_right_behind_the_acknowledgement(lab):
    place = lab.places["gateway"]
    # Both relays see the gateway at one and the same address.
    for relay in lab.relays:
        (allocation,) = relay.allocations()
        assert allocation["client"] in ([place.public_ipv4, GATEWAY_PORT], [place.public_ipv6, GATEWAY_PORT])
    own = {("host", place.ipv4), ("srflx", place.public_ipv4)}
    if 6 in place.families:
        own |= {("host", str(ip_address(place.ipv6))), ("srflx", str(ip_address(place.public_ipv6)))}
    choices = [own | of_relay(relay) for relay in lab.relays]

    invited = [invite(lab.portal) for _ in range(12)]
    invite(lab.portal)  # whatever comes late for the others comes before its acknowledgement

    frames = lab.portal.entries(kind="gateway", direction="in")
    gaps = []
    for authorization in invited:
        client = authorization["client"]["id"]
        (message,) = said_about(lab.portal, client)
        assert message["event"] == ADDED
        assert message["payload"]["client_ids"] == [client]
        found = candidates(message)
        assert len(found) == len(offered(message))
        # The gateway's addresses on other networks of the lab are offered too.
        assert {each for each in offered(message) if each[0] != "host" or each in own} in choices
        assert [c.priority for c in found] == sorted((c.priority for c in found), reverse=True)
        at = frames.index(message)
        assert frames[at - 1]["event"] == ACKNOWLEDGED
        assert frames[at - 1]["payload"] == {"ref": authorization["ref"]}
        gaps.append(message["at"] - frames[at - 1]["at"])
    # The machine may be busy now and then; a timer would delay every message.
    assert statistics.median(gaps) <= 0.005, gaps


@pytest.mark.spec("PORTAL-46")
@pytest.mark.parametrize("kind", ["cidr", "dns", "internet"])
def test_an_authorization_is_acknowledged_at_once_and_asks_no_name_server(lab, kind):
    if kind == "internet":
        lab.portal.add_resource(resource="internet")
    queries = lab.resources.call("queries")
    answers = []
    for _ in range(5):
        authorization = invite(lab.portal, kind)
        said = lab.portal.entries(kind="gateway")
        asked = next(e for e in said if e.get("event") == "create_authorization" and e["payload"] == authorization)
        told = next(e for e in said if e.get("event") == ACKNOWLEDGED and e["payload"] == {"ref": authorization["ref"]})
        answers.append(told["at"] - asked["at"])
    assert statistics.median(answers) < 0.1, answers
    assert lab.resources.call("queries") == queries


def one_client_each(lab):
    """Clients with a connection over relay 1 and over relay 2."""
    first, second = lab.relays
    found: dict[str, str] = {}
    for _ in range(40):
        client = invite(lab.portal)["client"]["id"]
        (message,) = said_about(lab.portal, client)
        relay = first if of_relay(first) <= offered(message) else second
        assert of_relay(relay) <= offered(message)
        found[relay.name] = client
        if len(found) == 2:
            return found[first.name], found[second.name]
    raise AssertionError(f"40 connections over {set(found)} only")


@pytest.fixture
def late():
    """A gateway, not yet started, whose relays hear it over IPv4 only."""
    lab = Lab(start_gateway=False)
    with lab:
        for relay in lab.relays:
            relay.delay(seconds=0.1)  # the nearer one would be the only choice, and noise would say which that is
            lab.places[relay.name].namespace.nft(
                "table ip6 deaf {\nchain input {\ntype filter hook input priority 0\nudp dport 3478 drop\n}\n}\n"
            )
        yield lab


def hear(lab, relay):
    lab.places[relay.name].namespace.nft("delete table ip6 deaf\n")


def test_a_relay_added_later_says_nothing_to_connections_that_exist(late):
    first, second = late.relays
    late.portal.choose_relays(whom="gateway", relays=[first.id])
    late.start_gateway(wait=False)
    wait_allocations(late, first)
    client = invite(late.portal)["client"]["id"]
    (before,) = said_about(late.portal, client)

    late.portal.choose_relays(whom="gateway", relays=None)
    late.portal.relays_presence(kind="gateway", disconnected_ids=[])
    wait_allocations(late, second)
    _, of_second = one_client_each(late)
    assert said_about(late.portal, client) == [before]
    assert of_relay(second) <= offered(said_about(late.portal, of_second)[0])


@pytest.mark.spec("CONN-36", "CONN-38")
def test_changes_of_the_selected_relay_are_told_once_and_those_of_others_not_at_all(late):
    first, second = late.relays
    late.start_gateway(wait=False)
    wait_allocations(late, first, second)
    place = late.places["gateway"]
    on_first, on_second = one_client_each(late)

    # A later address: the first relay answers over IPv6 too, at the repetition of the gateway's request.
    mark = late.portal.mark()
    hear(late, first)
    late.portal.wait_for(since=mark, event=ADDED, timeout=8, predicate=lambda e: on_first in e["payload"]["client_ids"])
    invite(late.portal)
    (message,) = said_about(late.portal, on_first, since=mark)
    # The host's own address was offered with the authorization: for that no relay is needed.
    assert offered(message) == {("srflx", str(ip_address(place.public_ipv6)))}
    assert said_about(late.portal, on_second, since=mark) == []

    # The selected relay goes: what is left is not repeated.
    on_first, on_second = one_client_each(late)
    mark = late.portal.mark()
    late.portal.choose_relays(whom="gateway", relays=[second.id])
    late.portal.relays_presence(kind="gateway", disconnected_ids=[first.id])
    late.portal.wait_for(
        since=mark, event=INVALIDATED, timeout=5, predicate=lambda e: on_first in e["payload"]["client_ids"]
    )
    invite(late.portal)
    added, gone = said_about(late.portal, on_first, since=mark)
    assert (added["event"], gone["event"]) == (ADDED, INVALIDATED)
    assert offered(gone) == of_relay(first)
    assert offered(added) == of_relay(second)
    assert len(candidates(added)) == len(candidates(gone)) == 2
    assert said_about(late.portal, on_second, since=mark) == []
    assert late.warnings() == []
