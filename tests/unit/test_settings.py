"""Values as operators write them."""

from __future__ import annotations

import pytest

from fzg.secret import Secret
from fzg.settings import SettingError, Settings, parse_duration, parse_flag, parse_size, parse_socket_address


@pytest.mark.spec("OPS-8")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1h", 3600),
        ("30d", 2_592_000),
        ("1h 30m", 5400),
        ("1h30m", 5400),
        ("90s", 90),
        (" 2 days ", 172_800),
        ("1week", 604_800),
        ("500ms", 0.5),
        ("1min 1sec", 61),
    ],
)
def test_durations_are_pairs_of_number_and_unit(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


def test_a_capital_m_is_a_month_as_in_the_reference():
    assert parse_duration("1M") == pytest.approx(30.44 * 86_400)
    assert parse_duration("1m") == 60


@pytest.mark.spec("OPS-8")
@pytest.mark.parametrize("text", ["90", "0", "", " ", "5 m x", "h", "-5m", "1.5h", "5x", "5m6", "1h,30m", "\u0665m"])
def test_anything_else_is_no_duration(text):
    with pytest.raises(SettingError, match="is not a duration"):
        parse_duration(text)


def test_a_duration_of_more_than_a_century_is_refused():
    with pytest.raises(SettingError, match="hundred years"):
        parse_duration("99999999999999999999y")


@pytest.mark.spec("OPS-6")
@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "On", " true "])
def test_words_for_true(text):
    assert parse_flag(text) is True


@pytest.mark.spec("OPS-6")
@pytest.mark.parametrize("text", ["false", "False", "0", "no", "OFF", "", "  "])
def test_words_for_false_and_nothing_at_all(text):
    assert parse_flag(text) is False


@pytest.mark.spec("OPS-6")
@pytest.mark.parametrize("text", ["2", "si", "tru", "enabled"])
def test_other_words_are_no_boolean(text):
    with pytest.raises(SettingError, match=f"'{text}' is neither true nor false"):
        parse_flag(text)


def test_listening_addresses_are_literal():
    assert str(parse_socket_address("127.0.0.1:8080")) == "127.0.0.1:8080"
    assert str(parse_socket_address("[::1]:0")) == "[::1]:0"


@pytest.mark.parametrize(
    "text", ["localhost:8080", "127.0.0.1", ":8080", "::1:8080", "1.2.3.4:65536", "1.2.3.4:x", "1.2.3.4:" + "9" * 5000]
)
def test_other_listening_addresses_are_refused(text):
    with pytest.raises(SettingError, match="is not an address like"):
        parse_socket_address(text)


@pytest.mark.parametrize("text", [None, "", "big", "-1", "1e6", "\u0663", "9" * 5000])
def test_sizes_that_are_no_numbers_count_as_unset(text):
    assert parse_size(text) is None


def test_sizes_are_bytes():
    assert parse_size(" 4194304 ") == 4_194_304


def test_settings_do_not_show_the_token():
    assert "c2VjcmV0" not in repr(Settings(token=Secret("c2VjcmV0"), firezone_id="i"))
