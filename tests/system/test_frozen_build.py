"""What is in the shipped file, and what it needs of the host."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from frozen_world import OF_THE_HOST, newest_glibc, programs_in, unpack

from fzg.commands import COMMANDS
from tests.lab.process import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120, func_only=True),  # not counting the build, which the first test waits for
    pytest.mark.needs("objdump", "strip"),
]

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def objects(frozen, tmp_path_factory):
    return unpack(frozen, tmp_path_factory.mktemp("unpacked"))


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.spec("OPS-50")
def test_the_sum_beside_the_file_is_the_files_own(frozen):
    assert (frozen.parent / "SHA256SUMS").read_text() == f"{sha256(frozen)}  firezone-gateway\n"


def test_the_file_is_at_most_20_mb(frozen):
    assert frozen.stat().st_size <= 20 * MEGABYTE


def test_it_says_which_engine_is_inside_and_which_c_library_it_needs(frozen, objects):
    shown = subprocess.run([frozen, "--version", "--verbose"], capture_output=True, text=True, check=True).stdout
    parts = dict(line.split(": ", 1) for line in shown.splitlines()[1:])
    assert shown.startswith("firezone-gateway 1.6.1\n")
    assert parts["engine"] == "native"
    major, minor = newest_glibc([frozen, *objects])
    assert parts["C library"].endswith(f", {major}.{minor} or newer needed")
    assert re.fullmatch(r"([0-9a-f]{12}\+?|of an unknown commit), one file for \w+", parts["build"])


def test_every_object_finds_what_it_needs_in_the_file_or_in_the_c_library(frozen, objects):
    """Without LD_LIBRARY_PATH, which a program with capabilities does not get."""
    carried = {name.rpartition("/")[2] for name in programs_in(frozen)}
    assert {"libcrypto.so.3", "libssl.so.3"} <= carried
    for each in objects:
        header = subprocess.run(["objdump", "-p", each], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"NEEDED +(\S+)", header))
        assert {name for name in needed if not OF_THE_HOST.fullmatch(name)} <= carried, each
        if needed & carried:
            assert re.search(r"RUNPATH +\$ORIGIN", header), each


def test_each_command_is_in_it(frozen):
    for name in COMMANDS:
        done = subprocess.run([frozen, name, "--help"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert f"firezone-gateway {name}" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.needs("git", "cc")
def test_built_again_in_another_folder_from_nothing_but_the_sources_it_is_the_same_file(tmp_path):
    first, second = tmp_path / "first", tmp_path / "the" / "second"
    sums = []
    for folder in (first, second):
        folder.mkdir(parents=True)
        shutil.copytree(REPOSITORY / ".git", folder / ".git")
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in listing.split("\0"):
            if (REPOSITORY / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, folder / name)
        environment = os.environ | {"FZG_REQUIRE_NATIVE": "1"}
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, env=environment, check=True)
        subprocess.run([folder / "packaging" / "freeze", sys.executable], check=True)
        sums.append(sha256(folder / "dist" / "firezone-gateway"))
    assert sums[0] == sums[1]
