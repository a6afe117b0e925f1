"""What the log says of a task that failed, and of one whose failure somebody else hears of."""

from __future__ import annotations

import logging

import gevent
import pytest
from gevent.threadpool import ThreadPool

from fzg import app
from fzg.host.errors import HostError


@pytest.fixture
def reported(monkeypatch, caplog):
    """The messages of the log, while failures go where the gateway sends them."""
    monkeypatch.setattr(gevent.get_hub(), "print_exception", app._report_failure)
    caplog.set_level(logging.ERROR)
    return lambda: [record.getMessage() for record in caplog.records]


def fail(error):
    raise error


def test_a_greenlet_that_dies_of_a_mistake_is_told(reported):
    gevent.spawn(fail, ValueError("a mistake")).join()
    assert reported() == ["A task failed"]


@pytest.mark.parametrize("kind", [app.FatalError, HostError])
def test_one_that_ends_the_process_with_a_sentence_is_left_to_that_sentence(reported, kind):
    gevent.spawn(fail, kind("a sentence")).join()
    assert reported() == []


def test_what_a_thread_pool_raises_is_told_by_whoever_waits_for_it(reported):
    with pytest.raises(PermissionError):
        ThreadPool(1).apply(fail, (PermissionError("not yours"),))
    gevent.sleep(0)
    assert reported() == []
