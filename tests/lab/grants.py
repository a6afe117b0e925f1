"""What a portal has authorized, as the obvious table, and portals that do a lot of it: storms for a gateway.

`Grants` is written from the specification alone (portal.md 2.2, 2.4, 2.6, 2.9, 5.5). A gateway is compared with it:
what it acknowledged and nobody took back must pass, and nothing else may pass than what is in the table.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random

Pair = tuple[str, str]
Message = tuple[str, dict[str, Any]]

_TUNNEL4, _TUNNEL6 = int(IPv4Address("100.64.0.0")), int(IPv6Address("fd00:2021:1111::"))
_RESOURCES = int(IPv4Address("10.64.0.0"))
FOREVER_S = 30 * 86_400
"""An expiry that no test sees."""


@dataclass
class Grant:
    """One line of the table."""

    expires_at: int
    ref: str
    is_acknowledged: bool = False


class Grants:
    """Pairs of client and resource, until when, and whether the gateway has said that it knows.

    `latency`: what is said of a grant that ends within it may come too late.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self.latency = latency
        self.table: dict[Pair, Grant] = {}
        self._unanswered: dict[str, Grant] = {}

    def authorize(self, pair: Pair, expires_at: int, ref: str) -> None:
        """Granted, or granted anew."""
        self.table[pair] = self._unanswered[ref] = Grant(expires_at, ref)

    def acknowledge(self, ref: str) -> None:
        """The gateway's answer; one that nobody waits for is an error."""
        self._unanswered.pop(ref).is_acknowledged = True

    @property
    def unanswered(self) -> list[str]:
        """What the gateway has not acknowledged, oldest first."""
        return list(self._unanswered)

    def reject(self, pair: Pair) -> None:
        """Taken back."""
        self.table.pop(pair, None)

    def set_expiry(self, pair: Pair, expires_at: int, now: float) -> None:
        """Ends at another time. One that has ended comes to life again or not: gateways look once a second."""
        grant = self.table.get(pair)
        if grant is not None:
            grant.is_acknowledged &= grant.expires_at > now + self.latency
            grant.expires_at = expires_at

    def retain(self, listed: list[dict[str, Any]], now: float) -> None:
        """`init` says what there is."""
        expiries = {(entry["client_id"], entry["resource_id"]): entry["expires_at"] for entry in listed}
        self.table = {pair: grant for pair, grant in self.table.items() if pair in expiries}
        for pair, expires_at in expiries.items():
            self.set_expiry(pair, expires_at, now)

    def apply(self, message: Message, now: float) -> None:
        """What a message says, whoever made it."""
        match message:
            case "create_authorization", payload:
                pair = payload["client"]["id"], payload["resource"]["id"]
                self.authorize(pair, payload["expires_at"], payload["ref"])
            case "reject_access", payload:
                self.reject((payload["client_id"], payload["resource_id"]))
            case "access_authorization_expiry_updated", payload:
                self.set_expiry((payload["client_id"], payload["resource_id"]), payload["expires_at"], now)
            case "init", payload if "authorizations" in payload:
                self.retain(payload["authorizations"], now)
            case _:
                pass

    def snapshot(self, now: float) -> list[dict[str, Any]]:
        """`authorizations` of `init`."""
        return [
            {"client_id": client, "resource_id": resource, "expires_at": grant.expires_at}
            for (client, resource), grant in self.table.items()
            if grant.expires_at > now
        ]

    def may_pass(self, now: float) -> set[Pair]:
        """What the gateway may let through."""
        return {pair for pair, grant in self.table.items() if grant.expires_at > now}

    def must_pass(self, now: float) -> set[Pair]:
        """What the gateway must let through."""
        return {pair for pair in self.may_pass(now) if self.table[pair].is_acknowledged}


class Resource(NamedTuple):
    """A single address behind the gateway, in 10.64.0.0/11."""

    number: int

    @property
    def id(self) -> str:
        """Its id."""
        return f"99999999-8888-4777-8666-{self.number:012x}"

    @property
    def address(self) -> IPv4Address:
        """Its address."""
        return IPv4Address(_RESOURCES + self.number)

    def for_gateway(self) -> dict[str, Any]:
        """As it stands in `create_authorization`."""
        return {"type": "cidr", "id": self.id, "name": "Storm", "address": f"{self.address}/32", "filters": []}


@dataclass(frozen=True)
class Device:
    """A client, as the portal tells gateways of it; `shared` is what goes with each of its authorizations."""

    id: str
    ipv4: str
    shared: dict[str, Any]

    @classmethod
    def make(cls, number: int, rng: random.Random) -> Device:
        """One that has a name and keys, and nothing else."""
        device_id = f"11111111-2222-4333-8444-{number:012x}"
        ipv4 = str(IPv4Address(_TUNNEL4 + number))
        client = {
            "id": device_id,
            "public_key": base64.b64encode(rng.randbytes(32)).decode(),
            "preshared_key": base64.b64encode(rng.randbytes(32)).decode(),
            "ipv4": ipv4,
            "ipv6": str(IPv6Address(_TUNNEL6 + number)),
        }
        sides = {
            f"{side}_ice_credentials": {"username": f"{side[0]}{number:x}", "password": rng.randbytes(11).hex()}
            for side in ("client", "gateway")
        }
        return cls(device_id, ipv4, {"client": client, **sides})

    @classmethod
    def of(cls, authorization: dict[str, Any]) -> Device:
        """The one that somebody's authorization is for."""
        client = authorization["client"]
        shared = {key: authorization[key] for key in ("client", "client_ice_credentials", "gateway_ice_credentials")}
        return cls(client["id"], client["ipv4"], shared)


class Storm:
    """A portal that authorizes without pause, repeatably, and notes what it did; some of it it takes back again."""

    def __init__(self, rng: random.Random, *, first_resource: int = 1, latency: float = 0.0) -> None:
        self.rng = rng
        self.grants = Grants(latency=latency)
        self.devices: list[Device] = []
        """All clients so far; the first `given` are looked at closely, and get more than their share."""
        self.given = 0
        self.pairs: dict[Pair, tuple[Device, Resource]] = {}
        """Every pair that was ever authorized."""
        self.refs = 0
        self._said: list[tuple[Device, Resource]] = []
        self._next_resource = first_resource

    def authorization(self, device: Device, resource: Resource, expires_at: int) -> Message:
        """`create_authorization`, which the table then holds."""
        self.refs += 1
        ref = f"storm-{self.refs}"
        pair = (device.id, resource.id)
        self.pairs[pair] = (device, resource)
        self.grants.authorize(pair, expires_at, ref)
        payload = {"ref": ref, **device.shared, "resource": resource.for_gateway(), "expires_at": expires_at}
        return "create_authorization", payload

    def authorize(self, now: float) -> Message:
        """For a new client, for a known one, or for a pair that was authorized before; some do not last."""
        r = self.rng.random()
        lasts = self.rng.choice((2, 4, 8, 16)) if self.rng.random() < 0.25 else FOREVER_S
        expires_at = int(now) + lasts
        if r < 0.15 and self._said:
            device, resource = self._any_pair()
            return self.authorization(device, resource, expires_at)
        if r < 0.4 and self.devices:
            among = self.devices[: self.given] if self.given and self.rng.random() < 0.3 else self.devices
            return self._anew(self.rng.choice(among), expires_at)
        device = Device.make(len(self.devices) + 0x1000, self.rng)
        self.devices.append(device)
        return self._anew(device, expires_at)

    def change(self, now: float) -> Message:
        """Something else than an authorization."""
        device, resource = self._any_pair()
        names = {"client_id": device.id, "resource_id": resource.id}
        if self.rng.random() < 0.7:
            self.grants.reject((device.id, resource.id))
            return "reject_access", names
        expires_at = int(now) + self.rng.choice((-5, 1, 3, FOREVER_S))
        self.grants.set_expiry((device.id, resource.id), expires_at, now)
        return "access_authorization_expiry_updated", names | {"expires_at": expires_at}

    def new_resource(self) -> Resource:
        """One that nobody has."""
        self._next_resource += 1
        return Resource(self._next_resource - 1)

    def _anew(self, device: Device, expires_at: int) -> Message:
        resource = self.new_resource()
        self._said.append((device, resource))
        return self.authorization(device, resource, expires_at)

    def _any_pair(self) -> tuple[Device, Resource]:
        return self.rng.choice(self._said)
