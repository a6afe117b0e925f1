"""What `status` shows: plain values read from the core between two of its passes; nothing here waits or changes it.

Durations are seconds, moments are durations back from now, addresses are text as people write them.
"""

from __future__ import annotations

import os
from collections import Counter
from enum import StrEnum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from fzg.dataplane.select import engine_name
from fzg.host.udp import PREFERRED_PORT
from fzg.ops import drops
from fzg.portal.websocket import State as PortalState
from fzg.version import VERSION
from fzg.wire.candidate import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.gateway import Gateway
    from fzg.node.connection import Connection
    from fzg.portal.websocket import PortalConnection
    from fzg.turn.relays import RelayStatus


class NatKind(StrEnum):
    """What relays see of the NAT before us (RFC 4787 4.1)."""

    UNKNOWN = "unknown"
    NONE = "none"
    SOME = "NAT"
    ENDPOINT_INDEPENDENT = "NAT, maps independently of the destination"
    BY_DESTINATION = "NAT, maps by destination"


_NAT_EXPLAINED = {
    NatKind.UNKNOWN: "no relay has told yet where it sees us",
    NatKind.NONE: "relays see our own addresses",
    NatKind.SOME: "one relay alone cannot tell how it maps",
    NatKind.ENDPOINT_INDEPENDENT: "direct connections work through it unless the client's NAT maps by destination",
    NatKind.BY_DESTINATION: "most connections will be relayed; forward UDP port {port} to this host, or let the NAT"
    " keep one port per socket",
}


class WhyRelayed(StrEnum):
    """The first of these that explains a relayed path."""

    NO_DIRECT_CANDIDATE = "the client offered no address of its own"
    NO_COMMON_FAMILY = "the client and this gateway share no IP version"
    NAT_BY_DESTINATION = "our NAT maps by destination"
    NO_DIRECT_CHECK = "no direct check succeeded: a firewall, or the client's NAT maps by destination"


def overview(
    gateway: Gateway, portal: PortalConnection, *, now: float, started: float, not_ready_because: str | None
) -> dict[str, Any]:
    """Everything but the clients, of which there may be thousands."""
    connections = Counter(each.relay_id for each in gateway.node.connections)
    relays = gateway.node.relays.status()
    return {
        "version": VERSION,
        "engine": engine_name(gateway.engine),
        "pid": os.getpid(),
        "uid": os.getuid(),
        "uptime": _since(started, now),
        "ready": not_ready_because is None,
        "not_ready_because": not_ready_because,
        "portal": _portal(portal, now),
        "nat": _nat(relays),
        "relays": [_relay(each, connections[each.id]) for each in relays],
        "client_count": len(gateway.client_ids),
        "drops": drops.dropped(gateway),
    }


def client(gateway: Gateway, client_id: str, now: float) -> dict[str, Any] | None:
    """One client; None when it is gone."""
    known, carried = gateway.tunnel.client(client_id), gateway.traffic(client_id)
    if known is None or carried is None:
        return None
    connection = gateway.node.connection(client_id)
    shown: dict[str, Any] = {
        "id": client_id,
        "addresses": [str(ip_address(known.ipv4)), str(ip_address(known.ipv6))],
        "resources": known.resource_count,
        "nat_sessions": len(known.nat),
        "state": "disconnected",
        "age": None,
        "handshake_age": None,
        "path": None,
        "received": {"packets": carried.received_packets, "bytes": carried.received_bytes},
        "sent": {"packets": carried.sent_packets, "bytes": carried.sent_bytes},
    }
    return shown | (_connection(gateway, connection, now) if connection is not None else {})


def _portal(portal: PortalConnection, now: float) -> dict[str, Any]:
    connected = portal.state is PortalState.CONNECTED
    return {
        "host": portal.host,
        "state": str(portal.state),
        "connected_for": _since(portal.joined_at, now) if connected else None,
        "partition_age": _since(portal.away_since, now) if not connected else None,
        "last_error": portal.last_error,
        "next_attempt_in": max(0.0, round(portal.dials_at - now, 3)) if portal.dials_at is not None else None,
    }


def _nat(relays: Sequence[RelayStatus]) -> dict[str, Any]:
    kind = nat_kind(relays)
    port = next((base.port for each in relays for base, _ in each.mapped), PREFERRED_PORT)
    seen = dict.fromkeys(str(mapped) for each in relays for _, mapped in each.mapped)
    return {"kind": str(kind), "explained": _NAT_EXPLAINED[kind].format(port=port), "seen_at": list(seen)}


def nat_kind(relays: Sequence[RelayStatus]) -> NatKind:
    """What the addresses that relays report say together."""
    seen = [(base, mapped) for each in relays for base, mapped in each.mapped]
    translated = [(base, mapped) for base, mapped in seen if base != mapped]
    if not any(each.rtt is not None for each in relays):
        return NatKind.UNKNOWN
    if not translated:
        return NatKind.NONE
    if len(set(translated)) > len({base for base, _ in translated}):
        return NatKind.BY_DESTINATION
    return NatKind.SOME if len(translated) == len(set(translated)) else NatKind.ENDPOINT_INDEPENDENT


def _relay(relay: RelayStatus, connections: int) -> dict[str, Any]:
    return {
        "id": relay.id,
        "addresses": [str(each) for each in relay.sockets],
        "state": relay.state.value,
        "rtt_ms": round(relay.rtt * 1000, 3) if relay.rtt is not None else None,
        "chosen": relay.is_near,
        "relayed_addresses": [str(each) for each in relay.relayed],
        "channels": relay.channels,
        "clients": connections,
    }


def _connection(gateway: Gateway, connection: Connection, now: float) -> dict[str, Any]:
    path = connection.path
    shown = {
        "state": connection.state.value,
        "age": _since(connection.created_at, now),
        "handshake_age": _since(connection.handshake_at, now),
        "relay": connection.relay_id,
    }
    if path is None:
        return shown
    why = why_relayed(gateway, connection)
    return shown | {
        "path": str(path.kind),
        "relayed": why is not None,
        "relayed_because": why,
        "local": str(path.source),
        "remote": str(path.destination),
    }


def why_relayed(gateway: Gateway, connection: Connection) -> str | None:
    """None for a direct path."""
    path = connection.path
    if path is None or path.kind == "PeerToPeer":
        return None
    ours = {each.address.family for each in connection.agent.local_candidates() if each.kind is not Kind.RELAY}
    theirs = {each.address.family for each in connection.agent.remote_candidates() if each.kind is not Kind.RELAY}
    if not theirs:
        return WhyRelayed.NO_DIRECT_CANDIDATE
    if not ours & theirs:
        return WhyRelayed.NO_COMMON_FAMILY
    if gateway.node.relays.nat_maps_by_destination:
        return WhyRelayed.NAT_BY_DESTINATION
    return WhyRelayed.NO_DIRECT_CHECK


def _since(moment: float | None, now: float) -> float | None:
    return None if moment is None else round(max(0.0, now - moment), 3)
