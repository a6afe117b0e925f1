"""Packets per second of an engine without the kernel's share: `python -m tests.bench.engine_throughput`."""

from __future__ import annotations

import errno
import os
import socket
import statistics
import struct
import time
from typing import TYPE_CHECKING, Any

from fzg.dataplane import pure
from tests.unit.dataplane_world import CLIENT4, SERVER4, FakeUdp, World, tcp

if TYPE_CHECKING:
    from collections.abc import Sequence

PAYLOAD = 1228  # bytes of TCP payload in a packet of 1280
TRAIN = 48  # packets in a GRO train and in a TUN super-packet
ROUNDS = 7
PACKETS = 9600


class Sink(FakeUdp):
    """Takes everything without looking at it."""

    count = 0

    def sendmsg(self, payloads: Any, ancillary: Any, flags: int, address: tuple[str, int]) -> int:
        self.count += len(payloads)
        return sum(map(len, payloads))


class Source:
    """Stands in for `os` where the engine reads its TUN: the same super-packet as often as asked."""

    def __init__(self, read: bytes) -> None:
        self.read, self.left = read, 0

    def readv(self, descriptor: int, buffers: Sequence[bytearray]) -> int:
        if not self.left:
            raise BlockingIOError(errno.EAGAIN, "")
        self.left -= 1
        buffers[0][: len(self.read)] = self.read
        return len(self.read)


def segments(count: int, source: bytes, destination: bytes) -> list[bytes]:
    return [
        tcp(os.urandom(PAYLOAD), source=source, destination=destination, seq=1 + i * PAYLOAD, ident=i & 0xFFFF,
            options=b"\1\1\x08\x0a" + bytes(8))
        for i in range(count)
    ]  # fmt: skip


def inbound(world: World) -> float:
    """Seconds per packet from sealed GRO trains to merged TUN writes."""
    packets = segments(PACKETS, CLIENT4, SERVER4)
    world.allow(packets[0], inbound=True)
    for start in range(0, PACKETS, TRAIN):
        train = b"".join(map(world.sealed, packets[start : start + TRAIN]))
        world.udp4.put(train, stride=1312)
    began = time.process_time()
    while world.udp4.arrivals:
        world.gateway.receive_udp(socket.AF_INET, 10.0)
        world.gateway.flush()
    return (time.process_time() - began) / PACKETS


def outbound(world: World) -> float:
    """Seconds per packet from TUN super-packets to GSO batches."""
    packets = segments(TRAIN, SERVER4, CLIENT4)
    world.allow(packets[0], inbound=False)
    whole = tcp(os.urandom(PAYLOAD * TRAIN), source=SERVER4, destination=CLIENT4, options=b"\1\1\x08\x0a" + bytes(8))
    source = Source(struct.pack("=BBHHHH", 1, 1, 52, PAYLOAD, 20, 16) + whole)
    sink = Sink()
    world.gateway.attach_udp(socket.AF_INET, sink, port=1)  # type: ignore[arg-type]
    kept, pure.os = pure.os, source  # type: ignore[assignment]
    try:
        began = time.process_time()
        for _ in range(PACKETS // TRAIN // 2):
            source.left = 2
            world.gateway.receive_tun(10.0)
            world.gateway.flush()
        spent = time.process_time() - began
    finally:
        pure.os = kept
    assert sink.count == PACKETS
    return spent / PACKETS


def main() -> None:
    for measure in (inbound, outbound):
        results = []
        for _ in range(ROUNDS):
            world = World()
            devnull = os.open("/dev/null", os.O_WRONLY)
            world.gateway.attach_tun(devnull)
            results.append(measure(world))
            os.close(devnull)
            world.close()
        median = statistics.median(results)
        print(
            f"{measure.__name__:9} {1 / median:9,.0f} packets/s  {median * 1e6:5.2f} us/packet"
            f" (best {min(results) * 1e6:.2f})  {PAYLOAD * 8 / median / 1e9:.2f} Gbit/s"
        )


if __name__ == "__main__":
    main()
