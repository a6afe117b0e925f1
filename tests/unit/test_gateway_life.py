"""What befalls a connection in its life, with a virtual clock: traffic goes on, or is back in the time that follows.

Where nobody says what happened, these are the ways by which it is noticed (connectivity 3.2, 5.4, D1; turn 2.3, 2.8).
"""

from __future__ import annotations

import pytest

from fzg.node.path import PathKind
from fzg.portal import messages
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    ClientParty,
    Nat,
    cidr,
    close_worlds,  # noqa: F401
    memory_relay,
    udp,
    withdrawn,
    world,
)

DIRECT, RELAYED = "nat", "symmetric"
STEP = 0.5  # s between two attempts of the tests; each takes 0.4 s
CLIENT_GIVES_A_PAIR_UP = 16.5
FOLLOWED = CLIENT_GIVES_A_PAIR_UP + 5.0  # the client takes another path, ours counts as silent 5 s later
UNANSWERED = 15.0 + 0.333  # data that nobody answers makes WireGuard ask, and us the relay
RELAY_GIVEN_UP = 8.125
KEEP_ALIVE = 25.0
CONNECTION_GIVEN_UP = UNANSWERED + 20.0 + 0.333
CLIENT_STARTS_ANEW = CLIENT_GIVES_A_PAIR_UP + 2.0  # the grace of a connection without possible pairs
ONE_EXCHANGE = 1.0  # checks, nomination, handshake, and the rhythm of the attempts


def connected(placement=DIRECT, **kinds):
    w = world(gateway=placement, client=kinds.pop("client", placement), **kinds).start()
    w.connect()
    w.net.run(2.0)
    assert w.traffic_flows()
    return w


def back_after(w, limit):
    """Seconds until packets pass both ways again; the client asks anew when its connection is gone, as clients do."""
    start = w.net.now
    while True:
        if w.client.node.connection("gateway") is None and w.portal_is_up:
            w.authorize()
            w.net.run(0.1)
        began = w.net.now
        if w.traffic_flows():
            return
        assert w.net.now - start <= limit + ONE_EXCHANGE, "traffic did not come back in time"
        w.net.run(max(0.0, began + STEP - w.net.now))


def serving(w):
    return next(relay for relay in w.relays if relay.id == w.connection.relay_id)


def tell_relays(w, *relays, gone=()):
    """The portal tells both sides."""
    w.relays_presence(*relays, gone=gone)
    credentials = [relay.credentials(w.client.client_id) for relay in relays]
    w.client.node.update_relays([relay.id for relay in gone], credentials, w.net.now)
    w.client.drain()


def asleep(w, party, seconds):
    """The party's host sleeps: no timer runs, and what is sent to it is lost."""
    own = {*party.addresses, *([party.nat.public] if party.nat else [])}
    w.net.parties.remove(party)
    usual, w.net.lose = w.net.lose, lambda source, destination, payload: destination.ip in own
    w.net.run(seconds)
    w.net.lose = usual
    w.net.parties.append(party)


def another_port(nat):
    """The NAT forgets everything, and the usual port is somebody else's afterwards."""
    nat.rebind()
    nat.taken.add(52625)


def another_public_address(w, party, address):
    del w.net.nats[party.nat.public]
    party.nat = w.net.nats[Nat(address).public] = Nat(address)


# -- relays


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_relay_that_restarts_with_new_credentials_is_used_again(placement):
    w = connected(placement, relays=1)
    connection, (relay,) = w.connection, w.relays
    relay.restart("another secret")
    tell_relays(w, relay)
    back_after(w, 1.0)
    assert w.connection is connection
    assert "gateway" in relay.users


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_relay_that_restarts_at_a_new_address_is_used_there(placement):
    w = connected(placement, relays=1)
    connection, (old,) = w.connection, w.relays
    old.alive = False
    w.net.run(1.0)
    new = w.relays[0] = memory_relay(w.net, 3)
    tell_relays(w, new, gone=[old])
    back_after(w, 1.0)
    assert w.connection is connection
    assert w.connection.relay_id == new.id
    assert len(withdrawn(w.gateway)) == 1


def test_a_relay_that_moves_under_its_old_name_is_used_there():
    w = connected(RELAYED, relays=1)
    connection, (old,) = w.connection, w.relays
    old.alive = False
    new = w.relays[0] = memory_relay(w.net, 3)
    new.id = old.id
    tell_relays(w, new)
    back_after(w, 1.0)
    assert w.connection is connection


def test_a_relay_that_vanishes_without_a_word_is_left_for_another():
    w = connected(RELAYED)
    gone = serving(w)
    gone.alive = False
    back_after(w, UNANSWERED + RELAY_GIVEN_UP)
    assert w.connection.relay_id != gone.id


def test_a_direct_path_does_not_notice_that_its_relay_vanishes():
    w = connected()
    path, gone = w.connection.path, serving(w)
    gone.alive = False
    for _ in range(12):
        assert w.traffic_flows()
        w.net.run(5.0)
    assert w.connection.path == path
    assert gone.id not in w.gateway.node.relays


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_when_all_relays_vanish_and_return_connections_are_as_before(placement):
    w = connected(placement)
    for relay in w.relays:
        relay.alive = False
    w.net.run_until(lambda: w.gateway.said(messages.NoRelays), limit=KEEP_ALIVE + RELAY_GIVEN_UP)
    w.net.run(120.0)
    assert placement is RELAYED or w.traffic_flows()
    assert len(w.gateway.said(messages.NoRelays)) == 1
    for relay in w.relays:
        relay.alive = True
        relay.restart("another secret")
    tell_relays(w, *w.relays)
    back_after(w, 1.0)
    assert placement is RELAYED or w.connection.path.kind is PathKind.PEER_TO_PEER
    w.client.node.drop("gateway")
    w.connect()
    assert w.traffic_flows()


def test_relays_that_vanish_and_return_while_the_portal_is_gone_serve_whoever_comes_after():
    """Nobody can be asked for relays; `init` brings them."""
    w = connected(RELAYED)
    w.portal_goes()
    for relay in w.relays:
        relay.alive = False
    w.net.run(600.0)
    for relay in w.relays:
        relay.alive = True
        relay.restart("another secret")
    w.portal_returns()
    tell_relays(w, *w.relays)
    w.net.run(1.0)
    back_after(w, 1.0)


# -- the portal


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_ten_minutes_without_the_portal_cost_no_packet_and_no_connection(placement):
    """Ten minutes hold four handshakes, two refreshes of allocations and channels, and forty keep-alives."""
    w = connected(placement)
    connection = w.connection
    w.portal_goes()
    lost = 0
    for _ in range(300):
        w.net.run(1.6)
        lost += not w.traffic_flows()
    assert lost == 0
    w.portal_returns()
    w.net.run(5.0)
    assert w.traffic_flows()
    assert w.connection is connection


def test_a_nat_that_forgets_during_an_outage_of_the_portal_is_survived():
    w = connected()
    w.portal_goes()
    w.net.run(60.0)
    another_port(w.gateway.nat)
    back_after(w, KEEP_ALIVE)
    another_port(w.client.nat)
    back_after(w, KEEP_ALIVE)


# -- addresses


@pytest.mark.parametrize("quiet", [0.0, 30.0])
@pytest.mark.parametrize("gateway", ["public", DIRECT])
def test_a_client_whose_nat_forgets_it_goes_on_arriving_and_is_followed(gateway, quiet):
    w = world(gateway=gateway, client="nat").start()
    w.connect()
    connection = w.connection
    w.net.run(quiet)
    another_port(w.client.nat)
    assert gateway != "public" or w.reaches(), "packets are taken from any source"
    back_after(w, CLIENT_GIVES_A_PAIR_UP)
    assert w.connection is connection


@pytest.mark.parametrize("client", ["public", DIRECT])
def test_a_gateway_whose_nat_forgets_it_is_found_again(client):
    w = connected(client=client)
    connection = w.connection
    another_port(w.gateway.nat)
    back_after(w, CLIENT_GIVES_A_PAIR_UP)
    assert w.connection is connection


@pytest.mark.parametrize("side", ["gateway", "client"])
def test_a_relayed_path_survives_a_nat_that_forgets(side):
    """The allocation belongs to the former address; what is sent through it goes unanswered, so the relay is asked."""
    w = connected(RELAYED)
    connection = w.connection
    {"gateway": w.gateway, "client": w.client}[side].nat.rebind()
    back_after(w, UNANSWERED)
    assert w.connection is connection


@pytest.mark.parametrize("side", ["gateway", "client"])
def test_a_router_that_gets_another_public_address_costs_seconds(side):
    w = connected()
    connection = w.connection
    another_public_address(w, {"gateway": w.gateway, "client": w.client}[side], "203.0.113.99")
    back_after(w, CLIENT_GIVES_A_PAIR_UP)
    assert w.connection is connection


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_client_that_roams_with_new_keys_is_served_at_once_and_its_former_self_is_not(placement):
    w = connected(placement)
    former, connection = w.client, w.connection
    roamed = ClientParty(w.net, ["172.30.9.9"], Nat("203.0.113.66", symmetric=placement is RELAYED), number=9)
    roamed.client_id, roamed.ipv4, roamed.ipv6 = former.client_id, former.ipv4, former.ipv6
    w.net.parties.remove(former)
    w.clients[0] = roamed
    w._introduce(roamed)
    w.net.run(1.0)
    start = w.net.now
    w.connect()
    assert w.net.now - start < 0.3
    assert w.traffic_flows()
    assert w.connection is not connection
    former.send(udp(source=former.ipv4, destination=SERVER))
    w.net.run(1.0)
    assert w.gateway.written() == []


@pytest.mark.parametrize("placement", ["public", DIRECT])
def test_a_client_that_moves_without_a_word_is_followed(placement):
    w = connected(placement)
    connection = w.connection
    w.client.renumber("203.0.113.77" if placement == "public" else "172.30.0.177")
    back_after(w, FOLLOWED)
    assert w.connection is connection


@pytest.mark.parametrize("placement", ["public", DIRECT, RELAYED])
def test_a_gateway_whose_own_address_changes_takes_the_relay_and_then_the_direct_path(placement):
    """Relays report the new address with their next answer, and the next authorization tells the client."""
    w = connected(placement)
    connection = w.connection
    w.gateway.renumber("203.0.113.77" if placement == "public" else "172.31.0.177")
    back_after(w, FOLLOWED)
    w.net.run(KEEP_ALIVE + 1.0)
    w.authorize(resource=cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6"))
    w.net.run(2.0)
    assert w.traffic_flows()
    assert w.connection is connection
    if placement is not RELAYED:
        assert connection.path.kind is PathKind.PEER_TO_PEER
        assert connection.path.source.ip == w.gateway.addresses[0]


@pytest.mark.parametrize("placement", ["public", DIRECT, RELAYED])
def test_a_gateway_whose_own_address_changes_while_nobody_sends_is_where_it_is_looked_for(placement):
    w = connected(placement)
    connection = w.connection
    w.net.run(30.0)
    w.gateway.renumber("203.0.113.77" if placement == "public" else "172.31.0.177")
    w.net.run(2 * KEEP_ALIVE)
    back_after(w, 0.0)
    assert w.connection is connection


@pytest.mark.parametrize("placement", ["public", DIRECT])
def test_losing_ipv6_moves_a_path_to_ipv4(placement):
    w = world(gateway=placement, client=placement, ipv6=True).start()
    w.net.lose = lambda source, destination, payload: source.is_ipv4 and source.port == destination.port == 52625
    w.connect()
    w.net.run(2.0)
    assert w.traffic_flows()
    connection = w.connection
    assert not connection.path.destination.is_ipv4
    w.net.lose = lambda source, destination, payload: not source.is_ipv4
    back_after(w, FOLLOWED)
    assert w.connection is connection
    assert connection.path.destination.is_ipv4


def test_losing_ipv6_towards_the_relays_moves_allocations_to_ipv4():
    w = connected(RELAYED, ipv6=True)
    for relay in w.relays:
        assert all(client.is_ipv4 for client in relay.allocations)  # Bindings go out by IPv4 first
    w.net.lose = lambda source, destination, payload: not source.is_ipv4
    for _ in range(10):
        w.net.run(6.0)
        back_after(w, FOLLOWED)


# -- sleep and clocks


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_laptop_that_slept_for_four_minutes_goes_on(placement):
    """Nothing was under way to it, so its connection still stands (5.5: 540 s)."""
    w = connected(placement)
    w.net.run(25.0)
    connection = w.connection
    asleep(w, w.client, 240.0)
    another_port(w.client.nat)
    assert w.connection is connection
    back_after(w, CLIENT_GIVES_A_PAIR_UP)
    assert w.connection is connection


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_laptop_that_slept_while_data_came_for_it_connects_anew(placement):
    """The gateway has given it up long since; the client finds out when nobody answers."""
    w = connected(placement)
    connection = w.connection
    began = w.net.now
    w.net.at(began + 1.0, lambda: w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=5)))
    w.net.at(began + 1.0 + CONNECTION_GIVEN_UP, lambda: gone.append(w.connection is None))
    gone: list[bool] = []
    asleep(w, w.client, 240.0)
    assert gone == [True]
    assert w.gateway.core.tunnel.client_count == 1, "what it may reach is kept (2.11)"
    back_after(w, CLIENT_STARTS_ANEW)
    assert w.connection is not connection


@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_gateway_that_slept_for_four_minutes_goes_on(placement):
    """Its clock counts sleep, so every deadline has passed: it spins on none and gives nobody up too early."""
    w = connected(placement)
    w.net.run(25.0)
    asleep(w, w.gateway, 240.0)
    back_after(w, CLIENT_STARTS_ANEW)


@pytest.mark.parametrize("hours", [1, 24 * 30])
@pytest.mark.parametrize("placement", [DIRECT, RELAYED])
def test_a_jump_of_the_clock_is_survived(placement, hours):
    """Both sides wake in another hour, where no session, no allocation and no pair of theirs is valid any more."""
    w = connected(placement)
    w.net.now += 3600.0 * hours
    for relay in w.relays:
        relay.restart("secret")
    back_after(w, CLIENT_STARTS_ANEW + RELAY_GIVEN_UP)


@pytest.mark.parametrize("delta", [-86_400.0, 86_400.0])
def test_a_step_of_the_wall_clock_moves_no_timer_of_a_connection(delta):
    w = connected()
    connection, deadline = w.connection, w.gateway.node.poll_timeout()
    w.gateway.core.handle_clock_step(delta, w.net.now)
    assert w.gateway.node.poll_timeout() == deadline
    for _ in range(200):
        w.net.run(1.6)
        assert w.traffic_flows()
    assert w.connection is connection
