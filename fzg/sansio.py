"""The contract that every state machine keeps: five verbs, and time as an argument.

    handle_<input>(..., now)             something happened
    handle_timeout(now)                  the deadline may have passed
    poll_timeout() -> Deadline | None    when to call next, and why
    poll_transmit() -> ... | None        what to send, where; call until None
    poll_event() -> ... | None           what the layer above must know; call until None

`now` is seconds of CLOCK_BOOTTIME. Randomness is injected like time, as a `Random`.
The caller mutates once, drains transmits and events until empty, then re-arms its timer only if the deadline moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from fzg.wire.endpoint import Endpoint


class Random(Protocol):
    """`os.urandom` or a stand-in for tests: `n` random bytes."""

    def __call__(self, n: int, /) -> bytes:
        """`n` bytes."""


class Deadline(NamedTuple):
    """When `handle_timeout` is due, and a short reason that shows up in logs of timers that spin."""

    at: float
    reason: str


class EcnCodepoint:
    """RFC 3168 codepoints as they stand in the low two bits of TOS or traffic class."""

    NOT_ECT = 0
    ECT1 = 1
    ECT0 = 2
    CE = 3


@dataclass(frozen=True, slots=True)
class Transmit:
    """One UDP datagram to send. `source` is the packed local IP, or None where the kernel picks it (relays).

    `peer`: the engine's handle of the client whose forwarded data it is, so that `revoke` can take it back.
    """

    destination: Endpoint
    payload: bytes
    source: bytes | None = None
    ecn: int = EcnCodepoint.NOT_ECT
    peer: int | None = None


def earliest(*deadlines: Deadline | None) -> Deadline | None:
    """The soonest of several deadlines; None when there is none."""
    best: Deadline | None = None
    for deadline in deadlines:
        if deadline is not None and (best is None or deadline.at < best.at):
            best = deadline
    return best


def random_unit(random: Random) -> float:
    """A uniform float in [0, 1) with 53 random bits."""
    return (int.from_bytes(random(7), "big") >> 3) / (1 << 53)
