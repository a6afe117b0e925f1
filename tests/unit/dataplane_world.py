"""Packets made by a naive builder, sockets that record or refuse, and two engines that talk to each other.

`pytestmark = pytest.mark.usefixtures("each_engine")` lets a module's tests run once for each engine there is.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from fzg.dataplane import flows, pure, tun_offload, udp_offload
from fzg.dataplane.engine import Datagram, FlowKey, InnerPacket, Rewrite
from fzg.dataplane.pure import PureEngine
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    from fzg.dataplane._native import NativeEngine
except ImportError:
    if os.environ.get("FZG_REQUIRE_NATIVE") == "1":
        raise
    NativeEngine = None  # type: ignore[assignment,misc]

ENGINES: list[Any] = [PureEngine, *([NativeEngine] if NativeEngine else [])]
# What `World.limit` names, in the engine in Python.
_LIMITS = {
    "flows": (flows, "MAX_FLOWS"),
    "tun_packets": (tun_offload, "_MAX_QUEUED"),
    "data": (udp_offload, "_MAX_QUEUED_DATA"),
    "control": (udp_offload, "_MAX_QUEUED_CONTROL"),
    "turn": (pure, "_TURN_PACKETS"),
}

CLIENT4, SERVER4 = bytes((100, 64, 0, 9)), bytes((10, 0, 0, 5))
CLIENT6, SERVER6 = bytes.fromhex("fd002021111100000000000000000009"), bytes.fromhex("20010db8000000000000000000000005")
GATEWAY = Endpoint(bytes((192, 0, 2, 1)), 52625)
CLIENT = Endpoint(bytes((198, 51, 100, 7)), 40000)
RELAY = Endpoint(bytes((203, 0, 113, 3)), 3478)
GATEWAY6 = Endpoint(bytes.fromhex("20010db8000000000000000000000001"), 52625)

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
NO_VNET = bytes(10)


def naive_checksum(data: bytes) -> int:
    """RFC 1071 word by word."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for high, low in zip(data[::2], data[1::2], strict=True):
        total += high << 8 | low
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack(">BBH", 0, protocol, length)
    return source + destination + struct.pack(">IxxxB", length, protocol)


def ip(source: bytes, destination: bytes, protocol: int, l4: bytes, *, tos: int = 0, ttl: int = 64,
       ident: int = 0x1234, fragment: int = 0x4000, flow_label: int = 0) -> bytes:  # fmt: skip
    if len(source) == 4:
        head = struct.pack(
            ">BBHHHBBH4s4s", 0x45, tos, 20 + len(l4), ident, fragment, ttl, protocol, 0, source, destination
        )
        return head[:10] + struct.pack(">H", naive_checksum(head)) + head[12:] + l4
    first = 6 << 28 | tos << 20 | flow_label
    return struct.pack(">IHBB16s16s", first, len(l4), protocol, ttl, source, destination) + l4


def tcp(payload: bytes = b"", *, source: bytes = CLIENT4, destination: bytes = SERVER4, sport: int = 50000,
        dport: int = 443, seq: int = 1, ack: int = 7, flags: int = ACK, window: int = 500,
        options: bytes = b"", **of_ip: int) -> bytes:  # fmt: skip
    offset = (20 + len(options)) // 4 << 4
    l4 = struct.pack(">HHIIBBHHH", sport, dport, seq, ack, offset, flags, window, 0, 0) + options + payload
    check = naive_checksum(pseudo_header(source, destination, TCP, len(l4)) + l4)
    return ip(source, destination, TCP, l4[:16] + struct.pack(">H", check or 0xFFFF) + l4[18:], **of_ip)


def udp(payload: bytes = b"x", *, source: bytes = CLIENT4, destination: bytes = SERVER4, sport: int = 50000,
        dport: int = 53, zero_checksum: bool = False, **of_ip: int) -> bytes:  # fmt: skip
    l4 = struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload
    check = naive_checksum(pseudo_header(source, destination, UDP, len(l4)) + l4) or 0xFFFF
    return ip(source, destination, UDP, l4[:6] + struct.pack(">H", 0 if zero_checksum else check) + l4[8:], **of_ip)


def echo(ident: int = 77, *, reply: bool = False, source: bytes = CLIENT4, destination: bytes = SERVER4) -> bytes:
    if len(source) == 4:
        l4 = struct.pack(">BBHHH", 0 if reply else 8, 0, 0, ident, 1) + b"ping"
        return ip(source, destination, ICMP, l4[:2] + struct.pack(">H", naive_checksum(l4)) + l4[4:])
    l4 = struct.pack(">BBHHH", 129 if reply else 128, 0, 0, ident, 1) + b"ping"
    check = naive_checksum(pseudo_header(source, destination, ICMPV6, len(l4)) + l4)
    return ip(source, destination, ICMPV6, l4[:2] + struct.pack(">H", check) + l4[4:])


def checksums_are_valid(packet: bytes) -> bool:
    is_ipv4 = packet[0] >> 4 == 4
    if is_ipv4 and naive_checksum(packet[:20]) != 0:
        return False
    protocol, l4 = (packet[9], packet[20:]) if is_ipv4 else (packet[6], packet[40:])
    addresses = packet[12:20] if is_ipv4 else packet[8:40]
    half = len(addresses) // 2
    pseudo = b"" if protocol == ICMP else pseudo_header(addresses[:half], addresses[half:], protocol, len(l4))
    return naive_checksum(pseudo + l4) == 0


def key_of(packet: bytes) -> FlowKey:
    """The 5-tuple of a TCP, UDP or echo packet, as the core would name it."""
    is_ipv4 = packet[0] >> 4 == 4
    protocol, l4 = (packet[9], packet[20:]) if is_ipv4 else (packet[6], packet[40:])
    addresses = packet[12:20] if is_ipv4 else packet[8:40]
    half = len(addresses) // 2
    ports = l4[4:6] * 2 if protocol in {ICMP, ICMPV6} else l4[:4]
    return FlowKey(protocol, addresses[:half], addresses[half:], *struct.unpack(">HH", ports))


class Sent:
    """One `sendmsg`: `segment` is the UDP_SEGMENT size, 0 without."""

    def __init__(self, payloads: list[bytes], ancillary: Any, address: tuple[str, int]) -> None:
        self.payloads = payloads
        self.address = address
        self.segment = 0
        self.ecn = 0
        self.source: bytes | None = None
        for level, kind, data in ancillary:
            match level, kind:
                case (17, 103):
                    (self.segment,) = struct.unpack("=H", data)
                case (socket.IPPROTO_IP, socket.IP_TOS) | (socket.IPPROTO_IPV6, socket.IPV6_TCLASS):
                    (self.ecn,) = struct.unpack("=i", data)
                case (socket.IPPROTO_IP, 8):
                    self.source = data[4:8]
                case (socket.IPPROTO_IPV6, 50):
                    self.source = data[:16]
                case _:
                    raise AssertionError((level, kind))

    @property
    def datagrams(self) -> list[bytes]:
        """What the receiver gets: the kernel cuts by the segment size alone."""
        joined = b"".join(self.payloads)
        step = self.segment or len(joined)
        return [joined[at : at + step] for at in range(0, len(joined), step)]


class FakeUdp:
    """A socket that records what is sent, refuses when told to, and delivers trains that tests put in."""

    def __init__(self, *, knows_segments: bool = True) -> None:
        self.sent: list[Sent] = []
        self.arrivals: list[tuple[bytes, int, Endpoint, Endpoint, int] | OSError] = []
        self.refuse = lambda sent: 0
        self.knows_segments = knows_segments

    def getsockopt(self, level: int, option: int) -> int:
        assert (level, option) == (17, 103)
        if not self.knows_segments:
            raise OSError(errno.ENOPROTOOPT, "")
        return 0

    def fileno(self) -> int:
        return 99

    def sendmsg(self, payloads: Any, ancillary: Any, flags: int, address: tuple[str, int]) -> int:
        sent = Sent(list(payloads), ancillary, address)
        code = self.refuse(sent)
        if code:
            raise OSError(code, os.strerror(code))
        self.sent.append(sent)
        return sum(map(len, payloads))

    def put(
        self, train: bytes, *, stride: int = 0, source: Endpoint = CLIENT, local: Endpoint = GATEWAY, ecn: int = 0
    ) -> None:
        self.arrivals.append((train, stride, source, local, ecn))

    def recvmsg_into(self, buffers: Any, room: int) -> Any:
        if not self.arrivals:
            raise BlockingIOError(errno.EAGAIN, "")
        arrival = self.arrivals.pop(0)
        if isinstance(arrival, OSError):
            raise arrival
        train, stride, source, local, ecn = arrival
        buffers[0][: len(train)] = train
        if source.is_ipv4:
            ancillary = [(0, 8, struct.pack("=I4s4s", 0, bytes(4), local.ip)), (0, 1, bytes((0xB8 | ecn,)))]
        else:
            ancillary = [(41, 50, struct.pack("=16sI", local.ip, 0)), (41, 67, struct.pack("=i", 0xB8 | ecn))]
        if stride:
            ancillary.append((17, 104, struct.pack("=i", stride)))
        return len(train), ancillary, 0, (source.host, source.port, 0, 0)[: 2 if source.is_ipv4 else 4]

    @property
    def datagrams(self) -> list[bytes]:
        return [datagram for sent in self.sent for datagram in sent.datagrams]

    @property
    def sizes(self) -> list[int]:
        """Datagrams per call."""
        return [len(sent.datagrams) for sent in self.sent]


class World:
    """A gateway's engine and a client's, sharing keys; the gateway has a TUN and two sockets in memory."""

    PEER = 5
    engine: ClassVar[Callable[[], Any]] = PureEngine
    """What makes the gateway's engine; the client's is the one in Python."""

    def __init__(self, *, vnet_hdr: bool = True, offloads: bool = True, segmentation: bool = True,
                 families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6),
                 engine: Callable[[], Any] | None = None) -> None:  # fmt: skip
        self.gateway, self.client = (engine or type(self).engine)(), PureEngine()
        tun, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        for end in (tun, self.kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.tun = tun
        self.vnet_hdr = vnet_hdr
        self.udp4, self.udp6 = FakeUdp(), FakeUdp()
        self.gateway.attach_tun(tun.fileno(), vnet_hdr=vnet_hdr, offloads=offloads)
        for family, fake in ((socket.AF_INET, self.udp4), (socket.AF_INET6, self.udp6)):
            if family in families:
                self.attach(family, fake, port=52625, segmentation=segmentation)
        self.handshake()
        self.gateway.set_path(self.PEER, GATEWAY.ip, CLIENT, None)

    def close(self) -> None:
        self.tun.close()
        self.kernel.close()

    def attach(self, family: int, fake: FakeUdp, **options: Any) -> None:
        attach = self.gateway.attach_udp if isinstance(self.gateway, PureEngine) else self.gateway.play_udp
        attach(family, fake, **options)

    def play_tun(self, monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
        """Let `calls` answer for the TUN's descriptor."""
        if isinstance(self.gateway, PureEngine):
            monkeypatch.setattr(tun_offload, "os", calls)
        else:
            self.gateway.play_tun(calls)

    def limit(self, monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
        """Make tables, queues or turns smaller than usual."""
        for name, value in limits.items():
            monkeypatch.setattr(*_LIMITS[name], value)
        if not isinstance(self.gateway, PureEngine):
            self.gateway.limit(**limits)

    def handshake(self, number: int = 1, *, use: bool = True, peer: int = PEER) -> None:
        to_gateway, to_client = (bytes((number, way, peer)) + bytes(29) for way in (1, 2))
        ours, theirs = 0x1000 * peer + number, 0x9000000 + 0x1000 * peer + number
        self.gateway.add_session(peer, ours, theirs, receive_key=to_gateway, send_key=to_client, now=1.0)
        self.client.add_session(peer, theirs, ours, receive_key=to_client, send_key=to_gateway, now=1.0)
        self.client.use_session(peer, theirs)
        if use:
            self.gateway.use_session(peer, ours)

    def sealed(self, packet: bytes, *, peer: int = PEER) -> bytes:
        """What the client sends for a packet."""
        message = self.client.seal(peer, packet, 1.0)
        assert message is not None
        return message

    def opened(self, message: bytes) -> bytes:
        """What the client reads in a data message."""
        items = self.client.handle_datagram(Datagram(message, GATEWAY, CLIENT, 0), 1.0)
        (packet,) = (item.packet for item in items if isinstance(item, InnerPacket))
        return packet

    def allow(self, packet: bytes, *, inbound: bool, rewrite: Rewrite | None = None, until: float = 100.0,
              token: int = 1, peer: int = PEER) -> None:  # fmt: skip
        self.gateway.install_flow(
            peer, key_of(packet), inbound=inbound, rewrite=rewrite, valid_until=until, token=token
        )

    def arrive(self, payload: bytes, *, source: Endpoint = CLIENT, ecn: int = 0, now: float = 10.0) -> list[Any]:
        return list(self.gateway.handle_datagram(Datagram(payload, source, GATEWAY, ecn), now))

    def written(self) -> list[bytes]:
        """What the gateway writes to the TUN, one entry per write."""
        self.gateway.flush()
        writes = []
        while True:
            try:
                writes.append(self.kernel.recv(1 << 17))
            except BlockingIOError:
                return writes

    def packets(self) -> list[bytes]:
        """The same when nothing is merged."""
        writes = self.written()
        if self.vnet_hdr:
            assert all(write[:10] == NO_VNET for write in writes)
            return [write[10:] for write in writes]
        return writes

    def read(self, packet: bytes, vnet: bytes = NO_VNET, *, now: float = 10.0) -> list[Any]:
        """Let the gateway read one packet from the TUN."""
        self.kernel.send((vnet if self.vnet_hdr else b"") + packet)
        return in_turns(self.gateway, None, now)

    def to_client(self) -> list[bytes]:
        """Packets that the client gets from what the gateway sends on IPv4."""
        self.gateway.flush()
        packets = [self.opened(datagram) for datagram in self.udp4.datagrams]
        self.udp4.sent.clear()
        return packets

    @property
    def counters(self) -> dict[str, int]:
        return dict(self.gateway.counters())


def in_turns(engine: Any, family: int | None, now: float = 10.0) -> list[Any]:
    """The items of as many turns as it takes, on the socket of a family or on the TUN."""
    items: list[Any] = []
    while True:
        items += engine.receive_tun(now) if family is None else engine.receive_udp(family, now)
        if not engine.has_backlog(family):
            return items


@pytest.fixture(scope="module", params=ENGINES, ids=[engine.__name__ for engine in ENGINES])
def each_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Worlds without an engine of their own get this one; for the whole module, as hypothesis wants it."""
    World.engine = request.param
    yield
    World.engine = PureEngine
