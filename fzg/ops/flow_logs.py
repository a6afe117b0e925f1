"""Flow records in the log, for people and for programs that collect it (spec operations 1.8)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fzg.ops.logs import TRACE

if TYPE_CHECKING:
    from fzg.tunnel.flow_record import FlowRecord

_LOG = logging.getLogger("flow_logs")


def write(record: FlowRecord) -> None:
    """Print the record if the filter lets `flow_logs` through at TRACE."""
    if _LOG.isEnabledFor(TRACE):
        _LOG.log(TRACE, record.message, extra=record.fields())
