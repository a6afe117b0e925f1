from __future__ import annotations

import json
import logging
import re
import zlib

import pytest

from fzg.ops import flow_logs, logs
from fzg.tunnel.flow_record import Figures, FlowRecord, Outer, timestamp
from fzg.wire.endpoint import Endpoint
from tests.unit.flow_log_world import CLAIMS, attribution
from tests.unit.tunnel_world import packed

TCP, UDP = 6 << 16, 17 << 16
START = 1787217302.120443  # 2026-08-20T09:15:02.120443Z

# Tunnel 10.4, without its blanks; the CRC is of tunnel 10.5.
EXAMPLE = (
    '{"domain":"db.corp.example","flow_start":"2026-08-20T09:15:02.120443Z","inner_dst_ip":"10.20.0.7",'
    '"inner_dst_port":5432,"inner_src_ip":"100.64.0.9","inner_src_port":51514,"outers":[{"dst_ip":"203.0.113.9",'
    '"dst_port":52625,"path_activated_at":"2026-08-20T09:15:02.120443Z","src_ip":"198.51.100.20","src_port":52625}],'
    '"protocol":"tcp"}'
)
FIGURES = Figures(START + 2, START + 1.5, 3, 4, 300, 100)


def record(**changes) -> FlowRecord:
    values = {
        "attribution": attribution(),
        "source": packed("100.64.0.9"),
        "destination": packed("10.20.0.7"),
        "source_value": TCP | 51514,
        "destination_value": TCP | 5432,
        "domain": "db.corp.example",
        "outers": (Outer(Endpoint.of("198.51.100.20", 52625), Endpoint.of("203.0.113.9", 52625), START),),
        "flow_start": START,
    }
    return FlowRecord(**values | changes)


def test_the_payload_of_a_started_flow_is_the_specifications():
    text = json.dumps(record().payload(), sort_keys=True, separators=(",", ":"))
    assert text == EXAMPLE
    assert zlib.crc32(text.encode()) == 658676767


def test_a_completed_flow_carries_all_figures():
    payload = record(figures=FIGURES).payload()
    assert {name: payload.pop(name) for name in ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes")} == {
        "rx_packets": 3,
        "tx_packets": 4,
        "rx_bytes": 300,
        "tx_bytes": 100,
    }
    assert payload.pop("flow_end") == "2026-08-20T09:15:04.120443Z"
    assert payload.pop("last_packet") == "2026-08-20T09:15:03.620443Z"
    assert payload == json.loads(EXAMPLE)


def test_a_flow_without_a_name_has_no_domain_and_ipv6_is_text():
    payload = record(domain="", source=packed("fd00::1"), destination=packed("2001:db8::7")).payload()
    assert "domain" not in payload
    assert (payload["inner_src_ip"], payload["inner_dst_ip"]) == ("fd00::1", "2001:db8::7")


@pytest.mark.parametrize(
    ("unix", "text"),
    [
        (1787217302.0, "2026-08-20T09:15:02Z"),
        (1787217302.25, "2026-08-20T09:15:02.250Z"),
        (1787217302.000001, "2026-08-20T09:15:02.000001Z"),
    ],
)
def test_times_have_as_many_digits_as_they_need(unix, text):
    assert timestamp(unix) == text


def test_start_and_completion_share_a_stem_and_other_flows_do_not():
    started, completed = record(), record(figures=FIGURES)
    assert re.fullmatch(r"1787217302-[0-9a-f]{16}", started.stem)
    assert started.stem == completed.stem
    others = [
        record(source_value=UDP | 51514, destination_value=UDP | 5432),
        record(source_value=TCP | 51515),
        record(destination=packed("10.20.0.8")),
        record(flow_start=START + 0.001),
    ]
    assert len({started.stem, *(other.stem for other in others)}) == 5
    assert record(flow_start=7.5).stem.startswith("0000000007-")


@pytest.fixture
def printed(caplog):
    """What is printed for a record, in both formats."""
    caplog.set_level(5, logger="flow_logs")

    def both(one):
        caplog.clear()
        flow_logs.print_record(one)
        (entry,) = caplog.records
        return logs.HumanFormatter().format(entry), json.loads(logs.JsonLineFormatter().format(entry))

    return both


@pytest.mark.spec("OPS-38")
@pytest.mark.parametrize(("value", "name"), [(TCP, "TCP"), (UDP, "UDP")])
def test_records_are_printed_at_trace_with_the_specified_messages_and_fields(printed, value, name):
    fields = {
        "protocol": name.lower(),
        "role": "responder",
        **{
            claim: CLAIMS[claim]
            for claim in (
                "initiator_device_id", "responder_device_id", "policy_authorization_id", "policy_id", "resource_id",
                "resource_name", "resource_address", "initiator_actor_id", "initiator_actor_email",
                "initiator_actor_name", "authorized_at", "authorization_expires_at",
            )
        },
        "inner_src_ip": "100.64.0.9",
        "inner_src_port": 51514,
        "inner_dst_ip": "10.20.0.7",
        "inner_dst_port": 5432,
        "domain": "db.corp.example",
        "flow_start": "2026-08-20T09:15:02.120443Z",
    }  # fmt: skip
    values = {"source_value": value | 51514, "destination_value": value | 5432}
    human, line = printed(record(**values))
    assert re.match(r"^\S+ TRACE flow_logs: " + name + " flow started ", human)
    assert (line["target"], line["level"], line["message"]) == ("flow_logs", "TRACE", f"{name} flow started")
    assert {key: line[key] for key in fields} == fields
    assert "flow_end" not in line

    human, line = printed(record(**values, figures=FIGURES))
    assert re.search(f"flow_logs.*{name} flow completed", human)
    assert {key: line[key] for key in fields} == fields
    assert (line["rx_packets"], line["tx_packets"], line["rx_bytes"], line["tx_bytes"]) == (3, 4, 300, 100)
    assert line["flow_end"] == "2026-08-20T09:15:04.120443Z"
    assert line["last_packet"] == "2026-08-20T09:15:03.620443Z"
    assert json.loads(line["outers"]) == json.loads(EXAMPLE)["outers"]


@pytest.mark.spec("OPS-38")
def test_what_tooling_splits_at_blanks_is_unquoted_and_has_none(printed):
    words = dict(word.split("=", 1) for word in printed(record(figures=FIGURES))[0].split(" ") if "=" in word)
    assert words["inner_dst_ip"] == "10.20.0.7"
    assert words["domain"] == "db.corp.example"
    assert words["rx_bytes"] == "300"
    assert json.loads(words["outers"])[0]["src_port"] == 52625


@pytest.mark.spec("TUNNEL-98")
def test_the_token_is_not_printed(printed):
    human, line = printed(record())
    assert record().attribution.token.reveal() not in human
    assert "signature" not in json.dumps(line)


def test_nothing_is_made_up_when_nobody_listens(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="flow_logs")
    monkeypatch.setattr(FlowRecord, "fields", lambda self: pytest.fail("fields were made"))
    flow_logs.print_record(record())
