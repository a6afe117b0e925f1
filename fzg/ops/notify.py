"""What the service manager hears: ready, alive, stopping, and a sentence for `systemctl status` (sd_notify(3)).

Nothing is sent where NOTIFY_SOCKET is not set. In the one-file form the process that speaks is the child of the one
that systemd started, so the unit needs `NotifyAccess=all`; and AF_UNIX among its address families.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from gevent import monkey

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOG = logging.getLogger(__name__)

# Before the first join the portal may make us wait for longer than any fixed limit (Retry-After); systemd grants this
# much more at each word from us, so a hanging gateway is still ended.
START_EXTENSION: Final = 15.0  # s
_MICROSECONDS: Final = 1_000_000
_MAX_STATUS: Final = 200  # characters; systemd shows one line

# Datagrams that must not wait for anything: gevent's socket would.
_Socket: type[socket.socket] = monkey.get_original("socket", "socket")


class Notifier:
    """Speaks to the service manager of `environ`, if there is one. What it cannot take now is said again later."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.watchdog = _watchdog_seconds(environ)
        """How often the service manager wants to hear `WATCHDOG=1`, in seconds; None: it does not care."""
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._said_ready = False
        self._said_status = ""
        self._complained = False

    @property
    def is_wanted(self) -> bool:
        """Whether anybody listens."""
        return self._address is not None

    def report(self, *, ready: bool, healthy: bool, status: str) -> None:
        """How things are; call at least twice per `watchdog`, and about once a second before the gateway is ready."""
        if self._address is None:
            return
        status = " ".join(status.split())[:_MAX_STATUS]
        lines = []
        if not self._said_ready:
            lines.append("READY=1" if ready else f"EXTEND_TIMEOUT_USEC={int(START_EXTENSION * _MICROSECONDS)}")
        if status != self._said_status:
            lines.append(f"STATUS={status}")
        if healthy and self.watchdog is not None:
            lines.append("WATCHDOG=1")
        if lines and self._send(lines):
            self._said_ready |= ready
            self._said_status = status

    def stopping(self) -> None:
        """The end has begun."""
        if self._address is not None:
            self._send(["STOPPING=1", "STATUS=Saying goodbye"])

    def close(self) -> None:
        """Say no more."""
        self._address = None
        if self._socket is not None:
            self._socket.close()

    def _send(self, lines: list[str]) -> bool:
        try:
            if self._socket is None:
                self._socket = _Socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            self._socket.sendto("\n".join(lines).encode(), self._address or b"")
        except BlockingIOError:
            return False  # it is busy; the next report says it again
        except OSError as error:
            if not self._complained:
                _LOG.info(
                    "The service manager cannot be told how the gateway is (%s); its unit needs AF_UNIX among"
                    " RestrictAddressFamilies= and NotifyAccess=all",
                    error.strerror or error,
                )
            self._complained = True
            return False
        return True


def _address(text: str) -> bytes | None:
    """The socket's address: a path, or `@` and a name that no file has."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return os.fsencode(text) if text.startswith("/") else None


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """WATCHDOG_USEC, where it is meant for this process or for the launcher that unpacked it."""
    interval, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not interval.isascii() or not interval.isdigit() or int(interval) == 0:
        return None
    if pid and pid not in {str(os.getpid()), str(os.getppid())}:
        return None
    return int(interval) / _MICROSECONDS
