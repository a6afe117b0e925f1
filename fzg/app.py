"""The process: opens what the host offers, runs the greenlets, shuts down (design 3; spec operations 1.2, 1.14)."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

import gevent
from gevent.event import AsyncResult, Event
from gevent.pool import Pool
from gevent.threadpool import ThreadPool

from fzg.dataplane.engine import Datagram, FlowReport, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.dataplane.pure import PureEngine
from fzg.gateway import ConfigureHost, Gateway, Resolve, SendToPortal
from fzg.host import clock, sysctl, trust, tun, udp
from fzg.host.network import HostNetwork, HostNetworkError
from fzg.host.resolver import Resolver
from fzg.node.node import Node
from fzg.ops import logs
from fzg.ops.health import Health
from fzg.portal import url, user_agent
from fzg.portal.websocket import PortalConnection
from fzg.tunnel.tunnel import Tunnel
from fzg.wireguard.keys import KeyPair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fzg.dataplane.engine import Item
    from fzg.portal import messages
    from fzg.settings import Settings

_LOG = logging.getLogger(__name__)

LONGEST_SLEEP = 1.0  # s: a host that was suspended must catch up at once (spec README, clocks)
RESOLVE_TIMEOUT = 10.0  # s for one name (tunnel 1.3)
CONCURRENT_RESOLUTIONS = 1000  # tunnel 1.3; the tunnel refuses more, so the pool never blocks
GOODBYE_FLUSH = 1.0  # s for the last datagrams and the close frame (operations 1.14)


class FatalError(Exception):
    """The process cannot go on; the message is for the operator."""


class App:
    """One gateway process. `run` returns the exit code or raises `FatalError`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop: AsyncResult[None] = AsyncResult()
        self._wake = Event()
        self._host_thread = ThreadPool(1)
        self._resolutions = Pool(CONCURRENT_RESOLUTIONS)
        self._tun_configured = settings.tun_fd is not None
        self._joined_once = False
        self._armed_at = float("inf")

    def run(self) -> int:
        """Start, serve until told to stop, say goodbye. 0 after a signal; raises `FatalError` otherwise."""
        self._start()
        try:
            self._stop.get()
        finally:
            self._shut_down()
        return 0

    def not_ready_because(self) -> str | None:
        """For `/readyz`: the portal was joined and has not given up on us, and the TUN is configured (OPS-40)."""
        if not self._joined_once:
            return "the portal has not been joined yet"
        if not self._tun_configured:
            return "the TUN device is not configured yet"
        return None

    # -- start

    def _start(self) -> None:
        settings, now = self._settings, clock.now()
        if settings.increase_buffers and settings.tun_fd is None:
            sysctl.raise_socket_buffers()
        static = KeyPair.generate(os.urandom)
        try:
            endpoint = url.portal_url(settings.api_url)
        except url.UrlError as error:
            raise FatalError(f"the portal's address {settings.api_url!r} cannot be used: {error}") from error
        self._engine = PureEngine(offloads=settings.offloads)
        self._open_sockets()
        self._open_tun()
        unix_offset = clock.unix_offset()
        node = Node(static=static, engine=self._engine, random=os.urandom, unix_offset=unix_offset, now=now)
        self._gateway = Gateway(
            node=node, tunnel=Tunnel(now=now), engine=self._engine, unix_offset=unix_offset, now=now
        )
        self._resolver = Resolver()
        self._clock_steps = clock.StepDetector()
        self._health = Health(settings.health_address, self)
        self._health.start()
        context, store = trust.client_context()
        _LOG.info("Portal certificates are checked against %s", store)
        self._portal = PortalConnection(
            url=endpoint,
            token=settings.token,
            external_id=settings.firezone_id,
            name=settings.name,
            public_key=static.public,
            user_agent=user_agent.user_agent(),
            tls_context=context,
            max_partition_time=settings.max_partition_time,
            handler=self,
        )
        self._handle_signals()
        self._essential("timer", self._run_timer)
        for family in self._families:
            self._essential("udp", self._run_pump, self._udp_sockets[family].fileno(), self._receive_udp, family)
        self._essential("tun", self._run_pump, self._tun_fd, self._receive_tun)
        self._essential("portal", self._portal.run)

    def _open_sockets(self) -> None:
        settings = self._settings
        self._udp_sockets = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            opened = udp.open_socket(
                family,
                send_buffer=settings.udp_send_buffer,
                receive_buffer=settings.udp_receive_buffer,
                gro=settings.offloads.udp_gro,
                mark=settings.tun_fd is None,
            )
            if opened is not None:
                self._udp_sockets[family] = opened
                self._engine.attach_udp(family, opened)
        self._families = tuple(self._udp_sockets)

    def _open_tun(self) -> None:
        if self._settings.tun_fd is not None:
            self._tun_fd = self._settings.tun_fd
            os.set_blocking(self._tun_fd, False)
            self._engine.attach_tun(self._tun_fd, offloads=self._settings.offloads.tun)
            self._network = None
            return
        try:
            device = tun.open_tun(offloads=self._settings.offloads.tun)
            self._network = HostNetwork(masquerade=str(self._settings.masquerade))
            self._on_host_thread(self._network.prepare)
        except (tun.TunError, HostNetworkError) as error:
            raise FatalError(str(error)) from error
        self._tun_fd = device.fileno()
        self._tun_device = device
        self._engine.attach_tun(self._tun_fd, offloads=device.offloads)

    def _on_host_thread(self, call: Callable[..., Sequence[str]], *arguments: object) -> None:
        for warning in self._host_thread.apply(call, arguments):
            _LOG.warning(warning)

    # -- the portal's callbacks

    def on_connected(self) -> None:
        """The channel is joined."""
        self._joined_once = True
        now = clock.now()
        self._gateway.handle_portal_connected(now)
        self._drain()

    def on_message(self, message: messages.Inbound) -> None:
        """One portal message."""
        now = clock.now()
        self._gateway.handle_portal_message(message, now)
        self._drain()

    def on_disconnected(self) -> None:
        """The channel is down; it will be dialled again."""
        now = clock.now()
        self._gateway.handle_portal_disconnected(now)
        self._drain()

    def on_unwritten(self, message: messages.Outbound) -> None:
        """A message that died with its socket."""
        self._gateway.handle_unwritten(message)

    def on_fatal(self, error: Exception) -> None:
        """The portal refused us for good."""
        self._fail(FatalError(logs.chain(error)))

    # -- greenlets

    def _essential(self, name: str, run: Callable[..., None], *arguments: object) -> None:
        greenlet = gevent.spawn(run, *arguments)
        greenlet.name = name
        greenlet.link_exception(
            lambda dead: self._fail(FatalError(f"the {name} task ended: {logs.chain(dead.exception)}"))
        )

    def _run_timer(self) -> None:
        while True:
            deadline = self._gateway.poll_timeout()
            now = clock.now()
            self._armed_at = min(deadline.at if deadline is not None else now + LONGEST_SLEEP, now + LONGEST_SLEEP)
            self._wake.clear()
            self._wake.wait(max(0.0, self._armed_at - now))
            now = clock.now()
            step = self._clock_steps.check(now)
            if step:
                _LOG.info("The wall clock was set", extra={"by_seconds": round(step, 3)})
                self._gateway.handle_clock_step(step, now)
            self._gateway.handle_timeout(now)
            self._drain()

    def _run_pump(self, fd: int, receive: Callable[..., Sequence[Item]], *arguments: int) -> None:
        """Wait for the descriptor's own watcher before each bounded turn, so that no socket starves (design 3)."""
        hub = gevent.get_hub()
        watcher = hub.loop.io(fd, 1)
        while True:
            hub.wait(watcher)
            now = clock.now()
            self._dispatch(receive(*arguments, now), now)
            self._drain()

    def _receive_udp(self, family: int, now: float) -> Sequence[Item]:
        return self._engine.receive_udp(family, now)

    def _receive_tun(self, now: float) -> Sequence[Item]:
        return self._engine.receive_tun(now)

    def _dispatch(self, items: Sequence[Item], now: float) -> None:
        """Control first: a flood of data must not delay a handshake found in the same batch."""
        gateway = self._gateway
        for item in items:
            match item:
                case Datagram(payload=payload, source=source, local=local):
                    gateway.handle_datagram(payload, source, local, now)
                case SessionConfirmed(local_index=local_index):
                    gateway.handle_session_confirmed(local_index, now)
                case InnerPacket(peer=peer, packet=packet, ecn=ecn):
                    gateway.handle_inner_packet(peer, packet, ecn, now)
                case OutboundPacket(packet=packet):
                    gateway.handle_outbound_packet(packet, now)
                case FlowReport():
                    gateway.handle_flow_report(*item)

    def _drain(self) -> None:
        """Carry out everything the core decided; called after every input, switches to no other greenlet."""
        gateway, engine = self._gateway, self._engine
        while (transmit := gateway.poll_transmit()) is not None:
            engine.transmit(transmit)
        engine.flush()
        while (event := gateway.poll_event()) is not None:
            match event:
                case SendToPortal(message=message):
                    self._portal.send(message)
                case Resolve(request=request, domain=domain):
                    self._resolutions.spawn(self._resolve, request, domain)
                case ConfigureHost():
                    gevent.spawn(self._configure_host, event)
        deadline = gateway.poll_timeout()
        if deadline is not None and deadline.at < self._armed_at:
            self._wake.set()

    def _resolve(self, request: int, domain: str) -> None:
        addresses = None
        with gevent.Timeout(RESOLVE_TIMEOUT, exception=False):
            addresses = self._resolver.resolve(domain)
        now = clock.now()
        self._gateway.handle_resolved(request, addresses, now)
        self._drain()

    def _configure_host(self, wanted: ConfigureHost) -> None:
        if self._network is None:
            return
        try:
            result = self._host_thread.apply(self._network.configure, (wanted.ipv4, wanted.ipv6))
        except HostNetworkError as error:
            self._fail(FatalError(str(error)))
            return
        for warning in result.warnings:
            _LOG.warning(warning)
        self._tun_configured = True

    # -- stop

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self._interrupt, number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # OPS-28: a closed terminal must not end a gateway

    def _interrupt(self, number: int) -> None:
        if not self._stop.ready():
            _LOG.info("Shutting down", extra={"signal": signal.Signals(number).name})
            self._stop.set(None)

    def _fail(self, error: FatalError) -> None:
        if not self._stop.ready():
            self._stop.set_exception(error)

    def _shut_down(self) -> None:
        """Close frame, goodbye to clients, allocations deleted, host rules removed; at most a few seconds."""
        now = clock.now()
        self._portal.close(timeout=GOODBYE_FLUSH)
        self._gateway.shutdown(now)
        while (transmit := self._gateway.poll_transmit()) is not None:
            self._engine.transmit(transmit)
        self._engine.flush()
        self._health.stop()
        if self._network is not None:
            self._on_host_thread(self._network.remove)
        _LOG.info("Goodbye")
