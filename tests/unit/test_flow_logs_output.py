"""What leaves the process: files only where token and settings allow them."""

from __future__ import annotations

import json
import logging

import pytest

from fzg.ops.flow_logs import FlowLogs
from fzg.portal.messages import FlowLogs as Settings
from tests.lab.scripted_portal import wait_until
from tests.unit.flow_log_world import attribution
from tests.unit.test_flow_record import record
from tests.unit.test_flow_spool import files


@pytest.fixture(name="root")
def root_fixture(tmp_path):
    return tmp_path / "flow_logs"


@pytest.fixture(name="output")
def output_fixture(root):
    def unreachable(_host):
        raise ValueError("no network in this test")

    output = FlowLogs(unreachable, root=root)
    output._writer.start()
    yield output
    output.close()


def settings(interval=60, batch_size=0):
    return Settings(api_url="https://flows.example.com/", upload_interval_secs=interval, upload_batch_size=batch_size)


def kept(root):
    return json.loads((root / "upload.json").read_text())


@pytest.mark.spec("TUNNEL-96")
def test_a_token_that_allows_no_uploads_leaves_no_files(output, root):
    output.configure(settings())
    private = attribution(uploads_enabled=False)
    output.keep(private)
    output.write(record(attribution=private))
    output.close()
    assert files(root) == ["upload.json"]


@pytest.mark.spec("TUNNEL-96")
def test_the_end_of_uploads_removes_the_settings_and_stops_the_spooling(output, root):
    output.configure(settings())
    output.keep(attribution())
    output.write(record())
    wait_until(lambda: len(files(root)) == 3)
    output.configure(None)
    output.write(record(flow_start=1.0))
    wait_until(lambda: not (root / "upload.json").exists())
    output.close()
    assert len(files(root)) == 2


@pytest.mark.parametrize(("wanted", "used"), [(0, 1000), (1, 1), (10_000, 10_000), (10_001, 10_000), (1 << 64, 10_000)])
def test_the_batch_size_has_a_default_and_a_limit(output, root, wanted, used):
    output.configure(settings(batch_size=wanted))
    wait_until((root / "upload.json").exists)
    assert kept(root) == {"api_url": "https://flows.example.com/", "interval": 60, "batch_size": used}


def test_records_are_printed_whether_they_are_kept_or_not(output, caplog):
    caplog.set_level(5, logger="flow_logs")
    output.write(record(attribution=attribution(uploads_enabled=False)))
    assert [entry.getMessage() for entry in caplog.records] == ["TCP flow started"]


def test_only_changed_settings_wake_the_uploader(output, root, monkeypatch):
    woken = []
    output._writer._on_configured = lambda: woken.append(1)
    for interval in (60, 60, 30):
        output.configure(settings(interval=interval))
        wait_until(lambda interval=interval: (root / "upload.json").exists() and kept(root)["interval"] == interval)
        wait_until(output._writer._idle.is_set)
    assert len(woken) == 2


def test_what_an_earlier_run_left_is_looked_at_at_once(output, root, caplog):
    caplog.set_level(logging.INFO)
    output.configure(settings())
    lasting = attribution(exp=1 << 40)
    output.keep(lasting)
    output.write(record(attribution=lasting))
    wait_until(lambda: len(files(root)) == 3)
    output._uploader.start()
    wait_until(lambda: "collector flows.example.com cannot be reached" in caplog.text)
