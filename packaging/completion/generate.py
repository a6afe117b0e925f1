"""Prints what makes a shell complete the command line: `python packaging/completion/generate.py bash|zsh|fish`."""

from __future__ import annotations

import sys

from click.shell_completion import get_completion_class

from fzg.cli import command

PROGRAM = "firezone-gateway"
VARIABLE = "_FIREZONE_GATEWAY_COMPLETE"  # click's name for it


def script(shell: str) -> str:
    """The shell's own file, which asks the program at each completion."""
    completion = get_completion_class(shell)
    if completion is None:
        raise SystemExit(f"{shell}: known are bash, zsh and fish")
    return completion(command, {}, PROGRAM, VARIABLE).source().strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(script(sys.argv[1]))
