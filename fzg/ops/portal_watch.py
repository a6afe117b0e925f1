"""Since when the portal is away, for metrics and the service manager."""

from __future__ import annotations


class PortalWatch:
    """Told of joins and failures by the process; `since` is when the present outage began, None while joined."""

    __slots__ = ("hiccups", "since")

    def __init__(self, now: float) -> None:
        self.hiccups = 0
        self.since: float | None = now

    def handle_joined(self) -> None:
        """The room is joined."""
        self.since = None

    def handle_failure(self, now: float) -> None:
        """A dial failed or a connection ended."""
        self.hiccups += 1
        if self.since is None:
            self.since = now

    @property
    def is_joined(self) -> bool:
        """Whether the portal can tell us something now."""
        return self.since is None

    def partition_age(self, now: float) -> float:
        """Seconds without the portal, 0 while it is there."""
        return 0.0 if self.since is None else max(0.0, now - self.since)
