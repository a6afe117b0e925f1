"""Engines under a core that decides: nothing is lost, doubled or overtaken between what it lets out and flows carry."""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fzg.dataplane.engine import FlowReport, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.dataplane.pure import PureEngine
from fzg.sansio import Transmit
from tests.unit.dataplane_world import ACK, CLIENT, CLIENT4, PSH, SERVER4, SYN, World, each_engine, key_of, tcp, udp  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("each_engine")

PEERS = (5, 6)
FLOWS = 4
LETS_BY, JUDGES_EACH, REFUSES = range(3)
SIZE = 100

burst = st.lists(st.tuples(st.integers(0, FLOWS - 1), st.integers(1, 12)), min_size=1, max_size=8)
step = st.tuples(
    st.sampled_from(["up", "up", "down", "down", "later", "revoke", "sweep"]),
    st.sampled_from(PEERS),
    burst,
    st.integers(0, 3),  # seconds, or whether a burst comes as one read
)


class Core:
    """Judges packets as the tunnel would. What a flow's packets carry is their number."""

    def __init__(self, rules: Sequence[int], validity: float) -> None:
        self.world = World()
        self.engine: Any = self.world.gateway
        self.rules, self.validity = rules, validity
        self.now = 10.0
        self.numbers: dict[tuple[str, int, int], int] = {}
        self.offered: dict[tuple[str, int, int], list[int]] = {}
        self.got: dict[tuple[str, int, int], list[int]] = {}
        self.judged = self.forwarded = self.reported = 0
        for peer in PEERS:
            if peer != PEERS[0]:
                self.world.handshake(peer=peer)
            self.engine.set_path(peer, None, CLIENT, None)

    def address(self, peer: int) -> bytes:
        return CLIENT4[:3] + bytes((peer,))

    def packet(self, way: str, peer: int, flow: int, *, count: int = 1) -> bytes:
        """The next packet of a flow, or so many in one; each is its number again and again."""
        name = (way, peer, flow)
        first = self.numbers.get(name, 0)
        self.numbers[name] = first + count
        self.offered.setdefault(name, []).extend(range(first, first + count))
        payload = b"".join(struct.pack(">I", number) * (SIZE // 4) for number in range(first, first + count))
        ends = (self.address(peer), SERVER4) if way == "up" else (SERVER4, self.address(peer))
        fields = {"source": ends[0], "destination": ends[1], "sport": flow, "dport": 9}
        if flow % 2:
            return udp(payload, **fields)
        flags = (SYN if first == 0 and count == 1 else ACK) | (PSH if first % 5 == 0 else 0)
        return tcp(payload, **fields, seq=first * SIZE, flags=flags)

    def up(self, peer: int, parts: Sequence[tuple[int, int]]) -> None:
        messages = [self.world.sealed(self.packet("up", peer, flow), peer=peer) for flow, n in parts for _ in range(n)]
        while messages:
            size = len(messages[0])
            train = next((i for i, message in enumerate(messages) if len(message) != size), len(messages))
            self.world.udp4.put(b"".join(messages[:train]), stride=size)
            messages = messages[train:]
        self.turns(socket.AF_INET)

    def down(self, peer: int, parts: Sequence[tuple[int, int]], *, merged: bool) -> None:
        for flow, count in parts:
            if merged and count > 1:
                packet = self.packet("down", peer, flow, count=count)
                offset, gso = (16, 1) if packet[9] == 6 else (6, 5)
                self.world.kernel.send(struct.pack("=BBHHHH", 1, gso, 0, SIZE, 20, offset) + packet)
                continue
            for _ in range(count):
                self.world.kernel.send(bytes(10) + self.packet("down", peer, flow))
        self.turns(None)

    def turns(self, family: int | None) -> None:
        while True:
            items = self.engine.receive_tun(self.now) if family is None else self.engine.receive_udp(family, self.now)
            for item in items:
                self.judge(item)
            self.take()
            arrived = self.world.udp4.arrivals if family else select.select([self.world.tun], [], [], 0)[0]
            if not self.engine.has_backlog(family) and not arrived and not items:
                return

    def judge(self, item: Any) -> None:
        match item:
            case SessionConfirmed():
                return
            case FlowReport(packets=packets):
                self.reported += packets
                return
            case InnerPacket(peer=peer, packet=packet):
                inbound, flow = True, packet[21]
            case OutboundPacket(packet=packet):
                inbound, flow, peer = False, packet[21], packet[19]
        self.judged += 1
        rule = self.rules[flow]
        if rule == REFUSES:
            return
        if rule == LETS_BY and not (packet[9] == 6 and packet[33] & SYN):
            self.engine.install_flow(
                peer, key_of(packet), inbound=inbound, rewrite=None, valid_until=self.now + self.validity, token=1
            )
        if inbound:
            self.engine.write_tun(packet, peer)
        else:
            sealed = self.engine.seal(peer, packet, self.now)
            assert sealed is not None
            self.engine.transmit(Transmit(CLIENT, sealed, None, 0, peer))
        self.forwarded += 1

    def take(self) -> None:
        for write in self.world.written():
            self.note("up", write[10:], write[22])
        for packet in self.world.to_client():
            self.note("down", packet, packet[19])

    def note(self, way: str, packet: bytes, peer: int) -> None:
        """The numbers in a packet, or in several that were merged."""
        payload = packet[40 if packet[9] == 6 else 28 :]
        assert len(payload) % SIZE == 0
        peer = packet[15] if way == "up" else peer
        numbers = [struct.unpack_from(">I", payload, at)[0] for at in range(0, len(payload), SIZE)]
        self.got.setdefault((way, peer, packet[21]), []).extend(numbers)

    def check(self) -> None:
        allowed = {name: numbers for name, numbers in self.offered.items() if self.rules[name[2]] != REFUSES}
        assert self.got == allowed
        self.reported += sum(report.packets for report in self.engine.sweep(self.now + 100))
        assert self.reported + self.forwarded == sum(map(len, allowed.values()))
        assert not any(name.startswith("drop") for name in self.world.counters)


@example(  # more than a turn of the engine in Python takes
    [LETS_BY] * FLOWS, 1.0, [("down", PEERS[0], [(0, 1)], 0), ("down", PEERS[0], [(0, 12)] * 8, 0)]
)
@given(
    st.lists(st.sampled_from([LETS_BY, LETS_BY, JUDGES_EACH, REFUSES]), min_size=FLOWS, max_size=FLOWS),
    st.sampled_from([0.0, 1.0, 1.0]),
    st.lists(step, max_size=12),
)
@settings(deadline=None)
def test_what_flows_carry_and_what_the_core_lets_out_is_what_came_in_order(
    rules: list[int], validity: float, steps: list[tuple[str, int, list[tuple[int, int]], int]]
) -> None:
    core = Core(rules, validity)
    try:
        for order, peer, parts, number in steps:
            match order:
                case "up":
                    core.up(peer, parts)
                case "down":
                    core.down(peer, parts, merged=number > 1)
                case "later":
                    core.now += number
                case "revoke":
                    core.engine.revoke(peer)
                case _:
                    core.reported += sum(report.packets for report in core.engine.sweep(core.now))
        core.check()
    finally:
        core.world.close()


def test_in_a_steady_flow_one_packet_a_second_is_judged() -> None:
    core = Core([LETS_BY] * FLOWS, 1.0)
    core.now += 0.5
    for _ in range(100):  # ten seconds
        core.up(PEERS[0], [(1, 12)] * 2)
        core.down(PEERS[0], [(1, 12)] * 2, merged=True)
        core.now += 0.1
    core.check()
    if not isinstance(core.engine, PureEngine):
        assert core.judged <= 22
    core.world.close()
