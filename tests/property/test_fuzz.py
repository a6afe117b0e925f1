"""Mutated captures into every parser, and into every state machine from those who hold the right keys.

Nothing raises but `Malformed` out of a parser, and no table outgrows its cap. What strangers and relays send is in
`test_core_properties`; the shares of all add up to `effort.MUTATIONS`.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Mapping
from enum import Enum
from hashlib import blake2s
from ipaddress import ip_address
from types import FunctionType, MethodType

import dns.message
import dns.rrset
import pytest

from fzg.dataplane.engine import InnerPacket, OutboundPacket
from fzg.portal import messages
from fzg.portal.channel import Channel, Received
from fzg.portal.problem import parse_rejection, parse_retry_after
from fzg.portal.url import InvalidUrl, PortalUrl
from fzg.portal.user_agent import parse_os_release
from fzg.secret import Secret
from fzg.tunnel import ingest_token
from fzg.wire import Malformed, candidate, channel_data, control, icmp, ip, stun, wireguard
from fzg.wire import dns as dns_wire
from fzg.wire.endpoint import Endpoint
from tests.property.effort import MUTATIONS, SEED, share
from tests.property.test_core_properties import captured, mutated
from tests.property.test_ip_properties import SEEDS as PACKETS
from tests.unit import tunnel_world
from tests.unit.dataplane_world import echo, tcp, udp
from tests.unit.gateway_world import (
    SERVER,
    close_worlds,  # noqa: F401
    world,
)
from tests.unit.gateway_world import cidr as cidr_resource
from tests.unit.test_portal_messages import INTERFACE, authorization, cidr, turn

pytestmark = pytest.mark.slow

CANDIDATES = [
    "candidate:fffeff7e1b2c3d4e5f60718 1 udp 2130706175 192.0.2.10 52625 typ host ufrag wxyz",
    "candidate:fffe7f64aa01bb02cc03dd0 1 udp 1686109951 203.0.113.7 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag wxyz",
    "candidate:1 1 udp 37748735 2001:db8::3 61234 typ relay raddr :: rport 0 generation 0 ufrag wxyz",
]
TOKEN = (
    "eyJhbGciOiJFZERTQSIsInR5cCI6IkpXVCJ9."
    "eyJpc3MiOiJmaXJlem9uZSIsImV4cCI6MTc5MDAyODgwMCwiYWNjb3VudF9pZCI6IjEiLCJyb2xlIjoiZ2F0ZXdheSJ9.c2lnbmF0dXJl"
)

OTHER_RESOURCE = "5f1c3d8e-6b1a-4a39-9d26-0c2b7e9a4410"
ASSIGNED = (
    b'{"resource":"5f1c3d8e-6b1a-4a39-9d26-0c2b7e9a4410","domain":"db.example.com",'
    b'"proxy_ips":["100.96.0.9","fd00:2021:1111:8000::8"]}'
)
PEER = Endpoint.of("203.0.113.7", 52625)
ATTRIBUTES = [
    0x01, 0x06, 0x08, 0x09, 0x0C, 0x0D, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x19, 0x20, 0x24, 0x25, 0x8000, 0x8001,
    0x8022, 0x8029, 0x802A, 0xFFFF,
]  # fmt: skip


def _frames(client_id: str, resource_id: str) -> list[tuple[str, dict]]:
    """What the portal says to a gateway, as it stands in a frame."""
    of_client = {"client_id": client_id}
    return [
        ("init", {"interface": INTERFACE, "relays": [turn(), turn(addr="[2001:db8::7]:3478")],
                  "authorizations": [{**of_client, "resource_id": resource_id, "expires_at": 2145916800}]}),
        ("create_authorization", authorization(expires_at=2145916800)),
        ("authorize_flow", authorization(resource=cidr(), expires_at=2145916800)),
        ("ice_candidates", {**of_client, "candidates": CANDIDATES}),
        ("invalidate_ice_candidates", {**of_client, "candidates": CANDIDATES}),
        ("reject_access", {**of_client, "resource_id": resource_id}),
        ("relays_presence", {"disconnected_ids": [turn()["id"]], "connected": [turn()]}),
        ("resource_updated", cidr(filters=[{"protocol": "tcp", "port_range_start": 443, "port_range_end": 443}])),
        ("access_authorization_expiry_updated", {**of_client, "resource_id": resource_id, "expires_at": 2145916800}),
        ("phx_reply", {"status": "ok", "response": {}}),
        ("phx_error", {}),
        ("disconnect", {"reason": "token_expired"}),
    ]  # fmt: skip


def garbled(rng: random.Random, text: str) -> str:
    """Text as a fault or a foe may leave it."""
    characters = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(characters) + 1)
        match rng.randrange(5):
            case 0:
                characters[at : at + rng.randint(1, 8)] = []
            case 1:
                characters.insert(at, rng.choice('0 :.-,{}[]"\\\0\n\ud800é٣/@%'))
            case 2 if at < len(characters):
                characters[at] = rng.choice("019 az:.-%\0é")
            case 3:
                characters[at:at] = characters[: rng.randrange(20)]
            case _:
                fields = "".join(characters).split(" ")
                rng.shuffle(fields)
                characters = list(" ".join(fields))
    return "".join(characters)


def twisted(rng: random.Random, value):
    """JSON with some of its values replaced by others, lost, or of another type."""
    odd = [None, True, 0, -1, 2**53, 1e300, "", "\0", "::", "0.0.0.0", "fd00::1", "a" * 2000, [], {}, [[]], {"type": 1}]
    if rng.random() < 0.06:
        return rng.choice(odd)
    if isinstance(value, dict):
        kept = {key: twisted(rng, each) for key, each in value.items() if rng.random() > 0.02}
        return kept | ({rng.choice(["type", "id", "x"]): rng.choice(odd)} if rng.random() < 0.03 else {})
    if isinstance(value, list):
        return [twisted(rng, each) for each in value for _ in range(rng.choice((1, 1, 1, 1, 0, 2)))]
    if isinstance(value, str) and rng.random() < 0.1:
        return garbled(rng, value).encode(errors="replace").decode()
    return value


def _control(data: bytes) -> None:
    packet = ip.parse(data)
    if control.is_control(packet):
        control.parse(packet)
    icmp.recognise(packet)


def _stun(data: bytes) -> None:
    message = stun.parse(data)
    _ = message.username, message.realm, message.nonce, message.error, message.xor_mapped_address, message.lifetime
    _ = message.xor_relayed_addresses, message.xor_peer_address, message.channel_number, message.priority
    message.verify_integrity(b"key")


def _dns() -> list[bytes]:
    query = dns.message.make_query("host.corp.example", "A", use_edns=0)
    response = dns.message.make_response(query)
    response.answer.append(dns.rrset.from_text("host.corp.example.", 60, "IN", "A", "10.0.0.5", "10.0.0.6"))
    return [query.to_wire(), response.to_wire()]


DNS = _dns()
PROBLEM = b'{"type":"about:blank","status":401,"title":"Unauthorized","detail":"token is not valid"}'


def _parsers(datagrams: list[bytes]) -> list:
    """Each with what it reads in the wild; text where it reads text."""
    lines = [f"{event} {json.dumps(payload)}" for event, payload in _frames("1" * 36, "2" * 36)]
    return [
        (_stun, datagrams),
        (channel_data.parse, datagrams),
        (wireguard.classify, datagrams),
        (wireguard.Initiation.parse, datagrams),
        (wireguard.Response.parse, datagrams),
        (wireguard.CookieReply.parse, datagrams),
        (wireguard.DataHeader.parse, datagrams),
        (_control, PACKETS),
        (dns_wire.parse_query, DNS),
        (lambda data: dns_wire.parse_response(data, dns_wire.parse_query(DNS[0])), DNS),
        (lambda data: parse_rejection(401, {"retry-after": "5"}, data, 1.7e9), [PROBLEM]),
        (candidate.parse, CANDIDATES),
        (candidate.priority_of, CANDIDATES),
        (Endpoint.parse, ["203.0.113.7:3478", "[2001:db8::7]:3478"]),
        (lambda text: messages.decode(*text.partition(" ")[::2]), lines),
        (lambda text: ingest_token.parse(Secret(text)), [TOKEN]),
        (lambda text: parse_retry_after(text, 1.7e9), ["120", "Fri, 31 Dec 1999 23:59:59 GMT"]),
        (PortalUrl.parse, ["wss://api.firezone.dev/gateway", "ws://[::1]:8081"]),
        (parse_os_release, ['NAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n']),
    ]


def test_parsers_raise_nothing_but_malformed():
    rng = random.Random(SEED)
    parsers = _parsers(captured())
    for _ in range(share(MUTATIONS, 30)):
        parse, seeds = rng.choice(parsers)
        original = rng.choice(seeds)
        data = mutated(rng, original) if isinstance(original, bytes) else garbled(rng, original)
        try:
            parse(data)
        except (Malformed, InvalidUrl):
            pass
        except Exception as error:
            error.add_note(f"FZG_SEED={SEED}: {parse} of {data!r}")
            raise


# -- state machines

LIMITS = {  # where the default does not hold, and why
    "engine._flows": 65_536,
}
DEFAULT_LIMIT = 1000
_OPAQUE = (str, bytes, bytearray, int, float, Enum, FunctionType, MethodType, type, random.Random)


def sizes(root: object) -> dict[str, int]:
    """The largest container at each place that can be reached from an object."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    queue: deque[tuple[str, object]] = deque([("", root)])
    while queue:
        place, each = queue.popleft()
        if isinstance(each, _OPAQUE) or each is None or id(each) in seen or type(each).__module__.startswith("tests."):
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            found[place] = max(found.get(place, 0), len(each))
            queue.extend((f"{place}[]", inner) for pair in each.items() for inner in pair)
        elif isinstance(each, (list, tuple, deque, set, frozenset)):
            found[place] = max(found.get(place, 0), len(each))
            queue.extend((f"{place}[]", inner) for inner in each)
        else:
            names = [name for kind in type(each).__mro__ for name in getattr(kind, "__slots__", ())]
            for name in {*names, *getattr(each, "__dict__", ())}:
                queue.append((f"{place}.{name}", getattr(each, name, None)))
    return found


def assert_bounded(w) -> None:
    for place, size in sizes(w.gateway.core).items():
        limit = next((limit for part, limit in LIMITS.items() if part in place), DEFAULT_LIMIT)
        assert size <= limit, f"{place} holds {size} (FZG_SEED={SEED})"


def test_any_portal_may_say_anything():
    """Frames with values lost, doubled and replaced: a message is taken or skipped, and what comes after it works."""
    rng = random.Random(SEED)
    w = world(ipv6=True).start()
    w.connect()
    w.gateway.on_frame = lambda message: None
    frames = _frames(w.client.client_id, messages_resource(w))
    channel = Channel(now=w.net.now, capabilities=messages.SetSnownetCapabilities(iceless=False))
    taken = 0
    for number in range(share(MUTATIONS, 10)):
        event, payload = rng.choice(frames)
        frame = {
            "topic": "gateway",
            "event": event,
            "ref": rng.choice((None, 1, "2")),
            "payload": twisted(rng, payload),
        }
        text = json.dumps(frame)
        channel.handle_frame(garbled(rng, text) if rng.random() < 0.2 else text, w.net.now)
        while (said := channel.poll_event()) is not None:
            if isinstance(said, Received):
                w.gateway.portal(said.message)
                taken += 1
        while channel.poll_transmit() is not None:
            pass
        if number % 20 == 0:
            w.net.run(0.2)
            channel = Channel(now=w.net.now, capabilities=messages.SetSnownetCapabilities(iceless=False))
        if number % 2000 == 0:
            assert_bounded(w)
    assert taken > share(MUTATIONS, 10) // 10
    w.net.run(30.0)
    assert_bounded(w)
    w.gateway.frames.clear()
    w.start()
    w.client.node.drop("gateway")
    w.reject()  # of what type this resource is now, and with which filters, nobody knows
    w.connect(resource=cidr_resource("10.0.0.0/8", resource_id=OTHER_RESOURCE))
    assert w.traffic_flows()


def messages_resource(w) -> str:
    """The resource of the world's authorizations."""
    return w.authorization().resource.id


def test_any_packet_may_come_out_of_a_tunnel_and_out_of_the_host():
    rng = random.Random(SEED)
    w = world().start()
    w.connect()
    names = messages.DnsResource(id=messages.Id(OTHER_RESOURCE), address="*.example.com", name="Names", filters=())
    w.authorize(resource=names)
    core, client = w.gateway.core, w.client
    handle = core._handles[client.client_id]
    ours = [
        make(source=client.ipv4, destination=SERVER, payload=b"x" * size)
        for make in (udp, tcp) for size in (0, 1, 600, 1200)
    ]  # fmt: skip
    ours += [echo(source=client.ipv4, destination=SERVER), tunnel_world.control(0, ASSIGNED), *PACKETS]
    ends = {"source": SERVER, "destination": client.ipv4}
    back = [udp(sport=53, dport=50000, **ends), tcp(sport=443, **ends), echo(reply=True, **ends), *PACKETS]
    for number in range(share(MUTATIONS, 15)):
        inbound = rng.random() < 0.7
        packet = with_length(rng, mutated(rng, rng.choice(ours if inbound else back)))
        if inbound:
            w.gateway.dispatch([InnerPacket(handle, packet, rng.randrange(4), *[Endpoint(SERVER, 1)] * 2)])
        else:
            w.gateway.dispatch([OutboundPacket(packet)])
        for request in w.gateway.resolutions:
            found = rng.choice([None, [], [ip_address("10.0.0.5"), ip_address("fd00::5")]])
            core.handle_resolved(request.request, found, w.net.now)
        w.gateway.resolutions.clear()
        w.gateway.written()
        if number % 50 == 0:
            w.net.run(0.5)
            w.authorize()  # a goodbye among the packets ended it
            if w.client.client_id in core._handles:
                handle = core._handles[client.client_id]
            w.gateway.frames.clear()
        if number % 2000 == 0:
            assert_bounded(w)
    assert_bounded(w)


def with_length(rng: random.Random, packet: bytes) -> bytes:
    """Mostly with an IP length that fits, so that it is not this that stops every mutant."""
    if len(packet) < 40 or rng.random() < 0.3:
        return packet
    if packet[0] >> 4 == 4:
        return packet[:2] + len(packet).to_bytes(2) + packet[4:]
    return packet[:4] + (len(packet) - 40).to_bytes(2) + packet[6:]


class Tampering:
    """Changes what reaches a gateway, and signs it again with the keys of who sent it."""

    def __init__(self, w, rng: random.Random, share_of_all: float) -> None:
        self.w, self.rng, self.share_of_all = w, rng, share_of_all
        self.count = 0
        self.mac1_key = blake2s(b"mac1----" + w.gateway.static.public).digest()
        self.receive, w.gateway.receive = w.gateway.receive, self._receive

    def _receive(self, payload: bytes, source: Endpoint, local: Endpoint) -> None:
        if self.rng.random() < self.share_of_all:
            self.count += 1
            payload = self._changed(payload, source)
        self.receive(payload, source, local)

    def _changed(self, payload: bytes, source: Endpoint) -> bytes:
        if not payload or len(payload) < 4:
            return payload
        if 0x40 <= payload[0] <= 0x4F:
            inner = self._changed(payload[4:], source=PEER)
            return payload[:2] + len(inner).to_bytes(2) + inner
        try:
            message = stun.parse(payload)
        except Malformed:
            changed = bytearray(mutated(self.rng, payload))
            if len(changed) in {148, 92}:
                changed[-32:-16] = blake2s(bytes(changed[:-32]), key=self.mac1_key, digest_size=16).digest()
            return bytes(changed)
        attributes = [each for each in _attributes(payload) if each[0] not in {0x0008, 0x8028}]
        for _ in range(self.rng.randint(1, 2)):
            self._change_one(attributes)
        message_class = message.message_class if self.rng.random() < 0.9 else self.rng.randrange(4)
        method = message.method if self.rng.random() < 0.95 else self.rng.randrange(12)
        return stun.encode(
            method, message_class, message.transaction_id, attributes, integrity_key=self._key(message, source)
        )

    def _change_one(self, attributes: list[tuple[int, bytes]]) -> None:
        at = self.rng.randrange(len(attributes)) if attributes else 0
        match self.rng.randrange(5):
            case 0 if attributes:
                del attributes[at]
            case 1 if attributes:
                attributes.insert(at, attributes[self.rng.randrange(len(attributes))])
            case 2 if attributes:
                attributes[at] = attributes[at][0], mutated(self.rng, attributes[at][1])[:512]
            case 3 if attributes:
                attributes[at] = self.rng.choice(ATTRIBUTES), attributes[at][1]
            case _:
                code = self.rng.choice([300, 400, 401, 403, 437, 438, 440, 441, 442, 443, 486, 487, 500, 508])
                attributes.append(
                    self.rng.choice([
                        (9, stun.error_code(code, "?")),
                        (0x25, b""),
                        (0x0D, self.rng.choice([0, 1, 600, 2**32 - 1]).to_bytes(4)),
                        (0x15, self.rng.randbytes(8)),
                        (0x16, self.rng.randbytes(8)),
                        (0x20, self.rng.randbytes(8)),
                    ])
                )  # fmt: skip

    def _key(self, message: stun.Message, source: Endpoint) -> bytes:
        for relay in self.w.relays:
            if source in (relay.v4, relay.v6):
                return stun.long_term_key("gateway", "firezone", relay.password("gateway"))
        client = self.w.client
        credentials = client.gateway_credentials if message.message_class == 0 else client.credentials
        return credentials.password.reveal().encode()


def _attributes(payload: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 20
    while at < len(payload):
        kind, length = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 4])
        found.append((kind, payload[at + 4 : at + 4 + length]))
        at += 4 + (length + 3) // 4 * 4
    return found


def test_peers_and_relays_with_the_right_keys_may_say_anything():
    """Clients and relays that are out of their mind, until they are not any more."""
    rng = random.Random(SEED)
    w = world(gateway=rng.choice(["public", "symmetric"]), client=rng.choice(["nat", "symmetric"]), ipv6=True).start()
    w.connect()
    tampering = Tampering(w, rng, 0.3)
    while tampering.count < share(MUTATIONS, 5):
        w.net.run(rng.choice([0.1, 1.0, 5.0]))
        if w.connection is None or w.client.node.connection("gateway") is None:
            w.client.node.drop("gateway")
            w.authorize()
        w.client.send(udp(source=w.client.ipv4, destination=SERVER))
        w.gateway.read_tun(udp(source=SERVER, destination=w.client.ipv4, sport=53, dport=50000))
        w.gateway.written()
        if rng.random() < 0.02:
            w.gateway.portal(w.init())
            w.relays_presence(w.relays[0], gone=[w.relays[1]])
        if rng.random() < 0.1:
            assert_bounded(w)
            w.net.log.clear()
    tampering.share_of_all = 0.0
    w.gateway.portal(w.init())
    deadline = w.net.now + 120.0
    while not w.traffic_flows():
        assert w.net.now < deadline
        w.net.run(1.0)
        if w.client.node.connection("gateway") is None:
            w.authorize()
            w.net.run(2.0)
    assert_bounded(w)
