"""What a shell completes, and the manual page: both come from the code, so that neither can be behind it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module

import click
import pytest

from fzg.cli import command
from fzg.commands import COMMANDS
from fzg.settings import ENVIRONMENT
from tests.lab.process import REPOSITORY
from tests.lab.program import gateway_command

pytestmark = pytest.mark.slow

GENERATORS = REPOSITORY / "packaging"


def generated(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stderr == ""
    return done.stdout


def visible(owner):
    return [
        name for param in owner.params if isinstance(param, click.Option) and not param.hidden for name in param.opts
    ]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for the last word of a line."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "firezone-gateway"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(gateway_command())} "$@"\n')
    program.chmod(0o755)
    (folder / "script").write_text(generated(GENERATORS / "completion" / "generate.py", "bash"))

    def complete(line):
        words = line.split(" ")
        source = (
            f"source {folder}/script\n"
            f"COMP_WORDS=({' '.join(map(repr, words))}) COMP_CWORD={len(words) - 1}\n"
            "$(complete -p firezone-gateway | sed 's/.* -F \\([^ ]*\\).*/\\1/') firezone-gateway\n"
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            ["bash", "--norc", "-c", source], capture_output=True, text=True, env=environment, check=False
        )
        assert done.stderr == ""
        return done.stdout.split()

    return complete


def test_bash_offers_the_commands_and_no_token(complete):
    assert sorted(complete("firezone-gateway ")) == sorted(COMMANDS)
    assert complete("firezone-gateway do") == ["doctor"]
    assert complete("firezone-gateway --no-check do") == ["doctor"]
    assert complete("firezone-gateway .SFM") == []


def test_bash_offers_every_option_of_the_gateway(complete):
    long = [name for name in visible(command) if name.startswith("--")]
    assert set(complete("firezone-gateway --")) == {*long, "--help"}
    assert complete("firezone-gateway --log-format ") == ["human", "json"]


def test_behind_a_command_bash_offers_its_options(complete):
    offered = complete("firezone-gateway status --")
    assert set(visible(import_module(COMMANDS["status"]).command)) <= set(offered)
    assert "--log-format" not in offered
    assert complete("firezone-gateway status ") == []


def test_who_may_not_execute_the_program_is_offered_its_commands_and_sees_no_error(tmp_path):
    (tmp_path / "script").write_text(generated(GENERATORS / "completion" / "generate.py", "bash"))
    (tmp_path / "firezone-gateway").write_text("#!/bin/sh\n")
    (tmp_path / "firezone-gateway").chmod(0o600)
    for word, number, offered in (("", 1, sorted(COMMANDS)), ("do", 1, ["doctor"]), ("--", 2, [])):
        before = "status " * (number - 1)
        source = (
            f"source {tmp_path}/script; COMP_WORDS=(firezone-gateway {before}{word!r}) COMP_CWORD={number}\n"
            f'_firezone_gateway_completion {tmp_path}/firezone-gateway; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(["bash", "--norc", "-c", source], capture_output=True, text=True, check=False)
        assert (sorted(done.stdout.split()), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_ask_the_program_in_the_same_way(shell):
    script = generated(GENERATORS / "completion" / "generate.py", shell)
    assert f"_FIREZONE_GATEWAY_COMPLETE={shell}_complete" in script


@pytest.fixture(scope="module")
def page():
    return generated(GENERATORS / "man" / "generate.py")


@pytest.mark.needs("mandoc")
def test_mandoc_finds_nothing_to_complain_about_in_the_pages(page):
    for text in (page, (GENERATORS / "man" / "firezone.8").read_text()):
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning"], input=text, capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


@pytest.fixture(scope="module")
def text(page):
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=200"], input=page, capture_output=True, text=True, check=True
    )
    return re.sub(r".\x08", "", done.stdout)


@pytest.mark.needs("mandoc")
def test_the_page_tells_every_option_command_and_variable(text):
    for option in visible(command):
        assert re.search(rf"^\s+(-\w, )?{re.escape(option)}\b", text, re.MULTILINE), option
    for param in command.params:
        if isinstance(param, click.Option) and param.envvar and not param.hidden:
            assert f"[env: {param.envvar}]" in text
    for name, module in COMMANDS.items():
        (section,) = re.findall(rf"^   {name}\n((?:     .*\n|\n)+)", text, re.MULTILINE)
        for option in visible(import_module(module).command):
            assert option in section
    for variable in ENVIRONMENT:
        assert re.search(rf"^\s+{re.escape(variable.name)}\b", text, re.MULTILINE)


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize(
    "fact", ["EXIT STATUS", "SIGUSR1", "/etc/firezone/gateway-token", "/var/lib/firezone/gateway_id", "CAP_NET_ADMIN"]
)
def test_the_page_tells_what_no_option_does(text, fact):
    assert fact in text
