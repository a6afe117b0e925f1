"""A tunnel whose flows are logged, and tokens made by hand."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_network

from fzg.secret import Secret
from fzg.tunnel import ingest_token
from fzg.tunnel.events import Deliver, Forward
from fzg.tunnel.resources import CidrResource, DnsResource
from fzg.wire.endpoint import Endpoint
from tests.unit.tunnel_world import A4, A6, A, World, packed, resource_id

UNIX = 1_790_000_000.0
"""Unix time at the beginning of a world."""
CLAIMS = {
    "account_id": "0f0f0f0f-1111-4222-8333-444444444444",
    "iat": 1790000000,
    "exp": 1792592000,
    "uploads_enabled": True,
    "role": "responder",
    "initiator_device_id": A,
    "responder_device_id": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
    "policy_authorization_id": "77777777-0000-4000-8000-000000000001",
    "policy_id": "77777777-0000-4000-8000-000000000002",
    "resource_id": "99999999-8888-4777-8666-555555555555",
    "resource_name": "The Wiki",
    "resource_address": "10.0.0.0/24",
    "initiator_actor_id": "77777777-0000-4000-8000-000000000003",
    "initiator_actor_name": "Ada Example",
    "initiator_actor_email": "ada@example.com",
    "authorized_at": "2026-09-21T14:13:20.000000Z",
    "authorization_expires_at": "2026-09-21T22:13:20.000000Z",
}


def base64url(data) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def token(*, header=None, signature=b"signature", without=(), **claims) -> Secret[str]:
    stated = {name: value for name, value in (CLAIMS | claims).items() if name not in without}
    return Secret(".".join((base64url(header or {"alg": "HS256"}), base64url(stated), base64url(signature))))


def attribution(**claims):
    return ingest_token.parse(token(**claims))


def path(number=1, gateway="203.0.113.9"):
    """The outer addresses of a datagram from the client's `number`-th place."""
    return Endpoint.of(f"198.51.100.{number}", 52625), Endpoint.of(gateway, 52625)


class LoggedWorld(World):
    """Client A may use 10.0.0.0/24 and, after `name`, db.example behind a proxy IP. `records` grows."""

    def __init__(self):
        super().__init__()
        self.tunnel.flow_log.unix_offset = UNIX - self.now
        self.tunnel.flow_log.switch(on=True, now=self.now)
        self.attribution = attribution()
        self.path = path()
        self.records = []
        self.grant_logged(CidrResource(resource_id(1), ip_network("10.0.0.0/24")))

    def grant_logged(self, resource, **claims):
        self.tunnel.grant(A, packed(A4), packed(A6), resource, None, self.now, attribution=attribution(**claims))

    def name(self, proxy, real):
        self.grant_logged(DnsResource(resource_id(2), "*.example"))
        assert self.assign("db.example", [proxy], [real]) == "Active"

    def out(self, packet, client=A, ecn=0):
        return self.tunnel.handle_inner_packet(client, packet, ecn, self.now, self.path)

    def sent(self, *packets):
        """Packets of the client that pass; the last one's flow for the engine."""
        for packet in packets:
            verdict = self.out(packet)
            assert isinstance(verdict, Forward), verdict
        return verdict.flow

    def received(self, *packets):
        """Packets for the client that are sent; the last one's flow for the engine."""
        for packet in packets:
            verdict = self.back(packet)
            assert isinstance(verdict, Deliver), verdict
            if verdict.tally is not None:
                self.tunnel.handle_delivered(verdict.tally, self.now)
        return verdict.flow

    def sweep(self, after=0.0):
        """Once the engine has reported everything; what was recorded since the last look."""
        self.now += after
        self.tunnel.handle_swept(self.now)
        return self.look()

    def look(self):
        recorded = []
        while (record := self.tunnel.poll_flow_record()) is not None:
            recorded.append(record)
        self.records += recorded
        return recorded

    def started(self):
        self.look()
        return [record for record in self.records if record.figures is None]

    def completed(self):
        self.look()
        return [record for record in self.records if record.figures is not None]

    def run(self, seconds):
        """Sweeps once a second."""
        for _ in range(int(seconds)):
            self.sweep(1.0)
            super().run(0)
        self.sweep(seconds - int(seconds))
