"""The Phoenix channel on one WebSocket: join, references, heartbeat, outbound queue (spec portal 1.7 to 1.11).

One object per WebSocket: reference counter, unsent messages and unanswered heartbeats end with the connection.
It begins when the upgrade is finished, and is over after its first `Hiccup` or `Fatal` event.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from fzg.portal.messages import Id, Inbound, Outbound, SetSnownetCapabilities, UnknownEvent, decode
from fzg.portal.problem import FatalPortalError, LoginFailed, TokenInvalid
from fzg.sansio import Deadline, earliest
from fzg.wire import Malformed

_LOG = logging.getLogger(__name__)

# Specification constants (portal 1.6, 1.9)
HEARTBEAT_INTERVAL_S: Final = 10.0
JOIN_TIMEOUT_S: Final = 5.0
MAX_UNANSWERED_HEARTBEATS: Final = 3

MAX_QUEUED: Final = 16_384
"""A portal that provokes answers and does not read them: 40 s of that end with the heartbeat, this bounds the memory.
Room for the acknowledgement and the candidates of 200 authorizations a second for as long, some 10 MB."""

MAX_REJOINS: Final = 10
"""Between two heartbeats. A portal that loses each channel at once would have us join as fast as it answers; a new dial
waits half a second at least."""

_TOPIC: Final = "gateway"
_HEARTBEAT_TOPIC: Final = "phoenix"
_NO_CHANNEL: Final = "unmatched topic"
_NUMBER_BEGUN: Final = ("-", "+", ".", "e", "E")
_TRUNCATED: Final = "Input data was truncated"  # msgspec has no class for it


class Timing(NamedTuple):
    """The timers; other values than the specification's are for tests."""

    heartbeat_interval: float = HEARTBEAT_INTERVAL_S
    join_timeout: float = JOIN_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Joined:
    """The portal answered the join, of a new connection or after it lost the channel of this one."""


@dataclass(frozen=True, slots=True)
class Received:
    """The portal pushed a message."""

    message: Inbound


@dataclass(frozen=True, slots=True)
class Hiccup:
    """The connection has failed: dial again."""

    cause: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """The portal told us to stop."""

    error: FatalPortalError


Event: TypeAlias = Joined | Received | Hiccup | Fatal


class Frame(NamedTuple):
    """One text frame to write, and the message in it unless it is the channel's own."""

    text: bytes
    message: Outbound | None = None


class Channel:
    """Joins, keeps the connection alive, and carries messages both ways once joined."""

    def __init__(
        self, *, now: float, capabilities: SetSnownetCapabilities | None = None, timing: Timing | None = None
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self._timing = timing or Timing()
        self._capabilities = capabilities
        self._events: deque[Event] = deque()
        self._queue: OrderedDict[Outbound, None] = OrderedDict()
        self._over = False
        self._next_ref = 0

        self._join_due = True
        self._join_deadline: float | None = now + self._timing.join_timeout
        self._join_ref: int | None = None
        self._joined = False
        self._rejoins = 0
        self._capabilities_due = False

        self._heartbeat_at = now + self._timing.heartbeat_interval
        self._heartbeat_due = False
        self._heartbeats_missed_by_writer = 0
        self._unanswered: set[int] = set()

    @property
    def joined(self) -> bool:
        """True while messages may be written."""
        return self._joined and not self._over

    def send(self, message: Outbound) -> bool:
        """Queues a message; an equal one that is still unsent stands for both. False when it is refused.

        With the queue full the connection has failed: what is left out of it would leave the portal with another
        picture than ours, which only the `init` of the next connection puts right.
        """
        if self._over:
            return False
        if message not in self._queue and len(self._queue) >= MAX_QUEUED:
            self._fail(Hiccup(f"the portal does not read what we send: {MAX_QUEUED} messages wait"))
            return False
        self._queue.setdefault(message)
        return True

    def unsent(self) -> list[Outbound]:
        """The messages that no frame was made of, oldest first."""
        return list(self._queue)

    def handle_frame(self, text: str, now: float) -> None:
        """One text frame from the portal. What cannot be read is skipped, except a truncated frame (1.7)."""
        if self._over:
            return
        try:
            envelope = _ENVELOPE.decode(text)
            ref = _reference(envelope.ref)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            if _is_truncated(text, error):
                self._fail(Hiccup("the portal sent a truncated frame"))
            else:
                self._skip("malformed frame", str(error))
            return
        payload = bytes(envelope.payload)
        match envelope.event:
            case "phx_reply":
                self._handle_reply(envelope.topic, ref, payload, now)
            case "phx_error":
                _LOG.debug("The portal reports a channel error")
            case "phx_close":
                self._fail(Hiccup("the portal closed the channel"))
            case "disconnect":
                self._handle_disconnect(payload)
            case event:
                self._handle_push(event, payload)

    def handle_timeout(self, now: float) -> None:
        """Heartbeats and the wait for the join reply."""
        if self._over:
            return
        if self._join_deadline is not None and now >= self._join_deadline:
            self._fail(Hiccup(f"the join was not answered within {self._timing.join_timeout:g} s"))
        elif now >= self._heartbeat_at:
            self._handle_heartbeat_tick(now)

    def poll_timeout(self) -> Deadline | None:
        """The next heartbeat or the end of the wait for the join reply."""
        if self._over:
            return None
        join = None if self._join_deadline is None else Deadline(self._join_deadline, "portal join")
        return earliest(join, Deadline(self._heartbeat_at, "portal heartbeat"))

    def poll_transmit(self) -> Frame | None:
        """The next frame: heartbeat before join before messages. Call it only when the one before is on its way."""
        if self._heartbeat_due:
            self._heartbeat_due = False
            self._heartbeats_missed_by_writer = 0
            self._unanswered.add(self._next_ref)
            return self._frame(_HEARTBEAT_TOPIC, "heartbeat", {})
        if self._over:
            return None
        if self._join_due:
            self._join_due = False
            self._join_ref = self._next_ref
            return self._frame(_TOPIC, "phx_join", None)
        if not self._joined:
            return None
        if self._capabilities_due and self._capabilities is not None:
            self._capabilities_due = False
            return self._frame(_TOPIC, self._capabilities.EVENT, self._capabilities)
        if self._queue:
            message, _ = self._queue.popitem(last=False)
            frame = self._frame(_TOPIC, message.EVENT, message)
            return frame._replace(message=message)
        return None

    def poll_event(self) -> Event | None:
        """What the driver must know; `Hiccup` and `Fatal` are the last."""
        return self._events.popleft() if self._events else None

    def _handle_reply(self, topic: str, ref: int | None, payload: bytes, now: float) -> None:
        if ref is None:
            self._skip("reply without ref", "")
            return
        try:
            reply = _REPLY.decode(payload)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._skip("malformed reply", str(error))
            return
        if ref in self._unanswered:
            self._unanswered.discard(ref)
        elif reply.status == "ok":
            if topic == _TOPIC and not self._joined and ref == self._join_ref:
                self._handle_joined()
        elif reply.status == "error":
            self._handle_error_reply(topic, ref, reply.reason, now)
        else:
            self._skip("malformed reply", "unknown status")

    def _handle_joined(self) -> None:
        self._joined = True
        self._join_deadline = None
        self._capabilities_due = True
        self._events.append(Joined())

    def _handle_error_reply(self, topic: str, ref: int, reason: str | None, now: float) -> None:
        if topic != _TOPIC or self._join_ref is None:
            _LOG.debug("The portal answered an error: %s", reason)
        elif not self._joined and ref == self._join_ref:
            self._fail(Fatal(LoginFailed(reason)))
        elif reason == _NO_CHANNEL and self._joined and ref > self._join_ref:
            # Errors for messages older than a re-join are about the channel that it replaced.
            if self._rejoins == MAX_REJOINS:
                self._fail(Hiccup("the portal loses our channel again and again"))
                return
            self._rejoins += 1
            _LOG.debug("The portal lost our channel; joining again")
            self._joined = False
            self._join_due = True
            self._join_ref = None
            self._join_deadline = now + self._timing.join_timeout
        else:
            _LOG.debug("The portal answered an error: %s", reason)

    def _handle_disconnect(self, payload: bytes) -> None:
        try:
            reason = _DISCONNECT.decode(payload).reason
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._skip("malformed disconnect", str(error))
            return
        if reason == "token_expired":
            self._fail(Fatal(TokenInvalid()))
        else:
            self._skip("disconnect for an unknown reason", reason)

    def _handle_push(self, event: str, payload: bytes) -> None:
        try:
            message = decode(event, payload)
        except UnknownEvent as error:
            self._skip("unknown event", str(error))
        except Malformed as error:
            self._skip("malformed payload", str(error))
        else:
            self._events.append(Received(message))

    def _handle_heartbeat_tick(self, now: float) -> None:
        self._rejoins = 0
        if self._heartbeat_due:
            self._heartbeats_missed_by_writer += 1  # the socket takes nothing: silence counts all the same
        self._heartbeat_due = True
        missing = len(self._unanswered) + 1 + self._heartbeats_missed_by_writer
        if missing > MAX_UNANSWERED_HEARTBEATS:
            self._fail(Hiccup(f"{missing} heartbeats were not answered"))
        self._heartbeat_at += self._timing.heartbeat_interval
        if self._heartbeat_at <= now:  # the process stood still: missed ticks are not made up for
            self._heartbeat_at = now + self._timing.heartbeat_interval

    def _frame(self, topic: str, event: str, payload: object) -> Frame:
        ref = self._next_ref
        self._next_ref += 1
        return Frame(_ENCODER.encode({"topic": topic, "event": event, "payload": payload, "ref": ref}))

    def _fail(self, event: Hiccup | Fatal) -> None:
        self._over = True
        self._events.append(event)

    def _skip(self, reason: str, detail: str) -> None:
        self.skipped[reason] += 1
        _LOG.warning("Skipped a frame from the portal: %s: %s", reason, detail[:200])


class _Envelope(msgspec.Struct):
    topic: str
    event: str
    payload: msgspec.Raw = msgspec.Raw(b"null")
    ref: int | str | None = None


class _Reply(msgspec.Struct):
    status: str
    response: Any = None

    @property
    def reason(self) -> str | None:
        reason = self.response.get("reason") if isinstance(self.response, dict) else None
        return reason if isinstance(reason, str) else None


class _Disconnect(msgspec.Struct):
    reason: str


def _reference(ref: int | str | None) -> int | None:
    if not isinstance(ref, str):
        return ref
    if not (ref.isascii() and ref.isdigit() and len(ref) < 20):
        raise ValueError("ref is not a number")
    return int(ref)


def _is_truncated(text: str, error: Exception) -> bool:
    if isinstance(error, msgspec.ValidationError):
        return False
    if str(error) != _TRUNCATED and text.endswith(_NUMBER_BEGUN):
        text += "0"  # half a number is malformed to msgspec; with its end it may say what else is missing
        try:
            msgspec.json.decode(text)
        except (msgspec.MsgspecError, RecursionError) as completed:
            error = completed
    if str(error) != _TRUNCATED:
        return False
    # msgspec says so of an unpaired surrogate as well, which is no reason to reconnect.
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return True
    except RecursionError:
        return False
    return False


def _encode_id(value: object) -> str:
    """What msgspec does not do itself: a subclass of `str`."""
    if isinstance(value, Id):
        return str(value)
    raise TypeError(f"a portal message cannot hold {type(value).__name__}")


_ENCODER = msgspec.json.Encoder(enc_hook=_encode_id)
_ENVELOPE = msgspec.json.Decoder(_Envelope)
_REPLY = msgspec.json.Decoder(_Reply)
_DISCONNECT = msgspec.json.Decoder(_Disconnect)
