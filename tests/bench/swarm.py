"""Many clients in one process, each with a socket, keys, an ICE agent and a WireGuard peer of its own, and a portal.

Unlike `crowd`, which carries data, a swarm does all that a client does with its connections: candidates, checks,
timers, renewed handshakes, cookies. What it measures is how a gateway bears their number.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import itertools
import os
import socket
import struct
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent

from fzg.dataplane.engine import Datagram, InnerPacket, SessionConfirmed
from fzg.dataplane.pure import PureEngine
from fzg.ice.agent import CLIENT_DEFAULT, CLIENT_IDLE, Agent, Credentials, Role
from fzg.secret import Secret
from fzg.wire import Malformed, candidate, checksum, stun
from fzg.wire.candidate import Kind
from fzg.wire.endpoint import Endpoint
from fzg.wire.wireguard import MessageType, classify
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.peer import HandshakeCompleted, Peer
from tests.lab.derivations import ice_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.scripted_portal import ScriptedPortal

RESOURCE_ID = "99999999-8888-4777-8666-555555555555"
GATEWAY_ID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
EXPIRES = 2_145_916_800
IDLE_AFTER_S = 20.0  # as clients are (connectivity 2.6)
_TICK_S = 0.005
_DATAGRAMS_PER_TURN = 64
_UNREACHABLE = "172.30.1.{}"  # a client's private address, which its gateway checks in vain
_ICMP = struct.Struct("!BBHHH")


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Flight:
    """Echoes of one member that are on their way, by sequence number."""

    sent: dict[int, float] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)


class Member:
    """A client."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        self.swarm = swarm
        self.number = number
        self.id = str(uuid.UUID(int=0x11111111_2222_4333_8444_000000000000 + number))
        self.keys = KeyPair.generate(os.urandom)
        self.preshared_key = os.urandom(32)
        self.ipv4 = bytes((100, 66 + number // 65536, number // 256 % 256, number % 256))
        self.ipv6 = bytes.fromhex("fd0020211111") + bytes(6) + number.to_bytes(4)
        self.credentials = ice_credentials(
            client_id=self.id, client_public_key=_base64(self.keys.public),
            gateway_id=GATEWAY_ID, gateway_public_key=_base64(swarm.gateway_key),
        )  # fmt: skip
        self.socket = swarm.open_socket()
        self.own = Endpoint.of(*self.socket.getsockname())
        self.asked_at = now()
        self.acknowledged_at: float | None = None
        self.established_at: float | None = None
        self.agent: Agent | None = None
        self.peer: Peer | None = None
        self.initiated_at = float("-inf")
        self.armed_at = float("inf")
        self.idle_at = float("inf")
        self.flight = Flight()

    @property
    def authorization(self) -> dict[str, Any]:
        c = self.credentials
        return {
            "ref": self.id,
            "client": {
                "id": self.id, "public_key": _base64(self.keys.public), "preshared_key": _base64(self.preshared_key),
                "ipv4": socket.inet_ntop(socket.AF_INET, self.ipv4),
                "ipv6": socket.inet_ntop(socket.AF_INET6, self.ipv6),
            },
            "resource": {
                "type": "cidr", "id": RESOURCE_ID, "name": "Scale", "address": self.swarm.resource, "filters": [],
            },
            "client_ice_credentials": {"username": c.client_username, "password": c.client_password},
            "gateway_ice_credentials": {"username": c.gateway_username, "password": c.gateway_password},
            "expires_at": EXPIRES,
        }  # fmt: skip

    def begin(self) -> None:
        """The portal passed the gateway's acknowledgement on."""
        moment, c = now(), self.credentials
        self.acknowledged_at = moment
        self.agent = Agent(
            role=Role.CONTROLLING,
            local=Credentials(c.client_username, Secret(c.client_password)),
            remote=Credentials(c.gateway_username, Secret(c.gateway_password)),
            timing=CLIENT_DEFAULT,
            random=os.urandom,
            now=moment,
        )
        self.peer = Peer(
            static=self.keys,
            remote_public=self.swarm.gateway_key,
            preshared_key=Secret(self.preshared_key),
            connection_index=self.number,
            peer=self.number,
            engine=self.swarm.engine,
            random=os.urandom,
            unix_offset=time.time() - moment,
            now=moment,
        )
        self.agent.add_local_candidate(Kind.HOST, self.own, self.own, now=moment)
        private = _UNREACHABLE.format(self.number % 250 + 1)
        lines = [
            f"candidate:1 1 udp 2130706175 {private} {self.own.port} typ host",
            f"candidate:2 1 udp 1686109951 {_host(self.own)} {self.own.port} typ srflx raddr 0.0.0.0 rport 0",
        ]
        self.swarm.push("ice_candidates", {"client_id": self.id, "candidates": lines})
        self.settle(moment)

    def add_candidates(self, lines: list[str]) -> None:
        if self.agent is not None:
            for line in lines:
                self.agent.add_remote_candidate(candidate.parse(line), now())
            self.settle(now())

    def read(self) -> None:
        """What arrived on its socket; called by the hub."""
        moment = now()
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                payload, source = self.socket.recvfrom(2000)
            except BlockingIOError:
                break
            self.handle(payload, Endpoint.of(*source), moment)
        self.settle(moment)

    def handle(self, payload: bytes, source: Endpoint, moment: float) -> None:
        if self.agent is None or self.peer is None:
            return
        match classify(payload):
            case MessageType.RESPONSE:
                self.peer.handle_response(payload, moment)
            case MessageType.COOKIE_REPLY:
                self.swarm.counts["cookies"] += 1
                self.peer.handle_cookie_reply(payload, moment)
            case MessageType.INITIATION:
                self.swarm.counts["initiations of the gateway"] += 1
            case MessageType.DATA:
                for item in self.swarm.engine.handle_datagram(Datagram(payload, source, self.own, 0), moment):
                    match item:
                        case SessionConfirmed(local_index=index):
                            self.peer.handle_session_confirmed(index, moment)
                        case InnerPacket(packet=packet):
                            self.handle_packet(packet)
            case None:
                with contextlib.suppress(Malformed):
                    self.agent.handle_message(stun.parse(payload), source, self.own, moment)

    def handle_packet(self, packet: bytes) -> None:
        """An echo reply."""
        sequence = int.from_bytes(packet[26:28])
        sent = self.flight.sent.pop(sequence, None)
        if sent is not None:
            self.flight.took.append((time.perf_counter() - sent) * 1000)

    def echo(self, sequence: int) -> None:
        """Ping the resource through the tunnel."""
        packet = _echo(self.ipv4, self.swarm.resource_ip, self.number & 0xFFFF, sequence & 0xFFFF)
        sealed = self.swarm.engine.seal(self.number, packet, now())
        path = self.agent.path if self.agent is not None else None
        if sealed is not None and path is not None:
            self.flight.sent[sequence & 0xFFFF] = time.perf_counter()
            self.send(sealed, path.destination)

    def settle(self, moment: float) -> None:
        """Send what agent and WireGuard have to say, and be woken for the rest."""
        agent, peer = self.agent, self.peer
        if agent is None or peer is None:
            return
        agent.handle_timeout(moment)
        while agent.poll_event() is not None:
            if (
                agent.path is not None
                and self.established_at is None
                and not self.swarm.engine.activity(self.number).last_sent
            ):
                peer.initiate(moment)
        while (check := agent.poll_transmit()) is not None:
            self.send(check.payload, check.destination)
        while (message := peer.poll_transmit()) is not None:
            if agent.path is not None:
                self.send(message, agent.path.destination)
        while (done := peer.poll_event()) is not None:
            if isinstance(done, HandshakeCompleted) and self.established_at is None:
                self.established_at = moment
                self.idle_at = moment + IDLE_AFTER_S
        self.arm()

    def arm(self) -> None:
        assert self.agent is not None
        assert self.peer is not None
        soonest = min(
            (each.at for each in (self.agent.poll_timeout(), self.peer.poll_timeout()) if each), default=float("inf")
        )
        soonest = min(soonest, self.idle_at)
        if soonest < self.armed_at:
            self.armed_at = soonest
            heapq.heappush(self.swarm.heap, (soonest, self.number))

    def wake(self, moment: float) -> None:
        self.armed_at = float("inf")
        if self.agent is None or self.peer is None:
            return
        if moment >= self.idle_at:
            self.idle_at = float("inf")
            self.agent.set_timing(CLIENT_IDLE, moment)
        self.peer.handle_timeout(moment)
        self.settle(moment)

    def send(self, payload: bytes, destination: Endpoint) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendto(payload, (_host(destination), destination.port))


class Swarm:
    """Clients at `address`, the portal that introduces them, and what became of them."""

    def __init__(
        self, *, portal: ScriptedPortal, gateway_key: bytes, resource: str, open_socket: Callable[[], socket.socket]
    ) -> None:
        self.portal = portal
        self.gateway_key = gateway_key
        self.resource = resource
        self.resource_ip = socket.inet_aton(resource.partition("/")[0])
        self.open_socket = open_socket
        self.engine = PureEngine()
        self.members: dict[int, Member] = {}
        self.by_id: dict[str, Member] = {}
        self.counts: Counter[str] = Counter()
        self.heap: list[tuple[float, int]] = []
        self._numbers = itertools.count(1)
        self._watchers: list[Any] = []
        portal.on_frame = self.handle_frame
        self._timer = gevent.spawn(self._run_timer)

    def close(self) -> None:
        self._timer.kill()
        for watcher in self._watchers:
            watcher.stop()
        for member in self.members.values():
            member.socket.close()

    def push(self, event: str, payload: dict[str, Any]) -> None:
        self.portal.connections[-1].push(event, payload)

    def invite(self) -> Member:
        """The portal authorizes a new client."""
        member = Member(self, next(self._numbers))
        self.members[member.number] = member
        self.by_id[member.id] = member
        watcher = gevent.get_hub().loop.io(member.socket.fileno(), 1)
        watcher.start(member.read)
        self._watchers.append(watcher)
        member.asked_at = now()
        self.push("create_authorization", member.authorization)
        return member

    def invite_at(self, rate: float, count: int) -> list[Member]:
        """So many clients, so many a second."""
        began, invited = now(), []
        for number in range(count):
            gevent.sleep(max(0.0, began + number / rate - now()))
            invited.append(self.invite())
        return invited

    def handle_frame(self, frame: dict[str, Any]) -> None:
        payload = frame["payload"]
        match frame["event"]:
            case "authorization_created":
                self.by_id[payload["ref"]].begin()
            case "broadcast_ice_candidates":
                (client_id,) = payload["client_ids"]
                self.by_id[client_id].add_candidates(payload["candidates"])
            case "broadcast_invalidated_ice_candidates":
                self.counts["invalidations"] += 1

    def wait(self, members: list[Member], seconds: float) -> list[Member]:
        """Wait until all are connected, or no longer; those that are not."""
        end = now() + seconds
        while now() < end and any(member.established_at is None for member in members):
            gevent.sleep(0.01)
        return [member for member in members if member.established_at is None]

    def echoes(self, members: list[Member], *, per_second: float, seconds: float) -> tuple[list[float], float]:
        """Round trips through the tunnel in ms, and the share that got lost."""
        for member in members:
            member.flight = Flight()
        began, sent = now(), 0
        for sequence in range(int(per_second * seconds)):
            for position, member in enumerate(members):
                gevent.sleep(max(0.0, began + (sequence + position / len(members)) / per_second - now()))
                member.echo(sequence)
                sent += 1
        gevent.sleep(1.0)
        took = [each for member in members for each in member.flight.took]
        return took, 1 - len(took) / sent

    def _run_timer(self) -> None:
        while True:
            gevent.sleep(_TICK_S)
            moment = now()
            while self.heap and self.heap[0][0] <= moment:
                at, number = heapq.heappop(self.heap)
                member = self.members[number]
                if member.armed_at == at:
                    member.wake(moment)
                elif member.armed_at <= moment:
                    continue


def percentile(values: list[float], share: float) -> float:
    """The value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("inf")


def _echo(source: bytes, destination: bytes, identifier: int, sequence: int) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 36, 0, 0x4000, 64, 1, 0) + source + destination
    body = _ICMP.pack(8, 0, 0, identifier, sequence) + b"scaling!"
    head = head[:10] + checksum.internet_checksum(head).to_bytes(2) + head[12:]
    return head + body[:2] + checksum.internet_checksum(body).to_bytes(2) + body[4:]


def _host(endpoint: Endpoint) -> str:
    return socket.inet_ntop(endpoint.family, endpoint.ip)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
