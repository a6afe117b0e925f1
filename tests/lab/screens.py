"""Pictures for README and docs, from real runs: `python -m tests.lab.screens` writes `docs/screen-*.svg`."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tests.lab.namespaces import can_make_namespaces, user_namespace_command
from tests.lab.process import REPOSITORY, wait_until
from tests.lab.scenario import Lab, available

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = 100
ROWS = 60
WEB = "http://10.20.0.100"
_A_FONT_FROM_ELSEWHERE = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def main() -> None:
    if not can_make_namespaces():
        command = user_namespace_command(sys.executable, "-m", "tests.lab.screens")
        os.execvp(command[0], command)
    if (reason := available()) is not None:
        sys.exit(f"the laboratory {reason}")
    with Lab("relay-relay", clients=2) as lab:
        for client in lab.clients:
            client.curl(f"{WEB}/bytes?num=3000000", "-o", "/dev/null")
        wait_until(lambda: '"connected"' in lab.gateway.command("status", "--json").stdout, timeout=5, what="a client")
        for name in ("status", "doctor"):
            picture(f"screen-{name}", f"firezone-gateway {name}", lambda word=name: _ask(lab, word))
    picture("screen-demo", "make demo", _demo)


def picture(name: str, title: str, run: Callable[[], str]) -> None:
    """Write what `run` printed, with its colours, as `docs/NAME.svg`."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(run().rstrip()), soft_wrap=True)
    path = REPOSITORY / "docs" / f"{name}.svg"
    drawn = console.export_svg(title=title, unique_id=name)
    path.write_text(_A_FONT_FROM_ELSEWHERE.sub("", drawn))
    print(path.relative_to(REPOSITORY))


def _ask(lab: Lab, word: str) -> str:
    """What the command shows on a terminal."""
    socket = f"FIREZONE_CONTROL_SOCKET={lab.gateway.process.environment['FIREZONE_CONTROL_SOCKET']}"
    variables = [f"{name}={value}" for name, value in lab.gateway.process.environment.items() if name.isupper()]
    command = f"stty columns {COLUMNS} rows {ROWS}; {sys.executable} -m fzg {word}"
    terminal = ("TERM=xterm-256color", "script", "--quiet", "--return", "--command", command, "/dev/null")
    return lab.gateway.run("env", *variables, socket, *terminal, check=False).stdout.replace("\r", "")


def _demo() -> str:
    command = [sys.executable, "-m", "tests.lab", "demo"]
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
