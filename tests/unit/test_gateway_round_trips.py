"""How many round trips lie between a client's first packet and its first reply, with 20 ms for each.

The client asks the portal, which asks the gateway, whose answer comes back the same way: two round trips where the
portal is as far from both as they are from each other. A check, a handshake and the packet itself make five.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict

import pytest

from fzg.portal import messages
from tests.unit.gateway_world import SERVER, close_worlds, udp, world  # noqa: F401

ROUND_TRIP = 0.02
CONNECTIONS = 100
PROCESSING = 0.002  # s, in steps of the virtual clock
BETWEEN_ATTEMPTS = 0.25  # a check that was lost comes again so much later (connectivity 3.2)


def distances(w, *, seed=None):
    """Half a round trip between the parties, by relays too: these are next to each other, halfway.

    With a seed each leg is up to a third longer, and the portal nearer or farther. Nothing overtakes on its way.
    """
    relays = {relay.v4.ip for relay in w.relays}
    chance = random.Random(seed)
    factors = defaultdict(lambda: chance.uniform(1.0, 1.3) if seed is not None else 1.0)

    def set_latency(source, destination, payload):
        halves = (source.ip not in relays) + (destination.ip not in relays)
        w.net.latency = ROUND_TRIP / 4 * halves * factors[frozenset({source.ip, destination.ip})]
        return False

    w.net.lose = set_latency
    w.portal_delay = ROUND_TRIP * (chance.uniform(0.5, 1.2) if seed is not None else 1.0)


def first_reply(w):
    """Seconds from the client's packet, which makes it ask, to the reply of the resource."""
    client, began = w.client, w.net.now
    w.net.run(ROUND_TRIP)  # the request to the portal, and what that tells the gateway
    seen_from = w.client.nat.public if w.client.nat else w.client.addresses[0]
    w.gateway.portal(w.authorization(address=messages.ClientAddress(seen_from)))
    count = len(client.established)
    w.net.run_until(lambda: len(client.established) > count, limit=10.0)
    question = udp(source=client.ipv4, destination=SERVER)
    answer = udp(source=SERVER, destination=client.ipv4, sport=53, dport=50000)
    client.send(question)
    w.net.run_until(lambda: question in w.gateway.written())
    w.gateway.read_tun(answer)
    w.net.run_until(lambda: answer in client.received)
    took = w.net.now - began
    client.received.clear()
    return took


def connections(placement, *, relays=2):
    """First replies of fresh worlds, each with its own distances; sorted."""
    took = []
    for seed in range(CONNECTIONS):
        w = world(gateway=placement, client=placement, relays=relays)
        distances(w, seed=seed)
        took.append(first_reply(w.start()))
        w.close()
    return sorted(took)


@pytest.mark.parametrize("placement", ["public", "nat"])
def test_a_direct_connection_takes_five(placement):
    w = world(gateway=placement, client=placement)
    distances(w)
    took = first_reply(w.start())
    assert w.connection.path.kind == "PeerToPeer"
    assert took <= 5 * ROUND_TRIP + PROCESSING


def test_between_two_relays_the_candidates_of_the_client_are_waited_for():
    """Their way through the portal and ours back are one each, and half of one binds the client's channel.

    Without it the first check is lost, and a quarter of a second with it.
    """
    w = world(gateway="symmetric", client="symmetric")
    distances(w)
    took = first_reply(w.start())
    assert w.connection.path.kind == "RelayToRelay"
    assert took <= 7 * ROUND_TRIP + PROCESSING


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "round_trips"), [("nat", 5), ("symmetric", 7)])
def test_no_first_check_is_lost_at_the_95th_percentile(placement, round_trips):
    took = connections(placement)
    assert statistics.quantiles(took, n=20)[-1] <= round_trips * ROUND_TRIP * 1.2
    assert took[-1] < took[0] + BETWEEN_ATTEMPTS / 2
