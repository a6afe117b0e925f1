"""What tests can tell the portal to do (spec portal.md 5.8 item 8); each `op_` method is an order of `control`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tests.lab.portal_channel import Channel, Kind
from tests.lab.store import Resource

if TYPE_CHECKING:
    from tests.lab.portal import Portal


class Orders:
    """Mixed into `Portal`. A `device` is a device or relay id; without it every channel of `kind` is meant."""

    # --- looking ---

    async def op_state(self: Portal) -> dict[str, Any]:
        """Who is online, and the ports listened on."""
        return {
            "ports": self.ports,
            "gateways": {key: _describe(channel) for key, channel in self.account.gateways.items()},
            "clients": {key: _describe(channel) for key, channel in self.account.clients.items()},
            "relays": {r.id: {"ipv4": r.ipv4, "ipv6": r.ipv6, "port": r.port} for r in self.account.relays.values()},
            "sockets": [channel.number for channel in self.channels],
            "resources": {r.id: asdict(r) for r in self.account.store.resources.values()},
        }

    async def op_ledger(self: Portal, since: int = 0, timeout: float = 0) -> list[dict[str, Any]]:
        """Ledger entries from number `since` on; waits up to `timeout` seconds for the first."""
        return await self.account.ledger.since(since, timeout)

    async def op_device(self: Portal, device: str) -> dict[str, Any]:
        """All that is stored of a device, secrets included."""
        return asdict(self.account.store.devices[device])

    # --- breaking the transport ---

    async def op_refuse(
        self: Portal,
        status: int,
        kind: str | None = None,
        body: str = "",
        headers: dict[str, str] | None = None,
        count: int | None = None,
    ) -> None:
        """Answer upgrades with `status`; the next `count` ones, or until `faults` clears it."""
        from tests.lab.portal import Refusal

        self.faults.refusals.append(Refusal(status, kind, body, headers or {}, count))

    async def op_faults(self: Portal, **changes: Any) -> None:
        """Set fields of `portal.Faults`; with none given, clear them all."""
        from tests.lab.portal import Faults

        if not changes:
            self.faults = Faults()
        for name, value in changes.items():
            current = getattr(self.faults, name)
            setattr(self.faults, name, set(value) if isinstance(current, set) else value)

    async def op_drop(self: Portal, kind: str, device: str | None = None) -> int:
        """Reset the TCP connections without a close frame; returns how many."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            channel.abort()
        return len(channels)

    async def op_close_sockets(
        self: Portal, kind: str, device: str | None = None, code: int = 1000, reason: str = ""
    ) -> int:
        """Close with a close frame; returns how many."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            await channel.close(code, reason)
        return len(channels)

    async def op_stop(self: Portal, code: int | None = 1012) -> None:
        """Go away: stop listening and end every socket; `code` None resets them."""
        await self.stop(code=code)

    async def op_start(self: Portal) -> None:
        """Come back on the same ports with the same store."""
        await self.restart()

    async def op_crash_channel(self: Portal, kind: str, device: str | None = None, *, announce: bool = False) -> int:
        """End the channel while the socket lives: the next message earns `unmatched topic`."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            self.account.leave(channel)
            if announce:
                await channel.push("phx_error", {})
        return len(channels)

    async def op_phx_close(self: Portal, kind: str, device: str | None = None) -> int:
        """End the channel on purpose, as when a device row is deleted."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            self.account.leave(channel)
            await channel.push("phx_close", {})
        return len(channels)

    async def op_disconnect(self: Portal, kind: str, device: str | None = None, reason: str = "token_expired") -> int:
        """Push `disconnect`, then end the channel."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            await self.account.disconnect(channel, reason)
        return len(channels)

    async def op_revoke_token(self: Portal, token: str) -> None:
        """Forget a token; whoever connects with it next gets 401."""
        self.account.tokens.discard(token)

    # --- saying things ---

    async def op_push(self: Portal, kind: str, event: str, payload: Any = None, device: str | None = None) -> int:
        """Push any event; returns to how many."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            await channel.push(event, payload)
        return len(channels)

    async def op_send_raw(
        self: Portal, kind: str, text: str, device: str | None = None, *, binary: bool = False
    ) -> int:
        """Send a frame as it stands, text or (as hex) binary."""
        channels = self._channels_of(kind, device)
        for channel in channels:
            await channel.send(bytes.fromhex(text) if binary else text)
        return len(channels)

    async def op_ping(self: Portal, kind: str, device: str | None = None, timeout: float = 5.0) -> int:
        """Send WebSocket pings and wait for the pongs; returns how many came."""
        import asyncio

        pongs = 0
        for channel in self._channels_of(kind, device):
            async with asyncio.timeout(timeout):
                await (await channel.connection.ping())
                pongs += 1
        return pongs

    async def op_send_init(self: Portal, kind: str = "gateway", device: str | None = None) -> None:
        """Push a fresh `init`."""
        for channel in self._channels_of(kind, device):
            await self.account.send_init(channel)

    async def op_relays_presence(
        self: Portal, kind: str, disconnected_ids: list[str], device: str | None = None
    ) -> None:
        """Push `relays_presence` now."""
        for channel in self._channels_of(kind, device):
            await self.account.send_relays_presence(channel, disconnected_ids)

    # --- policy ---

    async def op_add_resource(self: Portal, resource: str | dict[str, Any]) -> str:
        """Add or replace a resource; clients learn of it. Returns its id."""
        parsed = Resource.parse(resource if isinstance(resource, str) else json.dumps(resource))
        self.account.store.resources[parsed.id] = parsed
        self.account.store.save()
        for client in self.account.clients.values():
            await client.push("resource_created_or_updated", parsed.for_client())
        return parsed.id

    async def op_set_filters(self: Portal, resource: str, filters: list[dict[str, Any]]) -> None:
        """Change a resource's filters: gateways and clients learn of it."""
        changed = self.account.store.resources[resource]
        changed.filters = filters
        self.account.store.save()
        for gateway in self.account.gateways.values():
            await gateway.push("resource_updated", changed.for_gateway())
        for client in self.account.clients.values():
            await client.push("resource_created_or_updated", changed.for_client())

    async def op_delete_resource(self: Portal, resource: str) -> None:
        """Delete a resource: clients learn of it, gateways get `reject_access` for each pair."""
        del self.account.store.resources[resource]
        for client in self.account.clients.values():
            await client.push("resource_deleted", resource)
        for table in list(self.account.store.authorizations.values()):
            for client_id, resource_id in list(table):
                if resource_id == resource:
                    await self.account.reject_access(client_id, resource_id)

    async def op_reject_access(self: Portal, client: str, resource: str) -> None:
        """Withdraw one pair from the gateways that have it."""
        await self.account.reject_access(client, resource)

    async def op_forget_authorization(self: Portal, client: str, resource: str | None = None) -> None:
        """Drop pairs from the snapshot of the next `init` without telling anybody."""
        for table in self.account.store.authorizations.values():
            for pair in list(table):
                if pair[0] == client and resource in {None, pair[1]}:
                    del table[pair]
        self.account.store.save()

    async def op_forbid(self: Portal, resource: str, *, forbidden: bool = True) -> None:
        """Let requests for a resource fail with `forbidden`, or not."""
        (self.account.forbidden.add if forbidden else self.account.forbidden.discard)(resource)

    async def op_set_expiry(self: Portal, client: str, resource: str, expires_at: int) -> None:
        """Move the expiry of a pair in the snapshot; the gateway learns of it with the next `init`."""
        for table in self.account.store.authorizations.values():
            if (client, resource) in table:
                table[client, resource] = expires_at

    async def op_settings(
        self: Portal,
        authorization_lifetime_s: float | None = None,
        iceless_allowed: bool | None = None,
        muted_events: list[str] | None = None,
        flow_logs: dict[str, Any] | None = None,
    ) -> None:
        """How long new authorizations last; whether ICE-less is offered; candidate events that are not forwarded.

        `flow_logs` is what the next `init` says of them; new authorizations allow uploads if its interval is not 0.
        """
        if authorization_lifetime_s is not None:
            self.account.authorization_lifetime_s = authorization_lifetime_s
        if iceless_allowed is not None:
            self.account.iceless_allowed = iceless_allowed
        if muted_events is not None:
            self.account.muted_events = set(muted_events)
        if flow_logs is not None:
            self.account.flow_logs = flow_logs

    async def op_choose_relays(self: Portal, whom: str, relays: list[str] | None) -> None:
        """Restrict which relays a device (by id) or a kind of device is offered; None lifts it."""
        if relays is None:
            self.account.relay_choice.pop(whom, None)
        else:
            self.account.relay_choice[whom] = relays

    async def op_authorize(
        self: Portal,
        resource: str,
        client_id: str,
        client_key: str | None = None,
        gateway: str | None = None,
        expires_at: int | None = None,
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Push `create_authorization` for a client that need not be online; returns the payload.

        `client_key` makes or re-keys the device `client_id`; `changes` overlays the payload (for malformed ones).
        """
        if client_key is not None:
            UUID(client_id)
            self.account.store.upsert_device("client", client_id, "virtual", client_key, device_id=client_id)
        channel = self.account.gateways[gateway] if gateway else next(iter(self.account.gateways.values()))
        return await self.account.authorize(
            channel,
            self.account.store.devices[client_id],
            self.account.store.resources[resource],
            client=self.account.clients.get(client_id),
            expires_at=expires_at,
            changes=changes,
        )

    def _channels_of(self: Portal, kind: str, device: str | None) -> list[Channel]:
        wanted = Kind(kind)
        return [
            channel
            for channel in self.channels
            if channel.kind is wanted
            and device in {None, channel.device.id if channel.device else None, channel.relay_id}
        ]


def _describe(channel: Channel) -> dict[str, Any]:
    assert channel.device is not None
    device = channel.device
    return {
        "name": device.name,
        "external_id": device.external_id,
        "public_key": device.public_key,
        "ipv4": device.ipv4,
        "ipv6": device.ipv6,
        "connection": channel.number,
        "v2": channel.v2,
        "relays": sorted(channel.remembered_relays),
        "user_agent": channel.user_agent,
    }
