"""How a portal connection can fail: refused upgrades, `Retry-After`, and the errors that end the process
(spec portal 1.8, 1.11, 1.12, 1.13).
"""

from __future__ import annotations

import datetime as dt
import email.utils
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from fzg.portal import remedy

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LOGGED_BODY = 1000
"""Characters of a response body that reach the log: problem details are a few hundred, error pages need no more."""

MAX_RETRY_AFTER_S = 86_400.0
"""An intermediary's `Retry-After` cannot silence a gateway for longer than a day."""

_TOKEN_CODES = frozenset({"invalid_token", "missing_token"})


class FatalPortalError(Exception):
    """The portal told us to stop, or gave us up for good; the process ends with status 1."""


class TokenInvalid(FatalPortalError):  # noqa: N818 - names what is wrong, as all of these do
    """The portal does not accept the token, or no longer does."""

    def __init__(self) -> None:
        super().__init__(f"the authentication token is invalid, expired or was revoked; {remedy.TOKEN}")


class AuthenticationFailed(FatalPortalError):  # noqa: N818
    """HTTP 401 without a code that names the token."""

    def __init__(self, detail: str | None) -> None:
        super().__init__(f"authentication failed: {detail or 'no reason provided'}; {remedy.REFUSED}")


class LoginFailed(FatalPortalError):  # noqa: N818
    """The join was answered with an error."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(f"login failed: {reason or 'no reason provided'}")


class RetriesExhausted(FatalPortalError):  # noqa: N818
    """The reconnect budget is spent; `__cause__` is the last failure."""

    def __init__(self) -> None:
        super().__init__("the portal could not be reached within the retry limit")


@dataclass(frozen=True, slots=True)
class Rejection:
    """An answer to the upgrade request other than 101."""

    status: int
    body: str = ""
    code: str | None = None
    detail: str | None = None
    retry_after: float | None = None

    @property
    def fatal_error(self) -> FatalPortalError | None:
        """The error that ends the process; None when the dial is to be repeated."""
        if self.status != 401:
            return None
        return TokenInvalid() if self.code in _TOKEN_CODES else AuthenticationFailed(self.detail)

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in (("code", self.code), ("detail", self.detail)) if value]
        return f"the portal answered HTTP {self.status}" + (f" ({', '.join(named)})" if named else "")


def parse_rejection(status: int, headers: Mapping[str, str], body: bytes, unix_now: float) -> Rejection:
    """What a refused upgrade says; `headers` has lower-case names. Cannot fail."""
    code: str | None = None
    detail: str | None = None
    if headers.get("content-type", "").partition(";")[0].strip().lower() == "application/problem+json":
        code, detail = _problem_details(body)
    delay = parse_retry_after(headers["retry-after"], unix_now) if "retry-after" in headers else None
    return Rejection(status, printable(body.decode("utf-8", "replace")), code, detail, delay)


def parse_retry_after(value: str, unix_now: float) -> float | None:
    """Seconds to wait from a number of seconds or an HTTP date (RFC 9110 10.2.3); None for anything else."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:12]), MAX_RETRY_AFTER_S)
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=dt.UTC)
        return min(max(date.timestamp() - unix_now, 0.0), MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def printable(text: str) -> str:
    """One line of bounded length for the log."""
    line = "".join(character if character.isprintable() else " " for character in text[: MAX_LOGGED_BODY + 1])
    return line if len(line) <= MAX_LOGGED_BODY else line[:MAX_LOGGED_BODY] + "…"


class _Problem(msgspec.Struct):
    code: object = None
    detail: object = None


def _problem_details(body: bytes) -> tuple[str | None, str | None]:
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None, None
    code = problem.code if isinstance(problem.code, str) else None
    detail = problem.detail if isinstance(problem.detail, str) else None
    return code and printable(code), detail and printable(detail)
