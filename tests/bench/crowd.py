"""Many clients in one process, for the figures that need them: `python -m tests.bench.crowd`, run by a `Crowd`.

A member is what the gateway sees of a client: a key, ICE credentials, a tunnel address. All share one UDP socket, one
TUN and one packet engine, and are told by the portal's orders who they are. Requests come over standard input as in
`outpost`. It lives beside the gateway, without a NAT between.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from fzg.dataplane.engine import Datagram, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.dataplane.select import make_engine
from fzg.host import tun, udp
from fzg.ice import binding
from fzg.ice.role import Role
from fzg.sansio import Transmit
from fzg.secret import Secret
from fzg.wire import Malformed, ip, stun
from fzg.wire.endpoint import Endpoint
from fzg.wire.wireguard import MessageType, classify, receiver_index
from fzg.wireguard.index import IndexAllocator
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.peer import Peer

TUN = "tun-crowd"
_TICK_S = 0.1  # between looks at timers and unfinished business
_JOIN_AGAIN_S = 0.5
_PRIORITY = 1_862_270_975  # of a peer-reflexive candidate
_AGES_S = 1e9  # a flow of a client need not be decided again
_CHECKS_KEPT = 10_000  # some of which were not answered
_JOINING_PER_TICK = 9  # members: a gateway answers 100 handshakes a second, then asks for cookies


class Identity(NamedTuple):
    """What a member must know, as JSON carries it."""

    private_key: str
    gateway_key: str
    gateway: tuple[str, int]
    preshared_key: str
    ipv4: str
    own: tuple[str, str]
    """ICE user name and password."""
    theirs: tuple[str, str]


class _Member:
    def __init__(self, number: int, identity: Identity, crowd: _Crowd, now: float) -> None:
        self.number = number
        self.ipv4 = IPv4Address(identity.ipv4).packed
        self.own, self.theirs = identity.own, identity.theirs
        self.gateway = Endpoint.of(*identity.gateway)
        self.is_answered = False
        self.has_session = False
        self.tried_at = 0.0
        index = crowd.indices.next(crowd.by_index)
        crowd.by_index[index] = self
        self.peer = Peer(
            static=KeyPair.of(Secret(base64.b64decode(identity.private_key))),
            remote_public=base64.b64decode(identity.gateway_key),
            preshared_key=Secret(base64.b64decode(identity.preshared_key)),
            connection_index=index,
            peer=number,
            engine=crowd.engine,
            random=os.urandom,
            unix_offset=time.time() - now,
            now=now,
        )
        crowd.engine.set_path(number, None, self.gateway, None)

    def check(self, transaction_id: bytes) -> bytes:
        """A nominating ICE check."""
        return binding.request(
            transaction_id,
            username=f"{self.theirs[0]}:{self.own[0]}",
            key=self.theirs[1].encode(),
            role=Role.CONTROLLING,
            tie_breaker=1,
            priority=_PRIORITY,
            nominate=True,
        )


class _Crowd:
    def __init__(self) -> None:
        self.engine: Any = make_engine()
        self.indices = IndexAllocator(os.urandom)
        self.members: list[_Member] = []
        self.by_index: dict[int, _Member] = {}
        self.by_ipv4: dict[bytes, _Member] = {}
        self.by_ufrag: dict[str, _Member] = {}
        self.waiting: list[_Member] = []
        self.checks: dict[bytes, _Member] = {}
        self.counts: Counter[str] = Counter()
        self.probing: tuple[float, float, int] | None = None  # until, interval, number of the next
        self.probe_at = 0.0
        opened = udp.open_socket(socket.AF_INET, mark=None)
        self.socket = opened.socket
        self.engine.attach_udp(socket.AF_INET, opened.socket, port=opened.port)
        device = tun.open_tun(name=TUN)
        self.tun = device.descriptor
        self.engine.attach_tun(device.descriptor, offloads=device.offloads)

    def run(self) -> None:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self.socket.fileno(), select.POLLIN)
        poll.register(self.tun, select.POLLIN)
        pending, tick_at, reading = b"", 0.0, True
        while True:
            soon = self.probe_at if self.probing else tick_at
            backlog = reading and any(map(self.has_backlog, (socket.AF_INET, None)))
            timeout = 0 if backlog else max(0.0, min(tick_at, soon) - _now()) * 1000
            ready = dict(poll.poll(timeout))
            now = _now()
            if 0 in ready:
                octets = os.read(0, 1 << 20)
                if not octets:
                    return
                *lines, pending = (pending + octets).split(b"\n")
                for line in lines:
                    self.order(line)
            if ready.get(self.socket.fileno(), 0) & select.POLLIN or self.has_backlog(socket.AF_INET):
                self.dispatch(self.engine.receive_udp(socket.AF_INET, now), now)
            if reading and (ready.get(self.tun, 0) & select.POLLIN or self.has_backlog(None)):
                self.dispatch(self.engine.receive_tun(now), now)
            if self.probing and now >= self.probe_at:
                self.probe(now)
            if now >= tick_at:
                tick_at = now + _TICK_S
                self.tick(now)
            # What was refused is written before more is read from the other side.
            reading = bool(self.engine.flush())
            congested = set() if reading else set(self.engine.congested())
            poll.modify(self.tun, (select.POLLIN if reading else 0) | select.POLLOUT * (self.tun in congested))
            poll.modify(self.socket.fileno(), select.POLLIN | select.POLLOUT * (self.socket.fileno() in congested))

    def has_backlog(self, family: int | None) -> bool:
        """Whether the engine holds packets of an earlier turn."""
        held: bool = self.engine.has_backlog(family)
        return held

    def order(self, line: bytes) -> None:
        arguments = json.loads(line)
        try:
            answer = {"ok": getattr(self, "op_" + arguments.pop("op"))(**arguments)}
        except Exception as error:
            answer = {"error": repr(error)}
        os.write(1, json.dumps(answer).encode() + b"\n")

    def dispatch(self, items: Any, now: float) -> None:
        for item in items:
            match item:
                case Datagram(payload=payload, source=source):
                    self.handle_datagram(payload, source, now)
                case SessionConfirmed(local_index=index):
                    self.by_index[index >> 8].peer.handle_session_confirmed(index, now)
                case InnerPacket(peer=peer, packet=packet):
                    self.install(self.members[peer - 1], packet, inbound=True)
                    self.engine.write_tun(packet)
                case OutboundPacket(packet=packet):
                    self.handle_outbound(packet, now)

    def handle_datagram(self, payload: bytes, source: Endpoint, now: float) -> None:
        kind = classify(payload)
        if kind is MessageType.RESPONSE:
            member = self.by_index.get(receiver_index(payload) >> 8)
            if member is not None and member.peer.handle_response(payload, now):
                member.has_session = True
                self.counts["handshakes"] += 1
                self.settle(member)
            return
        if kind is MessageType.COOKIE_REPLY:
            member = self.by_index.get(receiver_index(payload) >> 8)
            if member is not None:
                member.peer.handle_cookie_reply(payload, now)
        if kind is not None:
            self.counts[f"message {kind.name}"] += 1
            return
        try:
            message = stun.parse(payload)
        except Malformed:
            return
        if binding.is_request(message):
            member = self.by_ufrag.get((message.username or "").partition(":")[0])
            if member is not None:
                answer = binding.success(message.transaction_id, mapped=source, key=member.own[1].encode())
                self.engine.transmit(Transmit(source, answer))
        elif binding.is_success(message):
            self.counts["answers"] += 1
            member = self.checks.pop(message.transaction_id, None)
            if member is not None and not member.is_answered:
                member.is_answered = True
                member.peer.initiate(now)
                self.settle(member)

    def handle_outbound(self, packet: bytes, now: float) -> None:
        member = self.by_ipv4.get(packet[12:16]) if packet[0] >> 4 == 4 else None
        if member is None:
            return
        self.install(member, packet, inbound=False)
        sealed = self.engine.seal(member.number, packet, now)
        if sealed is not None:
            self.engine.transmit(Transmit(member.gateway, sealed))

    def install(self, member: _Member, packet: bytes, *, inbound: bool) -> None:
        try:
            parsed = ip.parse(packet)
        except Malformed:
            return
        if parsed.protocol in {6, 17}:
            source_port, destination_port = struct.unpack_from("!HH", packet, parsed.l4_offset)
        elif parsed.protocol == 1 and packet[parsed.l4_offset] in {0, 8}:
            (source_port,) = struct.unpack_from("!H", packet, parsed.l4_offset + 4)
            destination_port = source_port
        else:
            return
        key = (parsed.protocol, bytes(parsed.source), bytes(parsed.destination), source_port, destination_port)
        self.engine.install_flow(
            member.number, key, inbound=inbound, rewrite=None, valid_until=_now() + _AGES_S, token=0
        )

    def check(self, member: _Member) -> None:
        if len(self.checks) > _CHECKS_KEPT:
            self.checks.clear()
        transaction_id = os.urandom(12)
        self.checks[transaction_id] = member
        self.engine.transmit(Transmit(member.gateway, member.check(transaction_id)))

    def settle(self, member: _Member) -> None:
        while (message := member.peer.poll_transmit()) is not None:
            self.engine.transmit(Transmit(member.gateway, message))
        while member.peer.poll_event() is not None:
            pass

    def tick(self, now: float) -> None:
        self.waiting = [member for member in self.waiting if not member.has_session]
        due = (m for m in self.waiting if not m.is_answered and now - m.tried_at > _JOIN_AGAIN_S)
        for member in itertools.islice(due, _JOINING_PER_TICK):
            member.tried_at = now
            self.check(member)
        for member in self.members:
            deadline = member.peer.poll_timeout()
            if deadline is not None and deadline.at <= now:
                member.peer.handle_timeout(now)
                self.settle(member)
        self.engine.sweep(now)

    def probe(self, now: float) -> None:
        """A check or an initiation, in turn, so that neither waits for the other; each round another member."""
        assert self.probing is not None
        until, interval, number = self.probing
        if now >= until:
            self.probing = None
            return
        member = self.members[number // 2 % len(self.members)]
        if number % 2:
            member.peer.initiate(now)
            self.settle(member)
        else:
            self.check(member)
        self.probing = until, interval, number + 1
        self.probe_at = max(self.probe_at + interval / 2, now)

    # -- orders

    def op_join(self, identities: list[list[Any]]) -> None:
        """Become these clients too."""
        now = _now()
        for each in identities:
            member = _Member(len(self.members) + 1, Identity(*each), self, now)
            self.members.append(member)
            self.waiting.append(member)
            self.by_ipv4[member.ipv4] = member
            self.by_ufrag[member.own[0]] = member

    def op_port(self) -> int:
        """Where the gateway finds its members."""
        port: int = self.socket.getsockname()[1]
        return port

    def op_joined(self) -> int:
        """How many have a session."""
        return sum(member.has_session for member in self.members)

    def op_probe(self, seconds: float, interval: float) -> None:
        """Send checks and handshakes for a while."""
        now = _now()
        start = self.probing[2] if self.probing else 2 * self.counts["handshakes"]
        self.probing, self.probe_at = (now + seconds, interval, start), now

    def op_counts(self) -> dict[str, int]:
        """Handshakes done, answers received, and the engine's counters."""
        return {**self.counts, **self.engine.counters()}


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


if __name__ == "__main__":
    _Crowd().run()
    sys.stdout.flush()
