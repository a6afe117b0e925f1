"""Which gateway tests, laboratory and demonstration start: that of the environment, else the sources."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "FZG_GATEWAY"
"""Its command, as for a shell: `/usr/bin/firezone-gateway`, `.venv/bin/python -m fzg`."""
SOURCES = (sys.executable, "-m", "fzg")


class _Program:
    """`file` comes before everything else; `starts` counts how often that was asked for."""

    file: Path | None = None
    starts = 0


PROGRAM = _Program()


def gateway_command() -> tuple[str, ...]:
    """The command that starts the gateway, and its operator's commands."""
    if PROGRAM.file is not None:
        PROGRAM.starts += 1
        return (str(PROGRAM.file),)
    return tuple(shlex.split(os.environ.get(VARIABLE, ""))) or SOURCES
