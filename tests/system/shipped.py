"""The file that is shipped: built once for what it is made of, and which tests ran it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.process import REPOSITORY
from tests.lab.program import PROGRAM

GIVEN = "FZG_FROZEN"
"""Names a file that is built already."""
CACHE = REPOSITORY / ".cache" / "shipped"
TOOLS = {"strip": "binutils", "objdump": "binutils"}
# No test session takes longer, so that nobody runs a file of the cache that was not asked for in this time.
KEPT_S = 3600.0


class BuildError(Exception):
    """Says in one line why there is no file."""


def shipped_file() -> Path:
    """The file for the sources as they are, built unless it is there."""
    if given := os.environ.get(GIVEN):
        return Path(given).resolve()
    _require_tools()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        while not (folder := CACHE / digest()).exists():
            _build(folder)  # under another name, should somebody have changed a source meanwhile
        os.utime(folder)
        _forget_old()
    return folder / "firezone-gateway"


def _require_tools() -> None:
    if importlib.util.find_spec("PyInstaller") is None:
        raise BuildError("missing pyinstaller (the extra `build`)")
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    if lacking := [tool for tool in TOOLS if not shutil.which(tool, path=path)]:
        raise BuildError("missing " + ", ".join(f"{tool} (package {TOOLS[tool]})" for tool in lacking))


def _build(folder: Path) -> None:
    before = digest()
    done = subprocess.run(
        [REPOSITORY / "packaging" / "freeze", sys.executable], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BuildError(f"packaging/freeze failed: {last}")
    if digest() == before:
        unfinished = folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name in ("firezone-gateway", "SHA256SUMS"):
            shutil.copy(REPOSITORY / "dist" / name, unfinished)
        unfinished.rename(folder)


def _forget_old() -> None:
    for folder in CACHE.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)


def digest() -> str:
    """Of everything that the file is made of."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(_ingredients()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(REPOSITORY)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _ingredients():
    yield from (path for path in (REPOSITORY / "fzg").rglob("*") if path.suffix in {".py", ".pyx", ".so"})
    yield from (REPOSITORY / "packaging" / name for name in ("freeze", "follow_launcher.py", "hooks/hook-gevent.py"))
    yield REPOSITORY / "firezone_gateway.spec"
    yield REPOSITORY / "requirements.lock"


PART = "OPS-"


@dataclass
class Claims:
    """Which tests run the file, and the acceptance checks of operations that it passed in them."""

    file: Path | None = None
    """None: there is none, and the sources are run."""
    expected: set[str] = field(default_factory=set)
    """Ids of the tests that are to run it."""
    passed: set[str] = field(default_factory=set)
    not_judged: set[str] = field(default_factory=set)
    """Claimed by tests of the file that were skipped, or that are too long for this session."""
    partial: bool = False
    """Whether some tests were not asked for."""
    _shared: set[object] = field(default_factory=set)
    _ran: set[object] = field(default_factory=set)
    _starts: int = 0

    def expect(self, items) -> None:
        """Tests that claim something run the file, and so do fixtures that live longer than a test and serve one."""
        for item in items:
            if _claims_of(item):
                self.expected.add(item.nodeid)
                self._shared |= {definition for definition in _fixtures_of(item) if definition.scope != "function"}

    def leave_out(self, item, *, wanted: bool) -> None:
        """A test of this session is not run."""
        self.partial |= wanted
        if _names_file(item):
            self.not_judged |= _claims_of(item)

    def begin_test(self, item) -> None:
        """What starts from here on is the test's, or a fixture's that it uses."""
        PROGRAM.file = self.file if item.nodeid in self.expected else None
        self._starts = PROGRAM.starts

    @contextlib.contextmanager
    def fixture(self, definition):
        """While this fixture is made."""
        before, starts = PROGRAM.file, PROGRAM.starts
        if definition in self._shared:
            PROGRAM.file = self.file
        try:
            yield
        finally:
            if PROGRAM.starts > starts:
                self._ran.add(definition)
            PROGRAM.file = before

    def end_test(self, item, outcome: str) -> None:
        """Notes what the test claims, if it ran the file and passed."""
        if outcome == "skipped":
            self.not_judged |= _claims_of(item)
        elif outcome == "passed" and self._was_run_by(item):
            self.passed |= _claims_of(item)

    def _was_run_by(self, item) -> bool:
        return _names_file(item) or PROGRAM.starts > self._starts or bool(_fixtures_of(item) & self._ran)


def _claims_of(item) -> set[str]:
    return {check for mark in item.iter_markers("spec") for check in mark.args if check.startswith(PART)}


def _names_file(item) -> bool:
    return "frozen" in item.fixturenames


def _fixtures_of(item) -> set[object]:
    return {definition for each in item._fixtureinfo.name2fixturedefs.values() for definition in each}
