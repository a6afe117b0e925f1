"""The native engine under AddressSanitizer and UBSan: its whole suite, then new cases until two minutes are over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 90  # from the start, the build included; one round of cases may be under way then
LAST_LINES = 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sanitizers_find_nothing_in_the_engine() -> None:
    pytest.importorskip("Cython", reason="Cython is not installed")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("missing cc (package gcc)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("missing Python.h (package python3-dev)")
    done = subprocess.run(
        [REPOSITORY / "packaging" / "sanitized", sys.executable, str(SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=850,
        check=False,
    )
    tail = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
    assert done.returncode == 0, tail
    assert done.stdout.count(" passed") >= 2, tail
    (built,) = (REPOSITORY / ".cache" / "sanitized").glob("*/_native*.so")
    octets = built.read_bytes()
    assert b"__asan_report_load" in octets
    assert b"__ubsan_handle" in octets
