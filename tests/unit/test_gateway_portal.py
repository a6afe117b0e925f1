"""What each message of the portal does to access and connections (spec portal 2 and 6)."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import pytest

from fzg.gateway import Resolve
from fzg.ops.trace import trace
from fzg.portal import messages
from fzg.wire import control
from tests.unit.dataplane_world import tcp, udp
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    SERVER_2,
    SETTLED,
    UNIX_START,
    cidr,
    close_worlds,  # noqa: F401
    memory_relay,
    signalled,
    withdrawn,
    world,
)

OTHER_ID = RESOURCE_ID[:-1] + "6"
FAR = 2_145_916_800
ICMP_PROHIBITED = (3, 13)


def other_network(**fields):
    return cidr("192.168.0.0/16", resource_id=OTHER_ID, **fields)


def listed(w, *entries):
    """`init` with a snapshot of (client, resource id) or (client, resource id, expiry)."""
    return w.init(
        authorizations=tuple(
            messages.Authorization(
                client_id=messages.Id(client.client_id),
                resource_id=messages.Id(resource_id),
                expires_at=(*expiry, FAR)[0],
            )
            for client, resource_id, *expiry in entries
        )
    )


def with_two_resources(**kinds):
    w = world(**kinds).start()
    w.connect()
    w.authorize(resource=other_network())
    w.net.run(SETTLED)
    assert w.reaches()
    assert w.reaches(destination=SERVER_2)
    return w


def icmp_received(client):
    return [(packet[20], packet[21]) for packet in client.received if packet[0] >> 4 == 4 and packet[9] == 1]


# -- init


@pytest.mark.spec("PORTAL-40")
def test_a_snapshot_removes_exactly_the_pairs_that_it_omits():
    w = with_two_resources()
    second = w.add_client()
    w.connect(second)
    assert w.traffic_flows(second)
    w.gateway.portal(listed(w, (w.client, OTHER_ID), (second, RESOURCE_ID)))
    assert not w.reaches()
    assert w.reaches(destination=SERVER_2)
    assert not w.answers()
    assert w.answers(source=SERVER_2)
    assert w.traffic_flows(second)


@pytest.mark.spec("PORTAL-40")
def test_a_client_that_the_snapshot_omits_is_closed_with_goodbye():
    w = with_two_resources()
    second = w.add_client()
    w.connect(second)
    start = w.net.now
    w.gateway.portal(listed(w, (second, RESOURCE_ID)))
    assert not w.reaches()
    w.net.run(start + 1.5 - w.net.now)
    assert w.connection is None
    assert w.client.received[-1][6] == 0xFF
    assert w.traffic_flows(second)


def test_an_empty_snapshot_closes_all_and_none_closes_nothing():
    w = with_two_resources()
    w.gateway.portal(w.init())
    w.net.run(2.0)
    assert w.traffic_flows()
    w.gateway.portal(listed(w))
    w.net.run(2.0)
    assert w.connection is None


def test_pairs_that_are_not_known_are_not_created():
    w = world().start()
    w.gateway.portal(listed(w, (w.client, RESOURCE_ID)))
    w.net.run(2.0)
    assert w.gateway.core.tunnel.client_count == 0


@pytest.mark.spec("PORTAL-41")
@pytest.mark.parametrize(("first", "second"), [(5, 60), (60, 5)])
def test_a_snapshot_moves_an_expiry_both_ways(first, second):
    w = world().start()
    start = int(w.net.now)
    w.connect(expires_at=int(UNIX_START) + start + first)
    w.gateway.portal(listed(w, (w.client, RESOURCE_ID, int(UNIX_START) + start + second)))
    w.net.run(start + 30 - w.net.now)
    assert w.reaches() is (second == 60)
    w.net.run(start + 62 - w.net.now)
    assert w.connection is None


@pytest.mark.spec("PORTAL-42")
def test_an_identical_init_changes_nothing():
    w = with_two_resources(gateway="symmetric", client="symmetric")
    init = listed(w, (w.client, RESOURCE_ID), (w.client, OTHER_ID))
    w.gateway.portal(init)
    w.net.run(1.0)
    connection, log, frames = w.connection, len(w.net.log), len(w.gateway.frames)
    allocations = [dict(relay.allocations) for relay in w.relays]
    for _ in range(3):
        w.gateway.portal(init)
    assert len(w.net.log) == log
    assert len(w.gateway.frames) == frames
    assert w.connection is connection
    assert w.traffic_flows()
    assert [relay.allocations for relay in w.relays] == allocations


@pytest.mark.spec("PORTAL-44", "PORTAL-43")
def test_an_init_without_relays_keeps_those_that_live():
    w = with_two_resources()
    w.gateway.portal(messages.Init(interface=w.init().interface))
    w.net.run(5.0)
    assert len(w.gateway.node.relays) == 2
    assert withdrawn(w.gateway) == []
    assert w.traffic_flows()


def test_init_names_the_addresses_that_the_host_configures():
    w = world().start()
    (configured,) = w.gateway.configured
    assert (str(configured.ipv4), str(configured.ipv6)) == ("100.71.4.9", "fd00:2021:1111::a00:17")


# -- create_authorization


@pytest.mark.spec("PORTAL-46")
@pytest.mark.parametrize(
    "resource",
    [
        cidr("10.0.0.0/8"),
        messages.InternetResource(id=messages.Id(RESOURCE_ID)),
        messages.DnsResource(
            id=messages.Id(RESOURCE_ID), address="*.wiki.example.com", name="Wiki", filters=messages.Filters()
        ),
    ],
)
def test_every_kind_of_resource_is_acknowledged_at_once_without_resolving(resource):
    w = world().start()
    w.authorize(resource=resource, ref="a reference of any length")
    (acknowledgement,) = w.gateway.said(messages.AuthorizationCreated)
    assert acknowledgement.ref == "a reference of any length"
    assert w.gateway.resolutions == []


@pytest.mark.spec("PORTAL-50")
def test_a_repeat_takes_over_filters_and_expiry_but_not_the_address():
    w = world().start()
    w.connect()
    assert w.reaches()
    w.authorize(resource=cidr("10.0.0.0/8", messages.TcpFilter()))
    assert not w.reaches()
    w.authorize(resource=cidr("192.168.0.0/16"))
    assert w.reaches()
    assert not w.reaches(destination=SERVER_2)
    w.authorize(expires_at=int(UNIX_START + w.net.now) + 3)
    w.net.run(5.0)
    assert w.connection is None


@pytest.mark.spec("PORTAL-51")
def test_no_expiry_is_for_ever_and_a_past_one_is_over_at_once():
    w = world().start()
    w.connect(expires_at=None)
    w.net.run(4000.0)
    assert w.gateway.core.tunnel.client_count == 1
    second = w.add_client()
    w.authorize(second, expires_at=1_000_000)
    assert len(w.gateway.said(messages.AuthorizationCreated)) == 2
    w.net.run(1.5)
    assert w.gateway.node.connection(second.client_id) is None
    assert w.gateway.core.tunnel.client_count == 1


@pytest.mark.spec("PORTAL-54")
@pytest.mark.parametrize("token", [None, messages.IngestToken(None)])
def test_a_flow_log_token_of_no_use_does_not_prevent_access(token):
    w = world().start()
    w.connect(flow_logs_ingest_token=token)
    assert w.traffic_flows()


def test_other_tunnel_addresses_replace_what_was_granted():
    """E27."""
    w = with_two_resources()
    w.client.ipv4 = bytes((100, 66, 9, 9))
    w.authorize()
    w.net.run(SETTLED)
    assert w.traffic_flows()
    assert not w.reaches(destination=SERVER_2)


def test_the_v1_request_gets_the_v1_answer():
    w = world().start()
    request = w.authorization()
    w.gateway.portal(messages.AuthorizeFlow(**{name: getattr(request, name) for name in request.__struct_fields__}))
    assert [message.ref for message in w.gateway.said(messages.FlowAuthorized)] == [request.ref]
    w.net.run(SETTLED)
    assert w.traffic_flows()


# -- what arrives while an authorization waits for a relay


def waiting(**fields):
    """The authorization came before any relay answered."""
    w = world(latency=0.2).start(settle=0.0)
    w.authorize(**fields)
    assert w.gateway.frames == []
    return w


def test_a_rejection_while_it_waits_ends_the_authorization():
    w = waiting()
    w.authorize(resource=other_network(), ref="second")
    w.reject()
    w.net.run(3.0)
    assert [message.ref for message in w.gateway.said(messages.AuthorizationCreated)] == ["second"]
    assert list(w.gateway.core.tunnel._clients[w.client.client_id]._authorizations) == [OTHER_ID]


def test_a_snapshot_without_it_ends_the_authorization_that_waits():
    w = waiting()
    w.authorize(resource=other_network(), ref="second")
    w.gateway.portal(listed(w, (w.client, OTHER_ID)))
    w.net.run(3.0)
    assert [message.ref for message in w.gateway.said(messages.AuthorizationCreated)] == ["second"]


def test_filters_that_changed_while_it_waited_are_the_ones_in_force():
    w = waiting()
    w.gateway.portal(messages.ResourceUpdated(resource=cidr("10.0.0.0/8", messages.TcpFilter())))
    w.gateway.portal(messages.ResourceUpdated(resource=other_network()))
    w.net.run_until(lambda: w.client.established)
    refused = udp(source=w.client.ipv4, destination=SERVER)
    permitted = tcp(source=w.client.ipv4, destination=SERVER)
    for packet in (refused, permitted):
        w.client.send(packet)
    w.net.run(1.0)
    assert w.gateway.written() == [permitted]


def test_an_expiry_that_moved_while_it_waited_is_the_one_in_force():
    w = waiting(expires_at=FAR)
    w.gateway.portal(
        messages.AccessAuthorizationExpiryUpdated(
            client_id=messages.Id(w.client.client_id),
            resource_id=messages.Id(RESOURCE_ID),
            expires_at=int(UNIX_START + w.net.now) + 2,
        )
    )
    w.net.run(5.0)
    assert len(w.gateway.said(messages.AuthorizationCreated)) == 1
    assert w.gateway.core.tunnel.client_count == 0


# -- reject_access, resource_updated and the rest


@pytest.mark.spec("PORTAL-62")
def test_the_rejection_of_one_of_two_resources_prohibits_only_that():
    w = with_two_resources()
    w.reject()
    assert not w.reaches()
    assert icmp_received(w.client)[-1:] == [ICMP_PROHIBITED]
    assert w.reaches(destination=SERVER_2)
    assert not w.answers()
    assert w.answers(source=SERVER_2)


@pytest.mark.spec("PORTAL-63")
def test_new_filters_hold_for_all_clients_that_have_the_resource_and_no_others():
    w = with_two_resources()
    second = w.add_client()
    w.connect(second)
    for client in w.clients:
        assert w.traffic_flows(client)
    w.gateway.portal(messages.ResourceUpdated(resource=cidr("10.0.0.0/8", messages.TcpFilter())))
    for client in w.clients:
        assert not w.reaches(client)
        assert not w.answers(client)
    assert w.reaches(destination=SERVER_2)
    w.gateway.portal(messages.ResourceUpdated(resource=cidr("10.9.0.0/16")))
    for client in w.clients:
        assert w.traffic_flows(client), "filters are taken over, the address is not"


def test_a_filter_that_cannot_be_read_permits_nothing_and_is_told_as_such():
    w = with_two_resources()
    w.gateway.portal(messages.ResourceUpdated(resource=cidr("10.0.0.0/8", messages.UnknownFilter())))
    assert not w.reaches()
    source, destination = (str(IPv4Address(each)) for each in (w.client.ipv4, SERVER))
    request = {"protocol": "udp", "source": source, "destination": destination, "destination_port": 53}
    steps = trace(w.gateway.core, request, w.net.now)["steps"]
    assert any("one that is not known and permits nothing" in step["detail"] for step in steps), steps


@pytest.mark.spec("PORTAL-64")
def test_relays_presence_removes_keeps_replaces_and_adds():
    w = world(relays=3).start()
    gone, kept, replaced = w.relays
    added = memory_relay(w.net, 3)
    replaced.secret = "another"
    log = len(w.net.log)
    w.relays_presence(kept, replaced, added, gone=[gone])
    sent = [(target, payload[:2]) for _, _, target, payload in w.net.log[log:]]
    refresh, binding = b"\0\4", b"\0\1"
    assert sent == [(gone.v4, refresh), (replaced.v4, refresh), (replaced.v4, binding), (added.v4, binding)]
    w.net.run(5.0)
    assert {status.id for status in w.gateway.node.relays.status()} == {kept.id, replaced.id, added.id}
    assert all("gateway" in relay.users and relay.users["gateway"] in relay.allocations for relay in (kept, added))


@pytest.mark.spec("PORTAL-64")
def test_a_relay_in_both_lists_gets_a_fresh_allocation():
    """E37."""
    w = world(relays=1).start()
    relay = w.relays[0]
    before = relay.users["gateway"], relay.allocations[relay.users["gateway"]]
    w.relays_presence(relay, gone=[relay])
    w.net.run(3.0)
    assert relay.allocations[relay.users["gateway"]] != before[1]


@pytest.mark.spec("PORTAL-66")
def test_an_obsolete_expiry_message_is_obeyed():
    w = world().start()
    w.connect(expires_at=FAR)
    w.gateway.portal(
        messages.AccessAuthorizationExpiryUpdated(
            client_id=messages.Id(w.client.client_id),
            resource_id=messages.Id(RESOURCE_ID),
            expires_at=int(UNIX_START + w.net.now) + 2,
        )
    )
    assert w.traffic_flows()
    w.net.run(4.0)
    assert w.connection is None


def test_empty_candidate_lists_do_nothing_and_are_never_sent():
    w = world().start()
    w.authorize()
    w.candidates()
    w.candidates(added=False)
    w.net.run(1.0)
    assert all(signalled(w.gateway))


# -- names


def test_a_domain_is_resolved_on_request_of_the_client_and_its_packets_translated():
    w = world().start()
    resource = messages.DnsResource(
        id=messages.Id(RESOURCE_ID), address="*.wiki.example.com", name="Wiki", filters=messages.Filters()
    )
    w.connect(resource=resource)
    proxy = bytes((100, 96, 0, 1))
    w.client.send(assigned_ips(RESOURCE_ID, "a.wiki.example.com", ["100.96.0.1"]))
    w.net.run(SETTLED)
    (request,) = w.gateway.resolutions
    assert isinstance(request, Resolve)
    assert request.domain == "a.wiki.example.com"
    w.gateway.core.handle_resolved(request.request, [IPv4Address(SERVER)], w.net.now)
    w.gateway.drain()
    w.client.send(udp(source=w.client.ipv4, destination=proxy))
    w.net.run(SETTLED)
    (packet,) = w.gateway.written()
    assert packet[16:20] == SERVER
    port = packet[20:22]
    w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=int.from_bytes(port)))
    w.net.run(SETTLED)
    assert w.client.received[-1][12:16] == proxy


def assigned_ips(resource_id, domain, addresses):
    return control.encode(
        control.AssignedIps(
            resource=resource_id,
            domain=domain,
            proxy_ips=tuple(ip_address(address).packed for address in addresses),
        )
    )
