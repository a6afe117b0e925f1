"""Packets between the descriptors, the engine and the core, in turns that leave time for everything else (design 3)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from fzg.dataplane.engine import Datagram, FlowReport, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.host import clock
from fzg.host.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fzg.dataplane.engine import Engine, Item
    from fzg.gateway import Gateway

# What a watcher of libev waits for.
_READABLE = 1
_WRITABLE = 2


class Pumps:
    """`run_udp`, `run_tun` and `run_flusher` are greenlets; `settle` carries out what the core decided, and flushes."""

    def __init__(self, engine: Engine, gateway: Gateway, *, settle: Callable[[], None]) -> None:
        self._engine = engine
        self._gateway = gateway
        self._settle = settle
        self._congested = Event()
        self._flowing = Event()
        self._flowing.set()

    def run_udp(self, descriptor: int, family: int) -> None:
        """From the socket of this family."""
        for _ in self._turns(descriptor, family):
            now = clock.now()
            self._take(self._engine.receive_udp(family, now), now)

    def run_tun(self, descriptor: int) -> None:
        """From the TUN. Raises HostError when it is gone."""
        for _ in self._turns(descriptor, None):
            self._flowing.wait()
            now = clock.now()
            try:
                items = self._engine.receive_tun(now)
            except OSError as error:
                raise HostError(f"the TUN device is gone: {error.strerror}; was it deleted?") from error
            self._take(items, now)

    def run_flusher(self) -> None:
        """Write on what full kernel queues refused; the TUN is not read meanwhile, so nothing overtakes."""
        hub = gevent.get_hub()
        while True:
            self._congested.wait()
            while not self._engine.flush():
                for descriptor in self._engine.congested():
                    hub.wait(hub.loop.io(descriptor, _WRITABLE))
            self._congested.clear()
            self._flowing.set()

    def queue_transmits(self) -> bool:
        """Give the engine what the core has said so far, if anything."""
        said = False
        while (transmit := self._gateway.poll_transmit()) is not None:
            self._engine.transmit(transmit)
            said = True
        return said

    def flush(self) -> None:
        """Write what the engine has queued; what the kernel does not take now is left to the flusher. Never waits."""
        if not self._engine.flush():
            self._flowing.clear()
            self._congested.set()

    def _turns(self, descriptor: int, family: int | None) -> Iterator[None]:
        """Wait for the descriptor's own watcher before each bounded turn, so that no socket starves (design 3).

        While the engine has a backlog the watcher is that of a descriptor which is always readable.
        """
        hub = gevent.get_hub()
        watcher, at_once = hub.loop.io(descriptor, _READABLE), hub.loop.io(os.eventfd(1), _READABLE)
        while True:
            hub.wait(at_once if self._engine.has_backlog(family) else watcher)
            yield

    def _take(self, items: Sequence[Item], now: float) -> None:
        if items:
            dispatch(self._gateway, items, now, answer=self._answer)
            self._settle()
        else:  # the engine settled everything, so the core has nothing to say
            self.flush()

    def _answer(self) -> None:
        if self.queue_transmits():
            self.flush()


def dispatch(gateway: Gateway, items: Sequence[Item], now: float, *, answer: Callable[[], None] | None = None) -> None:
    """Hand what the engine did not settle to the core, control first: data must not delay a handshake of its batch.

    `answer` is called between datagrams, for a handshake takes half a millisecond.
    """
    datagrams = [item for item in items if isinstance(item, Datagram)]
    for number, datagram in enumerate(datagrams):
        if number and answer is not None:
            answer()
        gateway.handle_datagram(datagram.payload, datagram.source, datagram.local, now)
    for item in items:
        match item:
            case Datagram():
                pass
            case SessionConfirmed(local_index=local_index):
                gateway.handle_session_confirmed(local_index, now)
            case InnerPacket(peer=peer, packet=packet, ecn=ecn, source=source, local=local):
                gateway.handle_inner_packet(peer, packet, ecn, now, (source, local))
            case OutboundPacket(packet=packet):
                gateway.handle_outbound_packet(packet, now)
            case FlowReport():
                gateway.handle_flow_report(*item)
