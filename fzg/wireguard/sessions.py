"""The sessions of one peer: which exist, and which one sends (spec connectivity 5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fzg.sansio import Deadline, earliest
from fzg.wireguard.timers import AGE_STEP, INITIATOR_STOPS_SENDING, REJECT_AFTER_TIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.wireguard.noise import Established

RING_SIZE = 8


class Activity(Protocol):
    """Times of a peer's packets as the engine counts them; 0.0 means never."""

    @property
    def first_unanswered_sent(self) -> float:
        """First non-empty data packet sent since anything authenticated was received."""

    @property
    def first_unanswered_received(self) -> float:
        """First non-empty data packet received since anything was sent."""

    @property
    def current_sent_data(self) -> bool:
        """Whether the session in use for sending carried non-empty data to the peer."""

    @property
    def current_received_data(self) -> bool:
        """Whether the session in use for sending carried non-empty data from the peer."""


class Sessions(Protocol):
    """What WireGuard needs of the packet engine, which holds the keys and counts the packets."""

    def add_session(
        self, peer: int, local_index: int, remote_index: int, *, receive_key: bytes, send_key: bytes, now: float
    ) -> None:
        """Accept data on `local_index` from now on."""

    def use_session(self, peer: int, local_index: int | None) -> None:
        """Seal with this session; None: nothing can be sent."""

    def remove_session(self, local_index: int) -> None:
        """Forget the keys."""

    def seal(self, peer: int, packet: bytes, now: float) -> bytes | None:
        """Encrypt one inner packet (empty: keepalive); None without a usable session."""

    def activity(self, peer: int) -> Activity:
        """The peer's times, exact to the packet."""

    def note_handshake(self, peer: int, *, sent: bool, now: float) -> None:
        """A handshake message was sent to the peer, or an authenticated one received from it."""


@dataclass(slots=True)
class Session:
    """What the timers know of a session. `sent_data` and `received_data` are as last seen while it was sending."""

    local_index: int
    established: float
    initiator: bool
    confirmed: bool
    sends: bool = False
    sent_data: bool = False
    received_data: bool = False

    @property
    def stops_sending(self) -> float | None:
        """When the session must no longer send although it still receives."""
        return self.established + INITIATOR_STOPS_SENDING + AGE_STEP if self.initiator and self.sends else None

    @property
    def discarded(self) -> float:
        """When the session ends in both directions."""
        return self.established + REJECT_AFTER_TIME + AGE_STEP


class SessionRing:
    """Eight slots, chosen by the local index. The engine holds exactly the sessions that are in here."""

    __slots__ = ("_engine", "_peer", "_slots", "current")

    def __init__(self, *, peer: int, engine: Sessions) -> None:
        self._peer = peer
        self._engine = engine
        self._slots: list[Session | None] = [None] * RING_SIZE
        self.current: Session | None = None

    def __iter__(self) -> Iterator[Session]:
        return (session for session in self._slots if session is not None)

    def add(self, established: Established, *, initiator: bool, now: float) -> None:
        """A handshake is done. Overwrites the slot; an initiator's session sends from now on."""
        slot = established.local_index % RING_SIZE
        overwritten = self._slots[slot]
        if overwritten is not None:
            self._remove(overwritten)
        session = Session(established.local_index, now, initiator, confirmed=initiator)
        self._slots[slot] = session
        self._engine.add_session(
            self._peer,
            established.local_index,
            established.remote_index,
            receive_key=established.keys.receive,
            send_key=established.keys.send,
            now=now,
        )
        if initiator:
            self._use(session)

    def confirm(self, local_index: int) -> bool:
        """The peer has proved that it has the keys. True the first time, for a session that it initiated."""
        session = self._slots[local_index % RING_SIZE]
        if session is None or session.local_index != local_index or session.confirmed:
            return False
        session.confirmed = True
        if self.current is None or session.established >= self.current.established:
            self._use(session)
        return True

    def spares(self, local_index: int) -> bool:
        """Whether a session with this index would leave the current one in place."""
        return self.current is None or self.current.local_index % RING_SIZE != local_index % RING_SIZE

    def age(self, now: float) -> Session | None:
        """Stop and discard what is too old; the current session if it was discarded."""
        ended = None
        for session in tuple(self):
            if now >= session.discarded:
                if session is self.current:
                    ended = session
                self._remove(session)
            elif session.stops_sending is not None and now >= session.stops_sending:
                session.sends = False
                self._engine.use_session(self._peer, None)
        return ended

    def next_change(self) -> Deadline | None:
        """When `age` has something to do."""
        deadline = None
        for session in self:
            deadline = earliest(deadline, Deadline(session.discarded, "session discarded"))
            if session.stops_sending is not None:
                deadline = earliest(deadline, Deadline(session.stops_sending, "session stops sending"))
        return deadline

    def clear(self) -> None:
        """Remove all sessions."""
        for session in tuple(self):
            self._remove(session)

    def _use(self, session: Session) -> None:
        if self.current is not None:
            self.current.sends = False
        session.sends = True
        self.current = session
        self._engine.use_session(self._peer, session.local_index)

    def _remove(self, session: Session) -> None:
        self._slots[session.local_index % RING_SIZE] = None
        if session is self.current:
            self.current = None
        self._engine.remove_session(session.local_index)
