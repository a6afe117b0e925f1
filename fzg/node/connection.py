"""One client: its ICE agent, its WireGuard peer, and the path between them (spec connectivity chapter 2)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from fzg.ice.agent import AgentState, Nominated, Role, StateChanged
from fzg.node.path import Path, path_of
from fzg.node.relayed import ChannelShare
from fzg.sansio import Deadline, EcnCodepoint, Transmit, earliest
from fzg.turn.events import Use
from fzg.wire import channel_data, ip, probe
from fzg.wire.candidate import Kind
from fzg.wire.wireguard import MessageType
from fzg.wireguard.peer import Expired, HandshakeCompleted

if TYPE_CHECKING:
    from fzg.dataplane.engine import Engine
    from fzg.ice.agent import Agent, Credentials, Timing
    from fzg.secret import Secret
    from fzg.turn.events import LocalCandidate, Route
    from fzg.turn.relays import RelaySet
    from fzg.wire import stun
    from fzg.wire.candidate import Candidate
    from fzg.wire.endpoint import Endpoint
    from fzg.wireguard.peer import PartialInitiation, Peer

_LOG = logging.getLogger(__name__)

# Specification constants (connectivity appendix B).
CANDIDATE_TIMEOUT = 10.0  # s without any signalled remote candidate
DISCONNECT_GRACE = 2.0  # s in which new candidates may repair a connection without possible pairs
IDLE_AFTER = 20.0  # s without activity
HANDSHAKE_DEBOUNCE = 20.0  # s between handshakes that a nomination starts (controlling side)
CONNECTING_BUFFER = 128  # WireGuard messages kept until a path is selected, oldest dropped

# Ours: after an authorization ICE and the handshake take some round trips; a relay that has carried nothing by then may
# have lost its state, which it does not say, and its next Refresh may be minutes away (turn 5.5).
# The second look is for the case that the relay was asked for another reason shortly before the first.
SILENCES = (2.0, 15.0)  # s
# Ours: a client that comes back initiates just before it nominates (3.13), so the response to it leaves by the path of
# its former life; it is sent again on the new one. Nominations follow within a round trip.
REPEATED_RESPONSE = 1.0  # s
NO_CHANNEL = "no channel on the relay"
"""Why `send` dropped a packet; a bind was started, so the next one may pass."""


class ConnectionState(Enum):
    """See the table of connectivity 2.4; a failed connection is removed in the pass that fails it."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    IDLE = "idle"
    FAILED = "failed"


class Identity(NamedTuple):
    """What an authorization must repeat for the connection to be reused (connectivity 2.1)."""

    public_key: bytes
    preshared_key: Secret[bytes]
    local: Credentials
    remote: Credentials
    is_iceless: bool = False
    """Negotiated without ICE (connectivity 6), which is not offered yet; of it there are the answers to probes only."""


class Failure(Enum):
    """Why a connection failed, as the log words it."""

    NO_CANDIDATES = "the client sent no candidates"
    ICE_TIMEOUT = "no path answers any more"
    WIREGUARD_EXPIRED = "WireGuard expired"


@dataclass(frozen=True, slots=True)
class Established:
    """The first handshake is done and a path is selected, whichever came later."""

    path: Path


@dataclass(frozen=True, slots=True)
class PathChanged:
    """Data leaves by another path now."""

    old: Path | None
    new: Path


ConnectionEvent = Established | PathChanged


class Connection:
    """Owned and driven by the node, which feeds it messages that belong to it and drains it after each input."""

    def __init__(
        self,
        *,
        client_id: str,
        handle: int,
        index: int,
        identity: Identity,
        agent: Agent,
        peer: Peer,
        idle_timing: Timing,
        relay_id: str,
        relays: RelaySet,
        engine: Engine,
        now: float,
    ) -> None:
        self.client_id = client_id
        self.handle = handle
        self.index = index
        self.identity = identity
        self.agent = agent
        self.peer = peer
        self.relay_id: str | None = relay_id
        self.state = ConnectionState.CONNECTING
        self.failure: Failure | None = None
        self.path: Path | None = None
        self.created_at = now
        self.handshake_at: float | None = None
        self.handshakes = 0
        self._active_timing = agent.timing
        self._idle_timing = idle_timing
        self._relays = relays
        self._channels = ChannelShare()
        self._engine = engine
        # Lists: they are emptied after each input, and an empty deque holds 600 bytes.
        self._buffer: list[bytes] = []
        self._out: list[Transmit] = []
        self._requests: list[bytes] = []
        self._events: list[ConnectionEvent] = []
        self._activity = now
        self._candidate_deadline: float | None = now + CANDIDATE_TIMEOUT
        self._disconnect_deadline: float | None = None
        self._response: tuple[float, bytes] | None = None
        self._authorized_at = now
        self._silence_deadline: float | None = now + SILENCES[0]
        self._nomination_handshake_at = float("-inf")

    # -- inputs

    def resume(self, now: float) -> None:
        """An authorization repeated this connection's parameters (2.2 step 1)."""
        self._authorized_at = now
        self._silence_deadline = now + SILENCES[0]
        if self.state is not ConnectionState.CONNECTING:
            self.note_activity(now)
        if self.agent.role is Role.CONTROLLING:
            self._handshake_after_nomination(now)

    def note_activity(self, now: float) -> None:
        """A user or control packet passed, or a candidate changed (2.6)."""
        self._activity = now
        if self.state is ConnectionState.IDLE:
            self.state = ConnectionState.CONNECTED
            self.agent.set_timing(self._active_timing, now)

    def offer(self, candidate: LocalCandidate, now: float, *, passive: bool = False) -> Candidate | None:
        """A local candidate became known; returns it as the client must hear of it, None when redundant."""
        added = self.agent.add_local_candidate(
            candidate.kind,
            candidate.address,
            candidate.base,
            family_mismatch=candidate.family_mismatch,
            passive=passive,
            now=now,
        )
        if added is not None:
            self.note_activity(now)
        return added

    def guess_remote(self, address: Endpoint, now: float) -> bool:
        """Open our NAT for an address that the client probably sends from; False when nothing of ours can reach it."""
        return self.agent.guess_remote(address, now)

    def add_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """A candidate of the client; its relay channel is bound unless it is a host address (4.2)."""
        if not self.agent.add_remote_candidate(candidate, now):
            return
        self._candidate_deadline = None
        self.note_activity(now)
        if candidate.kind is not Kind.HOST:
            self.bind_channel(candidate.address, now)

    def bind_channel(self, peer: Endpoint, now: float) -> None:
        """Have a channel to an address of the client on the selected relay."""
        if self.relay_id is not None and self._channels.admits(peer, now):
            self._relays.bind_channel(self.relay_id, peer, now)

    def remove_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """The client withdrew a candidate."""
        if self.agent.invalidate_remote_candidate(candidate, now):
            self.note_activity(now)

    def handle_contact(self, local: LocalCandidate, message: stun.Message, now: float) -> None:
        """A check came to this address of ours: if it is the client's, the agent answers there from now on (D3)."""
        if not self.agent.has_local(local.address) and self.agent.authenticates(message):
            self.offer(local, now, passive=True)

    def handle_stun(self, message: stun.Message, source: Endpoint, destination: Endpoint, now: float) -> None:
        """A connectivity check, or the answer to one of ours."""
        self.agent.handle_message(message, source, destination, now)

    def handle_initiation(self, partial: PartialInitiation, now: float) -> bool:
        """A handshake initiation that carries this client's key; False when WireGuard refuses it."""
        return self.peer.handle_initiation(partial, now)

    def relay_route_changed(self, now: float) -> None:
        """The channel behind a relayed path was bound, re-bound or lost: tell the engine where data goes now."""
        if self.path is not None and self.path.relayed:
            self._install_path(now)

    def send(self, packet: bytes, now: float, *, revocable: bool = False) -> str | None:
        """Encrypt one inner packet, its ECN copied outside; returns why it was dropped, or None (2.8)."""
        if self.path is None:
            return "still connecting"
        datagram = self._engine.seal(self.handle, packet, now)
        if datagram is None:
            return "no WireGuard session"
        self.note_activity(now)
        if not self._transmit(datagram, now, ip.ecn_of(packet), self.handle if revocable else None):
            return NO_CHANNEL
        return None

    def answer_probe(self, packet: bytes, source: Endpoint, local: Endpoint, now: float) -> bool:
        """Whether this was a probe of a path without ICE; the answer takes the way that it came (tunnel 6.7)."""
        if not self.identity.is_iceless or (reply := probe.answer(packet)) is None:
            return False
        datagram = self._engine.seal(self.handle, reply, now)
        if datagram is None:
            return True
        self.note_activity(now)
        if self._relays.is_relay(source):
            self._transmit(datagram, now)
        else:
            self._out.append(Transmit(source, datagram, local.ip))
        return True

    def handle_timeout(self, now: float) -> None:
        """In the order of 2.5: agent, idle, candidate timeout, disconnect grace, WireGuard."""
        self.agent.handle_timeout(now)
        self._check_idle(now)
        self._check_silence(now)
        if self._candidate_deadline is not None and now >= self._candidate_deadline:
            self._fail(Failure.NO_CANDIDATES)
        elif self._disconnect_deadline is not None and now >= self._disconnect_deadline:
            self._fail(Failure.ICE_TIMEOUT)
        else:
            self.peer.handle_timeout(now)

    def close(self) -> None:
        """Take keys, path and flows out of the engine; the object is of no use afterwards."""
        self.peer.close()
        self._engine.remove_peer(self.handle)

    # -- outputs

    def settle(self, now: float) -> None:
        """Turn what agent and WireGuard produced into datagrams and events; call after every input."""
        while (agent_event := self.agent.poll_event()) is not None:
            match agent_event:
                case Nominated():
                    self._select(path_of(agent_event), now)
                case StateChanged(state=AgentState.DISCONNECTED):
                    self._disconnect_deadline = now + DISCONNECT_GRACE
                case StateChanged():
                    self._disconnect_deadline = None
        while (message := self.peer.poll_transmit()) is not None:
            if self.path is None:
                self._buffer = [*self._buffer, message][-CONNECTING_BUFFER:]
                continue
            if message[0] == MessageType.INITIATION and now > self._nomination_handshake_at:
                self._doubt_relay(now)  # we begin because data went unanswered (5.4)
            elif message[0] == MessageType.RESPONSE:
                self._response = now, message
            self._transmit(message, now)
        while (peer_event := self.peer.poll_event()) is not None:
            match peer_event:
                case HandshakeCompleted(at=at):
                    first, self.handshake_at = self.handshake_at is None, at
                    self.handshakes += 1
                    self._response = None
                    if first and self.path is not None:
                        self._events.append(Established(self.path))
                case Expired():
                    self._fail(Failure.WIREGUARD_EXPIRED)
        while (check := self.agent.poll_transmit()) is not None:
            if check.transaction_id is not None:
                self._requests.append(check.transaction_id)
            if self.agent.is_relayed(check.source):
                self._transmit_relayed(check.payload, check.destination, now, Use.CHECK)
            else:
                self._out.append(Transmit(check.destination, check.payload, check.source.ip))

    def poll_timeout(self) -> Deadline | None:
        """The soonest of the connection's timers."""
        if self.state is ConnectionState.FAILED:
            return None
        candidate = self._candidate_deadline
        disconnect = self._disconnect_deadline
        silence = self._silence_deadline
        return earliest(
            self.agent.poll_timeout(),
            self.peer.poll_timeout(),
            Deadline(self._activity + IDLE_AFTER, "idle") if self._may_idle else None,
            Deadline(candidate, "no remote candidate") if candidate is not None else None,
            Deadline(disconnect, "ICE disconnected") if disconnect is not None else None,
            Deadline(silence, "silence after authorization") if silence is not None else None,
        )

    def poll_transmit(self) -> Transmit | None:
        """The next datagram."""
        return self._out.pop(0) if self._out else None

    def poll_request(self) -> bytes | None:
        """Transaction ids of checks sent since the last call, for the node's table of answers."""
        return self._requests.pop(0) if self._requests else None

    def poll_event(self) -> ConnectionEvent | None:
        """What the node must know."""
        return self._events.pop(0) if self._events else None

    # -- inside

    @property
    def _may_idle(self) -> bool:
        return self.state is ConnectionState.CONNECTED and self.agent.state in (
            AgentState.CONNECTED,
            AgentState.COMPLETED,
        )

    def _check_idle(self, now: float) -> None:
        if not self._may_idle or now < self._activity + IDLE_AFTER:
            return
        self._activity = max(self._activity, self._engine.activity(self.handle).last_data)
        if now >= self._activity + IDLE_AFTER:
            self.state = ConnectionState.IDLE
            self.agent.set_timing(self._idle_timing, now)

    def _check_silence(self, now: float) -> None:
        if self._silence_deadline is None or now < self._silence_deadline:
            return
        first = now < self._authorized_at + SILENCES[1]
        self._silence_deadline = self._authorized_at + SILENCES[1] if first else None
        if self._engine.activity(self.handle).last_received < self._authorized_at:
            self._doubt_relay(now)

    def _doubt_relay(self, now: float) -> None:
        if self.relay_id is not None and (self.path is None or self.path.relayed):
            self._relays.doubt(self.relay_id, now)

    def _select(self, path: Path, now: float) -> None:
        if path == self.path:
            return
        old, self.path = self.path, path
        if self.state is ConnectionState.CONNECTING:
            self.state = ConnectionState.CONNECTED
            self._activity = now
        self._install_path(now)
        self._events.append(PathChanged(old, path))
        if self.agent.role is Role.CONTROLLING:
            self._handshake_after_nomination(now)
        if old is None:
            while self._buffer:
                self._transmit(self._buffer.pop(0), now)
            if self.handshake_at is not None:
                self._events.append(Established(path))
        elif self._response is not None and now < self._response[0] + REPEATED_RESPONSE:
            self._transmit(self._response[1], now)

    def _handshake_after_nomination(self, now: float) -> None:
        if now >= self._nomination_handshake_at + HANDSHAKE_DEBOUNCE:
            self._nomination_handshake_at = now
            self.peer.initiate(now)

    def _install_path(self, now: float) -> None:
        path = self.path
        if path is None:
            return
        if not path.relayed:
            self._engine.set_path(self.handle, path.source.ip, path.destination, None)
            return
        route = self._route(path.destination, now, Use.LOOKUP)
        if route is None:
            self._engine.clear_path(self.handle)
        else:
            self._engine.set_path(self.handle, None, route.relay, route.channel)

    def _transmit(self, datagram: bytes, now: float, ecn: int = EcnCodepoint.NOT_ECT, peer: int | None = None) -> bool:
        path = self.path
        if path is None:
            return False
        if path.relayed:
            return self._transmit_relayed(datagram, path.destination, now, Use.DATA, ecn, peer)
        self._out.append(Transmit(path.destination, datagram, path.source.ip, ecn, peer))
        return True

    def _transmit_relayed(  # noqa: PLR0917 - the arguments of `_transmit`
        self,
        datagram: bytes,
        destination: Endpoint,
        now: float,
        use: Use,
        ecn: int = EcnCodepoint.NOT_ECT,
        peer: int | None = None,
    ) -> bool:
        """Without a channel the datagram is lost and a bind starts (4.2), so the sender's next try works."""
        route = self._route(destination, now, use)
        if route is None:
            return False
        self._out.append(Transmit(route.relay, channel_data.encode(route.channel, datagram), None, ecn, peer))
        return True

    def _route(self, destination: Endpoint, now: float, use: Use) -> Route | None:
        if self.relay_id is None or not self._channels.admits(destination, now):
            return None
        return self._relays.route(self.relay_id, destination, now, use=use)

    def _fail(self, failure: Failure) -> None:
        self.state = ConnectionState.FAILED
        self.failure = failure
