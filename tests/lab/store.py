"""What the portal remembers over a restart: devices with their addresses and secrets, resources, authorizations."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

SITE = {"id": "44444444-0000-4000-8000-000000000001", "name": "Lab"}
CLIENT_TOKEN_LIFETIME_S = 30 * 86400

_NAMESPACE = UUID("5f1d7c0e-2f3b-4f5e-9a63-6f3a7f1e2b0c")
_IPV4_BASE = int(IPv4Address("100.64.0.0"))
_IPV6_BASE = int(IPv6Address("fd00:2021:1111::"))
_HOSTS = 2097150  # host numbers 1 … 2097150 of a /11 and of a /107 (spec portal.md 5.3)


@dataclass(slots=True)
class Device:
    """A gateway or a client as the portal stores it; `public_key` is the one of its latest connection."""

    id: str
    kind: str
    external_id: str
    name: str
    psk_base: str
    ipv4: str
    ipv6: str
    public_key: str = ""


@dataclass(slots=True)
class Resource:
    """One resource of the account; `address` is empty for the internet resource."""

    type: str
    id: str
    address: str = ""
    name: str = ""
    filters: list[dict[str, Any]] = field(default_factory=list)
    ip_stack: str | None = None

    @classmethod
    def parse(cls, text: str) -> Resource:
        """From `cidr=10.0.0.0/16`, `dns=*.example.com` or `internet` with optional `,key=value`, or from a JSON object.

        Keys: `id`, `name`, `ip_stack`, and `tcp=443`, `tcp=8000-8999`, `udp=53`, `icmp` for filters.
        Without `id` it follows from the address.
        """
        if text.startswith("{"):
            fields = json.loads(text)
            return cls(**{"id": _resource_id(fields["type"], fields.get("address", ""))} | fields)
        first, *rest = text.split(",")
        kind, _, address = first.partition("=")
        if kind not in {"cidr", "dns", "internet"}:
            raise ValueError(f"{text!r} is not cidr=NETWORK, dns=PATTERN, internet or a JSON object")
        if kind == "cidr":
            address = str(ip_network(address))
        resource = cls(kind, _resource_id(kind, address), address, address or "Internet")
        for item in rest:
            key, _, value = item.partition("=")
            if key in {"tcp", "udp"}:
                first_port, _, last_port = value.partition("-")
                resource.filters.append(
                    {
                        "protocol": key,
                        "port_range_start": int(first_port or 0),
                        "port_range_end": int(last_port or first_port or 65535),
                    }
                )
            elif key == "icmp":
                resource.filters.append({"protocol": "icmp"})
            elif key in {"id", "name", "ip_stack"}:
                setattr(resource, key, value)
            else:
                raise ValueError(f"{item!r} is not a field of a resource")
        return resource

    def for_gateway(self) -> dict[str, Any]:
        """The form of spec portal.md 2.1."""
        if self.type == "internet":
            return {"type": "internet", "id": self.id}
        return {"type": self.type, "id": self.id, "name": self.name, "address": self.address, "filters": self.filters}

    def for_client(self) -> dict[str, Any]:
        """The form of spec portal.md 5.6."""
        if self.type == "internet":
            return {"type": "internet", "id": self.id, "can_be_disabled": True, "sites": [SITE]}
        view = self.for_gateway() | {"address_description": None, "sites": [SITE]}
        if self.ip_stack is not None:
            view["ip_stack"] = self.ip_stack
        return view


class Store:
    """Devices, resources and authorizations; written to `path`, if given, at each change."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = Path(path) if path else None
        self.devices: dict[str, Device] = {}
        self.resources: dict[str, Resource] = {}
        self.authorizations: dict[str, dict[tuple[str, str], int]] = {}
        self.client_token_expiry = int(time.time()) + CLIENT_TOKEN_LIFETIME_S
        if self._path and self._path.exists():
            self._load(json.loads(self._path.read_text()))

    def upsert_device(
        self, kind: str, external_id: str, name: str, public_key: str, device_id: str | None = None
    ) -> Device:
        """Find the device by its external id or make it, with addresses and secret; takes over name and key."""
        device = next((d for d in self.devices.values() if d.kind == kind and d.external_id == external_id), None)
        if device is None:
            ipv4, ipv6 = self._free_addresses()
            device = Device(
                id=device_id or str(uuid4()),
                kind=kind,
                external_id=external_id,
                name=name,
                psk_base=os.urandom(32).hex(),
                ipv4=ipv4,
                ipv6=ipv6,
            )
            self.devices[device.id] = device
        device.name, device.public_key = name, public_key
        self.save()
        return device

    def snapshot(self, gateway_id: str) -> list[dict[str, Any]]:
        """The `authorizations` of a gateway's `init`: its unexpired pairs."""
        now = time.time()
        table = self.authorizations.get(gateway_id, {})
        return [
            {"client_id": client, "resource_id": resource, "expires_at": expires}
            for (client, resource), expires in table.items()
            if expires > now
        ]

    def save(self) -> None:
        """Write the file, atomically."""
        if self._path is None:
            return
        state = {
            "devices": [asdict(device) for device in self.devices.values()],
            "resources": [asdict(resource) for resource in self.resources.values()],
            "authorizations": [
                [gateway, client, resource, expires]
                for gateway, table in self.authorizations.items()
                for (client, resource), expires in table.items()
            ],
            "client_token_expiry": self.client_token_expiry,
        }
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(state, indent=1))
        draft.replace(self._path)

    def _load(self, state: dict[str, Any]) -> None:
        self.devices = {fields["id"]: Device(**fields) for fields in state["devices"]}
        self.resources = {fields["id"]: Resource(**fields) for fields in state["resources"]}
        for gateway, client, resource, expires in state["authorizations"]:
            self.authorizations.setdefault(gateway, {})[client, resource] = expires
        self.client_token_expiry = state["client_token_expiry"]

    def _free_addresses(self) -> tuple[str, str]:
        used = {device.ipv4 for device in self.devices.values()}
        start = random.randrange(_HOSTS)
        for probe in range(_HOSTS):
            number = (start + probe) % _HOSTS + 1
            ipv4 = str(IPv4Address(_IPV4_BASE + number))
            if ipv4 not in used:
                return ipv4, str(IPv6Address(_IPV6_BASE + number))
        raise RuntimeError("the account has no free tunnel address")


def _resource_id(kind: str, address: str) -> str:
    digest = bytearray(uuid5(_NAMESPACE, f"{kind}={address}").bytes)
    digest[6] = (digest[6] & 0x0F) | 0x40
    return str(UUID(bytes=bytes(digest)))
