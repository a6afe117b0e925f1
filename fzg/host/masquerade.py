"""Whether packets of clients leave with this host's address."""

from __future__ import annotations

from enum import StrEnum


class Masquerade(StrEnum):
    """OFF needs routes back to the peer ranges. AUTO goes on, with a warning, where the host refuses; ON fails then."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
