"""What `--version --verbose` tells: the parts that a report of a fault should name."""

from __future__ import annotations

import json
import os
import platform
import ssl
import sys
from pathlib import Path
from typing import Any

from fzg.dataplane import select
from fzg.version import VERSION

# Written by the build (firezone_gateway.spec) into the folder that the frozen program unpacks.
_BUILD_RECORD = ".firezone-gateway.json"


def lines() -> list[str]:
    """The version as `--version` has it, then `name: value` for each part."""
    record = build_record()
    library = os.confstr("CS_GNU_LIBC_VERSION") or "not glibc"
    needed = f", {record['glibc']} or newer needed" if record else ""
    return [
        f"firezone-gateway {VERSION}",
        f"engine: {_engine()}",
        f"Python: {platform.python_version()}",
        f"libcrypto: {ssl.OPENSSL_VERSION}",
        f"C library: {library}{needed}",
        f"build: {_build(record)}",
    ]


def build_record() -> dict[str, Any]:
    """What the build noted in the frozen program; empty where the program is not frozen."""
    unpacked = getattr(sys, "_MEIPASS", None)
    if unpacked is None:
        return {}
    record: dict[str, Any] = json.loads((Path(unpacked) / _BUILD_RECORD).read_text())
    return record


def _engine() -> str:
    """Which one packets go through here, and if it is the slow one, why."""
    try:
        engine = select.make_engine()
    except select.EngineUnavailableError as error:
        return f"none: {error}"
    if select.engine_name(engine) == "native":
        return "native"
    if os.environ.get("FIREZONE_ENGINE") == "pure":
        return "pure, which FIREZONE_ENGINE asks for"
    return f"pure, several times slower: the native engine {select.why_not_native()}"


def _build(record: dict[str, Any]) -> str:
    if not record:
        return "none, run from its sources"
    commit = record["commit"] or "of an unknown commit"
    return f"{commit}, one file for {platform.machine()}"
