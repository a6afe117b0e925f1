"""Values that must not reach a log: tokens, keys, passwords."""

from __future__ import annotations

import hmac
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=str | bytes)

MASK: Final = "***"
"""What is shown in place of a secret."""

LEAST_LENGTH: Final = 8
"""Characters; real tokens have a hundred and more."""


class Secret(Generic[T]):
    """Wraps a str or bytes so that `repr`, `str` and format show nothing; `reveal` gives it back."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """The value itself, for the one place that puts it on the wire."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({MASK})"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret) or type(other.reveal()) is not type(self._value):
            return NotImplemented
        return hmac.compare_digest(_octets(self.reveal()), _octets(other.reveal()))

    def __hash__(self) -> int:
        return hash(self._value)


def without(secret: str, text: str) -> str:
    """The text with asterisks for the secret, unless that is so short that it stands in texts by chance."""
    return text if len(secret) < LEAST_LENGTH else text.replace(secret, MASK)


def _octets(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
