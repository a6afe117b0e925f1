"""What `ps` shows of this process (OPS-5)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# Fields of /proc/PID/stat, proc(5), counted behind the command name.
_ARG_START = 48 - 3


def hide_argument(secret: str) -> None:
    """Overwrite this argument with asterisks; where the kernel does not let us, it stays.

    A frozen program has a launcher with the same arguments. Only root may write into that.
    """
    needle = os.fsencode(secret)
    if not needle:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        for at in _places(os.getpid(), needle):
            ctypes.memmove(at, b"*" * len(needle), len(needle))
    if getattr(sys, "frozen", False):
        launcher = os.getppid()
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            Path(f"/proc/{launcher}/mem").open("r+b", 0) as memory,
        ):
            for at in _places(launcher, needle):
                memory.seek(at)
                memory.write(b"*" * len(needle))


def _places(pid: int, needle: bytes) -> list[int]:
    """Addresses at which a whole argument is the secret."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    start = int(fields[_ARG_START])
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    places = []
    offset = 0
    for argument in arguments:
        if start and argument == needle:
            places.append(start + offset)
        offset += len(argument) + 1
    return places
