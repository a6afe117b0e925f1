"""The process: opens what the host offers, runs the greenlets, shuts down (design 3; spec operations 1.2, 1.14)."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import time
from http.client import HTTPS_PORT
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import AsyncResult, Event
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gevent.threadpool import ThreadPool

from fzg.dataplane.select import EngineUnavailableError, engine_name, make_engine
from fzg.gateway import ConfigureHost, ConfigureUploads, Gateway, KeepToken, Resolve, SendToPortal
from fzg.host import clock, sysctl, trust, tun, udp
from fzg.host.addresses import AddressWatch, local_addresses
from fzg.host.dns_server import DnsServer
from fzg.host.nameservers import Nameservers, Upstream
from fzg.host.network import INTERFACE, HostError, HostNetwork, Report
from fzg.host.reach import addresses_of
from fzg.host.resolver import Resolver
from fzg.mark import SOCKET_MARK
from fzg.node.node import Node
from fzg.ops import control, logs
from fzg.ops.checksums import validating
from fzg.ops.drain import Drain
from fzg.ops.flow_logs import FlowLogs
from fzg.ops.health import Health
from fzg.ops.lag import Histogram, LoopLag
from fzg.ops.metrics import Metrics, Sources
from fzg.ops.notify import Notifier
from fzg.ops.requests import Requests
from fzg.ops.wire_trace import traced
from fzg.portal import identity, url, user_agent
from fzg.portal.backoff import Reconnect
from fzg.portal.dial import DialOptions
from fzg.portal.proxy import InvalidProxy, proxy_for
from fzg.portal.websocket import Login, PortalConnection
from fzg.pumps import Pumps
from fzg.tunnel.flow_record import FlowRecord
from fzg.tunnel.ranges import PEER_V4, PEER_V6
from fzg.tunnel.tunnel import MAX_RESOLUTIONS, RESOLUTION_TIMEOUT, Tunnel
from fzg.version import VERSION
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.keys import KeyPair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fzg.host.network import Configured
    from fzg.portal.messages import CandidateBroadcast, Inbound
    from fzg.settings import Settings

_LOG = logging.getLogger(__name__)
_DNS_TRACE = logging.getLogger("wire.dns.res")

ADDRESSES_SETTLE = 0.5  # s: an interface that comes up changes many times; IPv6 addresses are tentative for a second
REPAIR_INTERVAL = 60.0  # s between looks at our host rules: Docker or a firewall that restarts flushes them
LONGEST_SLEEP = 1.0  # s: a host that was suspended must catch up at once (spec README, clocks)
REFUSALS_WORTH_A_HINT = 3  # datagrams; one alone may have met a firewall that is being reloaded
REPORT_INTERVAL = 1.0  # s between words to the service manager, which may wait for them for a few seconds only
LOOKUP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # s, operations 1.10
GOODBYE_FLUSH = 1.0  # s for the last datagrams and the close frame (operations 1.14)


class FatalError(Exception):
    """The process cannot go on; the message is for the operator."""


class App:
    """One gateway process. `run` returns the exit code or raises `FatalError`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        logs.hide(settings.token)
        self._stop: AsyncResult[None] = AsyncResult()
        self._wake = Event()
        self._host_thread = ThreadPool(1)
        self._resolutions = Pool(MAX_RESOLUTIONS)  # the tunnel asks for no more, so the pool never blocks
        self._tun_configured = settings.tun_fd is not None
        self._host_wanted: ConfigureHost | None = None
        self._host_turn = BoundedSemaphore()
        self._armed_at = float("inf")
        self._network: HostNetwork | None = None
        self._draining: Drain | None = None
        self._sockets: list[udp.UdpSocket] = []
        self._tasks: list[gevent.Greenlet] = []
        self._lag = LoopLag()
        self._lookups = Histogram(LOOKUP_BUCKETS)
        self._notifier = Notifier(os.environ)
        self._report_at = 0.0
        self._hinted = False
        # With a descriptor in place of the TUN no route leads into the tunnel, so no mark is needed to stay out of it.
        self._mark = SOCKET_MARK if settings.tun_fd is None else None

    def run(self) -> int:
        """Start, serve until told to stop, say goodbye. 0 after a signal; raises `FatalError` otherwise."""
        self._handle_signals()
        gevent.get_hub().print_exception = _report_failure
        try:
            self._start()
        except BaseException:
            self._restore_host()
            raise
        gc.freeze()  # else each full collection looks at the program itself too: 40 ms in which no packet moves
        try:
            self._stop.get()
        finally:
            self._shut_down()
        return 0

    def not_ready_because(self) -> str | None:
        """For `/readyz`: the portal was joined and has not given up on us, and the TUN is configured (OPS-40)."""
        if self._stop.ready():
            return "the gateway is shutting down"
        if self._draining is not None and self._draining.is_under_way:
            return f"the gateway is being drained, clients left: {self._draining.remaining}"
        if self._portal.joined_at is None:
            return "the portal has not been joined yet"
        if not self._tun_configured:
            return "the TUN device is not configured yet"
        return None

    # -- start

    def _start(self) -> None:
        settings, now = self._settings, clock.now()
        static = KeyPair.generate(os.urandom)
        try:
            portal_url = url.PortalUrl.parse(settings.api_url)
            trusted, uploads_trusted = trust.trust_store(), trust.trust_store()
            proxy = proxy_for(portal_url.host, portal_url.port, os.environ) if portal_url.secure else None
        except (url.InvalidUrl, InvalidProxy, HostError) as error:
            raise FatalError(str(error)) from error
        try:
            engine = make_engine()
        except EngineUnavailableError as error:
            raise FatalError(str(error)) from error
        self._engine = traced(validating(engine) if settings.validate_checksums else engine)
        self._open_sockets()
        self._open_tun()
        self._clock_steps = clock.StepDetector(now, time.time())
        unix_offset = self._clock_steps.offset
        node = Node(static=static, engine=self._engine, random=os.urandom, unix_offset=unix_offset, now=now)
        self._gateway = Gateway(
            node=node,
            tunnel=Tunnel(now=now, unix_offset=unix_offset),
            engine=self._engine,
            unix_offset=unix_offset,
            now=now,
            flow_logs=settings.flow_logs,
        )
        self._pumps = Pumps(self._engine, self._gateway, settle=self._drain)
        self._resolver = Resolver(mark=self._mark)
        if self._resolver.problem:
            _LOG.warning(self._resolver.problem)
        upstream = Upstream(mark=self._mark)
        self._nameservers = Nameservers(lambda: self._resolver.nameservers, upstream=upstream, clock=clock.now)
        self._dns_server = DnsServer(self._nameservers, upstream=upstream)
        self._lag.start()
        _LOG.info(trusted.description)
        if proxy is not None:
            _LOG.info("The portal is reached through the proxy %s", proxy)
        uploads_trusted.context.set_alpn_protocols(["http/1.1"])
        self._flow_logs = FlowLogs(
            lambda host: DialOptions(
                resolve=addresses_of,
                ssl_context=uploads_trusted.context,
                proxy=proxy_for(host, HTTPS_PORT, os.environ),
                mark=self._mark,
            ),
            user_agent=user_agent.host_user_agent(),
        )
        self._portal = PortalConnection(
            Login(
                url=portal_url,
                token=settings.token,
                external_id=identity.external_id(settings.firezone_id),
                name=settings.name,
                public_key=static.public,
                user_agent=user_agent.host_user_agent(),
            ),
            self,
            dialing=DialOptions(resolve=addresses_of, ssl_context=trusted.context, proxy=proxy, mark=self._mark),
            reconnect=Reconnect(random=os.urandom, max_partition=settings.max_partition_time),
        )
        render_metrics = self._metrics().render if settings.metrics else None
        self._health = Health(settings.health_address, self.not_ready_because, render_metrics)
        self._health.start()
        self._flow_logs.start()
        self._draining = Drain(self._gateway, self._portal, settle=self._drain, finished=lambda: self._stop.set(None))
        requests = Requests(
            gateway=self._gateway,
            portal=self._portal,
            drain=self._draining,
            settings=settings.shown(),
            token=settings.token,
            not_ready_because=self.not_ready_because,
        )
        self._control = control.ControlServer(control.places(os.environ), requests.handlers())
        self._control.start()
        self._essential("timer", self._run_timer)
        self._essential("flusher", self._pumps.run_flusher)
        for opened in self._sockets:
            self._essential("udp", self._pumps.run_udp, opened.socket.fileno(), opened.family)
        self._essential("tun", self._pumps.run_tun, self._tun_fd)
        self._essential("portal", self._portal.run)
        gevent.spawn(self._run_repair)
        gevent.spawn(self._run_address_watch)
        if self._network is not None:
            self._nameservers.start()

    def _metrics(self) -> Metrics:
        return Metrics(
            Sources(
                gateway=self._gateway,
                engine=self._engine,
                portal=self._portal,
                lag=self._lag,
                lookups=self._lookups,
                not_ready_because=self.not_ready_because,
                backlog=self._flow_logs.backlog,
                sockets=[opened.socket for opened in self._sockets],
                log_lines=logs.lines_by_level,
                clock=clock.now,
                facts={"version": VERSION, "engine": engine_name(self._engine)},
                max_partition=self._settings.max_partition_time,
            )
        )

    def _open_sockets(self) -> None:
        settings = self._settings
        try:
            sockets, missing = udp.open_sockets(
                mark=self._mark,
                send_buffer=settings.udp_send_buffer or sysctl.SEND_BUFFER_BYTES,
                receive_buffer=settings.udp_receive_buffer or sysctl.RECEIVE_BUFFER_BYTES,
                gro=settings.offloads.udp_gro,
            )
        except udp.MarkRefusedError as error:
            raise FatalError(str(error)) from error
        if not sockets:
            raise FatalError(f"no UDP socket can be opened: {missing[0].error}") from missing[0].error
        for unbound in missing:
            _LOG.info("No UDP over %s: %s", socket.AddressFamily(unbound.family).name, unbound.error.strerror)
        for opened in sockets:
            if opened.port != udp.PREFERRED_PORT:
                _LOG.info(
                    "UDP port %d is taken, using another; a port forwarding for direct connections must name it",
                    udp.PREFERRED_PORT,
                    extra={"family": socket.AddressFamily(opened.family).name, "port": opened.port},
                )
            self._engine.attach_udp(
                opened.family, opened.socket, port=opened.port, segmentation=settings.offloads.udp_gso
            )
        self._sockets = sockets

    def _open_tun(self) -> None:
        if self._settings.tun_fd is not None:
            self._tun_fd = self._settings.tun_fd
            try:
                os.set_blocking(self._tun_fd, False)
            except OSError as error:
                raise FatalError(f"--tun-fd {self._tun_fd} is no open descriptor") from error
            self._engine.attach_tun(self._tun_fd, offloads=self._settings.offloads.tun)
            return
        try:
            device = tun.open_tun(offloads=self._settings.offloads.tun)
            self._network = HostNetwork()  # from here on: while another gateway holds the device, the rules are its own
            self._say(
                self._host_thread.apply(
                    self._network.prepare,
                    (self._settings.masquerade,),
                    {"raise_buffers": self._settings.increase_buffers},
                )
            )
        except (tun.TunError, HostError) as error:
            raise FatalError(str(error)) from error
        except OSError as error:
            raise FatalError(f"the host's network cannot be prepared: {error}") from error
        if self._settings.offloads.tun and not device.offloads:
            _LOG.info("The kernel has no segmentation offload for TUN devices (it came with Linux 6.2)")
        self._tun_fd = device.descriptor
        self._engine.attach_tun(self._tun_fd, offloads=device.offloads)

    def _say(self, report: Report | Configured) -> None:
        for note in report.notes:
            _LOG.info(note)
        for warning in report.warnings:
            _LOG.warning(warning)

    # -- the portal's callbacks

    def on_connected(self) -> None:
        """The channel is joined."""
        self._gateway.handle_portal_connected(clock.now())
        self._drain()

    def on_message(self, message: Inbound) -> None:
        """One portal message."""
        self._gateway.handle_portal_message(message, clock.now())
        self._drain()

    def on_disconnected(self) -> None:
        """The channel is down; it will be dialled again."""
        self._gateway.handle_portal_disconnected(clock.now())
        self._drain()

    def on_unsent(self, messages: Sequence[CandidateBroadcast]) -> None:
        """Candidates that died with their socket."""
        for message in reversed(messages):
            self._gateway.handle_unsent(message)

    def on_fatal(self, error: Exception) -> None:
        """The portal refused us for good."""
        self._fail(FatalError(logs.chain(error)))

    # -- greenlets

    def _essential(self, name: str, run: Callable[..., None], *arguments: object) -> None:
        greenlet = gevent.spawn(run, *arguments)
        greenlet.name = name
        self._tasks.append(greenlet)
        greenlet.link_exception(lambda dead: self._fail(_as_fatal(name, dead.exception)))

    def _run_timer(self) -> None:
        while True:
            deadline = self._gateway.poll_timeout()
            now = clock.now()
            self._armed_at = min(deadline.at if deadline is not None else now + LONGEST_SLEEP, now + LONGEST_SLEEP)
            self._wake.clear()
            self._wake.wait(max(0.0, self._armed_at - now))
            now = clock.now()
            step = self._clock_steps.check(now, time.time())
            if step is not None:
                _LOG.info("The wall clock was set", extra={"by_seconds": round(step, 3)})
                self._gateway.handle_clock_step(step, now)
            self._gateway.handle_timeout(now)
            self._drain()
            if now >= self._report_at:
                self._report_at = now + REPORT_INTERVAL
                self._report()

    def _report(self) -> None:
        """Once a second, from the greenlet without which nothing goes on: to the service manager, and to the log."""
        logs.summarise_repeats()
        self._hint_at_firewall()
        if not self._notifier.is_wanted:
            return
        connected = sum(1 for connection in self._gateway.node.connections if connection.path is not None)
        clients = f"{connected} client{'' if connected == 1 else 's'} connected"
        not_ready = self.not_ready_because()
        if not_ready is not None:
            status = f"Not ready: {not_ready}"
        elif self._portal.away_since is None:
            status = f"{clients}, portal joined"
        else:
            status = f"{clients}, portal away: {self._portal.last_error}"
        # Only the portal's ends without an error: when a drain has closed it.
        healthy = self._lag.is_healthy and not any(task.dead and not task.successful() for task in self._tasks)
        self._notifier.report(ready=not_ready is None, healthy=healthy, status=status)

    def _hint_at_firewall(self) -> None:
        """Say once that the host itself refuses what we send (operations 1.8)."""
        if self._hinted:
            return
        counters = self._engine.counters()
        refused = sum(counters.get(f"drop_udp_send_{name}", 0) for name in ("eperm", "eacces"))
        if refused >= REFUSALS_WORTH_A_HINT:
            self._hinted = True
            _LOG.info(
                "The host refuses to send UDP (permission denied): check the local firewall for outbound UDP to the"
                " portal's relays (STUN, TURN, port 3478) and to clients (WireGuard, any port)",
                extra={"refused": refused},
            )

    def _drain(self) -> None:
        """Carry out everything the core decided; called after every input, switches to no other greenlet."""
        self._pumps.queue_transmits()
        self._pumps.flush()
        self._carry_out()
        deadline = self._gateway.poll_timeout()
        if deadline is not None and deadline.at < self._armed_at:
            self._wake.set()

    def _carry_out(self) -> None:
        gateway = self._gateway
        while (event := gateway.poll_event()) is not None:
            match event:
                case SendToPortal(message=message):
                    if not self._portal.send(message):
                        gateway.handle_portal_disconnected(clock.now())  # the connection ended, we are told soon
                        gateway.handle_unsent(message)
                case Resolve(request=request, domain=domain):
                    self._resolutions.spawn(self._resolve, request, domain)
                case ConfigureHost():
                    self._host_wanted = event
                    gevent.spawn(self._configure_host, event)
                case ConfigureUploads(settings=settings):
                    self._flow_logs.configure(settings)
                case KeepToken(attribution=attribution):
                    self._flow_logs.keep(attribution)
                case FlowRecord():
                    self._flow_logs.write(event)

    def _resolve(self, request: int, domain: str) -> None:
        addresses = None
        began = clock.now()
        with gevent.Timeout(RESOLUTION_TIMEOUT, exception=False):
            addresses = self._resolver.resolve(domain)
        now = clock.now()
        self._lookups.observe(now - began)
        if _DNS_TRACE.isEnabledFor(logs.TRACE):
            found = "timed out" if addresses is None else [str(address) for address in addresses]
            _DNS_TRACE.log(
                logs.TRACE,
                "A name of a resource was resolved",
                extra={"domain": domain, "addresses": found, "seconds": round(now - began, 4)},
            )
        self._gateway.handle_resolved(request, addresses, now)
        self._drain()

    def _configure_host(self, wanted: ConfigureHost) -> None:
        if self._network is None:
            return
        with self._host_turn:  # addresses that change while the DNS server takes them up could not be listened on
            if wanted is not self._host_wanted:
                return  # a later `init` names others
            try:
                configured = self._host_thread.apply(self._network.configure, (wanted.ipv4, wanted.ipv6))
                self._say(configured)
                served = ((wanted.ipv4, configured.ipv4), (wanted.ipv6, configured.ipv6))
                self._dns_server.bind([address for address, works in served if works])
                families = ((PEER_V4, configured.ipv4), (PEER_V6, configured.ipv6))
                _LOG.info("New routes set", extra={"new_routes": [str(route) for route, works in families if works]})
            except (HostError, OSError) as error:
                self._fail(FatalError(f"the TUN device cannot be configured: {logs.chain(error)}"))
                return
        self._tun_configured = True

    def _list_addresses(self) -> None:
        """Where clients may find us besides what relays see (connectivity D3); without the list all else works."""
        ports = {opened.family: opened.port for opened in self._sockets}
        try:
            found = self._host_thread.apply(local_addresses, (INTERFACE,))
        except OSError as error:
            _LOG.info("The host's addresses cannot be listed", extra={"reason": error.strerror})
            return
        endpoints = [Endpoint.of(str(address), 0) for address in found]
        self._gateway.handle_local_addresses(
            [each._replace(port=ports[each.family]) for each in endpoints if each.family in ports]
        )

    def _run_address_watch(self) -> None:
        try:
            watch = AddressWatch()  # before the list, so that no change falls between the two
            hub = gevent.get_hub()
            while True:
                self._list_addresses()
                hub.wait(hub.loop.io(watch.fileno(), 1))
                gevent.sleep(ADDRESSES_SETTLE)
                watch.drain()
        except OSError as error:
            _LOG.info("Changes of the host's addresses go unnoticed", extra={"reason": error.strerror})

    def _run_repair(self) -> None:
        said: Report | None = None
        while self._network is not None:
            gevent.sleep(REPAIR_INTERVAL)
            try:
                report = self._host_thread.apply(self._network.repair)
            except (HostError, OSError) as error:
                report = Report(warnings=[str(error)])
            if report != said:  # what stays refused is said once
                self._say(report)
            said = report

    # -- stop

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self._interrupt, number)
        gevent.signal_handler(signal.SIGUSR1, self._drain_on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # OPS-28: a closed terminal must not end a gateway

    def _interrupt(self, number: int) -> None:
        if not self._stop.ready():
            _LOG.info("Signal received", extra={"signal": signal.Signals(number).name})
            self._stop.set(None)

    def _drain_on_signal(self) -> None:
        if self._draining is not None:
            self._draining.start()
        else:  # still starting, so there is nobody to send away
            self._interrupt(signal.SIGUSR1)

    def _fail(self, error: FatalError) -> None:
        if not self._stop.ready():
            self._stop.set_exception(error)

    def _shut_down(self) -> None:
        """Close frame, goodbye to clients, allocations deleted, host rules removed; at most a few seconds."""
        _LOG.info("Shutting down")
        self._notifier.stopping()
        self._portal.close(wait=GOODBYE_FLUSH)
        self._gateway.shutdown(clock.now())
        self._pumps.queue_transmits()
        self._engine.flush()
        self._carry_out()
        self._health.stop()
        self._control.stop()
        self._nameservers.stop()
        self._dns_server.close()
        self._restore_host()
        self._flow_logs.close()
        logs.summarise_repeats(now_or_never=True)
        _LOG.info("Goodbye")

    def _restore_host(self) -> None:
        if self._network is None:
            return
        try:
            self._say(self._host_thread.apply(self._network.remove))
        except HostError as error:
            _LOG.warning(str(error))


def _as_fatal(task: str, error: BaseException) -> FatalError:
    said = logs.chain(error)
    return FatalError(said if isinstance(error, HostError) else f"the {task} task ended: {said}")


def _report_failure(context: object, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """A greenlet died of a mistake of ours: into the log, where gevent would write to standard error.

    What a task of a thread pool raises is raised to whoever waits for it, too: gevent names the worker and the task.
    """
    if not issubclass(kind, (FatalError, HostError)) and not isinstance(context, tuple):
        _LOG.error("A task failed", exc_info=(kind, error, traceback))
