"""Whether a gateway ever said a secret: what was secret is noted where it is made, what was said where it is read.

One `WATCH` per process. Portals, relays and tests tell it of secrets; processes and captured output bring the texts;
`tests/secrets_watch.py` asks after each test.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENDINGS = ("password", "token", "secret", "preshared_key", "private_key")
"""Keys of the portal's messages whose values nobody may see."""

# Shorter or more uniform values, such as 32 zero bytes, stand in texts by chance, and ids that tests use for want of a
# secret stand there by right.
LEAST_LENGTH = 8
LEAST_VARIETY = 6
_KEY = re.compile(r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{43}=|[0-9a-fA-F]{64})(?![A-Za-z0-9+/=])")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WORD = re.compile(r"[A-Za-z0-9+/_-]{8,}")


class Leak(NamedTuple):
    """A secret in a text; `line` shows where, without the secret."""

    what: str
    where: str
    line: str

    def __str__(self) -> str:
        return f"{self.what} in {self.where}: {self.line}"


class Watch:
    """Secrets and texts that have not been compared yet."""

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}
        self.public_keys: set[bytes] = set()
        self._words: dict[str, str] = {}
        self._fresh: dict[str, str] = {}
        self._texts: list[tuple[str, str]] = []
        self._read: dict[Path, int] = {}

    # -- what is secret

    def add(self, value: str | bytes, what: str) -> None:
        """Note a secret, in each form in which it could be written."""
        forms = [value] if isinstance(value, str) else [value.hex(), base64.b64encode(value).decode()]
        for form in forms:
            if (
                form in self.secrets
                or len(form) < LEAST_LENGTH
                or len(set(form)) < LEAST_VARIETY
                or _UUID.fullmatch(form)
            ):
                continue
            self.secrets[form] = self._fresh[form] = what
            longest = max(_WORD.findall(form), key=len, default="")
            if len(longest) >= LEAST_LENGTH * 2 and not _UUID.fullmatch(longest):
                self._words[longest] = what

    def add_message(self, message: Any) -> None:
        """Note what is secret in something that was JSON."""
        for key, value in _pairs(message):
            if key.lower().endswith(ENDINGS) and isinstance(value, str):
                self.add(value, key)

    def add_request(self, path: str, headers: Any) -> None:
        """Note the token and the public key of a gateway's upgrade request."""
        for key in parse_qs(urlsplit(path).query).get("public_key", []):
            if (decoded := _decoded(key.replace(" ", "+"))) is not None:
                self.public_keys.add(decoded)
        for name, value in headers:
            if name.lower() == "x-authorization":
                self.add(value.removeprefix("Bearer "), "token")

    def add_ledger(self, path: Path) -> None:
        """Note what a development portal handed out."""
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last one, of a portal that was killed
                continue
            if entry.get("direction") == "upgrade" and entry.get("kind") == "gateway":
                self.add_request(entry["path"], entry["headers"])
            self.add_message(entry.get("payload"))

    # -- what was said

    def hear(self, where: str, text: str) -> None:
        """A text to look at."""
        if text:
            self._texts.append((where, text))

    def hear_log(self, name: str, path: Path) -> None:
        """What a log has grown by since it was looked at last."""
        if path.exists():
            begin = self._read.get(path, 0)
            data = path.read_bytes()
            self._read[path] = len(data)
            self.hear(f"the log of {name}", data[begin if begin <= len(data) else 0 :].decode(errors="replace"))

    # -- both

    def leaks(self) -> list[Leak]:
        """Compare what was said since the last time: with new secrets letter by letter, with all word by word."""
        texts, self._texts = self._texts, []
        fresh, self._fresh = self._fresh, {}
        return [leak for where, text in texts for leak in self._search(where, text, fresh)]

    def _search(self, where: str, text: str, fresh: dict[str, str]) -> Iterator[Leak]:
        found = {secret: what for secret, what in fresh.items() if secret in text}
        for word in set(_WORD.findall(text)) & self._words.keys():
            if not any(word in secret for secret in found):
                found[word] = self._words[word]
        from nacl.bindings import crypto_scalarmult_base  # parties of the lab import this module, and never search

        for key in set(_KEY.findall(text)) if self.public_keys else ():
            decoded = _decoded(key)
            if decoded is not None and crypto_scalarmult_base(decoded) in self.public_keys:
                found[key] = "the gateway's private key"
        for secret, what in found.items():
            line = next((line for line in text.splitlines() if secret in line), "")
            yield Leak(what, where, line.replace(secret, "<the secret>")[:500])


WATCH = Watch()


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _pairs(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _pairs(item)


def _decoded(key: str) -> bytes | None:
    """The 32 bytes that a key in base64 or hex stands for."""
    try:
        decoded = bytes.fromhex(key) if len(key) == 64 else base64.b64decode(key, validate=True)
    except (ValueError, binascii.Error):
        return None
    return decoded if len(decoded) == 32 else None
