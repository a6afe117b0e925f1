from __future__ import annotations

import contextlib

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fzg.wire import Malformed
from fzg.wire import dns as messages

QUERY = dns.message.make_query("_http._tcp.db.example", "SRV", use_edns=0, id=0x1234)
WIRE = QUERY.to_wire()


def response(*, size=0, query=QUERY, **changes):
    answer = dns.message.make_response(query, recursion_available=True)
    for number in range(size // 90):
        answer.answer.append(dns.rrset.from_text("db.example.", 60, "IN", "TXT", f'"{number:080}"'))
    for name, value in changes.items():
        setattr(answer, name, value)
    return answer.to_wire(max_size=65535)


def accepts(data):
    try:
        messages.parse_query(data)
    except Malformed:
        return False
    return True


def test_a_query_is_known_by_its_id_and_question():
    query = messages.parse_query(WIRE)
    assert (query.id, query.question) == (0x1234, (dns.name.from_text("_http._tcp.db.example."), 33, 1))


@pytest.mark.spec("TUNNEL-82")
def test_responses_and_messages_without_exactly_one_question_are_no_queries():
    assert accepts(WIRE)
    assert not accepts(response())
    assert not accepts(WIRE[:4] + b"\0\0" + WIRE[6:])
    two = dns.message.make_query("a.example", "A")
    two.question.append(dns.rrset.RRset(dns.name.from_text("b.example."), 1, 1))
    assert not accepts(two.to_wire())


def test_a_query_with_a_broken_answer_section_is_refused():
    whole = dns.message.make_query("a.example", "A")
    whole.answer.append(dns.rrset.from_text("a.example.", 60, "IN", "A", "10.0.0.1"))
    assert accepts(whole.to_wire())
    assert not accepts(whole.to_wire()[:-1])


def test_a_response_belongs_to_the_query_with_its_id_and_question():
    query = messages.parse_query(WIRE)
    assert messages.parse_response(response(), query) is not None
    other_case = dns.message.make_query("_HTTP._tcp.DB.example", "SRV", id=0x1234)
    assert messages.parse_response(response(query=other_case), query) is not None
    assert messages.parse_response(response(id=0x1235), query) is None
    assert messages.parse_response(response(query=dns.message.make_query("x.example", "SRV", id=0x1234)), query) is None
    assert messages.parse_response(WIRE, query) is None, "a query is no response"
    assert messages.parse_response(b"", query) is None


def test_a_refusal_may_leave_the_question_out_but_an_answer_may_not():
    query = messages.parse_query(WIRE)
    assert messages.parse_response(bytes.fromhex("1234 8181 0000 0000 0000 0000"), query) is not None
    assert messages.parse_response(bytes.fromhex("1234 8180 0000 0000 0000 0000"), query) is None


def test_a_broken_response_with_the_right_id_is_malformed():
    query = messages.parse_query(WIRE)
    with pytest.raises(Malformed):
        messages.parse_response(bytes.fromhex("1234 8180 0001 0000 0000 0000 3f"), query)


def test_server_failure_repeats_id_opcode_recursion_and_question():
    sent = dns.message.make_query("db.example", "TXT", id=7)
    sent.set_opcode(dns.opcode.STATUS)
    wire = sent.to_wire()
    failure = dns.message.from_wire(messages.server_failure(wire, messages.parse_query(wire)))
    assert failure.rcode() == dns.rcode.SERVFAIL
    assert failure.opcode() == dns.opcode.STATUS
    assert failure.flags & (dns.flags.QR | dns.flags.RD) == dns.flags.QR | dns.flags.RD
    assert (failure.id, failure.question) == (7, sent.question)
    assert failure.sections[1:] == [[], [], []]


@pytest.mark.spec("TUNNEL-80")
def test_a_response_above_1200_bytes_is_cut_behind_its_question_for_udp():
    query = messages.parse_query(WIRE)
    long = response(size=3000)
    assert len(long) > 3000
    cut = messages.fit_udp(long, messages.parse_response(long, query))
    parsed = dns.message.from_wire(cut)
    assert parsed.flags & dns.flags.TC
    assert (parsed.id, parsed.question) == (0x1234, QUERY.question)
    assert cut[6:12] == bytes(6)
    short = response(size=1000)
    assert len(short) <= 1200
    assert messages.fit_udp(short, messages.parse_response(short, query)) == short


def test_a_probe_asks_for_an_address():
    probe = dns.message.from_wire(messages.probe(9, dns.name.from_text("firezone.dev.")))
    assert (probe.id, str(probe.question[0]), probe.flags) == (9, "firezone.dev. IN A", dns.flags.RD)


@given(
    st.binary(max_size=80) | st.builds(lambda cut, tail: WIRE[:cut] + tail, st.integers(0, 60), st.binary(max_size=30))
)
def test_any_bytes_are_a_message_or_malformed(data):
    query = messages.parse_query(WIRE)
    for parse in (messages.parse_query, lambda received: messages.parse_response(received, query)):
        with contextlib.suppress(Malformed):
            parse(data)
