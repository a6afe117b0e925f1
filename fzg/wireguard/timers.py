"""WireGuard's times as this network uses them (spec connectivity 5.4). All in seconds."""

from __future__ import annotations

from dataclasses import dataclass

REKEY_AFTER_TIME = 120.0
REJECT_AFTER_TIME = 180.0
# Leaves the responder, which may send for the full 180 s, no session that we no longer open.
INITIATOR_STOPS_SENDING = 170.0
EXPIRE_WITHOUT_HANDSHAKE = 3 * REJECT_AFTER_TIME
MAX_JITTER = 0.333

# The limits of a session's age hold for what is older, so they are due this much after them.
AGE_STEP = 0.001

# Nothing that was unanswered when we looked can be due earlier than a keepalive timeout from then; so a look per
# such time suffices. Only "rekey once data was sent" has no such notice: it is looked for twice as often.
REKEY_LOOK_INTERVAL = 5.0
# Looks may as well come a little early: on a grid, those of many idle peers share their passes.
LOOK_GRID = 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """The times that differ between the modes of a connection."""

    keepalive_timeout: float
    rekey_timeout: float
    rekey_attempt_time: float

    @property
    def new_handshake_timeout(self) -> float:
        """From the first unanswered data packet sent to an initiation."""
        return self.keepalive_timeout + self.rekey_timeout

    @property
    def rekey_on_receive_time(self) -> float:
        """The age at which an initiator that has received data renews a session."""
        return REJECT_AFTER_TIME - self.new_handshake_timeout


ICE = Timing(keepalive_timeout=10.0, rekey_timeout=5.0, rekey_attempt_time=20.0)
ICELESS = Timing(keepalive_timeout=5.0, rekey_timeout=2.0, rekey_attempt_time=90.0)
