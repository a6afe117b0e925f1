from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fzg.wire import Malformed, candidate
from fzg.wire.candidate import Candidate, Kind
from fzg.wire.endpoint import Endpoint

EXAMPLES = [
    "candidate:fffeff7e1b2c3d4e5f60718 1 udp 2130706175 192.0.2.10 52625 typ host ufrag wxyz",
    "candidate:fffe7f64aa01bb02cc03dd0 1 udp 1686109951 203.0.113.7 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag wxyz",
    "candidate:fffe3f0277665544332211a 1 udp 37748479 198.51.100.3 61234 typ relay raddr 0.0.0.0 rport 0 ufrag wxyz",
    "candidate:ffff3f0209f8e7d6c5b4a39 1 udp 37748735 2001:db8::3 61234 typ relay raddr :: rport 0 ufrag wxyz",
]


@pytest.mark.spec("CONN-59")
@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_specification_survives_parsing_and_encoding(line):
    assert candidate.encode(candidate.parse(line)) == line


@pytest.mark.spec("CONN-59")
def test_every_field_of_an_example_is_read():
    parsed = candidate.parse(EXAMPLES[1])

    assert parsed == Candidate(
        foundation="fffe7f64aa01bb02cc03dd0",
        component=1,
        transport="udp",
        priority=1686109951,
        address=Endpoint.parse("203.0.113.7:40000"),
        kind=Kind.SRFLX,
        related=Endpoint.parse("0.0.0.0:0"),
        ufrag="wxyz",
    )


@pytest.mark.spec("CONN-59")
def test_unknown_extensions_are_skipped_with_their_value():
    line = "candidate:1 1 udp 5 192.0.2.1 9 typ host generation 0 id ufrag tcptype so ufrag abcd network-cost 10"

    assert candidate.parse(line).ufrag == "abcd"


def test_any_run_of_whitespace_separates_fields():
    assert candidate.parse("candidate:1  1\tudp 5   192.0.2.1 9 typ \t host") == candidate.parse(
        "candidate:1 1 udp 5 192.0.2.1 9 typ host"
    )


@pytest.mark.parametrize("transport", ["UDP", "tcp", "SSLTCP", "tls"])
def test_transports_are_read_in_any_case(transport):
    assert candidate.parse(f"candidate:1 1 {transport} 5 192.0.2.1 9 typ host").transport == transport.lower()


def test_a_candidate_without_ufrag_or_raddr_is_fine():
    parsed = candidate.parse("candidate:1 2 udp 5 2001:db8::1 9 typ prflx")

    assert (parsed.ufrag, parsed.related, parsed.component, parsed.kind) == (None, None, 2, Kind.PRFLX)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "0 fields"),
        ("candidate:1 1 udp 5 192.0.2.1 9 typ", "7 fields"),
        ("a=candidate:1 1 udp 5 192.0.2.1 9 typ host", "does not start"),
        ("1 1 udp 5 192.0.2.1 9 typ host x", "does not start"),
        ("candidate: 1 udp 5 192.0.2.1 9 typ host", "foundation"),
        (f"candidate:{'a' * 33} 1 udp 5 192.0.2.1 9 typ host", "foundation"),
        ("candidate:a_b 1 udp 5 192.0.2.1 9 typ host", "foundation"),
        ("candidate:1 one udp 5 192.0.2.1 9 typ host", "component"),
        ("candidate:1 1 sctp 5 192.0.2.1 9 typ host", "transport"),
        ("candidate:1 1 udp -5 192.0.2.1 9 typ host", "priority"),
        ("candidate:1 1 udp 4294967296 192.0.2.1 9 typ host", "priority"),
        ("candidate:1 1 udp " + "0" * 5000 + " 192.0.2.1 9 typ host", "priority"),
        ("candidate:1 1 udp \u0665 192.0.2.1 9 typ host", "priority"),
        ("candidate:1 1 udp 5 192.0.2 9 typ host", "IP address"),
        ("candidate:1 1 udp 5 example.com 9 typ host", "IP address"),
        ("candidate:1 1 udp 5 [2001:db8::1] 9 typ host", "brackets"),
        ("candidate:1 1 udp 5 fe80::1%eth0 9 typ host", "scope"),
        ("candidate:1 1 udp 5 192.0.2.1 65536 typ host", "port"),
        ("candidate:1 1 udp 5 192.0.2.1 9 type host", "typ"),
        ("candidate:1 1 udp 5 192.0.2.1 9 typ hostess", "kind"),
        ("candidate:1 1 udp 5 192.0.2.1 9 typ srflx raddr nowhere rport 0", "address"),
        ("candidate:1 1 udp 5 192.0.2.1 9 typ srflx raddr 0.0.0.0 rport x", "port"),
        ("candidate:1 1 udp 5 192.0.2.1 9 typ host ufrag", "no value"),
    ],
)
def test_a_malformed_line_is_refused_with_its_reason(line, reason):
    with pytest.raises(Malformed, match=reason):
        candidate.parse(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (EXAMPLES[0], 2130706175),
        ("candidate:1 x y 4294967295", 4294967295),
        ("candidate:1 x y 0 and then nonsense", 0),
        ("candidate:1 x y 4294967296", None),
        ("candidate:1 x y -1", None),
        ("candidate:1 x y", None),
        ("candidates:1 x y 7", None),
        (" candidate:1 x y 7", None),
        ("", None),
    ],
)
def test_the_first_check_wants_the_prefix_and_a_u32_in_the_fourth_field(line, expected):
    assert candidate.priority_of(line) == expected


@pytest.mark.parametrize(
    ("kind", "address", "priority"),
    [
        (Kind.SRFLX, "192.0.2.1:1", 1694498559),
        (Kind.RELAY, "192.0.2.1:1", 50331391),
        (Kind.RELAY, "[2001:db8::1]:1", 50331647),
    ],
)
def test_a_candidate_that_was_never_added_has_the_highest_local_preference(kind, address, priority):
    assert candidate.never_added_priority(kind, Endpoint.parse(address)) == priority


@given(st.text())
def test_only_malformed_escapes_the_parser(text):
    for line in (text, "candidate:" + text, "candidate:1 1 udp 5 192.0.2.1 9 typ host " + text):
        with contextlib.suppress(Malformed):
            candidate.parse(line)
        candidate.priority_of(line)


@given(
    st.builds(
        Candidate,
        foundation=st.from_regex(r"[A-Za-z0-9+/]{1,32}", fullmatch=True),
        component=st.integers(0, 256),
        transport=st.sampled_from(["udp", "tcp"]),
        priority=st.integers(0, 0xFFFFFFFF),
        address=st.builds(
            Endpoint, st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF)
        ),
        kind=st.sampled_from(list(Kind)),
        related=st.none() | st.builds(Endpoint, st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF)),
        ufrag=st.none() | st.from_regex(r"[a-z2-7]{4}", fullmatch=True),
    )
)
def test_parsing_reverses_encoding(one):
    assert candidate.parse(candidate.encode(one)) == one
