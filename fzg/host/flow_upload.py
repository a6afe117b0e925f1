"""Uploads the spool to the portal's collector (spec tunnel 10.6). Cooperative; files are read in the spool's thread.

A collector that is away, slow or hostile costs this greenlet's time and nothing else: records stay until it takes them.
"""

from __future__ import annotations

import json
import logging
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import gevent
from gevent.event import Event

from fzg.host.flow_spool import SpoolError
from fzg.host.https import ConnectionLost, HttpsError
from fzg.sansio import random_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gevent.threadpool import ThreadPool

    from fzg.host.flow_spool import Batch, Report, Spool, UploadConfig
    from fzg.host.https import Connection, Connector
    from fzg.sansio import Random
    from fzg.secret import Secret

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# Specification (tunnel 10.6).
PATH: Final = "/ingestion/flow_logs"
PORT: Final = 443
BACKLOG_PAUSE: Final = 1.0
IDLE_PAUSE: Final = 30.0
DEFAULT_RETRY_AFTER: Final = 1.0
FIRST_BACKOFF: Final = 0.5
BACKOFF_FACTOR: Final = 1.5
LONGEST_BACKOFF: Final = 60.0
GIVE_UP_AFTER: Final = 300.0
MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 307, 308})
_REQUEST_TIMEOUT: Final = 408
_TOO_LARGE: Final = 413
_TOO_MANY: Final = 429

# Ours. A collector that says "in a year" would stop the log for good.
LONGEST_RETRY_AFTER: Final = 3600.0
# Ours. An interval beyond this is a mistake; new settings end any wait.
LONGEST_INTERVAL: Final = 86_400.0
# Ours. Single records that the collector calls too large are passed over, so that they do not block those behind.
_MAX_PASSED_OVER: Final = 1000
# Ours. Servers close connections that are silent for longer.
LONGEST_IDLE: Final = 5.0


class Target(NamedTuple):
    """Where to send: a host on port 443, and path with query."""

    host: str
    path: str


class _Outcome(Enum):
    DELIVERED = auto()
    TOO_LARGE = auto()
    KEPT = auto()


class _PassOver(Exception):  # noqa: N818 - no error
    """Nothing more can be sent in this pass; the argument is the wait before the next one, None for the interval."""

    def __init__(self, pause: float | None) -> None:
        super().__init__(pause)
        self.pause = pause


class Uploader:
    """Passes over the spool until `stop`. `sleep` returns True when it was cut short by `reconfigure`."""

    def __init__(
        self,
        spool: Spool,
        thread: ThreadPool,
        connect: Connector,
        *,
        random: Random,
        unix: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
    ) -> None:
        self._spool = spool
        self._thread = thread
        self._connect = connect
        self._random = random
        self._unix = unix
        self._clock = clock
        self._changed = Event()
        self._sleep = sleep or self._changed.wait
        self._connection: Connection | None = None
        self._redirects_left = 0
        self._passed_over: set[str] = set()
        self._complained = ""
        self._greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin with a pass at once: an earlier run may have left reports."""
        self._greenlet = gevent.spawn(self._run)

    def reconfigure(self) -> None:
        """The settings have changed: end all waits."""
        self._changed.set()

    def stop(self) -> None:
        """End now; what is not delivered stays."""
        if self._greenlet is not None:
            self._greenlet.kill(block=False)

    def run_pass(self) -> float:
        """One look at all directories; the pause before the next one in seconds."""
        try:
            config = self._apply(self._spool.config)
            self._apply(self._spool.prune, self._unix())
            target = None if config is None else _target(config.api_url)
        except (SpoolError, OSError, ValueError) as error:
            self._complain(f"Flow logs cannot be uploaded: {error}", logging.WARNING)
            return IDLE_PAUSE
        if config is None or target is None:
            return IDLE_PAUSE
        self._redirects_left = MAX_REDIRECTS
        interval = min(config.interval, LONGEST_INTERVAL)
        try:
            backlog = [self._upload(directory, config, target) for directory in self._apply(self._spool.waiting)]
        except _PassOver as over:
            return interval if over.pause is None else over.pause
        except OSError as error:
            self._complain(f"Flow logs cannot be read: {error}", logging.WARNING)
            return interval
        finally:
            self._disconnect()
        return BACKLOG_PAUSE if any(backlog) else interval

    def _run(self) -> None:
        while True:
            self._changed.clear()
            self._sleep(self.run_pass())

    def _upload(self, directory: Path, config: UploadConfig, target: Target) -> bool:
        """One batch of a directory; whether there is more that the collector would take."""
        batch: Batch | None = self._apply(self._spool.batch, directory, config.batch_size, self._passed_over)
        if batch is None:
            return False
        parts, taken = [batch.reports], 0
        while parts:
            part = parts.pop()
            outcome = self._send(part, batch.token, target)
            if outcome is _Outcome.DELIVERED:
                taken += len(part)
                self._apply(self._spool.delete, directory, [report.name for report in part])
            elif outcome is _Outcome.TOO_LARGE and len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif outcome is _Outcome.TOO_LARGE and len(self._passed_over) < _MAX_PASSED_OVER:
                _LOG.info("The flow-log collector calls a single record too large; it is kept")
                self._passed_over.add(part[0].name)
        return batch.more and taken > 0

    def _send(self, part: Sequence[Report], token: Secret[str], target: Target) -> _Outcome:
        """Post until there is an answer to go by. Raises _PassOver."""
        body = b'{"flow_logs":[' + b",".join(report.payload for report in part) + b"]}"
        give_up_at = self._clock() + GIVE_UP_AFTER
        backoff = FIRST_BACKOFF
        while True:
            response = None
            try:
                response = self._connected(target.host).post(target.path, body, token)
            except ConnectionLost as error:
                _LOG.debug("The flow-log collector closed the connection: %s", error)
                raise _PassOver(BACKLOG_PAUSE) from error
            except HttpsError as error:
                _LOG.debug("The flow-log collector does not answer: %s", error)
                self._disconnect()
            status = 0 if response is None else response.status
            if 200 <= status < 300:
                self._complained = ""
                return _Outcome.DELIVERED
            if response is not None and status == _TOO_MANY:
                self._pause(_retry_after(response.header("retry-after")))
                give_up_at = self._clock() + GIVE_UP_AFTER
            elif status in (0, _REQUEST_TIMEOUT) or 500 <= status < 600:
                pause = backoff * (0.75 + random_unit(self._random) / 2)
                backoff = min(backoff * BACKOFF_FACTOR, LONGEST_BACKOFF)
                if self._clock() + pause > give_up_at:
                    self._complain(f"Flow logs wait: the collector {target.host} fails (status {status or 'none'})")
                    return _Outcome.KEPT
                self._pause(min(pause, LONGEST_BACKOFF))
            elif response is not None and status in _REDIRECTS:
                elsewhere = self._follow(target, response.header("location"))
                if elsewhere is None:
                    self._complain(f"Flow logs wait: the collector {target.host} redirects to where they may not go")
                    return _Outcome.KEPT
                target = elsewhere
            elif status == _TOO_LARGE:
                return _Outcome.TOO_LARGE
            else:
                self._complain(f"Flow logs wait: the collector {target.host} refuses them (status {status})")
                return _Outcome.KEPT

    def _follow(self, target: Target, location: str) -> Target | None:
        """Where a redirect leads, if it may be followed."""
        if not self._redirects_left or not location:
            return None
        self._redirects_left -= 1
        try:
            return _target(urljoin(f"https://{target.host}{target.path}", location), path=None)
        except ValueError:
            return None

    def _connected(self, host: str) -> Connection:
        """The connection to this host; reused while it lives. Raises _PassOver if none comes about."""
        if self._connection is not None and (self._connection.host != host or not self._connection.is_open):
            self._disconnect()
        if self._connection is None:
            try:
                self._connection = self._connect(host)
            except HttpsError as error:
                self._complain(f"Flow logs wait: the collector {host} cannot be reached ({error})")
                raise _PassOver(None) from error
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _pause(self, seconds: float) -> None:
        """Wait with the connection closed if it is long; new settings end the pass."""
        if seconds > LONGEST_IDLE:
            self._disconnect()
        if self._sleep(seconds):
            raise _PassOver(0.0)

    def _apply(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        result: _Result = self._thread.apply(work, arguments)
        return result

    def _complain(self, sentence: str, level: int = logging.INFO) -> None:
        """Once, until something else happens: a collector may be away for days."""
        if sentence != self._complained:
            _LOG.log(level, sentence)
            self._complained = sentence


def _target(url: str, path: str | None = PATH) -> Target:
    """Host and path of an https URL on port 443. Raises ValueError for others."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    usable = host.isascii() and all(character.isalnum() or character in "-._:" for character in host)
    if parts.scheme != "https" or parts.port not in (None, PORT) or "@" in parts.netloc or not host or not usable:
        raise ValueError(f"{json.dumps(url[:200])} is not an https URL on port {PORT}")
    if path is None:
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/%:@!$&'()*+,;=~?")
    return Target(host, path)


def _retry_after(text: str) -> float:
    """Seconds; dates and nonsense count as the default."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return min(float(text), LONGEST_RETRY_AFTER)
    return DEFAULT_RETRY_AFTER
