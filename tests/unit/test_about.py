"""`--version --verbose`: what a report of a fault should name."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fzg import cli
from fzg.ops import about


def verbose():
    first, *parts = about.lines()
    return first, dict(part.split(": ", 1) for part in parts)


def test_the_first_line_is_that_of_the_version_alone_and_each_part_has_a_name():
    first, parts = verbose()
    assert first == "firezone-gateway 1.6.1"
    assert list(parts) == ["engine", "Python", "libcrypto", "C library", "build"]
    assert parts["build"] == "none, run from its sources"


@pytest.mark.parametrize("wanted", ["--version --verbose", "-V --verbose", "--verbose -V"])
def test_verbose_may_stand_on_either_side_of_version(wanted):
    done = CliRunner().invoke(cli.command, wanted.split())
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == "firezone-gateway 1.6.1"
    assert "engine: " in done.output


def test_verbose_alone_is_a_mistake_that_names_what_was_meant():
    done = CliRunner().invoke(cli.command, ["--verbose"])
    assert done.exit_code == 2
    assert "--verbose goes with --version" in done.output


def test_an_engine_that_was_asked_for_is_named_with_the_reason(monkeypatch):
    monkeypatch.setenv("FIREZONE_ENGINE", "pure")
    assert verbose()[1]["engine"] == "pure, which FIREZONE_ENGINE asks for"


def test_an_engine_that_is_missing_is_named_with_the_reason(monkeypatch):
    monkeypatch.delenv("FZG_REQUIRE_NATIVE", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "fzg.dataplane._native", None)
    assert verbose()[1]["engine"] == "pure, several times slower: the native engine was not built"


def test_a_frozen_program_tells_its_build_and_the_c_library_it_needs(monkeypatch, tmp_path):
    (tmp_path / ".firezone-gateway.json").write_text('{"commit": "0123456789ab", "glibc": "2.31"}')
    monkeypatch.setattr("sys._MEIPASS", str(tmp_path), raising=False)
    _, parts = verbose()
    assert parts["build"].startswith("0123456789ab, one file for ")
    assert parts["C library"].endswith(", 2.31 or newer needed")
