"""Builds and runs the Rust program beside this file: a client of the crates `is` and `boringtun`."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent
TARGET = SOURCE.parents[2] / ".cache" / "rust-client"


@functools.cache
def build() -> Path:
    """The executable, made anew when its sources changed; the build ends the test if it fails."""
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.fail("the Rust client cannot be built: there is no `cargo` command")
    done = subprocess.run(
        [cargo, "build", "--release", "--locked", "--quiet"],
        cwd=SOURCE,
        env=os.environ | {"CARGO_TARGET_DIR": str(TARGET)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        pytest.fail(f"the Rust client cannot be built: {done.stderr.strip()}")
    return TARGET / "release" / "rust-client"


class RustClient:
    """The running program. Orders are those of `Order` in main.rs; `events` holds all that it told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.packets: asyncio.Queue[bytes] = asyncio.Queue()
        self._news = asyncio.Condition()

    async def start(self) -> None:
        """Run it; `follow` must then run until `close`."""
        program = await asyncio.to_thread(build)
        self._process = await asyncio.create_subprocess_exec(
            program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )

    async def follow(self) -> None:
        """Take its events until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event = json.loads(line)
            if event["event"] == "packet":
                self.packets.put_nowait(bytes.fromhex(event["packet"]))
            async with self._news:
                self.events.append(event)
                self._news.notify_all()

    def order(self, do: str, **details: Any) -> None:
        """Tell it what to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | details).encode() + b"\n")

    def all(self, event: str, *, since: int = 0) -> list[dict[str, Any]]:
        """What it told under this name so far."""
        return [known for known in self.events[since:] if known["event"] == event]

    async def until(self, event: str, *, since: int = 0, timeout: float, **wanted: Any) -> dict[str, Any]:
        """The first event of this name with these details at or after position `since`."""

        def found() -> dict[str, Any] | None:
            return next((known for known in self.all(event, since=since) if wanted.items() <= known.items()), None)

        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(found)
        except TimeoutError:
            raise TimeoutError(f"no {event} {wanted} within {timeout:g} s; told since: {self.events[since:]}") from None
        event_found = found()
        assert event_found is not None
        return event_found

    async def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                status = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            status = await self._process.wait()
        assert status == 0, f"the Rust client ended with {status}"
