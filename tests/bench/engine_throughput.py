"""Packets per second of the engines without the kernel's share: `python -m tests.bench.engine_throughput [SIZE...]`.

Inbound: sealed GRO trains become merged TUN writes (open, flow hit, translation). Outbound: TUN super-packets become
GSO batches (flow hit, translation, split, seal). The kernel is played by objects that give and take whole trains.
"""

from __future__ import annotations

import errno
import os
import socket
import statistics
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

from fzg.dataplane import pure
from fzg.dataplane.engine import Rewrite
from fzg.dataplane.pure import PureEngine
from tests.unit.dataplane_world import CLIENT4, ENGINES, SERVER4, FakeUdp, World, tcp, udp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = (64, 1280)  # bytes of an inner packet; small ones are UDP, others TCP with timestamps
TRAIN = 48  # packets in a GRO train and in a TUN super-packet
ROUNDS = 5
PACKETS = {"PureEngine": 4800, "NativeEngine": 96_000}
PROXY4 = bytes((100, 96, 0, 1))
TIMESTAMPS = b"\1\1\x08\x0a" + bytes(8)
TURN = 192  # packets between two flushes


class Sink(FakeUdp):
    """Takes everything without looking at it."""

    octets = 0

    def sendmsg(self, payloads: Any, ancillary: Any, flags: int, address: tuple[str, int]) -> int:
        octets = sum(map(len, payloads))
        self.octets += octets
        return octets


class Device:
    """Stands in for `os` where an engine reads and writes its TUN: the same super-packet as often as asked."""

    def __init__(self, read: bytes = b"") -> None:
        self.read, self.left, self.written = read, 0, 0

    def readv(self, descriptor: int, buffers: Sequence[bytearray]) -> int:
        if not self.left:
            raise BlockingIOError(errno.EAGAIN, "")
        self.left -= 1
        buffers[0][: len(self.read)] = self.read
        return len(self.read)

    def writev(self, descriptor: int, parts: Sequence[bytes]) -> int:
        octets = sum(map(len, parts))
        self.written += octets
        return octets


def packet(size: int, index: int, **addresses: Any) -> bytes:
    if size <= 64:
        return udp(os.urandom(size - 28), ident=index & 0xFFFF, **addresses)
    payload = size - 52
    return tcp(
        os.urandom(payload),
        seq=1 + index * payload & 0xFFFF_FFFF,
        ident=index & 0xFFFF,
        options=TIMESTAMPS,
        **addresses,
    )


def play(world: World, device: Device) -> Callable[[], None]:
    """Let the device answer for the TUN; returns what undoes it."""
    if not isinstance(world.gateway, PureEngine):
        world.gateway.play_tun(device)
        return lambda: None
    from fzg.dataplane import tun_offload

    kept = pure.os, tun_offload.os
    pure.os = tun_offload.os = device  # type: ignore[assignment]

    def restore() -> None:
        pure.os, tun_offload.os = kept

    return restore


def inbound(world: World, size: int, count: int) -> float:
    """Seconds per packet from sealed GRO trains to merged TUN writes."""
    packets = [packet(size, index, source=CLIENT4, destination=PROXY4) for index in range(TRAIN)]
    world.allow(packets[0], inbound=True, rewrite=Rewrite(SERVER4, 7))
    device = Device()
    restore = play(world, device)
    spent = 0.0
    try:
        for _ in range(0, count, TURN):
            for _ in range(TURN // TRAIN):
                world.udp4.put(b"".join(map(world.sealed, packets)), stride=size + 32)
            began = time.thread_time()
            while world.udp4.arrivals:
                world.gateway.receive_udp(socket.AF_INET, 10.0)
                world.gateway.flush()
            spent += time.thread_time() - began
    finally:
        restore()
    assert device.written > count * (size - 53)
    return spent / count


def outbound(world: World, size: int, count: int) -> float:
    """Seconds per packet from TUN super-packets to GSO batches."""
    first = packet(size, 0, source=SERVER4, destination=CLIENT4)
    world.allow(first, inbound=False, rewrite=Rewrite(PROXY4, 50000))
    header = 28 if size <= 64 else 52
    payload = os.urandom((size - header) * TRAIN)
    whole = (
        udp(payload, source=SERVER4, destination=CLIENT4)
        if size <= 64
        else tcp(payload, source=SERVER4, destination=CLIENT4, options=TIMESTAMPS)
    )
    vnet = struct.pack("=BBHHHH", 1, 5 if size <= 64 else 1, header, size - header, 20, 6 if size <= 64 else 16)
    device, sink = Device(vnet + whole), Sink()
    world.attach(socket.AF_INET, sink, port=1)
    restore = play(world, device)
    spent = 0.0
    try:
        for _ in range(0, count, TURN):
            device.left = TURN // TRAIN
            began = time.thread_time()
            while device.left:
                world.gateway.receive_tun(10.0)
                world.gateway.flush()
            spent += time.thread_time() - began
    finally:
        restore()
    assert sink.octets == count // TURN * TURN * (size + 32)
    return spent / count


def main() -> None:
    for size in map(int, sys.argv[1:]) if sys.argv[1:] else SIZES:
        for measure in (inbound, outbound):
            results: dict[str, list[float]] = {engine.__name__: [] for engine in ENGINES}
            for _ in range(ROUNDS):  # interleaved, so that a noisy minute meets both
                for engine in ENGINES:
                    world = World(engine=engine)
                    results[engine.__name__].append(measure(world, size, PACKETS[engine.__name__]))
                    world.close()
            for name, seconds in results.items():
                median = statistics.median(seconds)
                print(
                    f"{measure.__name__:8} {size:4} bytes {name:12} {1 / median:9,.0f} packets/s"
                    f"  {median * 1e6:5.2f} us/packet (best {min(seconds) * 1e6:.2f})"
                    f"  {size * 8 / median / 1e9:.2f} Gbit/s"
                )


if __name__ == "__main__":
    main()
