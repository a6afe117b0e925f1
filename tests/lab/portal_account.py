"""The account behind the portal: who is online, with which relays, who may reach what (spec portal.md 5.3 and on)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab import derivations
from tests.lab.control import ControlError, call_async
from tests.lab.portal_channel import Kind
from tests.lab.store import SITE, Device, Resource, Store

if TYPE_CHECKING:
    from tests.lab.portal_channel import Channel

_LOG = logging.getLogger("lab.portal")

PRESENCE_DEBOUNCE_S = 1.0
AUTHORIZATION_TIMEOUT_S = 15.0
RELAYS_PER_DEVICE = 2
_FLOW_LOGS = {"api_url": "https://flows.invalid/", "upload_interval_secs": 0, "upload_batch_size": 1000}
_VERSION = re.compile(r"^(?:relay|connlib|headless-client|gui-client|apple-client|android-client|gateway)/(\S+)")


class Ledger:
    """Everything that crossed the portal, in order, with CLOCK_BOOTTIME seconds."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.entries: list[dict[str, Any]] = []
        self._file = Path(path).open("a", buffering=1) if path else None  # noqa: SIM115 (closed with the process)
        self._grown = asyncio.Event()

    def add(self, **fields: Any) -> None:
        """Append one entry."""
        entry = {"n": len(self.entries), "at": time.clock_gettime(time.CLOCK_BOOTTIME), **fields}
        self.entries.append(entry)
        if self._file:
            self._file.write(json.dumps(entry) + "\n")
        self._grown.set()

    async def since(self, first: int, timeout: float) -> list[dict[str, Any]]:
        """Entries from number `first` on; waits up to `timeout` seconds for one."""
        deadline = time.monotonic() + timeout
        while len(self.entries) <= first and (left := deadline - time.monotonic()) > 0:
            self._grown.clear()
            try:
                await asyncio.wait_for(self._grown.wait(), left)
            except TimeoutError:
                break
        return self.entries[first:]


@dataclass(slots=True)
class Relay:
    """A joined relay."""

    id: str
    channel: Channel
    stamp_secret: str
    ipv4: str | None
    ipv6: str | None
    port: int
    registrar: str | None


@dataclass(slots=True)
class Request:
    """An authorization that waits for the gateway's word; `client` is None for one made by a test."""

    client_id: str
    resource_id: str
    gateway_id: str
    client: Channel | None
    answer: dict[str, Any]


class Account:
    """The portal's state apart from its sockets."""

    def __init__(self, *, store: Store, tokens: set[str], ledger: Ledger) -> None:
        self.store = store
        self.tokens = tokens
        self.ledger = ledger
        self.gateways: dict[str, Channel] = {}
        self.clients: dict[str, Channel] = {}
        self.relays: dict[str, Relay] = {}
        self.relay_choice: dict[str, list[str]] = {}
        self.authorization_lifetime_s = 14 * 86400.0
        self.iceless_allowed = False
        self.forbidden: set[str] = set()
        self.muted_events: set[str] = set()
        self.flow_logs: dict[str, Any] = _FLOW_LOGS
        self._requests: dict[str, Request] = {}

    # --- coming and going ---

    def check_parameters(self, kind: Kind, query: dict[str, str], user_agent: str) -> str | None:
        """What is wrong with the upgrade's parameters, or None."""
        if kind is Kind.RELAY:
            return None if "ipv4" in query or "ipv6" in query else "a relay needs ipv4 or ipv6"
        if not _external_id(query):
            return "external_id is missing"
        if not 1 <= len(query.get("name", "").strip()) <= 255:
            return "name must have 1 to 255 characters"
        key = query.get("public_key", "")
        try:
            if len(key) != 44 or len(base64.b64decode(key, validate=True)) != 32:
                return "public_key is not 32 bytes of base64"
        except binascii.Error:
            return "public_key is not base64"
        if kind is Kind.CLIENT and version_of(user_agent) is None:
            return "the User-Agent names no version"
        return None

    def find_device(self, kind: Kind, query: dict[str, str]) -> Device | None:
        """The stored device that these parameters name."""
        external_id = _external_id(query)
        return next((d for d in self.store.devices.values() if d.kind == kind and d.external_id == external_id), None)

    def connect_device(self, kind: Kind, query: dict[str, str]) -> Device:
        """The device of an accepted socket, made if new."""
        return self.store.upsert_device(kind, _external_id(query), query["name"].strip(), query["public_key"])

    async def join(self, channel: Channel, frame: dict[str, Any], *, send_init: bool) -> None:
        """Register the channel by the rules of 5.1 and greet it: the reply first, then `init`."""
        if channel.kind is Kind.RELAY:
            await self._join_relay(channel, frame)
            return
        device = channel.device
        assert device is not None
        table = self.gateways if channel.kind is Kind.GATEWAY else self.clients
        older = table.get(device.id)
        if older is not None and older is not channel:
            loser = channel if channel.kind is Kind.GATEWAY else older
            await self.disconnect(loser, "token_expired")
            if loser is channel:
                return
        table[device.id] = channel
        channel.joined = True
        channel.iceless = False
        await channel.reply(frame)
        if send_init:
            await self.send_init(channel)

    async def send_init(self, channel: Channel) -> None:
        """Push `init` as it is now."""
        device = channel.device
        assert device is not None
        relays = await self._relays_for(channel, self._select_relays(channel))
        interface: dict[str, Any] = {"ipv4": device.ipv4, "ipv6": device.ipv6}
        if channel.kind is Kind.GATEWAY:
            payload = {
                "interface": interface,
                "config": {"ipv4_masquerade_enabled": True, "ipv6_masquerade_enabled": True},
                "account_slug": "lab",
                "flow_logs": self.flow_logs,
                "authorizations": self.store.snapshot(device.id),
                "relays": relays,
            }
        else:
            nothing = {"search_domain": None, "upstream_do53": [], "upstream_doh": [], "upstream_dns": []}
            payload = {
                "interface": interface | nothing,
                "resources": [r.for_client() for r in self.store.resources.values() if r.id not in self.forbidden],
                "relays": relays,
                "authorizations": [],
                "flow_logs": self.flow_logs,
            }
        await channel.push("init", payload)

    def leave(self, channel: Channel, *, announce: bool = True) -> None:
        """The channel ended, with or without its socket; `announce` starts the presence check if it was a relay's."""
        channel.joined = False
        channel.cancel_timers()
        if channel.device is not None:
            for table in (self.gateways, self.clients):
                if table.get(channel.device.id) is channel:
                    del table[channel.device.id]
        if channel.relay_id is not None:
            relay = self.relays.get(channel.relay_id)
            if relay is not None and relay.channel is channel:
                del self.relays[channel.relay_id]
                if announce:
                    self._presence_changed()

    async def disconnect(self, channel: Channel, reason: str) -> None:
        """Push `disconnect` and stop the channel."""
        await channel.push("disconnect", {"reason": reason})
        self.leave(channel)
        await channel.push("phx_close", {})

    async def _join_relay(self, channel: Channel, frame: dict[str, Any]) -> None:
        secret = (frame["payload"] or {}).get("stamp_secret")
        if not isinstance(secret, str):
            await channel.reply(frame, error="stamp_secret is missing")
            return
        relay_id = derivations.relay_id(secret)
        older = self.relays.get(relay_id)
        channel.relay_id = relay_id
        channel.joined = True
        self.relays[relay_id] = Relay(
            id=relay_id,
            channel=channel,
            stamp_secret=secret,
            ipv4=channel.query.get("ipv4"),
            ipv6=channel.query.get("ipv6"),
            port=int(channel.query.get("port", "3478")),
            registrar=frame["payload"].get("registrar"),
        )
        if older is not None and older.channel is not channel:
            await older.channel.push("phx_error", {})
            older.channel.joined = False
        await channel.reply(frame)
        await channel.push("init", {})
        self._presence_changed()

    # --- relays ---

    def _presence_changed(self) -> None:
        loop = asyncio.get_running_loop()
        for channel in [*self.gateways.values(), *self.clients.values()]:
            if channel.presence_timer is not None:
                channel.presence_timer.cancel()
            channel.presence_timer = loop.call_later(
                PRESENCE_DEBOUNCE_S, lambda channel=channel: channel.portal.spawn(self._check_presence(channel))
            )

    async def _check_presence(self, channel: Channel) -> None:
        channel.presence_timer = None
        gone = sorted(channel.remembered_relays - self.relays.keys())
        if not channel.joined or not (
            gone or (len(channel.remembered_relays) < RELAYS_PER_DEVICE and self._eligible_relays(channel))
        ):
            return
        await self.send_relays_presence(channel, gone)

    async def send_relays_presence(self, channel: Channel, disconnected_ids: list[str]) -> None:
        """Push `relays_presence` with a fresh selection."""
        connected = await self._relays_for(channel, self._select_relays(channel))
        await channel.push("relays_presence", {"disconnected_ids": disconnected_ids, "connected": connected})

    def _eligible_relays(self, channel: Channel) -> list[Relay]:
        choice = self.relay_choice.get(channel.device.id if channel.device else "") or self.relay_choice.get(
            channel.kind
        )
        return [relay for relay in self.relays.values() if choice is None or relay.id in choice]

    def _select_relays(self, channel: Channel) -> list[Relay]:
        online = self._eligible_relays(channel)
        chosen = random.sample(online, min(RELAYS_PER_DEVICE, len(online)))
        channel.remembered_relays = {relay.id for relay in chosen}
        return chosen

    async def _relays_for(self, channel: Channel, relays: list[Relay]) -> list[dict[str, Any]]:
        device = channel.device
        assert device is not None
        expiry = derivations.GATEWAY_TURN_EXPIRY if channel.kind is Kind.GATEWAY else self.store.client_token_expiry
        entries = []
        for relay in relays:
            turn = derivations.turn_credentials(device.public_key, relay.stamp_secret, expiry)
            if relay.registrar is not None:
                try:
                    await call_async(relay.registrar, "add_user", username=turn.username, password=turn.password)
                except ControlError as error:
                    _LOG.warning("%s", error)
            for address in (relay.ipv4, f"[{relay.ipv6}]" if relay.ipv6 else None):
                if address is not None:
                    entries.append(
                        {
                            "id": relay.id,
                            "type": "turn",
                            "addr": f"{address}:{relay.port}",
                            "username": turn.username,
                            "password": turn.password,
                            "expires_at": expiry,
                        }
                    )
        return entries

    # --- messages ---

    async def handle_message(self, channel: Channel, frame: dict[str, Any]) -> None:
        """A message on a joined channel, other than join and heartbeat."""
        event, payload = frame["event"], frame["payload"]
        acknowledged = "authorization_created" if channel.v2 else "flow_authorized"
        requested = {"request_authorization"} if channel.v2 else {"create_flow"}
        match channel.kind, event:
            case Kind.GATEWAY | Kind.CLIENT, "set_snownet_capabilities":
                channel.iceless = payload.get("iceless") is True
            case Kind.GATEWAY | Kind.CLIENT, "no_relays":
                await self.send_relays_presence(channel, [])
            case Kind.GATEWAY, _ if event == acknowledged:
                await self._authorization_created(channel, frame)
            case Kind.GATEWAY, "broadcast_ice_candidates":
                await self._forward_to_clients(channel, "ice_candidates", payload)
            case Kind.GATEWAY, "broadcast_invalidated_ice_candidates":
                await self._forward_to_clients(channel, "invalidate_ice_candidates", payload)
            case Kind.CLIENT, _ if event in requested:
                await self._request_authorization(channel, payload)
            case Kind.CLIENT, "new_gateway_ice_candidates" | "broadcast_ice_candidates":
                await self._forward_to_gateways(channel, "ice_candidates", payload)
            case Kind.CLIENT, "invalidate_gateway_ice_candidates" | "broadcast_invalidated_ice_candidates":
                await self._forward_to_gateways(channel, "invalidate_ice_candidates", payload)
            case _:
                await channel.reply(frame, error="unknown_message")

    async def _forward_to_clients(self, gateway: Channel, event: str, payload: dict[str, Any]) -> None:
        assert gateway.device is not None
        for client_id in payload["client_ids"]:
            client = self.clients.get(client_id)
            if client is not None and event not in self.muted_events:
                await client.push(event, {"gateway_id": gateway.device.id, "candidates": payload["candidates"]})

    async def _forward_to_gateways(self, client: Channel, event: str, payload: dict[str, Any]) -> None:
        assert client.device is not None
        for gateway_id in payload.get("gateway_ids") or [payload["gateway_id"]]:
            gateway = self.gateways.get(gateway_id)
            if gateway is not None and event not in self.muted_events:
                await gateway.push(event, {"client_id": client.device.id, "candidates": payload["candidates"]})

    # --- authorizations ---

    async def _request_authorization(self, client: Channel, payload: dict[str, Any]) -> None:
        assert client.device is not None
        resource_id = payload["resource_id"]
        resource = self.store.resources.get(resource_id)
        if resource is None:
            await self._authorization_failed(client, resource_id, "not_found")
            return
        if resource_id in self.forbidden:
            violated = {"violated_properties": ["current_utc_datetime"]}
            await self._authorization_failed(client, resource_id, "forbidden", **violated)
            return
        online = list(self.gateways.values())
        fitting = [
            gateway for gateway in online if compatible(version_of(client.user_agent), version_of(gateway.user_agent))
        ]
        if not fitting:
            await self._authorization_failed(client, resource_id, "version_mismatch" if online else "offline")
            return
        connected = set(payload.get("connected_gateway_ids", []))
        preferred = [gateway for gateway in fitting if gateway.device is not None and gateway.device.id in connected]
        gateway = random.choice(preferred or fitting)
        await self.authorize(gateway, client.device, resource, client=client)

        def gave_up() -> None:
            client.authorization_timers.pop(resource_id, None)
            for request in self._requests.values():
                if (request.client, request.resource_id) == (client, resource_id):
                    request.client = None
            client.portal.spawn(self._authorization_failed(client, resource_id, "offline"))

        older = client.authorization_timers.pop(resource_id, None)
        if older is not None:
            older.cancel()
        loop = asyncio.get_running_loop()
        client.authorization_timers[resource_id] = loop.call_later(AUTHORIZATION_TIMEOUT_S, gave_up)

    async def authorize(
        self,
        gateway: Channel,
        device: Device,
        resource: Resource,
        *,
        client: Channel | None = None,
        expires_at: int | None = None,
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Push `create_authorization` for the pair, overlaid with `changes`; returns its payload."""
        assert gateway.device is not None
        expires_at = expires_at or int(time.time() + self.authorization_lifetime_s)
        ice = derivations.ice_credentials(
            client_id=device.id,
            client_public_key=device.public_key,
            gateway_id=gateway.device.id,
            gateway_public_key=gateway.device.public_key,
        )
        psk = derivations.preshared_key(
            client_psk_base=bytes.fromhex(device.psk_base),
            gateway_psk_base=bytes.fromhex(gateway.device.psk_base),
            client_id=device.id,
            gateway_id=gateway.device.id,
            client_public_key=device.public_key,
            gateway_public_key=gateway.device.public_key,
        )
        iceless = self.iceless_allowed and gateway.iceless and client is not None and client.iceless
        shared = {
            "preshared_key": psk,
            "client_ice_credentials": {"username": ice.client_username, "password": ice.client_password},
            "gateway_ice_credentials": {"username": ice.gateway_username, "password": ice.gateway_password},
            "use_iceless": iceless,
        }
        ref = f"SFMyNTY.{secrets.token_urlsafe(24)}.{secrets.token_urlsafe(32)}"
        payload = {
            "ref": ref,
            "client": {
                "id": device.id,
                "public_key": device.public_key,
                "preshared_key": psk,
                "ipv4": device.ipv4,
                "ipv6": device.ipv6,
                "version": version_of(client.user_agent) if client else "1.5.12",
                "device_os_name": "Linux",
                "device_os_version": None,
                "device_serial": None,
                "device_uuid": None,
                "firebase_installation_id": None,
                "identifier_for_vendor": None,
            },
            "resource": resource.for_gateway(),
            "client_ice_credentials": shared["client_ice_credentials"],
            "gateway_ice_credentials": shared["gateway_ice_credentials"],
            "expires_at": expires_at,
            "use_iceless": iceless,
            "flow_logs_ingest_token": self._flow_log_token("responder", device, gateway.device, resource, expires_at),
            "subject": {
                "actor_id": _ACTOR,
                "actor_name": "Lab",
                "actor_email": None,
                "actor_type": "service_account",
                "ip": str(client.connection.remote_address[0]) if client else None,
            },
        } | (changes or {})
        answer = {
            "resource_id": resource.id,
            "site_id": SITE["id"],
            "gateway_id": gateway.device.id,
            "gateway_public_key": gateway.device.public_key,
            "gateway_ipv4": gateway.device.ipv4,
            "gateway_ipv6": gateway.device.ipv6,
            **shared,
            "flow_logs_ingest_token": self._flow_log_token("initiator", device, gateway.device, resource, expires_at),
        }
        self._requests[payload["ref"]] = Request(device.id, resource.id, gateway.device.id, client, answer)
        self.store.authorizations.setdefault(gateway.device.id, {})[device.id, resource.id] = expires_at
        self.store.save()
        await gateway.push("create_authorization" if gateway.v2 else "authorize_flow", payload)
        return payload

    async def _authorization_created(self, gateway: Channel, frame: dict[str, Any]) -> None:
        request = self._requests.get(frame["payload"].get("ref"))
        if request is None:
            await gateway.reply(frame, error="invalid_ref")
            return
        await gateway.reply(frame)
        if request.client is None or not request.client.joined:
            return
        timer = request.client.authorization_timers.pop(request.resource_id, None)
        if timer is not None:
            timer.cancel()
        await request.client.push("authorization_created" if request.client.v2 else "flow_created", request.answer)

    async def _authorization_failed(self, client: Channel, resource_id: str, reason: str, **more: Any) -> None:
        event = "authorization_creation_failed" if client.v2 else "flow_creation_failed"
        await client.push(event, {"resource_id": resource_id, "reason": reason, **more})

    async def reject_access(self, client_id: str, resource_id: str) -> None:
        """Withdraw a pair from every gateway that has it."""
        for gateway_id, table in self.store.authorizations.items():
            if table.pop((client_id, resource_id), None) is not None and (gateway := self.gateways.get(gateway_id)):
                await gateway.push("reject_access", {"client_id": client_id, "resource_id": resource_id})
        self.store.save()

    def _flow_log_token(self, role: str, client: Device, gateway: Device, resource: Resource, expires_at: int) -> str:
        now = int(time.time())
        return derivations.flow_log_token(
            {
                "account_id": "0f0f0f0f-1111-4222-8333-444444444444",
                "iat": now,
                "exp": expires_at + 30 * 86400,
                "uploads_enabled": self.flow_logs["upload_interval_secs"] > 0,
                "role": role,
                "initiator_device_id": client.id,
                "responder_device_id": gateway.id,
                "policy_authorization_id": "77777777-0000-4000-8000-000000000001",
                "policy_id": "77777777-0000-4000-8000-000000000002",
                "resource_id": resource.id,
                "resource_name": resource.name,
                "resource_address": resource.address,
                "initiator_actor_id": _ACTOR,
                "initiator_actor_name": "Lab",
                "authorized_at": _iso(now),
                "authorization_expires_at": _iso(expires_at),
            }
        )


_ACTOR = "77777777-0000-4000-8000-000000000003"


def version_of(user_agent: str) -> str | None:
    """The version that the portal reads out of a User-Agent (spec portal.md 3.2)."""
    for token in user_agent.split(" "):
        if found := _VERSION.match(token):
            return found[1]
    return None


def compatible(client: str | None, gateway: str | None) -> bool:
    """Whether a gateway may serve a client: one minor version below to one above (spec portal.md 3.1)."""
    if client is None:
        return True
    parsed = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", gateway or "")
    wanted = re.match(r"(\d+)\.(\d+)", client)
    if parsed is None or wanted is None:
        return False
    return parsed[1] == wanted[1] and -1 <= int(parsed[2]) - int(wanted[2]) <= 1


def _external_id(query: dict[str, str]) -> str:
    return query.get("external_id") or query.get("firezone_id", "")


def _iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(seconds))
