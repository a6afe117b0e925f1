"""Builds and runs the Go programs beside this file: a TURN server of pion/turn, an ICE agent of pion/ice."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Self

import pytest

from tests.interop.json_program import JsonProgram
from tests.lab import derivations
from tests.lab.phoenix import RelayRegistration
from tests.lab.portal_client import TOKEN

SOURCE = Path(__file__).parent
CACHE = SOURCE.parents[2] / ".cache" / "pion"


@functools.cache
def build() -> Path:
    """The directory of the executables, made anew when a source changed; the build ends the test if it fails."""
    sources = sorted(path for path in SOURCE.rglob("*") if path.suffix == ".go" or path.name in {"go.mod", "go.sum"})
    made = CACHE / hashlib.blake2s(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    if made.exists():
        return made
    go = shutil.which("go")
    if go is None:
        pytest.fail("the programs of pion cannot be built: there is no `go` command")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        done = subprocess.run(
            [
                go,
                "build",
                "-C",
                SOURCE,
                "-mod=readonly",
                "-buildvcs=false",
                "-trimpath",
                "-o",
                f"{directory}/",
                "./...",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if done.returncode:
            pytest.fail(f"the programs of pion cannot be built: {done.stderr.strip()}")
        if not made.exists():
            shutil.copytree(directory, made)
    return made


class PionAgent(JsonProgram):
    """A running agent. Its orders are those of `Order` in agent/main.go."""

    def __init__(self) -> None:
        super().__init__(lambda: build() / "agent")


class PionTurn:
    """A relay by pion/turn, IPv4 only; with `portal_url` it is known to the portal under `id`."""

    def __init__(self, *, ipv4: str, port: int, portal_url: str | None = None, secret: str | None = None) -> None:
        self.address = (ipv4, port)
        self.secret = secret or uuid.uuid4().hex
        self.id = derivations.relay_id(self.secret)
        self._start()
        self._registration = None
        if portal_url is not None:
            self._registration = RelayRegistration(
                url=portal_url, token=TOKEN, name="pion", ipv4=ipv4, ipv6=None, port=port, stamp_secret=self.secret
            )
            assert self._registration.joined.wait(10)

    def credentials(self, public_key: str = "") -> tuple[str, str]:
        """User name and password for the device with this key."""
        made = derivations.turn_credentials(public_key, self.secret)
        return made.username, made.password

    def restart(self) -> None:
        """End it and start it again: it forgets allocations and nonces."""
        self._stop()
        self._start()

    def close(self) -> None:
        """End it."""
        if self._registration is not None:
            self._registration.leave()
        self._stop()

    def _start(self) -> None:
        host, port = self.address
        self._process = subprocess.Popen(
            [build() / "turnserver", "-listen", f"{host}:{port}", "-secret", self.secret],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def _stop(self) -> None:
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
