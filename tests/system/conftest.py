"""Namespaces for tests that run the whole program, and the frozen file."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from gateway_process import Gateway, portal_in

from tests.lab.namespaces import Network
from tests.lab.process import REPOSITORY


@pytest.fixture(scope="module")
def lab_network():
    with Network() as network:
        yield network


@pytest.fixture
def namespace(lab_network):
    """A namespace that is connected to nothing."""
    return lab_network.namespace(f"n{len(lab_network.namespaces)}")


@pytest.fixture
def portal(namespace):
    with portal_in(namespace) as scripted:
        yield scripted


@pytest.fixture
def start(namespace):
    """Starts gateways in the namespace."""
    started = []

    def gateway(*arguments, **options):
        started.append(Gateway(namespace, *arguments, **options))
        return started[-1]

    yield gateway
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def frozen():
    """dist/firezone-gateway, built anew when it is older than what it is made of; or the file that FZG_FROZEN names."""
    pytest.importorskip("PyInstaller", reason="missing pyinstaller (the extra `build`)")
    if built := os.environ.get("FZG_FROZEN"):
        return Path(built).resolve()
    file = REPOSITORY / "dist" / "firezone-gateway"
    lock = REPOSITORY / "build" / "freeze.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not file.exists() or file.stat().st_mtime < max(path.stat().st_mtime for path in ingredients()):
            subprocess.run([REPOSITORY / "packaging" / "freeze", sys.executable], check=True)
    return file


@pytest.fixture(scope="module")
def shared_directory():
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def capable(frozen, shared_directory):
    """A copy with the file capability, as README tells the operator to make it."""
    copy = shared_directory / "firezone-gateway"
    shutil.copy(frozen, copy)
    subprocess.run(["setcap", "cap_net_admin+eip", copy], check=True)
    return copy


@pytest.fixture(scope="module")
def plain(frozen, shared_directory):
    copy = shared_directory / "without-capability"
    shutil.copy(frozen, copy)
    return copy


@pytest.fixture
def open_node(namespace, shared_directory):
    """/dev/net/tun as distributions ship it, open to everybody, on a host where no gateway ever ran."""
    state = shared_directory / f"{namespace.name}-var-lib"
    state.mkdir()
    namespace.bind("/var/lib", state)
    node = shared_directory / namespace.name
    os.mknod(node, 0o666 | 0o020000, os.makedev(10, 200))
    node.chmod(0o666)
    namespace.bind("/dev/net/tun", node)


def ingredients():
    yield from (path for path in (REPOSITORY / "fzg").rglob("*") if path.suffix in {".py", ".pyx", ".so"})
    yield from (REPOSITORY / "packaging" / name for name in ("freeze", "follow_launcher.py", "hooks/hook-gevent.py"))
    yield REPOSITORY / "firezone_gateway.spec"
    yield REPOSITORY / "requirements.lock"
