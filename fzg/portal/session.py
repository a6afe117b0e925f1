"""One WebSocket from the upgrade to its end: reader, writer and timer greenlets around a `Channel`
(spec portal 1.7 to 1.11, 1.15).

websocket-client supplies the framing; the socket is non-blocking, so a frame may arrive and leave in pieces.
"""

from __future__ import annotations

import logging
import ssl
import struct
from typing import TYPE_CHECKING, Final, TypeAlias

import gevent
from gevent.event import AsyncResult, Event
from websocket import ABNF, WebSocketException, WebSocketProtocolException, continuous_frame, frame_buffer

from fzg.portal.channel import Fatal, Hiccup, Joined, Received
from fzg.portal.problem import FatalPortalError, printable
from fzg.portal.trace import trace_received, trace_sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from gevent import queue

    from fzg.portal.channel import Channel
    from fzg.portal.dial import Stream
    from fzg.portal.messages import Inbound, Outbound

_LOG = logging.getLogger(__name__)

# Specification constants (portal 1.3)
MAX_FRAME: Final = 16 * 1024 * 1024
MAX_MESSAGE: Final = 64 * 1024 * 1024

MAX_CONTROL: Final = 125
"""Bytes in a control frame (RFC 6455 5.5); the answer to a longer one would break the protocol in turn."""

READ_TURN: Final = 256 * 1024
"""Bytes read before other sockets get their turn: about a millisecond."""

MAX_SLEEP_S: Final = 1.0
"""No timer sleeps longer, so a host that was suspended catches up at once."""

CLOSE_FLUSH_S: Final = 1.0
"""For a close frame that waits behind a frame the portal does not read."""

NO_PROGRESS_PAUSE_S: Final = 0.005
"""TLS may refuse to write to a writable socket until it has read; do not spin meanwhile."""

CLOSE_NORMAL: Final = 1000
_CLOSE_PROTOCOL_ERROR: Final = 1002
_CLOSE_INVALID_TEXT: Final = 1007
_CLOSE_TOO_BIG: Final = 1009

Cause: TypeAlias = "str | FatalPortalError"


class Companion:
    """A greenlet whose failure is raised in the greenlet that made it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._owner = gevent.getcurrent()
        self._greenlet = gevent.spawn(self._guard, run)

    def stop(self) -> None:
        """Ends it, and returns when it has ended."""
        self._greenlet.kill()

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - carried over, not handled
            gevent.kill(self._owner, error)


class Session:
    """Carries one channel's frames; `run` returns why it ended."""

    def __init__(
        self,
        stream: Stream,
        channel: Channel,
        *,
        clock: Callable[[], float],
        on_joined: Callable[[], None],
        inbound: queue.Queue[Inbound],
    ) -> None:
        self._socket = stream.socket
        self._decrypted: Callable[[], int] = getattr(stream.socket, "pending", lambda: 0)
        self._channel = channel
        self._clock = clock
        self._on_joined = on_joined
        self._inbound = inbound
        self._outcome: AsyncResult[Cause] = AsyncResult()
        self._closing = False

        self._socket.settimeout(0.0)
        self._frames = frame_buffer(self._receive, skip_utf8_validation=True)
        self._frames.recv_buffer.append(stream.early_data)
        self._message = continuous_frame(fire_cont_frame=False, skip_utf8_validation=True)
        self._turn = READ_TURN

        self._outgoing = memoryview(b"")
        self._writing: Outbound | None = None
        self._pong: bytes | None = None
        self._close_frame: bytes | None = None
        self._blocked = Event()

    @property
    def joined(self) -> bool:
        """True while messages may be written."""
        return self._channel.joined and not self._closing

    def run(self) -> Cause:
        """Holds the connection until it ends, and closes the socket."""
        companions = [Companion(self._read), Companion(self._write_blocked), Companion(self._keep_time)]
        try:
            self.flush()
            cause: Cause = self._outcome.get()
            return cause
        finally:
            for companion in companions:
                companion.stop()
            self._socket.close()

    def send(self, message: Outbound) -> bool:
        """Queues a message and writes it at once if its turn has come and the socket takes it; False if refused."""
        if self._closing or self._outcome.ready():
            return False
        if not self._channel.send(message):
            if isinstance(failed := self._channel.poll_event(), Hiccup):
                self.end(failed.cause)
            return False
        self.flush()
        return True

    def unsent(self) -> list[Outbound]:
        """Accepted messages of which not every byte was given to the socket, oldest first."""
        return ([] if self._writing is None else [self._writing]) + self._channel.unsent()

    def request_close(self) -> None:
        """Sends a close frame with code 1000 behind what is being written; `run` returns when it is answered."""
        self._queue_close(struct.pack("!H", CLOSE_NORMAL))
        self.flush()

    def end(self, cause: Cause) -> None:
        """Makes `run` return; the first cause stands."""
        if not self._outcome.ready():
            self._outcome.set(cause)

    def flush(self) -> None:
        """Writes what the socket takes now; the writer greenlet does the rest. Never switches."""
        while not self._outcome.ready():
            if not self._outgoing and not self._take_next():
                return
            try:
                written = self._socket.send(self._outgoing)
            except BlockingIOError:
                written = 0
            except OSError as error:
                self.end(f"writing to the portal failed: {error}")
                return
            if written == 0:
                self._blocked.set()
                return
            self._outgoing = self._outgoing[written:]
            if not self._outgoing:
                self._writing = None

    def _take_next(self) -> bool:
        if self._pong is not None:
            self._outgoing, self._pong = _masked(self._pong, ABNF.OPCODE_PONG), None
        elif self._close_frame is not None:
            self._outgoing, self._close_frame = _masked(self._close_frame, ABNF.OPCODE_CLOSE), None
        elif not self._closing and (frame := self._channel.poll_transmit()) is not None:
            trace_sent(frame.text)
            self._outgoing, self._writing = _masked(frame.text, ABNF.OPCODE_TEXT), frame.message
        else:
            return False
        return True

    def _read(self) -> None:
        hub = gevent.get_hub()
        readable = hub.loop.io(self._socket.fileno(), 1)
        try:
            while not self._outcome.ready():
                self._turn = READ_TURN
                while not self._outcome.ready() and (frame := self._next_frame()) is not None:
                    self._handle(frame)
                self.flush()
                hub.wait(readable)
        except _TooBigError:
            self._give_up(_CLOSE_TOO_BIG, "the portal sent a message that is too large")
        except UnicodeDecodeError:
            self._give_up(_CLOSE_INVALID_TEXT, "the portal sent text that is not UTF-8")
        except WebSocketException as error:
            self._give_up(_CLOSE_PROTOCOL_ERROR, f"the portal broke the WebSocket protocol: {error}")
        except _EndOfStreamError:
            self.end("the portal closed the connection without a close frame")
        except OSError as error:
            self.end(f"reading from the portal failed: {error}")
        finally:
            readable.close()

    def _next_frame(self) -> ABNF | None:
        """The next frame; None when the socket is empty or the turn is over."""
        try:
            if self._frames.needs_header():
                self._frames.recv_header()
            if self._frames.needs_length():
                self._frames.recv_length()
            assembled = len(self._message.cont_data[1]) if self._message.cont_data else 0
            length = self._frames.length or 0
            if length > MAX_FRAME or assembled + length > MAX_MESSAGE:
                raise _TooBigError
            return self._frames.recv_frame()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _receive(self, limit: int) -> bytes:
        # What TLS holds decrypted does not make the socket readable again, so it is taken in this turn.
        if self._turn <= 0 and not self._decrypted():
            raise BlockingIOError
        data: bytes = self._socket.recv(limit)
        if not data:
            raise _EndOfStreamError
        self._turn -= len(data)
        return data

    def _handle(self, frame: ABNF) -> None:
        data = frame.data if isinstance(frame.data, bytes) else frame.data.encode()
        if frame.opcode >= ABNF.OPCODE_CLOSE and len(data) > MAX_CONTROL:
            raise WebSocketProtocolException("a control frame is too long")
        if frame.mask_value:
            raise WebSocketProtocolException("a frame of the server is masked")
        match frame.opcode:
            case ABNF.OPCODE_PING:
                self._pong = data  # an unwritten answer to an earlier ping is superseded (RFC 6455 5.5.3)
                self.flush()
            case ABNF.OPCODE_PONG:
                pass
            case ABNF.OPCODE_CLOSE:
                self._handle_close(data)
            case _:
                self._message.validate(frame)
                self._message.add(frame)
                if frame.fin:
                    opcode, whole = self._message.extract(frame)
                    self._handle_message(opcode, whole.data)

    def _handle_message(self, opcode: int, data: bytes) -> None:
        if opcode != ABNF.OPCODE_TEXT:
            _LOG.warning("Skipped a binary frame from the portal")
            return
        text = data.decode()
        trace_received(text)
        self._channel.handle_frame(text, self._clock())
        self._settle()

    def _handle_close(self, payload: bytes) -> None:
        if self._closing:
            self.end("closed")
            return
        code = struct.unpack("!H", payload[:2])[0] if payload else None
        reason = printable(payload[2:].decode("utf-8", "replace"))
        self._finish_with(payload)
        self.end(f"the portal closed the WebSocket: code={code} reason={reason!r}")

    def _give_up(self, code: int, cause: str) -> None:
        self._finish_with(struct.pack("!H", code))
        self.end(cause)

    def _finish_with(self, close_payload: bytes) -> None:
        """Sends a close frame; waits a little if the socket takes nothing."""
        self._queue_close(close_payload)
        self.flush()
        with gevent.Timeout(CLOSE_FLUSH_S, False):  # noqa: FBT003 - gevent's way to say "do not raise"
            while (self._outgoing or self._close_frame is not None) and not self._outcome.ready():
                gevent.sleep(0.01)

    def _queue_close(self, payload: bytes) -> None:
        if not self._closing:
            self._closing = True
            self._close_frame = payload

    def _settle(self) -> None:
        """Writes and reports what the channel made of the last input; waits while 128 messages are unhandled."""
        events = list(iter(self._channel.poll_event, None))
        self.flush()
        for event in events:
            match event:
                case Joined():
                    self._on_joined()
                case Received(message):
                    self._inbound.put(message)
                case Hiccup(cause):
                    self.end(cause)
                case Fatal(error):
                    self.end(error)

    def _keep_time(self) -> None:
        while not self._outcome.ready():
            deadline = self._channel.poll_timeout()
            left = MAX_SLEEP_S if deadline is None else max(deadline.at - self._clock(), 0.0)
            gevent.sleep(min(left, MAX_SLEEP_S))
            self._channel.handle_timeout(self._clock())
            self._settle()

    def _write_blocked(self) -> None:
        hub = gevent.get_hub()
        writable = hub.loop.io(self._socket.fileno(), 2)
        try:
            while True:
                self._blocked.wait()
                self._blocked.clear()
                hub.wait(writable)
                before = len(self._outgoing)
                self.flush()
                if self._outgoing and len(self._outgoing) == before:
                    gevent.sleep(NO_PROGRESS_PAUSE_S)
        finally:
            writable.close()


class _EndOfStreamError(Exception):
    """The portal closed its side of the TCP connection."""


class _TooBigError(Exception):
    """A frame or message is above the limits."""


def _masked(payload: bytes, opcode: int) -> memoryview:
    return memoryview(ABNF.create_frame(payload, opcode).format())
