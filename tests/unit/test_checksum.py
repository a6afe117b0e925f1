"""The Internet checksum and its incremental update."""

from __future__ import annotations

import struct

from fzg.wire import checksum
from tests.unit.tunnel_world import naive_checksum, naive_sum, pseudo


def test_the_sum_of_rfc_1071_section_3():
    assert checksum.sum16(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert checksum.internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


def test_an_odd_last_byte_is_padded_on_the_right():
    assert checksum.sum16(b"\x01\x02\x03") == 0x0102 + 0x0300


def test_zero_only_comes_from_zeros():
    assert checksum.sum16(bytes(40)) == 0
    assert checksum.sum16(b"\xff\xff") == 0xFFFF
    assert checksum.sum16(b"\xff\xff" * 700) == 0xFFFF
    assert checksum.sum16(b"\x00\x01\xff\xfe") == 0xFFFF
    assert checksum.sum16(b"", 0) == 0
    assert checksum.sum16(b"", 0xFFFF) == 0xFFFF


def test_the_initial_sum_is_added():
    assert checksum.sum16(b"\x00\x02", 3) == 5
    assert checksum.sum16(b"\xff\xff", 1) == 1


def test_data_with_its_own_checksum_sums_up_to_zero():
    header = bytes.fromhex("450000730000400040110000c0a80001c0a800c7")
    assert checksum.internet_checksum(header) == 0xB861
    assert checksum.internet_checksum(header[:10] + b"\xb8\x61" + header[12:]) == 0


def test_pseudo_headers_of_both_families():
    a4, b4 = bytes.fromhex("64400001"), bytes.fromhex("0a000005")
    assert checksum.pseudo_header_sum(a4, b4, 17, 1200) == naive_sum(pseudo(a4, b4, 17, 1200))
    a6, b6 = bytes(range(16)), bytes(range(200, 216))
    assert checksum.pseudo_header_sum(a6, b6, 58, 1240) == naive_sum(pseudo(a6, b6, 58, 1240))


def test_the_update_of_rfc_1624_section_4():
    assert checksum.update(0xDD2F, b"\x55\x55", b"\x32\x85") in (0x0000, 0xFFFF)


def test_a_zero_result_is_written_as_all_ones():
    assert checksum.update(0xDD2F, b"\x55\x55", b"\x32\x85") == 0xFFFF
    assert checksum.update(0x0001, b"\x00\x00", b"\x00\x01") == 0xFFFF


def test_an_update_equals_a_recomputation():
    before = bytes.fromhex("450000730000400040110000c0a80001c0a800c7")
    after = before[:16] + bytes.fromhex("0a000005")
    assert checksum.update(naive_checksum(before), before[16:], after[16:]) == naive_checksum(after)


def test_a_wrong_checksum_stays_wrong_by_the_same_amount():
    before = struct.pack("!HH", 1, 2)
    right, wrong = naive_checksum(before), naive_checksum(before) - 7
    assert checksum.update(right, b"\0\1", b"\0\5") - checksum.update(wrong, b"\0\1", b"\0\5") == 7


def test_differences_add_up():
    change = checksum.difference(b"\1\2", b"\3\4") + checksum.difference(b"\5\6", b"\7\x08")
    assert checksum.apply(0x4321, change) == checksum.update(0x4321, b"\1\2\5\6", b"\3\4\7\x08")
