"""The request `capture`: inner packets of one client, a bounded number of them for a bounded time."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from gevent.event import Event

from fzg.host import clock
from fzg.ops.control import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.gateway import Gateway

DEFAULT_COUNT = 100
DEFAULT_SECONDS = 10.0
# Without cached flows the client is several times slower: an hour is for what happens rarely, not for keeping records.
MAX_COUNT = 100_000
MAX_SECONDS = 3600.0
# Packets that wait for a slow reader; beyond it they are counted as missed.
MAX_PENDING = 4 << 20  # bytes
# A line of the answer, so that encoding it delays no packet by more than 2 ms.
PACKETS_A_LINE = 64
# How long packets may wait for their line: a person who watches sees no delay, and idle captures cost nothing.
LATENCY = 0.2  # s

LINKTYPE_RAW = 101
"""IPv4 or IPv6, without a link layer."""


class Capture:
    """Takes packets until `count` of them, keeps them until `lines` gives them away."""

    def __init__(self, count: int) -> None:
        self.taken = self.missed = self.octets = 0
        self._count = count
        self._pending: list[tuple[float, bytes]] = []
        self._pending_octets = 0
        self._arrived = Event()
        self._offset = time.time() - clock.now()

    @property
    def is_full(self) -> bool:
        """Whether it has what it was asked for."""
        return self.taken >= self._count

    def tap(self, packet: bytes, now: float) -> None:
        """See `fzg.gateway.Tap`."""
        if self.is_full:
            return
        if self._pending_octets + len(packet) > MAX_PENDING:
            self.missed += 1
            return
        self.taken += 1
        self.octets += len(packet)
        self._pending.append((now + self._offset, packet))
        self._pending_octets += len(packet)
        self._arrived.set()

    def wait(self, seconds: float) -> None:
        """Until a packet is there, and a moment longer for those that follow it."""
        if self._arrived.wait(seconds) and not self.is_full:
            self._arrived.clear()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there: Unix time, and the packet in base64."""
        while self._pending:
            some, self._pending = self._pending[:PACKETS_A_LINE], self._pending[PACKETS_A_LINE:]
            self._pending_octets -= sum(len(packet) for _, packet in some)
            yield {"packets": [[round(moment, 6), base64.b64encode(packet).decode()] for moment, packet in some]}


def capture(gateway: Gateway, client_id: str, *, count: int, seconds: float) -> Iterator[dict[str, Any]]:
    """The client and the link type, lines of `packets`, and at last why it ended. Raises `Refused`."""
    taken = Capture(count)
    if not gateway.tap(client_id, taken.tap):
        raise Refused(f"the packets of client {client_id} are being captured already")
    deadline = clock.now() + seconds
    ended = None
    try:
        yield {"client": client_id, "linktype": LINKTYPE_RAW}
        while ended is None:
            taken.wait(min(LATENCY, max(0.0, deadline - clock.now())))
            if taken.is_full:
                ended = "count"
            elif clock.now() >= deadline:
                ended = "time"
            elif not gateway.is_tapped(client_id, taken.tap):
                ended = "client gone"
            yield from taken.lines()
    finally:
        gateway.untap(client_id, taken.tap)
    yield {"ended": ended, "captured": taken.taken, "bytes": taken.octets, "missed": taken.missed}
