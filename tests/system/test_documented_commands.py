"""The commands of README and docs, as they stand there, on a host of their own.

Each fenced `sh` block is run from top to bottom by one shell in a mount namespace: `/usr/local/bin` is its own, there
is a `sudo` (we are root), and the executable and its checksums lie where somebody downloaded them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
A_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
BEFORE_IT_IS_INSTALLED = {"README.md", "install.md"}
# What make targets do has tests of its own, and they take minutes.
OF_MAKE = re.compile(r"^\s*make\b")
# A gateway that runs in the foreground, and what asks it, are the business of test_frozen and test_health.
OF_A_RUNNING_GATEWAY = re.compile(r"^(firezone-gateway$|curl .*:8080)")

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("unshare", "setcap", "objdump", "strip")]


def blocks():
    return [
        pytest.param(page.name, block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(A_BLOCK.findall(page.read_text()), 1)
    ]


def commands(block):
    lines = (line.partition("  #")[0].rstrip() for line in block.splitlines())
    return [line for line in lines if line and not OF_MAKE.match(line) and not OF_A_RUNNING_GATEWAY.match(line)]


@pytest.fixture
def download(frozen, tmp_path):
    """The folder in which somebody reads the page."""
    (tmp_path / "dist").mkdir()
    for folder in (tmp_path, tmp_path / "dist"):
        shutil.copy(frozen, folder / "firezone-gateway")
        digest = hashlib.sha256(frozen.read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(f"{digest}  firezone-gateway\n")
    return tmp_path


@pytest.mark.parametrize(("page", "block"), blocks())
def test_each_command_ends_well(page, block, download):
    wanted = commands(block)
    if not wanted:
        return
    script = "\n".join([
        "set -eu",
        "mount --make-rprivate /",
        "mount -t tmpfs tmpfs /usr/local/bin",
        "printf '#!/bin/sh\\nexec \"$@\"\\n' > /usr/local/bin/sudo && chmod 755 /usr/local/bin/sudo",
        ":" if page in BEFORE_IT_IS_INSTALLED else "cp -p firezone-gateway /usr/local/bin/",
        "ip link set lo up",
        "export PATH=/usr/local/bin:$PATH",
        *wanted,
    ])  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-x"],
        input=script, cwd=download, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_that_is_named_exists(page):
    from fzg.commands import COMMANDS

    named = set(re.findall(r"`(?:sudo )?firezone-gateway ([a-z][a-z-]+)\b", page.read_text()))
    assert named <= set(COMMANDS)
