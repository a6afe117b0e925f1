"""The one object that owns all connections, all relays and the WireGuard key (spec connectivity chapter 1)."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fzg.ice.agent import SERVER_DEFAULT, SERVER_IDLE, Agent, Credentials, Role, Timing
from fzg.node.connection import (
    NO_CHANNEL,
    Connection,
    ConnectionState,
    Established,
    Failure,
    Identity,
    PathChanged,
)
from fzg.node.relayed import RelayedPaths
from fzg.node.signalling import CandidateMessage, Signalling
from fzg.node.timers import Timers
from fzg.sansio import Deadline, Transmit, earliest
from fzg.turn.events import (
    CandidateAdded,
    CandidateInvalidated,
    ChannelChanged,
    Consumed,
    LocalCandidate,
    NoRelays,
    Relay,
    RelayRemoved,
    Unwrapped,
    Use,
)
from fzg.turn.relays import RelaySet
from fzg.wire import Malformed, channel_data, control, stun
from fzg.wire import candidate as candidate_line
from fzg.wire import wireguard as wg
from fzg.wire.candidate import Kind, never_added_priority
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.gate import Admitted, CookieReply, Gate
from fzg.wireguard.index import IndexAllocator
from fzg.wireguard.peer import Peer, identify

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from fzg.dataplane.engine import Engine
    from fzg.node.path import Path
    from fzg.sansio import Random
    from fzg.secret import Secret
    from fzg.wireguard.keys import KeyPair

_LOG = logging.getLogger(__name__)

REQUEST_LIFETIME = 10.0  # s in which the answer to one of our checks counts (connectivity 1.3)
# What a connection does in its pass may make it due at once: a nomination is followed by its check. A deadline that
# still stands after this many passes is not going to move, and the driver must see that.
PASSES = 3
# Clients listen here if they can, and most NATs keep the port (operations 3.2; connectivity 1.4). A check sent there at
# once opens our NAT before the client's first check comes; else its next is 250 ms later.
CLIENT_PORT = 52625
# Behind a NAT that maps by destination the path will be relayed, and a client's first check through our relay is lost
# when it comes before our channel to the client's relay: its next is 250 ms later. So our candidates wait until the
# client's are here; the binds that these start leave before, and have one hop to go where the check comes by the portal
# and two relays. A client sends its own within 17 ms of the acknowledgement, plus the portal's round trip
# (connectivity 3.12, 8). So it is where we cannot open our NAT for the client's usual port, since we know
# only an address of the other IP version. Where the first check may arrive nothing waits.
RELAY_PATH_WAIT = 0.06  # s
_LISTED = ""  # in place of a relay's id: the host lists this address, and no relay was needed to see it
GOODBYE = control.encode(control.Goodbye())
# Bounds the work of one client and the table of checks in flight: 100 pairs x 1000 clients, far above what is ever due.
MAX_REQUESTS_IN_FLIGHT = 100_000


@dataclass(frozen=True, slots=True)
class ConnectionEstablished:
    """Data can flow."""

    client_id: str
    path: Path


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The connection is gone; what the client may reach is kept (connectivity 2.11)."""

    client_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class RelaysExhausted:
    """The last relay stopped answering: the portal must be asked for others."""


NodeEvent = ConnectionEstablished | ConnectionFailed | RelaysExhausted


class NoRelayAvailableError(Exception):
    """No relay has answered yet, so a connection has no candidates to offer (connectivity 2.1)."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A check in flight, and whose it is."""

    connection: Connection
    expires: float


class Node:
    """Inputs are datagrams the engine did not settle, authorizations, candidates and relays; see `fzg.sansio`."""

    def __init__(
        self,
        *,
        static: KeyPair,
        engine: Engine,
        random: Random,
        unix_offset: float,
        now: float,
        role: Role = Role.CONTROLLED,
        timing: Timing = SERVER_DEFAULT,
        idle_timing: Timing = SERVER_IDLE,
    ) -> None:
        self._static = static
        self._engine = engine
        self._random = random
        self._unix_offset = unix_offset
        self._role = role
        self._timing = timing
        self._idle_timing = idle_timing
        self.relays = RelaySet(random=random)
        self.signalling = Signalling()
        self.counters: Counter[str] = Counter()
        self._former_handshakes = 0
        self._gate = Gate(static_public=static.public, random=random, now=now)
        self._indices = IndexAllocator(random)
        self._connections: dict[str, Connection] = {}
        self._by_index: dict[int, Connection] = {}
        self._by_username: dict[str, Connection] = {}
        self._by_public_key: dict[bytes, list[Connection]] = {}
        self._requests: OrderedDict[bytes, _Request] = OrderedDict()
        self._relayed = RelayedPaths(relays=self.relays, engine=engine, now=now)
        self._homeless: dict[str, Connection] = {}
        self._hosts: dict[Endpoint, LocalCandidate] = {}
        self._timers = Timers()
        self._out: deque[Transmit] = deque()
        self._events: deque[NodeEvent] = deque()

    # -- authorizations

    def upsert(
        self,
        client_id: str,
        *,
        handle: int,
        public_key: bytes,
        preshared_key: Secret[bytes],
        local: Credentials,
        remote: Credentials,
        now: float,
        address: bytes | None = None,
    ) -> bool:
        """Create, replace or reuse the client's connection; True when reused. Raises `NoRelayAvailableError` (2.1).

        `address`: the packed public IP from which the client reached the portal, where that is known.
        """
        identity = Identity(public_key, preshared_key, local, remote)
        connection = self._connections.get(client_id)
        if connection is not None and connection.identity == identity:
            self._reuse(connection, now)
            return True
        relay_id = self.relays.sample(now)
        if relay_id is None:
            raise NoRelayAvailableError
        if connection is not None:
            _LOG.info("Connection replaced: the authorization has other keys or credentials", extra={"cid": client_id})
            self._remove(connection)
        self._create(client_id, handle, identity, relay_id, address, now)
        return False

    def add_remote_candidate(self, client_id: str, text: str, now: float) -> None:
        """A candidate line from the client; unusable lines and unknown clients are ignored (2.3, 3.15)."""
        if (found := self._remote_candidate(client_id, text)) is not None:
            connection, candidate = found
            connection.add_remote_candidate(candidate, now)
            self._settle(connection, now)

    def remove_remote_candidate(self, client_id: str, text: str, now: float) -> None:
        """The client withdrew a candidate."""
        if (found := self._remote_candidate(client_id, text)) is not None:
            connection, candidate = found
            connection.remove_remote_candidate(candidate, now)
            self._settle(connection, now)

    def update_relays(self, removed: Collection[str], relays: Collection[Relay], now: float) -> None:
        """The portal's `init` or `relays_presence` (turn 2.9)."""
        self.relays.update(removed, relays, now)
        self._settle_relays(now)

    def set_local_addresses(self, endpoints: Collection[Endpoint]) -> None:
        """The host's own addresses with our port: offered to clients, and answered when a client checks them (D3).

        Nothing is sent from them before that, since it may leave by a link that they do not belong to: through a NAT
        there it would take the port of the path that works. A new one is told to connections that exist with their
        next authorization only, as the addresses that other relays reveal (3.16); one that is gone is no longer
        offered, and never withdrawn (3.19).
        """
        self._hosts = {
            each: LocalCandidate(Kind.HOST, each, each, family_mismatch=False, relay_id=_LISTED) for each in endpoints
        }

    # -- packets

    def handle_datagram(self, payload: bytes, source: Endpoint, local: Endpoint, now: float) -> None:
        """A datagram that is not WireGuard data of a known session; the steps of connectivity 1.6 in order."""
        outcome = self.relays.handle_datagram(payload, source, local, now)
        relay_id: str | None = None
        if isinstance(outcome, Unwrapped):
            payload, source, local, relay_id = outcome.payload, outcome.peer, outcome.relayed, outcome.relay_id
        if outcome is not None:
            self._settle_relays(now)
        if isinstance(outcome, Consumed):
            return
        try:
            message = stun.parse(payload)
        except Malformed:
            self._handle_wireguard(payload, source, local, relay_id, now)
        else:
            self._handle_stun(message, source, local, now)

    def handle_session_confirmed(self, local_index: int, now: float) -> None:
        """The first data packet of a session authenticated: it may become the one we send with (5.3)."""
        connection = self._by_index.get(local_index >> 8)
        if connection is not None:
            connection.peer.handle_session_confirmed(local_index, now)
            self._settle(connection, now)

    def note_activity(self, client_id: str, now: float) -> None:
        """A packet of the client passed through the core."""
        connection = self._connections.get(client_id)
        if connection is not None and connection.state is ConnectionState.IDLE:
            connection.note_activity(now)
            self._settle(connection, now)

    def send(self, client_id: str, packet: bytes, now: float, *, revocable: bool = False) -> str | None:
        """Send one inner packet to the client; returns the reason when it was dropped.

        `revocable`: forwarded data, which the engine takes back when the client's access changes while it waits.
        """
        connection = self._connections.get(client_id)
        if connection is None:
            return "not connected"
        was_idle = connection.state is ConnectionState.IDLE
        reason = connection.send(packet, now, revocable=revocable)
        if was_idle or reason == NO_CHANNEL:
            self._settle(connection, now)
        else:
            self._collect(connection)
        return reason

    def answer_probe(self, client_id: str, packet: bytes, source: Endpoint, local: Endpoint, now: float) -> bool:
        """Whether an inner packet was a probe, which the policy must not see."""
        connection = self._connections.get(client_id)
        if connection is None or not connection.answer_probe(packet, source, local, now):
            return False
        self._settle(connection, now)
        return True

    # -- ends

    def close(self, client_id: str, now: float) -> None:
        """End the client's connection on purpose, with a goodbye where there is a path (2.12)."""
        connection = self._connections.get(client_id)
        if connection is None:
            return
        if connection.path is not None:
            connection.send(GOODBYE, now)
            self._collect(connection)
        self._remove(connection)

    def drop(self, client_id: str) -> None:
        """The client said goodbye: forget the connection, send nothing."""
        connection = self._connections.get(client_id)
        if connection is not None:
            self._remove(connection)

    def shutdown(self, now: float) -> None:
        """Goodbye to every client, and every allocation deleted (2.12; turn 2.9)."""
        for client_id in list(self._connections):
            self.close(client_id, now)
        self.relays.shutdown(now)
        # A goodbye through a relay must be there before the request that deletes its channel.
        while (transmit := self.relays.poll_transmit()) is not None:
            self._out.append(transmit)

    # -- time and output

    def handle_timeout(self, now: float) -> None:
        """Relays first, then due connections (2.5)."""
        self._relayed.handle_timeout(now)
        self.relays.handle_timeout(now)
        self._settle_relays(now)
        while self._requests and next(iter(self._requests.values())).expires <= now:
            self._requests.popitem(last=False)
        for _ in range(PASSES):
            for connection in self._timers.take_due(now):
                if self._connections.get(connection.client_id) is connection:
                    connection.handle_timeout(now)
                    self._settle(connection, now)

    def poll_timeout(self) -> Deadline | None:
        """The soonest deadline of relays and connections."""
        return earliest(
            self.relays.poll_timeout(),
            self._timers.soonest(),
            self._relayed.poll_timeout(),
            self.signalling.poll_timeout(),
        )

    def poll_transmit(self) -> Transmit | None:
        """The next datagram; what TURN sends goes first, so that no ChannelData overtakes its ChannelBind."""
        transmit = self.relays.poll_transmit()
        if transmit is None and self._out:
            transmit = self._out.popleft()
        return transmit

    def poll_event(self) -> NodeEvent | None:
        """What the gateway must know."""
        return self._events.popleft() if self._events else None

    def drain_candidates(self, now: float) -> list[CandidateMessage]:
        """Candidate messages that are due now."""
        for client_id, until in list(self.signalling.postponed.items()):
            if now >= until or self._connections[client_id].agent.remote_candidates():
                self.signalling.announce(client_id)
        return self.signalling.drain()

    @property
    def connections(self) -> Iterator[Connection]:
        """All live connections, for status and metrics."""
        return iter(self._connections.values())

    @property
    def handshakes(self) -> int:
        """WireGuard handshakes completed since the start, those of former connections included."""
        return self._former_handshakes + sum(connection.handshakes for connection in self._connections.values())

    def connection(self, client_id: str) -> Connection | None:
        """The client's connection, if there is one."""
        return self._connections.get(client_id)

    # -- connections

    def _create(  # noqa: PLR0917 - what an authorization carries
        self, client_id: str, handle: int, identity: Identity, relay_id: str, address: bytes | None, now: float
    ) -> None:
        index = self._indices.next(self._by_index)
        agent = Agent(
            role=self._role,
            local=identity.local,
            remote=identity.remote,
            timing=self._timing,
            random=self._random,
            now=now,
        )
        peer = Peer(
            static=self._static,
            remote_public=identity.public_key,
            preshared_key=identity.preshared_key,
            connection_index=index,
            peer=handle,
            engine=self._engine,
            random=self._random,
            unix_offset=self._unix_offset,
            now=now,
        )
        connection = Connection(
            client_id=client_id,
            handle=handle,
            index=index,
            identity=identity,
            agent=agent,
            peer=peer,
            idle_timing=self._idle_timing,
            relay_id=relay_id,
            relays=self.relays,
            engine=self._engine,
            now=now,
        )
        self._connections[client_id] = connection
        self._by_index[index] = connection
        self._by_username[_username(identity)] = connection
        self._by_public_key.setdefault(identity.public_key, []).append(connection)
        for local in self._candidates(relay_id):
            self._offer(connection, local, now)
        is_reachable = address is None or connection.guess_remote(Endpoint(address, CLIENT_PORT), now)
        is_closed = self.relays.nat_maps_by_destination or (not is_reachable and self.relays.is_behind_nat)
        if self._role is Role.CONTROLLED and is_closed:
            self.signalling.postpone(client_id, now + RELAY_PATH_WAIT)
        _LOG.info("Connection created", extra={"cid": client_id, "index": f"{index:06x}", "relay": relay_id})
        _LOG.debug(
            "Candidates offered cid=%s reported=%d offered=%d",
            client_id,
            self.relays.reported_count(relay_id) + len(self._hosts),
            len(agent.local_candidates()),
        )
        self._settle(connection, now)

    def _reuse(self, connection: Connection, now: float) -> None:
        """The client may have lost its state: tell it every candidate again (2.2)."""
        connection.resume(now)
        for candidate in connection.agent.local_candidates():
            self.signalling.add(connection.client_id, candidate)
        if connection.relay_id is not None:
            for local in self._candidates(connection.relay_id):
                self._offer(connection, local, now)
        _LOG.info("Connection reused", extra={"cid": connection.client_id})
        self._settle(connection, now)

    def _candidates(self, relay_id: str) -> list[LocalCandidate]:
        """What an authorization offers, best first; of one kind, what a relay saw comes before what the host lists."""
        of_relays = self.relays.candidates(relay_id)
        seen = {local.address for local in of_relays if local.kind is Kind.HOST}
        listed = [local for endpoint, local in self._hosts.items() if endpoint not in seen]
        # A stable order: the agent ranks candidates of one kind in the order in which they come.
        return sorted(
            [*of_relays, *listed], key=lambda local: never_added_priority(local.kind, local.address), reverse=True
        )

    def _offer(self, connection: Connection, local: LocalCandidate, now: float) -> None:
        added = connection.offer(local, now, passive=local.relay_id == _LISTED)
        if added is not None:
            self.signalling.add(connection.client_id, added)

    def _remove(self, connection: Connection) -> None:
        connection.close()
        self._former_handshakes += connection.handshakes
        client_id = connection.client_id
        del self._connections[client_id]
        self._by_index.pop(connection.index, None)
        username, public_key = _username(connection.identity), connection.identity.public_key
        if self._by_username.get(username) is connection:
            del self._by_username[username]
        self._by_public_key[public_key].remove(connection)
        if not self._by_public_key[public_key]:
            del self._by_public_key[public_key]
        self._timers.cancel(connection)
        self._homeless.pop(client_id, None)
        self._relayed.track(connection, None)
        self.signalling.forget(client_id)

    def _settle(self, connection: Connection, now: float) -> None:
        """Drain one connection after an input, and re-arm its timer if the deadline moved."""
        connection.settle(now)
        if connection.state is ConnectionState.FAILED and connection.failure is not None:
            _LOG.info("Connection failed: %s", connection.failure.value, extra={"cid": connection.client_id})
            self._remove(connection)
            self._events.append(ConnectionFailed(connection.client_id, connection.failure))
            return
        while (request := connection.poll_request()) is not None:
            self._requests[request] = _Request(connection, now + REQUEST_LIFETIME)
        while len(self._requests) > MAX_REQUESTS_IN_FLIGHT:
            self._requests.popitem(last=False)
        self._collect(connection)
        while (event := connection.poll_event()) is not None:
            match event:
                case Established(path=path):
                    _LOG.info("Connection established", extra={"cid": connection.client_id, "path": path.kind})
                    self._events.append(ConnectionEstablished(connection.client_id, path))
                case PathChanged(old=old, new=new):
                    if old is not None and connection.handshake_at is not None:
                        fields = {"cid": connection.client_id, "path": new.kind, "was": old.kind}
                        _LOG.info("Connection takes another path", extra=fields)
                    _LOG.debug("Path changed cid=%s path=%s", connection.client_id, new)
                    self._relayed.track(connection, new)
        self._timers.arm(connection, connection.poll_timeout())
        self._settle_relays(now)

    def _collect(self, connection: Connection) -> None:
        while (transmit := connection.poll_transmit()) is not None:
            self._out.append(transmit)

    def _remote_candidate(self, client_id: str, text: str) -> tuple[Connection, candidate_line.Candidate] | None:
        connection = self._connections.get(client_id)
        if connection is None:
            self.counters["candidate for an unknown client"] += 1
            _LOG.debug("Candidate for an unknown client ignored cid=%s", client_id)
            return None
        try:
            return connection, candidate_line.parse(text)
        except Malformed as error:
            self.counters["malformed candidate"] += 1
            _LOG.debug("Candidate ignored: %s cid=%s", error, client_id)
            return None

    # -- demultiplexing

    def _handle_stun(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> None:
        if message.method != stun.Method.BINDING:
            self.counters["STUN: not a binding"] += 1
            return
        connection: Connection | None = None
        match message.message_class:
            case stun.MessageClass.REQUEST:
                connection = self._by_username.get(message.username or "")
            case stun.MessageClass.SUCCESS | stun.MessageClass.ERROR:
                request = self._requests.pop(message.transaction_id, None)
                if request is not None and now < request.expires:
                    connection = self._connections.get(request.connection.client_id)
                    if connection is not request.connection:
                        connection = None
            case _:
                pass
        if connection is None:
            self.counters["STUN: unknown connection"] += 1
            return
        if destination in self._hosts:
            connection.handle_contact(self._hosts[destination], message, now)
        connection.handle_stun(message, source, destination, now)
        self._settle(connection, now)

    def _handle_wireguard(
        self, payload: bytes, source: Endpoint, local: Endpoint, relay_id: str | None, now: float
    ) -> None:
        kind = wg.classify(payload)
        match kind:
            case wg.MessageType.INITIATION | wg.MessageType.RESPONSE:
                admission = self._gate.admit(payload, source, now)
                if isinstance(admission, CookieReply):
                    self._reply(admission.message, source, local, relay_id, now)
                elif not isinstance(admission, Admitted):
                    self.counters[f"WireGuard: {admission.reason}"] += 1
                elif kind is wg.MessageType.INITIATION:
                    self._handle_initiation(payload, source, now)
                else:
                    self._handle_receiver(kind, payload, now)
            case wg.MessageType.COOKIE_REPLY:
                self._handle_receiver(kind, payload, now)
            case wg.MessageType.DATA:
                self.counters["WireGuard: unknown session"] += 1
            case None:
                self.counters["neither STUN nor WireGuard"] += 1

    def _handle_initiation(self, payload: bytes, source: Endpoint, now: float) -> None:
        partial = identify(self._static, payload)
        sharing = self._by_public_key.get(partial.remote_static) if partial is not None else None
        if partial is None or sharing is None:
            self.counters["WireGuard: unknown client"] += 1
            return
        connection = _proven(sharing, source)
        connection.handle_initiation(partial, now)
        self._settle(connection, now)

    def _handle_receiver(self, kind: wg.MessageType, payload: bytes, now: float) -> None:
        connection = self._by_index.get(wg.receiver_index(payload) >> 8)
        if connection is None:
            self.counters["WireGuard: unknown connection"] += 1
            return
        if kind is wg.MessageType.RESPONSE:
            connection.peer.handle_response(payload, now)
        else:
            connection.peer.handle_cookie_reply(payload, now)
        self._settle(connection, now)

    def _reply(self, payload: bytes, to: Endpoint, local: Endpoint, relay_id: str | None, now: float) -> None:
        """Answer on the arrival path: only cookie replies, which may go to strangers (D4)."""
        if relay_id is None:
            self._out.append(Transmit(to, payload, local.ip))
            return
        route = self.relays.route(relay_id, to, now, use=Use.DATA)
        if route is not None:
            self._out.append(Transmit(route.relay, channel_data.encode(route.channel, payload)))

    # -- relays

    def _settle_relays(self, now: float) -> None:
        """Carry what relays announce into the connections, then drain those that it touched."""
        for connection in self._drain_relays(now):
            if self._connections.get(connection.client_id) is connection:
                self._settle(connection, now)
        if self._homeless and self.relays.sample(now) is not None:
            # Taken all at once: settling one comes back here, and must not begin with the rest.
            homeless, self._homeless = self._homeless, {}
            for connection in homeless.values():
                if self._connections.get(connection.client_id) is connection:
                    self._migrate(connection, now)
                    self._settle(connection, now)

    def _drain_relays(self, now: float) -> Sequence[Connection]:
        touched: dict[int, Connection] = {}
        while (event := self.relays.poll_event()) is not None:
            match event:
                case CandidateAdded(relay_id=relay_id, candidate=local):
                    for connection in self._connections.values():
                        if connection.relay_id == relay_id:
                            self._offer(connection, local, now)
                            touched[connection.index] = connection
                case CandidateInvalidated(address=address):
                    for connection in self._connections.values():
                        gone = connection.agent.invalidate_local_candidate(address, now)
                        if gone is not None:
                            self.signalling.invalidate(connection.client_id, gone)
                            touched[connection.index] = connection
                case ChannelChanged():
                    for relay in event.relay_sockets:
                        self._engine.set_channel(relay, event.number, usable=event.receivable)
                    self._relayed.handle_channel_changed(event, now)
                case RelayRemoved(relay_id=relay_id):
                    # A successor on the same id or socket is a new allocation, and may have another id.
                    for connection in self._connections.values():
                        if connection.relay_id == relay_id:
                            self._migrate(connection, now)
                            touched[connection.index] = connection
                case NoRelays():
                    self._events.append(RelaysExhausted())
        return list(touched.values())

    def _migrate(self, connection: Connection, now: float) -> None:
        """The selected relay is gone: take another, or remember to when there is one (2.10)."""
        relay_id = self.relays.sample(now)
        connection.relay_id = relay_id
        if relay_id is None:
            self._homeless[connection.client_id] = connection
            self._relayed.track(connection, None)
            connection.relay_route_changed(now)
            return
        self._homeless.pop(connection.client_id, None)
        _LOG.info("Connection moved to another relay", extra={"cid": connection.client_id, "relay": relay_id})
        for local in self.relays.candidates(relay_id):
            self._offer(connection, local, now)
        for remote in connection.agent.remote_candidates():
            if remote.kind is not Kind.HOST:
                connection.bind_channel(remote.address, now)
        self._relayed.track(connection, connection.path)
        connection.relay_route_changed(now)


def _username(identity: Identity) -> str:
    """The USERNAME of the client's checks; complete, since 20-bit ufrags collide (D2)."""
    return f"{identity.local.ufrag}:{identity.remote.ufrag}"


def _proven(sharing: Sequence[Connection], source: Endpoint) -> Connection:
    """Of connections with one public key that whose client ICE last proved to be at this address, else the first.

    Who only claims another client's key must not get its handshakes; one that came back from the same address gets its
    own, although the connection that it left is still there.
    """
    return max(sharing, key=lambda connection: connection.agent.checked_from(source) or 0.0)
