"""One WireGuard peer: handshakes in both roles, sessions, timers (spec connectivity 5.2 to 5.5).

Data never passes through here: the engine seals and opens it, and tells on demand when packets went by. So a peer
looks at the engine's times often enough that none of its own deadlines can be missed.
"""

from __future__ import annotations

import hmac
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fzg.sansio import Deadline, earliest, random_unit
from fzg.wire import Malformed
from fzg.wire.wireguard import CookieReply, Response, tai64n
from fzg.wireguard import noise
from fzg.wireguard.cookie import CookieJar
from fzg.wireguard.index import SessionIndices
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.noise import PartialInitiation, identify
from fzg.wireguard.sessions import SessionRing
from fzg.wireguard.timers import (
    EXPIRE_WITHOUT_HANDSHAKE,
    ICE,
    LOOK_GRID,
    MAX_JITTER,
    REKEY_AFTER_TIME,
    REKEY_LOOK_INTERVAL,
    Timing,
)

if TYPE_CHECKING:
    from fzg.sansio import Random
    from fzg.secret import Secret
    from fzg.wire.wireguard import Initiation
    from fzg.wireguard.sessions import Activity, Session, Sessions

__all__ = ["Event", "Expired", "HandshakeCompleted", "PartialInitiation", "Peer", "identify"]

_LOG = logging.getLogger(__name__)

# Spec 5.3: a response to the latest initiation or to the one before it is accepted.
_OUTSTANDING = 2
# The caller takes what is to be sent after every input, so this only bounds a caller that does not.
_MAX_TRANSMITS = 128


@dataclass(frozen=True, slots=True)
class HandshakeCompleted:
    """Both sides have the keys: the response was accepted, or the peer used the session."""

    at: float


@dataclass(frozen=True, slots=True)
class Expired:
    """The peer is gone; the sessions are too, and nothing more comes from here."""


Event = HandshakeCompleted | Expired


class Peer:
    """See the module text. `handle_initiation` and `handle_response` expect what the node's gate admitted."""

    __slots__ = (
        "_attempt_began",
        "_closed",
        "_completed",
        "_cookies",
        "_deadline",
        "_engine",
        "_events",
        "_indices",
        "_jitter",
        "_keepalive_for",
        "_last_initiation",
        "_last_received_timestamp",
        "_last_sent_timestamp",
        "_peer",
        "_pending",
        "_preshared_key",
        "_random",
        "_remote_public",
        "_renewal",
        "_sessions",
        "_shared",
        "_static",
        "_timing",
        "_transmits",
        "_unix_offset",
        "dropped",
    )

    def __init__(
        self,
        *,
        static: KeyPair,
        remote_public: bytes,
        preshared_key: Secret[bytes],
        connection_index: int,
        peer: int,
        engine: Sessions,
        random: Random,
        unix_offset: float,
        now: float,
        timing: Timing = ICE,
    ) -> None:
        self._static = static
        self._remote_public = remote_public
        self._shared = static.exchange(remote_public)
        self._preshared_key = preshared_key
        self._peer = peer
        self._engine = engine
        self._random = random
        self._unix_offset = unix_offset
        self._timing = timing
        self._indices = SessionIndices(connection_index)
        self._cookies = CookieJar(remote_public)
        self._sessions = SessionRing(peer=peer, engine=engine)
        self._pending: list[noise.PendingInitiation] = []
        self._last_received_timestamp = b""
        self._last_sent_timestamp = 0
        self._completed = now
        self._attempt_began: float | None = None
        self._last_initiation = 0.0
        self._renewal: float | None = None
        self._keepalive_for = 0.0
        self._jitter = self._draw_jitter()
        self._closed = False
        self._deadline: Deadline | None = None
        self._transmits: list[bytes] = []  # emptied after each input; an empty deque holds 600 bytes
        self._events: list[Event] = []
        self.dropped: Counter[str] = Counter()
        self._rearm(now)

    def handle_initiation(self, partial: PartialInitiation, now: float) -> bool:
        """Answer an initiation: the response is queued, the session is ready to receive. False: dropped."""
        if self._closed:
            return self._drop("closed")
        if not hmac.compare_digest(partial.remote_static, self._remote_public):
            return self._drop("initiation with another key")
        opened = noise.authenticate(partial, self._shared) if self._shared is not None else None
        if opened is None:
            return self._drop("initiation not authentic")
        if opened.timestamp <= self._last_received_timestamp:
            return self._drop("initiation replayed")
        answer = noise.respond(
            opened,
            remote_public=self._remote_public,
            preshared_key=self._preshared_key.reveal(),
            local_index=self._draw_index(),
            ephemeral=KeyPair.generate(self._random),
        )
        if answer is None:
            return self._drop("initiation with a weak key")
        response, established = answer
        self._last_received_timestamp = opened.timestamp
        self._engine.note_handshake(self._peer, sent=False, now=now)
        self._sessions.add(established, initiator=False, now=now)
        self._send_handshake(response, now)
        self._rearm(now)
        return True

    def handle_response(self, message: bytes, now: float) -> bool:
        """Accept the response to one of our outstanding initiations. False: dropped."""
        try:
            response = Response.parse(message)
        except Malformed as error:
            return self._drop(str(error))
        if now > self._last_initiation + self._timing.rekey_attempt_time:
            self._pending.clear()
        pending = next((each for each in self._pending if each.local_index == response.receiver), None)
        if pending is None:
            return self._drop("response to no initiation of ours")
        preshared_key = self._preshared_key.reveal()
        established = noise.complete(pending, response, static=self._static, preshared_key=preshared_key)
        if established is None:
            return self._drop("response not authentic")
        # A later one stays outstanding: the peer may keep only the session that it makes for that one.
        del self._pending[: self._pending.index(pending) + 1]
        self._engine.note_handshake(self._peer, sent=False, now=now)
        self._sessions.add(established, initiator=True, now=now)
        self._complete(now)
        # Spec 5.3: the responder may send only after it has received.
        self._send_keepalive(now)
        self._rearm(now)
        return True

    def handle_cookie_reply(self, message: bytes, now: float) -> bool:
        """Take the cookie for our next handshake messages. False: dropped."""
        try:
            reply = CookieReply.parse(message)
        except Malformed as error:
            return self._drop(str(error))
        return self._cookies.handle_reply(reply, now) or self._drop("cookie reply to no message of ours")

    def handle_session_confirmed(self, local_index: int, now: float) -> None:
        """The engine opened the first packet of a session."""
        if self._sessions.confirm(local_index):
            self._complete(now)
        self._rearm(now)

    def initiate(self, now: float) -> None:
        """Begin a handshake at once, unless one is in progress."""
        if self._closed or self._attempt_began is not None:
            return
        self._attempt_began = now
        self._send_initiation(now)
        self._rearm(now)

    def close(self) -> None:
        """Remove all sessions from the engine; nothing happens here any more."""
        self._closed = True
        self._sessions.clear()
        self._pending.clear()
        self._transmits.clear()
        self._deadline = None

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        if self._deadline is None or now < self._deadline.at:
            return
        self._advance(now)
        self._rearm(now)

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due; None once expired or closed."""
        return self._deadline

    def poll_transmit(self) -> bytes | None:
        """The next handshake message or keepalive for the peer."""
        return self._transmits.pop(0) if self._transmits else None

    def poll_event(self) -> Event | None:
        """The next event."""
        return self._events.pop(0) if self._events else None

    def _advance(self, now: float) -> None:
        if now >= self._expiry().at:
            self.close()
            self._events.append(Expired())
            return
        activity = self._look()
        ended = self._sessions.age(now)
        if ended is not None and ended.initiator:
            self._renewal = now
        if self._attempt_began is not None:
            if now >= self._retry().at:
                self._send_initiation(now)
            return
        rekey = self._rekey(activity)
        if rekey is not None and now >= rekey.at:
            self._attempt_began = now
            self._send_initiation(now)
            return
        keepalive = self._keepalive(activity)
        if keepalive is not None and now >= keepalive.at:
            self._keepalive_for = activity.first_unanswered_received
            self._send_keepalive(now)

    def _rearm(self, now: float) -> None:
        """Arm for the next thing that can be known now, or the next look at what cannot."""
        if self._closed:
            return
        deadline = earliest(self._expiry(), self._sessions.next_change())
        if self._attempt_began is not None:
            self._deadline = earliest(deadline, self._retry())
            return
        activity = self._look()
        self._deadline = earliest(deadline, self._rekey(activity), self._keepalive(activity), self._next_look(now))

    def _look(self) -> Activity:
        """The engine's times; what it counts for the current session only is kept beyond its use."""
        activity = self._engine.activity(self._peer)
        current = self._sessions.current
        if current is not None and current.sends:
            current.sent_data = activity.current_sent_data
            current.received_data = activity.current_received_data
        return activity

    def _expiry(self) -> Deadline:
        without_handshake = Deadline(self._completed + EXPIRE_WITHOUT_HANDSHAKE, "no handshake for too long")
        if self._attempt_began is None:
            return without_handshake
        give_up = Deadline(self._attempt_began + self._timing.rekey_attempt_time, "handshake given up")
        return min(give_up, without_handshake)

    def _retry(self) -> Deadline:
        return Deadline(self._last_initiation + self._timing.rekey_timeout + self._jitter, "handshake retried")

    def _rekey(self, activity: Activity) -> Deadline | None:
        """When to begin a handshake of our own, for what has happened up to now."""
        due = None
        if activity.first_unanswered_sent:
            due = Deadline(activity.first_unanswered_sent + self._timing.new_handshake_timeout, "data unanswered")
        if self._renewal is not None:
            due = earliest(due, Deadline(self._renewal, "session renewed"))
        current = self._sessions.current
        if current is not None and current.initiator:
            if current.sent_data:
                due = earliest(due, Deadline(current.established + REKEY_AFTER_TIME, "rekey after sending"))
            if current.received_data:
                age = self._timing.rekey_on_receive_time
                due = earliest(due, Deadline(current.established + age, "rekey after receiving"))
        return None if due is None else Deadline(due.at + self._jitter, due.reason)

    def _keepalive(self, activity: Activity) -> Deadline | None:
        """Once per stretch of unanswered data (D8: counted from its first packet)."""
        received = activity.first_unanswered_received
        if not received or received == self._keepalive_for:
            return None
        return Deadline(received + self._timing.keepalive_timeout, "keepalive")

    def _next_look(self, now: float) -> Deadline | None:
        """The latest time at which no deadline caused by packets from now on can have passed yet."""
        if next(iter(self._sessions), None) is None:
            return None
        at = (now + self._timing.keepalive_timeout) // LOOK_GRID * LOOK_GRID
        current = self._sessions.current
        if current is not None and current.initiator and current.sends:
            at = min(at, self._rekey_look(current, now))
        return Deadline(at, "look for data")

    def _rekey_look(self, current: Session, now: float) -> float:
        """As `_next_look`, for the rules that act on the first data packet of an old session."""
        at = float("inf")
        if not current.sent_data:
            at = current.established + REKEY_AFTER_TIME
        if not current.received_data:
            at = min(at, current.established + self._timing.rekey_on_receive_time)
        return max(at, now + REKEY_LOOK_INTERVAL)

    def _complete(self, now: float) -> None:
        """A handshake in either role is done, which also ends an attempt of ours."""
        self._completed = now
        self._attempt_began = None
        self._renewal = None
        self._events.append(HandshakeCompleted(now))

    def _send_initiation(self, now: float) -> None:
        self._renewal = None
        self._last_initiation = now
        self._jitter = self._draw_jitter()
        # Strictly later than the one before, however close the two are (spec 5.2 step 4).
        timestamp = max(int((now + self._unix_offset) * 1e9), self._last_sent_timestamp + 1)
        self._last_sent_timestamp = timestamp
        if self._shared is None:
            return
        begun = noise.initiate(
            self._static,
            remote_public=self._remote_public,
            shared=self._shared,
            local_index=self._draw_index(),
            ephemeral=KeyPair.generate(self._random),
            timestamp=tai64n(timestamp),
        )
        if begun is None:
            return
        initiation, pending = begun
        self._pending = [*self._pending, pending][-_OUTSTANDING:]
        self._send_handshake(initiation, now)

    def _send_handshake(self, message: Initiation | Response, now: float) -> None:
        self._transmit(self._cookies.stamp(message, now))
        self._engine.note_handshake(self._peer, sent=True, now=now)

    def _send_keepalive(self, now: float) -> None:
        datagram = self._engine.seal(self._peer, b"", now)
        if datagram is not None:
            self._transmit(datagram)

    def _transmit(self, message: bytes) -> None:
        self._transmits = [*self._transmits, message][-_MAX_TRANSMITS:]

    def _draw_index(self) -> int:
        """The next index, passing over those that would cost the current session before another replaces it."""
        while True:
            index = self._indices.next()
            if self._sessions.spares(index):
                return index

    def _draw_jitter(self) -> float:
        return random_unit(self._random) * MAX_JITTER

    def _drop(self, reason: str) -> bool:
        self.dropped[reason] += 1
        _LOG.debug("handshake message of peer %d dropped: %s", self._peer, reason)
        return False
