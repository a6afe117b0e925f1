"""Hands flow records to the spool's thread without ever waiting for it (spec tunnel 10.5)."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final

import gevent
from gevent.event import Event

from fzg.host.flow_spool import SpoolError, UploadConfig
from fzg.tunnel.flow_record import FlowRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gevent.threadpool import ThreadPool

    from fzg.host.flow_spool import Spool
    from fzg.tunnel.ingest_token import Attribution

_LOG = logging.getLogger(__name__)

# Specification (tunnel 10.5).
MAX_QUEUED: Final = 10_000
WARN_EVERY: Final = 1000
DRAIN_SECONDS: Final = 5.0

# Ours. Records that one hand-over takes: some 100 ms of an ordinary disk.
_HANDOVER: Final = 64


class FlowWriter:
    """Takes records, tokens and settings at any rate; what the disk cannot take in time is dropped and said so."""

    def __init__(self, spool: Spool, thread: ThreadPool, on_configured: Callable[[], None] = lambda: None) -> None:
        """`on_configured` is called when changed settings have been kept."""
        self.dropped = 0
        self._on_configured = on_configured
        self._former: UploadConfig | None = None
        self._spool = spool
        self._thread = thread
        self._queue: deque[FlowRecord | Attribution] = deque()
        self._config: tuple[UploadConfig | None] | None = None
        self._wake = Event()
        self._idle = Event()
        self._idle.set()
        self._greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to write."""
        self._greenlet = gevent.spawn(self._run)

    @property
    def queued(self) -> int:
        """Records and tokens that wait for the disk."""
        return len(self._queue)

    def configure(self, config: UploadConfig | None) -> None:
        """Keep how the uploads go; the latest word counts."""
        self._config = (config,)
        self._notify()

    def put(self, job: FlowRecord | Attribution) -> None:
        """Write a record, or the token of an attribution; never waits."""
        if len(self._queue) >= MAX_QUEUED:
            self._drop("the disk does not keep up")
            return
        self._queue.append(job)
        self._notify()

    def close(self, wait: float = DRAIN_SECONDS) -> None:
        """Write what is queued, for at most `wait` seconds, and stop."""
        if self._greenlet is None:
            return
        if not self._idle.wait(wait):
            _LOG.warning("Flow records were not written in time and are lost: %d", len(self._queue))
        self._greenlet.kill(block=False)

    def _notify(self) -> None:
        self._idle.clear()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._queue or self._config is not None:
                config, self._config = self._config, None
                jobs = [self._queue.popleft() for _ in range(min(_HANDOVER, len(self._queue)))]
                problem, refusals = self._thread.apply(self._write, (config, jobs))
                if problem:
                    # Where nothing could ever be kept there is nothing to take back either.
                    level = logging.WARNING if config is not None and config[0] is not None else logging.DEBUG
                    _LOG.log(level, "The settings of flow-log uploads cannot be kept: %s", problem)
                for reason in refusals:
                    self._drop(reason)
                if config is not None and config[0] != self._former:
                    self._former = config[0]
                    self._on_configured()
            self._idle.set()

    def _write(
        self, config: tuple[UploadConfig | None] | None, jobs: Sequence[FlowRecord | Attribution]
    ) -> tuple[str, list[str]]:
        """In the spool's thread: what went wrong with the settings, and why each job that was not done was not."""
        problem = ""
        refusals: list[str] = []
        try:
            if config is not None:
                self._spool.configure(*config)
        except (OSError, SpoolError) as error:
            problem = str(error)
        for job in jobs:
            try:
                if isinstance(job, FlowRecord):
                    self._spool.store(job)
                else:
                    self._spool.store_token(job)
            except (OSError, SpoolError) as error:
                refusals.append(str(error))
        return problem, refusals

    def _drop(self, reason: str) -> None:
        if not self.dropped % WARN_EVERY:
            _LOG.warning("A flow record is not kept for the portal: %s dropped=%d", reason, self.dropped + 1)
        self.dropped += 1
