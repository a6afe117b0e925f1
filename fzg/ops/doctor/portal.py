"""What lies between the gateway and its portal and relays: names, TCP, TLS, clocks, the login, UDP."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from fzg.ops.doctor.check import Check, State
from fzg.portal import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.ops.doctor.check import Seen

# An authorization ends by our clock: half a minute more or less matters to nobody, five minutes to an auditor.
_LARGE_SKEW: Final = 30.0
_WRONG_SKEW: Final = 300.0
_EARLIEST_YEAR: Final = 2025  # no gateway of this version existed before

_UDP: Final = "let UDP out of this host's network to any port (relays use 3478 and 49152-65535) and answers back in"


def checks(seen: Seen) -> Iterator[Check]:
    """Step by step towards the portal, then the relays."""
    yield from way(seen)
    yield clock(seen)
    yield login(seen)
    yield udp_out(seen)


def way(seen: Seen) -> Iterator[Check]:
    """One check per step; those behind a failed one are unknown."""
    portal = seen.portal
    if seen.plan.portal_problem:
        yield Check("portal", State.FAIL, seen.plan.portal_problem, "correct FIREZONE_API_URL")
        return
    if portal is None:
        yield Check("portal", State.UNKNOWN, "not asked (--offline)")
        return
    if portal.failed:
        seen_part, _, advice = portal.problem.rpartition("; ")
        names = {"name": "portal-name", "certificate": "portal-certificate"}
        if portal.failed == "certificate" and "clock says" in portal.problem:
            seen_part, _, advice = portal.problem.partition("; ")
        through = f" through the proxy {portal.proxy}" if portal.proxy else ""
        if not seen_part:
            seen_part, _, advice = portal.problem.rstrip(".").partition(". ")
        what = f"{portal.host}:{portal.port}{through}: {seen_part}"
        yield Check(names.get(portal.failed, "portal"), State.FAIL, what, advice)
        return
    through = f" through the proxy {portal.proxy}" if portal.proxy else ""
    where = "" if portal.proxy else f" ({', '.join(portal.addresses)})"
    yield Check(
        "portal", State.OK, f"{portal.host}:{portal.port}{where} answers{through} in {portal.seconds * 1000:.0f} ms"
    )
    if portal.secure:
        yield Check("portal-certificate", State.OK, f"valid. {portal.trust}".rstrip("."))
    else:
        what = "the connection is not encrypted, so the token can be read on the way"
        yield Check("portal-certificate", State.WARN, what, "use a wss:// URL, except on this host or in a laboratory")


def clock(seen: Seen) -> Check:
    """Certificates and expiries go by the host's clock."""
    wall, name = seen.host.wall, "clock"
    shown = remedy.date(wall)
    if datetime.fromtimestamp(wall, UTC).year < _EARLIEST_YEAR:
        return Check(name, State.FAIL, f"this host's clock says {shown}", remedy.SET_CLOCK)
    ahead = seen.portal.ahead if seen.portal is not None else None
    if ahead is None:
        return Check(name, State.OK, f"{shown}; the portal's was not read")
    if abs(ahead) < _LARGE_SKEW:
        return Check(name, State.OK, f"{shown}, as the portal's")
    side = "ahead of" if ahead > 0 else "behind"
    what = f"this host's clock says {shown}, {_span(abs(ahead))} {side} the portal's"
    return Check(name, State.FAIL if abs(ahead) > _WRONG_SKEW else State.WARN, what, remedy.SET_CLOCK)


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def login(seen: Seen) -> Check:
    """Whether the portal takes token and identity: only the running gateway knows, asking again would disturb it."""
    name, live = "portal-login", seen.live
    if live is None:
        if seen.stuck:
            what = f"a gateway runs and does not answer as it should: {seen.stuck}"
            return Check(name, State.FAIL, what, "restart it: sudo systemctl restart firezone-gateway")
        if seen.live_problem:
            return Check(name, State.UNKNOWN, seen.live_problem, "ask as root")
        what = "whether the portal takes token and identity shows when the gateway starts"
        return Check(name, State.UNKNOWN, what, "the log of its last start says: journalctl -u firezone-gateway -n 20")
    if live.portal_connected:
        clients = "1 client" if live.clients == 1 else f"{live.clients} clients"
        return Check(name, State.OK, f"the gateway is connected to the portal and serves {clients}")
    if not live.portal_error:
        return Check(name, State.WARN, "the gateway is not connected to the portal yet", "ask again in a few seconds")
    what, _, advice = live.portal_error.partition("; ")
    return Check(name, State.FAIL, f"the gateway is not connected: {what}", advice or "see its log")


def udp_out(seen: Seen) -> Check:
    """Without UDP to a relay no client can connect."""
    name = "udp-outbound"
    relays = seen.live.relays if seen.live is not None else ()
    answering = [address for address, answers in relays if answers]
    answered = [answer for answer in seen.stun if answer.seconds is not None]
    if answered:
        best = min(answered, key=lambda answer: answer.seconds or 0.0)
        mapped = f", sees this host as {best.mapped}" if best.mapped is not None else ""
        silent = [answer.server for answer in seen.stun if answer.seconds is None]
        what = f"{best.server} answers in {(best.seconds or 0.0) * 1000:.0f} ms{mapped}"
        if silent:
            return Check(name, State.WARN, f"{what}; no answer from {', '.join(silent)}", "nothing, while one answers")
        return Check(name, State.OK, what)
    if seen.stun:
        asked = ", ".join(answer.server for answer in seen.stun)
        return Check(name, State.FAIL, f"UDP seems blocked: no answer from {asked}", _UDP)
    if answering:
        return Check(name, State.OK, f"the running gateway hears {', '.join(answering)}")
    if relays:
        asked = ", ".join(address for address, _ in relays)
        return Check(name, State.FAIL, f"UDP seems blocked: the gateway hears none of its relays {asked}", _UDP)
    return Check(
        name, State.UNKNOWN, "no relay is known before the gateway runs", "--stun HOST:PORT asks a server of yours"
    )
