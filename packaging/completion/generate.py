"""Prints what makes a shell complete the command line: `python packaging/completion/generate.py bash|zsh|fish`."""

from __future__ import annotations

import sys

from click.shell_completion import get_completion_class

from fzg.cli import command
from fzg.commands import COMMANDS

PROGRAM = "firezone-gateway"
VARIABLE = "_FIREZONE_GATEWAY_COMPLETE"  # click's name for it
# How click's scripts call the program: $1 in bash, its name elsewhere.
CALLS = {
    "bash": "bash_complete $1)",
    "zsh": "zsh_complete firezone-gateway)",
    "fish": "(commandline -t) firezone-gateway)",
}
# The installed program is for root and its group: who completes a line for sudo may not execute it.
FALLBACK = """
    if [[ -z $response && $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W $'@COMMANDS@' -- "${COMP_WORDS[1]}"))
        return 0
    fi
"""


def script(shell: str) -> str:
    """The shell's own file, which asks the program at each completion."""
    completion = get_completion_class(shell)
    if completion is None:
        raise SystemExit(f"{shell}: known are bash, zsh and fish")
    source: str = completion(command, {}, PROGRAM, VARIABLE).source().strip() + "\n"
    call = CALLS[shell]
    if source.count(call) != 1:
        raise SystemExit(f"click's script for {shell} is another one than is known here")
    source = source.replace(call, f"{call.removesuffix(')')} 2>/dev/null)")
    if shell == "bash":
        silent = "2>/dev/null)\n"
        source = source.replace(silent, silent + FALLBACK.replace("@COMMANDS@", r"\n".join(COMMANDS)))
    return source


if __name__ == "__main__":
    sys.stdout.write(script(sys.argv[1]))
