"""A check's result, and all that the checks look at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fzg.host.facts import HostFacts
    from fzg.host.reach import Answer, Portal


class State(StrEnum):
    """How bad it is. UNKNOWN: this user cannot see it, or there is nothing yet to see."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Check(NamedTuple):
    """One thing that was looked at. `seen` is a clause without a full stop, `remedy` one that can be acted on."""

    name: str
    state: State
    seen: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a gateway that is started here and now, with these options and variables, would go by."""

    udp_port: int
    health_address: str
    health_port: int
    masquerade: bool = True
    token_source: str = ""
    """Where the token comes from; empty if there is none."""
    token_problem: str = ""
    identity: str = ""
    identity_source: str = ""
    """`FIREZONE_ID`, a file, or empty for a random one that is made at the start."""
    portal_problem: str = ""
    """Why the portal's URL cannot be used."""
    command: str = "firezone-gateway"
    """How to call this program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What the running gateway says about itself."""

    pid: int = 0
    portal_connected: bool = False
    portal_error: str = ""
    relays: tuple[tuple[str, bool], ...] = ()
    """Each with whether it answers."""
    clients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that was seen. `portal` is None where it was not asked, `live` where no gateway answers."""

    host: HostFacts
    plan: Plan
    portal: Portal | None = None
    stun: tuple[Answer, ...] = ()
    live: Live | None = None
    live_problem: str = ""
    """Why this user may not ask the gateway that runs."""
    stuck: str = ""
    """What became of asking a gateway that listens and does not answer as it should."""

    @property
    def running(self) -> bool:
        """Whether a gateway runs here, as far as can be told."""
        held = self.host.link == "tun" and self.host.tun_holder is not None
        return self.live is not None or held or bool(self.live_problem or self.stuck)

    @property
    def serves_here(self) -> bool:
        """Whether its device is in this network namespace too, so that firewall and sysctls here concern it."""
        return self.running and self.host.link is not None
