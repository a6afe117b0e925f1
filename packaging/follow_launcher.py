"""Runs first in the frozen program: end with the launcher process that unpacked it.

The launcher passes on signals that it can catch. Killed by one that it cannot, it would leave a gateway behind that
holds the TUN device, and the next start would find it busy.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1

ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
