"""The textual forms of a UUID that the portal's side accepts (spec portal 1.2, 2.1)."""

from __future__ import annotations

import re

_HYPHENATED = r"([0-9a-fA-F]{8})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{12})"
_FORMS = (
    re.compile(_HYPHENATED),
    re.compile(r"\{" + _HYPHENATED + r"\}"),
    re.compile("urn:uuid:" + _HYPHENATED),
    re.compile(r"([0-9a-fA-F]{8})([0-9a-fA-F]{4})([0-9a-fA-F]{4})([0-9a-fA-F]{4})([0-9a-fA-F]{12})"),
)


def canonical_uuid(text: str) -> str | None:
    """The lower-case hyphenated form of a hyphenated, braced, `urn:uuid:` or 32-digit UUID; None for anything else."""
    for form in _FORMS:
        if found := form.fullmatch(text):
            return "-".join(found.groups()).lower()
    return None
