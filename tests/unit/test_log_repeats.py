"""Lines that say the same thing over and over."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest

from fzg.ops import logs

SHOWN = 100


@pytest.fixture
def configured():
    """Configures logging to memory; returns a function that gives the lines so far."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure(directives=None, *, json_lines=False):
        stream = io.StringIO()
        logs.configure(json_lines=json_lines, directives=directives, flow_logs=False, stream=stream)
        return lambda: stream.getvalue().splitlines()

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = True


@pytest.fixture
def clock(monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_beyond_a_hundred_a_minute_lines_of_one_kind_are_left_out_and_then_said_in_sum(configured, clock, level):
    lines = configured("info")
    for number in range(250):
        logging.getLogger("a").log(level, "Attempt %d failed", number, extra={"reason": f"cause {number}"})
    assert len(lines()) == SHOWN
    logs.summarise_repeats()
    assert len(lines()) == SHOWN, "the minute is not over"
    clock[0] += 60
    logs.summarise_repeats()
    assert len(lines()) == SHOWN + 1
    assert lines()[-1].endswith('a: Attempt 249 failed reason="cause 249" repeats_not_shown=149')
    logs.summarise_repeats()
    assert len(lines()) == SHOWN + 1
    logging.getLogger("a").log(level, "Attempt %d failed", 250)
    assert lines()[-1].endswith("Attempt 250 failed")


def test_in_json_the_number_is_a_field(configured, clock):
    lines = configured("info", json_lines=True)
    for number in range(SHOWN + 2):
        logging.getLogger("a").info("Attempt %d failed", number)
    logs.summarise_repeats(now_or_never=True)
    assert json.loads(lines()[-1])["repeats_not_shown"] == 1


def test_other_lines_are_shown_meanwhile(configured, clock):
    lines = configured("info")
    for _ in range(SHOWN + 50):
        logging.getLogger("a").info("one")
    logging.getLogger("a").info("another")
    logging.getLogger("a").warning("one")
    logging.getLogger("b").info("one")
    assert [line.partition(": ")[2] for line in lines()[SHOWN:]] == ["another", "one", "one"]


@pytest.mark.parametrize("level", [logging.ERROR, logging.DEBUG, 5])
def test_errors_and_what_was_asked_for_in_detail_are_never_left_out(configured, clock, level):
    lines = configured("trace")
    for _ in range(SHOWN * 3):
        logging.getLogger("a").log(level, "text")
    assert len(lines()) == SHOWN * 3


def test_a_minute_without_too_many_needs_no_sum(configured, clock):
    lines = configured("info")
    for _ in range(5):
        for _ in range(SHOWN):
            logging.getLogger("a").info("text")
        clock[0] += 60
        logs.summarise_repeats()
    assert len(lines()) == SHOWN * 5


def test_texts_without_number_do_not_grow_the_table_without_end(configured, clock):
    lines = configured("info")
    for number in range(5000):
        logging.getLogger("a").info(f"text {number}")  # noqa: G004 - the mistake in question
    assert len(lines()) == 5000
    (handler,) = logging.getLogger().handlers
    assert len(handler._windows) == 1000


def test_lines_are_counted_by_level_those_left_out_included(configured, clock):
    configured("info")
    for _ in range(SHOWN * 2):
        logging.getLogger("a").warning("text")
    logging.getLogger("a").error("text")
    logging.getLogger("a").debug("text")
    assert logs.lines_by_level() == {"WARN": SHOWN * 2, "ERROR": 1, "INFO": 0, "DEBUG": 0, "TRACE": 0}


def test_a_list_is_written_without_quotes(configured):
    lines = configured("info")
    logging.getLogger("a").info("Text", extra={"new_routes": ["100.64.0.0/11", "fd00:2021:1111::/107"]})
    assert lines()[-1].endswith("Text new_routes=[100.64.0.0/11, fd00:2021:1111::/107]")
