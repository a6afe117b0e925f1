"""What the host refused, as sentences for the operator."""

from __future__ import annotations

from dataclasses import dataclass, field


class HostError(Exception):
    """The host cannot be used as it is; the message says what happened, with which value, and what to do now."""


@dataclass(frozen=True, slots=True)
class Report:
    """Sentences for the log: `notes` at INFO, `warnings` at WARN. Empty when there is nothing to say."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Append what another step had to say."""
        self.notes.extend(other.notes)
        self.warnings.extend(other.warnings)
