"""The gateway against a second model of its policy: every verdict, every rewritten byte, every ICMP answer.

Each sequence makes clients, resources, grants, revocations, portal messages, answers of resolvers, time and packets in
both directions. They go to the whole core with a packet engine, so that flows are installed and hit, and to
`policy_model`. A sequence that shows a difference is cut down to the steps that are needed for it.

FZG_ORACLE_SEQUENCES sets how many sequences each engine runs, FZG_SEED which.
"""

from __future__ import annotations

import json
import os
import random
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from fzg.wire import Malformed
from tests.property import policy_wire as wire
from tests.property.effort import SEED
from tests.property.policy_model import Effects, PolicyModel
from tests.unit import policy_world
from tests.unit.dataplane_world import ENGINES
from tests.unit.flow_log_world import token
from tests.unit.tunnel_world import ACK, FIN, RST, SYN, control, echo, gre, icmp, ip, tcp, udp, v4, v6

if TYPE_CHECKING:
    from collections.abc import Callable

SEQUENCES = int(os.environ.get("FZG_ORACLE_SEQUENCES", "2000"))
STEPS = 50
TOKEN = token().reveal()
WALL_CLOCK = policy_world.UNIX_OFFSET + 0.5
"""Half a second off, so that what ends at a full second of Unix time ends between two ticks."""

CLIENTS = [f"{digit * 8}-2222-4333-8444-555555555555" for digit in "123"]
ADDRESSES = [
    [("100.64.0.1", "fd00:2021:1111::1"), ("100.66.0.9", "fd00:2021:1111::9")],
    [("100.64.0.3", "fd00:2021:1111::3"), ("100.64.0.3", "fd00:2021:1111::33")],
    [("100.64.0.5", "fd00:2021:1111::5"), ("100.64.0.1", "fd00:2021:1111::55")],
]
"""The addresses of each client, usual and changed; the third one's changed address is the first one's."""
GATEWAYS = [(policy_world.GATEWAY4, policy_world.GATEWAY6), ("100.64.0.8", "fd00:2021:1111::8")]

NETWORKS = (
    "10.0.0.0/8", "10.0.0.0/24", "10.0.0.5/32", "192.168.0.0/16", "2001:db8::/32", "2001:db8::5/128", "0.0.0.0/0",
    "100.96.0.0/16", "::/0",
)  # fmt: skip
PATTERNS = (
    "*.example.com",
    "app.example.com",
    "**.example.com",
    "a??.example.com",
    "db.[a-e]xample.com",
    "db.[!f-z]xample.com",
    "x**.y",
    "*",
)
DOMAINS = (
    "app.example.com", "app.example.com", "db.example.com", "APP.Example.com", "db.example.com.", "example.com",
    "a.b.example.com", "other.test",
)  # fmt: skip
PORTS = (1, 53, 80, 443, 5000, 5000, 5001, 20, 100, 101, 65535, 0)
TCP_443, UDP_53 = ({"protocol": p, "port_range_start": n, "port_range_end": n} for p, n in (("tcp", 443), ("udp", 53)))
FILTERS: tuple[list[dict[str, Any]], ...] = (
    [],
    [],
    [TCP_443],
    [UDP_53],
    [UDP_53, TCP_443, {"protocol": "icmp"}],
    [{"protocol": "icmp"}],
    [{"protocol": "udp"}, {"protocol": "tcp"}],
    [{"protocol": "tcp", "port_range_start": 20, "port_range_end": 100}],
    [{"protocol": "udp", "port_range_start": 100, "port_range_end": 20}],
)
PROXIES4 = ["100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.12"]
PROXIES6 = [f"fd00:2021:1111:8000::{n}" for n in ("0", "1", "2", "10")]
REALS = [
    ["10.0.0.1"], ["10.0.0.2", "10.0.0.1"], ["10.0.0.5", "2001:db8::5"], ["2001:db8::5", "2001:db8::4"], [],
    ["100.96.0.9", "100.64.0.3"], ["10.0.0.2", "100.96.0.1"], ["127.0.0.1", "::1"], None,
]  # fmt: skip
DESTINATIONS4 = [
    "10.0.0.5", "10.0.0.6", "10.1.2.3", "192.168.1.1", "1.1.1.1", "8.8.8.8", "172.31.255.255", "172.32.0.1",
    "127.0.0.1", "169.254.1.1", "240.0.0.1", "255.255.255.255", "0.1.2.3", "224.0.0.251", "100.64.0.3", "100.64.0.77",
    "100.127.0.1", "100.100.111.1", "100.64.0.2", "100.64.0.8", "10.0.0.1", "10.255.0.1", "172.16.0.1", "172.24.0.1",
    "192.169.0.1", "169.253.0.1", "100.63.0.1", "100.128.0.1", "100.95.255.255", "239.1.1.1",
]  # fmt: skip
DESTINATIONS6 = [
    "2001:db8::5", "2001:db8::6", "2001:db8::4", "2606:4700::1111", "fc00::1", "fe80::1", "::1", "::ffff:1.2.3.4",
    "64:ff9b::1", "ff02::fb", "ff0e::1",
    "fd12:3456::1", "febf::1", "fec0::1", "fe00::1", "fd00:2021:1111::3", "fd00:2021:1111:8000::77",
    "fd00:2021:1111::2", "fd00:2021:1111::8",
]  # fmt: skip
SOON = (1, 2, 5, 10, 60, 61, 7200)
PAUSES = (0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.25, 2.0, 5.0, 6.0)
WAITS = (30.0, 59.0, 60.0, 61.0, 119.0, 120.0, 121.0)
CLOCK_STEPS = (1.0, 1.25, 3.0, 60.0, 3600.0, -1.0, -1.25, -3.0, -60.0, -3600.0)
LONG_PAUSES = (7380.0, 7439.0, 7440.0, 7441.0)

Step = tuple[Any, ...]


def resource_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


# -- what happens in a sequence


class Script:
    """Steps made from a seed. A step is a name and its arguments, and means something after any other steps."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        self.has_expiries = r.random() < 0.4
        self.has_internet = r.random() < 0.25
        self.is_logged = r.random() < 0.2
        self.is_open = r.random() < 0.7
        self.names = r.choice((0.15, 0.8, 0.8))
        """How much is about names, the rest being about networks."""

    def steps(self) -> list[Step]:
        r = self.random
        opening: list[Step] = [] if r.random() < 0.03 else [("init", 0, None, self.is_logged)]
        for number in r.sample(range(8), r.randrange(1, 4)):
            opening.append(self.grant(number))
        if r.random() < self.names:
            opening.append(self.grant(4, client=0))
            for _ in range(r.randrange(1, 4)):
                opening += [self.assign(4, client=0), ("answer", 0, r.choice(REALS[:5]))]
        steps = opening
        while len(steps) < STEPS:
            steps += self.story() if r.random() < 0.07 else [self.step()]
        return steps[:STEPS]

    def story(self) -> list[Step]:
        """Steps that belong together, about one conversation: by themselves they would rarely meet."""
        r = self.random
        first = self.packet(client=0, is_tcp=r.random() < 0.5)
        data: Step = ("again", 0, "data", b"data", 1)
        answer: Step = ("reply", 0, "data", 1, 1)
        pause: Step = ("pause", r.choice((0.25, 0.5)))
        wait: Step = ("pause", r.choice(WAITS))
        all_soon = [(0, number, 1) for number in range(8)]
        middle: list[Step] = r.choice(
            [
                [("again", 0, "fin", b"", 1), ("reply", 0, "fin", 1, 1), data, answer, ("pause", 5.0), ("pause", 0.75)],
                [r.choice((("again", 0, "fin", b"", 1), ("reply", 0, "fin", 1, 1))), ("pause", 5.0), ("pause", 1.25)],
                [*self.collision(), pause],
                [*self.refresh(), data, answer, pause],
                [*self.both_ways(), answer, pause],
                [data, ("reply", 0, "rst", 1, 1), pause, pause, ("pause", 0.5)],
                [
                    answer,
                    r.choice((("reply", 0, "rst", 1, 1), ("again", 0, "rst", b"", 1))),
                    *[("pause", 0.25), answer] * 4,
                ],
                [("again", 0, "rst", b"", 1), ("pause", 0.75), self.packet(client=0), pause],
                [data, pause, data, pause, data, pause, data, ("pause", 59.0), ("pause", 0.75)],
                [data, answer, pause, answer, pause, answer, pause, answer, ("pause", 119.0), ("pause", 0.75)],
                [("expiry", 0, self.number(), 1), data, answer, pause, data, answer, ("pause", 0.75)],
                [("expiry", 0, n, r.choice((1, 3))) for n in range(8)]
                + [("clock", r.choice(CLOCK_STEPS)), data, answer],
                [("clock", r.choice(CLOCK_STEPS)), ("init", 0, all_soon, self.is_logged), data, pause, data, pause],
                [("clock", -r.choice(CLOCK_STEPS)), ("clock", r.choice(CLOCK_STEPS)), data, pause, data],
                [self.init(), pause],
                [("init", 0, all_soon, self.is_logged), data, pause, data, pause, data, pause],
                [
                    ("init", 1, None, self.is_logged),
                    ("packet", 0, udp(ADDRESSES[0][0][0], GATEWAYS[1][0], 5000, 53), 0, 0),
                    ("init", 0, None, self.is_logged),
                ],
                [("resource_updated", self.resource(self.number())), pause],
                [self.grant(client=0), pause],
                [self.grant(7, client=0), pause],
                [self.grant(client=2, variant=1), pause, answer, ("reject", 2, self.number()), answer],
                [self.assign(4, client=0), ("answer", 0, r.choice(REALS)), pause],
                [wait, data, wait],
                [wait, answer, wait],
            ]
        )
        if r.random() < 0.1:  # used by cached flows alone towards the end, and then left to itself
            last, idle = r.choice(((data, 59.0), (answer, 119.0), (data, 119.0)))
            opening = [first, answer, data] if idle > 60.0 else [first, data]
            return [
                *opening,
                *[("pause", 0.25), last] * 3,
                ("pause", idle),
                ("pause", r.choice((0.25, 0.5, 0.75))),
                answer,
            ]
        answered = [answer] if r.random() < 0.7 else []
        return [first, *answered, data, *middle, answer, data, answer]

    def collision(self) -> list[Step]:
        """Several stand-ins for one address, all used from one port."""
        r = self.random
        port = r.choice((65535, 65535, 65534, 5000, 1, 0))
        make = r.choice((udp, tcp))
        steps = [self.grant(4, client=0, variant=0), *self.named(["10.0.0.1", "2001:db8::5"])]
        own4, own6 = ADDRESSES[0][0]
        for proxy4, proxy6 in r.sample(list(zip(PROXIES4, PROXIES6, strict=True)), 3):
            own, proxy = r.choice(((own4, proxy4), (own4, proxy4), (own6, proxy6)))
            steps += [("packet", 0, make(own, proxy, port, 443), 0, 0), ("reply", 0, "data", 1, 1)]
        return [*steps, ("reply", 2, "data", 1, 1), ("reply", 1, "error", 1, 1)]

    def refresh(self) -> list[Step]:
        """A name that comes to mean something else while it is in use."""
        r = self.random
        own4, own6 = ADDRESSES[0][0]
        own, proxy = r.choice(((own4, PROXIES4[0]), (own6, PROXIES6[0])))
        return [
            self.grant(4, client=0, variant=0),
            *self.named(r.choice(REALS[:4])),
            ("packet", 0, udp(own, proxy, r.choice(PORTS), 443), 0, 0),
            ("reply", 0, "data", 1, 1),
            *self.named(r.choice(REALS)),
        ]

    def both_ways(self) -> list[Step]:
        """One host by its address and by a name, from one port."""
        r = self.random
        own, proxy, real = r.choice(
            ((ADDRESSES[0][0][0], PROXIES4[0], "10.0.0.5"), (ADDRESSES[0][0][1], PROXIES6[0], "2001:db8::5"))
        )
        make = r.choice(
            (lambda to: udp(own, to, 5000, 443), lambda to: tcp(own, to, 5000, 443), lambda to: echo(own, to, 5000))
        )
        direct: list[Step] = [("packet", 0, make(real), 0, 0), ("reply", 0, "data", 1, 2)]
        named = [self.grant(4, client=0, variant=0), *self.named(REALS[2])]
        opening = [*direct, *named] if r.random() < 0.5 else [*named, *direct]
        return [*opening, ("packet", 0, make(proxy), 0, 0), ("reply", 1, "data", 1, 1), ("reply", 0, "data", 1, 1)]

    def named(self, addresses: list[str] | None) -> list[Step]:
        """The first client's stand-ins for one name, and what it resolves to."""
        event = {"resource": resource_id(4), "domain": DOMAINS[0], "proxy_ips": [*PROXIES4, *PROXIES6]}
        return [("packet", 0, control(0, json.dumps(event).encode()), 0, 0), ("answer", 0, addresses)]

    def step(self) -> Step:
        makers: list[tuple[int, Callable[[], Step]]] = [
            (22, self.packet),
            (20, self.again),
            (20, self.reply),
            (5, self.from_tun),
            (12, self.pause),
            (5, self.grant),
            (5, self.assign),
            (5, lambda: ("answer", self.random.randrange(3), self.random.choice(REALS))),
            (2, lambda: ("reject", self.client(), self.number())),
            (2, self.resource_updated),
            (2, self.init),
            (2, self.expiry),
            (1, lambda: ("fail", self.client())),
            (1, self.control),
            (1, lambda: ("clock", self.random.choice(CLOCK_STEPS))),
            (1, lambda: ("portal", self.random.random() < 0.5)),
            (1, self.nonsense),
        ]
        return self.random.choices([maker for _, maker in makers], [weight for weight, _ in makers])[0]()

    def client(self) -> int:
        return self.random.choice((0, 0, 0, 0, 1, 2))

    def number(self) -> int:
        return self.random.randrange(8)

    def resource(self, number: int) -> dict[str, Any]:
        """Each number is usually of one kind and address; 0 to 3 CIDR, 4 to 6 DNS, 7 the Internet."""
        r = self.random
        changed = r.random() < 0.05
        filters = [] if self.is_open and r.random() < 0.8 else r.choice(FILTERS)
        if number == 7 and not self.has_internet:
            number = 0
        fields = {"id": resource_id(number), "name": "name", "filters": filters}
        if changed:
            number = r.randrange(8)
        if number < 4:
            address = r.choice(NETWORKS) if changed or number else NETWORKS[0]
            return fields | {"type": "cidr", "address": address if number != 3 else NETWORKS[4]}
        if number < 7:
            return fields | {"type": "dns", "address": r.choice(PATTERNS) if number == 6 else PATTERNS[number - 4]}
        return {"type": "internet", "id": fields["id"]}

    def expires(self) -> Any:
        """Seconds from now, None for never; the absurd ones are Unix times by themselves."""
        r = self.random
        if not self.has_expiries:
            return None
        return r.choice([*SOON, *SOON, None, -5, 10**13])

    def grant(self, number: int | None = None, client: int | None = None, variant: int | None = None) -> Step:
        variant = int(self.random.random() < 0.03) if variant is None else variant
        client = self.client() if client is None else client
        number = self.number() if number is None else number
        return ("grant", client, variant, self.resource(number), self.expires(), self.is_logged)

    def resource_updated(self) -> Step:
        return ("resource_updated", self.resource(self.number()))

    def init(self) -> Step:
        r = self.random
        listed = None
        if r.random() < 0.7:
            pairs = [(client, number) for client in range(3) for number in range(8) if r.random() < 0.8]
            listed = [(client, number, self.expires() or 7200) for client, number in pairs]
        return ("init", 1 if r.random() < 0.15 else 0, listed, self.is_logged and r.random() < 0.9)

    def expiry(self) -> Step:
        return ("expiry", self.client(), self.number(), self.expires() or 60)

    def pause(self) -> Step:
        how = self.random.random()
        return ("pause", self.random.choice(LONG_PAUSES if how < 0.002 else WAITS if how < 0.1 else PAUSES))

    def assign(self, number: int | None = None, client: int | None = None) -> Step:
        r = self.random
        client = self.client() if client is None else client
        proxies = r.sample(PROXIES4, r.randrange(1, 5)) if r.random() < 0.8 else []
        proxies += r.sample(PROXIES6, r.randrange(1, 5)) if r.random() < 0.6 else []
        odd = r.random()
        if odd < 0.03:
            proxies += ["10.0.0.9", "2001:db8::9"]
        elif odd < 0.05:
            proxies = ["10.0.0.9", "100.64.0.3"]
        elif odd < 0.08:
            proxies += proxies[:2]
        elif odd < 0.09:
            proxies = [f"100.96.1.{n}" for n in range(17)]
        number = r.choice((4, 4, 4, 5, 6, 6, 0, 7)) if number is None else number
        domain = r.choice(DOMAINS[:2] if r.random() < 0.6 else DOMAINS)
        event = {"resource": resource_id(number), "domain": domain, "proxy_ips": proxies}
        if r.random() < 0.05:
            event |= {"more": [1]}
        return ("packet", client, control(0, json.dumps(event).encode()), 0, 0)

    def control(self) -> Step:
        r = self.random
        kind, payload = r.choice(
            [
                (2, b""),
                (2, b""),
                (1, b"{}"),
                (7, os.urandom(3)),
                (0, b"\xff\xfe"),
                (0, b"[]"),
                (0, b'{"resource":"nope","domain":"app.example.com","proxy_ips":[]}'),
                (0, f'{{"resource":"{resource_id(4)}","domain":17,"proxy_ips":[]}}'.encode()),
                (0, f'{{"resource":"{resource_id(4)}","domain":"app.example.com"}}'.encode()),
                (0, f'{{"resource":"{resource_id(4)}","domain":"app.example.com","proxy_ips":["x"]}}'.encode()),
                (0, f'{{"resource":"{resource_id(4)}","domain":"app.example.com","proxy_ips":[]}}'.encode()),
                (0, f'{{"resource":"{resource_id(4)}","domain":"{"a" * 64}.example.com","proxy_ips":[]}}'.encode()),
            ]
        )
        return (
            "packet",
            self.client(),
            control(kind, payload, hop_limit=r.choice((0, 9)), filler=r.randbytes(7)),
            0,
            0,
        )

    def nonsense(self) -> Step:
        r = self.random
        event = r.choice(["create_authorization", "reject_access", "init", "resource_updated", "relays_presence", "x"])
        return ("nonsense", event, r.choice([{}, [], None, {"client_id": 1}, {"type": "new", "id": resource_id(1)}]))

    # -- packets

    def packet(self, client: int | None = None, is_tcp: bool = False) -> Step:
        r = self.random
        client = self.client() if client is None else client
        own4, own6 = ADDRESSES[client][1 if r.random() < 0.04 else 0]
        is_ipv4 = r.random() < 0.6
        source = own4 if is_ipv4 else own6
        if r.random() < 0.03:
            source = r.choice(["100.64.0.9", "10.0.0.5"] if is_ipv4 else ["fd00:2021:1111::99", "::"])
        where = r.random()
        if where < self.names:
            destination = r.choice(PROXIES4 if is_ipv4 else PROXIES6)
        elif where < (1 + self.names) / 2:
            destination = r.choice(DESTINATIONS4[:3] if is_ipv4 else DESTINATIONS6[:3])
        else:
            destination = r.choice(DESTINATIONS4 if is_ipv4 else DESTINATIONS6)
        segment = tcp(source, destination, r.choice(PORTS), 443)
        packet = segment if is_tcp else self.odd(self.plain(source, destination))
        return ("packet", client, packet, r.choice((0, 0, 0, 2, 3)), r.choice((0, 16)))

    def from_tun(self) -> Step:
        r = self.random
        client = self.client()
        is_ipv4 = r.random() < 0.6
        destination = r.choice(ADDRESSES[client][0 if r.random() < 0.9 else 1 :])[0 if is_ipv4 else 1]
        if r.random() < 0.1:
            destination = r.choice(DESTINATIONS4 if is_ipv4 else DESTINATIONS6)
        packets = [
            self.odd(self.plain(r.choice(DESTINATIONS4 if is_ipv4 else DESTINATIONS6), destination))
            for _ in range(r.choice((1, 1, 3)))
        ]
        return ("from_tun", packets)

    def plain(self, source: str, destination: str) -> bytes:
        r = self.random
        kind = r.random()
        ecn = {"tos" if ":" not in source else "traffic_class": r.choice((0, 0, 1, 2, 3))}
        payload = r.randbytes(r.choice((0, 1, 8, 40)))
        if kind < 0.35:
            options = {"checksum": r.choice((None, None, 0, 0xFFFF, 7))}
            return udp(source, destination, r.choice(PORTS), r.choice(PORTS), payload, **options, **ecn)
        if kind < 0.65:
            flags = r.choice((SYN, ACK, ACK, ACK, SYN | ACK, FIN | ACK, RST))
            return tcp(source, destination, r.choice(PORTS), r.choice(PORTS), flags, payload, **ecn)
        if kind < 0.85:
            return echo(source, destination, r.choice(PORTS), reply=r.random() < 0.2, payload=payload, **ecn)
        if kind < 0.9:
            return (
                gre(source, destination, **ecn) if r.random() < 0.5 else ip(source, destination, 132, r.randbytes(12))
            )
        if kind < 0.95:
            codes = [(13, 0), (5, 1), (8, 1), (12, 0)] if ":" not in source else [(135, 0), (4, 0), (128, 1), (2, 5)]
            return icmp(source, destination, *r.choice(codes), r.randbytes(4), payload, **ecn)
        quoted = self.plain(destination, source)[: r.choice((20, 24, 28, 48, 60, 90))]
        return self.error(source, destination, quoted)

    def error(self, source: str, destination: str, quoted: bytes) -> bytes:
        r = self.random
        codes = [(3, 1), (3, 3), (3, 4), (3, 13), (3, 99), (11, 0), (11, 1)]
        if ":" in source:
            codes = [(1, 1), (1, 3), (1, 4), (2, 0), (2, 1), (3, 0), (3, 1)]
        return icmp(source, destination, *r.choice(codes), r.choice((bytes(4), r.randbytes(4))), quoted)

    def odd(self, packet: bytes) -> bytes:
        """The packet, or one that is wrong or unusual in one respect."""
        r = self.random
        if r.random() > 0.12:
            return packet
        is_ipv4 = packet[0] >> 4 == 4
        return r.choice(_ODD4 if is_ipv4 else _ODD6)(packet, r)

    def again(self) -> Step:
        r = self.random
        how = r.choice(["data"] * 7 + ["fin", "rst", "syn", "other port", "marked"])
        return ("again", r.randrange(6), how, r.randbytes(r.choice((0, 3, 8))), r.choice((1, 1, 1, 4)))

    def reply(self) -> Step:
        r = self.random
        how = r.choice(["data"] * 7 + ["fin", "rst", "error", "error", "other port", "redirect"])
        return ("reply", r.randrange(6), how, r.getrandbits(32), r.choice((1, 1, 1, 4)))


def _with_options(packet: bytes, r: random.Random) -> bytes:
    fields = struct.unpack_from("!BBHHHBBHII", packet)
    source, destination = (str(ip_address(each)) for each in fields[8:])
    return v4(source, destination, packet[9], packet[20:], options=r.choice((b"\1\1\1\0", bytes(8))), tos=packet[1])


def _with_extension(packet: bytes, r: random.Random) -> bytes:
    source, destination = (str(ip_address(packet[at : at + 16])) for at in (8, 24))
    kind, header = r.choice(
        [
            (0, bytes((packet[6], 0, 1, 4, 0, 0, 0, 0))),
            (60, bytes((packet[6], 1)) + bytes(14)),
            (44, bytes((packet[6], 0, 0, 0, 0, 0, 0, 9))),  # atomic
            (44, bytes((packet[6], 0, 0, 1, 0, 0, 0, 9))),  # more fragments
            (44, bytes((packet[6], 0, 1, 8, 0, 0, 0, 9))),  # offset
            (43, bytes((packet[6], 200)) + bytes(6)),  # runs past the end
        ]
    )
    return v6(source, destination, kind, header + packet[40:])


def _changed(at: int, change: Callable[[int], int]) -> Callable[[bytes, random.Random], bytes]:
    def changed(packet: bytes, r: random.Random) -> bytes:
        if at >= len(packet):
            return packet
        return packet[:at] + bytes((change(packet[at]) & 0xFF,)) + packet[at + 1 :]

    return changed


_ODD4 = [
    _with_options,
    _with_options,
    _changed(0, lambda octet: octet & 0xF0 | 4),
    _changed(0, lambda octet: 0x55),
    _changed(3, lambda octet: octet + 1),
    _changed(3, lambda octet: octet - 1),
    _changed(6, lambda octet: octet | 0x20),
    _changed(6, lambda octet: octet | 0x40),
    _changed(7, lambda octet: octet | 1),
    _changed(25, lambda octet: octet + 1),
    _changed(32, lambda octet: 0x40),
    _changed(32, lambda octet: 0xF0),
    _changed(9, lambda octet: 58),
    lambda packet, r: packet + bytes(4),
    lambda packet, r: packet[:10],
    lambda packet, r: b"",
    lambda packet, r: v4("100.64.0.1", "10.0.0.5", 17, struct.pack("!HHHH", 1, 2, 1260, 0) + bytes(1252)),
    lambda packet, r: v4("100.64.0.1", "10.0.0.5", 17, struct.pack("!HHHH", 1, 2, 1261, 0) + bytes(1253)),
]
_ODD6 = [
    _with_extension,
    _with_extension,
    _with_extension,
    _changed(5, lambda octet: octet + 1),
    _changed(45, lambda octet: octet + 1),
    _changed(52, lambda octet: 0x40),
    _changed(6, lambda octet: 1),
    _changed(6, lambda octet: 50),
    lambda packet, r: packet[:39],
    lambda packet, r: v6("fd00:2021:1111::1", "2001:db8::5", 17, struct.pack("!HHHH", 1, 2, 1240, 7) + bytes(1232)),
    lambda packet, r: v6("fd00:2021:1111::1", "2001:db8::7", 50, bytes(1240)),
    lambda packet, r: v6("::", "::", 255, bytes(7)),
]


# -- both sides under one sequence


class DisagreementError(AssertionError):
    """Gateway and model let out different things."""


@dataclass
class Seen:
    """What a client sent and how it left."""

    client_id: str
    sent: bytes
    left: bytes


@dataclass
class Both:
    """The gateway and the model, and what they said in the current step."""

    world: policy_world.World
    model: PolicyModel = field(default_factory=lambda: PolicyModel(wall_clock=WALL_CLOCK))
    expected: Effects = field(default_factory=Effects)
    seen: list[Seen] = field(default_factory=list)
    packets: int = 0

    def play(self, step: Step) -> None:
        self.expected = Effects()
        getattr(self, step[0])(*step[1:])
        self.compare()

    def compare(self) -> None:
        world, expected = self.world, self.expected
        goodbyes, world.node.goodbyes = world.node.goodbyes, []
        acknowledged, world.acknowledged = world.acknowledged, []
        _same("written to the TUN", sorted(map(_alike, world.written())), sorted(map(_alike, expected.tun)))
        delivered = [(client, _alike(packet), ecn) for client, packet, ecn in world.delivered()]
        wanted = [(client, _alike(packet), wire.ecn_of(packet)) for client, packet in expected.to_client]
        _same("sent to clients", sorted(delivered), sorted(wanted))
        _same("goodbyes", sorted(goodbyes), sorted(expected.goodbye))
        _same("acknowledged", acknowledged, expected.acknowledged)
        _same("connections", set(world.node.lines), self.model.connected)
        domains = [each.domain.lower().removesuffix(".") for each in world.resolutions]
        asked = [each.domain.lower().removesuffix(".") for each in self.model.questions]
        _same("resolutions", domains, asked)

    def expect(self, effects: Effects) -> None:
        expected = self.expected
        expected.tun += effects.tun
        expected.to_client += effects.to_client
        expected.goodbye += effects.goodbye
        expected.acknowledged += effects.acknowledged

    # -- steps

    def init(self, gateway: int, listed: list[tuple[int, int, int]] | None, is_logged: bool) -> None:
        ipv4, ipv6 = GATEWAYS[gateway]
        logs = {"api_url": "https://example.com", "upload_interval_secs": int(is_logged), "upload_batch_size": 10}
        message = policy_world.init(ipv4=ipv4, ipv6=ipv6, flow_logs=logs)
        if listed is not None:
            message["authorizations"] = [
                {
                    "client_id": CLIENTS[client],
                    "resource_id": resource_id(number),
                    "expires_at": self.unix(expires),
                }
                for client, number, expires in listed
            ]
        self.expect(self.model.init(message, self.world.now))
        self.world.portal("init", message)

    def grant(self, client: int, variant: int, resource: dict[str, Any], expires: int | None, is_logged: bool) -> None:
        ipv4, ipv6 = ADDRESSES[client][variant]
        message = policy_world.authorization(CLIENTS[client], ipv4, ipv6, resource, self.unix(expires), ref="a ref")
        if is_logged:
            message["flow_logs_ingest_token"] = TOKEN
        self.expect(self.model.create_authorization(message, self.world.now))
        self.world.portal("create_authorization", message)

    def reject(self, client: int, number: int) -> None:
        message = {"client_id": CLIENTS[client], "resource_id": resource_id(number)}
        self.expect(self.model.reject_access(message))
        self.world.portal("reject_access", message)

    def resource_updated(self, resource: dict[str, Any]) -> None:
        self.expect(self.model.resource_updated(resource))
        self.world.portal("resource_updated", resource)

    def expiry(self, client: int, number: int, expires: int) -> None:
        message = {
            "client_id": CLIENTS[client],
            "resource_id": resource_id(number),
            "expires_at": self.unix(expires),
        }
        self.expect(self.model.access_authorization_expiry_updated(message, self.world.now))
        self.world.portal("access_authorization_expiry_updated", message)

    def nonsense(self, event: str, payload: Any) -> None:
        with pytest.raises((Malformed, ValueError)):
            self.world.portal(event, payload)

    def portal(self, is_up: bool) -> None:
        if is_up:
            self.world.core.handle_portal_connected(self.world.now)
        else:
            self.world.core.handle_portal_disconnected(self.world.now)
        self.world.drain()

    def fail(self, client: int) -> None:
        self.model.connection_failed(CLIENTS[client])
        self.world.node.fail(CLIENTS[client])
        self.world.core.handle_timeout(self.world.now)
        self.world.drain()

    def clock(self, delta: float) -> None:
        self.model.clock_step(delta)
        self.world.core.handle_clock_step(delta, self.world.now)
        self.world.drain()

    def pause(self, seconds: float) -> None:
        """The model's housekeeping is due when the gateway's is; that comes once a second."""
        world, tunnel = self.world, self.world.core.tunnel
        end = world.now + seconds
        while (due := world.due()) <= end:
            world.now = max(world.now, due)
            assert not tunnel.client_count or tunnel._next_tick <= world.now + 1.0
            for place, question in reversed(self.model.take_overdue(world.now)):
                del world.resolutions[place]
                self.expect(self.model.resolved(question, None, world.now))
            if tunnel._next_tick <= world.now:
                self.expect(self.model.tick(world.now))
            world.handle_timeout()
        world.now = end

    def packet(self, client: int, packet: bytes, ecn: int, padding: int) -> None:
        padded = packet + bytes(-len(packet) % padding if padding else 0)
        self.from_client(CLIENTS[client], [padded], ecn)

    def from_client(self, client_id: str, packets: list[bytes], ecn: int = 0) -> None:
        if client_id not in self.world.node.lines:
            return
        for packet in packets:
            effects = self.model.from_client(client_id, packet, ecn, self.world.now)
            self.expect(effects)
            if effects.tun:
                self.seen = [Seen(client_id, wire.unpadded(packet) or b"", effects.tun[0]), *self.seen[:11]]
        self.packets += len(packets)
        self.world.from_client(client_id, *packets, ecn=ecn)

    def from_tun(self, packets: list[bytes]) -> None:
        for packet in packets:
            self.expect(self.model.from_tun(packet, self.world.now))
        self.packets += len(packets)
        self.world.from_tun(*[packet for packet in packets if packet])

    def again(self, which: int, how: str, payload: bytes, count: int) -> None:
        if self.seen:
            seen = self.seen[which % len(self.seen)]
            packets = [_variation(seen.sent, how, payload + bytes((number,))) for number in range(count)]
            self.from_client(seen.client_id, packets, ecn=3 if how == "marked" else 0)

    def reply(self, which: int, how: str, seed: int, count: int) -> None:
        if self.seen:
            seen = self.seen[which % len(self.seen)]
            self.from_tun([_answer(seen.left, how, random.Random(seed + number)) for number in range(count)])

    def answer(self, which: int, addresses: list[str] | None) -> None:
        questions = self.model.questions
        if not questions:
            return
        which %= len(questions)
        question = questions.pop(which)
        resolution = self.world.resolutions.pop(which)
        if self.model.peers.get(question.peer.client_id, question.peer) is not question.peer:
            addresses = None  # the client is back since: the text does not say whether an old answer counts
            return
        self.expect(self.model.resolved(question, addresses, self.world.now))
        answer = None if addresses is None else [ip_address(text) for text in addresses]
        self.world.resolved(resolution, answer)

    def unix(self, expires: int | None) -> int | None:
        """A Unix time: `expires` seconds from now, or itself when it is absurd."""
        if expires is None or expires > 10**12:
            return expires
        return int(self.model.wall_clock + self.world.now) + expires


def _variation(packet: bytes, how: str, payload: bytes) -> bytes:
    parsed = wire.validated(packet)
    assert parsed is not None
    source, destination = (str(ip_address(each)) for each in (parsed.source, parsed.destination))
    flags = {"fin": FIN | ACK, "rst": RST, "syn": SYN}.get(how, ACK)
    ecn = {"tos" if parsed.version == 4 else "traffic_class": 2 if how == "marked" else wire.ecn_of(packet)}
    value, target = wire.source_value(parsed), wire.destination_value(parsed)
    if value is None or target is None:
        return packet
    port = target.number if how != "other port" else target.number ^ 1
    if value.kind == "tcp":
        return tcp(source, destination, value.number, port, flags, payload, **ecn)
    if value.kind == "udp":
        checksum = {"fin": 0, "rst": 0xFFFF, "syn": 0x1234}.get(how)
        return udp(source, destination, value.number, port, payload, checksum=checksum, **ecn)
    identifier = value.number if how != "other port" else value.number ^ 1
    return echo(source, destination, identifier, payload=payload, reply=how == "fin", **ecn)


def _answer(packet: bytes, how: str, r: random.Random) -> bytes:
    """What comes back from where the packet went."""
    parsed = wire.validated(packet)
    assert parsed is not None
    client, server = (str(ip_address(each)) for each in (parsed.source, parsed.destination))
    payload = r.randbytes(r.choice((0, 5, 100)))
    ecn = {"tos" if parsed.version == 4 else "traffic_class": r.choice((0, 0, 1, 2, 3))}
    if how == "redirect":
        return icmp(server, client, 5 if parsed.version == 4 else 137, 0, bytes(4), packet[:28])
    if how == "error":
        router = r.choice((server, server, "203.0.113.1" if parsed.version == 4 else "2001:db8:ffff::1"))
        codes = [(3, 1), (3, 3), (3, 4), (3, 77), (11, 0)] if parsed.version == 4 else [(1, 1), (1, 4), (2, 0), (3, 0)]
        return icmp(router, client, *r.choice(codes), r.randbytes(4), packet[: r.choice((28, 48, 1200))])
    value, target = wire.source_value(parsed), wire.destination_value(parsed)
    flags = {"fin": FIN | ACK, "rst": RST}.get(how, ACK)
    if value is None or target is None:
        return gre(server, client)
    port = target.number if how != "other port" else target.number ^ 1
    if value.kind == "tcp":
        return tcp(server, client, port, value.number, flags, payload, **ecn)
    if value.kind == "udp":
        return udp(server, client, port, value.number, payload, checksum=r.choice((None, None, 0, 9)), **ecn)
    identifier = value.number if how != "other port" else value.number ^ 1
    return echo(server, client, identifier, reply=how != "fin", payload=payload, **ecn)


def _alike(packet: bytes) -> bytes:
    """ICMP messages of ours may carry either form of a zero checksum (2.4)."""
    if packet[0] >> 4 == 4 and packet[9] == 1 and packet[22:24] == b"\0\0":
        return packet[:22] + b"\xff\xff" + packet[24:]
    if packet[0] >> 4 == 6 and packet[6] == 58 and packet[42:44] == b"\0\0":
        return packet[:42] + b"\xff\xff" + packet[44:]
    return packet


def _same(what: str, gateway: Any, model: Any) -> None:
    if gateway != model:
        raise DisagreementError(f"{what}:\n  gateway {_shown(gateway)}\n  model   {_shown(model)}")


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return repr(value)


def differs(make_engine: Callable[[], Any], steps: list[Step]) -> str | None:
    """What gateway and model disagree on, and where; None if they agree."""
    both = Both(policy_world.World(make_engine, unix_offset=WALL_CLOCK))
    try:
        for number, step in enumerate(steps):
            try:
                both.play(step)
            except Exception as error:
                return f"step {number} {_shown(step)}\n{type(error).__name__}: {error}"
    finally:
        both.world.close()
    return None


def shortest(make_engine: Callable[[], Any], steps: list[Step]) -> list[Step]:
    """Without the steps that the difference does not need."""
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if differs(make_engine, fewer) is not None:
                steps = fewer
            else:
                at += size
        size //= 2
    return steps


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("make_engine", ENGINES, ids=[engine.__name__ for engine in ENGINES])
def test_gateway_and_model_agree_on_every_packet(make_engine: Callable[[], Any]) -> None:
    for seed in range(SEED * 10**6, SEED * 10**6 + SEQUENCES):
        steps = Script(seed).steps()
        if differs(make_engine, steps) is not None:
            steps = shortest(make_engine, steps)
            listed = "\n".join(f"  {_shown(step)}" for step in steps)
            pytest.fail(f"seed {seed}\n{listed}\n{differs(make_engine, steps)}", pytrace=False)
