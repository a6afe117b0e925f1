"""Values that must not reach a log: tokens, keys, passwords."""

from __future__ import annotations

import hmac
from typing import Generic, TypeVar

T = TypeVar("T", bound=str | bytes)


class Secret(Generic[T]):
    """Wraps a str or bytes so that `repr`, `str` and format show nothing; `reveal` gives it back."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """The value itself, for the one place that puts it on the wire."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret) or type(other.reveal()) is not type(self._value):
            return NotImplemented
        return hmac.compare_digest(_octets(self.reveal()), _octets(other.reveal()))

    def __hash__(self) -> int:
        return hash(self._value)


def _octets(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
