"""Inner packets: validation, protocol values, rewriting, ECN."""

from __future__ import annotations

import struct

import pytest

from fzg.wire import Malformed, ip
from tests.unit.tunnel_world import (
    A4,
    A6,
    ACK,
    SYN,
    addresses,
    checksums_hold,
    echo,
    gre,
    icmp,
    packed,
    ports,
    tcp,
    udp,
    v4,
    v6,
)

SERVER4, SERVER6 = "10.0.0.5", "2001:db8::5"


def message(data: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        ip.parse(data)
    return str(caught.value)


def test_tcp_and_udp_values_are_tagged_ports():
    parsed = ip.parse(tcp(A4, SERVER4, 5000, 443, SYN))
    assert (parsed.version, parsed.protocol, parsed.l4_offset) == (4, 6, 20)
    assert (parsed.source, parsed.destination) == (packed(A4), packed(SERVER4))
    assert (parsed.source_value, parsed.destination_value) == (6 << 16 | 5000, 6 << 16 | 443)
    assert parsed.tcp_flags == SYN
    parsed = ip.parse(udp(A6, SERVER6, 1, 65535))
    assert (parsed.version, parsed.protocol, parsed.l4_offset) == (6, 17, 40)
    assert (parsed.source_value, parsed.destination_value) == (17 << 16 | 1, 17 << 16 | 65535)


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize(("source", "destination"), [(A4, SERVER4), (A6, SERVER6)])
def test_echo_has_the_identifier_in_both_directions(source, destination, reply):
    parsed = ip.parse(echo(source, destination, 0xABCD, reply=reply))
    assert parsed.source_value == parsed.destination_value == 1 << 16 | 0xABCD


@pytest.mark.parametrize(
    "data",
    [
        gre(A4, SERVER4),
        gre(A6, SERVER6),
        icmp(A4, SERVER4, 13, 0, payload=bytes(12)),
        icmp(A4, SERVER4, 8, 1),
        icmp(A6, SERVER6, 128, 1),
        icmp(A4, SERVER4, 128, 0),
        icmp(A6, SERVER6, 8, 0),
        v6(A6, SERVER6, 59, b""),
        v6(A6, SERVER6, 50, b"\x06\0\0\0\0\0\0\0"),
        v6(A6, SERVER6, 51, b"\x06\0\0\0\0\0\0\0"),
        v4(A4, SERVER4, 99, b""),
    ],
)
def test_anything_else_is_accepted_without_a_value(data):
    parsed = ip.parse(data)
    assert parsed.source_value is None
    assert parsed.destination_value is None


def test_length_limits():
    assert ip.parse(udp(A4, SERVER4, 1, 2, bytes(1280 - 28)))
    assert "1281 bytes" in message(udp(A4, SERVER4, 1, 2, bytes(1281 - 28)))
    assert "0 bytes" in message(b"")


@pytest.mark.parametrize("version", [0, 1, 5, 7, 15])
def test_other_versions_are_malformed(version):
    assert f"version {version}" in message(bytes((version << 4,)) + bytes(60))


def test_an_ipv4_header_must_be_whole():
    good = udp(A4, SERVER4, 1, 2)
    assert "less than 20" in message(good[:19])
    assert "less than 20" in message(b"\x46" + good[1:19])
    assert "header length" in message(b"\x44" + good[1:])
    assert "header length" in message(b"\x4f" + good[1:])


def test_ipv4_total_length_is_exact():
    assert "total length" in message(v4(A4, SERVER4, 99, bytes(40), total=59))
    assert "total length" in message(v4(A4, SERVER4, 99, bytes(40), total=61))
    assert "total length" in message(v4(A4, SERVER4, 99, b"", total=21))
    assert "total length" in message(v4(A4, SERVER4, 99, bytes(8), options=bytes(4), total=20))


@pytest.mark.parametrize("options", [b"", b"\x01\x01\x01\x00"])
def test_ipv4_fragments_are_their_own_kind_of_malformed(options):
    for fragment in (0x2000, 185, 1, 0x3FFF, 0x6001):
        with pytest.raises(ip.Fragment):
            ip.parse(udp(A4, SERVER4, 1, 2, fragment=fragment, options=options))
    for harmless in (0, 0x4000, 0x8000, 0xC000):
        assert ip.parse(udp(A4, SERVER4, 1, 2, fragment=harmless, options=options))


def test_ipv4_options_move_the_transport():
    parsed = ip.parse(udp(A4, SERVER4, 7, 9, options=bytes(40)))
    assert parsed.l4_offset == 60
    assert parsed.destination_value == 17 << 16 | 9


def test_ipv6_payload_length_is_exact():
    assert "less than 40" in message(udp(A6, SERVER6, 1, 2)[:39])
    assert "payload length" in message(v6(A6, SERVER6, 99, bytes(8), length=7))
    assert "payload length" in message(v6(A6, SERVER6, 99, bytes(8), length=9))


def extension(next_header: int, size: int = 8) -> bytes:
    return bytes((next_header, size // 8 - 1)) + bytes(size - 2)


@pytest.mark.parametrize("kind", [0, 43, 60, 135, 139, 140, 253, 254])
def test_extension_headers_are_walked(kind):
    inner = udp(A6, SERVER6, 7, 9)[40:]
    parsed = ip.parse(v6(A6, SERVER6, kind, extension(17, 16) + inner))
    assert (parsed.protocol, parsed.l4_offset, parsed.source_value) == (17, 56, 17 << 16 | 7)
    parsed = ip.parse(v6(A6, SERVER6, kind, extension(60) + extension(17, 24) + inner))
    assert parsed.l4_offset == 72


def test_an_extension_header_may_not_run_past_the_packet():
    assert "runs past" in message(v6(A6, SERVER6, 0, extension(17, 16)[:8]))
    assert "runs past" in message(v6(A6, SERVER6, 0, b"\x11\x00\0\0"))
    assert "runs past" in message(v6(A6, SERVER6, 0, b""))


def test_only_atomic_ipv6_fragments_pass():
    inner = udp(A6, SERVER6, 7, 9)[40:]

    def fragment(bits):
        return v6(A6, SERVER6, 44, struct.pack("!BBHI", 17, 0, bits, 77) + inner)

    assert ip.parse(fragment(0)).l4_offset == 48
    assert ip.parse(fragment(0b110)).protocol == 17  # reserved bits
    for bits in (1, 8, 9, 0xFFF8):
        with pytest.raises(ip.Fragment):
            ip.parse(fragment(bits))


@pytest.mark.parametrize("make", [lambda l4: v4(A4, SERVER4, 17, l4), lambda l4: v6(A6, SERVER6, 17, l4)])
def test_udp_length_is_exact(make):
    assert ip.parse(make(struct.pack("!HHHH", 1, 2, 8, 0)))
    assert "less than 8" in message(make(bytes(7)))
    for length in (0, 7, 8, 19, 21, 65535):
        assert "UDP length" in message(make(struct.pack("!HHHH", 1, 2, length, 0) + bytes(12)))


@pytest.mark.parametrize("make", [lambda l4: v4(A4, SERVER4, 6, l4), lambda l4: v6(A6, SERVER6, 6, l4)])
def test_tcp_headers_are_bounded(make):
    def segment(offset, size):
        return make((bytes(12) + bytes((offset << 4, 0)) + bytes(60))[:size])

    assert "less than 20" in message(segment(5, 19))
    assert "less than 20" in message(segment(5, 7))
    assert ip.parse(segment(5, 20))
    for offset in (0, 4):
        assert "data offset" in message(segment(offset, 20))
    assert "data offset" in message(segment(6, 23))
    assert ip.parse(segment(6, 24))
    assert ip.parse(segment(15, 60))


def test_icmp_has_eight_bytes_and_the_right_family():
    assert "ICMP header" in message(v4(A4, SERVER4, 1, bytes(7)))
    assert "ICMP header" in message(v6(A6, SERVER6, 58, bytes(7)))
    assert "other IP family" in message(v4(A4, SERVER4, 58, bytes(8)))
    assert "other IP family" in message(v6(A6, SERVER6, 1, bytes(8)))
    assert "other IP family" in message(v4(A4, SERVER4, 58, bytes(2)))


def test_bytearrays_are_parsed_alike():
    data = udp(A4, SERVER4, 5, 6)
    assert ip.parse(bytearray(data)).destination_value == 17 << 16 | 6


def test_payload_length_leaves_out_the_transport_header():
    assert ip.parse(udp(A4, SERVER4, 1, 2, b"12345")).payload_length == 5
    assert ip.parse(tcp(A6, SERVER6, 1, 2, ACK, b"options!" + b"123", data_offset=7)).payload_length == 3
    assert ip.parse(gre(A4, SERVER4)).payload_length == 12


REWRITTEN = [
    udp(A4, "100.96.0.1", 5000, 80),
    tcp(A4, "100.96.0.1", 5000, 80, SYN, b"payload"),
    echo(A4, "100.96.0.1", 5000),
    udp(A4, "100.96.0.1", 5000, 80, options=bytes(8)),
]
REWRITTEN_V6 = [
    udp(A6, "fd00:2021:1111:8000::1", 5000, 80),
    tcp(A6, "fd00:2021:1111:8000::1", 5000, 80, SYN, b"payload"),
    echo(A6, "fd00:2021:1111:8000::1", 5000),
]


@pytest.mark.parametrize("data", REWRITTEN + REWRITTEN_V6)
def test_rewriting_keeps_checksums_valid_and_touches_nothing_else(data):
    server, client = (SERVER4, "100.64.0.9") if data[0] >> 4 == 4 else (SERVER6, "fd00:2021:1111::9")
    parsed = ip.parse(data)
    out = ip.rewrite_to_network(parsed, packed(server), 6000)
    assert checksums_hold(out)
    assert addresses(out) == (addresses(data)[0], server)
    again = ip.parse(out)
    assert again.source_value & 0xFFFF == 6000
    back = ip.rewrite_to_network(again, parsed.destination, parsed.source_value & 0xFFFF)
    assert back == data
    inward = ip.rewrite_to_client(parsed, packed(client), 6001)
    assert checksums_hold(inward)
    assert addresses(inward) == (client, addresses(data)[1])
    assert ip.parse(inward).destination_value & 0xFFFF == 6001
    if parsed.protocol in (6, 17):
        assert ip.parse(out).destination_value == parsed.destination_value
        assert ip.parse(inward).source_value == parsed.source_value


def test_a_wrong_checksum_is_not_repaired_by_rewriting():
    data = bytearray(tcp(A4, "100.96.0.1", 5000, 80))
    data[36] ^= 0x55
    out = ip.rewrite_to_network(ip.parse(bytes(data)), packed(SERVER4), 5000)
    assert not checksums_hold(out)


def test_a_udp_checksum_of_zero_stays_zero():
    for source, destination, server in ((A4, "100.96.0.1", SERVER4), (A6, "fd00:2021:1111:8000::1", SERVER6)):
        parsed = ip.parse(udp(source, destination, 5000, 80, checksum=0))
        out = ip.rewrite_to_network(parsed, packed(server), 6000)
        offset = parsed.l4_offset
        assert out[offset + 6 : offset + 8] == b"\0\0"
        assert ports(out) == (6000, 80)


def test_a_computed_zero_becomes_all_ones():
    # Search the port that makes the sum come out as zero.
    base = ip.parse(udp(A4, "100.96.0.1", 5000, 80))
    seen = {ip.rewrite_to_network(base, packed(SERVER4), port)[26:28] for port in range(65536)}
    assert b"\0\0" not in seen
    assert b"\xff\xff" in seen


def test_valid_checksums_are_told_from_wrong_ones():
    for data in REWRITTEN + REWRITTEN_V6 + [gre(A4, SERVER4), udp(A4, SERVER4, 1, 2, checksum=0)]:
        assert ip.has_valid_checksums(ip.parse(data))
    for data, offset in ((udp(A4, SERVER4, 1, 2), 10), (udp(A4, SERVER4, 1, 2), 26), (echo(A6, SERVER6, 1), 42)):
        broken = bytearray(data)
        broken[offset] ^= 1
        assert not ip.has_valid_checksums(ip.parse(broken))


@pytest.mark.parametrize("codepoint", [0, 1, 2, 3])
def test_congestion_marks_only_what_is_capable(codepoint):
    for data in (udp(A4, SERVER4, 1, 2, tos=0xB8 | codepoint), udp(A6, SERVER6, 1, 2, traffic_class=0xB8 | codepoint)):
        assert ip.ecn_of(data) == codepoint
        marked = ip.mark_ce(data)
        assert ip.ecn_of(marked) == (3 if codepoint else 0)
        assert checksums_hold(marked)
        differing = [index for index, (old, new) in enumerate(zip(data, marked, strict=True)) if old != new]
        assert set(differing) <= ({1, 10, 11} if data[0] >> 4 == 4 else {1})
        if codepoint in (0, 3):
            assert marked is data
