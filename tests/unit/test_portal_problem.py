"""What refused upgrades mean (spec portal 1.12)."""

from __future__ import annotations

import pytest

from fzg.portal import remedy
from fzg.portal.problem import AuthenticationFailed, Rejection, TokenInvalid, parse_rejection, parse_retry_after

NOW = 1_790_000_000.0  # Mon, 21 Sep 2026 14:13:20 GMT


def rejection(status, body="", **headers):
    return parse_rejection(
        status, {name.replace("_", "-"): value for name, value in headers.items()}, body.encode(), NOW
    )


@pytest.mark.spec("PORTAL-29")
@pytest.mark.parametrize("code", ["invalid_token", "missing_token"])
@pytest.mark.parametrize("kind", ["application/problem+json", "Application/Problem+JSON; charset=utf-8"])
def test_401_with_a_token_code_says_that_the_token_is_invalid(code, kind):
    got = rejection(401, f'{{"type":"about:blank","status":401,"code":"{code}"}}', content_type=kind)
    assert isinstance(got.fatal_error, TokenInvalid)


@pytest.mark.spec("PORTAL-29")
@pytest.mark.parametrize(("body", "kind", "text"), [
    ('{"detail":"Try later"}', "application/problem+json", "Try later"),
    ('{"detail":"Try later","code":"other"}', "application/problem+json", "Try later"),
    ('{"detail":7,"code":["invalid_token"]}', "application/problem+json", "no reason provided"),
    ('{"code":"invalid_token"}', "application/json", "no reason provided"),
    ("<html>", "text/html", "no reason provided"),
    ("{", "application/problem+json", "no reason provided"),
    ("[" * 100000, "application/problem+json", "no reason provided"),
    ("", "", "no reason provided"),
])  # fmt: skip
def test_any_other_401_is_a_failed_authentication(body, kind, text):
    error = rejection(401, body, content_type=kind).fatal_error
    assert isinstance(error, AuthenticationFailed)
    assert str(error).startswith(f"authentication failed: {text}; check FIREZONE_API_URL")


@pytest.mark.spec("PORTAL-30")
@pytest.mark.parametrize("status", [200, 301, 400, 402, 403, 404, 409, 422, 429, 500, 502, 503])
def test_no_other_status_is_fatal_and_code_and_detail_are_shown(status):
    body = '{"code":"invalid_token","detail":"Another connection"}'
    got = rejection(status, body, content_type="application/problem+json")
    assert got.fatal_error is None
    assert str(got) == f"the portal answered HTTP {status} (code=invalid_token, detail=Another connection)"
    assert got.body == body


@pytest.mark.spec("PORTAL-31")
@pytest.mark.parametrize(("value", "delay"), [
    ("0", 0.0), ("3", 3.0), (" 60 ", 60.0), ("007", 7.0),
    ("Mon, 21 Sep 2026 14:13:23 GMT", 3.0), ("Mon, 21 Sep 2026 14:13:00 GMT", 0.0), ("Sun Nov  6 08:49:37 1994", 0.0),
    ("-1", None), ("12.5", None), ("soon", None), ("", None), ("1e3", None), ("\u0663", None), ("+3", None),
    ("0x3", None),
    ("99999999999999999999", 86400.0), ("Mon, 21 Sep 9999 14:13:23 GMT", 86400.0),
])  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(value, delay):
    assert parse_retry_after(value, NOW) == delay
    assert rejection(503, retry_after=value).retry_after == delay


def test_the_account_is_blamed_for_a_403_only_by_the_portals_own_word():
    assert "enable the account" in remedy.for_rejection(Rejection(403, code="account_disabled"))
    for code in (None, "unauthenticated"):
        assert "account" not in remedy.for_rejection(Rejection(403, code=code))
        assert "FIREZONE_API_URL" in remedy.for_rejection(Rejection(403, code=code))


def test_a_body_reaches_the_log_as_one_bounded_line():
    got = rejection(500, "a\r\nb\x1b[31m\x00" + "x" * 5000)
    assert got.body.startswith("a  b [31m ")
    assert len(got.body) == 1001
    assert parse_rejection(500, {}, b"\xff\xfe", NOW).body.isprintable()
