"""Prints the oldest C library that an executable of ours runs with: `c_library.py EXECUTABLE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from PyInstaller.archive.readers import ArchiveReadError, CArchiveReader

OLDEST = (2, 31)  # what we say we support, and Debian 11 has: no claim for anything older
_SYMBOL_VERSION = re.compile(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)")


def needed(executable: Path) -> tuple[int, int]:
    """The newest symbol version of the executable and of all objects in it."""
    objects = [executable.read_bytes()]
    try:
        archive = CArchiveReader(str(executable))
    except ArchiveReadError:
        pass  # not a one-file program, as in tests
    else:
        objects += [archive.extract(name) for name, entry in archive.toc.items() if entry[-1] == "b"]
    found = (match for content in objects for match in _SYMBOL_VERSION.finditer(content))
    return max([OLDEST, *((int(match[1]), int(match[2])) for match in found)])


if __name__ == "__main__":
    sys.stdout.write("{}.{}\n".format(*needed(Path(sys.argv[1]))))
