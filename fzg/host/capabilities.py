"""Whether this process may configure the host (spec operations 1.5)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

# Bit numbers, capability.h.
CAP_NET_ADMIN: Final = 12
CAP_MKNOD: Final = 27
_STATUS: Final = Path("/proc/self/status")


def has_net_admin(*, status: Path = _STATUS, uid: int | None = None) -> bool:
    """True for root and for a process whose effective set has CAP_NET_ADMIN."""
    if (os.getuid() if uid is None else uid) == 0:
        return True
    return bool(effective_capabilities(status) >> CAP_NET_ADMIN & 1)


def effective_capabilities(status: Path = _STATUS) -> int:
    """The effective set as a bit mask; 0 where /proc does not say."""
    try:
        return int(status_field("CapEff", status), 16)
    except ValueError:
        return 0


def status_field(name: str, status: Path = _STATUS) -> str:
    """What /proc says of this process under a name; empty where it says nothing."""
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            found, _, value = line.partition(":")
            if found == name:
                return value.strip()
    return ""


def privilege_remedy(executable: str, uid: int) -> str:
    """The two lines for standard error when the privilege is missing."""
    return (
        f"firezone-gateway must run as root or with the capability CAP_NET_ADMIN; uid {uid} started it without it.\n"
        f"Start it with sudo, or grant the capability once: sudo setcap cap_net_admin+eip {executable}"
    )
