"""The policy: which inner packets pass, in both directions, and what becomes of them (spec tunnel 3 to 7)."""

from __future__ import annotations

import logging
from collections import Counter, deque
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from fzg.sansio import Deadline, EcnCodepoint, earliest
from fzg.tunnel.client import FLOW_VALIDITY, Client, Refusal
from fzg.tunnel.events import (
    Claimed,
    ClientEmpty,
    ClientGone,
    Consumed,
    Deliver,
    Drop,
    DropReason,
    Event,
    Flow,
    Forward,
    Reply,
    ResolveDomain,
    Revoked,
    SendToClient,
    Verdict,
)
from fzg.tunnel.flow_log import FlowLog, Tally
from fzg.tunnel.nat import Entry, Lookup
from fzg.tunnel.proxies import MAX_PER_EVENT
from fzg.tunnel.ranges import is_assignable_proxy, is_multicast, is_peer, is_proxy
from fzg.wire import Malformed, control, icmp, ip
from fzg.wire.icmp import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from fzg.tunnel.flow_log import Path, TrackedFlow
    from fzg.tunnel.flow_record import FlowRecord
    from fzg.tunnel.ingest_token import Attribution
    from fzg.tunnel.resources import Authorization, Resource
    from fzg.wire.ip import Packet

_LOG = logging.getLogger(__name__)

HOUSEKEEPING_INTERVAL = 1.0  # s, spec tunnel 1.3
RESOLUTION_TIMEOUT = 10.0  # s, spec tunnel 1.3
MAX_RESOLUTIONS = 1000  # at once, spec tunnel 1.3

# Ours: how long a flow that is not logged yet goes unnoticed when its next packet would start it.
UNLOGGED_VALIDITY = 0.1  # s

# Ours: clients that the portal may make known; each is some kilobytes before it does anything.
MAX_CLIENTS = 1 << 16
# Ours: NAT sessions that one turn ends, about 5 ms of work; what is left waits for other work of the process.
SWEEP_BUDGET = 2000
SWEEP_PAUSE = 0.01  # s
# Ours: smaller steps of the wall clock are what time synchronisation does all day (spec tunnel 5.7).
LEAST_CLOCK_STEP = 1.0  # s

# Packets that change a session's state must be seen here, each of them.
_UNCACHED_TCP = ip.TCP_SYN | ip.TCP_FIN | ip.TCP_RST
_CONSUMED = Consumed()


class Tunnel:
    """All clients, their rights and their sessions. Drain `poll_event` after every call, before the next packet.

    `flow_log` is driven from here; its records are polled by `poll_flow_record`.
    """

    def __init__(self, *, now: float, unix_offset: float = 0.0) -> None:
        self._addresses: frozenset[bytes] = frozenset()
        self._clients: dict[str, Client] = {}
        self._by_ip: dict[bytes, Client] = {}
        self._next_tick = now + HOUSEKEEPING_INTERVAL
        self._resolutions: dict[int, _Resolution] = {}
        self._requests = count(1)
        self._tokens = count(1)
        self._tracked: dict[int, Entry] = {}
        self._events: deque[Event] = deque()
        self.flow_log = FlowLog(tokens=self._tokens, unix_offset=unix_offset)
        self.dropped: Counter[str] = Counter()

    # -- authorizations

    def set_gateway_addresses(self, ipv4: bytes | None, ipv6: bytes | None) -> None:
        """The gateway's own tunnel IPs, which are exempt from policy; for known clients the former ones stay so too."""
        addresses = frozenset(address for address in (ipv4, ipv6) if address is not None)
        if addresses == self._addresses:
            return
        self._addresses = addresses
        for client in self._clients.values():
            client.exempt = client.met | addresses
            self._events.append(Revoked(client.id))

    def grant(  # noqa: PLR0917 - the portal's message, field by field
        self,
        client_id: str,
        ipv4: bytes,
        ipv6: bytes,
        resource: Resource,
        expires: float | None,
        now: float,
        *,
        attribution: Attribution | None = None,
    ) -> bool:
        """Let a client use a resource, or renew that; False if it could not be recorded."""
        if not self._addresses:
            _LOG.warning("a resource was granted before the gateway had addresses, which is not recorded")
            return False
        client = self._clients.get(client_id)
        if client is not None and (client.ipv4, client.ipv6) != (ipv4, ipv6):
            _LOG.info("client %s has new addresses, its earlier grants are gone", client_id)
            self._remove(client)
            client = None
        if client is None:
            if len(self._clients) >= MAX_CLIENTS:
                _LOG.warning("%d clients are known, no more are let in", MAX_CLIENTS)
                return False
            if not self._clients:
                self._next_tick = now + HOUSEKEEPING_INTERVAL
            client = self._clients[client_id] = Client(client_id, ipv4, ipv6, self._addresses)
        narrower = client.grant(resource, expires, now)
        client.attribute(resource.id, attribution)
        if narrower:
            self._events.append(Revoked(client_id))
        for address in (ipv4, ipv6):
            previous = self._by_ip.get(address)
            if previous is not None and previous is not client:
                self._events.append(Revoked(previous.id))
            self._by_ip[address] = client
        return narrower is not None

    def reject(self, client_id: str, resource_id: str, now: float) -> None:  # noqa: ARG002 - time moves by argument
        """Withdraw one grant; a client without another is forgotten at once."""
        client = self._clients.get(client_id)
        if client is None:
            return
        removed = client.remove(resource_id)
        if removed:
            _LOG.info("Access revoked", extra={"cid": client_id, "rid": resource_id})
        if client.is_empty:
            self._remove(client)
            self._events.append(ClientEmpty(client_id))
        elif removed:
            self._events.append(Revoked(client_id))

    def retain(self, authorizations: Mapping[str, Mapping[str, float | None]], now: float) -> None:
        """Withdraw what is not listed and set the listed expiries; clients left empty go at the next tick."""
        for client in self._clients.values():
            if client.retain(authorizations.get(client.id, {}), now):
                self._events.append(Revoked(client.id))

    def update_filters(self, resource: Resource) -> None:
        """Judge by these filters wherever the resource is held."""
        for client in self._clients.values():
            if client.update_filters(resource):
                self._events.append(Revoked(client.id))

    def set_expiry(self, client_id: str, resource_id: str, expires: float | None, now: float) -> None:
        """Let one grant end at another time; unknown pairs are ignored."""
        client = self._clients.get(client_id)
        if client is not None and client.set_expiry(resource_id, expires, now):
            self._events.append(Revoked(client_id))

    def forget(self, client_id: str) -> None:
        """Drop all state of a client, silently but for its flows."""
        client = self._clients.get(client_id)
        if client is not None:
            self._remove(client)

    def handle_clock_step(self, delta: float) -> None:
        """The wall clock went forward against `now`: grants end earlier. Smaller and backward steps change nothing."""
        if delta < LEAST_CLOCK_STEP:
            return
        for client in self._clients.values():
            if client.shift_expiries(delta):
                self._events.append(Revoked(client.id))

    # -- packets

    def handle_inner_packet(
        self, client_id: str, packet: bytes, ecn: int, now: float, path: Path | None = None
    ) -> Verdict:
        """Judge a decrypted packet of a client; `ecn` and `path`: the codepoint and addresses of its datagram."""
        try:
            parsed = ip.parse(packet)
        except Malformed as error:
            return self._malformed(error)
        destination = parsed.destination
        if is_multicast(destination):
            return self._drop(DropReason.MULTICAST)
        client = self._clients.get(client_id)
        if client is None:
            return self._drop(DropReason.NO_PEER_STATE)
        protocol = parsed.protocol
        if protocol == ip.PROTOCOL_CONTROL and control.is_control(parsed):
            self._handle_control(client, parsed, now)
            return _CONSUMED
        value = parsed.destination_value
        if value is None and isinstance(icmp.recognise(parsed), EmbeddedError):
            return self._drop(DropReason.OUTBOUND_ICMP_ERROR)
        if parsed.source not in (client.ipv4, client.ipv6):
            return self._refuse(client, parsed, Refusal.PROHIBITED, now)
        if destination in client.exempt:
            return Forward(_merge_ecn(packet, ecn), _flow(parsed, None, 0, now + FLOW_VALIDITY))
        if is_peer(destination):
            return self._refuse(client, parsed, Refusal.PROHIBITED, now)
        admitted = client.classify(destination, protocol, value, now)
        if isinstance(admitted, Refusal):
            return self._refuse(client, parsed, admitted, now)
        valid_until = min(now + FLOW_VALIDITY, admitted.expires)
        if is_proxy(destination):
            return self._translate_to_network(client, parsed, ecn, admitted, path, valid_until, now)
        token = 0
        if admitted.attribution is not None and self.flow_log.is_on:
            source_value = parsed.source_value
            if source_value is not None and source_value >= ip.TCP:
                logged, valid_until = self._log_outgoing(
                    client, admitted, parsed, source_value, destination, path, valid_until, now
                )
                token = logged.token << 1 if logged is not None else 0
        return Forward(_merge_ecn(packet, ecn), _flow(parsed, None, token, valid_until))

    def handle_tun_packet(self, packet: bytes, now: float) -> Verdict:
        """Judge a packet that the kernel routed to the TUN."""
        try:
            parsed = ip.parse(packet)
        except Malformed as error:
            return self._malformed(error)
        if not is_peer(parsed.destination):
            if control.is_control(parsed):
                _LOG.warning("a control packet came from the network")
            return self._drop(DropReason.NOT_A_PEER)
        client = self._by_ip.get(parsed.destination)
        if client is None:
            return self._drop(DropReason.NO_PEER_STATE)
        source = parsed.source
        if source in client.exempt:
            return Deliver(client.id, packet, _flow(parsed, None, 0, now + FLOW_VALIDITY))
        if parsed.destination_value is None:
            return self._deliver_error(client, parsed, now)
        entry = client.nat.incoming(parsed.destination_value, source, parsed.tcp_flags, now)
        if entry is Lookup.EXPIRED:
            return self._drop(DropReason.EXPIRED_NAT_SESSION)
        if isinstance(entry, Entry):
            source = entry.proxy
        elif is_peer(source) or is_proxy(source):
            # Proxy IPs exist on clients only; one that comes from the network is forged.
            return self._drop(DropReason.NOT_ALLOWED)
        admitted = client.classify(source, parsed.protocol, parsed.source_value, now)
        if isinstance(admitted, Refusal):
            return self._drop(DropReason.NOT_ALLOWED)
        valid_until = min(now + FLOW_VALIDITY, admitted.expires)
        logged = tally = None
        if admitted.attribution is not None and self.flow_log.is_on and parsed.destination_value >= ip.TCP:
            logged, valid_until = self._log_incoming(client, admitted, parsed, valid_until, now)
            if logged is not None:
                tally = Tally(logged, parsed.payload_length, parsed.tcp_flags)
        if not isinstance(entry, Entry):
            token = logged.token << 1 | 1 if logged is not None else 0
            direct = _flow(parsed, None, token, valid_until)
            if direct is not None and not client.proxies.is_empty:
                client.untranslated.note(parsed.destination_value, source, direct.key, now)
            return Deliver(client.id, packet, direct, tally)
        port = entry.source_value & 0xFFFF
        translated = ip.rewrite_to_client(parsed, source, port)
        flow = self._nat_flow(parsed, entry, (source, port), 1, valid_until, logged)
        return Deliver(client.id, translated, flow, tally)

    def handle_delivered(self, tally: Tally, now: float) -> None:
        """A packet with this tally was sent to its client."""
        self.flow_log.delivered(tally, now)

    def handle_flow_report(self, token: int, packets: int, payload_bytes: int, last_packet: float) -> None:
        """An installed flow carried packets. Its NAT session was in use until `last_packet`."""
        if packets == 0 or not token:
            return
        entry = self._tracked.get(token >> 1)
        if entry is None:
            entry = self.flow_log.reported(
                token >> 1, incoming=bool(token & 1), packets=packets, payload=payload_bytes, last_packet=last_packet
            )
            if entry is None:
                return
        if token & 1:
            entry.last_incoming = max(entry.last_incoming, last_packet)
            entry.answered = True
        else:
            entry.last_outgoing = max(entry.last_outgoing, last_packet)

    # -- names

    def handle_resolved(self, request: int, addresses: Sequence[IPv4Address | IPv6Address] | None, now: float) -> None:
        """The answer to `ResolveDomain`; None if it took too long. Late and unknown answers are ignored."""
        resolution = self._resolutions.pop(request, None)
        if resolution is None or self._clients.get(resolution.client.id) is not resolution.client:
            return
        client, assigned, proxy_ips, _ = resolution
        if addresses is None:
            self._send_status(client, assigned, control.Status.INACTIVE)
            return
        # An answer must not lead back into the tunnel (spec 7.2).
        packed = [address.packed for address in addresses]
        resolved = [address for address in packed if not is_peer(address) and not is_proxy(address)]
        self._check_numbering(client, assigned.domain, proxy_ips)
        if not client.may_name(assigned.domain, assigned.resource, now):
            self._send_status(client, assigned, control.Status.INACTIVE)
            return
        narrower = client.assign(assigned.domain, assigned.resource, proxy_ips, resolved)
        if narrower:
            self._events.append(Revoked(client.id))
        status = control.Status.INACTIVE if narrower is None else control.Status.ACTIVE
        self._send_status(client, assigned, status)

    # -- time

    def handle_swept(self, now: float) -> None:
        """All that installed flows carried until now was reported; at least once a second while flows are logged."""
        self.flow_log.handle_swept(now)

    def handle_timeout(self, now: float) -> None:
        """Give up on slow names; once a second end sessions and grants."""
        self.flow_log.handle_timeout(now)
        while self._resolutions:
            request, resolution = next(iter(self._resolutions.items()))
            if resolution.deadline > now:
                break
            self.handle_resolved(request, None, now)
        if now < self._next_tick:
            return
        budget = SWEEP_BUDGET
        for client in list(self._clients.values()):
            budget -= self._sweep(client, now, budget)
            ended = client.expire(now)
            if client.is_empty:
                self._remove(client)
                self._events.append(ClientEmpty(client.id))
            elif ended:
                # No flow outlives its grant; but packets that passed may still be queued.
                self._events.append(Revoked(client.id))
        self._next_tick = now + (HOUSEKEEPING_INTERVAL if budget else SWEEP_PAUSE)

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due; None while there is nobody to look after."""
        tick = Deadline(self._next_tick, "tunnel housekeeping") if self._clients else None
        oldest = next(iter(self._resolutions.values()), None)
        resolution = Deadline(oldest.deadline, "name resolution") if oldest is not None else None
        return earliest(tick, resolution, self.flow_log.poll_timeout())

    def poll_event(self) -> Event | None:
        """The next event, in the order of their causes."""
        return self._events.popleft() if self._events else None

    def poll_flow_record(self) -> FlowRecord | None:
        """The next record of the flow log."""
        return self.flow_log.poll_record()

    def client(self, client_id: str) -> Client | None:
        """The client's rights and sessions, to look at."""
        return self._clients.get(client_id)

    def client_at(self, address: bytes) -> Client | None:
        """Who has this tunnel IP."""
        return self._by_ip.get(address)

    def rehearsal(self, client_id: str, now: float) -> Tunnel:
        """A tunnel with this one client that judges its packets as this one would now, and keeps what it learns."""
        other = Tunnel(now=now)
        other._addresses = self._addresses
        client = self._clients.get(client_id)
        if client is not None:
            twin = other._clients[client_id] = client.rehearsal()
            other._by_ip = {each: twin for each in (client.ipv4, client.ipv6) if self._by_ip.get(each) is client}
        return other

    @property
    def client_count(self) -> int:
        """Clients that hold something."""
        return len(self._clients)

    @property
    def nat_session_count(self) -> int:
        """NAT sessions of all clients."""
        return sum(len(client.nat) for client in self._clients.values())

    def _translate_to_network(  # noqa: PLR0917 - called for every packet
        self,
        client: Client,
        parsed: Packet,
        ecn: int,
        admitted: Authorization,
        path: Path | None,
        valid_until: float,
        now: float,
    ) -> Verdict:
        proxy = client.proxies.get(parsed.destination)
        if proxy is None or proxy.resolved is None:
            return self._refuse(client, parsed, Refusal.NETWORK, now)
        value = parsed.source_value
        if value is None:
            return self._drop(DropReason.UNSUPPORTED_PROTOCOL)
        entry = client.nat.outgoing(value, parsed.destination, proxy.resolved, parsed.tcp_flags, now)
        if entry is None:
            return self._drop(DropReason.NAT_EXHAUSTED)
        if not entry.is_cached and (claimed := client.untranslated.take(entry.outside_value, entry.real)):
            self._events.append(Claimed(client.id, claimed))
        port = entry.outside_value & 0xFFFF
        translated = _merge_ecn(ip.rewrite_to_network(parsed, entry.real, port), ecn)
        logged = None
        if admitted.attribution is not None and self.flow_log.is_on and value >= ip.TCP:
            logged, valid_until = self._log_outgoing(
                client, admitted, parsed, entry.outside_value, entry.real, path, valid_until, now, proxy.domain, entry
            )
        return Forward(translated, self._nat_flow(parsed, entry, (entry.real, port), 0, valid_until, logged))

    def _log_outgoing(  # noqa: PLR0917 - called for every packet
        self,
        client: Client,
        admitted: Authorization,
        parsed: Packet,
        source_value: int,
        destination: bytes,
        path: Path | None,
        valid_until: float,
        now: float,
        domain: str = "",
        session: Entry | None = None,
    ) -> tuple[TrackedFlow | None, float]:
        """The logged flow of a packet to the network, and how long the verdict may stand for others."""
        assert admitted.attribution is not None
        assert parsed.destination_value is not None
        if path is None:
            return None, valid_until
        key = (client.id, admitted.resource.id, parsed.source, destination, source_value, parsed.destination_value)
        logged = self.flow_log.outgoing(
            key, parsed, path, now, attribution=admitted.attribution, domain=domain, session=session
        )
        return logged, self._until(logged, valid_until, now)

    def _log_incoming(
        self, client: Client, admitted: Authorization, parsed: Packet, valid_until: float, now: float
    ) -> tuple[TrackedFlow | None, float]:
        """The same for a packet to the client."""
        source_value, destination_value = parsed.source_value, parsed.destination_value
        assert source_value is not None
        assert destination_value is not None
        key = (client.id, admitted.resource.id, parsed.destination, parsed.source, destination_value, source_value)
        logged = self.flow_log.incoming(key)
        return logged, self._until(logged, valid_until, now)

    def _until(self, logged: TrackedFlow | None, valid_until: float, now: float) -> float:
        if logged is not None or self.flow_log.is_full:
            return valid_until
        return min(valid_until, now + UNLOGGED_VALIDITY)

    def _deliver_error(self, client: Client, parsed: Packet, now: float) -> Verdict:
        error = icmp.recognise(parsed)
        if not isinstance(error, EmbeddedError):
            return self._drop(DropReason.UNSUPPORTED_PROTOCOL)
        entry = client.nat.incoming(error.source_value, error.destination, 0, now)
        if entry is Lookup.EXPIRED:
            return self._drop(DropReason.EXPIRED_NAT_SESSION)
        if isinstance(entry, Entry):
            source = entry.proxy
            packet = icmp.translate(
                error, source=source, destination=parsed.destination, source_value=entry.source_value
            )
            return Deliver(client.id, packet, None)
        if is_peer(parsed.source) or is_proxy(parsed.source):
            return self._drop(DropReason.NOT_ALLOWED)
        # No filter holds back an error: routers that no resource names send them.
        return Deliver(client.id, bytes(parsed.data), None)

    def _nat_flow(  # noqa: PLR0917 - called for every packet
        self,
        parsed: Packet,
        entry: Entry,
        rewrite: tuple[bytes, int],
        direction: int,
        valid_until: float,
        logged: TrackedFlow | None,
    ) -> Flow | None:
        if parsed.tcp_flags & _UNCACHED_TCP:
            return None
        entry.is_cached = True
        if logged is not None:
            return _flow(parsed, rewrite, logged.token << 1 | direction, valid_until)
        if not entry.token:
            entry.token = next(self._tokens)
            self._tracked[entry.token] = entry
        return _flow(parsed, rewrite, entry.token << 1 | direction, valid_until)

    def _handle_control(self, client: Client, parsed: Packet, now: float) -> None:
        try:
            event = control.parse(parsed)
        except Malformed as error:
            _LOG.debug("a control event of client %s is ignored: %s", client.id, error)
            return
        match event:
            case control.AssignedIps():
                self._handle_assigned_ips(client, event, now)
            case control.Goodbye():
                self._remove(client)
                self._events.append(ClientGone(client.id))
            case _:
                _LOG.debug("a control event of client %s is ignored: %s", client.id, type(event).__name__)

    def _handle_assigned_ips(self, client: Client, assigned: control.AssignedIps, now: float) -> None:
        # Others would be reachable untranslated (spec 7.3).
        proxy_ips = tuple(address for address in assigned.proxy_ips if is_assignable_proxy(address))
        if not 0 < len(proxy_ips) <= MAX_PER_EVENT or client.authorization(assigned.resource, now) is None:
            self._send_status(client, assigned, control.Status.INACTIVE)
            return
        if not client.may_name(assigned.domain, assigned.resource, now):
            # No answer could make it active. But the IPs no longer stand for the names they stood for (spec 7.3, 1).
            self._check_numbering(client, assigned.domain, proxy_ips)
            self._send_status(client, assigned, control.Status.INACTIVE)
            return
        if len(self._resolutions) >= MAX_RESOLUTIONS:
            _LOG.warning("%d names are being resolved, no more are taken on", MAX_RESOLUTIONS)
            return
        request = next(self._requests)
        self._resolutions[request] = _Resolution(client, assigned, proxy_ips, now + RESOLUTION_TIMEOUT)
        self._events.append(ResolveDomain(request, assigned.domain.removesuffix(".")))

    def _check_numbering(self, client: Client, domain: str, proxy_ips: tuple[bytes, ...]) -> None:
        """Begin anew where a proxy IP comes back for another name."""
        forgotten = client.restarts_numbering(domain, proxy_ips)
        if forgotten is not None:
            self._untrack(forgotten)
            self._events.append(Revoked(client.id))

    def _send_status(self, client: Client, assigned: control.AssignedIps, status: control.Status) -> None:
        packet = control.encode(control.DomainStatus(assigned.resource, assigned.domain, status))
        self._events.append(SendToClient(client.id, packet))

    def _refuse(self, client: Client, parsed: Packet, refusal: Refusal, now: float) -> Verdict:
        if not client.may_reply(now):
            return self._drop(DropReason.ICMP_RATE)
        if refusal is Refusal.NETWORK:
            return Reply(icmp.network_unreachable(parsed))
        return Reply(icmp.prohibited(parsed))

    def _malformed(self, error: Malformed) -> Drop:
        if isinstance(error, ip.Fragment):
            return self._drop(DropReason.FRAGMENT)
        _LOG.debug("a packet is dropped: %s", error)
        return self._drop(DropReason.MALFORMED)

    def _drop(self, reason: DropReason) -> Drop:
        self.dropped[reason] += 1
        return Drop(reason)

    def _sweep(self, client: Client, now: float, limit: int) -> int:
        client.untranslated.prune(now)
        ended = client.nat.sweep(now, limit)
        # Flows are no older than the last packet that was judged here.
        if any(entry.is_cached and entry.last_packet + FLOW_VALIDITY > now for entry in ended):
            self._events.append(Revoked(client.id))
        self._untrack(ended)
        return len(ended)

    def _remove(self, client: Client) -> None:
        """Forget the client; the caller adds the event that says why."""
        self._events.append(Revoked(client.id))
        self._untrack(client.nat.clear())
        del self._clients[client.id]
        for address in (client.ipv4, client.ipv6):
            if self._by_ip.get(address) is client:
                del self._by_ip[address]

    def _untrack(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._tracked.pop(entry.token, None)


class _Resolution(NamedTuple):
    client: Client
    assigned: control.AssignedIps
    proxy_ips: tuple[bytes, ...]
    deadline: float


def _merge_ecn(packet: bytes, outer: int) -> bytes:
    return ip.mark_ce(packet) if outer == EcnCodepoint.CE else packet


def _flow(parsed: Packet, rewrite: tuple[bytes, int] | None, token: int, valid_until: float) -> Flow | None:
    source, destination = parsed.source_value, parsed.destination_value
    if source is None or destination is None or parsed.tcp_flags & _UNCACHED_TCP:
        return None
    key = (parsed.protocol, parsed.source, parsed.destination, source & 0xFFFF, destination & 0xFFFF)
    return Flow(key, rewrite, token, valid_until)
