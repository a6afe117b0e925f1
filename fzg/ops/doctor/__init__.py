"""What `firezone-gateway doctor` says about a host: pure functions from what was seen to checks with remedies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fzg.ops.doctor import network, portal, start
from fzg.ops.doctor.check import Check, Live, Plan, Seen, State

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Check", "Live", "Plan", "Seen", "State", "examine"]


def examine(seen: Seen) -> Iterator[Check]:
    """Every check, in the order in which a start needs what it is about."""
    yield from start.checks(seen)
    yield from network.checks(seen)
    yield from portal.checks(seen)
