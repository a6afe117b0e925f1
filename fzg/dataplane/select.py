"""Which engine runs: the native one where it was built, else the one in Python."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fzg.dataplane.pure import PureEngine

if TYPE_CHECKING:
    from fzg.dataplane.engine import Engine

_LOG = logging.getLogger(__name__)

_ENVIRONMENT = "FIREZONE_ENGINE"  # `pure` or `native`, for tests and comparisons


class EngineUnavailableError(Exception):
    """The engine that was asked for cannot be had; the message says why."""


def make_engine() -> Engine:
    """A fresh engine. Raises `EngineUnavailableError` if what is asked for is not there."""
    wanted = os.environ.get(_ENVIRONMENT)
    if wanted not in (None, "", "native", "pure"):
        raise EngineUnavailableError(f"{_ENVIRONMENT} is {wanted!r}: it can be native or pure")
    if wanted == "pure":
        return PureEngine()
    if (reason := why_not_native()) is None:
        from fzg.dataplane._native import NativeEngine

        return NativeEngine()
    if wanted == "native" or os.environ.get("FZG_REQUIRE_NATIVE") == "1":
        raise EngineUnavailableError(f"the native packet engine is not there: it {reason}")
    _LOG.info("Packets are handled in Python, several times slower: the native engine %s", reason)
    return PureEngine()


def why_not_native() -> str | None:
    """What the native engine lacks, as the end of a sentence; None: nothing."""
    try:
        import fzg.dataplane._native  # noqa: F401
    except ModuleNotFoundError:
        return "was not built"
    except ImportError as error:
        return f"cannot run: {error}"
    return None


def engine_name(engine: Engine) -> str:
    """`native` or `pure`, as `FIREZONE_ENGINE` has it."""
    return "pure" if isinstance(engine, PureEngine) else "native"
