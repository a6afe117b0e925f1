"""Why a packet passes or not: the verdict of the policy itself, on a rehearsal, and what each of its checks sees.

The verdict never comes from here: `Tunnel.rehearsal` gives a tunnel that judges as the real one, with the same code,
and is thrown away. The steps ask the predicates that the policy asks, and end with the one that decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from math import inf
from typing import TYPE_CHECKING, Literal

from fzg.tunnel.client import Refusal
from fzg.tunnel.events import Consumed, Deliver, Drop, Forward, Reply
from fzg.tunnel.filters import IcmpFilter, TcpFilter, UdpFilter, UnknownFilter
from fzg.tunnel.nat import Entry, Lookup
from fzg.tunnel.ranges import is_excluded_from_internet, is_multicast, is_peer, is_proxy
from fzg.tunnel.resources import CidrResource, DnsResource, InternetResource
from fzg.wire import ip

if TYPE_CHECKING:
    from fzg.tunnel.client import Client
    from fzg.tunnel.events import Verdict
    from fzg.tunnel.filters import Filter
    from fzg.tunnel.resources import Authorization
    from fzg.tunnel.tunnel import Tunnel
    from fzg.wire.ip import Packet

# A client may hold thousands of resources for one network; nobody reads more than this many.
MAX_LISTED = 20

Outcome = Literal["ok", "stop", "note"]


@dataclass(frozen=True, slots=True)
class Step:
    """One check: it lets the packet go on (`ok`), decides against it (`stop`), or only tells (`note`)."""

    check: str
    outcome: Outcome
    detail: str


@dataclass(slots=True)
class Explanation:
    """The steps in their order, and the policy's own verdict."""

    steps: list[Step] = field(default_factory=list)
    verdict: str = ""
    reason: str | None = None
    """Of a drop: a `DropReason`."""
    passes: bool = False
    translated: str | None = None

    def add(self, check: str, detail: str, *, ok: bool | None = True) -> bool:
        """A step; None for one that decides nothing. Returns `ok`, so that a chain of checks can end there."""
        self.steps.append(Step(check, "note" if ok is None else "ok" if ok else "stop", detail))
        return bool(ok)


def explain_outgoing(tunnel: Tunnel, client_id: str, packet: bytes, now: float) -> Explanation:
    """A packet from this client to the network or to us."""
    told = Explanation()
    rehearsal = tunnel.rehearsal(client_id, now)
    client = rehearsal.client(client_id)
    if client is None:
        told.add("client", f"{client_id} holds no authorization here", ok=False)
    else:
        _follow_outgoing(told, client, ip.parse(packet), now)
    _conclude(told, rehearsal.handle_inner_packet(client_id, packet, 0, now))
    return told


def explain_incoming(tunnel: Tunnel, packet: bytes, now: float) -> Explanation:
    """A packet that the kernel routed to the TUN device."""
    told = Explanation()
    parsed = ip.parse(packet)
    client = tunnel.client_at(parsed.destination)
    rehearsal = tunnel.rehearsal(client.id if client is not None else "", now)
    if not is_peer(parsed.destination):
        told.add("destination", f"{_text(parsed.destination)} is no tunnel address", ok=False)
    elif client is None:
        told.add("client", f"no client here has the address {_text(parsed.destination)}", ok=False)
    else:
        _follow_incoming(told, client.rehearsal(), parsed, now)
    _conclude(told, rehearsal.handle_tun_packet(packet, now))
    return told


def _follow_outgoing(told: Explanation, client: Client, parsed: Packet, now: float) -> None:
    destination, where = parsed.destination, _text(parsed.destination)
    if is_multicast(destination):
        told.add("destination", f"{where} is a multicast address", ok=False)
        return
    _tell_client(told, client)
    is_own = parsed.source in (client.ipv4, client.ipv6)
    own = f"{_text(client.ipv4)} and {_text(client.ipv6)}"
    if not told.add(
        "source", f"{_text(parsed.source)} is {'its own' if is_own else f'not its own: {own} are'}", ok=is_own
    ):
        return
    if destination in client.exempt:
        told.add("destination", f"{where} is this gateway's own tunnel address, open to each of its clients")
        return
    if is_peer(destination):
        told.add("destination", f"{where} is another tunnel address: clients do not reach each other here", ok=False)
        return
    admitted = _follow_resources(told, client, destination, parsed.protocol, parsed.destination_value, now)
    if admitted is None or not is_proxy(destination):
        return
    proxy = client.proxies.get(destination)
    if proxy is None or proxy.resolved is None:
        name = (
            f"{proxy.domain} has no address of this IP version" if proxy is not None else f"{where} stands for no name"
        )
        told.add("DNS NAT", name, ok=False)
        return
    told.add("DNS NAT", f"{where} stands for {proxy.domain}, which is {_text(proxy.resolved)}")
    value = parsed.source_value
    if value is None:
        told.add("NAT session", "only TCP, UDP and ICMP echo can be translated", ok=False)
        return
    entry = client.nat.outgoing(value, destination, proxy.resolved, parsed.tcp_flags, now)
    if entry is None:
        told.add("NAT session", f"none is left: {len(client.nat)} are open, or no port is free", ok=False)
    else:
        told.add("NAT session", f"to {_text(entry.real)} from port or identifier {entry.outside_value & 0xFFFF}")


def _follow_incoming(told: Explanation, client: Client, parsed: Packet, now: float) -> None:
    source, where = parsed.source, _text(parsed.source)
    _tell_client(told, client)
    if source in client.exempt:
        told.add("source", f"{where} is this gateway's own tunnel address, open to each of its clients")
        return
    if parsed.destination_value is None:
        told.add("protocol", "neither TCP, UDP nor ICMP echo: only ICMP errors about a client's packets pass", ok=None)
        return
    entry = client.nat.incoming(parsed.destination_value, source, parsed.tcp_flags, now)
    if entry is Lookup.EXPIRED:
        told.add("NAT session", f"the one from {where} to this port has ended", ok=False)
        return
    if isinstance(entry, Entry):
        proxy = client.proxies.get(entry.proxy)
        name = f", for {proxy.domain}" if proxy is not None else ""
        told.add("NAT session", f"the client knows {where} as {_text(entry.proxy)}{name}")
        source = entry.proxy
    elif is_peer(source) or is_proxy(source):
        told.add("source", f"{where} exists on clients only, so this one is forged", ok=False)
        return
    else:
        told.add("NAT session", "none, so it is no answer to a DNS resource", ok=None)
    _follow_resources(told, client, source, parsed.protocol, parsed.source_value, now)


def _tell_client(told: Explanation, client: Client) -> None:
    addresses = f"{_text(client.ipv4)}, {_text(client.ipv6)}"
    count = client.resource_count
    told.add("client", f"{client.id} ({addresses}) holds {count} {'resource' if count == 1 else 'resources'}")


def _follow_resources(  # noqa: PLR0917 - what `Client.classify` is asked
    told: Explanation, client: Client, remote: bytes, protocol: int, value: int | None, now: float
) -> Authorization | None:
    """Each resource that covers the address, then what the policy makes of them together."""
    covering = [each for each in client.authorizations if _covers(client, each, remote)]
    for each in covering[:MAX_LISTED]:
        told.add("resource", _describe(each, protocol, value, now), ok=None)
    if len(covering) > MAX_LISTED:
        told.add("resource", f"{len(covering) - MAX_LISTED} more cover the address", ok=None)
    admitted = client.classify(remote, protocol, value, now)
    where = _text(remote)
    if isinstance(admitted, Refusal):
        if admitted is Refusal.NETWORK:
            told.add("policy", f"the internet resource does not cover {where}", ok=False)
        elif not covering:
            told.add("policy", f"no resource of the client covers {where}", ok=False)
        else:
            told.add("policy", "no resource that covers the address admits the packet", ok=False)
        return None
    told.add("policy", f"{_name(admitted)} admits it, {_until(admitted, now)}")
    return admitted


def _covers(client: Client, authorization: Authorization, remote: bytes) -> bool:
    match authorization.resource:
        case CidrResource(network=network):
            return ip_address(remote) in network
        case DnsResource(id=resource_id):
            return remote in client.proxies.of_resource(resource_id)
        case InternetResource():
            return not is_proxy(remote) and not is_excluded_from_internet(remote)


def _describe(authorization: Authorization, protocol: int, value: int | None, now: float) -> str:
    if authorization.expires <= now:
        return f"{_name(authorization)}: expired {_span(now - authorization.expires)} ago"
    if isinstance(authorization.resource, InternetResource) or not authorization.resource.filters:
        return f"{_name(authorization)}: no filters, {_until(authorization, now)}"
    shown = ", ".join(_filter(each) for each in authorization.resource.filters)
    if not authorization.filters.permits(protocol, value):
        return f"{_name(authorization)}: its filters ({shown}) do not permit it"
    return f"{_name(authorization)}: its filters ({shown}) permit it, {_until(authorization, now)}"


def _name(authorization: Authorization) -> str:
    match authorization.resource:
        case CidrResource(id=resource_id, network=network, name=name):
            return _named(name or resource_id, str(network))
        case DnsResource(id=resource_id, address=pattern, name=name):
            return _named(name or resource_id, pattern)
        case InternetResource(id=resource_id):
            return f"the internet resource {resource_id}"


def _named(name: str, covers: str) -> str:
    return f"resource {name}" if name == covers else f"resource {name} ({covers})"


def _until(authorization: Authorization, now: float) -> str:
    return "without expiry" if authorization.expires == inf else f"for another {_span(authorization.expires - now)}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _filter(entry: Filter) -> str:
    match entry:
        case TcpFilter(start, end):
            return f"tcp {start}" if start == end else f"tcp {start}-{end}"
        case UdpFilter(start, end):
            return f"udp {start}" if start == end else f"udp {start}-{end}"
        case IcmpFilter():
            return "icmp"
        case UnknownFilter():
            return "one that is not known and permits nothing"


def _conclude(told: Explanation, verdict: Verdict) -> None:
    match verdict:
        case Forward(packet=packet):
            told.passes, told.verdict = True, "forwarded to the network"
            told.translated = _tuple_of(packet)
        case Deliver(packet=packet):
            told.passes, told.verdict = True, "delivered to the client"
            told.translated = _tuple_of(packet)
        case Reply():
            told.verdict = "refused; the client is told by an ICMP error"
        case Drop(reason=reason):
            told.verdict, told.reason = "dropped", reason
        case Consumed():
            told.verdict = "taken as a control message"


def _tuple_of(packet: bytes) -> str:
    parsed = ip.parse(packet)

    def end(address: bytes, value: int | None) -> str:
        port = "" if value is None or value < ip.TCP else f" port {value & 0xFFFF}"
        return _text(address) + port

    return f"{end(parsed.source, parsed.source_value)} to {end(parsed.destination, parsed.destination_value)}"


def _text(address: bytes) -> str:
    return str(ip_address(address))
