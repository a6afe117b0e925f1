from __future__ import annotations

import random

import pytest

from fzg.wireguard.index import IndexAllocator, SessionIndices


@pytest.mark.spec("CONN-5")
def test_connection_indices_do_not_repeat_and_have_24_bits() -> None:
    allocator = IndexAllocator(random.Random(1).randbytes)
    drawn = [allocator.next() for _ in range(50_000)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= index < 1 << 24 for index in drawn)


def test_the_register_has_the_full_period() -> None:
    # One step is a linear map over GF(2); its order is 2^24 - 1 if that power and no power by a prime factor is one.
    def step(state: int) -> int:
        return (state >> 1) ^ (0xD80000 if state & 1 else 0)

    def power(exponent: int) -> list[int]:
        result, base = [1 << bit for bit in range(24)], [step(1 << bit) for bit in range(24)]
        while exponent:
            if exponent & 1:
                result = [apply(base, column) for column in result]
            base = [apply(base, column) for column in base]
            exponent >>= 1
        return result

    def apply(columns: list[int], vector: int) -> int:
        total = 0
        for bit in range(24):
            if vector >> bit & 1:
                total ^= columns[bit]
        return total

    identity = [1 << bit for bit in range(24)]
    period = (1 << 24) - 1
    assert power(period) == identity
    assert all(power(period // prime) != identity for prime in (3, 5, 7, 13, 17, 241))


def test_the_first_draws_follow_the_register_and_the_mask() -> None:
    state, mask = 0x000003, 0x00F0F0
    values = iter([bytes(3), state.to_bytes(3, "big"), mask.to_bytes(3, "big")])
    allocator = IndexAllocator(lambda _: next(values))
    second = (state >> 1) ^ 0xD80000
    assert [allocator.next(), allocator.next()] == [(state - 1) ^ mask, (second - 1) ^ mask]


def test_indices_in_use_are_passed_over() -> None:
    draws = IndexAllocator(random.Random(2).randbytes)
    first, second, third = (draws.next() for _ in range(3))
    again = IndexAllocator(random.Random(2).randbytes)
    assert again.next({first, second}) == third


@pytest.mark.spec("CONN-6")
def test_session_indices_begin_with_one_and_count_up() -> None:
    indices = SessionIndices(0x123456)
    assert [indices.next() for _ in range(3)] == [0x12345601, 0x12345602, 0x12345603]


@pytest.mark.spec("CONN-5")
def test_session_indices_wrap_without_touching_the_connection_index() -> None:
    indices = SessionIndices(0xFFFFFF)
    drawn = [indices.next() for _ in range(257)]
    assert {index >> 8 for index in drawn} == {0xFFFFFF}
    assert len(set(drawn)) == 256
    assert drawn[255] == 0xFFFFFF00
    assert drawn[256] == drawn[0]


def test_a_connection_index_of_more_than_24_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="24 bits"):
        SessionIndices(1 << 24)
