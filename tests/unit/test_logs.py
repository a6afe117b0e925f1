"""What a line looks like, which lines there are, and what is never in them."""

from __future__ import annotations

import io
import json
import logging
import re
import sys

import pytest

from fzg.ops import logs
from fzg.portal import trace
from fzg.secret import Secret

HUMAN = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (TRACE|DEBUG| INFO| WARN|ERROR) [\w:]+: ")
TRACE = 5


@pytest.fixture
def configured():
    """Configures logging to memory; returns a function that gives the lines so far."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in root.manager.loggerDict}

    def configure(directives=None, *, json_lines=False, flow_logs=False):
        stream = io.StringIO()
        logs.configure(json_lines=json_lines, directives=directives, flow_logs=flow_logs, stream=stream)
        return lambda: stream.getvalue().splitlines()

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in root.manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
    logging.raiseExceptions = True


def say_everything(*names):
    for name in names:
        for level in (TRACE, 10, 20, 30, 40):
            logging.getLogger(name).log(level, "%s %d", name, level)


def messages(lines):
    return [line.partition(": ")[2] for line in lines]


@pytest.mark.spec("OPS-33")
def test_a_human_line_is_time_level_target_message_fields(configured):
    lines = configured("trace")
    say_everything("fzg.app")
    logging.getLogger("fzg.portal.websocket").warning(
        "Text", extra={"host": "api.firezone.dev", "said": "two words", "quote": 'a"b', "count": 3, "flag": True}
    )
    assert len(lines()) == 6
    assert all(HUMAN.match(line) for line in lines())
    assert [HUMAN.match(line)[1] for line in lines()] == ["TRACE", "DEBUG", " INFO", " WARN", "ERROR", " WARN"]
    assert lines()[-1].endswith(
        ' fzg::portal::websocket: Text host=api.firezone.dev said="two words" quote="a\\"b" count=3 flag=true'
    )


@pytest.mark.spec("OPS-33")
def test_text_from_elsewhere_can_neither_begin_a_line_nor_steer_a_terminal(configured):
    lines = configured("info")
    logging.getLogger("a").info("one\ntwo\r\x1b[31m\x9b", extra={"field": "x\ny\tz"})
    (line,) = lines()
    assert line.endswith("a: one\\ntwo\\r\\x1b[31m\\x9b field=x\\ny\\tz")


@pytest.mark.spec("OPS-5", "PORTAL-11")
@pytest.mark.parametrize("json_lines", [False, True])
def test_a_token_that_somebody_echoes_is_masked_in_every_part_of_a_line(configured, json_lines):
    lines = configured("info", json_lines=json_lines)
    logs.hide(Secret(".SFMyNTY.dG9rZW4.c2ln"))
    text = "you sent Bearer .SFMyNTY.dG9rZW4.c2ln to us"
    logging.getLogger("a").info("the portal answered: %s", text, extra={"body": text})
    logs.fatal(RuntimeError(text))
    assert len(lines()) == 2
    assert "SFMyNTY" not in str(lines()) + str(logs.recent_lines())
    assert str(lines()).count("you sent Bearer *** to us") == 3


def test_a_token_too_short_to_be_one_does_not_spoil_other_words(configured):
    lines = configured("info")
    logs.hide(Secret("info"))
    logs.hide(Secret(""))
    logging.getLogger("a").info("information")
    assert lines()[0].endswith("a: information")


@pytest.mark.spec("OPS-34")
def test_a_json_line_cannot_steer_a_terminal_and_is_the_same_to_a_program(configured):
    lines = configured("info", json_lines=True)
    logging.getLogger("a").info("\x1b[31m\x7f\x9b31m\u2028ü", extra={"field": "x\x85y"})
    (line,) = lines()
    assert line.replace("ü", "").isascii()
    assert line.isprintable()
    assert (json.loads(line)["message"], json.loads(line)["field"]) == ("\x1b[31m\x7f\x9b31m\u2028ü", "x\x85y")


@pytest.mark.spec("OPS-34")
def test_a_json_line_is_one_flat_object(configured):
    lines = configured("info", json_lines=True)
    logging.getLogger("fzg.app").warning("Text %d\nmore", 7, extra={"rid": "r-1", "count": 3, "what": Secret("s3cr3t")})
    (line,) = lines()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry.pop("timestamp"))
    assert entry.pop("what") != "s3cr3t"
    assert entry == {"level": "WARN", "target": "fzg::app", "message": "Text 7\nmore", "rid": "r-1", "count": 3}


@pytest.mark.spec("OPS-34", "OPS-36")
def test_lines_go_to_standard_output_without_colours(configured, capsys):
    logs.configure(json_lines=False, directives="info", flow_logs=False)
    logging.getLogger("a").error("text")
    out, err = capsys.readouterr()
    assert HUMAN.match(out)
    assert "\x1b" not in out
    assert err == ""


def test_a_failure_has_its_traceback_behind_the_line(configured):
    lines = configured("info")
    try:
        raise ValueError("oops")
    except ValueError:
        logging.getLogger("a").exception("Text")
    assert HUMAN.match(lines()[0])
    assert lines()[-1] == "ValueError: oops"


@pytest.mark.spec("OPS-35")
@pytest.mark.parametrize(
    ("directives", "expected"),
    [
        (None, {"fzg.app": 20, "other": 20}),
        ("", {"fzg.app": 40, "other": 40}),
        ("debug", {"fzg.app": 10, "other": 10, "pyroute2.x": 30, "dns.x": 20}),
        ("DEBUG", {"fzg.app": 10}),
        ("trace", {"fzg.app": TRACE}),
        ("off", {"fzg.app": None, "other": None}),
        ("0", {"fzg.app": None}),
        ("1", {"fzg.app": 40}),
        ("2", {"fzg.app": 30}),
        ("3", {"fzg.app": 20}),
        ("4", {"fzg.app": 10}),
        ("5", {"fzg.app": TRACE}),
        ("fzg=debug", {"fzg.app": 10, "fzgother": 40, "other": 40}),
        ("warn,fzg=debug,fzg::app=error", {"fzg.app": 40, "fzg.app.x": 40, "fzg.node": 10, "other": 30}),
        ("fzg::app=error,fzg=debug,warn", {"fzg.app": 40, "fzg.node": 10, "other": 30}),
        (" info , fzg = debug ,", {"fzg.app": 10, "other": 20}),
        ("fzg", {"fzg.app": TRACE, "other": 40}),
        ("info,phoenix_channel=debug,connlib::x=trace", {"fzg.app": 20}),
        ("info,[span{field=value}]=trace,fzg[conn{cid=1,rid=2}]=debug", {"fzg.app": 20}),
        ("info,wire=trace", {"wire.api.send": TRACE, "wire.net.recv": TRACE, "fzg.app": 20}),
        ("debug,pyroute2=trace", {"pyroute2.x": TRACE}),
    ],
)
def test_the_most_specific_directive_decides(configured, directives, expected):
    for name in list(logging.getLogger().manager.loggerDict):
        logging.getLogger(name).setLevel(logging.NOTSET)
    lines = configured(directives)
    for name, lowest in expected.items():
        before = len(lines())
        say_everything(name)
        wanted = [f"{name} {level}" for level in (TRACE, 10, 20, 30, 40) if lowest is not None and level >= lowest]
        assert messages(lines()[before:]) == wanted, name


@pytest.mark.spec("OPS-35")
def test_flow_logs_are_added_to_whatever_the_filter_is(configured):
    lines = configured("error", flow_logs=True)
    say_everything("flow_logs", "other")
    assert messages(lines()) == [*(f"flow_logs {level}" for level in (TRACE, 10, 20, 30, 40)), "other 40"]


@pytest.mark.spec("OPS-20")
@pytest.mark.parametrize(
    "directives",
    [
        "loud=verbose",
        "=info",
        "a=",
        "a=info=debug",
        "info;debug",
        "info debug",
        '"info"',
        "info,[",
        "a b=info",
        "fzg/x",
    ],
)
def test_what_is_no_directive_is_refused(configured, directives):
    with pytest.raises(logs.FilterError, match=r"names no (level|target)"):
        configured(directives)


@pytest.mark.spec("OPS-19")
def test_a_fatal_error_is_one_line_with_its_causes(configured):
    lines = configured("error")
    try:
        try:
            raise OSError(16, "Device or resource busy")
        except OSError as cause:
            raise RuntimeError("the TUN device cannot be had") from cause
    except RuntimeError as error:
        logs.fatal(error)
    (line,) = lines()
    assert " ERROR " in line
    assert line.endswith(": the TUN device cannot be had: [Errno 16] Device or resource busy")


def test_a_cause_that_the_message_quotes_is_not_repeated():
    error = RuntimeError("no port: [Errno 98] Address already in use")
    error.__cause__ = OSError(98, "Address already in use")
    assert logs.chain(error) == "no port: [Errno 98] Address already in use"


def test_standard_output_that_is_closed_costs_the_line_only(configured, capsys):
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    logs.configure(json_lines=False, directives="info", flow_logs=False, stream=Closed())
    logging.getLogger("a").error("text")
    assert capsys.readouterr().err == ""


def test_letters_that_the_locale_does_not_have_are_written_all_the_same(configured, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    logs.configure(json_lines=False, directives="info", flow_logs=False)
    logging.getLogger("a").error("Büro \ud800")
    assert "a: Büro \\ud800\n".encode() in raw.getvalue()


# Portal frames


SECRETS = ["latqe7iwpjyrccojsy4ywy", "4xl1v/gk+pPzA", "dtQLwvW7CXik", "eyJhbGciOi", "00112233"]
FRAME = {
    "event": "create_authorization",
    "payload": {
        "client": {"id": "11111111", "preshared_key": SECRETS[2], "public_key": "ICEi"},
        "relays": [{"username": "2145916800:kF8o3", "password": SECRETS[1]}],
        "client_ice_credentials": {"username": "725z", "password": SECRETS[0]},
        "flow_logs_ingest_token": SECRETS[3],
        "nothing": {"Token": None, "stamp_secret": SECRETS[4]},
    },
}


@pytest.mark.spec("OPS-35")
def test_portal_frames_appear_in_both_directions_at_trace_with_secrets_masked(configured):
    lines = configured("error,wire=trace")
    trace.trace_sent(json.dumps(FRAME).encode())
    trace.trace_received(json.dumps(FRAME))
    sent, received = lines()
    assert " TRACE wire::api::send: " in sent
    assert " TRACE wire::api::recv: " in received
    for line in lines():
        assert not any(secret in line for secret in SECRETS)
        assert '"event":"create_authorization"' in line
        assert '"username":"725z","password":"***"' in line
        assert '"public_key":"ICEi"' in line


def test_frames_that_are_no_json_are_only_counted(configured):
    lines = configured("wire=trace")
    trace.trace_received('{"password": "hunter2')
    trace.trace_received("[" * 100_000)
    assert messages(lines()) == ["21 characters that are not JSON", "100000 characters that are not JSON"]


@pytest.mark.parametrize("directives", ["debug", "wire=debug", "trace,wire=info"])
def test_frames_are_not_logged_unless_asked_for(configured, directives):
    lines = configured(directives)
    trace.trace_sent(b"{}")
    trace.trace_received("{}")
    assert lines() == []
