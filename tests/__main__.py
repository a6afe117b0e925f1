"""All tests in two runs of pytest side by side: `python -m tests [OPTION of pytest]...`.

Tests of programs in namespaces wait most of their time; those that only compute fill it, and yield to them. Their
report follows when both are done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
WAITING = ("interop", "system")
COMPUTING = ("unit", "property")
YIELDING = 10
"""Nice value: a tenth of a core where a test with programs wants all of it."""
NO_TESTS = 5
"""pytest's exit status when the options leave no test, as `-k` may in one of the two."""


def main(options: list[str]) -> int:
    """The exit status: 0 if no test failed in either."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as report:
        computing = subprocess.Popen(
            ["nice", "-n", str(YIELDING), *_pytest(COMPUTING, options)], stdout=report, stderr=subprocess.STDOUT
        )
        try:
            waiting = subprocess.run(_pytest(WAITING, options), check=False).returncode
            computed = computing.wait()
        finally:
            computing.terminate()
            computing.wait()
            report.seek(0)
            shutil.copyfileobj(report, sys.stdout)
    statuses = {"interop, system": waiting, "unit, property": computed}
    for folders, status in statuses.items():
        print(f"tests in {folders}: {_verdict(status)}")
    print(f"{time.monotonic() - began:.0f} s")
    failed = [status for status in statuses.values() if status not in (0, NO_TESTS)]
    return failed[0] if failed else min(statuses.values())


def _pytest(folders: tuple[str, ...], options: list[str]) -> list[str]:
    # Each has a cache of its own, so that `--last-failed` finds what failed in either.
    cache = f"cache_dir=.pytest_cache/{folders[0]}"
    return [sys.executable, "-m", "pytest", "-o", cache, *options, *(str(TESTS / folder) for folder in folders)]


def _verdict(status: int) -> str:
    return {0: "passed", NO_TESTS: "none chosen"}.get(status, f"failed (pytest's exit status {status})")


if __name__ == "__main__":
    os.chdir(TESTS.parent)
    sys.exit(main(sys.argv[1:]))
