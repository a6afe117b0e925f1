"""User packets through the core: sizes, ECN, unknown clients, and revocation that bites on the next packet."""

from __future__ import annotations

import pytest

from fzg.dataplane.engine import InnerPacket
from fzg.portal import messages
from tests.unit.dataplane_world import ip as ip_packet
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    SETTLED,
    UNIX_START,
    cidr,
    close_worlds,  # noqa: F401
    world,
)

PROTOCOL_UDP = 17


def connected(**placement):
    w = world(**placement).start()
    w.connect()
    w.net.run(SETTLED)  # until the client's keepalive lets the gateway send
    return w


def with_flows(**placement):
    """Both directions of one 5-tuple are installed in the engine."""
    w = connected(**placement)
    w.flow = udp(source=w.client.ipv4, destination=SERVER)
    w.back = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000)
    for _ in range(3):
        assert passes_in(w)
        assert passes_out(w)
    decided = {"in": 0, "out": 0}
    handle_inner, handle_outbound = w.gateway.core.handle_inner_packet, w.gateway.core.handle_outbound_packet

    def inner(*arguments):
        decided["in"] += 1
        handle_inner(*arguments)

    def outbound(*arguments):
        decided["out"] += 1
        handle_outbound(*arguments)

    w.gateway.core.handle_inner_packet, w.gateway.core.handle_outbound_packet = inner, outbound
    assert passes_in(w)
    assert passes_out(w)
    assert decided == {"in": 0, "out": 0}, "the engine settles these without the core"
    return w


def passes_in(w):
    """The flow's packet from the client arrives behind the gateway, without time passing for anything else."""
    w.client.send(w.flow)
    w.net.run(0.01)
    return w.gateway.written() == [w.flow]


def passes_out(w):
    before = len(w.client.received)
    w.gateway.read_tun(w.back)
    w.net.run(0.01)
    return w.client.received[before:] == [w.back]


# -- revocation

OTHER = cidr("192.168.0.0/16", resource_id=RESOURCE_ID[:-1] + "6")
NARROW = messages.TcpFilter()


def reject(w):
    w.reject()


def snapshot(w):
    w.gateway.portal(
        w.init(
            authorizations=(
                messages.Authorization(
                    client_id=messages.Id(w.client.client_id), resource_id=OTHER.id, expires_at=2_145_916_800
                ),
            )
        )
    )


def filters(w):
    w.gateway.portal(messages.ResourceUpdated(resource=cidr("10.0.0.0/8", NARROW)))


def repeat_with_filters(w):
    w.authorize(resource=cidr("10.0.0.0/8", NARROW))


def repeat_with_past_expiry(w):
    w.authorize(expires_at=int(UNIX_START))


def expiry_message(w):
    w.gateway.portal(
        messages.AccessAuthorizationExpiryUpdated(
            client_id=messages.Id(w.client.client_id), resource_id=messages.Id(RESOURCE_ID), expires_at=int(UNIX_START)
        )
    )


@pytest.mark.parametrize("placement", ["public", "symmetric"])
@pytest.mark.parametrize(
    "revoke", [reject, snapshot, filters, repeat_with_filters, repeat_with_past_expiry, expiry_message]
)
def test_revocation_bites_on_the_next_packet_of_both_directions(revoke, placement):
    w = with_flows(gateway=placement, client=placement)
    w.authorize(resource=OTHER)
    assert passes_in(w)
    assert passes_out(w)
    revoke(w)
    w.gateway.read_tun(w.back)
    w.client.send(w.flow)
    received = len(w.client.received)
    w.net.run(SETTLED)
    assert w.gateway.written() == []
    assert w.back not in w.client.received[received:]
    assert w.reaches(destination=bytes((192, 168, 0, 9))), "the other resource is untouched"


def test_a_packet_in_flight_when_the_right_ends_is_not_written():
    w = with_flows()
    w.client.send(w.flow)
    w.reject()
    w.net.run(SETTLED)
    assert w.gateway.written() == []


def test_an_expiry_ends_the_flows_on_time():
    w = connected()
    w.authorize(resource=OTHER)
    w.flow = udp(source=w.client.ipv4, destination=SERVER)
    w.back = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000)
    end = int(w.net.now) + 3
    w.authorize(expires_at=int(UNIX_START) + end)
    while w.net.now < end - 0.01:
        assert passes_in(w)
        assert passes_out(w)
        w.net.run(0.001)
    w.net.run(end + 0.001 - w.net.now)
    assert not passes_in(w)
    assert not passes_out(w)


def test_the_end_of_a_connection_ends_its_flows():
    w = with_flows()
    w.gateway.node.drop(w.client.client_id)
    w.gateway.read_tun(w.back)
    w.net.run(SETTLED)
    assert w.gateway.core.counters["to client: not connected"] == 1
    assert w.gateway.engine._peers == {}, "no flow was installed for nobody"


def test_a_late_packet_of_a_connection_that_ended_leaves_nothing_behind():
    w = connected()
    handle = w.connection.handle
    w.gateway.node.drop(w.client.client_id)
    w.gateway.dispatch([InnerPacket(handle, udp(source=w.client.ipv4, destination=SERVER), 0, None, None)])
    w.reject()
    assert w.gateway.engine._peers == {}


# -- sizes and marks


@pytest.mark.spec("CONN-67")
@pytest.mark.parametrize(("placement", "size"), [("public", 1312), ("symmetric", 1316)])
def test_the_largest_packet_fits_direct_and_through_our_relay(placement, size):
    w = connected(gateway=placement, client=placement)
    packet = udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000, payload=bytes(1252))
    assert len(packet) == 1280
    for _ in range(3):
        log = len(w.net.log)
        w.gateway.read_tun(packet)
        w.net.run(SETTLED)
        assert w.client.received.pop() == packet
        ours = [payload for _, source, _, payload in w.net.log[log:] if source.ip in gateway_sources(w)]
        assert max(map(len, ours)) == size
    back = udp(source=w.client.ipv4, destination=SERVER, payload=bytes(1252))
    w.client.send(back)
    w.net.run(SETTLED)
    assert w.gateway.written() == [back]


def gateway_sources(w):
    return [w.gateway.nat.public] if w.gateway.nat else w.gateway.addresses


@pytest.mark.parametrize("codepoint", [0, 1, 2, 3])
def test_the_outer_mark_of_a_first_packet_is_the_inner_one(codepoint):
    w = connected()
    seen = []
    engine_transmit = w.gateway.engine.transmit
    w.gateway.engine.transmit = lambda transmit: (seen.append(transmit), engine_transmit(transmit))
    w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000, tos=codepoint))
    assert [transmit.ecn for transmit in seen if transmit.payload[0] == 4] == [codepoint]


@pytest.mark.parametrize(("inner", "outer", "written"), [(0, 3, 0), (1, 3, 3), (2, 3, 3), (2, 0, 2), (0, 1, 0)])
def test_congestion_met_outside_marks_a_first_packet_that_can_be_marked(inner, outer, written):
    w = connected()
    handle = w.connection.handle
    packet = udp(source=w.client.ipv4, destination=SERVER, tos=inner)
    w.gateway.dispatch([InnerPacket(handle, packet, outer, None, None)])
    (forwarded,) = w.gateway.written()
    assert forwarded[1] & 3 == written


# -- who and where


def test_packets_for_nobody_are_dropped_and_counted():
    w = connected()
    w.gateway.read_tun(udp(source=SERVER, destination=bytes((100, 66, 7, 7))))
    w.gateway.read_tun(udp(source=SERVER, destination=bytes((192, 0, 2, 1))))
    assert w.gateway.core.counters["to client: NoPeerState"] == 1
    assert w.gateway.core.counters["to client: NotAPeer"] == 1


def test_a_packet_of_a_peer_that_is_gone_is_dropped():
    w = connected()
    w.gateway.dispatch([InnerPacket(4711, udp(source=w.client.ipv4, destination=SERVER), 0, None, None)])
    assert w.gateway.written() == []
    assert w.gateway.core.counters["inner packet of an unknown peer"] == 1


def test_a_packet_with_another_clients_address_is_refused():
    w = connected()
    second = w.add_client()
    w.connect(second)
    w.client.send(udp(source=second.ipv4, destination=SERVER))
    w.net.run(SETTLED)
    assert w.gateway.written() == []


def test_answers_reach_the_client_that_owns_the_address():
    w = connected()
    clients = [w.client, w.add_client("nat"), w.add_client("symmetric")]
    for client in clients[1:]:
        w.connect(client)
    for client in clients:
        assert w.traffic_flows(client)
    packet = udp(source=SERVER, destination=clients[1].ipv4, sport=53, dport=50000)
    w.gateway.read_tun(packet)
    w.net.run(SETTLED)
    assert [packet in client.received for client in clients] == [False, True, False]


def test_the_gateways_own_address_answers_to_granted_clients_only():
    w = connected()
    own = udp(source=w.client.ipv4, destination=bytes((100, 71, 4, 9)))
    w.client.send(own)
    w.net.run(SETTLED)
    assert w.gateway.written() == [own]
    w.reject()
    w.client.send(own)
    w.net.run(SETTLED)
    assert w.gateway.written() == []


def test_a_refused_packet_is_answered_inside_the_tunnel():
    w = connected()
    w.client.send(udp(source=w.client.ipv4, destination=bytes((172, 16, 0, 1))))
    w.net.run(SETTLED)
    (answer,) = w.client.received
    assert answer[9] == 1
    assert (answer[20], answer[21]) == (3, 13)


def test_oddities_from_both_sides_raise_nothing():
    w = connected()
    for packet in (ip_packet(w.client.ipv4, SERVER, 17, b""), ip_packet(w.client.ipv4, SERVER, 6, bytes(3)), b"\x45"):
        w.gateway.read_tun(packet)
        datagram = w.client.engine.seal(1, packet, w.net.now)
        path = w.client.path
        w.gateway.receive(datagram, path.source, path.destination)
    w.net.run(SETTLED)
    assert w.gateway.written() == []
    assert w.traffic_flows()
