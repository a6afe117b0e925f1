"""The operator's way into a running gateway: a Unix socket, one JSON line asks, JSON lines answer.

A request is an object with `request`, the name of what is wanted, and that request's own fields. Each line of the
answer is an object; `{"error": SENTENCE}` ends an answer that failed, the end of the stream one that did not. The asker
keeps its side open until then: who hangs up has the work for it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gevent
from gevent.pool import Pool
from gevent.server import StreamServer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_LOG = logging.getLogger(__name__)

VARIABLE = "FIREZONE_CONTROL_SOCKET"
"""Names the socket, for the gateway and for those who ask it; empty: there is none."""

FILE = "control.sock"
SYSTEM_DIRECTORY = Path("/run/firezone-gateway")

# A person, a script and a dashboard ask at once; each connection is a greenlet that may hold a status of a megabyte.
MAX_CONNECTIONS = 16
# The longest request names a client, two addresses and a file; much more is a mistake.
MAX_REQUEST = 4096  # bytes
# A program writes its request as soon as it is connected.
REQUEST_TIMEOUT = 5.0  # s
# Who takes nothing of an answer for that long has gone to sleep, and gives its place back.
ANSWER_TIMEOUT = 10.0  # s
LONGEST_PATH = 107  # bytes, sun_path of unix(7)

FOREIGNER = "only root and the user that runs the gateway"
"""How the refusal of anybody else begins."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """The request cannot be served; the message is a sentence for the operator."""


class Handler(Protocol):
    """Serves one kind of request; may wait between two lines. Closed when the asker hangs up. Raises `Refused`."""

    def __call__(self, request: Mapping[str, Any], /) -> Iterable[Mapping[str, Any]]:
        """The lines of the answer."""


def places(environment: Mapping[str, str]) -> list[Path]:
    """Where the socket may be, the best first; none if the variable is set and empty."""
    if (named := environment.get(VARIABLE)) is not None:
        return [Path(named)] if named else []
    found = []
    if runtime := environment.get("RUNTIME_DIRECTORY"):
        found.append(Path(runtime.split(":")[0]) / FILE)  # systemd.exec(5): several are separated by colons
    found.append(SYSTEM_DIRECTORY / FILE)
    if session := environment.get("XDG_RUNTIME_DIR"):
        found.append(Path(session) / "firezone-gateway.sock")
    # /tmp first: under file capabilities the C library drops TMPDIR for us, and the operator's shell may have one.
    found += [directory / FILE for directory in private_directories(os.getuid())]
    return found


def private_directories(uid: int) -> list[Path]:
    """Directories that only this user may have made, for hosts where nothing else is writable."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    bases = dict.fromkeys(("/tmp", *filter(None, named)))  # noqa: S108 - the directory is checked
    # Not tempfile's: that writes to find out, and raises where every disk is full.
    return [Path(base) / f"firezone-gateway-{uid}" for base in bases]


class ControlServer:
    """Listens at the first of `where` that can be had. A failure costs this endpoint, not the gateway."""

    def __init__(self, where: Iterable[Path], handlers: Mapping[str, Handler]) -> None:
        self.path: Path | None = None
        self._where = list(where)
        self._handlers = handlers
        self._server: StreamServer | None = None
        self._inode = 0

    def start(self) -> None:
        """Listen; one WARN names every place that failed, one INFO another gateway that has the place."""
        refusals = []
        for path in self._where:
            try:
                listener = _listen(path)
            except _InUseError:
                _LOG.info(
                    "Another gateway answers the operator here, this one does not; give each its own %s",
                    VARIABLE,
                    extra={"path": str(path)},
                )
                return
            except OSError as error:
                refusals.append(f"{path}: {error.strerror or error}")
                continue
            self.path, self._inode = path, path.lstat().st_ino
            self._server = StreamServer(listener, self._serve, spawn=Pool(MAX_CONNECTIONS))
            self._server.start()
            _LOG.debug("Commands are answered", extra={"path": str(path)})
            return
        if refusals:
            _LOG.warning(
                "The commands status, drain, trace, capture and bundle cannot reach this gateway: no socket can be"
                " made; name a place for it with %s, or set it empty to do without",
                VARIABLE,
                extra={"tried": "; ".join(refusals)},
            )

    def stop(self) -> None:
        """Hang up, and take the socket away unless somebody replaced it."""
        if self._server is None or self.path is None:
            return
        self._server.stop(timeout=0)
        self._server = None
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    def _serve(self, connection: socket.socket, _address: object) -> None:
        """One connection, whose troubles are its own."""
        with connection, contextlib.suppress(OSError, gevent.Timeout):
            try:
                line = _receive(connection)  # before anything is refused, else who still writes would not read why
                _check_peer(connection)
                self._answer(connection, _parse(line))
            except Refused as refusal:
                _send(connection, {"error": str(refusal)})

    def _answer(self, connection: socket.socket, request: Mapping[str, Any]) -> None:
        name = request.get("request")
        handler = self._handlers.get(name) if isinstance(name, str) else None
        if handler is None:
            raise Refused(f"this gateway knows no request {name!r}; is the command's version another than its own?")
        lines = iter(handler(request))
        watch = gevent.spawn(_kill_at_end, connection, gevent.getcurrent())
        try:
            while (line := _next(lines, name)) is not None:
                _send(connection, line)
        finally:
            watch.kill()
            _close(lines)


class _InUseError(OSError):
    """A living gateway listens there."""


def _listen(path: Path) -> socket.socket:
    """A listening socket at the path, which is seen there only once nobody but us and root may use it."""
    if len(os.fsencode(path)) > LONGEST_PATH - len(".4194304"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    _prepare(path.parent)
    if _answers(path):
        raise _InUseError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(fresh))
        fresh.chmod(0o600)
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)  # noqa: FBT003 - the method has no keyword
        fresh.rename(path)  # over the socket of a gateway that died
    except OSError:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise
    return listener


def _prepare(directory: Path) -> None:
    """Our own directories are made; what others could have put in their place is refused."""
    if directory == SYSTEM_DIRECTORY:
        directory.mkdir(mode=0o755, exist_ok=True)
    elif directory in private_directories(os.getuid()):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(errno.EPERM, "it is not a directory of this user alone")


def _answers(path: Path) -> bool:
    """Whether somebody listens; a socket of a process that is gone refuses."""
    if path.exists() and not path.is_socket():
        raise OSError(errno.EEXIST, "it exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(REQUEST_TIMEOUT)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):  # its backlog is full, so it lives
            return True
    return True


def _check_peer(connection: socket.socket) -> None:
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in (0, os.getuid()):
        raise Refused(f"{FOREIGNER} (uid {os.getuid()}) may ask it")


def _receive(connection: socket.socket) -> bytes:
    """The request's line."""
    received = b""
    with gevent.Timeout(REQUEST_TIMEOUT):
        while not received.endswith(b"\n"):
            piece = connection.recv(MAX_REQUEST)
            if not piece:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            received += piece
            if len(received) > MAX_REQUEST:
                raise Refused(f"the request is longer than {MAX_REQUEST} bytes")
    return received


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused("the request is not JSON") from error
    if not isinstance(request, dict):
        raise Refused("the request is not a JSON object")
    return request


def _send(connection: socket.socket, line: Mapping[str, Any]) -> None:
    with gevent.Timeout(ANSWER_TIMEOUT):
        connection.sendall(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _kill_at_end(connection: socket.socket, worker: gevent.Greenlet) -> None:
    """End the work for an asker that hung up."""
    with contextlib.suppress(OSError):
        while connection.recv(MAX_REQUEST):
            pass
    worker.kill(block=False)


def _next(lines: Iterator[Mapping[str, Any]], request: object) -> Mapping[str, Any] | None:
    try:
        return next(lines, None)
    except Refused:
        raise
    except Exception:  # noqa: BLE001 - logged with its traceback
        _LOG.exception("A request of the operator failed", extra={"request": request})
        raise Refused("the gateway failed to answer; its log says why") from None


def _close(lines: Iterator[Mapping[str, Any]]) -> None:
    """Let a handler that is a generator undo what it began."""
    close = getattr(lines, "close", None)
    if close is not None:
        close()
