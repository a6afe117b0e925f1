"""ChannelData framing (spec turn 3.3)."""

from __future__ import annotations

import pytest

from fzg.wire import Malformed, channel_data

HELLO = bytes.fromhex("4000000568656c6c6f")


def test_vector() -> None:
    assert channel_data.encode(0x4000, b"hello") == HELLO
    assert channel_data.parse(HELLO) == (0x4000, b"hello")
    assert channel_data.parse(HELLO + bytes(3)) == (0x4000, b"hello")


@pytest.mark.spec("TURN-41")
def test_sent_message_is_exactly_four_bytes_longer_than_its_payload() -> None:
    for length in range(1, 1313):
        assert len(channel_data.encode(0x4FFF, bytes(length))) == 4 + length


@pytest.mark.spec("TURN-42")
@pytest.mark.parametrize("length", [0, 1, 5, 1312])
def test_up_to_three_surplus_bytes_are_padding(length: int) -> None:
    datagram = channel_data.encode(0x4123, b"\xab" * length)
    for surplus in range(4):
        assert channel_data.parse(datagram + b"\xff" * surplus) == (0x4123, b"\xab" * length)
    with pytest.raises(Malformed, match="more than 3 bytes"):
        channel_data.parse(datagram + bytes(4))


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "shorter than its header"),
        (HELLO[:3], "shorter than its header"),
        (HELLO[:-1], "shorter than its length field"),
        (bytes.fromhex("3fff0000"), "not in 0x4000"),
        (bytes.fromhex("50000000"), "not in 0x4000"),
    ],
)
def test_anything_else_is_refused(datagram: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        channel_data.parse(datagram)


@pytest.mark.parametrize("number", [0x4000, 0x4FFF])
def test_whole_range_of_numbers_is_read(number: int) -> None:
    assert channel_data.parse(channel_data.encode(number, b"")) == (number, b"")
