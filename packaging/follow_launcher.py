"""Runs first in the frozen program: end with the launcher process that unpacked it, and leave no unpacked files behind.

The launcher passes on signals that it can catch, and removes the unpacked files at the end. Killed by a signal that it
cannot catch, it would leave a gateway behind that holds the TUN device, and the files. Where both were killed, as by a
host that ran out of memory, the next start removes the files.
"""

import atexit
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_MINE = Path(sys._MEIPASS)  # noqa: SLF001 - PyInstaller's name for the folder
# The folder's name, in which the launcher puts its process id, and the first file that it unpacks there.
_NAME = re.compile(r"_MEI([0-9a-f]{8})\w{6}")
_MARK = ".firezone-gateway.json"
# Between a folder's making and the lock on its mark a launcher unpacks; its id means nothing to us if it is in a
# container with the same /tmp. A few tenths of a second on an idle machine.
_UNPACKING_S = 30.0


def _launcher_of(folder: Path) -> int | None:
    name = _NAME.fullmatch(folder.name)
    return int(name[1], 16) if name else None


_LAUNCHER = _launcher_of(_MINE)


def _follow() -> None:
    atexit.register(_clean_up)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != _LAUNCHER:  # it ended before that
        sys.exit(1)


def _clean_up() -> None:
    if os.getppid() != _LAUNCHER:
        shutil.rmtree(_MINE, ignore_errors=True)


def _sweep() -> None:
    """Remove what killed gateways of this user left beside our folder."""
    with contextlib.suppress(OSError):
        for other in _MINE.parent.glob("_MEI*"):
            with contextlib.suppress(OSError):
                if other != _MINE and _is_abandoned(other):
                    shutil.rmtree(other, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether a gateway unpacked it, as this user and some time ago, and neither of its processes lives."""
    launcher, found = _launcher_of(folder), folder.lstat()
    if launcher is None or found.st_uid != os.geteuid() or folder.is_symlink():
        return False
    # In a container that starts again, every launcher has the same id; ours unpacked our folder.
    if launcher != _LAUNCHER and Path(f"/proc/{launcher}").exists():
        return False
    if time.time() - found.st_mtime < _UNPACKING_S:
        return False
    with (folder / _MARK).open("rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


_held = (_MINE / _MARK).open("rb")
fcntl.flock(_held, fcntl.LOCK_SH)
_follow()
_sweep()
