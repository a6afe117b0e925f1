"""Signals that come before the gateway has begun, and standard streams that nobody holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.lab.process import lab_environment
from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.needs("root", "ip", "nft", "unshare", "tun"), pytest.mark.slow]

JOINED = "set_snownet_capabilities"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_the_program_loads_ends_it_with_status_0(portal, start, number):
    gateway = start(portal=portal)
    gateway.says("Logging started")
    assert gateway.terminate(number) == 0
    assert "Traceback" not in gateway.output
    assert portal.connections == []


def test_a_hangup_while_the_program_loads_does_not_end_it(portal, start):
    gateway = start(portal=portal)
    gateway.says("Logging started")
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_ready()


@pytest.fixture
def default_hangup():
    """Started by nohup, all that the tests start would ignore a hangup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_ends_by_signals_as_commands_do(namespace, portal, start, number):
    gateway = start(portal=portal)
    gateway.wait_ready()
    command = start("status", "--json", "--watch", portal=portal)
    command.says('"portal"')
    assert command.terminate(number) == -number


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">/dev/full", ">&- 2>&- <&-"])
def test_streams_that_nobody_holds_change_nothing(portal, start, closed):
    gateway = start(portal=portal, prefix=["sh", "-c", f'exec "$@" {closed}', "sh"], FIREZONE_CONTROL_SOCKET="")
    wait_until(lambda: portal.connections and JOINED in portal.connections[0].events(), "the join", 20)
    assert gateway.terminate() == 0
    assert "Traceback" not in gateway.output


@pytest.mark.parametrize(
    ("arguments", "closed", "status"),
    [
        ("--version", ">&-", 0),
        ("--version", ">/dev/full", 1),
        ("--help", "| true", 0),
        ("--nonsense", ">&- 2>&-", 2),
    ],
)
def test_an_answer_that_nobody_hears_is_no_fault_of_ours(arguments, closed, status):
    program = f"{sys.executable} -m fzg"
    environment = {"PATH": os.environ["PATH"], **lab_environment()}
    done = subprocess.run(
        ["sh", "-c", f"{program} {arguments} {closed}"], env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == status
