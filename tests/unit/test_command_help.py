"""What `--help` of the operator's commands looks like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fzg import commands
from fzg.cli import command as gateway

ROOT = Path(__file__).parents[2]


def help_of(name):
    command = commands.load(name)
    with click.Context(command, info_name=f"firezone-gateway {name}", terminal_width=80) as context:
        return command.get_help(context)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_it_fits_into_80_columns_and_holds_nothing_but_text(name):
    shown = help_of(name)
    assert max(map(len, shown.splitlines())) <= 80
    assert "\\" not in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_the_gateway_s_own_help_names_each_command_and_what_it_is_for():
    with click.Context(gateway, info_name="firezone-gateway", terminal_width=80) as context:
        shown = gateway.get_help(context)
    assert max(map(len, shown.splitlines())) <= 80
    for name in commands.COMMANDS:
        assert re.search(rf"^  {name} +{re.escape(commands.load(name).short_help)}$", shown, re.MULTILINE), name


def test_examples_stand_on_lines_of_their_own_here_and_in_the_manual():
    example = "firezone-gateway trace udp 100.64.0.1 wiki.example.com:53"
    assert f"\n  {example}\n" in help_of("trace")
    page = subprocess.run(
        [sys.executable, "packaging/man/generate.py"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "\n" + example.replace("-", r"\-") + "\n" in page
    assert "\\b\n" not in page
