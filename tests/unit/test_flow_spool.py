from __future__ import annotations

import json
import os
import threading
import time
import zlib

import gevent
import pytest
from gevent.threadpool import ThreadPool

from fzg.host import flow_spool, flow_writer
from fzg.host.flow_spool import Spool, SpoolError, UploadConfig
from fzg.host.flow_writer import FlowWriter
from fzg.tunnel.flow_record import Figures
from tests.lab.scripted_portal import wait_until
from tests.unit.flow_log_world import CLAIMS, attribution, base64url, token
from tests.unit.test_flow_record import record

ID = CLAIMS["policy_authorization_id"]
OTHER = "77777777-0000-4000-8000-00000000000f"
UNIX = 1_790_000_000.0


@pytest.fixture(name="root")
def root_fixture(tmp_path):
    return tmp_path / "firezone" / "flow_logs"


@pytest.fixture(name="spool")
def spool_fixture(root):
    spool = Spool(root)
    spool.store_token(attribution())
    return spool


def started(number=0, **claims):
    return record(attribution=attribution(**claims), flow_start=UNIX + number)


def completed(number=0, **claims):
    figures = Figures(UNIX + number + 2, UNIX + number + 1, 3, 4, 300, 100)
    return record(attribution=attribution(**claims), flow_start=UNIX + number, figures=figures)


def mode(path):
    return path.stat().st_mode & 0o777


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.spec("TUNNEL-91")
def test_start_and_completion_are_two_files_with_one_stem(spool, root):
    spool.store(started())
    spool.store(completed())
    stem = started().stem
    assert files(root) == [
        f"responder/{ID}/{stem}.end.json",
        f"responder/{ID}/{stem}.start.json",
        f"responder/{ID}/token",
    ]
    assert (root / "responder" / ID / "token").read_text() == token().reveal()


def test_a_report_carries_the_crc_of_its_payload(spool, root):
    spool.store(record())
    (path,) = (root / "responder" / ID).glob("*.start.json")
    report = json.loads(path.read_bytes())
    assert report == {"checksum": 658676767, "payload": record().payload()}
    compact = json.dumps(report["payload"], sort_keys=True, separators=(",", ":")).encode()
    assert zlib.crc32(compact) == 658676767
    assert path.name.startswith("1787217302-")


@pytest.mark.spec("TUNNEL-98")
def test_files_are_for_the_owner_alone_whatever_the_umask(root):
    former = os.umask(0)
    try:
        spool = Spool(root)
        spool.store_token(attribution())
        spool.store(started())
        spool.configure(UploadConfig(api_url="https://x/", interval=60, batch_size=10))
    finally:
        os.umask(former)
    inside = [root, *root.rglob("*")]
    assert {mode(path) for path in inside if path.is_dir()} == {0o700}
    assert {mode(path) for path in inside if path.is_file()} == {0o600}
    root.chmod(0o755)
    spool.store_token(attribution())
    assert mode(root) == 0o700


@pytest.mark.spec("TUNNEL-99")
@pytest.mark.parametrize(
    "claims",
    [
        {"policy_authorization_id": "../../x"},
        {"policy_authorization_id": ID.replace("-", "")},
        {"policy_authorization_id": ID + "/.."},
        {"policy_authorization_id": ID + "\n"},
        {"policy_authorization_id": ""},
        {"role": ".."},
        {"role": "responder/.."},
        {"role": ""},
    ],
)
def test_a_token_that_would_lead_elsewhere_writes_nothing(root, claims):
    spool = Spool(root)
    with pytest.raises(SpoolError):
        spool.store_token(attribution(**claims))
    with pytest.raises(SpoolError):
        spool.store(started(**claims))
    assert not root.exists()
    assert not any(root.parent.parent.rglob("*"))


def test_without_its_token_a_record_is_dropped(root):
    with pytest.raises(SpoolError):
        Spool(root).store(started())
    assert not root.exists()


@pytest.mark.spec("TUNNEL-96")
def test_the_upload_settings_come_and_go(spool, root):
    spool.configure(UploadConfig(api_url="https://flows.example.com/", interval=60, batch_size=1000))
    assert json.loads((root / "upload.json").read_bytes()) == {
        "api_url": "https://flows.example.com/",
        "interval": 60,
        "batch_size": 1000,
    }
    assert Spool(root).config().interval == 60
    spool.configure(None)
    spool.configure(None)
    assert not (root / "upload.json").exists()
    assert spool.config() is None


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"api_url":"x","interval":0,"batch_size":1}', "\xff"])
def test_unreadable_settings_are_said_so(spool, root, text):
    (root / "upload.json").write_text(text, "latin-1")
    with pytest.raises(SpoolError, match=r"upload\.json"):
        spool.config()


def test_a_write_that_fails_leaves_nothing_behind(spool, root, monkeypatch):
    spool.store(started())
    before = files(root)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        spool.store(started(1))
    assert files(root) == before


def test_a_full_spool_and_a_nearly_full_disk_take_nothing_more(spool, root, monkeypatch):
    monkeypatch.setattr(flow_spool, "MAX_REPORTS", 2)
    spool.store(started(0))
    spool.store(started(1))
    with pytest.raises(SpoolError, match="2 records wait"):
        spool.store(started(2))
    with pytest.raises(SpoolError, match="2 records wait"):
        Spool(root).store(started(2))  # what an earlier run left counts
    spool.delete(root / "responder" / ID, [started(0).stem + ".start.json"])
    spool.store(started(2))
    monkeypatch.setattr(flow_spool, "MAX_REPORTS", 10)
    monkeypatch.setattr(flow_spool, "MIN_FREE_BYTES", 1 << 62)
    with pytest.raises(SpoolError, match="disk"):
        spool.store(started(3))


def test_a_batch_is_the_oldest_reports_without_starts_that_are_completed(spool, root):
    for number in (3, 1, 2):
        spool.store(started(number))
    spool.store(completed(2))
    spool.store_token(attribution(policy_authorization_id=OTHER))
    directory = root / "responder" / ID
    assert spool.waiting() == [directory]
    batch = spool.batch(directory, 10)
    assert [report.name for report in batch.reports] == [
        started(1).stem + ".start.json",
        completed(2).stem + ".end.json",
        started(3).stem + ".start.json",
    ]
    assert json.loads(batch.reports[1].payload) == completed(2).payload()
    assert batch.token == token()
    assert not batch.more
    short = spool.batch(directory, 2)
    assert [report.name for report in short.reports] == [report.name for report in batch.reports[:2]]
    assert short.more
    assert [r.name for r in spool.batch(directory, 2, [started(1).stem + ".start.json"]).reports] == [
        report.name for report in batch.reports[1:]
    ]


def test_deleting_a_completion_takes_its_start_along(spool, root):
    directory = root / "responder" / ID
    spool.store(started(1))
    spool.store(completed(1))
    spool.store(started(2))
    spool.delete(directory, [completed(1).stem + ".end.json"])
    assert [path.name for path in directory.glob("*.json")] == [started(2).stem + ".start.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace("10.20.0.7", "10.20.0.8"),
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"payload":{}}',
        lambda text: "[" * 5000,
        lambda text: " " * 70_000 + text,
    ],
)
def test_a_broken_report_is_deleted_and_not_uploaded(spool, root, damage):
    spool.store(started(1))
    spool.store(started(2))
    directory = root / "responder" / ID
    broken = directory / (started(1).stem + ".start.json")
    broken.write_text(damage(broken.read_text()))
    batch = spool.batch(directory, 10)
    assert [report.name for report in batch.reports] == [started(2).stem + ".start.json"]
    assert not broken.exists()


def test_what_nobody_will_take_is_pruned(spool, root):
    spool.store(started())
    spool.store_token(attribution(policy_authorization_id=OTHER, exp=int(UNIX) - 1))
    undecodable = root / "responder" / "77777777-0000-4000-8000-0000000000aa"
    orphan = root / "responder" / "77777777-0000-4000-8000-0000000000bb"
    for directory in (undecodable, orphan):
        directory.mkdir()
    (undecodable / "token").write_text("?")
    os.utime(orphan, (UNIX - 59, UNIX - 59))
    foreign = root / "responder" / "notes"
    foreign.mkdir()
    spool.prune(UNIX)
    assert not (root / "responder" / OTHER).exists()
    assert all(path.exists() for path in (root / "responder" / ID, undecodable, orphan, foreign))
    spool.prune(UNIX + 1)
    assert not orphan.exists()
    spool.prune(CLAIMS["exp"] - 1)
    assert (root / "responder" / ID).exists()
    spool.prune(CLAIMS["exp"])
    assert not (root / "responder" / ID).exists()
    assert undecodable.exists()


def test_names_that_are_not_ours_are_left_alone(spool, root):
    directory = root / "responder" / ID
    (directory / "README").write_text("x")
    (directory / ".half.start.json.tmp").write_text("x")
    os.utime(directory / ".half.start.json.tmp", (UNIX - 61, UNIX - 61))
    assert spool.waiting() == []
    assert spool.batch(directory, 10) is None
    spool.prune(UNIX)
    assert sorted(os.listdir(directory)) == ["README", "token"]


# -- the writer


class StuckSpool(Spool):
    """A disk that hangs until `released`, or refuses everything with `error`."""

    def __init__(self, root):
        super().__init__(root)
        self.released = threading.Event()
        self.released.set()
        self.error = None

    def store(self, record):
        self.released.wait()
        if self.error:
            raise self.error
        super().store(record)


@pytest.fixture(name="stuck")
def stuck_fixture(root):
    return StuckSpool(root)


@pytest.fixture(name="writer")
def writer_fixture(stuck):
    thread = ThreadPool(1)
    writer = FlowWriter(stuck, thread)
    writer.start()
    yield writer
    stuck.released.set()
    writer.close()
    thread.kill()


def test_tokens_records_and_settings_arrive_in_order(writer, root):
    writer.configure(UploadConfig(api_url="https://x/", interval=60, batch_size=10))
    writer.put(attribution())
    writer.put(started())
    writer.close()
    assert len(files(root)) == 3
    assert writer.dropped == 0


@pytest.mark.slow
def test_a_hanging_disk_never_makes_anybody_wait_and_the_queue_has_an_end(writer, stuck, root, monkeypatch, caplog):
    monkeypatch.setattr(flow_writer, "MAX_QUEUED", 100)
    writer.put(attribution())
    wait_until(lambda: files(root))
    stuck.released.clear()
    before = time.monotonic()
    for number in range(1200):
        writer.put(started(number))
    assert time.monotonic() - before < 0.5
    gevent.sleep(0.01)
    for number in range(2000, 2100):
        writer.put(started(number))
    assert writer.dropped > 1000
    assert caplog.text.count("A flow record is not kept") == 2, "the first and every thousandth"
    stuck.released.set()
    writer.close()
    assert len(files(root)) == 1 + 1200 + 100 - writer.dropped


def test_the_queue_holds_ten_thousand():
    assert flow_writer.MAX_QUEUED == 10_000


@pytest.mark.slow
def test_a_full_disk_costs_records_and_one_warning_in_a_thousand(writer, stuck, root, caplog):
    writer.put(attribution())
    wait_until(lambda: files(root))
    stuck.error = OSError(28, "No space left on device")
    for number in range(300):
        writer.put(started(number))
    wait_until(lambda: writer.dropped == 300)
    assert caplog.text.count("No space left on device") == 1
    stuck.error = None
    writer.put(started(500))
    writer.close()
    assert len(files(root)) == 2


def test_the_end_waits_for_the_disk_but_not_for_ever(writer, stuck, root, caplog):
    writer.put(attribution())
    wait_until(lambda: files(root))
    stuck.released.clear()
    writer.put(started())
    before = time.monotonic()
    writer.close(wait=0.1)
    assert 0.09 < time.monotonic() - before < 0.5
    assert "lost" in caplog.text


def test_a_token_reaches_no_log(writer, stuck, root, caplog):
    caplog.set_level(0)
    writer.put(attribution())
    wait_until(lambda: files(root))
    stuck.error = OSError(5, "Input/output error")
    writer.put(started())
    wait_until(lambda: writer.dropped)
    assert base64url(CLAIMS)[:40] not in caplog.text
    assert caplog.text
