"""Namespaces for tests that run the whole program, and the program.

Tests that claim a check of operations (`OPS-…`) run the shipped file, others the sources, which start sooner.
`FZG_GATEWAY=".venv/bin/python -m fzg"` saves the time that the build takes after each change of the sources;
`FZG_GATEWAY=$PWD/dist/firezone-gateway` lets all tests run the file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from gateway_process import Gateway, portal_in
from shipped import BuildError, Claims, shipped_file

from tests.lab.namespaces import Network
from tests.lab.program import VARIABLE

HERE = Path(__file__).parent
CLAIMS = Claims()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What was claimed is judged at the end, and only if all tests were asked for."""
    CLAIMS.partial = not {item.path for item in items} >= set(HERE.glob("test_*.py"))
    items.sort(key=lambda item: item.path.name == "test_shipped_claims.py")


def pytest_deselected(items):
    """`make test` leaves long tests to `make test-all`."""
    for item in items:
        if item.path.parent == HERE:
            CLAIMS.leave_out(item, wanted=item.get_closest_marker("long") is None)


def pytest_collection_finish(session):
    """Builds the file before the first test: what takes so long must not be part of anybody's time limit."""
    CLAIMS.expect(item for item in session.items if item.path.parent == HERE)
    if session.config.option.collectonly or not CLAIMS.expected or os.environ.get(VARIABLE):
        return
    try:
        CLAIMS.file = shipped_file()
    except BuildError as error:
        if os.environ.get("CI") == "true":
            raise pytest.UsageError(f"CI=true, and the file that is shipped cannot be tested: {error}") from error
        session.config.pluginmanager.get_plugin("terminalreporter").write_line(
            f"`python -m fzg` is tested in the place of the file that is shipped: {error}"
        )


def pytest_runtest_setup(item):
    CLAIMS.begin_test(item)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    with CLAIMS.fixture(fixturedef):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" or report.outcome == "skipped":
        CLAIMS.end_test(item, report.outcome)
    return report


@pytest.fixture(scope="session")
def claims():
    """Which acceptance checks the shipped file passed so far."""
    return CLAIMS


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
    """The shipped file."""
    try:
        return shipped_file()
    except BuildError as error:
        pytest.skip(str(error))


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
