"""What a service manager hears of a real gateway, by the protocol of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from gateway_process import INIT, inside, namespace_files

from tests.lab.scripted_portal import Refusal, wait_until

pytestmark = [pytest.mark.needs("root", "ip", "setpriv", "unshare", "tun"), pytest.mark.slow]


class Manager:
    """A socket that notes what arrives on it, as lists of lines."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)
        self._said = []

    @property
    def said(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self._said.append(self.socket.recv(4096).decode().split("\n"))
        return self._said

    @property
    def lines(self):
        return [line for message in self.said for line in message]

    def hears(self, text):
        return wait_until(
            lambda: next((line for line in self.lines if text in line), None), f"{text!r}; so far {self.lines}"
        )


@pytest.fixture(params=["path", "abstract"])
def manager(request, namespace):
    """The manager, with the address that the gateway gets."""
    if request.param == "path":
        named = Path(namespace_files(namespace)) / f"{namespace.name}.notify"
        manager = Manager(str(named))
        manager.address = str(named)
    else:
        with inside(namespace):  # such names belong to the network namespace
            manager = Manager(f"\0fzg-notify-{namespace.name}")
        manager.address = f"@fzg-notify-{namespace.name}"
    yield manager
    manager.socket.close()


def test_ready_comes_with_the_join_and_the_tun_and_stopping_with_the_signal(manager, portal, start):
    portal.answer_joins = False
    gateway = start(portal=portal, NOTIFY_SOCKET=manager.address)
    manager.hears("STATUS=Not ready: the portal has not been joined yet")
    manager.hears("EXTEND_TIMEOUT_USEC=15000000")
    assert "READY=1" not in manager.lines
    assert gateway.http("/readyz")[0] == 503

    portal.answer_joins = True
    manager.hears("READY=1")
    assert gateway.http("/readyz")[0] == 200
    manager.hears("STATUS=0 clients connected, portal joined")
    portal.refuse_always.append(Refusal(500))
    portal.connection(len(portal.connections) - 1).drop()
    manager.hears("STATUS=0 clients connected, portal away: ")

    assert gateway.terminate() == 0
    manager.hears("STOPPING=1")
    assert manager.lines.count("READY=1") == 1
    assert not any(line.startswith("WATCHDOG=") for line in manager.lines)
    assert not {"EXTEND_TIMEOUT_USEC=15000000"} & set(manager.lines[manager.lines.index("READY=1") :])


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_the_watchdog_hears_of_a_gateway_that_lives_and_not_of_one_that_hangs(manager, portal, start):
    gateway = start(portal=portal, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="3000000", WATCHDOG_PID=None)
    beats = lambda: manager.lines.count("WATCHDOG=1")
    manager.hears("READY=1")
    wait_until(lambda: beats() >= 3, "three signs of life")
    began, before = time.monotonic(), beats()
    wait_until(lambda: beats() >= before + 2, "two more")
    assert time.monotonic() - began < 3
    process = gateway.pid
    os.kill(process, signal.SIGSTOP)
    try:
        silent_since, before = time.monotonic(), beats()
        wait_until(lambda: time.monotonic() - silent_since > 2.5, "a while")
        assert beats() <= before + 1
    finally:
        os.kill(process, signal.SIGCONT)
    now = beats()
    wait_until(lambda: beats() > now, "it lives on")


def test_a_manager_that_cannot_be_told_costs_one_line(namespace, portal, start):
    gateway = start(portal=portal, NOTIFY_SOCKET="/nowhere/notify.sock")
    gateway.wait_ready()
    gateway.says("The service manager cannot be told how the gateway is \\(No such file or directory\\)")
    line = "The service manager cannot be told"
    portal.connection(0).push("init", INIT)  # something to do
    assert gateway.terminate() == 0
    assert gateway.output.count(line) == 1
    assert gateway.levels() == {"INFO"}


@pytest.mark.long
def test_in_the_one_file_form_the_child_speaks_and_the_launcher_s_watchdog_is_heeded(manager, portal, start, frozen):
    gateway = start(
        portal=portal,
        command=(str(frozen),),
        prefix=("sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh"),  # as systemd sets it: the process that it started
        NOTIFY_SOCKET=manager.address,
        WATCHDOG_USEC="3000000",
        FIREZONE_METRICS="prometheus",
    )
    manager.hears("READY=1")
    manager.hears("WATCHDOG=1")
    assert "firezone_gateway_ready 1.0" in gateway.http("/metrics")[1]
    assert gateway.terminate() == 0
    manager.hears("STOPPING=1")
