"""What becomes of flow records: printed where the filter wants them, and kept for the portal where it does."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import gevent
from gevent.threadpool import ThreadPool

from fzg.host.flow_spool import DEFAULT_BATCH, LARGEST_BATCH, ROOT, Spool, UploadConfig
from fzg.host.flow_upload import Uploader
from fzg.host.flow_writer import FlowWriter
from fzg.host.https import HttpsConnector
from fzg.ops.logs import TRACE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fzg.portal.dial import DialOptions
    from fzg.portal.messages import FlowLogs as Settings
    from fzg.tunnel.flow_record import FlowRecord
    from fzg.tunnel.ingest_token import Attribution

_PRINTED = logging.getLogger("flow_logs")
_LOG = logging.getLogger(__name__)


class Backlog(NamedTuple):
    """Records on disk (None: not counted yet), records that wait for it, and records that were lost."""

    spooled: int | None
    queued: int
    dropped: int


class FlowLogs:
    """The way of records out of the process. Nothing here waits for a disk or a collector but `close`."""

    def __init__(self, dialing: Callable[[str], DialOptions], *, user_agent: str = "", root: Path = ROOT) -> None:
        thread = ThreadPool(1)
        spool = self._spool = Spool(root)
        self._thread = thread
        connect = HttpsConnector(dialing, user_agent=user_agent)
        self._uploader = Uploader(spool, thread, connect, random=os.urandom)
        self._writer = FlowWriter(spool, thread, on_configured=self._uploader.reconfigure)
        self._is_uploading = False
        self._is_counting = False

    def start(self) -> None:
        """Begin to write and to upload: what an earlier run left goes out under that run's settings."""
        self._writer.start()
        self._uploader.start()
        _LOG.info("Flow-log uploader started")

    def backlog(self) -> Backlog:
        """How much waits, without touching the disk; what an earlier run left is counted soon after the first call."""
        if self._spool.count is None and not self._is_counting:
            self._is_counting = True
            gevent.spawn(self._take_stock)
        return Backlog(self._spool.count, self._writer.queued, self._writer.dropped)

    def _take_stock(self) -> None:
        try:
            self._thread.apply(self._spool.take_stock)
        except OSError as error:
            _LOG.debug("The flow records on disk cannot be counted: %s", error)
        finally:
            self._is_counting = False

    def configure(self, settings: Settings | None) -> None:
        """Take over the settings of an `init`; None: nothing is uploaded (spec tunnel 10.5)."""
        config = None
        if settings is not None:
            batch_size = min(settings.upload_batch_size or DEFAULT_BATCH, LARGEST_BATCH)
            config = UploadConfig(
                api_url=settings.api_url, interval=settings.upload_interval_secs, batch_size=batch_size
            )
        self._is_uploading = config is not None
        self._writer.configure(config)

    def keep(self, attribution: Attribution) -> None:
        """The token of a new authorization, needed to upload its records."""
        if attribution.claims.uploads_enabled:
            self._writer.put(attribution)

    def write(self, record: FlowRecord) -> None:
        """Print the record, and keep it for the portal."""
        print_record(record)
        if self._is_uploading and record.attribution.claims.uploads_enabled:
            self._writer.put(record)

    def close(self) -> None:
        """Write what is queued, at most 5 s, and end."""
        self._uploader.stop()
        self._writer.close()


def print_record(record: FlowRecord) -> None:
    """Log the record if `flow_logs` is let through at TRACE (spec operations 1.8)."""
    if _PRINTED.isEnabledFor(TRACE):
        _PRINTED.log(TRACE, record.message, extra=record.fields())
