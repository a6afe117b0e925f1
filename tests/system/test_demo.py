"""`make demo`: what it promises is what it shows, in namespaces and without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.lab.namespaces import NETNS
from tests.lab.process import REPOSITORY, lab_environment
from tests.lab.scenario import available

ENVIRONMENT = os.environ | lab_environment() | {"COLUMNS": "100"}


def run(*arguments: str) -> tuple[int, str]:
    """Process id and output of a demonstration that ended well."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        shown, _ = process.communicate(timeout=110)
    assert process.returncode == 0, shown
    return process.pid, shown


@pytest.mark.needs("root", "tun", "ip", "nft", "turnserver", "curl", "openssl", "setpriv")
def test_the_demonstration_shows_both_paths_a_filter_and_a_revocation_and_leaves_nothing():
    assert available() is None
    pid, shown = run("-m", "tests.lab", "demo")
    assert re.search(r"PeerToPeer +[\d.]+ +[\d.]+ +\d+ +right +1 +\d+ +\d+", shown), shown
    assert re.search(r"RelayTo\w+ +[\d.]+ +[\d.]+ +\d+ +right +1 +\d+ +\d+", shown), shown
    assert "ICMP prohibited" in shown
    assert re.search(r"revoked under a running download: stopped after \d+", shown), shown
    assert not [path for path in NETNS.iterdir() if path.name.startswith(f"fzlab-{pid}.")]


@pytest.mark.needs("setpriv")
def test_without_namespaces_it_shows_both_paths_on_loopback_and_says_what_it_could_not_show():
    _, shown = run(
        "-c",
        "from rich.console import Console; from tests.lab.demo_loopback import show; show(Console(), '', 'no tools')",
    )
    assert "direct path: PeerToPeer" in shown
    assert re.search(r"relayed path: Relay\w+", shown)
    assert "not shown: TCP, HTTP" in shown
