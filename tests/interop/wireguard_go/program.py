"""Builds and runs the Go program beside this file: wireguard-go between a TUN and a network of the caller's choice."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).parent
CACHE = SOURCE.parents[2] / ".cache" / "wireguard-go"


def missing() -> str | None:
    """Why tests that need the program cannot run here. Never under CI: there they fail."""
    if os.environ.get("CI") == "true" or shutil.which("go") is not None:
        return None
    return "wireguard-go cannot be built: there is no `go` command"


def build() -> Path:
    """The executable, made anew when its sources changed; the build ends the test if it fails."""
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix == ".go" or path.name in {"go.mod", "go.sum"})
    digest = hashlib.blake2s(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"wireguard-go-{digest}"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        pytest.fail("wireguard-go cannot be built: there is no `go` command")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        made = Path(directory) / program.name
        command = [
            go,
            "build",
            "-C",
            str(SOURCE),
            "-mod=readonly",
            "-buildvcs=false",
            "-trimpath",
            "-o",
            str(made),
            ".",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            pytest.fail(f"wireguard-go cannot be built: {done.stderr.strip()}")
        made.replace(program)
    return program


class WireguardGo:
    """A running device. `link` and `tun` are the addresses that the program was told to talk to.

    `prefix` goes before the command, to enter a namespace.
    """

    def __init__(
        self,
        *,
        tun: str,
        link: str | None = None,
        mtu: int = 1280,
        verbose: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        command = [*prefix, str(build()), "-tun", tun, "-mtu", str(mtu)]
        if link is not None:
            command += ["-link", link]
        if verbose:
            command.append("-verbose")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = self._read_line()
        if not ready.startswith("ready "):
            raise RuntimeError(f"wireguard-go did not start: {ready!r}")
        places = dict(word.split("=", 1) for word in ready.split()[1:])
        self.link, self.tun = places["link"], places["tun"]

    def request(self, text: str) -> dict[str, str]:
        """One operation of the configuration protocol; the last value of each key of its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.rstrip("\n") + "\n\n")
        self.process.stdin.flush()
        answer: dict[str, str] = {}
        while line := self._read_line():
            key, _, value = line.partition("=")
            answer[key] = value
        if answer.get("errno") != "0":
            raise RuntimeError(f"wireguard-go refused {text.splitlines()[0]!r}")
        return answer

    def set(self, *settings: str) -> None:
        """Configure: lines like `private_key=...` in the order of the protocol."""
        self.request("\n".join(("set=1", *settings)))

    def get(self) -> dict[str, str]:
        """State; with one peer all of its values."""
        return self.request("get=1")

    def handshake(self, public_key: bytes) -> None:
        """Initiate; wireguard-go does nothing if it did so within 5 s."""
        self.request(f"handshake={public_key.hex()}")

    def close(self) -> None:
        """End the program."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")
