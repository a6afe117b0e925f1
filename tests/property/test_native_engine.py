"""The native engine against the one in Python: the same orders to both, and everything they say and do compared.

FZG_EXAMPLES sets the number of cases: otherwise 20,000 under CI=true, a tenth elsewhere.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fzg.dataplane import pure, tun_offload
from fzg.dataplane.engine import Datagram, Rewrite
from fzg.dataplane.pure import PureEngine
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import (
    ACK,
    CLIENT,
    CLIENT4,
    CLIENT6,
    FIN,
    GATEWAY,
    GATEWAY6,
    PSH,
    RELAY,
    SERVER4,
    SERVER6,
    SYN,
    FakeUdp,
    NativeEngine,
    echo,
    in_turns,
    ip,
    key_of,
    tcp,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.skipif(NativeEngine is None, reason="the native engine was not built")

EXAMPLES = int(os.environ.get("FZG_EXAMPLES", "20000" if os.environ.get("CI") == "true" else "2000"))
PEERS = (5, 6, 7)
CHANNELS = (0x4000, 0x4001)
CLIENTS = (CLIENT, RELAY, Endpoint(SERVER6, 1234), Endpoint(bytes(CLIENT.ip), 1))
PROXY4, PROXY6 = bytes((100, 96, 0, 1)), bytes.fromhex("fd002021111180000000000000000001")
NEEDS_CSUM = 1


class Device:
    """Plays the TUN for both engines: reads that tests put in, writes recorded or refused by the errno of the rule."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.writes: list[bytes] = []
        self.refuse = lambda data, number: 0
        self.calls = 0

    def readv(self, descriptor: int, buffers: Sequence[Any]) -> int:
        if not self.reads:
            raise BlockingIOError(errno.EAGAIN, "")
        data = self.reads.pop(0)
        buffers[0][: len(data)] = data
        return len(data)

    def writev(self, descriptor: int, parts: Sequence[bytes]) -> int:
        data = b"".join(parts)
        self.calls += 1
        code = self.refuse(data, self.calls)
        if code:
            raise OSError(code, os.strerror(code))
        self.writes.append(data)
        return len(data)


class Side:
    """One engine with a TUN and two sockets that record."""

    def __init__(self, engine: Any, *, vnet_hdr: bool, segmentation: bool) -> None:
        self.engine, self.device = engine, Device()
        self.udp = {socket.AF_INET: FakeUdp(), socket.AF_INET6: FakeUdp()}
        engine.attach_tun(7, vnet_hdr=vnet_hdr, offloads=True)
        attach = getattr(engine, "play_udp", engine.attach_udp)
        for family, fake in self.udp.items():
            attach(family, fake, port=52625, segmentation=segmentation)
        if not isinstance(engine, PureEngine):
            engine.play_tun(self.device)
            engine.limit(flush=1 << 30, lanes=1, urgent=1 << 20, judged=1 << 20, awaits_verdicts=False)

    def take(self) -> Any:
        """What went out since the last call."""
        sent = [
            (family, one.datagrams, one.segment, one.ecn, one.source, one.address)
            for family, fake in self.udp.items()
            for one in fake.sent
        ]
        written = list(self.device.writes)
        self.device.writes.clear()
        for fake in self.udp.values():
            fake.sent.clear()
        return written, sent


def control_first(items: Sequence[Any]) -> Any:
    """Datagrams apart from the rest: the native engine finds them while data still waits."""
    datagrams = [item for item in items if isinstance(item, Datagram)]
    return sorted(datagrams), [item for item in items if not isinstance(item, Datagram)]


class Pair:
    """Both engines under the same orders; `generator` makes contents."""

    def __init__(self, seed: int, *, vnet_hdr: bool, segmentation: bool) -> None:
        self.random = random.Random(seed)
        self.vnet_hdr = vnet_hdr
        self.client = PureEngine()
        options = {"vnet_hdr": vnet_hdr, "segmentation": segmentation}
        self.pure, self.native = Side(PureEngine(), **options), Side(NativeEngine(), **options)
        self.now = 10.0
        self.sessions: list[tuple[int, int]] = []
        self.sealed: list[bytes] = []
        self.remote_indices = iter(range(0x900, 1 << 24))  # never twice, so that index and counter name key and nonce
        self.nonces: set[bytes] = set()
        self.templates = [self.template() for _ in range(6)]
        self.sequence = dict.fromkeys(range(6), 1)

    def both(self, order: Any) -> Any:
        expected = self._with_os(order, self.pure)
        got = order(self.native)
        assert got == expected
        return got

    def _with_os(self, order: Any, side: Side) -> Any:
        kept = pure.os, tun_offload.os
        pure.os = tun_offload.os = side.device  # type: ignore[assignment]
        try:
            return order(side)
        finally:
            pure.os, tun_offload.os = kept

    def compare(self) -> None:
        written, sent = self.native.take()
        assert (written, sent) == self.pure.take()
        for _, datagrams, *_ in sent:
            for datagram in datagrams:
                self.note_nonce(datagram[4:] if datagram[0] == 0x40 else datagram)
        for peer in PEERS:
            self.both(lambda side: side.engine.activity(peer))
        self.both(lambda side: {name: count for name, count in side.engine.counters().items() if count})
        self.both(lambda side: list(side.engine.congested()))

    def note_nonce(self, datagram: bytes) -> None:
        """The same key and nonce never make two messages."""
        if len(datagram) >= 32 and datagram[:4] == b"\4\0\0\0":
            assert datagram[4:16] not in self.nonces
            self.nonces.add(datagram[4:16])

    # -- contents.

    def template(self) -> dict[str, Any]:
        choice = self.random.choice
        fields: dict[str, Any] = choice((
            {"source": CLIENT4, "destination": SERVER4}, {"source": CLIENT6, "destination": SERVER6},
            {"source": CLIENT4, "destination": PROXY4}, {"source": SERVER4, "destination": CLIENT4},
            {"source": SERVER6, "destination": CLIENT6}, {"source": CLIENT6, "destination": PROXY6},
        ))  # fmt: skip
        kind = choice((tcp, tcp, udp, udp, echo))
        if kind is echo:
            return {"kind": kind, **fields, "ident": self.random.randrange(3)}
        return {"kind": kind, **fields, "sport": self.random.randrange(3), "dport": self.random.randrange(2)}

    def continued(self, number: int, size: int, ident: int) -> bytes:
        """The next packet of a connection without anything odd; rarely with."""
        if self.random.random() < 0.02:
            return self.packet(number)
        fields = dict(self.templates[number])
        kind = fields.pop("kind")
        if kind is echo:
            return echo(fields.pop("ident"), **fields)
        if self.random.random() < 0.05:
            size = self.random.randrange(size)
        if kind is udp:
            return udp(self.random.randbytes(size), **fields, ident=ident)
        sequence, flags = self.sequence[number], ACK | PSH if self.random.random() < 0.03 else ACK
        self.sequence[number] = sequence + size & 0xFFFF_FFFF
        return tcp(self.random.randbytes(size), **fields, seq=sequence, flags=flags, ident=ident)

    def packet(self, number: int | None = None) -> bytes:
        """Of one of the connections; mostly what continues it, sometimes odd or broken."""
        pick = self.random.choice
        number = self.random.randrange(6) if number is None else number
        fields = dict(self.templates[number])
        kind = fields.pop("kind")
        size = pick((0, 1, 50, 100, 100, 100, 100, 1000, 1220))
        if kind is echo:
            packet = echo(fields.pop("ident"), reply=pick((False, True)), **fields)
        elif kind is udp:
            zero = self.random.random() < 0.1
            packet = udp(self.random.randbytes(size), **fields, zero_checksum=zero, **self.of_ip())
        else:
            flags = pick((ACK, ACK, ACK, ACK, ACK | PSH, ACK | FIN, SYN, 4, ACK | 0x40))
            options = pick((b"", b"", b"\1\1\x08\x0a" + bytes(8)))
            size = min(size, 1200)
            sequence = self.sequence[number]
            self.sequence[number] = sequence + size + pick((0, 0, 0, 0, 0, 1)) & 0xFFFF_FFFF
            packet = tcp(
                self.random.randbytes(size), **fields, seq=sequence, flags=flags, options=options, **self.of_ip()
            )
        return self.damaged(packet) if self.random.random() < 0.12 else packet

    def of_ip(self) -> dict[str, int]:
        if self.random.random() < 0.8:
            return {}
        return {
            "tos": self.random.randrange(256),
            "ttl": self.random.choice((64, 63)),
            "ident": self.random.randrange(9),
        }

    def damaged(self, packet: bytes) -> bytes:
        changed = bytearray(packet)
        match self.random.randrange(6):
            case 0:
                changed[self.random.randrange(min(60, len(changed)))] ^= 1 << self.random.randrange(8)
            case 1:
                changed[-1] ^= 0x55
            case 2:
                del changed[self.random.randrange(1, len(changed) + 1) :]
            case 3:
                changed += bytes(self.random.randrange(1, 20))
            case 4:
                return ip(CLIENT4, SERVER4, self.random.choice((0, 1, 6, 17, 47, 58)), bytes(self.random.randrange(60)))
            case _:
                return self.random.randbytes(self.random.randrange(1, 90))
        return bytes(changed)[:1280]

    def message(self) -> bytes:
        """A datagram: sealed, replayed, forged, framed or nonsense."""
        chance = self.random.random()
        if chance < 0.05:
            return self.random.randbytes(self.random.randrange(1, 1330))
        if chance < 0.1 and self.sealed:
            return self.random.choice(self.sealed)
        plaintext = self.packet() if self.random.random() < 0.93 else b""
        peer = self.random.choice(PEERS)
        session = self.client._peers[peer].current if peer in self.client._peers else None
        if session is not None and self.random.random() < 0.1:
            jump = self.random.choice((-1, -63, -64, -65, -8191, -8192, -8193, 63, 64, 8128, 8192, 8256, 1 << 40))
            session.next_counter = min(max(0, session.next_counter + jump), (1 << 64) - 5000)
        sealed = self.client.seal(peer, plaintext[:1280], 1.0)
        if sealed is None:
            return b"stun"
        self.sealed = [*self.sealed[-20:], sealed]
        if chance < 0.14:
            broken = bytearray(sealed)
            broken[self.random.randrange(len(broken))] ^= 1
            return bytes(broken)
        if chance < 0.35:
            length = len(sealed) + (self.random.random() < 0.1)
            frame = struct.pack(">HH", self.random.choice(CHANNELS), length) + sealed
            return frame + bytes(self.random.choice((0, 0, 0, 1, 3, 4)))
        return sealed

    # -- orders.

    def handshake(self) -> None:
        peer, number = self.random.choice(PEERS), self.random.randrange(1, 4)
        ours, theirs = peer << 8 | number, next(self.remote_indices)
        keys = [bytes((number, way, peer)) + self.random.randbytes(29) for way in (1, 2)]
        names = {"receive_key": keys[0], "send_key": keys[1]}
        self.both(lambda side: side.engine.add_session(peer, ours, theirs, **names, now=self.now))
        self.client.add_session(peer, theirs, ours, receive_key=keys[1], send_key=keys[0], now=1.0)
        self.client.use_session(peer, theirs)
        self.sessions.append((peer, ours))
        if self.random.random() < 0.8:
            self.both(lambda side: side.engine.use_session(peer, ours))

    def end_session(self) -> None:
        if self.sessions and self.random.random() < 0.5:
            peer, index = self.random.choice(self.sessions)
            self.both(lambda side: side.engine.remove_session(index))
        else:
            peer = self.random.choice(PEERS)
            order = self.random.choice(("stop", "remove"))
            self.both(
                lambda side: side.engine.use_session(peer, None) if order == "stop" else side.engine.remove_peer(peer)
            )

    def path(self) -> None:
        peer, destination = self.random.choice(PEERS), self.random.choice(CLIENTS)
        if self.random.random() < 0.15:
            self.both(lambda side: side.engine.clear_path(peer))
            return
        source = self.random.choice((None, GATEWAY.ip if destination.is_ipv4 else GATEWAY6.ip))
        channel = self.random.choice((None, None, *CHANNELS))
        self.both(lambda side: side.engine.set_path(peer, source, destination, channel))

    def channel(self) -> None:
        number, usable = self.random.choice(CHANNELS), self.random.random() < 0.7
        self.both(lambda side: side.engine.set_channel(RELAY, number, usable=usable))

    def flow(self, number: int | None = None, peer: int | None = None, *, inbound: bool | None = None) -> None:
        number = self.random.randrange(6) if number is None else number
        fields = dict(self.templates[number])
        key = key_of(fields.pop("kind")(**fields))
        peer = self.random.choice(PEERS) if peer is None else peer
        inbound = self.random.random() < 0.5 if inbound is None else inbound
        rewrite = None
        if self.random.random() < 0.4:
            rewrite = Rewrite(self.random.randbytes(len(key.source)), self.random.randrange(0x10000))
        until, token = self.now + self.random.choice((0.0, 0.5, 1.0, 50.0)), self.random.randrange(100)
        self.both(
            lambda side: side.engine.install_flow(
                peer, key, inbound=inbound, rewrite=rewrite, valid_until=until, token=token
            )
        )

    def revoke(self) -> None:
        peer = self.random.choice(PEERS)
        self.both(lambda side: side.engine.revoke(peer))

    def sweep(self) -> None:
        self.both(lambda side: sorted(side.engine.sweep(self.now)))

    def handshake_noted(self) -> None:
        peer, sent = self.random.choice(PEERS), self.random.random() < 0.5
        self.both(lambda side: side.engine.note_handshake(peer, sent=sent, now=self.now))

    def seal(self) -> None:
        peer, packet = self.random.choice(PEERS), self.packet() if self.random.random() < 0.8 else b""
        message = self.both(lambda side: side.engine.seal(peer, packet, self.now))
        self.note_nonce(message or b"")

    def arrive(self) -> None:
        source, ecn = self.random.choice(CLIENTS), self.random.randrange(4)
        local = GATEWAY if source.is_ipv4 else GATEWAY6
        datagram = Datagram(self.message(), source, local, ecn)
        self.both(lambda side: list(side.engine.handle_datagram(datagram, self.now)))

    def receive(self) -> None:
        source, ecn = self.random.choice(CLIENTS), self.random.choice((0, 0, 0, 1, 2, 3))
        family, local = source.family, GATEWAY if source.is_ipv4 else GATEWAY6
        for _ in range(self.random.randrange(1, 4)):
            messages = [self.message() for _ in range(self.random.randrange(1, 14))]
            stride = self.random.choice(messages)
            train = b"".join([message for message in messages if len(message) == len(stride)])
            if self.random.random() < 0.5:
                train += stride[: self.random.randrange(len(stride))]
            for side in (self.pure, self.native):
                side.udp[family].put(train, stride=len(stride), source=source, local=local, ecn=ecn)
        self.both(lambda side: control_first(in_turns(side.engine, family, self.now)))
        assert not self.pure.udp[family].arrivals
        assert not self.native.udp[family].arrivals

    def read(self) -> None:
        reads = []
        for _ in range(self.random.randrange(1, 12)):
            packet = self.packet()
            start = 20 if packet[0] >> 4 == 4 else 40
            offset = self.random.choice((16, 6))
            reads.append(
                struct.pack("=BBHHHH", self.random.choice((0, 0, NEEDS_CSUM)), 0, 0, 0, start, offset) + packet
            )
        if self.random.random() < 0.5:
            reads.append(self.super_packet())
        if not self.vnet_hdr:
            reads = [read[10:] for read in reads if len(read) <= 1290]
        for side in (self.pure, self.native):
            side.device.reads += reads
        self.both(lambda side: in_turns(side.engine, None, self.now))
        assert not self.pure.device.reads
        assert not self.native.device.reads

    def super_packet(self, number: int | None = None) -> bytes:
        fields = dict(self.templates[self.random.randrange(6) if number is None else number])
        if fields["kind"] is echo:
            fields = {"kind": udp}
        kind, size = fields.pop("kind"), self.random.choice((7, 100, 100, 1200))
        payload = self.random.randbytes(self.random.randrange(1, size * 20))
        flags = {"flags": self.random.choice((ACK, ACK | PSH, ACK | FIN | PSH))} if kind is tcp else {}
        packet = kind(payload, **fields, **flags, **self.of_ip())
        is_ipv4 = packet[0] >> 4 == 4
        gso_type = (1 if is_ipv4 else 4) if kind is tcp else 5
        if self.random.random() < 0.1:
            gso_type = self.random.choice((1, 3, 4, 5, 0x81))
        if self.random.random() < 0.1:
            packet = self.damaged(packet)
            while packet[0] >> 4 not in (4, 6):
                packet = self.damaged(packet)
        return struct.pack("=BBHHHH", 1, gso_type, 0, size, 20 if is_ipv4 else 40, 16 if kind is tcp else 6) + packet

    def packet_from_memory(self) -> None:
        packet = self.packet()
        self.both(lambda side: list(side.engine.handle_packet(packet, self.now)))

    def write(self) -> None:
        for _ in range(self.random.randrange(1, 8)):
            packet, peer = self.packet(), self.random.choice((None, *PEERS))
            self.both(lambda side: side.engine.write_tun(packet, peer))

    def stream(self) -> None:
        """Consecutive equal packets of one connection, which is where merging happens."""
        number, size = self.random.randrange(6), self.random.choice((10, 1200))
        for ident in range(self.random.randrange(2, 90)):
            packet = self.continued(number, size, ident)
            self.both(lambda side: side.engine.write_tun(packet))

    def upload(self) -> None:
        """The same through a tunnel, in trains."""
        number, size, peer = self.random.randrange(6), self.random.choice((10, 1200)), self.random.choice(PEERS)
        self.flow(number, peer, inbound=True)
        sealed = [self.client.seal(peer, self.continued(number, size, ident), 1.0) for ident in range(40)]
        messages = [message for message in sealed if message is not None]
        ecn = self.random.choice((0, 0, 3))
        for side in (self.pure, self.native):
            fake, left = side.udp[socket.AF_INET], messages
            while left:
                stride, taken = len(left[0]), 1
                while taken < len(left) and len(left[taken]) == stride:
                    taken += 1
                fake.put(b"".join(left[:taken]), stride=stride, ecn=ecn)
                left = left[taken:]
        self.both(lambda side: control_first(in_turns(side.engine, socket.AF_INET, self.now)))
        assert not self.pure.udp[socket.AF_INET].arrivals
        assert not self.native.udp[socket.AF_INET].arrivals

    def download(self) -> None:
        """Super-packets that a flow covers."""
        number, peer = self.random.randrange(6), self.random.choice(PEERS)
        self.flow(number, peer, inbound=False)
        reads = [self.super_packet(number) for _ in range(self.random.randrange(1, 3))] if self.vnet_hdr else []
        for side in (self.pure, self.native):
            side.device.reads += reads
        self.both(lambda side: in_turns(side.engine, None, self.now))
        assert not self.pure.device.reads
        assert not self.native.device.reads

    def transmit(self) -> None:
        destination = self.random.choice(CLIENTS)
        source = self.random.choice((None, GATEWAY.ip if destination.is_ipv4 else GATEWAY6.ip))
        for size in self.random.choices((20, 100, 100, 100, 1316), k=self.random.randrange(1, 70)):
            ecn, peer = self.random.choice((0, 0, 0, 0, 2)), self.random.choice((None, None, None, *PEERS))
            datagram = Transmit(destination, self.random.randbytes(size), source, ecn, peer)
            self.both(lambda side: side.engine.transmit(datagram))

    def flush(self) -> None:
        self.both(lambda side: side.engine.flush())

    def trouble(self) -> None:
        """The kernel refuses some of the next calls."""
        code = self.random.choice(
            (0, 0, errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EAGAIN, errno.EPERM, errno.ENOBUFS)
        )
        every, merged_only = self.random.choice((1, 2, 3)), self.random.random() < 0.5
        for side in (self.pure, self.native):
            number = iter(range(1 << 30))

            def refuse(sent: Any, number: Any = number) -> int:
                return code if next(number) % every == 0 and (sent.segment or not merged_only) else 0

            for fake in side.udp.values():
                fake.refuse = refuse
            side.device.refuse = lambda data, calls: (
                code if self.vnet_hdr and calls % every == 0 and (data[1] or not merged_only) else 0
            )

    def later(self) -> None:
        self.now += self.random.choice((0.1, 0.5, 2.0))


ORDERS = {
    "receive": 8, "arrive": 3, "read": 8, "packet_from_memory": 2, "write": 2, "stream": 2, "upload": 5, "download": 5,
    "transmit": 2, "seal": 1,
    "flow": 8, "flush": 6, "path": 3, "channel": 2, "handshake": 3, "end_session": 1, "revoke": 1, "sweep": 1,
    "handshake_noted": 1, "trouble": 2, "later": 2,
}  # fmt: skip
orders = st.lists(st.sampled_from([name for name, weight in ORDERS.items() for _ in range(weight)]), max_size=25)


@given(orders, st.integers(0, 2**32), st.sampled_from([True, True, True, False]), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_both_engines_say_and_do_the_same(names: list[str], seed: int, vnet_hdr: bool, segmentation: bool) -> None:
    pair = Pair(seed, vnet_hdr=vnet_hdr, segmentation=segmentation)
    for _ in range(4):
        pair.handshake()
        pair.path()
        pair.flow()
        pair.flow()
    pair.channel()
    for name in names:
        getattr(pair, name)()
        pair.compare()
    pair.trouble()
    pair.flush()
    pair.sweep()
    pair.compare()
