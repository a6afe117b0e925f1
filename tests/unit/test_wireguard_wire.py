from __future__ import annotations

import pytest

from fzg.wire import Malformed
from fzg.wire import wireguard as wire
from fzg.wire.wireguard import CookieReply, DataHeader, Initiation, MessageType, Response

SIZES = {1: 148, 2: 92, 3: 64}


def message(kind: int, size: int) -> bytes:
    return bytes((kind, 0, 0, 0)) + bytes(size - 4)


@pytest.mark.parametrize(("kind", "size"), [*SIZES.items(), (4, 32), (4, 33), (4, 1312)])
def test_a_message_of_the_right_shape_is_classified(kind: int, size: int) -> None:
    assert wire.classify(message(kind, size)) is MessageType(kind)
    assert wire.classify(bytearray(message(kind, size))) is MessageType(kind)
    assert wire.classify(memoryview(message(kind, size))) is MessageType(kind)


@pytest.mark.spec("CONN-15")
@pytest.mark.parametrize(
    ("kind", "size"), [(1, 147), (1, 149), (2, 91), (2, 93), (3, 63), (3, 65), (4, 31), (4, 4), (0, 148), (5, 32)]
)
def test_a_message_of_another_length_or_type_is_none(kind: int, size: int) -> None:
    assert wire.classify(message(kind, size)) is None


@pytest.mark.spec("CONN-15")
@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize(("kind", "size"), [*SIZES.items(), (4, 32)])
def test_a_message_with_a_reserved_byte_set_is_none(kind: int, size: int, offset: int) -> None:
    data = bytearray(message(kind, size))
    data[offset] = 1
    assert wire.classify(data) is None


@pytest.mark.parametrize("size", range(4))
def test_less_than_a_type_is_none(size: int) -> None:
    assert wire.classify(b"\x01\x00\x00\x00"[:size]) is None


@pytest.mark.parametrize("record", [Initiation, Response, CookieReply])
def test_records_survive_a_round_trip(record: type[Initiation | Response | CookieReply]) -> None:
    kind = {Initiation: 1, Response: 2, CookieReply: 3}[record]
    data = bytes((kind, 0, 0, 0)) + bytes(range(4, SIZES[kind]))
    assert record.parse(data).encode() == data


def test_a_data_header_survives_a_round_trip() -> None:
    header = DataHeader(receiver=0x12345601, counter=1 << 40)
    assert header.encode() == bytes.fromhex("04000000015634120000000000010000")
    assert DataHeader.parse(header.encode() + bytes(16)) == header


@pytest.mark.parametrize(
    ("record", "name"), [(Initiation, "initiation"), (Response, "response"), (CookieReply, "cookie reply")]
)
def test_another_message_is_malformed(record: type[Initiation | Response | CookieReply], name: str) -> None:
    with pytest.raises(Malformed, match=f"not a WireGuard {name}"):
        record.parse(message(4, 64))


@pytest.mark.parametrize(("kind", "offset", "size"), [(2, 8, 92), (3, 4, 64), (4, 4, 40)])
def test_the_receiver_index_is_found_in_every_message_that_has_one(kind: int, offset: int, size: int) -> None:
    data = bytearray(message(kind, size))
    data[offset : offset + 4] = bytes.fromhex("01563412")
    assert wire.receiver_index(bytes(data)) == 0x12345601


def test_an_initiation_has_no_receiver_index() -> None:
    with pytest.raises(Malformed, match="without a receiver index"):
        wire.receiver_index(message(1, 148))


def test_timestamps_order_as_their_bytes() -> None:
    times = [0, 1, 999_999_999, 1_000_000_000, 1_700_000_000_000_000_500]
    encoded = [wire.tai64n(time) for time in times]
    assert encoded == sorted(encoded)
    assert encoded[0].hex() == "4000000000000025" + "00000000"
