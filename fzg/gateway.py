"""The core: joins portal, node and tunnel. Every rule that needs two of them is here; no I/O, no clock."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from typing import TYPE_CHECKING, Protocol, assert_never

from fzg.ice.agent import Credentials
from fzg.node.node import (
    GOODBYE,
    ConnectionEstablished,
    ConnectionFailed,
    Node,
    NoRelayAvailableError,
    RelaysExhausted,
)
from fzg.node.signalling import CandidateMessage
from fzg.portal import messages
from fzg.sansio import Deadline, Transmit, earliest
from fzg.tunnel import filters, ingest_token, resources, traffic
from fzg.tunnel.events import (
    Claimed,
    ClientEmpty,
    ClientGone,
    Consumed,
    Deliver,
    Drop,
    Forward,
    Reply,
    ResolveDomain,
    Revoked,
    SendToClient,
)
from fzg.tunnel.flow_record import FlowRecord
from fzg.tunnel.tunnel import LEAST_CLOCK_STEP
from fzg.turn.events import Relay
from fzg.waiting_authorizations import WaitingAuthorizations
from fzg.wire import Malformed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.dataplane.engine import Engine
    from fzg.tunnel.events import Flow
    from fzg.tunnel.flow_log import Path
    from fzg.tunnel.ingest_token import Attribution
    from fzg.tunnel.tunnel import Tunnel
    from fzg.wire.endpoint import Endpoint

_LOG = logging.getLogger(__name__)

NO_RELAYS_INTERVAL = 1.0  # s between two requests for relays (turn 4.5)
# A goodbye travels a second at most, and what the client had sent by then arrives within another.
FAREWELL_SILENCE = 2.0  # s
SWEEP_INTERVAL = 1.0  # s between reports of what flows carried (design 4)
FAR_FUTURE = 86_400.0  # s: what an expiry that no clock can hold becomes (tunnel 5.7)
NOTEWORTHY_CLOCK_STEP = 60.0  # s back; a minute less of access is for the portal and the client to settle
MAX_UNIX_TIME = 1 << 40  # s: beyond this an expiry is not a date (year 36,000)


@dataclass(frozen=True, slots=True)
class SendToPortal:
    """A message for the portal, in order."""

    message: messages.Outbound


@dataclass(frozen=True, slots=True)
class ConfigureHost:
    """`init` names the tunnel addresses: the TUN device must carry them."""

    ipv4: IPv4Address
    ipv6: IPv6Address


@dataclass(frozen=True, slots=True)
class Resolve:
    """A domain to resolve for a client; answer with `handle_resolved`."""

    request: int
    domain: str


@dataclass(frozen=True, slots=True)
class ConfigureUploads:
    """`init` says where and how often flow logs are uploaded; None: never."""

    settings: messages.FlowLogs | None


@dataclass(frozen=True, slots=True)
class KeepToken:
    """An authorization brought a token; its flow records are uploaded under it."""

    attribution: Attribution


GatewayEvent = SendToPortal | ConfigureHost | Resolve | ConfigureUploads | KeepToken | FlowRecord


class Tap(Protocol):
    """Who looks at the packets of a client; must not wait, and must not call the core."""

    def __call__(self, packet: bytes, now: float, /) -> None:
        """One inner packet, as the client sent it or gets it."""


class Gateway:
    """Inputs: portal messages, engine items, resolved names, time. Outputs: datagrams, portal messages, requests.

    `flow_logs`: log flows even while the portal wants none.
    """

    def __init__(
        self, *, node: Node, tunnel: Tunnel, engine: Engine, unix_offset: float, now: float, flow_logs: bool = False
    ) -> None:
        self.node = node
        self.tunnel = tunnel
        self.engine = engine
        self.counters: Counter[str] = Counter()
        self._wall_offset = unix_offset  # Unix time minus `now`, as the wall clock has it
        self._unix_offset = unix_offset  # the same for expiries: of the latest time that the wall clock ever had
        self._flow_logs = flow_logs
        self._handles: dict[str, int] = {}
        self._clients: dict[int, str] = {}
        self._traffic: dict[int, traffic.Traffic] = {}
        self._taps: dict[int, Tap] = {}
        self._new_handles = count(1)
        self._waiting = WaitingAuthorizations()
        self._farewells: dict[str, float] | None = None  # while draining: when each client was last told
        self._joined = False
        self._no_relays_pending = False
        self._no_relays_at = float("-inf")
        self._sweep_at = now + SWEEP_INTERVAL
        self._events: deque[GatewayEvent] = deque()

    # -- portal

    def handle_portal_connected(self, now: float) -> None:
        """The channel is joined: what was held back goes out. The `init` that follows brings relays (turn 4.5)."""
        self._joined = True
        self._no_relays_pending = False
        self.node.signalling.release()
        self._settle(now)

    def handle_portal_disconnected(self, now: float) -> None:
        """Candidates are held back from now on; tunnels run on (portal 1.14)."""
        self._joined = False
        self.node.signalling.hold()
        self._settle(now)

    def handle_portal_message(self, message: messages.Inbound, now: float) -> None:
        """One message, to completion."""
        match message:
            case messages.Init():
                self._handle_init(message, now)
            case messages.CreateAuthorization():
                self._authorize(message, now, wait=True)
            case messages.IceCandidates():
                for text in message.candidates:
                    self.node.add_remote_candidate(message.client_id, text, now)
            case messages.InvalidateIceCandidates():
                for text in message.candidates:
                    self.node.remove_remote_candidate(message.client_id, text, now)
            case messages.RejectAccess():
                self._waiting.withdraw(message.client_id, message.resource_id)
                self.tunnel.reject(message.client_id, message.resource_id, now)
            case messages.RelaysPresence():
                self.node.update_relays(message.disconnected_ids, [_relay(relay) for relay in message.connected], now)
            case messages.ResourceUpdated():
                self._waiting.update_filters(message.resource)
                self.tunnel.update_filters(_resource(message.resource))
            case messages.AccessAuthorizationExpiryUpdated():
                expires = self._deadline(message.expires_at, now)
                self._waiting.set_expiry(message.client_id, message.resource_id, message.expires_at)
                self.tunnel.set_expiry(message.client_id, message.resource_id, expires, now)
        self._settle(now)

    def handle_unsent(self, message: messages.Outbound) -> None:
        """The socket died before this was written: keep candidates for the next one (portal 2.10), newest first."""
        if not isinstance(message, messages.BroadcastIceCandidates | messages.BroadcastInvalidatedIceCandidates):
            return
        (client_id,) = message.client_ids
        added = isinstance(message, messages.BroadcastIceCandidates)
        if self.node.connection(client_id) is not None:
            self.node.signalling.give_back(CandidateMessage(client_id, added=added, candidates=message.candidates))

    # -- host

    def handle_local_addresses(self, endpoints: Sequence[Endpoint]) -> None:
        """The host's own addresses with our UDP port, at start and whenever they change (connectivity D3)."""
        self.node.set_local_addresses(endpoints)

    # -- packets

    def handle_datagram(self, payload: bytes, source: Endpoint, local: Endpoint, now: float) -> None:
        """A datagram that the engine did not settle."""
        self.node.handle_datagram(payload, source, local, now)
        self._settle(now)

    def handle_session_confirmed(self, local_index: int, now: float) -> None:
        """The first data packet of a session arrived."""
        self.node.handle_session_confirmed(local_index, now)
        self._settle(now)

    def handle_inner_packet(self, peer: int, packet: bytes, ecn: int, now: float, path: Path | None = None) -> None:
        """A decrypted packet without a flow: decide, and install a flow for those that follow (tunnel 3)."""
        client_id = self._clients.get(peer)
        if client_id is None:
            self.counters["inner packet of an unknown peer"] += 1
            return
        self.node.note_activity(client_id, now)
        if self._taps and (tap := self._taps.get(peer)) is not None:
            tap(packet, now)
        if path is not None and self.node.answer_probe(client_id, packet, *path, now):
            self._settle(now)
            return
        match self.tunnel.handle_inner_packet(client_id, packet, ecn, now, path):
            case Forward(packet=forwarded, flow=flow):
                self.engine.write_tun(forwarded, peer)
                self._traffic[peer].count(1, traffic.payload_length(forwarded), inbound=True)
                self._install(peer, flow, inbound=True)
            case Reply(packet=reply):
                self._send(client_id, reply, now)
            case Drop(reason=reason):
                self.counters[f"from client: {reason}"] += 1
            case Consumed():
                pass
        self._settle(now)

    def handle_outbound_packet(self, packet: bytes, now: float) -> None:
        """A packet from the TUN without a flow (tunnel 4)."""
        match self.tunnel.handle_tun_packet(packet, now):
            case Deliver(client_id=client_id, packet=delivered, flow=flow, tally=tally):
                if self._send(client_id, delivered, now, revocable=True):
                    if tally is not None:
                        self.tunnel.handle_delivered(tally, now)
                    handle = self._handles[client_id]
                    self._traffic[handle].count(1, traffic.payload_length(delivered), inbound=False)
                    self._install(handle, flow, inbound=False)
            case Drop(reason=reason):
                self.counters[f"to client: {reason}"] += 1
        self._settle(now)

    def handle_flow_report(self, token: int, packets: int, payload_bytes: int, last_packet: float) -> None:
        """What a flow carried in the engine."""
        token, handle, inbound = traffic.unmark(token)
        if (counted := self._traffic.get(handle)) is not None:
            counted.count(packets, payload_bytes, inbound=inbound)
        self.tunnel.handle_flow_report(token, packets, payload_bytes, last_packet)

    def handle_resolved(self, request: int, addresses: Sequence[IPv4Address | IPv6Address] | None, now: float) -> None:
        """The answer to `Resolve`; None when it took too long."""
        self.tunnel.handle_resolved(request, addresses, now)
        self._settle(now)

    # -- time

    def handle_clock_step(self, delta: float, now: float) -> None:
        """The wall clock jumped against CLOCK_BOOTTIME: expiries follow it forward, never back (tunnel 5.7).

        Who sets the clock back lengthens no access, neither what is granted nor what will be; and setting it right
        again is no step forward, else every such pair would shorten all access for good.
        """
        self._wall_offset += delta
        self.tunnel.flow_log.unix_offset += delta
        gained = self._wall_offset - self._unix_offset
        if gained >= LEAST_CLOCK_STEP:
            self._unix_offset = self._wall_offset
            self.tunnel.handle_clock_step(gained)
        elif delta < 0 and gained <= -NOTEWORTHY_CLOCK_STEP:
            _LOG.warning(
                "The wall clock was set back by %d s, which lengthens no access. If it is right now, access ends that "
                "much too early: restart the gateway. If it is wrong now, set it right.",
                -gained,
            )
        self._settle(now)

    def handle_timeout(self, now: float) -> None:
        """Connection layer, then tunnel, then what waits for a relay (tunnel 11.1)."""
        self.node.handle_timeout(now)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_INTERVAL
            self._take_reports(now)
            self.tunnel.handle_swept(now)
        self.tunnel.handle_timeout(now)
        self._settle(now)

    def poll_timeout(self) -> Deadline | None:
        """The soonest deadline of all parts."""
        no_relays: Deadline | None = None
        if self._no_relays_pending and self._joined:
            no_relays = Deadline(self._no_relays_at + NO_RELAYS_INTERVAL, "no_relays")
        return earliest(
            self.node.poll_timeout(),
            self.tunnel.poll_timeout(),
            Deadline(self._sweep_at, "flow sweep"),
            self._waiting.poll_timeout(),
            no_relays,
        )

    # -- output

    def poll_transmit(self) -> Transmit | None:
        """The next datagram."""
        return self.node.poll_transmit()

    def poll_event(self) -> GatewayEvent | None:
        """What the process must do."""
        return self._events.popleft() if self._events else None

    def drain(self, now: float) -> int:
        """Grant nothing any more and send the clients away; how many have not gone. Call again every second.

        A goodbye may be lost: who goes on sending is told again, who has been silent for a while has understood.
        """
        if self._farewells is None:
            self._farewells = {}
            self._waiting = WaitingAuthorizations()
        for client_id, handle in list(self._handles.items()):
            told = self._farewells.get(client_id)
            connection = self.node.connection(client_id)
            if connection is None or connection.path is None or (told is not None and now >= told + FAREWELL_SILENCE):
                _LOG.info("Connection closed: goodbye sent cid=%s", client_id)
                self.tunnel.forget(client_id)
                self._settle(now)
                self.node.drop(client_id)
                self._forget(client_id)
            elif told is None or self.engine.activity(handle).last_received > told:
                self._farewells[client_id] = now
                self._send(client_id, GOODBYE, now)
        self._settle(now)
        return len(self._handles)

    def shutdown(self, now: float) -> None:
        """The end of all flows, and goodbye to all clients; drain `poll_transmit` and `poll_event` afterwards."""
        self._take_reports(now)
        self.tunnel.flow_log.close_all(now)
        self._settle(now)
        self.node.shutdown(now)

    @property
    def client_ids(self) -> list[str]:
        """The clients that hold something, connected or not."""
        return list(self._handles)

    def traffic(self, client_id: str) -> traffic.Traffic | None:
        """What the client sent and received, to the second."""
        handle = self._handles.get(client_id)
        return self._traffic[handle] if handle is not None else None

    def tap(self, client_id: str, tap: Tap) -> bool:
        """Call `tap` with each inner packet from and to the client; False if it is not there or tapped already.

        All of them pass here meanwhile: no flow is installed for the client, and those that were are void.
        """
        handle = self._handles.get(client_id)
        if handle is None or handle in self._taps:
            return False
        self._taps[handle] = tap
        self.engine.revoke(handle)
        return True

    def untap(self, client_id: str, tap: Tap) -> None:
        """The end of `tap`."""
        if self.is_tapped(client_id, tap):
            del self._taps[self._handles[client_id]]

    def is_tapped(self, client_id: str, tap: Tap) -> bool:
        """Whether this tap is in place; it goes with the client."""
        return self._taps.get(self._handles.get(client_id, 0)) == tap

    # -- inside

    def _handle_init(self, init: messages.Init, now: float) -> None:
        """The order of portal 2.2; relays first, since everything else can wait for their round trip."""
        self._no_relays_pending = False
        self.node.update_relays((), [_relay(relay) for relay in init.relays], now)
        wanted = init.flow_logs
        uploads = wanted if wanted is not None and wanted.upload_interval_secs > 0 else None
        if self.tunnel.flow_log.is_on:
            self._take_reports(now)
        self.tunnel.flow_log.switch(on=uploads is not None or self._flow_logs, now=now)
        self._collect_records()  # before the settings by which they would not be kept
        self._events.append(ConfigureUploads(uploads))
        interface = init.interface
        self.tunnel.set_gateway_addresses(interface.ipv4, interface.ipv6)
        if init.authorizations is not None:
            granted: dict[str, dict[str, float | None]] = {}
            for entry in init.authorizations:
                granted.setdefault(entry.client_id, {})[entry.resource_id] = self._deadline(entry.expires_at, now)
            self.tunnel.retain(granted, now)
            self._waiting.retain(init.authorizations)
        self._events.append(ConfigureHost(IPv4Address(interface.ipv4), IPv6Address(interface.ipv6)))

    def _authorize(self, message: messages.CreateAuthorization, now: float, *, wait: bool) -> None:
        """Connection first, then access, then the acknowledgement; candidates follow it (portal 2.4)."""
        client = message.client
        if self._farewells is not None:
            _LOG.info("Authorization refused: the gateway is being drained cid=%s", client.id)
            return
        if message.use_iceless:
            _LOG.warning(
                "Authorization skipped: it asks for ICE-less mode, which was not offered", extra={"cid": client.id}
            )
            return
        known = client.id in self._handles
        handle = self._handles[client.id] if known else next(self._new_handles)
        try:
            self.node.upsert(
                client.id,
                handle=handle,
                public_key=client.public_key,
                preshared_key=client.preshared_key,
                local=Credentials(message.gateway_ice_credentials.username, message.gateway_ice_credentials.password),
                remote=Credentials(message.client_ice_credentials.username, message.client_ice_credentials.password),
                now=now,
                address=bytes(message.address) or None,  # plain bytes: engines take no other kind
            )
        except NoRelayAvailableError:
            if not (wait and self.node.relays.is_probing and self._waiting.add(message, now)):
                _LOG.info("Authorization refused: no relay has answered yet", extra={"cid": client.id})
                self._no_relays_pending = True
            return
        expires = None if message.expires_at is None else self._deadline(message.expires_at, now)
        attribution = _attribution(message.flow_logs_ingest_token)
        if not self.tunnel.grant(
            client.id, client.ipv4, client.ipv6, _resource(message.resource), expires, now, attribution=attribution
        ):
            _LOG.warning(
                "Authorization refused: it cannot be recorded", extra={"cid": client.id, "rid": message.resource.id}
            )
            if not known:
                self.node.drop(client.id)
            return
        self._handles[client.id] = handle
        self._clients[handle] = client.id
        self._traffic.setdefault(handle, traffic.Traffic())
        _LOG.info(
            "Access allowed",
            extra={
                "cid": client.id,
                "rid": message.resource.id,
                "expires_in": "never" if expires is None else f"{expires - now:.0f}s",
            },
        )
        self._tell_portal(message.acknowledgement())
        if attribution is not None:
            self._events.append(KeepToken(attribution))

    def _settle(self, now: float) -> None:
        """Drain what the parts have for each other, then what is for the portal: candidates last (portal 2.10)."""
        progress = True
        while progress:
            progress = False
            while (tunnel_event := self.tunnel.poll_event()) is not None:
                progress = True
                match tunnel_event:
                    case Revoked(client_id=client_id):
                        if (handle := self._handles.get(client_id)) is not None:
                            self.engine.revoke(handle)
                    case Claimed(client_id=client_id, keys=keys):
                        if (handle := self._handles.get(client_id)) is not None:
                            for key in keys:  # over in the past: the next packet is judged anew
                                self.engine.install_flow(
                                    handle, key, inbound=False, rewrite=None, valid_until=0.0, token=0
                                )
                    case SendToClient(client_id=client_id, packet=packet):
                        self._send(client_id, packet, now)
                    case ResolveDomain(request=request, domain=domain):
                        self._events.append(Resolve(request, domain))
                    case ClientEmpty(client_id=client_id):
                        _LOG.info("Connection closed: no authorization is left", extra={"cid": client_id})
                        self.node.close(client_id, now)
                        self._forget(client_id)
                    case ClientGone(client_id=client_id):
                        _LOG.info("Connection closed: goodbye received", extra={"cid": client_id})
                        self.node.drop(client_id)
                        self._forget(client_id)
            while (node_event := self.node.poll_event()) is not None:
                progress = True
                match node_event:
                    case RelaysExhausted():
                        _LOG.info("The last relay is gone, asking the portal for others")
                        self._no_relays_pending = True
                    case ConnectionEstablished() | ConnectionFailed():
                        pass
            progress |= self._retry_waiting(now)
        if self._no_relays_pending and self._joined and now >= self._no_relays_at + NO_RELAYS_INTERVAL:
            self._no_relays_pending = False
            self._no_relays_at = now
            self._tell_portal(messages.NoRelays())
        self._collect_records()
        for batch in self.node.drain_candidates(now):
            broadcast = messages.BroadcastIceCandidates if batch.added else messages.BroadcastInvalidatedIceCandidates
            self._tell_portal(broadcast(client_ids=(batch.client_id,), candidates=batch.candidates))

    def _collect_records(self) -> None:
        while (record := self.tunnel.poll_flow_record()) is not None:
            self._events.append(record)

    def _take_reports(self, now: float) -> None:
        for report in self.engine.sweep(now):
            self.handle_flow_report(*report)

    def _retry_waiting(self, now: float) -> bool:
        """Authorizations that wait for a relay: take them all up when one has answered, give up on the overdue."""
        if not self._waiting:
            return False
        due = self._waiting.take(now, every=self.node.relays.sample(now) is not None)
        for message in due:
            self._authorize(message, now, wait=False)
        return bool(due)

    def _send(self, client_id: str, packet: bytes, now: float, *, revocable: bool = False) -> bool:
        reason = self.node.send(client_id, packet, now, revocable=revocable)
        if reason is not None:
            self.counters[f"to client: {reason}"] += 1
        elif self._taps and (tap := self._taps.get(self._handles.get(client_id, 0))) is not None:
            tap(packet, now)
        return reason is None

    def _install(self, handle: int, flow: Flow | None, *, inbound: bool) -> None:
        if flow is not None and flow.token >> traffic.TOKEN_BITS == 0 and handle not in self._taps:
            token = traffic.mark(flow.token, handle, inbound=inbound)
            self.engine.install_flow(
                handle, flow.key, inbound=inbound, rewrite=flow.rewrite, valid_until=flow.valid_until, token=token
            )

    def _forget(self, client_id: str) -> None:
        handle = self._handles.pop(client_id, None)
        if handle is not None:
            del self._clients[handle]
            del self._traffic[handle]
            self._taps.pop(handle, None)
            self.engine.remove_peer(handle)

    def _tell_portal(self, message: messages.Outbound) -> None:
        self._events.append(SendToPortal(message))

    def _deadline(self, expires_at: int, now: float) -> float:
        """Unix seconds as a moment of our clock (tunnel 5.7)."""
        if expires_at > MAX_UNIX_TIME:
            return now + FAR_FUTURE
        return expires_at - self._unix_offset


def _attribution(token: messages.IngestToken | None) -> Attribution | None:
    """What the token says; without one that can be read the flows are not logged (spec tunnel 10.1)."""
    if token is None or token.secret is None:
        return None
    try:
        return ingest_token.parse(token.secret)
    except Malformed as error:
        _LOG.debug("The flows of an authorization are not logged: %s", error)
        return None


def _relay(relay: messages.Relay) -> Relay:
    return Relay(id=relay.id, ipv4=relay.ipv4, ipv6=relay.ipv6, username=relay.username, password=relay.password)


def _resource(resource: messages.Resource) -> resources.Resource:
    match resource:
        case messages.CidrResource():
            return resources.CidrResource(
                resource.id, resource.address.network, _filters(resource.filters), resource.name
            )
        case messages.DnsResource():
            return resources.DnsResource(resource.id, resource.address, _filters(resource.filters), resource.name)
        case messages.InternetResource():
            return resources.InternetResource(resource.id)
        case _:
            assert_never(resource)


def _filters(wanted: messages.Filters) -> tuple[filters.Filter, ...]:
    return tuple(_filter(entry) for entry in wanted)


def _filter(wanted: messages.Filter) -> filters.Filter:
    match wanted:
        case messages.TcpFilter():
            return filters.TcpFilter(wanted.port_range_start, wanted.port_range_end)
        case messages.UdpFilter():
            return filters.UdpFilter(wanted.port_range_start, wanted.port_range_end)
        case messages.IcmpFilter():
            return filters.IcmpFilter()
        case messages.UnknownFilter():
            return filters.UnknownFilter()
        case _:
            assert_never(wanted)
