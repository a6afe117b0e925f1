"""What the documentation says is what the code does."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fzg.cli import command
from fzg.settings import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT_HERE = os.environ | {"PYTHONPATH": str(ROOT)}
A_VARIABLE = re.compile(
    r"(FIREZONE|FZG|SSL_CERT|XDG|OTLP)_[A-Z_]+|RUST_LOG|(CREDENTIALS|RUNTIME)_DIRECTORY|NOTIFY_SOCKET|WATCHDOG_USEC"
    r"|(HTTPS|NO)_PROXY|HEALTH_CHECK_ADDR|TE?MP"
)
OF_BUILDS = {"FZG_REQUIRE_NATIVE"}


def test_the_page_of_settings_is_that_of_the_code():
    subprocess.run(
        [sys.executable, "packaging/settings_page.py", "--check"], cwd=ROOT, check=True, env=ENVIRONMENT_HERE
    )


def test_every_variable_that_the_code_reads_is_documented():
    read = {
        node.value
        for path in (ROOT / "fzg").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and A_VARIABLE.fullmatch(node.value)
    }
    also = {name for variable in ENVIRONMENT for name in re.findall(r"`([A-Z_]+)`", variable.meaning)}
    known = also | {variable.name for variable in ENVIRONMENT} | {str(param.envvar) for param in command.params}
    assert read - OF_BUILDS <= known | {"FIREZONE_TOKEN"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [each for each in targets if "://" not in each and not (page.parent / each).exists()]
    assert missing == []


def test_each_picture_is_shown_somewhere():
    shown = {name for page in PAGES for name in re.findall(r"!\[[^]]*\]\((?:docs/)?([\w.-]+\.svg)\)", page.read_text())}
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == shown


OF_OTHERS = (  # the launcher's, the loader's and OpenSSL's own words
    "Failed to load Python shared library", "failed to map segment", "Could not create temporary directory",
    "Failed to extract", "return code -1", "GLIBC_2.", "not found",
    "certificate is not yet valid", "certificate has expired",
)  # fmt: skip


def texts_of_the_code():
    """Every text of the program, with a gap where a value is put in; those that stand side by side are one."""
    for path in (ROOT / "fzg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_what_a_line_of_the_log_is_said_to_say_it_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.partition("## It does not start")[2].partition("## ")[0]
    quoted = [each for row in table.splitlines()[4:] for each in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) > 10
    texts = [re.sub(r"^\0", "/dev/net/tun", text) for text in texts_of_the_code()]
    assert [each for each in quoted if each not in OF_OTHERS and not any(each in text for text in texts)] == []


A_LIMIT = re.compile(r"^\| ([^|]+) \| ([\d,]+) \| `(\w+)` in `(fzg/\S+)\.py` \|$", re.MULTILINE)
LIMITS = A_LIMIT.findall((ROOT / "docs" / "security.md").read_text())


@pytest.mark.parametrize(("what", "limit", "name", "module"), LIMITS, ids=[what for what, *_ in LIMITS])
def test_a_limit_is_as_high_as_the_security_page_says(what, limit, name, module):
    assert getattr(import_module(module.replace("/", ".")), name) == int(limit.replace(",", ""))


def test_each_limit_of_the_security_page_is_checked():
    table = (ROOT / "docs" / "security.md").read_text().partition("## Limits")[2].partition("## ")[0]
    assert table.count("\n| ") - 2 == len(LIMITS) > 10
