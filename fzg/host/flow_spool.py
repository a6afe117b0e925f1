"""Flow records on their way to the portal: files that survive a restart and an outage (spec tunnel 10.5).

    upload.json
    responder/<policy authorization>/token
    responder/<policy authorization>/<flow start>-<identity>.start.json, .end.json

`Spool` does blocking I/O and belongs to one native thread. Its disk may be full, read-only or hang: that costs records,
nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import msgspec

from fzg.secret import Secret
from fzg.tunnel import ingest_token
from fzg.wire import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fzg.tunnel.flow_record import FlowRecord
    from fzg.tunnel.ingest_token import Attribution

# Specification (tunnel 10.5, 10.6).
ROOT: Final = Path("/var/lib/firezone/flow_logs")
DEFAULT_BATCH: Final = 1000
LARGEST_BATCH: Final = 10_000
ORPHAN_AGE: Final = 60.0  # s

# Ours. What is kept while no collector takes it: some 400 MB in blocks of 4 KiB. The newest records are dropped then.
MAX_REPORTS: Final = 100_000
# Ours. A flow log must not fill the disk that other programs need.
MIN_FREE_BYTES: Final = 64 * 1024 * 1024
# Ours. A report is below 3 KB, 16 outer addresses included.
_MAX_REPORT_BYTES: Final = 64 * 1024

_ROLES: Final = frozenset({"initiator", "responder"})
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TOKEN: Final = "token"  # noqa: S105 - the name of a file
_START: Final = ".start.json"
_END: Final = ".end.json"
_TEMPORARY: Final = ".tmp"


class SpoolError(Exception):
    """Something could not be kept; the message says why."""


class UploadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where, how often (in seconds) and how much at once."""

    api_url: str
    interval: Annotated[int, msgspec.Meta(ge=1)]
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BATCH)]


class Report(NamedTuple):
    """One file of a batch: its name, and the JSON of its payload."""

    name: str
    payload: bytes


class Batch(NamedTuple):
    """What to upload under one token; `more`: the directory holds further reports."""

    directory: Path
    token: Secret[str]
    reports: list[Report]
    more: bool


class Spool:
    """The files. Raises OSError and SpoolError, and nothing else."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._count: int | None = None

    def configure(self, config: UploadConfig | None) -> None:
        """Say how the uploads go; None: there are none."""
        path = self._root / "upload.json"
        if config is None:
            path.unlink(missing_ok=True)
            return
        self._make_directory(self._root)
        _write(path, msgspec.json.encode(config))

    @property
    def count(self) -> int | None:
        """Reports that wait, as far as they were counted; any thread may ask."""
        return self._count

    def take_stock(self) -> None:
        """Count the reports that wait."""
        self._count = sum(1 for each in self._directories() for _ in _report_names(each))

    def config(self) -> UploadConfig | None:
        """What `configure` said, perhaps before a restart. Raises SpoolError if it cannot be understood."""
        try:
            return msgspec.json.decode((self._root / "upload.json").read_bytes(), type=UploadConfig)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError) as error:
            raise SpoolError(f"{self._root / 'upload.json'} cannot be used: {error}") from error

    def store_token(self, attribution: Attribution) -> None:
        """Keep the token under which the records of its authorization will be uploaded."""
        directory = self._directory(attribution)
        if directory is None:
            raise SpoolError("the flow-log token names a role or an authorization that cannot be a directory")
        for path in (self._root, directory.parent, directory):
            self._make_directory(path)
        _write(directory / _TOKEN, attribution.token.reveal().encode())

    def store(self, record: FlowRecord) -> None:
        """Keep one record; SpoolError if it is dropped."""
        directory = self._directory(record.attribution)
        if directory is None or not (directory / _TOKEN).exists():
            raise SpoolError("its token is not kept")
        if self._count is None:
            self.take_stock()
        if self._count is not None and self._count >= MAX_REPORTS:
            raise SpoolError(f"{MAX_REPORTS} records wait to be uploaded already")
        disk = os.statvfs(directory)
        if disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES:
            raise SpoolError(f"the disk has less than {MIN_FREE_BYTES >> 20} MiB left")
        payload = _canonical(record.payload())
        suffix = _START if record.figures is None else _END
        _write(directory / (record.stem + suffix), b'{"checksum":%d,"payload":%b}' % (zlib.crc32(payload), payload))
        self._count = None if self._count is None else self._count + 1

    def prune(self, unix: float) -> None:
        """Delete what nobody will take any more: expired tokens with their reports, directories without a token."""
        for directory in list(self._directories()):
            for leftover in directory.glob(f".*{_TEMPORARY}"):
                if unix - leftover.stat().st_mtime >= ORPHAN_AGE:
                    leftover.unlink(missing_ok=True)
            try:
                expires = ingest_token.parse(Secret((directory / _TOKEN).read_text("latin-1"))).claims.exp
            except FileNotFoundError:
                expires = int(directory.stat().st_mtime + ORPHAN_AGE)
            except Malformed:
                continue
            if expires <= unix:
                shutil.rmtree(directory, ignore_errors=True)
                self._count = None

    def waiting(self) -> list[Path]:
        """Directories that hold reports and a token, in a stable order."""
        return sorted(
            directory
            for directory in self._directories()
            if (directory / _TOKEN).exists() and next(_report_names(directory), None) is not None
        )

    def batch(self, directory: Path, limit: int, skip: Iterable[str] = ()) -> Batch | None:
        """The oldest reports of a directory but for those to skip; None if there are none. Deletes broken ones."""
        try:
            token = Secret((directory / _TOKEN).read_text("latin-1").strip())
        except FileNotFoundError:
            return None
        names = set(_report_names(directory))
        superseded = {name.removesuffix(_END) + _START for name in names if name.endswith(_END)}
        wanted = sorted(names - superseded - set(skip))
        reports: list[Report] = []
        for position, name in enumerate(wanted):
            if len(reports) >= limit:
                return Batch(directory, token, reports, more=position < len(wanted))
            payload = _payload(directory / name)
            if payload is None:
                self.delete(directory, [name])
            else:
                reports.append(Report(name, payload))
        return Batch(directory, token, reports, more=False) if reports else None

    def delete(self, directory: Path, names: Iterable[str]) -> None:
        """Reports that have arrived, or that nobody could read; a completion takes its start along."""
        for name in names:
            for each in (name, name.removesuffix(_END) + _START) if name.endswith(_END) else (name,):
                with contextlib.suppress(FileNotFoundError):
                    (directory / each).unlink()
                    self._count = None if self._count is None else self._count - 1

    def _directory(self, attribution: Attribution) -> Path | None:
        """None if the token's words cannot safely be a path."""
        claims = attribution.claims
        if claims.role not in _ROLES or not _UUID.fullmatch(claims.policy_authorization_id):
            return None
        return self._root / claims.role / claims.policy_authorization_id

    def _directories(self) -> Iterator[Path]:
        for role in _ROLES:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._root / role) as entries:
                for entry in entries:
                    if _UUID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                        yield Path(entry.path)

    def _make_directory(self, path: Path) -> None:
        if path == self._root:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)


def _report_names(directory: Path) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith((_START, _END)) and not entry.name.startswith("."):
                yield entry.name


def _payload(path: Path) -> bytes | None:
    """What the report holds; None if it is not what was written."""
    try:
        with path.open("rb") as file:
            report = json.loads(file.read(_MAX_REPORT_BYTES))
        payload = _canonical(report["payload"])
        return payload if report["checksum"] == zlib.crc32(payload) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _canonical(payload: object) -> bytes:
    """Compact JSON with sorted keys: what the checksum is of."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, readable for the owner alone."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            os.fchmod(descriptor, 0o600)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
