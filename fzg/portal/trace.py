"""Portal frames in the log, for who asks with `RUST_LOG=wire=trace`, without what must stay secret (OPS-35)."""

from __future__ import annotations

import json
import logging
from typing import Any, Final

from fzg.secret import MASK

TRACE: Final = 5
"""Below DEBUG."""

_SENT: Final = logging.getLogger("wire.api.send")
_RECEIVED: Final = logging.getLogger("wire.api.recv")

_SECRET_ENDINGS: Final = ("password", "token", "secret", "preshared_key", "private_key", "credential")


def trace_sent(text: bytes) -> None:
    """One text frame to the portal."""
    if _SENT.isEnabledFor(TRACE):
        _SENT.log(TRACE, masked(text))


def trace_received(text: str) -> None:
    """One text frame from the portal."""
    if _RECEIVED.isEnabledFor(TRACE):
        _RECEIVED.log(TRACE, masked(text))


def masked(text: str | bytes) -> str:
    """The JSON on one line with asterisks for secrets. What is no JSON is not shown: nobody knows what is in it."""
    try:
        return json.dumps(_masked(json.loads(text)), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return f"{len(text)} characters that are not JSON"


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if key.lower().endswith(_SECRET_ENDINGS) and item is not None else _masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return value
