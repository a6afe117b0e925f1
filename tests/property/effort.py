"""How much the simulations and the fuzzing do: enough for every change; `make soak` repeats it with other seeds."""

from __future__ import annotations

import os

RUNS = 500  # of the two-sided simulation
MUTATIONS = 50_000  # of captures, over all parsers and state machines

SEED = int(os.environ.get("FZG_SEED", "1"))
"""Of what hypothesis does not draw. `make soak SEED=n` repeats a batch."""


def share(total: int, percent: int) -> int:
    """The part of `RUNS` or `MUTATIONS` that one test does; the percentages of all tests add up to 100."""
    return total * percent // 100
