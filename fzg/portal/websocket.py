"""The driver of the portal connection: dials, holds one session, backs off and dials again (spec portal 1.4 to 1.15).

Reading, writing and the timer are greenlets of their own, so a blocked writer stops neither heartbeats nor the
liveness check, and a busy core stops only the reading. A frame is written in the pass that queued it when the socket
takes it.
"""

from __future__ import annotations

import enum
import functools
import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

import gevent
from gevent import queue
from gevent.event import Event

from fzg.portal.channel import Channel, Timing
from fzg.portal.dial import DialError, DialOptions, Rejected, Stream, dial
from fzg.portal.messages import (
    BroadcastIceCandidates,
    BroadcastInvalidatedIceCandidates,
    CandidateBroadcast,
    Inbound,
    Outbound,
    SetSnownetCapabilities,
)
from fzg.portal.problem import FatalPortalError, RetriesExhausted
from fzg.portal.session import MAX_SLEEP_S, Companion, Session
from fzg.portal.url import ApiPath, PortalUrl
from fzg.secret import without

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fzg.portal.backoff import Reconnect, Retry
    from fzg.secret import Secret

_LOG = logging.getLogger(__name__)

INBOUND_QUEUE: Final = 128
"""Messages between socket and core; beyond them the socket is not read (spec portal 1.10)."""

CLOSE_WAIT_S: Final = 0.5
"""For the portal's close frame; SIGTERM leaves 2 s for everything (PORTAL-39)."""


class PortalHandler(Protocol):
    """What the connection tells the application. Calls come from the connection's own greenlets."""

    def on_connected(self) -> None:
        """A join was answered. Comes again without `on_disconnected` between when the portal lost our channel."""

    def on_message(self, message: Inbound) -> None:
        """A push, in order of arrival, one at a time; those before a failure may still come after it."""

    def on_disconnected(self) -> None:
        """A dial or a connection failed. Comes at each failure, before the wait for the next dial."""

    def on_unsent(self, messages: Sequence[CandidateBroadcast]) -> None:
        """Candidates that `send` accepted and that were not written; right after `on_disconnected`, oldest first."""

    def on_fatal(self, error: FatalPortalError) -> None:
        """The end: no dial follows."""


class State(enum.StrEnum):
    """Where the connection stands, for health and status."""

    CONNECTING = "connecting"
    JOINING = "joining"
    CONNECTED = "connected"
    CLOSED = "closed"


class Login:
    """How this process presents itself in each upgrade request; the same in all dials."""

    __slots__ = ("external_id", "name", "public_key", "token", "url", "user_agent")

    def __init__(
        self, *, url: PortalUrl, token: Secret[str], external_id: str, name: str, public_key: bytes, user_agent: str
    ) -> None:
        self.url = url
        self.token = token
        self.external_id = external_id
        self.name = name
        self.public_key = public_key
        self.user_agent = user_agent

    def target(self, path: ApiPath) -> str:
        """Path and query of the request."""
        return self.url.target(path, external_id=self.external_id, name=self.name, public_key=self.public_key)

    def headers(self) -> dict[str, str]:
        """Who asks: version and token, the latter without white space, which could break the header."""
        token = "".join(self.token.reveal().split())
        return {"User-Agent": self.user_agent} | ({"X-Authorization": f"Bearer {token}"} if token else {})


class PortalConnection:
    """Holds a connection to the portal until `close` or a fatal error; `run` is its greenlet."""

    def __init__(
        self,
        login: Login,
        handler: PortalHandler,
        *,
        dialing: DialOptions,
        reconnect: Reconnect,
        clock: Callable[[], float] | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._clock = clock or functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        self.last_error: str | None = None
        self.hiccups = 0  # dials that failed and connections that ended
        self.joined_at: float | None = None  # times are of `clock`; the last join
        self.away_since: float | None = self._clock()  # None from a join to the end of its connection
        self.dials_at: float | None = None  # when the next dial is due, while none is under way
        self._login = login
        self._handler = handler
        self._dialing = dialing
        self._reconnect = reconnect
        self._timing = timing or Timing()
        self._path: ApiPath | None = None
        self._session: Session | None = None
        self._unsent: list[Outbound] = []
        self._dialer: gevent.Greenlet | None = None
        self._inbound: queue.Queue[Inbound] = queue.Queue(maxsize=INBOUND_QUEUE)
        self._closing = Event()
        self._finished = Event()

    @property
    def host(self) -> str:
        """The portal's host, as in the URL."""
        return self._login.url.host

    @property
    def state(self) -> State:
        """Where the connection stands."""
        if self._finished.is_set() or self._closing.is_set():
            return State.CLOSED
        if self._session is None:
            return State.CONNECTING
        return State.CONNECTED if self._session.joined else State.JOINING

    def run(self) -> None:
        """Dials and dials again until `close` or `on_fatal`. What it raises is a bug, of ours or the handler's."""
        deliverer = Companion(self._deliver)
        try:
            delay: float | None = 0.0
            while delay is not None and not self._pause(delay):
                delay = self._connect_once()
        finally:
            deliverer.stop()
            self._finished.set()

    def send(self, message: Outbound) -> bool:
        """Queues a message and writes it at once if the socket takes it; False when there is no connection."""
        if self._session is not None and self._session.send(message):
            return True
        _LOG.debug("Dropped a message to the portal: %s", message.EVENT)
        return False

    def close(self, wait: float = CLOSE_WAIT_S) -> None:
        """Says goodbye with code 1000 and waits up to `wait` seconds for the portal's; cancels a dial. Idempotent."""
        self._closing.set()
        if self._dialer is not None:
            self._dialer.kill(block=False)
        if self._session is not None:
            _LOG.info("Closing the portal connection")
            self._session.request_close()
            if wait > 0:
                self._finished.wait(wait)
            if self._session is not None:
                self._session.end("closed")
            _LOG.info("Closed the portal connection")

    def _connect_once(self) -> float | None:
        """One dial and what becomes of it; returns the wait before the next one, None at the end."""
        outcome = self._dial()
        retry_after = None
        cause: Exception
        if isinstance(outcome, Stream):
            ending = self._hold(outcome)
            cause = ending if isinstance(ending, FatalPortalError) else DialError(ending)
        elif isinstance(outcome, Rejected):
            cause = outcome.rejection.fatal_error or outcome
            retry_after = outcome.rejection.retry_after
        else:
            cause = outcome
        if self._closing.is_set():
            return None
        self.last_error = without(self._login.token.reveal(), str(cause))
        if isinstance(cause, FatalPortalError):
            self._handler.on_fatal(cause)
            return None
        return self._handle_hiccup(cause, self._reconnect.handle_failure(retry_after))

    def _handle_hiccup(self, cause: Exception, retry: Retry | None) -> float | None:
        body = cause.rejection.body if isinstance(cause, Rejected) else ""
        if retry is not None:
            fields = {"delay": f"{retry.delay:.3f}s", "budget": f"{retry.budget:.1f}s"}
            if body:
                fields["body"] = body
            _LOG.info("Portal connection failed, dialling again: %s", cause, extra=fields)
        self.hiccups += 1
        self._handler.on_disconnected()
        self._give_back_unsent()
        if retry is not None:
            return retry.delay
        exhausted = RetriesExhausted()
        exhausted.__cause__ = cause
        self._handler.on_fatal(exhausted)
        return None

    def _give_back_unsent(self) -> None:
        candidates = [
            message
            for message in self._unsent
            if isinstance(message, BroadcastIceCandidates | BroadcastInvalidatedIceCandidates)
        ]
        self._unsent = []
        if candidates:
            self._handler.on_unsent(candidates)

    def _dial(self) -> Stream | DialError:
        """Tries the v2 path and, where that does not exist, the v1 path; what worked once is kept (3.4)."""
        paths = (ApiPath.V2, ApiPath.V1) if self._path is None else (self._path,)
        outcome: Stream | DialError = DialError("closed")
        for path in paths:
            outcome = self._dial_path(path)
            if isinstance(outcome, Stream):
                self._path = path
            if not (isinstance(outcome, Rejected) and outcome.rejection.status == 404):
                break
        return outcome

    def _dial_path(self, path: ApiPath) -> Stream | DialError:
        """One dial, in a greenlet of its own that `close` may kill."""
        if self._closing.is_set():
            return DialError("closed")

        def attempt() -> Stream | Exception:
            try:
                return dial(self._login.url, self._login.target(path), self._login.headers(), self._dialing)
            except Exception as error:  # noqa: BLE001 - carried to the greenlet that waits
                return error

        self._dialer = dialer = gevent.spawn(attempt)
        try:
            outcome = dialer.get()
        finally:
            dialer.kill()
            self._dialer = None
        if isinstance(outcome, gevent.GreenletExit):
            return DialError("closed")
        if isinstance(outcome, Stream | DialError):
            return outcome
        raise outcome

    def _hold(self, stream: Stream) -> str | FatalPortalError:
        """Runs one WebSocket to its end; returns why it ended."""
        # Portals before March 2025 crash on an event they do not know; the v2 path is younger than this one (2.3).
        capabilities = SetSnownetCapabilities(iceless=False) if self._path is ApiPath.V2 else None
        session = Session(
            stream,
            Channel(now=self._clock(), capabilities=capabilities, timing=self._timing),
            clock=self._clock,
            on_joined=self._handle_joined,
            inbound=self._inbound,
        )
        self._session = session
        try:
            if self._closing.is_set():
                session.request_close()
            return session.run()
        finally:
            self._session = None
            self._unsent = session.unsent()
            if self.away_since is None:
                self.away_since = self._clock()

    def _handle_joined(self) -> None:
        _LOG.info("Connected to the portal", extra={"host": self._login.url.host})
        self._reconnect.handle_joined()
        self.joined_at, self.away_since = self._clock(), None
        self.last_error = None
        self._handler.on_connected()

    def _deliver(self) -> None:
        hub = gevent.get_hub()
        while True:
            self._handler.on_message(self._inbound.get())
            if not self._inbound.empty():
                # A timer that is due fires after the loop has looked at every socket; sleep(0) would not let it.
                hub.wait(hub.loop.timer(0.0))

    def _pause(self, delay: float) -> bool:
        """Waits; True when the connection is to be closed."""
        end = self._clock() + delay
        self.dials_at = end
        while (left := end - self._clock()) > 0 and not self._closing.wait(min(left, MAX_SLEEP_S)):
            pass
        self.dials_at = None
        return bool(self._closing.is_set())
