"""The gateway's peer, gate and engine on one side, wireguard-go, which nobody here wrote, on the other."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane.engine import Datagram, InnerPacket, SessionConfirmed
from fzg.dataplane.pure import PureEngine
from fzg.secret import Secret
from fzg.wire import wireguard as wire
from fzg.wire.checksum import internet_checksum
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.gate import Admitted, CookieReply, Gate
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.peer import HandshakeCompleted, Peer, identify
from tests.interop.wireguard_go.program import WireguardGo, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if (reason := missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

PSK = b"\x55" * 32
GO_IP, OUR_IP = bytes((100, 64, 0, 1)), bytes((10, 9, 8, 7))
# Generous: the machine may be busy. Nothing waits that long when all is well.
PATIENCE_S = 20.0
HANDLE = 5


def udp_packet(source: bytes, destination: bytes, payload: bytes) -> bytes:
    """An IPv4 packet whose UDP checksum is left out."""
    length = 28 + len(payload)
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, 17, 0, source, destination)
    header = header[:10] + internet_checksum(header).to_bytes(2, "big") + header[12:]
    return header + struct.pack(">HHHH", 1000, 2000, 8 + len(payload), 0) + payload


class Side:
    """What the gateway's node does for one peer, on real sockets and the real clock."""

    def __init__(self, *, psk: bytes = PSK, go_psk: bytes = PSK) -> None:
        self.static = KeyPair.generate(os.urandom)
        self.remote = KeyPair.generate(os.urandom)
        self.engine = PureEngine()
        self.gate = Gate(static_public=self.static.public, random=os.urandom, now=self.now)
        self.peer = Peer(
            static=self.static,
            remote_public=self.remote.public,
            preshared_key=Secret(psk),
            connection_index=0x123456,
            peer=HANDLE,
            engine=self.engine,
            random=os.urandom,
            unix_offset=time.time() - self.now,
            now=self.now,
        )
        self.link, self.tun = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for each in (self.link, self.tun):
            each.bind(("127.0.0.1", 0))
        self.go = WireguardGo(link=self._address(self.link), tun="udp:" + self._address(self.tun))
        self.link.connect(self._endpoint(self.go.link))
        self.tun.connect(self._endpoint(self.go.tun))
        self.go.set(
            f"private_key={self.remote.private.reveal().hex()}",
            f"public_key={self.static.public.hex()}",
            f"preshared_key={go_psk.hex()}",
            "endpoint=192.0.2.1:1",
            "allowed_ip=0.0.0.0/0",
        )
        self.seen: list[wire.MessageType | None] = []
        self.received: list[bytes] = []
        self.delivered: list[bytes] = []
        self.handshakes = 0

    @property
    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Serve sockets and timers until the condition holds."""
        limit = self.now + PATIENCE_S
        while not condition():
            assert self.now < limit, f"waited in vain; messages seen: {self.seen}, dropped: {self.peer.dropped}"
            deadline = self.peer.poll_timeout()
            wait = 0.1 if deadline is None else min(0.1, max(0.0, deadline.at - self.now))
            for ready in select.select([self.link, self.tun], [], [], wait)[0]:
                if ready is self.tun:
                    self.delivered.append(self.tun.recv(2048))
                else:
                    self._handle(self.link.recv(2048), self.now)
            self.peer.handle_timeout(self.now)
            self.drain()

    def send(self, packet: bytes) -> None:
        """To wireguard-go's TUN."""
        datagram = self.engine.seal(HANDLE, packet, self.now)
        assert datagram is not None
        self.link.send(datagram)

    def drain(self) -> None:
        while (message := self.peer.poll_transmit()) is not None:
            self.link.send(message)
        while (event := self.peer.poll_event()) is not None:
            self.handshakes += isinstance(event, HandshakeCompleted)

    def close(self) -> None:
        self.go.close()
        self.link.close()
        self.tun.close()

    def _handle(self, payload: bytes, now: float) -> None:
        source = Endpoint.of("192.0.2.1", 1)
        kind = wire.classify(payload)
        self.seen.append(kind)
        match kind:
            case wire.MessageType.INITIATION | wire.MessageType.RESPONSE:
                verdict = self.gate.admit(payload, source, now)
                if isinstance(verdict, CookieReply):
                    self.link.send(verdict.message)
                assert isinstance(verdict, CookieReply | Admitted)
                if not isinstance(verdict, Admitted):
                    return
                if kind is wire.MessageType.RESPONSE:
                    self.peer.handle_response(payload, now)
                elif (partial := identify(self.static, payload)) is not None:
                    self.peer.handle_initiation(partial, now)
            case wire.MessageType.COOKIE_REPLY:
                self.peer.handle_cookie_reply(payload, now)
            case wire.MessageType.DATA:
                for item in self.engine.handle_datagram(Datagram(payload, source, source, 0), now):
                    match item:
                        case SessionConfirmed(local_index=index):
                            self.peer.handle_session_confirmed(index, now)
                        case InnerPacket(packet=packet):
                            self.received.append(bytes(packet))
            case None:
                raise AssertionError("wireguard-go sent something that is not WireGuard")

    @staticmethod
    def _address(bound: socket.socket) -> str:
        host, port = bound.getsockname()
        return f"{host}:{port}"

    @staticmethod
    def _endpoint(text: str) -> tuple[str, int]:
        host, _, port = text.rpartition(":")
        return host, int(port)


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side()
    yield side
    side.close()


def exchange(side: Side, mark: bytes) -> None:
    """A packet each way; sizes that wireguard-go pads."""
    up, down = udp_packet(GO_IP, OUR_IP, b"up " + mark), udp_packet(OUR_IP, GO_IP, b"down " + mark)
    side.tun.send(up)
    side.run_until(lambda: up in side.received)
    side.send(down)
    side.run_until(lambda: down in side.delivered)


@pytest.mark.slow
def test_wireguard_go_initiates_and_data_flows_both_ways(side: Side) -> None:
    up = udp_packet(GO_IP, OUR_IP, b"hello")
    side.tun.send(up)  # makes it initiate
    side.run_until(lambda: up in side.received)
    assert side.seen[0] is wire.MessageType.INITIATION
    assert side.handshakes == 1
    exchange(side, b"after")
    large = udp_packet(GO_IP, OUR_IP, bytes(1280 - 28))
    side.tun.send(large)
    side.run_until(lambda: large in side.received)
    assert side.go.get()["last_handshake_time_sec"] != "0"


@pytest.mark.slow
def test_wireguard_go_answers_our_initiation(side: Side) -> None:
    side.peer.initiate(side.now)
    side.drain()
    side.run_until(lambda: side.handshakes == 1)
    assert side.seen[0] is wire.MessageType.RESPONSE
    down = udp_packet(OUR_IP, GO_IP, b"first")
    side.send(down)
    side.run_until(lambda: down in side.delivered)
    exchange(side, b"after")


@pytest.mark.slow
def test_our_rekey_keeps_the_traffic_going(side: Side) -> None:
    exchange_started = udp_packet(GO_IP, OUR_IP, b"start")
    side.tun.send(exchange_started)
    side.run_until(lambda: side.handshakes == 1)
    for number in range(2, 12):  # more sessions than the ring has slots
        late = side.engine.seal(HANDLE, udp_packet(OUR_IP, GO_IP, b"late %d" % number), side.now)
        assert late is not None
        earliest = side.now + 0.03  # wireguard-go drops initiations less than 20 ms apart
        side.run_until(lambda earliest=earliest: side.now >= earliest)
        side.peer.initiate(side.now)
        side.drain()
        side.run_until(lambda number=number: side.handshakes == number)
        side.link.send(late)
        side.run_until(lambda number=number: any(b"late %d" % number in packet for packet in side.delivered))
        exchange(side, b"%d" % number)


@pytest.mark.slow
def test_wireguard_gos_rekey_keeps_the_traffic_going(side: Side) -> None:
    exchange_started = udp_packet(GO_IP, OUR_IP, b"start")
    side.tun.send(exchange_started)
    side.run_until(lambda: side.handshakes == 1)

    def rekeyed() -> bool:
        side.go.handshake(side.static.public)  # does nothing within 5 s of the one before
        return side.handshakes == 2

    side.run_until(rekeyed)
    assert side.seen.count(wire.MessageType.INITIATION) == 2
    exchange(side, b"after")


@pytest.mark.slow
def test_wireguard_go_comes_back_with_our_cookie(side: Side) -> None:
    for _ in range(100):
        side.gate._count(side.now)
    up = udp_packet(GO_IP, OUR_IP, b"under load")
    side.tun.send(up)
    side.run_until(lambda: side.gate.verdicts["cookie reply"] == 1)

    def under_load() -> bool:
        side.gate._window_start, side.gate._used = side.now, 1000
        return up in side.received

    side.run_until(under_load)
    assert side.gate.verdicts == {"cookie reply": 1, "admitted": 1}


@pytest.mark.slow
def test_a_wrong_psk_gives_wireguard_go_no_session() -> None:
    side = Side(go_psk=b"\x56" * 32)
    try:
        side.tun.send(udp_packet(GO_IP, OUR_IP, b"never"))
        side.run_until(lambda: len(side.seen) == 1)
        assert side.go.get()["last_handshake_time_sec"] == "0"
        assert side.handshakes == 0
        assert side.engine.seal(HANDLE, b"x", side.now) is None
    finally:
        side.close()
