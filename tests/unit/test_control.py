"""The control protocol's packets."""

from __future__ import annotations

import pytest

from fzg.wire import Malformed, control, ip
from tests.unit.tunnel_world import control as make
from tests.unit.tunnel_world import packed, udp, v6

RESOURCE = "5f1c3d8e-6b1a-4a39-9d26-0c2b7e9a4410"
PROXIES = (
    *(f"100.96.0.{number}" for number in (9, 10, 11, 12)),
    *(f"fd00:2021:1111:8000::{digit}" for digit in "89ab"),
)
EXAMPLE = (
    b'{"resource":"5f1c3d8e-6b1a-4a39-9d26-0c2b7e9a4410","domain":"db.corp.example",'
    b'"proxy_ips":["100.96.0.9","100.96.0.10","100.96.0.11","100.96.0.12",'
    b'"fd00:2021:1111:8000::8","fd00:2021:1111:8000::9","fd00:2021:1111:8000::a","fd00:2021:1111:8000::b"]}'
)
STATUS = b'{"resource":"5f1c3d8e-6b1a-4a39-9d26-0c2b7e9a4410","domain":"db.corp.example","status":"Active"}'


def parse(data: bytes):
    packet = ip.parse(data)
    assert control.is_control(packet)
    return control.parse(packet)


def assigned(payload: bytes):
    return parse(make(0, payload))


@pytest.mark.spec("TUNNEL-54")
def test_goodbye_is_exactly_these_48_bytes():
    expected = bytes.fromhex("600000000008ff00") + bytes(32) + bytes.fromhex("0200000000000000")
    assert control.encode(control.Goodbye()) == expected
    assert parse(expected) == control.Goodbye()


def test_the_assigned_ips_example():
    packet = make(0, EXAMPLE)
    assert (len(EXAMPLE), len(packet)) == (247, 295)
    assert packet[:8] == bytes.fromhex("6000000000ffff00")
    event = parse(packet)
    assert event == control.AssignedIps(RESOURCE, "db.corp.example", tuple(packed(text) for text in PROXIES))
    assert control.encode(event) == packet


def test_the_domain_status_example():
    event = control.DomainStatus(RESOURCE, "db.corp.example", control.Status.ACTIVE)
    packet = control.encode(event)
    assert packet == bytes.fromhex("600000000068ff00") + bytes(32) + bytes.fromhex("0100000000000000") + STATUS
    assert (len(STATUS), len(packet)) == (96, 144)
    assert parse(packet) == event


def test_an_unknown_status_counts_as_inactive():
    assert parse(make(1, STATUS.replace(b"Active", b"Later"))).status is control.Status.INACTIVE


def test_recognition_looks_at_protocol_and_addresses_only():
    assert control.is_control(ip.parse(make(9, hop_limit=64, filler=b"\xff" * 7)))
    assert control.is_control(ip.parse(v6("::", "::", 60, b"\xff\0" + bytes(6) + bytes(8))))
    assert control.is_control(ip.parse(v6("::", "::", 255, bytes(8), traffic_class=0xFF)))
    assert not control.is_control(ip.parse(v6("::1", "::", 255, bytes(8))))
    assert not control.is_control(ip.parse(v6("::", "::1", 255, bytes(8))))
    assert not control.is_control(ip.parse(v6("::", "::", 254, bytes((255, 0)) + bytes(6))))
    assert not control.is_control(ip.parse(udp("::", "::", 1, 2)))


@pytest.mark.parametrize("size", range(8))
def test_an_event_that_is_cut_is_no_control_packet(size):
    assert not control.is_control(ip.parse(v6("::", "::", 255, bytes(size))))


def test_unknown_types_are_named_as_such():
    assert parse(make(7, b"\xff\xfe")) == control.Unknown(7)


def test_duplicates_are_removed_in_order():
    event = assigned(
        b'{"resource":"%s","domain":"a","proxy_ips":["100.96.0.2","100.96.0.1","100.96.0.2"]}' % RESOURCE.encode()
    )
    assert event.proxy_ips == (packed("100.96.0.2"), packed("100.96.0.1"))


def test_unknown_fields_are_ignored_and_other_uuid_forms_understood():
    event = assigned(b'{"resource":"%s","x":[{"y":1}],"domain":"a.","proxy_ips":[]}' % RESOURCE.upper().encode())
    assert event == control.AssignedIps(RESOURCE, "a.", ())


def test_upper_case_is_kept_for_the_echo():
    event = assigned(EXAMPLE.replace(b"db.corp", b"DB.Corp"))
    assert event.domain == "DB.Corp.example"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + EXAMPLE,
        EXAMPLE[:-1],
        EXAMPLE + b"x",
        EXAMPLE.replace(b"db.corp", b"db\xffcorp"),
        EXAMPLE.replace(b'"db.corp.example"', b"7"),
        EXAMPLE.replace(b'"db.corp.example"', b"null"),
        EXAMPLE.replace(b"proxy_ips", b"proxies"),
        EXAMPLE.replace(b'"100.96.0.9"', b"100"),
        EXAMPLE.replace(b"100.96.0.9", b"100.96.0.900"),
        EXAMPLE.replace(b"5f1c3d8e-", b""),
        b'{"x":' + b"[" * 1200,
    ],
)
def test_a_bad_payload_is_malformed(payload):
    with pytest.raises(Malformed):
        assigned(payload)


@pytest.mark.parametrize(
    "domain",
    [
        "",
        ".",
        "a..b",
        ".a",
        "a..",
        "a b",
        "a\\\\.b",  # a quoted dot in JSON
        "b\\u00fccher.example",
        "a\\u0000b",
        "x" * 64,
        ".".join(["x" * 49] * 6),
    ],
)
def test_a_domain_is_a_host_name(domain):
    with pytest.raises(Malformed):
        assigned(EXAMPLE.replace(b"db.corp.example", domain.encode()))


def test_the_longest_domain_passes():
    domain = ".".join(["x" * 63] * 3 + ["y" * 61])
    assert len(domain) == 253
    assert assigned(EXAMPLE.replace(b"db.corp.example", domain.encode() + b".")).domain == domain + "."
