"""Portal messages are read strictly, and fail closed (spec portal 2)."""

from __future__ import annotations

import json

import msgspec
import pytest

from fzg.portal.messages import (
    AccessAuthorizationExpiryUpdated,
    Authorization,
    AuthorizationCreated,
    AuthorizeFlow,
    BroadcastIceCandidates,
    BroadcastInvalidatedIceCandidates,
    CidrResource,
    CreateAuthorization,
    DnsResource,
    FlowAuthorized,
    FlowLogs,
    IcmpFilter,
    InternetResource,
    InvalidateIceCandidates,
    NoRelays,
    RejectAccess,
    SetSnownetCapabilities,
    TcpFilter,
    UdpFilter,
    UnknownEvent,
    UnknownFilter,
    decode,
)
from fzg.secret import Secret
from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint

CLIENT = "11111111-2222-4333-8444-555555555555"
RESOURCE = "99999999-8888-4777-8666-555555555555"
RELAY = "2a8abfa8-cb99-4629-8437-854193ca6bca"
OTHER_RELAY = "5b1d0c66-3a6e-4a0e-8c55-0e9f0d9a7c31"
PSK = "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU="
PUBLIC_KEY = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="
INTERFACE = {"ipv4": "100.71.4.9", "ipv6": "fd00:2021:1111::a:17"}
PASSWORD = "4xl1v/gk+pPzA+09EeABUVJ5Ot3ayty2AsktF2zqpXo"


def turn(ident=RELAY, addr="203.0.113.7:3478", **changes):
    return {
        "id": ident, "type": "turn", "addr": addr, "username": "2145916800:salt", "password": PASSWORD,
        "expires_at": 2145916800,
    } | changes  # fmt: skip


def cidr(**changes):
    return {"type": "cidr", "id": RESOURCE, "name": "Lab", "address": "10.9.0.0/16", "filters": []} | changes


def ice(username):
    return {"username": username, "password": "latqe7iwpjyrccojsy4ywy"}


def authorization(**changes):
    return {
        "ref": "SFMyNTY.ZXhhbXBsZQ.c2lnbmF0dXJl",
        "client": {
            "id": CLIENT, "public_key": PUBLIC_KEY, "preshared_key": PSK,
            "ipv4": "100.66.1.2", "ipv6": "fd00:2021:1111::1:2",
            "version": "1.5.11", "device_os_name": "Ubuntu", "device_serial": None,
        },
        "resource": {
            "type": "dns", "id": RESOURCE, "name": "Wiki", "address": "*.wiki.example.com",
            "filters": [{"protocol": "tcp", "port_range_start": 443, "port_range_end": 443}, {"protocol": "icmp"}],
        },
        "client_ice_credentials": {"username": "725z", "password": "latqe7iwpjyrccojsy4ywy"},
        "gateway_ice_credentials": {"username": "zzcf", "password": "up7vgqqtsogpiahklbaira"},
        "expires_at": 1790028800,
        "use_iceless": False,
        "flow_logs_ingest_token": "a.b.c",
        "subject": {"actor_id": "77777777-0000-4000-8000-000000000003", "ip_lat": 51.0},
    } | changes  # fmt: skip


def without(payload, key):
    return {name: value for name, value in payload.items() if name != key}


def read(event, payload):
    return decode(event, json.dumps(payload))


# init


def test_init_is_read_whole():
    message = read("init", {
        "interface": INTERFACE,
        "config": {"ipv4_masquerade_enabled": True, "ipv6_masquerade_enabled": True},
        "account_slug": "example_co",
        "flow_logs": {"api_url": "https://flows.example.com/", "upload_interval_secs": 60, "upload_batch_size": 1000},
        "authorizations": [{"client_id": CLIENT, "resource_id": RESOURCE, "expires_at": 1790028800}],
        "relays": [turn(), turn(addr="[2001:db8::7]:3478")],
    })  # fmt: skip
    assert message.interface.ipv4 == bytes([100, 71, 4, 9])
    assert message.interface.ipv6 == bytes.fromhex("fd002021111100000000000000" + "0a0017")
    assert message.account_slug == "example_co"
    assert message.authorizations == (Authorization(client_id=CLIENT, resource_id=RESOURCE, expires_at=1790028800),)
    assert message.flow_logs == FlowLogs(
        api_url="https://flows.example.com/", upload_interval_secs=60, upload_batch_size=1000
    )
    (relay,) = message.relays
    assert relay.id == RELAY
    assert relay.ipv4 == Endpoint.parse("203.0.113.7:3478")
    assert relay.ipv6 == Endpoint.parse("[2001:db8::7]:3478")
    assert (relay.username, relay.password.reveal()) == ("2145916800:salt", PASSWORD)


@pytest.mark.spec("PORTAL-43")
def test_init_needs_nothing_but_the_interface():
    message = read("init", {"interface": INTERFACE})
    assert (message.relays, message.authorizations, message.account_slug, message.flow_logs) == ((), None, None, None)


def test_init_tells_an_empty_snapshot_from_none():
    assert read("init", {"interface": INTERFACE, "authorizations": []}).authorizations == ()
    assert read("init", {"interface": INTERFACE, "authorizations": None}).authorizations is None


@pytest.mark.parametrize("changes", [
    {"interface": {"ipv4": "100.71.4.9"}},
    {"interface": {"ipv4": "100.71.4.9/32", "ipv6": "fd00::1"}},
    {"interface": {"ipv4": "fd00::1", "ipv6": "fd00::1"}},
    {"interface": {"ipv4": "100.71.4.9", "ipv6": "fe80::1%eth0"}},
    {"relays": None},
    {"relays": [turn(type="other")]},
    {"relays": [turn(addr="203.0.113.7")]},
    {"relays": [turn(addr="2001:db8::7:3478")]},
    {"relays": [without(turn(), "password")]},
    {"relays": [turn(expires_at=None)]},
    {"authorizations": [{"client_id": CLIENT, "resource_id": RESOURCE}]},
    {"authorizations": [{"client_id": "x", "resource_id": RESOURCE, "expires_at": 1}]},
    {"account_slug": 7},
])  # fmt: skip
def test_a_bad_field_invalidates_init(changes):
    with pytest.raises(Malformed, match=r"^init: "):
        read("init", {"interface": INTERFACE} | changes)


def test_relays_are_merged_by_id_wherever_the_entries_stand(caplog):
    message = read("relays_presence", {"disconnected_ids": [], "connected": [
        turn(RELAY, "203.0.113.7:3478"), turn(OTHER_RELAY, "203.0.113.8:3478"), turn(RELAY, "[2001:db8::7]:3478"),
        turn(OTHER_RELAY, "203.0.113.9:3478"), {"type": "stun", "id": CLIENT, "addr": "203.0.113.1:3478"},
    ]})  # fmt: skip
    assert [(relay.id, str(relay.ipv4), relay.ipv6 and str(relay.ipv6)) for relay in message.connected] == [
        (RELAY, "203.0.113.7:3478", "[2001:db8::7]:3478"),
        (OTHER_RELAY, "203.0.113.8:3478", None),
    ]
    assert "two addresses of one family" in caplog.text


@pytest.mark.parametrize("missing", ["disconnected_ids", "connected"])
def test_relays_presence_needs_both_lists(missing):
    with pytest.raises(Malformed):
        read("relays_presence", without({"disconnected_ids": [RELAY], "connected": [turn()]}, missing))


# create_authorization


def test_an_authorization_is_read_whole():
    message = read("create_authorization", authorization())
    assert message.client.id == CLIENT
    assert message.client.public_key == bytes(range(32, 64))
    assert message.client.preshared_key.reveal()[:4] == bytes.fromhex("76d40bc2")
    assert len(message.client.preshared_key.reveal()) == 32
    assert message.client.ipv4 == bytes([100, 66, 1, 2])
    assert message.gateway_ice_credentials.username == "zzcf"
    assert message.client_ice_credentials.password == Secret("latqe7iwpjyrccojsy4ywy")
    assert message.expires_at == 1790028800
    assert message.resource == DnsResource(
        id=RESOURCE, address="*.wiki.example.com", name="Wiki", filters=(TcpFilter(443, 443), IcmpFilter())
    )
    assert message.acknowledgement() == AuthorizationCreated(ref="SFMyNTY.ZXhhbXBsZQ.c2lnbmF0dXJl")


def test_the_v1_name_is_answered_with_the_v1_name():
    message = read("authorize_flow", authorization(flow_id=CLIENT, actor={"id": CLIENT}))
    assert isinstance(message, AuthorizeFlow)
    assert isinstance(message, CreateAuthorization)
    assert message.acknowledgement() == FlowAuthorized(ref="SFMyNTY.ZXhhbXBsZQ.c2lnbmF0dXJl")


def test_no_secret_shows_when_a_message_is_printed():
    text = repr(read("create_authorization", authorization(flow_logs_ingest_token="jwt.of.flow")))
    for secret in (PSK, "latqe7", "up7vgqq", "jwt.of.flow", "v\\xd4\\x0b"):
        assert secret not in text
    assert PASSWORD not in repr(read("init", {"interface": INTERFACE, "relays": [turn()]}))


def test_an_authorization_without_expiry_never_expires():
    assert read("create_authorization", authorization(expires_at=None)).expires_at is None
    assert read("create_authorization", without(authorization(), "expires_at")).expires_at is None


@pytest.mark.spec("PORTAL-53")
def test_a_missing_use_iceless_means_false():
    assert read("create_authorization", without(authorization(), "use_iceless")).use_iceless is False
    assert msgspec.json.encode(SetSnownetCapabilities(iceless=False)) == b'{"iceless":false}'


@pytest.mark.spec("PORTAL-54")
@pytest.mark.parametrize("token", [None, 7, ["x"], {"a": 1}, "not a jwt"])
def test_a_bad_flow_log_token_does_not_prevent_access(token):
    message = read("create_authorization", authorization(flow_logs_ingest_token=token))
    secret = message.flow_logs_ingest_token and message.flow_logs_ingest_token.secret
    assert secret == (Secret(token) if isinstance(token, str) else None)
    assert read("create_authorization", without(authorization(), "flow_logs_ingest_token")).client.id == CLIENT


def key(**changes):
    return {"client": authorization()["client"] | changes}


@pytest.mark.spec("PORTAL-52")
@pytest.mark.parametrize("changes", [
    key(public_key=PUBLIC_KEY[:-1]),
    key(public_key=PUBLIC_KEY[:40]),
    key(public_key=PUBLIC_KEY + "AAAA"),
    key(public_key=PUBLIC_KEY[:-2] + "9="),  # the same 32 bytes, with stray bits in the last digit
    key(public_key=" " + PUBLIC_KEY),
    key(preshared_key="dtQLwvW7CXikc-A1EmIJEaJAmluyzJ33YKcWJQKkxXU="),
    key(preshared_key=None),
    {"resource": cidr(type="static_device_pool")},
    {"resource": without(cidr(), "type")},
    {"resource": cidr(filters=[{"protocol": "sctp"}])},
    {"resource": cidr(filters=[{"protocol": "tcp", "port_range_end": 65536}])},
    {"resource": cidr(filters=[{"protocol": "udp", "port_range_start": -1}])},
    {"resource": cidr(filters=[{}])},
    {"resource": cidr(filters=None)},
    {"resource": without(cidr(), "filters")},
])  # fmt: skip
def test_a_bad_key_resource_or_filter_invalidates_an_authorization(changes):
    with pytest.raises(Malformed):
        read("create_authorization", authorization(**changes))


@pytest.mark.parametrize("changes", [
    {"ref": 7}, {"ref": None}, {"client": None}, {"use_iceless": "no"},
    {"expires_at": 1790028800.5}, {"expires_at": 1790028800.0}, {"expires_at": "1790028800"}, {"expires_at": -1},
    {"client_ice_credentials": {"username": "x"}}, {"gateway_ice_credentials": {"username": "x", "password": 1}},
    {"client_ice_credentials": ice("u" * 257)}, {"gateway_ice_credentials": ice("u" * 100_000)},
    {"client_ice_credentials": ice("")}, {"gateway_ice_credentials": ice("ü" * 129)},
    {"resource": cidr(address="fe80::%lo/64")},
    {"resource": cidr(address="10.9.0.1/16")}, {"resource": cidr(address="10.9.0.0")},
    {"resource": cidr(address="10.9.0.0/255.255.0.0")}, {"resource": cidr(address="10.9.0.0/33")},
    {"resource": cidr(id="99999999")},
])  # fmt: skip
def test_a_field_of_the_wrong_type_invalidates_an_authorization(changes):
    with pytest.raises(Malformed):
        read("create_authorization", authorization(**changes))


@pytest.mark.parametrize("missing", ["ref", "client", "resource", "gateway_ice_credentials", "client_ice_credentials"])
def test_a_missing_field_invalidates_an_authorization(missing):
    with pytest.raises(Malformed, match=missing):
        read("create_authorization", without(authorization(), missing))


@pytest.mark.parametrize("text", [
    RESOURCE.upper(), RESOURCE.replace("-", ""), "{" + RESOURCE + "}", "urn:uuid:" + RESOURCE,
])  # fmt: skip
def test_every_textual_form_of_an_id_reads_as_the_canonical_one(text):
    assert read("reject_access", {"client_id": text, "resource_id": text}) == RejectAccess(
        client_id=RESOURCE, resource_id=RESOURCE
    )


def test_resources_of_each_type_are_read():
    resource = read("create_authorization", authorization(resource=cidr(address="2001:db8::/32", ip_stack="dual")))
    assert isinstance(resource.resource, CidrResource)
    assert str(resource.resource.address.network) == "2001:db8::/32"
    internet = {"type": "internet", "id": RESOURCE, "name": 7, "filters": "whatever"}
    assert read("resource_updated", internet).resource == InternetResource(id=RESOURCE)


def test_ports_of_a_filter_default_to_all():
    filters = [{"protocol": "tcp"}, {"protocol": "udp", "port_range_start": 53}]
    assert read("resource_updated", cidr(filters=filters)).resource.filters == (
        TcpFilter(0, 65535),
        UdpFilter(53, 65535),
    )


@pytest.mark.parametrize("entry", [
    {"protocol": "sctp"}, {}, 7, None, {"protocol": "tcp", "port_range_start": 70000},
    {"protocol": "udp", "port_range_end": "53"},
])  # fmt: skip
def test_a_bad_filter_of_an_update_permits_nothing_and_keeps_the_list_from_being_empty(entry):
    (only,) = read("resource_updated", cidr(filters=[entry])).resource.filters
    assert only == UnknownFilter()
    kept = read("resource_updated", cidr(filters=[entry, {"protocol": "icmp"}])).resource.filters
    assert kept[1] == IcmpFilter()


# candidates


@pytest.mark.spec("PORTAL-57")
@pytest.mark.parametrize("event", ["ice_candidates", "invalidate_ice_candidates"])
def test_bad_candidates_are_left_out_one_by_one(event):
    good = ["candidate:1 1 udp 5 192.0.2.1 9 typ host", "candidate:2 1 udp 4294967295 192.0.2.2 9 typ host"]
    bad = ["foo", 7, None, "candidate:1 1 udp x 192.0.2.1 9 typ host", "candidate:1 1 udp 4294967296 192.0.2.1 9",
           "candidate:1 1 udp -5 192.0.2.1 9 typ host", "", " candidate", ["candidate:1 1 udp 5"]]  # fmt: skip
    message = read(event, {"client_id": CLIENT, "candidates": [*bad[:4], good[0], *bad[4:], good[1]]})
    assert message.candidates == tuple(good)
    assert isinstance(message, InvalidateIceCandidates) == event.startswith("invalidate")


@pytest.mark.parametrize(
    "payload", [{"client_id": CLIENT}, {"candidates": []}, {"client_id": CLIENT, "candidates": "x"}]
)
def test_candidates_need_a_client_and_a_list(payload):
    with pytest.raises(Malformed):
        read("ice_candidates", payload)


@pytest.mark.parametrize("kind", [BroadcastIceCandidates, BroadcastInvalidatedIceCandidates])
def test_a_batch_names_one_client_and_keeps_its_order(kind):
    candidates = (
        "candidate:4d5e 1 udp 2130706175 10.0.0.4 52625 typ host",
        "candidate:e1f7 1 udp 37748479 203.0.113.7 49210 typ relay",
    )
    batch = kind(client_ids=(CLIENT,), candidates=candidates)
    assert json.loads(msgspec.json.encode(batch)) == {"client_ids": [CLIENT], "candidates": list(candidates)}


# the rest


@pytest.mark.spec("PORTAL-66")
def test_the_obsolete_expiry_message_is_read():
    payload = {"client_id": CLIENT, "resource_id": RESOURCE, "expires_at": 5}
    assert read("access_authorization_expiry_updated", payload) == AccessAuthorizationExpiryUpdated(
        client_id=CLIENT, resource_id=RESOURCE, expires_at=5
    )


@pytest.mark.parametrize("event", ["request_connection", "allow_access", "phx_reply", "metrics", ""])
def test_an_unknown_event_is_told_apart_from_a_malformed_one(event):
    with pytest.raises(UnknownEvent):
        decode(event, "{}")


@pytest.mark.parametrize("payload", ["", "[]", "null", "{", '"x"', '{"client_id":' + "[" * 5000, '{"a":"\\ud800"}'])
def test_any_payload_that_is_no_such_message_is_malformed(payload):
    with pytest.raises(Malformed):
        decode("reject_access", payload)


def test_outbound_payloads_have_the_names_and_fields_of_the_specification():
    names = {
        SetSnownetCapabilities: "set_snownet_capabilities", AuthorizationCreated: "authorization_created",
        FlowAuthorized: "flow_authorized", NoRelays: "no_relays", BroadcastIceCandidates: "broadcast_ice_candidates",
        BroadcastInvalidatedIceCandidates: "broadcast_invalidated_ice_candidates",
    }  # fmt: skip
    assert {kind: kind.EVENT for kind in names} == names
    assert msgspec.json.encode(NoRelays()) == b"{}"
    assert msgspec.json.encode(AuthorizationCreated(ref="x")) == b'{"ref":"x"}'
