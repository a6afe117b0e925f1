"""Bytes to records and back. Everything that parses here raises `Malformed` and nothing else."""

from __future__ import annotations


class Malformed(ValueError):  # noqa: N818 - the field's word for it, raised by every parser here
    """The bytes are not what they claim to be; the message says, in one sentence, what is wrong."""
