"""Glob patterns of DNS resources, matched label by label without backtracking across labels (spec tunnel 7.1)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_ANY_LABELS: Final = "**"
_STAR: Final = "*"
_ONE: Final = "?"
_MAGIC: Final = frozenset("*?[")


class Pattern:
    """A compiled pattern. An invalid one never matches."""

    __slots__ = ("_alternatives",)

    def __init__(self, text: str) -> None:
        texts = [text]
        if text.startswith("*."):
            texts.append(text[2:])  # `*.example.com` also means the bare `example.com`
        try:
            self._alternatives = [[_compile(label) for label in each.lower().split(".")] for each in texts]
        except _InvalidPattern as error:
            _LOG.warning("a DNS resource has an invalid pattern and will match nothing: %s", error)
            self._alternatives = []

    def matches(self, domain: str) -> bool:
        """Whether a concrete name, with or without the trailing dot, is covered."""
        labels = domain.removesuffix(".").lower().split(".")
        return any(_glob(tokens, labels, _is_any_labels, _label_matches) for tokens in self._alternatives)


class _InvalidPattern(ValueError):  # noqa: N818 - a signal inside this module
    pass


# Negated or not, and the ranges.
_Class = tuple[bool, tuple[tuple[str, str], ...]]
# "*", "?", a literal character, or a class.
_CharToken = str | _Class
# "**", another literal label, or the tokens of a label with wildcards.
_LabelToken = str | tuple[_CharToken, ...]


def _compile(label: str) -> _LabelToken:
    if label == _ANY_LABELS or not _MAGIC.intersection(label):
        return label
    if _ANY_LABELS in label:
        raise _InvalidPattern("** must stand alone between dots")
    tokens: list[_CharToken] = []
    position = 0
    while position < len(label):
        char = label[position]
        if char == "[":
            token, position = _character_class(label, position + 1)
            tokens.append(token)
        else:
            tokens.append(char)
            position += 1
    return tuple(tokens)


def _character_class(label: str, position: int) -> tuple[_Class, int]:
    negated = label[position : position + 1] == "!"
    start = position + negated
    # A bracket directly at the start is a member, not the end.
    end = label.find("]", start + 1)
    if end < 0:
        raise _InvalidPattern("a character class has no end")
    ranges: list[tuple[str, str]] = []
    while start < end:
        if start + 2 < end and label[start + 1] == "-":
            ranges.append((label[start], label[start + 2]))
            start += 3
        else:
            ranges.append((label[start], label[start]))
            start += 1
    return (negated, tuple(ranges)), end + 1


def _glob(
    tokens: Sequence[T], items: Sequence[str], is_any: Callable[[T], bool], matches: Callable[[T, str], bool]
) -> bool:
    """Only the last "any number" token ever takes up more, so time is a product of the lengths, not a power."""
    token = item = 0
    any_token, any_item = -1, 0
    while item < len(items):
        if token < len(tokens) and is_any(tokens[token]):
            any_token, any_item = token, item
            token += 1
        elif token < len(tokens) and matches(tokens[token], items[item]):
            token += 1
            item += 1
        elif any_token >= 0:
            any_item += 1
            token, item = any_token + 1, any_item
        else:
            return False
    return all(is_any(rest) for rest in tokens[token:])


def _is_any_labels(token: _LabelToken) -> bool:
    return token == _ANY_LABELS


def _label_matches(token: _LabelToken, label: str) -> bool:
    if isinstance(token, str):
        return token == label
    return bool(label) and _glob(token, label, _is_star, _char_matches)


def _is_star(token: _CharToken) -> bool:
    return token == _STAR


def _char_matches(token: _CharToken, char: str) -> bool:
    if isinstance(token, str):
        return token in (_ONE, char)
    negated, ranges = token
    return any(low <= char <= high for low, high in ranges) != negated
