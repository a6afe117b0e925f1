"""What signals do while the program still loads, which takes a slow host some seconds; imported before all else."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_before: dict[int, Callable[..., object] | int | None] = {}


def hold() -> None:
    """End with status 0 as a gateway that serves would; nothing has begun that must be undone. A hangup is ignored."""
    for number in _ENDS:
        _before[number] = signal.signal(number, lambda *_: os._exit(0))
    _before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)


def give_back() -> None:
    """As it was before `hold`: what a command of the operator wants."""
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
