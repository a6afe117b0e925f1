"""What the uploader does with every kind of answer (virtual time, a collector made of Python)."""

from __future__ import annotations

import itertools
import json
import logging

import pytest

from fzg.host import flow_upload
from fzg.host.flow_spool import Spool, UploadConfig
from fzg.host.flow_upload import Uploader
from fzg.host.https import ConnectionLost, HttpsError, Response
from tests.unit.flow_log_world import CLAIMS, attribution, token
from tests.unit.test_flow_spool import OTHER, UNIX, completed, files, started

HOST = "flows.example.com"
ID = CLAIMS["policy_authorization_id"]


class Inline:
    """A thread pool without a thread."""

    def apply(self, work, arguments):
        return work(*arguments)


class Collector:
    """Gives the scripted answers in turn, 200 when they are used up; notes every request with its moment."""

    def __init__(self, world):
        self.world = world
        self.answers = []
        self.connects = []
        self.requests = []
        self.refuses = None

    def __call__(self, host):
        self.connects.append(host)
        if self.refuses:
            raise self.refuses
        return _Connection(self, host)

    @property
    def sizes(self):
        return [len(request["records"]) for request in self.requests]

    @property
    def moments(self):
        return [request["at"] for request in self.requests]


class _Connection:
    def __init__(self, collector, host):
        self.collector = collector
        self.host = host
        self.is_open = True

    def post(self, path, body, bearer):
        assert self.is_open
        records = json.loads(body)["flow_logs"]
        request = {"host": self.host, "path": path, "records": records, "token": bearer.reveal()}
        self.collector.requests.append(request | {"at": self.collector.world.now})
        answer = self.collector.answers.pop(0) if self.collector.answers else 200
        if callable(answer):
            answer = answer(records)
        if isinstance(answer, Exception):
            raise answer
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        return Response(status, headers)

    def close(self):
        self.is_open = False


class World:
    def __init__(self, root):
        self.root = root
        self.now = 0.0
        self.spool = Spool(root)
        self.collector = Collector(self)
        self.pauses = []
        self.interrupt = False
        self.uploader = Uploader(
            self.spool,
            Inline(),
            self.collector,
            random=lambda size: b"\x80" + bytes(size - 1),
            unix=lambda: UNIX + self.now,
            clock=lambda: self.now,
            sleep=self.sleep,
        )
        self.spool.store_token(attribution())
        self.configure()

    def configure(self, **changes):
        settings = {"api_url": f"https://{HOST}/ignored?x=1", "interval": 60, "batch_size": 1000} | changes
        self.spool.configure(UploadConfig(**settings))

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        return self.interrupt

    def store(self, *numbers):
        for number in numbers:
            self.spool.store(completed(number))

    @property
    def reports(self):
        return [name for name in files(self.root) if name.endswith((".start.json", ".end.json"))]


@pytest.fixture(name="world")
def world_fixture(tmp_path):
    return World(tmp_path / "flow_logs")


@pytest.mark.spec("TUNNEL-97")
def test_reports_are_posted_under_their_token_and_deleted_after_200(world):
    world.spool.store(started(1))
    world.spool.store(completed(1))
    world.spool.store(started(2))
    assert world.uploader.run_pass() == 60
    (request,) = world.collector.requests
    assert (request["host"], request["path"]) == (HOST, "/ingestion/flow_logs")
    assert request["token"] == token().reveal()
    assert request["records"] == [completed(1).payload(), started(2).payload()]
    assert world.reports == []
    assert (world.root / "responder" / ID / "token").exists()


def test_each_authorization_is_a_request_of_its_own_over_one_connection(world):
    world.spool.store_token(attribution(policy_authorization_id=OTHER))
    world.store(1)
    world.spool.store(completed(2, policy_authorization_id=OTHER))
    world.uploader.run_pass()
    assert world.collector.connects == [HOST]
    assert len({request["token"] for request in world.collector.requests}) == 2


def test_nothing_to_send_opens_no_connection(world):
    assert world.uploader.run_pass() == 60
    assert world.collector.connects == []


@pytest.mark.spec("TUNNEL-96")
def test_without_settings_nothing_is_uploaded_and_the_next_look_is_in_30_seconds(world):
    world.store(1)
    world.spool.configure(None)
    assert world.uploader.run_pass() == 30
    assert world.collector.connects == []
    assert len(world.reports) == 1


@pytest.mark.parametrize(
    "api_url",
    [
        "http://flows.example.com",
        "https://flows.example.com:8443",
        "https://u:p@flows.example.com",
        "flows",
        "https://[::1",
    ],
)
def test_settings_that_cannot_be_used_are_logged_once_and_looked_at_again(world, caplog, api_url):
    world.store(1)
    world.configure(api_url=api_url)
    assert world.uploader.run_pass() == 30
    assert world.uploader.run_pass() == 30
    assert len(caplog.records) == 1
    assert world.collector.connects == []
    (world.root / "upload.json").write_text("{")
    assert world.uploader.run_pass() == 30
    assert "upload.json" in caplog.text


def test_a_backlog_is_worked_off_in_batches_a_second_apart(world):
    world.configure(batch_size=2)
    world.store(1, 2, 3)
    assert world.uploader.run_pass() == 1
    assert world.uploader.run_pass() == 60
    assert world.collector.sizes == [2, 1]


@pytest.mark.spec("TUNNEL-97")
@pytest.mark.parametrize("failure", [500, 503, 599, 408, HttpsError("timed out")])
def test_a_failing_collector_is_tried_again_with_growing_pauses_for_five_minutes(world, failure):
    world.store(1)
    world.collector.answers = [failure] * 1000
    assert world.uploader.run_pass() == 60
    pauses = world.pauses
    assert pauses[:4] == [pytest.approx(0.5 * 1.5**n) for n in range(4)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(pauses))
    assert max(pauses) == 60
    assert 200 < world.now <= 300
    assert len(world.reports) == 1, "kept"
    world.collector.answers = []
    world.uploader.run_pass()
    assert world.reports == []


def test_the_pauses_have_jitter(tmp_path):
    drawn = set()
    for first in (0, 128, 255):
        world = World(tmp_path / str(first))
        world.uploader._random = lambda size, first=first: bytes([first]) * size
        world.store(1)
        world.collector.answers = [500]
        world.uploader.run_pass()
        drawn.add(world.pauses[0])
    assert len(drawn) == 3
    assert all(0.25 < pause < 0.75 for pause in drawn)


@pytest.mark.spec("TUNNEL-97")
def test_413_is_answered_with_halves_and_a_single_record_that_is_too_large_is_kept(world):
    world.store(1, 2, 3, 4, 5)
    large = completed(3).payload()
    world.collector.answers = [lambda records: 413 if len(records) > 3 or large in records else 200] * 20
    world.uploader.run_pass()
    assert world.collector.sizes == [5, 2, 3, 1, 2]
    assert [record["flow_start"][17:19] for record in world.collector.requests[1]["records"]] == ["21", "22"]
    assert world.reports == [f"responder/{ID}/{completed(3).stem}.end.json"]
    world.store(6)
    world.uploader.run_pass()
    assert world.collector.sizes[5:] == [1], "it does not hold up those behind it"
    assert world.collector.requests[5]["records"] == [completed(6).payload()]


@pytest.mark.spec("TUNNEL-97")
def test_429_waits_as_long_as_it_says_and_tries_again_without_end(world):
    world.store(1)
    world.collector.answers = [(429, {"retry-after": "3"})] * 200
    world.uploader.run_pass()
    assert world.pauses == [3] * 200
    assert world.collector.moments[:3] == [0, 3, 6]
    assert world.reports == []


@pytest.mark.parametrize(
    ("header", "pause"),
    [
        ({}, 1),
        ({"retry-after": "soon"}, 1),
        ({"retry-after": "-5"}, 1),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "9" * 9}, 3600),
    ],
)
def test_429_with_an_odd_wait(world, header, pause):
    world.store(1)
    world.collector.answers = [(429, header)]
    world.uploader.run_pass()
    assert world.pauses == [pause]


def test_before_a_long_wait_the_connection_is_given_up(world):
    world.store(1)
    world.collector.answers = [(429, {"retry-after": "3"}), (429, {"retry-after": "30"})]
    world.uploader.run_pass()
    assert world.collector.connects == [HOST, HOST]


@pytest.mark.spec("TUNNEL-97")
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 303, 304, 305, 100, 600])
def test_other_answers_keep_the_records_for_a_later_pass(world, status):
    world.configure(batch_size=1)
    world.store(1, 2)
    world.collector.answers = [status]
    assert world.uploader.run_pass() == 60, "a refusing collector is not hurried"
    assert len(world.reports) == 2
    assert world.collector.sizes == [1]
    assert world.pauses == []


def test_a_lost_connection_ends_the_pass_and_the_next_is_in_a_second(world):
    world.spool.store_token(attribution(policy_authorization_id=OTHER))
    world.store(1)
    world.spool.store(completed(2, policy_authorization_id=OTHER))
    world.collector.answers = [ConnectionLost("closed")]
    assert world.uploader.run_pass() == 1
    assert len(world.collector.requests) == 1
    assert len(world.reports) == 2


def test_a_collector_that_cannot_be_reached_is_tried_at_the_next_interval(world, caplog):
    caplog.set_level(logging.INFO)
    world.store(1)
    world.collector.refuses = HttpsError("no address accepted")
    assert world.uploader.run_pass() == 60
    assert world.uploader.run_pass() == 60
    assert len(world.reports) == 1
    assert caplog.text.count("cannot be reached") == 1
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(
    ("location", "host", "path"),
    [
        (f"https://{HOST}/v2/logs?x=1#part", HOST, "/v2/logs?x=1"),
        ("/elsewhere", HOST, "/elsewhere"),
        ("https://other.example:443/in put", "other.example", "/in%20put"),
    ],
)
def test_redirects_are_followed_by_posting_again(world, status, location, host, path):
    world.store(1)
    world.collector.answers = [(status, {"location": location})]
    world.uploader.run_pass()
    assert [(request["host"], request["path"]) for request in world.collector.requests] == [
        (HOST, "/ingestion/flow_logs"),
        (host, path),
    ]
    assert world.collector.connects == ([HOST] if host == HOST else [HOST, host])
    assert world.reports == []


@pytest.mark.spec("TUNNEL-97")
@pytest.mark.parametrize(
    "location",
    [
        "http://flows.example.com/",
        "https://flows.example.com:8443/",
        "https://user@flows.example.com/",
        "//user:secret@flows.example.com/",
        "ftp://flows.example.com",
        "https://[::1",
        "https://fl%20ows/",
        "https://fl ows/",
        "https://flows.example.com:x/",
        "",
    ],
)
def test_redirects_to_where_a_token_may_not_go_are_refused(world, location):
    world.store(1)
    world.collector.answers = [(307, {"location": location})]
    assert world.uploader.run_pass() == 60
    assert len(world.collector.requests) == 1
    assert len(world.reports) == 1


def test_a_pass_follows_at_most_five_redirects(world):
    world.store(1)
    world.collector.answers = [(302, {"location": f"/{number}"}) for number in range(100)]
    world.uploader.run_pass()
    assert len(world.collector.requests) == 6
    assert len(world.reports) == 1


def test_new_settings_end_a_long_wait(world):
    world.store(1)
    world.collector.answers = [(429, {"retry-after": "3000"})]
    world.interrupt = True
    assert world.uploader.run_pass() == 0
    assert len(world.collector.requests) == 1


@pytest.mark.parametrize("interval", [1 << 60, 10**400], ids=["ages", "more-than-a-float-holds"])
def test_an_interval_of_years_is_a_day(world, interval):
    world.configure(interval=interval)
    assert world.uploader.run_pass() == 86_400


def test_expired_tokens_go_with_their_reports_before_anything_is_sent(world):
    world.store(1)
    world.now = CLAIMS["exp"] - UNIX
    world.uploader.run_pass()
    assert files(world.root) == ["upload.json"]
    assert world.collector.connects == []


@pytest.mark.spec("TUNNEL-98")
def test_no_answer_brings_the_token_into_the_log(world, caplog):
    caplog.set_level(0)
    world.store(1, 2)
    odd = [
        (302, {"location": f"http://x/{token().reveal()}"}),
        413,
        401,
        HttpsError("x"),
        ConnectionLost("y"),
        500,
        413,
        413,
    ]
    for answer in odd:
        world.collector.answers = [answer]
        world.uploader.run_pass()
    assert caplog.text
    assert token().reveal()[:20] not in caplog.text
    assert token().reveal().split(".")[1] not in caplog.text


def test_a_spool_that_cannot_be_read_is_not_the_end(world, monkeypatch, caplog):
    world.store(1)

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(world.spool, "batch", broken)
    assert world.uploader.run_pass() == 60
    monkeypatch.setattr(world.spool, "prune", broken)
    assert world.uploader.run_pass() == 30
    assert caplog.text.count("Input/output error") == 2


def test_the_constants_are_the_specifications():
    assert flow_upload.PATH == "/ingestion/flow_logs"
    assert (flow_upload.BACKLOG_PAUSE, flow_upload.IDLE_PAUSE, flow_upload.GIVE_UP_AFTER) == (1, 30, 300)
