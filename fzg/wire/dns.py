"""DNS messages as a forwarder sees them (spec tunnel 8): judged by header, question and answers, else left alone."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import dns.exception
import dns.name
import dns.wirebase

from fzg.wire import Malformed

if TYPE_CHECKING:
    from dns.wirebase import Parser

# Specification (tunnel 8): the limit for answers over UDP.
UDP_LIMIT: Final = 1200

# Ours: 64 KiB hold 6,000 records, and walking them all would hold up every other packet for tens of milliseconds.
MAX_RECORDS_READ: Final = 64

# RFC 1035 4.1.1, 4.1.3.
_HEADER: Final = struct.Struct("!HHHHHH")
_QUESTION: Final = struct.Struct("!HH")
_RECORD: Final = struct.Struct("!HHI")
_QR: Final = 0x8000
_OPCODE: Final = 0x7800
_TC: Final = 0x0200
_RD: Final = 0x0100
_RCODE: Final = 0x000F
_NOERROR: Final = 0
_SERVFAIL: Final = 2


class Message(NamedTuple):
    """What the header and the one question say; `end` is where the question ends. Names compare without case."""

    id: int
    flags: int
    question: tuple[dns.name.Name, int, int] | None
    answers: int
    end: int

    @property
    def is_success(self) -> bool:
        """Whether a response says NOERROR."""
        return self.flags & _RCODE == _NOERROR


def parse_query(data: bytes) -> Message:
    """A query with one question whose answer section, if any, can be read; others are `Malformed`."""
    message = _parse(data)
    if message.flags & _QR:
        raise Malformed("DNS message is a response")
    if message.question is None:
        raise Malformed("DNS query has no question")
    return message


def parse_response(data: bytes, query: Message) -> Message | None:
    """The response to `query`; None if it answers another one, by id or question. `Malformed` if it is broken."""
    if len(data) < 2 or int.from_bytes(data[:2], "big") != query.id:
        return None
    message = _parse(data)
    if not message.flags & _QR:
        return None
    if message.question is None:
        # A server that refuses what it cannot read may leave the question out.
        return None if message.is_success or message.answers else message
    return message if message.question == query.question else None


def server_failure(data: bytes, query: Message) -> bytes:
    """SERVFAIL with the id, opcode, RD and question of the query."""
    flags = _QR | query.flags & (_OPCODE | _RD) | _SERVFAIL
    return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + data[_HEADER.size : query.end]


def fit_udp(response: bytes, parsed: Message) -> bytes:
    """The response, cut behind its question and marked so if it is longer than a datagram may be."""
    if len(response) <= UDP_LIMIT:
        return response
    questions = 0 if parsed.question is None else 1
    return _HEADER.pack(parsed.id, parsed.flags | _TC, questions, 0, 0, 0) + response[_HEADER.size : parsed.end]


def probe(message_id: int, name: dns.name.Name) -> bytes:
    """An A query that asks for recursion."""
    return _HEADER.pack(message_id, _RD, 1, 0, 0, 0) + (name.to_wire() or b"") + _QUESTION.pack(1, 1)


def _parse(data: bytes) -> Message:
    if len(data) < _HEADER.size:
        raise Malformed("DNS message is less than 12 bytes")
    message_id, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if questions > 1:
        raise Malformed("DNS message has several questions")
    try:
        parser = dns.wirebase.Parser(data, _HEADER.size)
        question = None
        if questions:
            question = (dns.name.from_wire_parser(parser), *_QUESTION.unpack(parser.get_bytes(_QUESTION.size)))
        end = parser.current
        for _ in range(min(answers, MAX_RECORDS_READ)):
            _skip_record(parser)
    except dns.exception.DNSException as error:
        raise Malformed(f"DNS message is broken: {error}") from error
    return Message(message_id, flags, question, answers, end)


def _skip_record(parser: Parser) -> None:
    dns.name.from_wire_parser(parser)
    parser.get_bytes(_RECORD.size)
    parser.get_counted_bytes(2)
