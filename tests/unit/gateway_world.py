"""An Internet in memory: the gateway's core, clients, relays, NATs, a virtual clock, and a portal that notes all."""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from fzg import pumps
from fzg.dataplane.engine import Datagram, InnerPacket, SessionConfirmed
from fzg.dataplane.pure import PureEngine
from fzg.gateway import ConfigureHost, ConfigureUploads, Gateway, KeepToken, Resolve, SendToPortal
from fzg.ice.agent import CLIENT_DEFAULT, CLIENT_IDLE, Credentials, Role
from fzg.node.node import ConnectionEstablished, ConnectionFailed, Node
from fzg.portal import messages
from fzg.secret import Secret
from fzg.tunnel.flow_record import FlowRecord
from fzg.tunnel.tunnel import Tunnel
from fzg.turn.events import Relay
from fzg.wire import candidate as candidate_line
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.keys import KeyPair
from tests.unit.dataplane_world import FakeUdp, udp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

UNIX_START = 1_790_000_000.0
CLIENT_ID = "11111111-2222-4333-8444-555555555555"
RESOURCE_ID = "99999999-8888-4777-8666-555555555555"
GATEWAY_V4, GATEWAY_V6 = bytes((100, 71, 4, 9)), bytes.fromhex("fd00202111110000000000000a000017")
CLIENT_V4, CLIENT_V6 = bytes((100, 66, 1, 2)), bytes.fromhex("fd002021111100000000000000010002")
RELAY_IDS = (
    "2a8abfa8-cb99-4629-8437-854193ca6bca",
    "5b1d0c66-3a6e-4a0e-8c55-0e9f0d9a7c31",
    "7c6a4d1e-90ab-4cde-8f01-23456789abcd",
    "8d7b5e2f-01bc-4def-9012-3456789abcde",
)
SERVER, SERVER_2 = bytes((10, 0, 0, 5)), bytes((192, 168, 7, 5))
PORT = 52625
SETTLED = 0.1
"""Seconds after which every packet in flight has arrived."""


class Nat:
    """One public address for private ones; `symmetric` takes another port for each destination."""

    def __init__(self, public: str, *, symmetric: bool = False) -> None:
        self.public = ip_address(public).packed
        self.symmetric = symmetric
        self.out: dict[tuple, Endpoint] = {}
        self.back: dict[Endpoint, tuple[Endpoint, set[Endpoint]]] = {}
        self.taken: set[int] = set()
        """Public ports that another host behind the NAT holds."""
        self._ports = itertools.count(20_000)

    def outgoing(self, source: Endpoint, destination: Endpoint) -> Endpoint:
        key = (source, destination) if self.symmetric else (source,)
        mapped = self.out.get(key)
        if mapped is None:
            preserved = Endpoint(self.public, source.port)
            free = not self.symmetric and preserved not in self.back and source.port not in self.taken
            port = source.port if free else next(self._ports)
            mapped = self.out[key] = Endpoint(self.public, port)
            self.back[mapped] = (source, set())
        self.back[mapped][1].add(destination)
        return mapped

    def incoming(self, source: Endpoint, destination: Endpoint) -> Endpoint | None:
        """Address and port dependent filtering: only who was sent to may answer."""
        inside, seen = self.back.get(destination, (None, set()))
        return inside if source in seen else None

    def rebind(self) -> None:
        """Forget all mappings, as a reboot does; new ones get new ports."""
        self.out.clear()
        self.back.clear()
        self._ports = itertools.count(next(self._ports) + 1000)


class Net:
    """Delivers datagrams after `latency`, in order; `lose` and `lateness` decide about each."""

    def __init__(self, *, latency: float = 0.001) -> None:
        self.now = 1000.0
        self.latency = latency
        self.hosts: dict[bytes, Host] = {}
        self.nats: dict[bytes, Nat] = {}
        self.parties: list[Party] = []
        self.lose: Callable[[Endpoint, Endpoint, bytes], bool] = lambda source, destination, payload: False
        self.lateness: Callable[[], Iterable[float]] = lambda: (0.0,)
        """Seconds after `latency` at which each copy of the next datagram arrives."""
        self.log: list[tuple[float, Endpoint, Endpoint, bytes]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()

    def at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (moment, next(self._serial), action))

    def send(self, source: Endpoint, destination: Endpoint, payload: bytes, nat: Nat | None) -> None:
        if nat is not None:
            source = nat.outgoing(source, destination)
        self.log.append((self.now, source, destination, payload))
        if self.lose(source, destination, payload):
            return
        for late in self.lateness():
            self.at(self.now + self.latency + late, lambda: self._arrive(source, destination, payload))

    def _arrive(self, source: Endpoint, destination: Endpoint, payload: bytes) -> None:
        nat = self.nats.get(destination.ip)
        if nat is not None:
            inside = nat.incoming(source, destination)
            if inside is None:
                return
            destination = inside
        host = self.hosts.get(destination.ip)
        if host is not None:
            host.receive(payload, source, destination)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        spins = 0
        while True:
            timers = [(deadline.at, party) for party in self.parties if (deadline := party.poll_timeout()) is not None]
            party_at, party = min(timers, key=lambda timer: timer[0], default=(float("inf"), None))
            packet_at = self._queue[0][0] if self._queue else float("inf")
            following = min(party_at, packet_at)
            if following > end:
                break
            spins = 0 if following > self.now else spins + 1
            assert spins < 20_000, f"spinning on {party.poll_timeout() if party else None}"
            self.now = max(following, self.now)
            if packet_at <= party_at:
                heapq.heappop(self._queue)[2]()
            else:
                before = party.poll_timeout()
                party.handle_timeout()
                after = party.poll_timeout()
                assert after != before or after.at > self.now, f"deadline does not move: {after}"
        self.now = end

    def run_until(self, condition: Callable[[], object], limit: float = 30.0) -> float:
        """Run until the condition holds; returns how long it took."""
        start = self.now
        while not condition():
            assert self.now < start + limit, "condition was never met"
            self.run(0.0005)
        return self.now - start


class Host:
    def receive(self, payload: bytes, source: Endpoint, local: Endpoint) -> None:
        raise NotImplementedError


class MemoryRelay(Host):
    """A TURN server after spec turn 5: any number of users, both families, channels relay data."""

    def __init__(self, net: Net, relay_id: str, v4: str | None = "198.51.100.101", v6: str | None = None) -> None:
        self.net = net
        self.id = relay_id
        self.secret = "secret"
        self.alive = True
        self.v4 = Endpoint.of(v4, 3478) if v4 else None
        self.v6 = Endpoint.of(v6, 3478) if v6 else None
        for endpoint in (self.v4, self.v6):
            if endpoint is not None:
                net.hosts[endpoint.ip] = self
        self.allocations: dict[Endpoint, dict[int, Endpoint]] = {}
        self.owners: dict[Endpoint, Endpoint] = {}
        self.users: dict[str, Endpoint] = {}
        self.channels: dict[tuple[Endpoint, int], Endpoint] = {}
        self.numbers: dict[tuple[Endpoint, Endpoint], int] = {}
        self.count: Counter[int] = Counter()
        self.binds: list[tuple[Endpoint, Endpoint]] = []
        self.forwarded = 0
        self._ports = itertools.count(49152)

    def password(self, username: str) -> str:
        return f"password of {username} {self.secret}"

    def credentials(self, username: str) -> Relay:
        return Relay(self.id, self.v4, self.v6, username, Secret(self.password(username)))

    def listed(self, username: str) -> messages.Relay:
        return messages.Relay(
            id=messages.Id(self.id),
            ipv4=self.v4,
            ipv6=self.v6,
            username=username,
            password=Secret(self.password(username)),
        )

    def restart(self, secret: str) -> None:
        self.secret = secret
        self.allocations.clear()
        self.owners.clear()
        self.users.clear()
        self.channels.clear()
        self.numbers.clear()

    def receive(self, payload: bytes, source: Endpoint, local: Endpoint) -> None:
        if not self.alive or not payload:
            return
        if local in self.owners:
            self._from_peer(payload, source, local)
        elif local not in (self.v4, self.v6):
            return  # to a former allocation
        elif payload[0] >= 0x40:
            self._from_client(payload, source)
        else:
            answer = self._answer(stun.parse(payload), source)
            if answer is not None:
                self.net.send(local, source, answer, None)

    def _from_peer(self, payload: bytes, source: Endpoint, local: Endpoint) -> None:
        client = self.owners[local]
        number = self.numbers.get((client, source))
        if number is not None:
            self.forwarded += 1
            reply_from = self.v4 if client.is_ipv4 else self.v6
            assert reply_from is not None
            self.net.send(reply_from, client, struct.pack("!HH", number, len(payload)) + payload, None)

    def _from_client(self, payload: bytes, source: Endpoint) -> None:
        number, length = struct.unpack_from("!HH", payload)
        peer = self.channels.get((source, number))
        if peer is not None and length == len(payload) - 4:
            self.forwarded += 1
            self.net.send(self.allocations[source][len(peer.ip)], peer, payload[4:], None)

    def _answer(self, request: stun.Message, client: Endpoint) -> bytes | None:
        method, transaction_id = request.method, request.transaction_id
        self.count[method] += 1
        key: bytes | None = None

        def respond(kind: int, *attributes: tuple[int, bytes]) -> bytes:
            return stun.encode(method, kind, transaction_id, attributes, integrity_key=key)

        if method == 1:
            return respond(2, (0x20, stun.xor_address(client, transaction_id)))
        nonce = f"nonce {client} {self.secret}".encode()
        if not request.has_integrity or request.username is None or request.nonce is None:
            return respond(3, (9, stun.error_code(401, "Unauthorized")), (0x14, b"firezone"), (0x15, nonce))
        key = stun.long_term_key(request.username, "firezone", self.password(request.username))
        if request.nonce != nonce:
            return respond(3, (9, stun.error_code(438, "Stale Nonce")), (0x14, b"firezone"), (0x15, nonce))
        if not request.verify_integrity(key):
            return respond(3, (9, stun.error_code(401, "Unauthorized")), (0x14, b"firezone"), (0x15, nonce))
        if method == 3:
            return self._allocate(request, client, respond)
        if client not in self.allocations:
            return respond(3, (9, stun.error_code(437, "Allocation Mismatch")))
        if method == 4:
            if request.lifetime == 0:
                self._delete(client)
            return respond(2, (0x0D, struct.pack("!I", 0 if request.lifetime == 0 else 600)))
        peer, number = request.xor_peer_address, request.channel_number
        assert method == 9
        assert peer is not None
        assert number is not None
        self.binds.append((client, peer))
        if len(peer.ip) not in self.allocations[client]:
            return respond(3, (9, stun.error_code(443, "Peer Address Family Mismatch")))
        if self.channels.get((client, number), peer) != peer or self.numbers.get((client, peer), number) != number:
            return respond(3, (9, stun.error_code(400, "Bad Request")))
        self.channels[client, number] = peer
        self.numbers[client, peer] = number
        return respond(2)

    def _allocate(self, request: stun.Message, client: Endpoint, respond: Callable[..., bytes]) -> bytes:
        if client in self.allocations:
            return respond(3, (9, stun.error_code(437, "Allocation Mismatch")))
        assert request.username is not None
        if (old := self.users.get(request.username)) is not None:
            self._delete(old)
        port = next(self._ports)
        families = [self.v4] if self.v4 else []
        if self.v6 and (request.get(0x8000) or not families):
            families.append(self.v6)
        relayed = {len(own.ip): Endpoint(own.ip, port) for own in families}
        self.allocations[client] = relayed
        self.users[request.username] = client
        for address in relayed.values():
            self.owners[address] = client
        attributes = [(0x16, stun.xor_address(address, request.transaction_id)) for address in relayed.values()]
        return respond(
            2, *attributes, (0x20, stun.xor_address(client, request.transaction_id)), (0x0D, struct.pack("!I", 600))
        )

    def _delete(self, client: Endpoint) -> None:
        for address in self.allocations.pop(client, {}).values():
            del self.owners[address]
        self.channels = {key: peer for key, peer in self.channels.items() if key[0] != client}
        self.numbers = {key: number for key, number in self.numbers.items() if key[0] != client}


class Socket(FakeUdp):
    """A UDP socket of a party: what is sent goes to the net."""

    def __init__(self, party: Party, address: bytes) -> None:
        super().__init__()
        self.party = party
        self.own = Endpoint(address, PORT)
        self.refuse = lambda sent: errno.EINVAL if sent.source and sent.source not in party.addresses else 0

    def sendmsg(self, payloads, ancillary, flags, address) -> int:
        octets = super().sendmsg(payloads, ancillary, flags, address)
        sent = self.sent.pop()
        source = Endpoint(sent.source, PORT) if sent.source else self.own
        nat = self.party.nat if source.is_ipv4 else None
        for datagram in sent.datagrams:
            self.party.net.send(source, Endpoint.of(*address[:2]), datagram, nat)
        return octets


class Party(Host):
    """A process: engine, sockets, and a TUN whose other end the test holds."""

    def __init__(
        self, net: Net, addresses: list[str], nat: Nat | None, seed: int, make_engine: Callable[[], Any] = PureEngine
    ) -> None:
        self.net = net
        self.nat = nat
        self.random = random.Random(seed).randbytes
        self.engine = make_engine()
        self.static = KeyPair.generate(self.random)
        self.addresses = [ip_address(text).packed for text in addresses]
        self.sockets: dict[int, Socket] = {}
        for packed in self.addresses:
            net.hosts[packed] = self
            family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            self.sockets[len(packed)] = Socket(self, packed)
            attach = getattr(self.engine, "play_udp", self.engine.attach_udp)
            attach(family, self.sockets[len(packed)], port=PORT)
        if nat is not None:
            net.nats[nat.public] = nat
        self.tun, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.engine.attach_tun(self.tun.fileno())
        net.parties.append(self)

    @property
    def now(self) -> float:
        return self.net.now

    def renumber(self, address: str) -> None:
        """The host gets another address of this family in place of the one it had; nobody is told."""
        packed = ip_address(address).packed
        at = next(i for i, old in enumerate(self.addresses) if len(old) == len(packed))
        del self.net.hosts[self.addresses[at]]
        self.addresses[at] = packed
        self.net.hosts[packed] = self
        self.sockets[len(packed)].own = Endpoint(packed, PORT)

    def receive(self, payload: bytes, source: Endpoint, local: Endpoint) -> None:
        self.dispatch(self.engine.handle_datagram(Datagram(payload, source, local, 0), self.now))

    def read_tun(self, packet: bytes) -> None:
        """The host sends an IP packet into the tunnel."""
        self.kernel.send(bytes(10) + packet)
        self.dispatch(self.engine.receive_tun(self.now))

    def written(self) -> list[bytes]:
        """What came out of the tunnel since the last call."""
        packets = []
        while True:
            try:
                packets.append(self.kernel.recv(1 << 17)[10:])
            except BlockingIOError:
                return packets

    def close(self) -> None:
        self.tun.close()
        self.kernel.close()


class GatewayParty(Party):
    def __init__(
        self,
        net: Net,
        addresses: list[str],
        nat: Nat | None = None,
        *,
        seed: int = 1,
        make_engine: Callable[[], Any] = PureEngine,
    ) -> None:
        super().__init__(net, addresses, nat, seed, make_engine)
        node = Node(static=self.static, engine=self.engine, random=self.random, unix_offset=UNIX_START, now=self.now)
        self.core = Gateway(
            node=node,
            tunnel=Tunnel(now=self.now, unix_offset=UNIX_START),
            engine=self.engine,
            unix_offset=UNIX_START,
            now=self.now,
        )
        self.node = node
        self.frames: list[tuple[float, messages.Outbound]] = []
        self.resolutions: list[Resolve] = []
        self.configured: list[ConfigureHost] = []
        self.flow_logs: list[ConfigureUploads | KeepToken | FlowRecord] = []
        self.on_frame: Callable[[messages.Outbound], None] = lambda message: None

    def poll_timeout(self):
        return self.core.poll_timeout()

    def handle_timeout(self) -> None:
        self.core.handle_timeout(self.now)
        self.drain()

    def portal(self, message: messages.Inbound) -> None:
        self.core.handle_portal_message(message, self.now)
        self.drain()

    def dispatch(self, items) -> None:
        pumps.dispatch(self.core, items, self.now)
        self.drain()

    def drain(self) -> None:
        while (transmit := self.core.poll_transmit()) is not None:
            self.engine.transmit(transmit)
        self.engine.flush()
        while (event := self.core.poll_event()) is not None:
            match event:
                case SendToPortal(message=message):
                    self.frames.append((self.now, message))
                    self.on_frame(message)
                case Resolve():
                    self.resolutions.append(event)
                case ConfigureHost():
                    self.configured.append(event)
                case ConfigureUploads() | KeepToken() | FlowRecord():
                    self.flow_logs.append(event)

    def said(self, kind: type) -> list:
        return [message for _, message in self.frames if isinstance(message, kind)]


class ClientParty(Party):
    """Controlling side: sends its candidates, initiates on nomination, keeps what it receives."""

    def __init__(self, net: Net, addresses: list[str], nat: Nat | None = None, *, number: int = 1) -> None:
        super().__init__(net, addresses, nat, seed=1 + number)
        self.client_id = f"{number:08x}{CLIENT_ID[8:]}" if number > 1 else CLIENT_ID
        self.gateway_credentials = Credentials(f"wxy{number:x}", Secret(f"gatewaypasswordaaaaa{number:02d}"))
        self.credentials = Credentials(f"abc{number:x}", Secret(f"clientpasswordbbbbbb{number:02d}"))
        self.preshared_key = bytes([number]) * 32
        self.ipv4 = CLIENT_V4[:3] + bytes([CLIENT_V4[3] + number - 1])
        self.ipv6 = CLIENT_V6[:15] + bytes([CLIENT_V6[15] + number - 1])
        self.node = Node(
            static=self.static, engine=self.engine, random=self.random, unix_offset=UNIX_START, now=self.now,
            role=Role.CONTROLLING, timing=CLIENT_DEFAULT, idle_timing=CLIENT_IDLE,
        )  # fmt: skip
        self.received: list[bytes] = []
        self.events: list[tuple[float, object]] = []
        self.on_candidates: Callable[[bool, tuple[str, ...]], None] = lambda added, texts: None

    def poll_timeout(self):
        return self.node.poll_timeout()

    def handle_timeout(self) -> None:
        self.node.handle_timeout(self.now)
        self.drain()

    def dispatch(self, items) -> None:
        for item in items:
            match item:
                case Datagram(payload=payload, source=source, local=local):
                    self.node.handle_datagram(payload, source, local, self.now)
                case SessionConfirmed(local_index=index):
                    self.node.handle_session_confirmed(index, self.now)
                case InnerPacket(packet=packet):
                    self.node.note_activity("gateway", self.now)
                    self.received.append(packet)
        self.drain()

    def send(self, packet: bytes) -> str | None:
        reason = self.node.send("gateway", packet, self.now)
        self.drain()
        return reason

    def drain(self) -> None:
        while (event := self.node.poll_event()) is not None:
            self.events.append((self.now, event))
        while (transmit := self.node.poll_transmit()) is not None:
            self.engine.transmit(transmit)
        self.engine.flush()
        for message in self.node.drain_candidates(self.now):
            self.on_candidates(message.added, message.candidates)

    @property
    def established(self) -> list[ConnectionEstablished]:
        return [event for _, event in self.events if isinstance(event, ConnectionEstablished)]

    @property
    def failed(self) -> list[ConnectionFailed]:
        return [event for _, event in self.events if isinstance(event, ConnectionFailed)]

    @property
    def path(self):
        connection = self.node.connection("gateway")
        return connection.path if connection is not None else None


@dataclass
class World:
    """The usual cast: a gateway, a client or more, relays and a portal that connects them with `portal_delay`."""

    net: Net = field(default_factory=Net)
    portal_delay: float = 0.001
    gateway: GatewayParty = None
    clients: list[ClientParty] = field(default_factory=list)
    relays: list[MemoryRelay] = field(default_factory=list)
    portal_is_up: bool = True

    @property
    def client(self) -> ClientParty:
        return self.clients[0]

    @property
    def connection(self):
        """The first client's connection at the gateway."""
        return self.gateway.node.connection(self.client.client_id)

    def start(self, *, settle: float = 1.0) -> World:
        """`init` for all, and time for the relays to answer."""
        self.gateway.on_frame = self._to_client
        self.gateway.core.handle_portal_connected(self.net.now)
        self.gateway.portal(self.init())
        for client in self.clients:
            self._introduce(client)
        self.net.run(settle)
        return self

    def add_client(self, placement: str = "public", *, started: bool = True) -> ClientParty:
        """Another client with an identity, keys and an address of its own."""
        number = len(self.clients) + 1
        client = ClientParty(
            self.net,
            *_placed(placement, f"203.0.113.{6 + number}", f"172.30.0.{99 + number}", f"2001:db8:7::{99 + number}"),
            number=number,
        )
        self.clients.append(client)
        if started:
            self._introduce(client)
            self.net.run(1.0)
        return client

    def init(self, *, relays: list[MemoryRelay] | None = None, **fields) -> messages.Init:
        listed = self.relays if relays is None else relays
        return messages.Init(
            interface=messages.Interface(ipv4=messages.Ipv4(GATEWAY_V4), ipv6=messages.Ipv6(GATEWAY_V6)),
            relays=messages.Relays(relay.listed("gateway") for relay in listed),
            **fields,
        )

    def authorization(
        self, client: ClientParty | None = None, *, resource: messages.Resource | None = None, **fields
    ) -> messages.CreateAuthorization:
        client = client or self.client
        ours, theirs = client.gateway_credentials, client.credentials
        return messages.CreateAuthorization(
            ref=fields.pop("ref", client.client_id),
            client=messages.Client(
                id=messages.Id(client.client_id),
                public_key=messages.PublicKey(client.static.public),
                preshared_key=Secret(client.preshared_key),
                ipv4=messages.Ipv4(client.ipv4),
                ipv6=messages.Ipv6(client.ipv6),
            ),
            resource=resource or cidr("10.0.0.0/8"),
            gateway_ice_credentials=messages.IceCredentials(username=ours.ufrag, password=ours.password),
            client_ice_credentials=messages.IceCredentials(username=theirs.ufrag, password=theirs.password),
            **fields,
        )

    def authorize(self, client: ClientParty | None = None, **fields) -> None:
        self.gateway.portal(self.authorization(client, **fields))

    def connect(self, client: ClientParty | None = None, *, limit: float = 10.0, **fields) -> float:
        """Authorize and wait until the client may send; returns how long that took."""
        client = client or self.client
        count = len(client.established)
        self.authorize(client, **fields)
        return self.net.run_until(lambda: len(client.established) > count, limit)

    def reject(self, client: ClientParty | None = None, resource_id: str = RESOURCE_ID) -> None:
        client_id = messages.Id((client or self.client).client_id)
        self.gateway.portal(messages.RejectAccess(client_id=client_id, resource_id=messages.Id(resource_id)))

    def relays_presence(self, *connected: MemoryRelay, gone: Iterable[MemoryRelay] = ()) -> None:
        self.gateway.portal(
            messages.RelaysPresence(
                disconnected_ids=tuple(messages.Id(relay.id) for relay in gone),
                connected=messages.Relays(relay.listed("gateway") for relay in connected),
            )
        )

    def candidates(self, *texts: str, client: ClientParty | None = None, added: bool = True) -> None:
        """The portal brings candidates of the client."""
        kind = messages.IceCandidates if added else messages.InvalidateIceCandidates
        client_id = messages.Id((client or self.client).client_id)
        self.gateway.portal(kind(client_id=client_id, candidates=messages.Candidates(texts)))

    def portal_goes(self) -> None:
        self.portal_is_up = False
        self.gateway.core.handle_portal_disconnected(self.net.now)
        self.gateway.drain()

    def portal_returns(self, **fields) -> None:
        self.portal_is_up = True
        self.gateway.core.handle_portal_connected(self.net.now)
        self.gateway.drain()
        self.gateway.portal(self.init(**fields))

    def reaches(self, client: ClientParty | None = None, *, destination: bytes = SERVER) -> bool:
        """Whether a packet of the client arrives behind the gateway, now."""
        client = client or self.client
        packet = udp(source=client.ipv4, destination=destination, payload=os.urandom(8))
        client.send(packet)
        self.net.run(SETTLED)
        return packet in self.gateway.written()

    def answers(self, client: ClientParty | None = None, *, source: bytes = SERVER) -> bool:
        """Whether a packet from behind the gateway arrives at the client, now."""
        client = client or self.client
        packet = udp(source=source, destination=client.ipv4, sport=53, dport=50000, payload=os.urandom(8))
        self.gateway.read_tun(packet)
        self.net.run(SETTLED)
        return packet in client.received

    def traffic_flows(self, client: ClientParty | None = None) -> bool:
        """Whether both directions carry packets: the first of each, and those for which a flow is installed."""
        return all([self.reaches(client), self.answers(client), self.reaches(client), self.answers(client)])

    def close(self) -> None:
        for party in self.net.parties:
            party.close()

    def _introduce(self, client: ClientParty) -> None:
        client.node.update_relays((), [each.credentials(client.client_id) for each in self.relays], self.net.now)
        client.drain()
        client.on_candidates = lambda added, texts: self._to_gateway(client, added, texts)

    def _to_client(self, message: messages.Outbound) -> None:
        moment = self.net.now + self.portal_delay
        match message:
            case messages.AuthorizationCreated(ref=ref) | messages.FlowAuthorized(ref=ref):
                for client in self.clients:
                    if client.client_id == ref:
                        self.net.at(moment, partial(self._authorized, client))
            case messages.BroadcastIceCandidates(client_ids=(client_id,), candidates=texts):
                self.net.at(moment, partial(self._candidates, client_id, texts, added=True))
            case messages.BroadcastInvalidatedIceCandidates(client_ids=(client_id,), candidates=texts):
                self.net.at(moment, partial(self._candidates, client_id, texts, added=False))
            case _:
                pass

    def _authorized(self, client: ClientParty) -> None:
        client.node.upsert(
            "gateway",
            handle=1,
            public_key=self.gateway.static.public,
            preshared_key=Secret(client.preshared_key),
            local=client.credentials,
            remote=client.gateway_credentials,
            now=self.net.now,
        )
        client.drain()

    def _to_gateway(self, client: ClientParty, added: bool, texts: tuple[str, ...]) -> None:
        if self.portal_is_up:
            deliver = partial(self.candidates, *texts, client=client, added=added)
            self.net.at(self.net.now + self.portal_delay, lambda: self.portal_is_up and deliver())

    def _candidates(self, client_id: str, texts: tuple[str, ...], *, added: bool) -> None:
        for client in self.clients:
            if client.client_id == client_id:
                apply = client.node.add_remote_candidate if added else client.node.remove_remote_candidate
                for text in texts:
                    apply("gateway", text, self.net.now)
                client.drain()


def cidr(network: str, *filters: messages.Filter, resource_id: str = RESOURCE_ID) -> messages.CidrResource:
    return messages.CidrResource(
        id=messages.Id(resource_id), address=messages.Cidr(network), name="Lab", filters=messages.Filters(filters)
    )


def world(
    *,
    gateway: str = "public",
    client: str = "public",
    relays: int = 2,
    ipv6: bool = False,
    latency: float = 0.001,
    make_engine: Callable[[], Any] = PureEngine,
) -> World:
    """`gateway` and `client`: public, nat (port-preserving), symmetric. Relays are as near as the latency says.

    `make_engine` makes the gateway's; clients have the one in Python.
    """
    made = World(Net(latency=latency))
    _open.append(made)
    made.relays = [memory_relay(made.net, i, ipv6=ipv6) for i in range(relays)]
    made.gateway = GatewayParty(
        made.net,
        *_placed(gateway, "203.0.113.5", "172.31.0.100", "2001:db8:5::100" if ipv6 else None),
        make_engine=make_engine,
    )
    made.clients = [
        ClientParty(made.net, *_placed(client, "203.0.113.7", "172.30.0.100", "2001:db8:7::100" if ipv6 else None))
    ]
    return made


_open: list[World] = []


@pytest.fixture(autouse=True)
def close_worlds():
    """Import it into a test file, and its worlds give their descriptors back."""
    yield
    while _open:
        _open.pop().close()


def memory_relay(net: Net, number: int, *, ipv6: bool = False) -> MemoryRelay:
    v6 = f"2001:db8:9::{101 + number}" if ipv6 else None
    return MemoryRelay(net, RELAY_IDS[number], f"198.51.100.{101 + number}", v6)


def _placed(placement: str, public: str, private: str, v6: str | None) -> tuple[list[str], Nat | None]:
    extra = [v6] if v6 else []
    if placement == "public":
        return [public, *extra], None
    return [private, *extra], Nat(public, symmetric=placement == "symmetric")


def signalled(party: GatewayParty) -> list[list[str]]:
    """The texts of every candidate message so far."""
    return [list(message.candidates) for message in party.said(messages.BroadcastIceCandidates)]


def withdrawn(party: GatewayParty) -> list[list[str]]:
    """The texts of every message about withdrawn candidates so far."""
    return [list(message.candidates) for message in party.said(messages.BroadcastInvalidatedIceCandidates)]


def kinds(texts) -> list[str]:
    return [candidate_line.parse(text).kind.value for text in texts]


def priorities(texts) -> list[int]:
    return [int(text.split()[3]) for text in texts]


def addresses(texts) -> list[str]:
    return [str(candidate_line.parse(text).address) for text in texts]
