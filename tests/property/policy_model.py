"""The policy as the specification states it (tunnel 3-7, portal 2): slow, obvious, and a second opinion.

It is written from the specification alone and imports nothing of `fzg`, so that what it has in common with the gateway
is the text and not the code. Messages are dicts as the portal sends them, packets are bytes. Every operation returns
`Effects`; time is what the caller says it is.

Where the text leaves a choice, the comment at the line names it. Ticks come when the caller says so; the caller sees to
it that they come once a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import chain
from uuid import UUID

from tests.property import policy_wire as wire
from tests.property.policy_wire import FIN, MULTICAST, NOT_INTERNET, PEERS, PROXIES, RST, Packet, Value, inside

IDLE = {"tcp": 7440.0, "udp": 120.0, "echo": 120.0}
NEVER_ANSWERED = 60.0
CLOSED_LINGER = 5.0
MOST_PROXIES = 16  # of one AssignedIps (7.3, HARDEN)
RESOLUTION = 10.0
DAY = 86_400.0
LEAST_STEP = 1.0  # of the wall clock


@dataclass
class Effects:
    """What one operation lets out."""

    tun: list[bytes] = field(default_factory=list)
    to_client: list[tuple[str, bytes]] = field(default_factory=list)
    goodbye: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)


@dataclass
class Held:
    """A resource that a client may use, until when."""

    resource: dict
    expires: float | None

    def lasts(self, now: float) -> bool:
        """What is over admits nothing from that moment on, though it is removed at the tick (5.7 allows a second)."""
        return self.expires is None or now < self.expires


@dataclass
class Proxy:
    """What a proxy IP stands for; `real` is None where the name has no address of the family."""

    domain: str
    resources: set[str]
    real: bytes | None


@dataclass
class Session:
    """One NAT entry (7.4)."""

    inside: tuple[Value, bytes]
    outside: tuple[Value, bytes]
    last_out: float
    last_in: float | None = None
    fin_out: bool = False
    fin_in: bool = False
    rst: bool = False

    def ends(self) -> float:
        last = self.last_out if self.last_in is None else max(self.last_out, self.last_in)
        ends = [last + IDLE[self.inside[0].kind]]
        if self.last_in is None:
            ends.append(self.last_out + NEVER_ANSWERED)
        if self.fin_out and self.fin_in:
            ends.append(last + CLOSED_LINGER)
        if self.rst:
            ends.append(last)
        return min(ends)


@dataclass
class Peer:
    """All that belongs to one client (5.1)."""

    client_id: str
    ips: tuple[bytes, bytes]
    gateway: tuple[bytes, bytes]
    held: dict[str, Held] = field(default_factory=dict)
    proxies: dict[bytes, Proxy] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    expired: set[tuple[Value, bytes]] = field(default_factory=set)


@dataclass
class Question:
    """A resolution that was asked for."""

    peer: Peer
    resource: str
    domain: str
    proxies: list[bytes]
    asked: float


class PolicyModel:
    """All clients of one gateway."""

    def __init__(self, *, wall_clock: float) -> None:
        """`wall_clock` + now is the time in Unix seconds."""
        self.wall_clock = self.furthest = wall_clock
        self.gateway: tuple[bytes, bytes] | None = None
        self.peers: dict[str, Peer] = {}
        self.owners: dict[bytes, str] = {}
        self.connected: set[str] = set()
        self.questions: list[Question] = []

    # -- the portal (portal 2, tunnel 5)

    def init(self, message: dict, now: float) -> Effects:
        interface = message["interface"]
        self.gateway = (ip_address(interface["ipv4"]).packed, ip_address(interface["ipv6"]).packed)
        if "authorizations" in message:  # absent: no resynchronisation
            listed = {(each["client_id"], each["resource_id"]): each for each in message["authorizations"]}
            for peer in self.peers.values():
                for resource_id in list(peer.held):
                    if (entry := listed.get((peer.client_id, resource_id))) is None:
                        del peer.held[resource_id]
                    else:
                        peer.held[resource_id].expires = self._deadline(entry["expires_at"], now)
        return Effects()

    def create_authorization(self, message: dict, now: float) -> Effects:
        client = message["client"]
        client_id = client["id"]
        if self.gateway is None:
            return Effects()
        ips = (ip_address(client["ipv4"]).packed, ip_address(client["ipv6"]).packed)
        peer = self.peers.get(client_id)
        if peer is not None and peer.ips != ips:
            self._forget(client_id)
            peer = None
        if peer is None:
            peer = self.peers[client_id] = Peer(client_id, ips, self.gateway)
        for ip in ips:
            self.owners[ip] = client_id  # of two with one address the later grant wins
        self.connected.add(client_id)
        expires_at = message.get("expires_at")
        expires = None if expires_at is None else self._deadline(expires_at, now)
        resource = message["resource"]
        known = peer.held.get(resource["id"])
        if known is None:
            peer.held[resource["id"]] = Held(resource, expires)
        else:
            known.expires = expires
            self._take_filters(known, resource)
        return Effects(acknowledged=[message["ref"]])

    def reject_access(self, message: dict) -> Effects:
        peer = self.peers.get(message["client_id"])
        if peer is None:
            return Effects()
        peer.held.pop(message["resource_id"], None)
        return Effects() if peer.held else self._close(peer)

    def resource_updated(self, resource: dict) -> Effects:
        for peer in self.peers.values():
            if resource["id"] in peer.held:
                self._take_filters(peer.held[resource["id"]], resource)
        return Effects()

    def access_authorization_expiry_updated(self, message: dict, now: float) -> Effects:
        peer = self.peers.get(message["client_id"])
        if peer is not None and message["resource_id"] in peer.held:
            peer.held[message["resource_id"]].expires = self._deadline(message["expires_at"], now)
        return Effects()

    def _take_filters(self, held: Held, resource: dict) -> None:
        if held.resource["type"] == resource["type"]:
            held.resource = held.resource | {"filters": resource.get("filters", [])}

    def _deadline(self, expires_at: int, now: float) -> float:
        return now + DAY if expires_at > 1e12 else expires_at - self.furthest

    # -- time (5.7, 7.4, 11.1)

    def clock_step(self, delta: float) -> None:
        """Only time that the wall clock never showed before brings the end of authorizations nearer.

        5.7 and the README: forward only, and a step back has no effect. So a step forward that makes up for one back
        has none either: the text does not say so, but otherwise the pair of them would.
        """
        self.wall_clock += delta
        gained = self.wall_clock - self.furthest
        if gained < LEAST_STEP:
            return
        self.furthest = self.wall_clock
        for peer in self.peers.values():
            for held in peer.held.values():
                if held.expires is not None:
                    held.expires -= gained

    def tick(self, now: float) -> Effects:
        effects = Effects()
        for peer in list(self.peers.values()):
            for session in [each for each in peer.sessions if now >= each.ends()]:
                peer.sessions.remove(session)
                peer.expired.add(session.outside)
            peer.held = {key: held for key, held in peer.held.items() if held.lasts(now)}
            if not peer.held:
                effects.goodbye += self._close(peer).goodbye
        return effects

    def _close(self, peer: Peer) -> Effects:
        self._forget(peer.client_id)
        had_connection = peer.client_id in self.connected
        self.connected.discard(peer.client_id)
        return Effects(goodbye=[peer.client_id] if had_connection else [])

    def _forget(self, client_id: str) -> None:
        del self.peers[client_id]
        self.owners = {ip: owner for ip, owner in self.owners.items() if owner != client_id}

    def connection_failed(self, client_id: str) -> None:
        """The peer keeps all it has (5.8)."""
        self.connected.discard(client_id)

    # -- client to network (3)

    def from_client(self, client_id: str, plaintext: bytes, outer_ecn: int, now: float) -> Effects:
        packet = wire.validated(wire.unpadded(plaintext) or b"")
        if packet is None or inside(packet.destination, MULTICAST):
            return Effects()
        peer = self.peers.get(client_id)
        if peer is None:
            return Effects()
        if wire.is_control(packet):
            return self._control(peer, packet, now)
        if isinstance(wire.icmp_error(packet), wire.Embedded):
            return Effects()
        if packet.source not in peer.ips:
            return self._refuse(peer, packet, "prohibited")
        if self._is_gateway(peer, packet.destination):
            return Effects(tun=[wire.with_congestion_mark(packet.data, outer_ecn)])
        if inside(packet.destination, PEERS):
            return self._refuse(peer, packet, "prohibited")
        verdict = self._classify(peer, packet.destination, packet, wire.destination_value(packet), now)
        if verdict != "allowed":
            return self._refuse(peer, packet, "network" if verdict == "not Internet" else "prohibited")
        forwarded = packet.data
        if inside(packet.destination, PROXIES):
            translated = self._to_real(peer, packet, now)
            if translated is None or isinstance(translated, str):
                return self._refuse(peer, packet, translated) if translated else Effects()
            forwarded = translated
        return Effects(tun=[wire.with_congestion_mark(forwarded, outer_ecn)])

    def _is_gateway(self, peer: Peer, ip: bytes) -> bool:
        """The addresses that the peer was made with (14), and those of now too (5.1, a quirk that is not copied)."""
        return ip in peer.gateway or (self.gateway is not None and ip in self.gateway)

    def _refuse(self, peer: Peer, packet: Packet, name: str) -> Effects:
        return Effects(to_client=[(peer.client_id, wire.refusal(packet, name))])

    def _to_real(self, peer: Peer, packet: Packet, now: float) -> bytes | str | None:
        """The translated packet; "network" for a refusal; None for silence (step 11)."""
        proxy = peer.proxies.get(packet.destination)
        if proxy is None or proxy.real is None:
            return "network"
        value = wire.source_value(packet)
        if value is None:
            return None
        session = next((each for each in peer.sessions if each.inside == (value, packet.destination)), None)
        if session is not None:
            session.last_out = now
            session.fin_out = session.fin_out or bool(wire.tcp_flags(packet) & FIN)
            session.rst = session.rst or bool(wire.tcp_flags(packet) & RST)
        else:
            outside = self._free_outside(peer, value, proxy.real)
            if outside is None:
                return None
            session = Session(inside=(value, packet.destination), outside=outside, last_out=now)
            peer.sessions.append(session)
            peer.expired.discard(outside)
        number, real = session.outside[0].number, session.outside[1]
        at = 4 if value.kind == "echo" else 0
        ip_at = 16 if packet.version == 4 else 24
        return wire.replaced(packet, [(at, number.to_bytes(2, "big"))], address=(ip_at, real))

    def _free_outside(self, peer: Peer, value: Value, real: bytes) -> tuple[Value, bytes] | None:
        taken = {each.outside for each in peer.sessions}
        for number in chain(range(value.number, 65_536), range(1, value.number)):
            outside = (Value(value.kind, number), real)
            if outside not in taken:
                return outside
        return None

    # -- network to client (4)

    def from_tun(self, data: bytes, now: float) -> Effects:
        packet = wire.validated(data)
        if packet is None or not inside(packet.destination, PEERS):
            return Effects()
        peer = self.peers.get(self.owners.get(packet.destination, ""))
        if peer is None:
            return Effects()
        if self._is_gateway(peer, packet.source):
            return self._deliver(peer, packet.data)
        reversed_ = self._from_real(peer, packet, now)
        if reversed_ is None:
            return Effects()
        translated, packet = reversed_ is not packet, reversed_
        if packet.destination not in peer.ips or inside(packet.source, PEERS):
            return Effects()
        if inside(packet.source, PROXIES) and not translated:
            return Effects()  # stricter than the text: no host of the network has such an address
        if not isinstance(wire.icmp_error(packet), wire.Embedded):
            verdict = self._classify(peer, packet.source, packet, wire.source_value(packet), now)
            if verdict != "allowed":
                return Effects()
        return self._deliver(peer, packet.data)

    def _deliver(self, peer: Peer, data: bytes) -> Effects:
        return Effects(to_client=[(peer.client_id, data)]) if peer.client_id in self.connected else Effects()

    def _from_real(self, peer: Peer, packet: Packet, now: float) -> Packet | None:
        """The packet as the client must see it, None to drop it (4.1)."""
        embedded = wire.icmp_error(packet)
        if embedded == "unsupported":
            return None
        if isinstance(embedded, wire.Embedded):
            outside = (embedded.source_value, embedded.destination)
        else:
            value = wire.destination_value(packet)
            if value is None:
                return None
            outside = (value, packet.source)
        session = next((each for each in peer.sessions if each.outside == outside), None)
        if session is None:
            return None if outside in peer.expired else packet
        session.last_in = now
        value, proxy = session.inside
        if isinstance(embedded, wire.Embedded):
            client = peer.ips[0] if packet.version == 4 else peer.ips[1]
            data = wire.translated_error(packet, embedded, proxy, value, client)
        else:
            session.fin_in = session.fin_in or bool(wire.tcp_flags(packet) & FIN)
            session.rst = session.rst or bool(wire.tcp_flags(packet) & RST)
            at = 4 if value.kind == "echo" else 2
            ip_at = 12 if packet.version == 4 else 8
            data = wire.replaced(packet, [(at, value.number.to_bytes(2, "big"))], address=(ip_at, proxy))
        return wire.validated(data)

    # -- classification (5.4, 5.5, 5.6)

    def _classify(self, peer: Peer, ip: bytes, packet: Packet, value: Value | None, now: float) -> str:
        lasting = [held.resource for held in peer.held.values() if held.lasts(now)]
        holds_internet = any(each["type"] == "internet" for each in lasting)
        if holds_internet and not inside(ip, PROXIES):
            return "not Internet" if inside(ip, NOT_INTERNET) else "allowed"
        covering = [each for each in lasting if self._covers(peer, each, ip)]
        # The best of several is one that permits the packet, if there is one: so all of them together decide.
        return "allowed" if any(_permits(each["filters"], packet, value) for each in covering) else "not allowed"

    def _covers(self, peer: Peer, resource: dict, ip: bytes) -> bool:
        if resource["type"] == "cidr":
            return inside(ip, [ip_network(resource["address"])])
        if resource["type"] == "dns":
            proxy = peer.proxies.get(ip)
            return proxy is not None and resource["id"] in proxy.resources
        return False

    # -- p2p control and names (6, 7)

    def _control(self, peer: Peer, packet: Packet, now: float) -> Effects:
        kind, payload = packet.l4[0], packet.l4[8:]
        if kind == 2:
            self._forget(peer.client_id)
            self.connected.discard(peer.client_id)
            return Effects()
        if kind != 0 or (event := wire.assigned_ips(payload)) is None:
            return Effects()
        resource_id, domain, proxies = event
        resource_id = str(UUID(resource_id))
        usable = [ip for ip in dict.fromkeys(proxies) if inside(ip, PROXIES)]
        held = peer.held.get(resource_id)
        if held is None or not held.lasts(now) or not usable or len(usable) > MOST_PROXIES:
            return self._status(peer, resource_id, domain, "Inactive")
        question = Question(peer, resource_id, domain, usable, now)
        if not _may_name(held.resource, domain):
            return self.resolved(question, [], now)  # before the lookup or after it: check 56 accepts both
        self.questions.append(question)
        return Effects()

    def take_overdue(self, now: float) -> list[tuple[int, Question]]:
        """Questions that have taken too long, with their places."""
        overdue = [(i, each) for i, each in enumerate(self.questions) if now >= each.asked + RESOLUTION]
        self.questions = [each for each in self.questions if now < each.asked + RESOLUTION]
        return overdue

    def resolved(self, question: Question, addresses: list[str] | None, now: float) -> Effects:
        """The answer to a question; None when it took too long."""
        peer = question.peer
        if self.peers.get(peer.client_id) is not peer:
            return Effects()
        status = "Inactive"
        if addresses is not None and self._assign(peer, question, addresses, now):
            status = "Active"
        return self._status(peer, question.resource, question.domain, status)

    def _status(self, peer: Peer, resource_id: str, domain: str, status: str) -> Effects:
        return self._deliver(peer, wire.domain_status(resource_id, domain, status))

    def _assign(self, peer: Peer, question: Question, addresses: list[str], now: float) -> bool:
        """Rules 1 to 4 of 7.3; whether the mapping was installed."""
        domain = question.domain.lower().removesuffix(".")
        if any(ip in peer.proxies and peer.proxies[ip].domain != domain for ip in question.proxies):
            peer.proxies.clear()
            peer.sessions.clear()
            peer.expired.clear()
        held = peer.held.get(question.resource)
        if held is None or not held.lasts(now) or not _may_name(held.resource, domain):
            return False
        for size in (4, 16):
            reals = sorted({ip for text in addresses if len(ip := ip_address(text).packed) == size})
            reals = [ip for ip in reals if not inside(ip, PEERS) and not inside(ip, PROXIES)]
            for i, proxy in enumerate(sorted(ip for ip in question.proxies if len(ip) == size)):
                entry = peer.proxies.setdefault(proxy, Proxy(domain, set(), None))
                entry.resources.add(question.resource)
                entry.real = reals[i % len(reals)] if reals else None
        return True


def _may_name(resource: dict, domain: str) -> bool:
    return resource["type"] == "dns" and wire.matches(resource["address"], domain)


def _permits(filters: list[dict], packet: Packet, value: Value | None) -> bool:
    if not filters:
        return True
    for each in filters:
        if each["protocol"] == "icmp" and packet.is_icmp:
            return True
        if value is not None and each["protocol"] == value.kind:
            start, end = each.get("port_range_start", 0), each.get("port_range_end", 65_535)
            if start <= value.number <= end:
                return True
    return False
