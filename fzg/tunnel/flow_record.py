"""Records of flow logs: what is uploaded (spec tunnel 10.4) and what is printed (spec operations 1.8)."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from fzg.wire.ip import TCP

if TYPE_CHECKING:
    from fzg.tunnel.ingest_token import Attribution
    from fzg.wire.endpoint import Endpoint

# What concerns the upload alone is not printed.
_UNPRINTED = frozenset({"account_id", "iat", "exp", "uploads_enabled", "role"})


class Outer(NamedTuple):
    """The outer addresses of a flow from `activated` on, in Unix seconds."""

    client: Endpoint
    gateway: Endpoint
    activated: float


class Figures(NamedTuple):
    """What a flow came to. Times in Unix seconds; `tx` is what the client sent, `rx` what it received."""

    flow_end: float
    last_packet: float
    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """A flow that has started or, with `figures`, completed. The values are protocol values of `fzg.wire.ip`."""

    attribution: Attribution
    source: bytes
    destination: bytes
    source_value: int
    destination_value: int
    domain: str
    outers: tuple[Outer, ...]
    flow_start: float
    figures: Figures | None = None

    @property
    def message(self) -> str:
        """`TCP flow started` and so on."""
        return f"{self._protocol.upper()} flow {'started' if self.figures is None else 'completed'}"

    @property
    def stem(self) -> str:
        """The same for start and completion of one flow: when it started, and 16 hexadecimal digits."""
        addresses = self.source + self.destination
        ports = self.source_value.to_bytes(4, "big") + self.destination_value.to_bytes(4, "big")
        identity = blake2b(addresses + ports + repr(self.flow_start).encode(), digest_size=8).hexdigest()
        return f"{max(0, int(self.flow_start)):010d}-{identity}"

    def payload(self) -> dict[str, Any]:
        """One element of an upload; the attribution is in its token."""
        payload = self._inner() | {"outers": self._outers(), "flow_start": timestamp(self.flow_start)}
        return payload if self.figures is None else payload | _texts(self.figures)

    def fields(self) -> dict[str, Any]:
        """What is printed: all of it, with the attribution."""
        claims = structs.asdict(self.attribution.claims)
        printed: dict[str, Any] = {"protocol": self._protocol, "role": "responder"}
        printed |= {name: value for name, value in claims.items() if name not in _UNPRINTED and value is not None}
        printed |= self._inner() | {"outers": _Compact(self._outers()), "flow_start": timestamp(self.flow_start)}
        return printed if self.figures is None else printed | _texts(self.figures)

    @property
    def _protocol(self) -> str:
        return "tcp" if self.source_value & ~0xFFFF == TCP else "udp"

    def _inner(self) -> dict[str, Any]:
        inner: dict[str, Any] = {
            "protocol": self._protocol,
            "inner_src_ip": _ip(self.source),
            "inner_src_port": self.source_value & 0xFFFF,
            "inner_dst_ip": _ip(self.destination),
            "inner_dst_port": self.destination_value & 0xFFFF,
        }
        return inner | {"domain": self.domain} if self.domain else inner

    def _outers(self) -> list[dict[str, Any]]:
        return [
            {
                "src_ip": outer.client.host,
                "src_port": outer.client.port,
                "dst_ip": outer.gateway.host,
                "dst_port": outer.gateway.port,
                "path_activated_at": timestamp(outer.activated),
            }
            for outer in self.outers
        ]


def timestamp(unix: float) -> str:
    """RFC 3339 in UTC, with as many fractional digits as are needed of none, three and six."""
    moment = datetime.fromtimestamp(unix, UTC)
    digits = "seconds" if not moment.microsecond else "microseconds" if moment.microsecond % 1000 else "milliseconds"
    return moment.isoformat(timespec=digits).replace("+00:00", "Z")


class _Compact:
    """A value that is printed as JSON without blanks, and not quoted."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return json.dumps(self._value, separators=(",", ":"))


def _texts(figures: Figures) -> dict[str, Any]:
    values = figures._asdict()
    return values | {name: timestamp(values[name]) for name in ("flow_end", "last_packet")}


def _ip(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
