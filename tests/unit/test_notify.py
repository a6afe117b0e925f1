"""Words to the service manager, on a socket of the test's own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import pytest

from fzg.ops.notify import Notifier


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify.sock"))
        manager.setblocking(False)
        yield manager


def heard(manager):
    said = []
    while True:
        try:
            said.append(manager.recv(4096).decode().split("\n"))
        except BlockingIOError:
            return said


def notifier(manager, **environment):
    return Notifier({"NOTIFY_SOCKET": manager.getsockname()} | environment)


def test_each_thing_is_said_once_and_life_again_and_again(manager):
    speaker = notifier(manager, WATCHDOG_USEC="2000000")
    speaker.report(ready=False, healthy=True, status="Not ready")
    speaker.report(ready=True, healthy=True, status="Serving")
    speaker.report(ready=True, healthy=True, status="Serving")
    speaker.report(ready=False, healthy=False, status="Serving")
    speaker.stopping()
    assert heard(manager) == [
        ["EXTEND_TIMEOUT_USEC=15000000", "STATUS=Not ready", "WATCHDOG=1"],
        ["READY=1", "STATUS=Serving", "WATCHDOG=1"],
        ["WATCHDOG=1"],
        ["STOPPING=1", "STATUS=Saying goodbye"],
    ]


def test_a_sentence_from_elsewhere_is_one_line_of_bounded_length(manager):
    notifier(manager).report(ready=True, healthy=True, status="away: one\nREADY=0\r\n" + "x" * 5000)
    ((ready, status),) = heard(manager)
    assert ready == "READY=1"
    assert status.startswith("STATUS=away: one READY=0 xxx")
    assert len(status) < 250


def test_without_a_service_manager_nothing_is_done():
    speaker = Notifier({})
    assert not speaker.is_wanted
    speaker.report(ready=True, healthy=True, status="Serving")
    speaker.stopping()
    assert Notifier({"NOTIFY_SOCKET": "vsock:2:1234"}).is_wanted is False


def test_what_the_manager_cannot_take_now_is_said_later(manager):
    speaker = notifier(manager)
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    filler.setblocking(False)
    with filler, contextlib.suppress(BlockingIOError):
        while True:
            filler.sendto(b"x", manager.getsockname())
    speaker.report(ready=True, healthy=True, status="Serving")
    assert {tuple(said) for said in heard(manager)} == {("x",)}
    speaker.report(ready=True, healthy=True, status="Serving")
    assert heard(manager) == [["READY=1", "STATUS=Serving"]]


def test_a_manager_that_is_gone_is_worth_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    speaker = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(5):
        speaker.report(ready=True, healthy=True, status="Serving")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "No such file or directory" in record.getMessage()
    assert "RestrictAddressFamilies" in record.getMessage()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getppid())}, 30.0),  # the launcher of the one file
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1234567890"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_heeded_where_it_is_meant_for_us(environment, seconds):
    assert Notifier(environment).watchdog == seconds
