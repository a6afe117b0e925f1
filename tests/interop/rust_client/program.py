"""Builds and runs the Rust program beside this file: a client of the crates `is` and `boringtun`."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interop.json_program import JsonProgram

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


class RustClient(JsonProgram):
    """The running program. Its orders are those of `Order` in main.rs."""

    def __init__(self) -> None:
        super().__init__(build)
        self.packets: asyncio.Queue[bytes] = asyncio.Queue()

    def note(self, event: dict[str, Any]) -> None:
        if event["event"] == "packet":
            self.packets.put_nowait(bytes.fromhex(event["packet"]))
