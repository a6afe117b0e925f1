"""Runs first in the frozen program: end with the launcher process that unpacked it.

The launcher passes on signals that it can catch, and removes the unpacked files at the end. Killed by a signal that it
cannot catch, it would leave a gateway behind that holds the TUN device, and the files.
"""

import atexit
import ctypes
import os
import shutil
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LAUNCHER = os.getppid()


def _clean_up() -> None:
    if os.getppid() != _LAUNCHER:
        shutil.rmtree(sys._MEIPASS, ignore_errors=True)  # noqa: SLF001 - PyInstaller's name for the folder


atexit.register(_clean_up)
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
