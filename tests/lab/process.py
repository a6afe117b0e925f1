"""A child process with its log, its readiness line and its costs; it dies with the thread that started it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.lab.secrets import WATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLL_S = 0.02
# Several times what removing the unpacked files takes.
_LAUNCHER_S = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Cost(NamedTuple):
    """CPU seconds used so far and resident MiB."""

    user: float
    system: float
    rss_mib: float

    @property
    def cpu(self) -> float:
        """User and system seconds."""
        return self.user + self.system


def cost_of(pid: int) -> Cost:
    """What a process has used, its ended children included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, child_user, child_system = (int(fields[i]) / _TICKS for i in (11, 12, 13, 14))
    return Cost(user + child_user, system + child_system, int(fields[21]) * _PAGE / 2**20)


def chain_of(pid: int) -> list[int]:
    """The process and what it runs in turn, as a launcher does: its first child, that one's first child, and so on."""
    chain = [pid]
    with contextlib.suppress(OSError):  # one of them ended
        while children := Path(f"/proc/{chain[-1]}/task/{chain[-1]}/children").read_text().split():
            chain.append(int(children[0]))
    return chain


def wait_until(condition: Callable[[], Any], *, timeout: float, what: str) -> Any:
    """Poll until `condition` is true and return its value; TimeoutError says `what` did not happen."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(POLL_S)


class Process:
    """A running command. `prefix` enters its namespace; with `ready` it gets `--ready-fd N` and reports facts on it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ready: float | None = None,
    ) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.log = log
        self.facts: dict[str, Any] = {}
        self._prefix = list(prefix)
        self._environment = dict(os.environ) | dict(environment or {})
        self._ready = ready
        self._popen: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again); the log is appended to."""
        assert self._popen is None
        reader = writer = -1
        extra: list[str] = []
        if self._ready is not None:
            reader, writer = os.pipe()
            extra = ["--ready-fd", str(writer)]
        try:
            with self.log.open("ab") as log:
                self._popen = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *self._prefix, *self.command, *extra],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=[writer] if extra else [],
                    start_new_session=True,
                )
            if extra:
                os.close(writer)
                writer = -1
                self.facts = self._await_facts(reader)
        except BaseException:
            self.stop(timeout=0)
            raise
        finally:
            for descriptor in (reader, writer):
                if descriptor >= 0:
                    os.close(descriptor)

    @property
    def environment(self) -> Mapping[str, str]:
        """What it was started with."""
        return self._environment

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._popen is not None, f"{self.name} is not running"
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._popen.poll() if self._popen else None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._popen is not None and self._popen.poll() is None

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._popen is not None
        self._popen.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Its exit status, once it ended."""
        assert self._popen is not None
        return self._popen.wait(timeout)

    def stop(self, *, signal_number: int = signal.SIGTERM, timeout: float = 10.0) -> int | None:
        """Ask it to end, make it end after `timeout`; returns the exit status. Harmless if it does not run."""
        popen, self._popen = self._popen, None
        if popen is None:
            return None
        if popen.poll() is None and timeout > 0:
            popen.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(timeout)
        if popen.poll() is None:
            # A launcher lives for a moment longer than what it runs, and cleans up.
            os.kill(chain_of(popen.pid)[-1], signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(_LAUNCHER_S)
            popen.kill()
        status = popen.wait()
        if self.name.startswith("gateway"):
            WATCH.hear_log(self.name, self.log)
        return status

    def kill(self) -> None:
        """End it without notice, as a crash would."""
        self.stop(timeout=0)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def log_text(self) -> str:
        """All it wrote."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_log(self, pattern: str, *, timeout: float = 15.0, after: int = 0) -> re.Match[str]:
        """The first match of `pattern` in the log behind offset `after`; fails at once if the process ends without."""
        expression = re.compile(pattern)

        def found() -> re.Match[str] | None:
            running = self.running
            match = expression.search(self.log_text(), after)
            if match is None and not running:
                raise RuntimeError(
                    f"{self.name} ended with {self.returncode} before it logged {pattern!r}:\n{self.tail()}"
                )
            return match

        return wait_until(found, timeout=timeout, what=f"{self.name} logs {pattern!r}; last lines:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def cost(self) -> Cost:
        """What it and what it runs have used, ended children included."""
        return Cost(*map(sum, zip(*map(cost_of, chain_of(self.pid)), strict=True)))

    @property
    def state(self) -> str:
        """The kernel's letter for it, or for what it runs: `S` sleeps, `R` runs."""
        return Path(f"/proc/{chain_of(self.pid)[-1]}/stat").read_text().rpartition(")")[2].split()[0]

    def _await_facts(self, reader: int) -> dict[str, Any]:
        assert self._ready is not None
        deadline = time.monotonic() + self._ready
        data = b""
        while not data.endswith(b"\n"):
            readable, _, _ = select.select([reader], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(reader, 65536) if readable else b""
            if not part:
                why = "did not become ready" if not readable else "ended"
                raise RuntimeError(f"{self.name} {why}:\n{self.tail()}")
            data += part
        facts: dict[str, Any] = json.loads(data)
        return facts


def lab_command(*arguments: str | Path) -> list[str | Path]:
    """The command line of one of the lab's own parties."""
    return [sys.executable, "-m", "tests.lab", *arguments]


REPOSITORY = Path(__file__).resolve().parents[2]
"""Where `python -m tests.lab` must run: children get it as PYTHONPATH."""


def lab_environment() -> dict[str, str]:
    """Environment with which `python -m tests.lab` and `python -m fzg` find themselves from anywhere."""
    path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": str(REPOSITORY) + (os.pathsep + path if path else ""),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": "*",  # no proxy of this machine can be reached from a lab
        "no_proxy": "*",
    }
