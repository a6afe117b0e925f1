"""The gateway's core with a real engine, and clients that are connected without ICE: what the policy does to packets.

Messages come as the portal sends them, packets of clients are sealed and opened here, the TUN is a pair of sockets.
Only the node is played: connections exist from one authorization to the next.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
)

from fzg import pumps
from fzg.dataplane.engine import Datagram
from fzg.dataplane.pure import PureEngine
from fzg.gateway import Gateway, Resolve, SendToPortal
from fzg.node.node import ConnectionFailed
from fzg.portal import messages
from fzg.sansio import Transmit
from fzg.tunnel.tunnel import Tunnel
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import FakeUdp

if TYPE_CHECKING:
    from collections.abc import Iterable

START = 1000.0
UNIX_OFFSET = 1_790_000_000.0
GATEWAY = Endpoint(bytes((192, 0, 2, 1)), 52625)
GATEWAY4, GATEWAY6 = "100.64.0.2", "fd00:2021:1111::2"


@dataclass
class Line:
    """One client's connection: the session's keys, and where its datagrams come from."""

    client_id: str
    handle: int
    index: int
    endpoint: Endpoint
    to_gateway: bytes
    to_client: bytes
    identity: tuple
    sent: int = 0

    def seal(self, packet: bytes) -> bytes:
        counter, self.sent = self.sent, self.sent + 1
        header = struct.pack("<IIQ", 4, self.index, counter)
        nonce = bytes(4) + struct.pack("<Q", counter)
        return header + crypto_aead_chacha20poly1305_ietf_encrypt(packet, b"", nonce, self.to_gateway)

    def open(self, message: bytes) -> bytes:
        kind, index, counter = struct.unpack_from("<IIQ", message)
        assert (kind, index) == (4, self.index ^ 0x80000000)
        nonce = bytes(4) + struct.pack("<Q", counter)
        return crypto_aead_chacha20poly1305_ietf_decrypt(message[16:], b"", nonce, self.to_client)


class _Nothing:
    """Stands for parts of the node that the policy does not need."""

    is_probing = False

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def sample(self, now: float) -> str:
        return "a relay"


class BareNode:
    """Connections that stand at once, with everything else of `Node` doing nothing."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.lines: dict[str, Line] = {}
        self.by_address: dict[tuple[str, int], Line] = {}
        self.goodbyes: list[str] = []
        self.counters: Counter[str] = Counter()
        self.signalling = self.relays = _Nothing()
        self.out: deque[Transmit] = deque()
        self.events: deque[Any] = deque()
        self._indices = iter(range(0x100, 0x7FFFFFFF, 0x100))

    def upsert(self, client_id, *, handle, public_key, preshared_key, local, remote, now, address=None) -> bool:
        identity = (public_key, local, remote)
        line = self.lines.get(client_id)
        if line is not None and line.identity == identity:
            return True
        if line is not None:
            self.drop(client_id)
        index = next(self._indices)
        seed = struct.pack("<I", index)
        endpoint = Endpoint(bytes((198, 51)) + struct.pack(">H", handle & 0xFFFF), 40_000)
        line = Line(client_id, handle, index, endpoint, seed + bytes(28), bytes(28) + seed, identity)
        self.lines[client_id] = self.by_address[endpoint.host, endpoint.port] = line
        self.engine.add_session(
            handle, index, index ^ 0x80000000, receive_key=line.to_gateway, send_key=line.to_client, now=now
        )
        self.engine.use_session(handle, index)
        self.engine.set_path(handle, GATEWAY.ip, endpoint, None)
        return False

    def send(self, client_id: str, packet: bytes, now: float, *, revocable: bool = False) -> str | None:
        line = self.lines.get(client_id)
        if line is None:
            return "not connected"
        payload = self.engine.seal(line.handle, packet, now)
        ecn = packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3
        self.out.append(Transmit(line.endpoint, payload, GATEWAY.ip, ecn, line.handle if revocable else None))
        return None

    def answer_probe(self, client_id: str, packet: bytes, source: Endpoint, local: Endpoint, now: float) -> bool:
        return False

    def close(self, client_id: str, now: float) -> None:
        if client_id in self.lines:
            self.goodbyes.append(client_id)
            self.drop(client_id)

    def drop(self, client_id: str) -> None:
        line = self.lines.pop(client_id, None)
        if line is not None:
            self.engine.remove_session(line.index)
            self.engine.remove_peer(line.handle)

    def fail(self, client_id: str) -> None:
        """The path is lost; the client may come back."""
        if client_id in self.lines:
            self.drop(client_id)
            self.events.append(ConnectionFailed(client_id, None))  # type: ignore[arg-type]

    def note_activity(self, client_id: str, now: float) -> None: ...

    def add_remote_candidate(self, client_id: str, text: str, now: float) -> None: ...

    def remove_remote_candidate(self, client_id: str, text: str, now: float) -> None: ...

    def update_relays(self, removed: Any, relays: Any, now: float) -> None: ...

    def handle_datagram(self, payload: bytes, source: Endpoint, local: Endpoint, now: float) -> None:
        self.counters["unknown datagram"] += 1

    def handle_session_confirmed(self, local_index: int, now: float) -> None: ...

    def handle_timeout(self, now: float) -> None: ...

    def poll_timeout(self) -> None: ...

    def poll_transmit(self) -> Transmit | None:
        return self.out.popleft() if self.out else None

    def poll_event(self) -> Any:
        return self.events.popleft() if self.events else None

    def drain_candidates(self, now: float) -> list[Any]:
        return []

    def connection(self, client_id: str) -> Line | None:
        return self.lines.get(client_id)


class World:
    """One gateway. What it lets out is collected until it is taken."""

    def __init__(self, make_engine: Any = PureEngine, *, unix_offset: float = UNIX_OFFSET) -> None:
        self.now = START
        self.engine = make_engine()
        self.tun, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        for end in (self.tun, self.kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.engine.attach_tun(self.tun.fileno(), offloads=False)
        self.udp = FakeUdp()
        attach = getattr(self.engine, "play_udp", self.engine.attach_udp)
        attach(socket.AF_INET, self.udp, port=GATEWAY.port)
        self.node = BareNode(self.engine)
        self.core = Gateway(
            node=self.node,  # type: ignore[arg-type]
            tunnel=Tunnel(now=self.now),
            engine=self.engine,
            unix_offset=unix_offset,
            now=self.now,
        )
        self.acknowledged: list[str] = []
        self.resolutions: list[Resolve] = []

    def close(self) -> None:
        self.tun.close()
        self.kernel.close()

    @property
    def unix(self) -> float:
        return UNIX_OFFSET + self.now

    # -- inputs

    def portal(self, event: str, payload: Any) -> None:
        self.core.handle_portal_message(messages.decode(event, json.dumps(payload)), self.now)
        self.drain()

    def from_client(self, client_id: str, *packets: bytes, ecn: int = 0) -> None:
        """Inner packets of a client arrive, one after another."""
        line = self.node.lines[client_id]
        for packet in packets:
            sealed = line.seal(packet)
            self.dispatch(self.engine.handle_datagram(Datagram(sealed, line.endpoint, GATEWAY, ecn), self.now))

    def from_tun(self, *packets: bytes) -> None:
        """The host sends IP packets into the tunnel, all at once."""
        for packet in packets:
            self.kernel.send(bytes(10) + packet)
        self.dispatch(self.engine.receive_tun(self.now))
        while self.engine.has_backlog(None):
            self.dispatch(self.engine.receive_tun(self.now))

    def resolved(self, resolution: Resolve, addresses: Any) -> None:
        self.core.handle_resolved(resolution.request, addresses, self.now)
        self.drain()

    def due(self) -> float:
        deadline = self.core.poll_timeout()
        return float("inf") if deadline is None else deadline.at

    def handle_timeout(self) -> None:
        self.core.handle_timeout(self.now)
        self.drain()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.due()) <= end:
            self.now = max(self.now, due)
            self.handle_timeout()
        self.now = end

    def dispatch(self, items: Iterable[Any]) -> None:
        pumps.dispatch(self.core, items, self.now)
        self.drain()

    def drain(self) -> None:
        while (transmit := self.core.poll_transmit()) is not None:
            self.engine.transmit(transmit)
        self.engine.flush()
        while (event := self.core.poll_event()) is not None:
            match event:
                case SendToPortal(message=messages.AuthorizationCreated(ref=ref)):
                    self.acknowledged.append(ref)
                case Resolve():
                    self.resolutions.append(event)
                case _:
                    pass

    # -- what came out since the last look

    def written(self) -> list[bytes]:
        packets = []
        while True:
            try:
                packets.append(self.kernel.recv(1 << 17)[10:])
            except BlockingIOError:
                return packets

    def delivered(self) -> list[tuple[str, bytes, int]]:
        """Client, inner packet and outer ECN."""
        sent, self.udp.sent[:] = list(self.udp.sent), []
        found = []
        for each in sent:
            line = self.node.by_address[each.address]
            found += [(line.client_id, line.open(datagram), each.ecn) for datagram in each.datagrams]
        return found


def init(*, ipv4: str = GATEWAY4, ipv6: str = GATEWAY6, **fields: Any) -> dict[str, Any]:
    return {"interface": {"ipv4": ipv4, "ipv6": ipv6}, **fields}


def authorization(
    client_id: str, ipv4: str, ipv6: str, resource: dict[str, Any], expires_at: int | None = None, ref: str = "ref"
) -> dict[str, Any]:
    return {
        "ref": ref,
        "client": {
            "id": client_id,
            "public_key": "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
            "preshared_key": "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU=",
            "ipv4": ipv4,
            "ipv6": ipv6,
        },
        "resource": resource,
        "gateway_ice_credentials": {"username": "zzcf", "password": "up7vgqqtsogpiahklbaira"},
        "client_ice_credentials": {"username": "725z", "password": "latqe7iwpjyrccojsy4ywy"},
        "expires_at": expires_at,
    }
