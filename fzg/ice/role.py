"""Who nominates."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """RFC 8445 4: the controlling agent nominates; a gateway is controlled."""

    CONTROLLED = "controlled"
    CONTROLLING = "controlling"

    @property
    def opposite(self) -> Role:
        """The role the peer should have."""
        return Role.CONTROLLING if self is Role.CONTROLLED else Role.CONTROLLED
