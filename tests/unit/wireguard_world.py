"""Two WireGuard peers, an in-memory link and a virtual clock; with the plainest engine that seals and opens."""

from __future__ import annotations

import random as pseudo
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_scalarmult_base,
)
from nacl.exceptions import CryptoError

from fzg.secret import Secret
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.gate import Admitted, CookieReply, Gate
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.peer import Expired, HandshakeCompleted, Peer, identify
from fzg.wireguard.timers import ICE, Timing

if TYPE_CHECKING:
    from collections.abc import Callable

    from fzg.sansio import Random

START = 1000.0
UNIX_OFFSET = 1_700_000_000.0
INITIATION, RESPONSE, COOKIE, DATA = 1, 2, 3, 4


class Activity(NamedTuple):
    first_unanswered_sent: float = 0.0
    first_unanswered_received: float = 0.0
    current_sent_data: bool = False
    current_received_data: bool = False


@dataclass
class MemorySession:
    peer: int
    remote_index: int
    receive_key: bytes
    send_key: bytes
    counter: int = 0
    confirmed: bool = False
    sent_data: bool = False
    received_data: bool = False
    seen: set[int] = field(default_factory=set)


class Opened(NamedTuple):
    packet: bytes
    confirmed: int | None


class MemorySessions:
    """Seals and opens for any number of peers, with the bookkeeping that the engine's interface promises."""

    def __init__(self) -> None:
        self.sessions: dict[int, MemorySession] = {}
        self.used: dict[int, int | None] = {}
        self.unanswered_sent: dict[int, float] = {}
        self.unanswered_received: dict[int, float] = {}
        self.looks = 0

    def add_session(
        self, peer: int, local_index: int, remote_index: int, *, receive_key: bytes, send_key: bytes, now: float
    ) -> None:
        assert local_index not in self.sessions, "an index in use was given again"
        self.sessions[local_index] = MemorySession(peer, remote_index, receive_key, send_key)

    def use_session(self, peer: int, local_index: int | None) -> None:
        assert local_index is None or local_index in self.sessions
        self.used[peer] = local_index

    def remove_session(self, local_index: int) -> None:
        session = self.sessions.pop(local_index, None)
        if session is not None and self.used.get(session.peer) == local_index:
            self.used[session.peer] = None

    def current(self, peer: int) -> MemorySession | None:
        index = self.used.get(peer)
        return None if index is None else self.sessions[index]

    def seal(self, peer: int, packet: bytes, now: float) -> bytes | None:
        session = self.current(peer)
        if session is None:
            return None
        header = struct.pack("<IIQ", DATA, session.remote_index, session.counter)
        nonce = bytes(4) + struct.pack("<Q", session.counter)
        session.counter += 1
        self.unanswered_received[peer] = 0.0
        if packet:
            session.sent_data = True
            self.unanswered_sent[peer] = self.unanswered_sent.get(peer, 0.0) or now
        return header + crypto_aead_chacha20poly1305_ietf_encrypt(packet, b"", nonce, session.send_key)

    def open(self, datagram: bytes, now: float) -> Opened | None:
        _, index, counter = struct.unpack_from("<IIQ", datagram)
        session = self.sessions.get(index)
        if session is None or counter in session.seen:
            return None
        nonce = bytes(4) + struct.pack("<Q", counter)
        try:
            packet = crypto_aead_chacha20poly1305_ietf_decrypt(datagram[16:], b"", nonce, session.receive_key)
        except CryptoError:
            return None
        session.seen.add(counter)
        self.unanswered_sent[session.peer] = 0.0
        if packet:
            session.received_data = True
            self.unanswered_received[session.peer] = self.unanswered_received.get(session.peer, 0.0) or now
        confirmed = None if session.confirmed else index
        session.confirmed = True
        return Opened(packet, confirmed)

    def activity(self, peer: int) -> Activity:
        self.looks += 1
        session = self.current(peer)
        return Activity(
            self.unanswered_sent.get(peer, 0.0),
            self.unanswered_received.get(peer, 0.0),
            session is not None and session.sent_data,
            session is not None and session.received_data,
        )

    def note_handshake(self, peer: int, *, sent: bool, now: float) -> None:
        if sent:
            self.unanswered_received[peer] = 0.0
        else:
            self.unanswered_sent[peer] = 0.0


class Logged(NamedTuple):
    at: float
    sender: str
    kind: int
    datagram: bytes


class Host:
    """What a node does around a peer: gate, demultiplexing, engine."""

    def __init__(
        self,
        name: str,
        *,
        private: bytes,
        remote_public: bytes,
        psk: bytes,
        index: int,
        random: Random,
        timing: Timing = ICE,
        now: float = START,
    ) -> None:
        self.name = name
        self.static = KeyPair.of(Secret(private))
        self.engine = MemorySessions()
        self.gate = Gate(static_public=self.static.public, random=random, now=now)
        self.source = Endpoint(bytes((192, 0, 2, index & 0xFF)), 40000)
        self.received: list[bytes] = []
        self.events: list[HandshakeCompleted | Expired] = []
        self.answers: list[bytes] = []
        self.wakes: list[float] = []
        self.peer = Peer(
            static=self.static,
            remote_public=remote_public,
            preshared_key=Secret(psk),
            connection_index=index,
            peer=7,
            engine=self.engine,
            random=random,
            unix_offset=UNIX_OFFSET,
            now=now,
            timing=timing,
        )

    def handle(self, datagram: bytes, source: Endpoint, now: float) -> None:
        match datagram[0]:
            case 1 | 2:
                verdict = self.gate.admit(datagram, source, now)
                if isinstance(verdict, CookieReply):
                    self.answers.append(verdict.message)
                elif isinstance(verdict, Admitted):
                    if datagram[0] == RESPONSE:
                        self.peer.handle_response(datagram, now)
                    elif (partial := identify(self.static, datagram)) is not None:
                        self.peer.handle_initiation(partial, now)
            case 3:
                self.peer.handle_cookie_reply(datagram, now)
            case 4:
                opened = self.engine.open(datagram, now)
                if opened is None:
                    return
                if opened.confirmed is not None:
                    self.peer.handle_session_confirmed(opened.confirmed, now)
                if opened.packet:
                    self.received.append(opened.packet)

    def send(self, packet: bytes, now: float) -> bytes | None:
        return self.engine.seal(self.peer._peer, packet, now)

    def drain(self) -> list[bytes]:
        out, self.answers = self.answers, []
        while (message := self.peer.poll_transmit()) is not None:
            out.append(message)
        while (event := self.peer.poll_event()) is not None:
            self.events.append(event)
        return out

    @property
    def expired(self) -> bool:
        return any(isinstance(event, Expired) for event in self.events)


class World:
    """A client and a gateway over a link without delay. `passes(logged)` decides what arrives."""

    def __init__(self, *, seed: int = 1, client_psk: bytes = b"\x55" * 32, timing: Timing = ICE) -> None:
        random = pseudo.Random(seed).randbytes
        client_private, gateway_private = b"\x11" * 32, b"\x22" * 32
        self.now = START
        self.client = Host(
            "client",
            private=client_private,
            remote_public=crypto_scalarmult_base(gateway_private),
            psk=client_psk,
            index=0xABC,
            random=random,
            timing=timing,
        )
        self.gateway = Host(
            "gateway",
            private=gateway_private,
            remote_public=crypto_scalarmult_base(client_private),
            psk=b"\x55" * 32,
            index=0x123456,
            random=random,
            timing=timing,
        )
        self.log: list[Logged] = []
        self.passes: Callable[[Logged], bool] = lambda _: True

    def cut(self) -> None:
        self.passes = lambda _: False

    def heal(self) -> None:
        self.passes = lambda _: True

    def other(self, host: Host) -> Host:
        return self.gateway if host is self.client else self.client

    def carry(self, host: Host, datagram: bytes) -> None:
        logged = Logged(self.now, host.name, datagram[0], datagram)
        self.log.append(logged)
        if self.passes(logged):
            self.other(host).handle(datagram, host.source, self.now)

    def settle(self) -> None:
        """Carry messages until both sides are silent."""
        busy = True
        while busy:
            busy = False
            for host in (self.client, self.gateway):
                for datagram in host.drain():
                    busy = True
                    self.carry(host, datagram)

    def connect(self) -> None:
        self.client.peer.initiate(self.now)
        self.settle()

    def send(self, host: Host, packet: bytes = b"data") -> bool:
        datagram = host.send(packet, self.now)
        if datagram is not None:
            self.carry(host, datagram)
        self.settle()
        return datagram is not None

    def run_until(self, at: float) -> None:
        """Advance to START + `at`, firing every deadline exactly when it is due."""
        end = START + at
        for _ in range(100_000):
            due = [
                (deadline.at, host)
                for host in (self.client, self.gateway)
                if (deadline := host.peer.poll_timeout()) is not None and deadline.at <= end
            ]
            if not due:
                self.now = end
                return
            deadline_at, host = min(due, key=lambda each: each[0])
            assert deadline_at >= self.now, "a deadline lay in the past"
            self.now = deadline_at
            host.wakes.append(self.now)
            host.peer.handle_timeout(self.now)
            again = host.peer.poll_timeout()
            assert again is None or again.at > self.now, f"deadline did not move: {again}"
            self.settle()
        raise AssertionError("timers spin")

    def sent(self, host: Host, kind: int) -> list[float]:
        """When `host` sent messages of this type, from START."""
        return [each.at - START for each in self.log if each.sender == host.name and each.kind == kind]

    def datagrams(self, host: Host, kind: int) -> list[bytes]:
        return [each.datagram for each in self.log if each.sender == host.name and each.kind == kind]
