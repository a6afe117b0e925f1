"""The development portal keeps the rules that gateways and clients are tested against."""

from __future__ import annotations

import base64
import json
import os
import time
from urllib.request import urlopen

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.lab import derivations
from tests.lab.phoenix import PhoenixSocket
from tests.lab.portal_client import PortalProcess

SECRET = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
CIDR = "99999999-8888-4777-8666-555555555556"


@pytest.fixture(scope="module")
def shared_portal():
    with PortalProcess(resources=[f"cidr=10.20.0.0/16,id={CIDR},name=Lab", "dns=**.httpbin", "internet"]) as portal:
        yield portal


@pytest.fixture
def portal(shared_portal):
    yield shared_portal
    shared_portal.faults()
    for kind in ("gateway", "client", "relay"):
        shared_portal.drop(kind=kind)
    deadline = time.monotonic() + 5
    while shared_portal.state()["sockets"]:
        assert time.monotonic() < deadline


def key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def gateway(portal, external_id="gateway-1", **more):
    query = {"external_id": external_id, "name": "edge", "public_key": more.pop("public_key", None) or key()}
    return PhoenixSocket(portal.url, "gateway", query, **more)


def client(portal, external_id="client-1", **more):
    query = {"external_id": external_id, "name": "laptop", "public_key": more.pop("public_key", None) or key()}
    return PhoenixSocket(portal.url, "client", query, **more)


def relay(portal, secret=SECRET, port="3478"):
    socket = PhoenixSocket(
        portal.url, "relay", {"name": "r", "ipv4": "203.0.113.7", "ipv6": "2001:db8::7", "port": port}
    )
    assert socket.join({"stamp_secret": secret})["status"] == "ok"
    assert socket.expect("init") == {}
    return socket


def drain(socket: PhoenixSocket) -> None:
    while socket.receive(5) is not None:
        pass


def problem_of(error: InvalidStatus) -> tuple[int, str]:
    return error.response.status_code, json.loads(error.response.body)["code"]


def test_a_join_is_answered_with_its_integer_ref_and_init_follows(portal):
    with gateway(portal) as socket:
        assert socket.join() == {"status": "ok", "response": {}}
        init = socket.expect("init")
        assert {"interface", "config", "relays", "account_slug", "flow_logs", "authorizations"} <= init.keys()
        assert socket.reply_to(socket.heartbeat()) == {"status": "ok", "response": {}}
    upgrade = portal.entries(direction="upgrade", kind="gateway")[-1]
    assert upgrade["path"].startswith("/gateway/v2/websocket?external_id=gateway-1")
    assert dict(upgrade["headers"])["X-Authorization"] == "Bearer lab-token"


def test_a_bad_token_gets_401_with_problem_details(portal):
    for token, code in (("wrong", "invalid_token"), (None, "missing_token")):
        with pytest.raises(InvalidStatus) as caught:
            gateway(portal, token=token)
        assert problem_of(caught.value) == (401, code)
        assert caught.value.response.headers["Content-Type"].startswith("application/problem+json")


def test_bad_parameters_get_400(portal):
    with pytest.raises(InvalidStatus) as caught:
        gateway(portal, public_key="short")
    assert problem_of(caught.value) == (400, "invalid_connect_params")
    with pytest.raises(InvalidStatus) as caught:
        client(portal, user_agent="Mozilla/5.0")
    assert problem_of(caught.value) == (400, "invalid_connect_params")


@pytest.mark.spec("PORTAL-72")
def test_a_second_connection_of_a_connected_gateway_gets_409(portal):
    with gateway(portal) as socket:
        socket.join()
        with pytest.raises(InvalidStatus) as caught:
            gateway(portal)
        assert problem_of(caught.value) == (409, "gateway_already_connected")
        with gateway(portal, "another"):
            pass
    portal.wait_for(direction="closed", kind="gateway", since=len(portal.ledger) - 5)
    with gateway(portal) as socket:
        assert socket.join()["status"] == "ok"


def test_a_second_connection_of_a_client_replaces_the_first(portal):
    with client(portal) as older, client(portal) as newer:
        older.join()
        newer.join()
        assert older.expect("disconnect") == {"reason": "token_expired"}
        assert newer.expect("init")


def test_addresses_and_ids_are_kept_over_reconnects_and_keys_are_not(portal):
    with gateway(portal) as socket:
        socket.join()
        first = socket.expect("init")["interface"]
        before = portal.state()["gateways"]
    portal.wait_for(direction="closed", kind="gateway", since=portal.mark() - 5)
    with gateway(portal) as socket:
        socket.join()
        assert socket.expect("init")["interface"] == first
        after = portal.state()["gateways"]
    assert before.keys() == after.keys()
    assert [d["public_key"] for d in before.values()] != [d["public_key"] for d in after.values()]


def test_relays_are_listed_once_per_family_with_derived_credentials(portal):
    public_key = key()
    with relay(portal), gateway(portal, public_key=public_key) as socket:
        socket.join()
        entries = socket.expect("init")["relays"]
    expected = derivations.turn_credentials(public_key, SECRET)
    assert [entry["addr"] for entry in entries] == ["203.0.113.7:3478", "[2001:db8::7]:3478"]
    for entry in entries:
        assert entry["id"] == "2a8abfa8-cb99-4629-8437-854193ca6bca"
        assert (entry["username"], entry["password"]) == expected
        assert entry["expires_at"] == 2145916800


@pytest.mark.slow
@pytest.mark.spec("PORTAL-70")
def test_a_relay_that_is_back_within_a_second_goes_unnoticed_and_one_that_leaves_is_told_once(portal):
    other = relay(portal, secret="another secret", port="3479")
    first = relay(portal)
    with gateway(portal) as socket:
        socket.join()
        assert len(socket.expect("init")["relays"]) == 4
        first.close()
        back = relay(portal)
        time.sleep(1.5)  # the absence of a message has no condition to wait for
        assert socket.receive(0) is None

        since = portal.mark()
        left_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        back.close()
        presence = socket.expect("relays_presence", timeout=3)
        entry = portal.wait_for(since=since, kind="gateway", direction="out", event="relays_presence")
        assert 0.9 < entry["at"] - left_at < 1.6
        assert presence["disconnected_ids"] == ["2a8abfa8-cb99-4629-8437-854193ca6bca"]
        assert [entry["addr"] for entry in presence["connected"]] == ["203.0.113.7:3479", "[2001:db8::7]:3479"]
        assert socket.receive(1.5) is None
    other.close()


def test_no_relays_is_answered_at_once_with_what_there_is(portal):
    with gateway(portal) as socket:
        socket.join()
        socket.expect("init")
        socket.send("no_relays", {})
        assert socket.expect("relays_presence") == {"disconnected_ids": [], "connected": []}


def test_an_authorization_introduces_both_sides_with_the_same_secrets(portal):
    gateway_key, client_key = key(), key()
    with gateway(portal, public_key=gateway_key) as server, client(portal, public_key=client_key) as asker:
        server.join()
        asker.join()
        gateway_id = next(iter(portal.state()["gateways"]))
        client_id = next(iter(portal.state()["clients"]))
        resources = asker.expect("init")["resources"]
        assert {resource["type"] for resource in resources} == {"cidr", "dns", "internet"}
        asker.send("request_authorization", {"resource_id": CIDR, "connected_gateway_ids": []})
        asked = server.expect("create_authorization")
        ice = derivations.ice_credentials(
            client_id=client_id,
            client_public_key=client_key,
            gateway_id=gateway_id,
            gateway_public_key=gateway_key,
        )
        assert asked["client"]["id"] == client_id
        assert asked["client"]["public_key"] == client_key
        assert asked["client_ice_credentials"] == {"username": ice.client_username, "password": ice.client_password}
        assert asked["gateway_ice_credentials"] == {"username": ice.gateway_username, "password": ice.gateway_password}
        assert asked["resource"] == {
            "type": "cidr",
            "id": CIDR,
            "name": "Lab",
            "address": "10.20.0.0/16",
            "filters": [],
        }
        assert asked["use_iceless"] is False
        assert server.reply_to(server.send("authorization_created", {"ref": asked["ref"]}))["status"] == "ok"
        told = asker.expect("authorization_created")
        assert told["preshared_key"] == asked["client"]["preshared_key"]
        assert told["gateway_public_key"] == gateway_key
        assert told["gateway_id"] == gateway_id

        server.send("broadcast_ice_candidates", {"client_ids": [client_id], "candidates": ["candidate:a"]})
        assert asker.expect("ice_candidates") == {"gateway_id": gateway_id, "candidates": ["candidate:a"]}
        asker.send("new_gateway_ice_candidates", {"gateway_id": gateway_id, "candidates": ["candidate:b"]})
        assert server.expect("ice_candidates") == {"client_id": client_id, "candidates": ["candidate:b"]}

        portal.reject_access(client=client_id, resource=CIDR)
        assert server.expect("reject_access") == {"client_id": client_id, "resource_id": CIDR}


@pytest.mark.slow
@pytest.mark.spec("PORTAL-71")
def test_an_authorization_fails_at_once_without_a_gateway_and_after_15_s_with_a_silent_one(portal):
    with client(portal) as asker:
        asker.join()
        began = time.monotonic()
        asker.send("request_authorization", {"resource_id": CIDR, "connected_gateway_ids": []})
        assert asker.expect("authorization_creation_failed") == {"resource_id": CIDR, "reason": "offline"}
        assert time.monotonic() - began < 1

        with gateway(portal) as server:
            server.join()
            began = time.monotonic()
            asker.send("request_authorization", {"resource_id": CIDR, "connected_gateway_ids": []})
            asked = server.expect("create_authorization")
            assert asker.expect("authorization_creation_failed", timeout=20)["reason"] == "offline"
            assert 14.5 < time.monotonic() - began < 16
            assert server.reply_to(server.send("authorization_created", {"ref": asked["ref"]}))["status"] == "ok"
            asker.heartbeat()
            asker.expect("phx_reply")
            assert not [frame for frame in asker.backlog if frame["event"] == "authorization_created"]


def test_a_gateway_out_of_the_clients_version_window_is_not_chosen(portal):
    with gateway(portal, user_agent="Debian/12.0.0 gateway/1.3.9") as server, client(portal) as asker:
        server.join()
        asker.join()
        asker.send("request_authorization", {"resource_id": CIDR, "connected_gateway_ids": []})
        assert asker.expect("authorization_creation_failed")["reason"] == "version_mismatch"


def test_the_v1_path_has_the_old_names(portal):
    with (
        gateway(portal, path="/gateway/websocket") as server,
        client(portal, path="/client/websocket") as asker,
    ):
        server.join()
        asker.join()
        asker.send("create_flow", {"resource_id": CIDR, "connected_gateway_ids": []})
        asked = server.expect("authorize_flow")
        wrong = server.reply_to(server.send("authorization_created", {"ref": asked["ref"]}))
        assert wrong == {"status": "error", "response": {"reason": "unknown_message"}}
        server.send("flow_authorized", {"ref": asked["ref"]})
        assert asker.expect("flow_created")["resource_id"] == CIDR


def test_a_message_before_the_join_or_on_a_wrong_topic_is_unmatched(portal):
    with gateway(portal) as socket:
        unmatched = {"status": "error", "response": {"reason": "unmatched topic"}}
        assert socket.reply_to(socket.send("no_relays", {})) == unmatched
        assert socket.reply_to(socket.send("phx_join", None, topic="client")) == unmatched
        socket.join()
        socket.expect("init")
        portal.crash_channel(kind="gateway")
        assert socket.reply_to(socket.send("no_relays", {})) == unmatched
        assert socket.join()["status"] == "ok"
        assert socket.expect("init")


def test_a_frame_without_payload_drops_the_socket(portal):
    with gateway(portal) as socket:
        socket.join()
        socket.expect("init")
        socket.send_raw(json.dumps({"topic": "gateway", "event": "no_relays", "ref": 5}))
        with pytest.raises(ConnectionClosed):
            socket.receive(5)


def test_upgrades_are_refused_as_ordered_and_only_so_often(portal):
    portal.refuse(status=503, kind="gateway", body="busy", headers={"Retry-After": "3"}, count=1)
    with pytest.raises(InvalidStatus) as caught:
        gateway(portal)
    assert caught.value.response.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "3"
    with gateway(portal):
        pass


def test_joins_and_heartbeats_are_withheld_as_ordered(portal):
    portal.faults(withhold_heartbeats=["gateway"], join_errors={"client": "disabled"})
    with gateway(portal) as socket, client(portal) as other:
        socket.join()
        socket.expect("init")
        socket.heartbeat()
        assert other.join() == {"status": "error", "response": {"reason": "disabled"}}
        assert socket.receive(0.1) is None


def test_connections_end_the_way_they_are_told_to(portal):
    with gateway(portal) as socket:
        socket.join()
        portal.close_sockets(kind="gateway", code=1012, reason="restart")
        with pytest.raises(ConnectionClosed) as caught:
            drain(socket)
        assert caught.value.rcvd.code == 1012
    with gateway(portal) as socket:
        socket.join()
        portal.drop(kind="gateway")
        with pytest.raises(ConnectionClosed) as caught:
            drain(socket)
        assert caught.value.rcvd is None


def test_a_portal_that_went_away_comes_back_on_the_same_port_with_the_same_devices(portal):
    with gateway(portal) as socket:
        socket.join()
        first = socket.expect("init")["interface"]
        portal.stop()
        with pytest.raises(ConnectionClosed):
            socket.receive(5)
    with pytest.raises(OSError):
        gateway(portal)
    portal.start()
    with gateway(portal) as socket:
        socket.join()
        assert socket.expect("init")["interface"] == first


def test_a_virtual_client_can_be_authorized_with_any_payload(portal):
    client_id, client_key = "11111111-2222-4333-8444-555555555555", "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="
    with gateway(portal) as server:
        server.join()
        portal.authorize(resource=CIDR, client_id=client_id, client_key=client_key, changes={"use_iceless": "maybe"})
        asked = server.expect("create_authorization")
        assert asked["client"]["id"] == client_id
        assert asked["use_iceless"] == "maybe"
        since = portal.mark()
        server.send("authorization_created", {"ref": asked["ref"]})
        assert portal.message("authorization_created", since=since)["ref"] == asked["ref"]
        portal.send_init()
        server.expect("init")
        pairs = server.expect("init")["authorizations"]
        assert (client_id, CIDR) in [(pair["client_id"], pair["resource_id"]) for pair in pairs]


def test_wss_is_served_under_the_labs_own_authority():
    with PortalProcess(tls_names=["127.0.0.1", "portal.test"]) as portal:
        assert portal.url.startswith("wss://")
        query = {"external_id": "g", "name": "edge", "public_key": key()}
        with PhoenixSocket(portal.url, "gateway", query, ca_file=portal.ca_file) as socket:
            assert socket.join()["status"] == "ok"
        with pytest.raises(Exception, match="certificate"):
            PhoenixSocket(portal.url, "gateway", query)
        with pytest.raises(Exception, match=r"certificate|CERTIFICATE"):
            urlopen(portal.url.replace("wss", "https"), timeout=5)
