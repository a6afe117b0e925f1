"""Many clients, many new ones, and strangers (issue: scale), by the bench's own means and with room for a busy machine.

`make bench` prints the figures beside their bounds; here each may be as much worse as other work on the same
cores makes it. None of them is met by a gateway whose cost per client or per datagram grows with their number.
"""

from __future__ import annotations

import os
import subprocess
import sys
from json import loads

import pytest

from tests.bench.scale import BOUNDS, PARTS

pytestmark = [
    pytest.mark.needs("root", "ip", "setpriv", "unshare", "tun"),
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(300),
]

ROOM = {"%": 2.0, "ms": 5.0, "s": 2.0, "KiB": 1.0, "1/s": 0.5, "": 1.0}


@pytest.mark.parametrize("part", PARTS)
def test_figures_of_scale_are_within_their_bounds(part, tmp_path):
    """In a process of its own, since the swarm needs gevent's sockets."""
    output = tmp_path / "scale.json"
    command = [sys.executable, "-m", "tests.bench.scale", "--only", part, "--output", str(output)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": "."})
    figures = loads(output.read_text())["figures"]
    missed = {
        name: value
        for name, value in figures.items()
        if ((most := BOUNDS[name].most) is not None and value > most * ROOM[BOUNDS[name].unit])
        or ((least := BOUNDS[name].least) is not None and value < least * ROOM[BOUNDS[name].unit])
    }
    assert missed == {}
