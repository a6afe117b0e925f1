"""`--validate-checksums`: wrong checksums of packets from the TUN are told, and nothing else changes."""

from __future__ import annotations

import logging

import pytest

from fzg.dataplane.pure import PureEngine
from fzg.ops.checksums import validating
from fzg.ops.wire_trace import traced
from tests.unit.dataplane_world import SERVER6, echo, ip, tcp, udp

CLIENT6 = bytes.fromhex("fd002021111100000000000000000009")


def broken(packet: bytes, at: int) -> bytes:
    return packet[:at] + bytes((packet[at] ^ 0x10,)) + packet[at + 1 :]


def read(packet: bytes) -> list:
    return list(validating(PureEngine()).handle_packet(packet, 1.0))


@pytest.mark.parametrize(
    "packet", [udp(), udp(zero_checksum=True), tcp(), echo(), udp(source=CLIENT6, destination=SERVER6), b"\x45", b""]
)
def test_right_checksums_and_packets_that_are_none_are_not_told_of(caplog, packet):
    caplog.set_level(logging.DEBUG)
    read(packet)
    assert not caplog.records


@pytest.mark.parametrize(
    ("packet", "protocol"),
    [
        (broken(udp(), 11), "UDP"),  # of the IPv4 header
        (broken(udp(), 26), "UDP"),
        (broken(tcp(b"payload"), 42), "TCP"),
        (broken(udp(source=CLIENT6, destination=SERVER6), 46), "UDP"),
    ],
)
def test_a_wrong_checksum_is_a_warning_and_the_packet_goes_on_as_it_was(caplog, packet, protocol):
    (item,) = read(packet)
    assert item.packet == packet
    (record,) = caplog.records
    assert (record.levelno, record.protocol, record.num_bytes) == (logging.WARNING, protocol, len(packet))
    assert "100.64" not in record.getMessage(), "addresses of users are nobody's business in a log"


def test_who_sent_it_is_told_at_debug(caplog):
    caplog.set_level(logging.DEBUG)
    read(broken(udp(), 26))
    assert "UDP 100.64.0.9:50000 > 10.0.0.5:53" in caplog.records[1].getMessage()


def test_the_engine_behind_it_and_the_wire_trace_is_known_by_its_own_class(caplog):
    caplog.set_level(5, logger="wire.dev.recv")
    engine = traced(validating(PureEngine()))
    assert isinstance(engine, PureEngine)
    engine.handle_packet(broken(udp(), 26), 1.0)
    assert {record.name for record in caplog.records} == {"fzg.ops.checksums", "wire.dev.recv"}


def test_what_has_neither_tcp_nor_udp_nor_icmp_has_no_checksum_of_its_own(caplog):
    read(ip(CLIENT6, SERVER6, 47, b"tunnelled"))
    assert not caplog.records
