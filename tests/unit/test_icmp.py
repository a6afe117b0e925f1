"""ICMP errors inside the tunnel: recognised, generated, translated."""

from __future__ import annotations

import struct

import pytest

from fzg.wire import icmp as module
from fzg.wire import ip
from tests.unit.tunnel_world import (
    A4,
    A6,
    addresses,
    checksums_hold,
    echo,
    gre,
    icmp,
    naive_checksum,
    packed,
    tcp,
    udp,
    v4,
    v6,
)

ROUTER4, ROUTER6, SERVER4, SERVER6 = "203.0.113.1", "2001:db8::1", "10.0.0.5", "2001:db8::5"
EMBEDDED4 = udp(A4, SERVER4, 5000, 80, b"12345678")
EMBEDDED6 = tcp(A6, SERVER6, 5000, 80)


def recognise(data: bytes):
    return module.recognise(ip.parse(data))


@pytest.mark.parametrize(("kind", "code"), [(3, 0), (3, 3), (3, 4), (3, 200), (11, 0), (11, 1), (11, 77)])
def test_ipv4_errors_are_recognised_whatever_their_code(kind, code):
    error = recognise(icmp(ROUTER4, A4, kind, code, b"\0\0\x05\x00", EMBEDDED4))
    assert (error.type, error.code, error.rest) == (kind, code, b"\0\0\x05\x00")
    assert (error.source, error.destination) == (packed(A4), packed(SERVER4))
    assert (error.source_value, error.destination_value) == (17 << 16 | 5000, 17 << 16 | 80)
    assert error.embedded == EMBEDDED4


@pytest.mark.parametrize(("kind", "code"), [(1, 0), (1, 4), (1, 99), (2, 0), (3, 0), (3, 1)])
def test_ipv6_errors_are_recognised(kind, code):
    error = recognise(icmp(ROUTER6, A6, kind, code, b"\0\0\x05\x00", EMBEDDED6))
    assert (error.type, error.code) == (kind, code)
    assert (error.source_value, error.destination_value) == (6 << 16 | 5000, 6 << 16 | 80)


def test_an_embedded_echo_request_counts_by_its_identifier():
    error = recognise(icmp(ROUTER4, A4, 3, 1, payload=echo(A4, SERVER4, 777)))
    assert error.source_value == error.destination_value == 1 << 16 | 777
    error = recognise(icmp(ROUTER6, A6, 1, 3, payload=echo(A6, SERVER6, 778)))
    assert error.source_value == 1 << 16 | 778


def test_embedded_transport_may_be_cut_after_the_ports():
    assert recognise(icmp(ROUTER4, A4, 3, 1, payload=EMBEDDED4[:24])).source_value == 17 << 16 | 5000
    assert recognise(icmp(ROUTER6, A6, 1, 3, payload=EMBEDDED6[:44])).source_value == 6 << 16 | 5000
    assert recognise(icmp(ROUTER4, A4, 3, 1, payload=echo(A4, SERVER4, 777)[:28])).source_value == 1 << 16 | 777


def test_embedded_headers_of_variable_length_are_honoured():
    error = recognise(icmp(ROUTER4, A4, 3, 1, payload=udp(A4, SERVER4, 5000, 80, options=bytes(12))))
    assert (error.source_value, error.l4_offset) == (17 << 16 | 5000, 32)
    chain = v6(A6, SERVER6, 60, b"\x11\0" + bytes(6) + udp(A6, SERVER6, 5000, 80)[40:])
    error = recognise(icmp(ROUTER6, A6, 1, 3, payload=chain))
    assert (error.source_value, error.l4_offset) == (17 << 16 | 5000, 48)


@pytest.mark.parametrize(
    "data",
    [
        udp(A4, SERVER4, 1, 2),
        gre(A4, SERVER4),
        echo(A4, SERVER4, 1),
        echo(A4, SERVER4, 1, reply=True),
        echo(A6, SERVER6, 1, reply=True),
        icmp(A4, SERVER4, 8, 7),
        icmp(A6, SERVER6, 129, 7),
    ],
)
def test_what_is_no_icmp_or_echo_is_no_error(data):
    assert recognise(data) is module.NotAnError.OTHER


@pytest.mark.parametrize(
    "data",
    [
        icmp(ROUTER4, A4, 5, 0, payload=EMBEDDED4),  # redirect
        icmp(ROUTER4, A4, 12, 0, payload=EMBEDDED4),  # parameter problem
        icmp(ROUTER4, A4, 13, 0),
        icmp(ROUTER6, A6, 2, 1, payload=EMBEDDED6),  # packet too big with a code
        icmp(ROUTER6, A6, 4, 0, payload=EMBEDDED6),
        icmp(ROUTER6, A6, 135, 0, payload=packed(A6)),
        icmp(ROUTER4, A4, 3, 1),
        icmp(ROUTER4, A4, 3, 1, payload=EMBEDDED4[:19]),
        icmp(ROUTER4, A4, 3, 1, payload=EMBEDDED4[:23]),
        icmp(ROUTER4, A4, 3, 1, payload=EMBEDDED6),
        icmp(ROUTER4, A4, 3, 1, payload=b"\x44" + EMBEDDED4[1:]),
        icmp(ROUTER4, A4, 3, 1, payload=b"\x4f" + EMBEDDED4[1:]),
        icmp(ROUTER4, A4, 3, 1, payload=gre(A4, SERVER4)),
        icmp(ROUTER4, A4, 3, 1, payload=v4(A4, SERVER4, 50, bytes(20))),
        icmp(ROUTER4, A4, 3, 1, payload=echo(A4, SERVER4, 7, reply=True)),
        icmp(ROUTER4, A4, 3, 1, payload=echo(A4, SERVER4, 7)[:27]),
        icmp(ROUTER4, A4, 3, 1, payload=icmp(A4, SERVER4, 8, 1)),
        icmp(ROUTER4, A4, 3, 1, payload=udp(A4, SERVER4, 5000, 80, fragment=185)),
        icmp(ROUTER6, A6, 1, 3, payload=EMBEDDED6[:39]),
        icmp(ROUTER6, A6, 1, 3, payload=EMBEDDED6[:43]),
        icmp(ROUTER6, A6, 1, 3, payload=EMBEDDED4 + bytes(40)),
        icmp(ROUTER6, A6, 1, 3, payload=v6(A6, SERVER6, 60, b"\x11\x05" + bytes(6))),
        icmp(ROUTER6, A6, 1, 3, payload=v6(A6, SERVER6, 1, b"\x08\0" + bytes(6))),
    ],
)
def test_other_messages_and_errors_about_unknown_packets_are_unsupported(data):
    assert recognise(data) is module.NotAnError.UNSUPPORTED


def test_the_ipv4_refusal_byte_by_byte():
    original = udp(A4, SERVER4, 5000, 80, b"a longer payload", options=b"\x01\x01\x01\x00")
    for make, code in ((module.prohibited, 13), (module.network_unreachable, 0)):
        out = make(ip.parse(original))
        assert out[:10] == struct.pack("!BBHHHBB", 0x45, 0, 20 + 8 + 32, 0, 0, 20, 1)
        assert addresses(out) == (SERVER4, A4)
        assert out[20:22] == bytes((3, code))
        assert out[24:28] == bytes(4)
        assert out[28:] == original[: 24 + 8]
        assert checksums_hold(out)


def test_a_short_ipv4_packet_is_quoted_whole():
    original = v4(A4, SERVER4, 99, b"abc")
    assert module.prohibited(ip.parse(original))[28:] == original


def test_the_ipv6_refusal_byte_by_byte():
    original = udp(A6, SERVER6, 5000, 80, bytes(1280 - 48), traffic_class=0xB8)
    for make, code in ((module.prohibited, 1), (module.network_unreachable, 3)):
        out = make(ip.parse(original))
        assert len(out) == 1280
        assert out[:8] == struct.pack("!IHBB", 0x60000000, 1240, 58, 20)
        assert addresses(out) == (SERVER6, A6)
        assert out[40:42] == bytes((1, code))
        assert out[44:48] == bytes(4)
        assert out[48:] == original[:1232]
        assert checksums_hold(out)
    short = udp(A6, SERVER6, 5000, 80)
    assert module.prohibited(ip.parse(short))[48:] == short


def translate(data: bytes, source: str, destination: str, value: int) -> bytes:
    error = recognise(data)
    return module.translate(error, source=packed(source), destination=packed(destination), source_value=value)


def test_a_translated_ipv4_error():
    original = icmp(ROUTER4, "100.64.0.9", 3, 3, b"\1\2\3\4", EMBEDDED4)
    out = translate(original, "100.96.0.2", A4, 17 << 16 | 4999)
    assert out[:10] == struct.pack("!BBHHHBB", 0x45, 0, 28 + len(EMBEDDED4), 0, 0, 20, 1)
    assert addresses(out) == ("100.96.0.2", A4)
    assert out[20:22] == b"\3\3"
    assert out[24:28] == bytes(4)
    assert checksums_hold(out)
    embedded = out[28:]
    assert embedded[:16] == EMBEDDED4[:16]
    assert embedded[16:20] == packed("100.96.0.2")
    assert embedded[20:22] == struct.pack("!H", 4999)
    assert embedded[22:] == EMBEDDED4[22:]


def test_the_mtu_survives_translation():
    out = translate(icmp(ROUTER4, A4, 3, 4, b"\7\7\x04\xb0", EMBEDDED4), "100.96.0.2", A4, 17 << 16 | 1)
    assert out[20:22] == b"\3\4"
    assert out[24:28] == b"\7\7\x04\xb0"
    proxy = "fd00:2021:1111:8000::2"
    out = translate(icmp(ROUTER6, A6, 2, 0, b"\0\0\x05\x14", EMBEDDED6), proxy, A6, 6 << 16 | 1)
    assert out[40:42] == b"\2\0"
    assert out[44:48] == b"\0\0\x05\x14"
    assert checksums_hold(out)
    out = translate(icmp(ROUTER6, A6, 3, 0, b"\0\0\x05\x14", EMBEDDED6), proxy, A6, 6 << 16 | 1)
    assert out[44:48] == bytes(4)
    assert out[48 + 24 : 48 + 40] == packed(proxy)


def test_a_translated_error_about_echo_gets_the_identifier_back():
    out = translate(icmp(ROUTER4, A4, 11, 0, payload=echo(A4, SERVER4, 501)), "100.96.0.2", A4, 1 << 16 | 500)
    assert out[20:22] == b"\x0b\0"
    assert out[28 + 24 : 28 + 26] == struct.pack("!H", 500)
    assert out[28 + 20 : 28 + 24] == echo(A4, SERVER4, 501)[20:24]  # type, code, and the checksum as it came


def test_translation_honours_embedded_options():
    embedded = udp(A4, SERVER4, 5000, 80, options=bytes(8))
    out = translate(icmp(ROUTER4, A4, 3, 1, payload=embedded), "100.96.0.2", A4, 17 << 16 | 7)
    assert out[28 + 28 : 28 + 32] == struct.pack("!HH", 7, 80)


@pytest.mark.slow
def test_generated_checksums_are_never_zero():
    # A payload that makes the sum come out as zero.
    for filler in range(65536):
        embedded = v4(A4, SERVER4, 99, struct.pack("!H", filler))
        if naive_checksum(bytes((3, 13, 0, 0, 0, 0, 0, 0)) + embedded) == 0:
            out = module.prohibited(ip.parse(embedded))
            assert out[22:24] == b"\xff\xff"
            return
    pytest.fail("no such packet")
