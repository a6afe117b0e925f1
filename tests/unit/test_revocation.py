"""Access that ends under load: not one packet of it is written afterwards, in either direction, by either engine.

Floods of numbered packets run through grants of two kinds, a network and a name, and beside them through a grant that
stays and another client. TUN and socket take no more when the access ends, so that packets wait in the engine's queues.
What the kernel has by then does not count; every number written later is looked at.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import pytest

from tests.unit import policy_world
from tests.unit.dataplane_world import ENGINES
from tests.unit.dataplane_world import udp as packed_udp
from tests.unit.tunnel_world import control, packed

CLIENTS = [f"{digit * 8}-2222-4333-8444-555555555555" for digit in "12"]
OWN = [("100.64.0.1", "fd00:2021:1111::1"), ("100.64.0.3", "fd00:2021:1111::3")]
NETWORK, NAME, STAYS = (f"00000000-0000-4000-8000-{number:012x}" for number in (1, 2, 3))
PROXY, REAL = "100.96.0.1", "10.2.0.1"
PORT = 4000
TCP_ONLY = [{"protocol": "tcp"}]
STEP = 0.01  # s of virtual time
PER_STEP = 10  # packets of each flood and direction: 1,000 a second
LONGER_THAN_A_FLOW = 1.1  # s, for which the floods go on
LASTS = 30  # s until the grants of some tests end


@dataclass(frozen=True)
class Flood:
    """Packets of one client to one destination; `real` is where they come out."""

    name: str
    client: int
    destination: str
    real: str


ENDING = [Flood("network", 0, "10.1.0.1", "10.1.0.1"), Flood("name", 0, PROXY, REAL)]
STAYING = [Flood("stays", 0, "10.3.0.1", "10.3.0.1"), Flood("other client", 1, "10.1.0.1", "10.1.0.1")]


def cidr(resource_id: str, address: str, filters: list[Any] = []) -> dict[str, Any]:
    return {"type": "cidr", "id": resource_id, "address": address, "name": "n", "filters": filters}


def dns(resource_id: str, address: str, filters: list[Any] = []) -> dict[str, Any]:
    return {"type": "dns", "id": resource_id, "address": address, "name": "n", "filters": filters}


class Load:
    """The floods, and what came of them: numbers by flood and direction."""

    def __init__(self, make_engine: Any, *, many_flows: bool) -> None:
        self.world = policy_world.World(make_engine)
        self.many_flows = many_flows
        self.numbers = itertools.count()
        self.offered: dict[int, tuple[str, bool]] = {}
        self.out: dict[tuple[str, bool], set[int]] = {}
        self.is_blocked = False
        self.world.udp.refuse = lambda sent: errno.EAGAIN if self.is_blocked else 0
        self.world.portal("init", policy_world.init())
        for client, resource in (
            (0, cidr(NETWORK, "10.1.0.0/16")), (0, dns(NAME, "*.example.com")), (0, cidr(STAYS, "10.3.0.0/16")),
            (1, cidr(NETWORK, "10.1.0.0/16")),
        ):  # fmt: skip
            self.grant(client, resource, None if resource["id"] == STAYS or client else LASTS)
        event = f'{{"resource":"{NAME}","domain":"a.example.com","proxy_ips":["{PROXY}"]}}'
        self.world.from_client(CLIENTS[0], control(0, event.encode()))
        self.world.resolved(self.world.resolutions.pop(), [ip_address(REAL)])
        self.world.delivered()

    def grant(self, client: int, resource: dict[str, Any], lasts: int | None) -> None:
        expires = None if lasts is None else int(policy_world.UNIX_OFFSET + policy_world.START) + lasts
        self.world.portal(
            "create_authorization", policy_world.authorization(CLIENTS[client], *OWN[client], resource, expires)
        )

    def offer(self, floods: list[Flood]) -> None:
        """One step of every flood, both ways, clients first."""
        for flood in floods:
            ipv4 = packed(OWN[flood.client][0])
            packets = []
            for _ in range(PER_STEP):
                number = self._number(flood, to_network=True)
                packets.append(
                    packed_udp(
                        struct.pack("!Q", number),
                        source=ipv4,
                        destination=packed(flood.destination),
                        sport=self._port(number),
                        dport=53,
                    )
                )
            self._arrive(flood.client, packets)
            for _ in range(PER_STEP):
                number = self._number(flood, to_network=False)
                self.world.kernel.send(
                    bytes(10)
                    + packed_udp(
                        struct.pack("!Q", number),
                        source=packed(flood.real),
                        destination=ipv4,
                        sport=53,
                        dport=self._port(number - PER_STEP),
                    )
                )
            self.world.dispatch(self.world.engine.receive_tun(self.world.now))
            while self.world.engine.has_backlog(None):
                self.world.dispatch(self.world.engine.receive_tun(self.world.now))

    def _arrive(self, client: int, packets: list[bytes]) -> None:
        line = self.world.node.lines.get(CLIENTS[client]) or self.gone
        self.gone = line
        train = b"".join(map(line.seal, packets))
        self.world.udp.put(train, stride=len(train) // len(packets), source=line.endpoint, local=policy_world.GATEWAY)
        while self.world.udp.arrivals or self.world.engine.has_backlog(socket.AF_INET):
            self.world.dispatch(self.world.engine.receive_udp(socket.AF_INET, self.world.now))

    gone: Any = None
    """The line of a client whose connection ended: it goes on sending."""

    def _number(self, flood: Flood, *, to_network: bool) -> int:
        number = next(self.numbers)
        self.offered[number] = (flood.name, to_network)
        return number

    def _port(self, number: int) -> int:
        return 1024 + number % 60_000 if self.many_flows else PORT

    def step(self, floods: list[Flood]) -> None:
        self.world.run(STEP)
        self.offer(floods)

    def fill(self, floods: list[Flood]) -> None:
        """Offer while neither side takes anything, so that it waits in the engine."""
        self.is_blocked = True
        self.world.tun.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as small as may be
        with contextlib.suppress(BlockingIOError):
            while True:
                self.world.tun.send(bytes(10))
        self.offer(floods)
        assert len(self.world.engine.congested()) == 2
        self.world.tun.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        assert not any(self.world.written())
        self.is_blocked = False

    def collect(self) -> None:
        """Note the numbers that were written."""
        self.out = {}
        for packet in self.world.written():
            self._note(packet, to_network=True)
        for _, packet, _ in self.world.delivered():
            self._note(packet, to_network=False)

    def _note(self, packet: bytes, *, to_network: bool) -> None:
        if packet[9] != 17 or len(packet) != 36:
            return  # an ICMP error
        (number,) = struct.unpack("!Q", packet[28:36])
        flood, direction = self.offered[number]
        assert direction == to_network
        self.out.setdefault((flood, to_network), set()).add(number)


# -- how access ends


def reject(load: Load) -> None:
    for resource_id in (NETWORK, NAME):
        load.world.portal("reject_access", {"client_id": CLIENTS[0], "resource_id": resource_id})


def reject_all(load: Load) -> None:
    for resource_id in (NETWORK, NAME, STAYS):
        load.world.portal("reject_access", {"client_id": CLIENTS[0], "resource_id": resource_id})


def listed(expires: dict[str, int]) -> dict[str, Any]:
    far = int(policy_world.UNIX_OFFSET) * 2
    pairs = [(CLIENTS[0], STAYS, far), (CLIENTS[1], NETWORK, far), *((CLIENTS[0], *pair) for pair in expires.items())]
    return policy_world.init(
        authorizations=[{"client_id": one, "resource_id": two, "expires_at": end} for one, two, end in pairs]
    )


def init_without(load: Load) -> None:
    load.world.portal("init", listed({}))


def init_that_ends_it(load: Load) -> None:
    now = int(load.world.unix)
    load.world.portal("init", listed({NETWORK: now - 1, NAME: now}))


def expiry(load: Load) -> None:
    """Time itself; the core has handled it when its timer has run."""
    load.world.run(policy_world.START + LASTS - load.world.now)
    load.world.handle_timeout()


def new_expiry(load: Load) -> None:
    for resource_id in (NETWORK, NAME):
        fields = {"client_id": CLIENTS[0], "resource_id": resource_id, "expires_at": int(load.world.unix)}
        load.world.portal("access_authorization_expiry_updated", fields)


def clock_step(load: Load) -> None:
    load.world.core.handle_clock_step(2.0 * LASTS, load.world.now)
    load.world.drain()


def new_filters(load: Load) -> None:
    load.world.portal("resource_updated", cidr(NETWORK, "10.1.0.0/16", TCP_ONLY))
    load.world.portal("resource_updated", dns(NAME, "*.example.com", TCP_ONLY))
    load.grant(1, cidr(NETWORK, "10.1.0.0/16"), None)


def granted_with_filters(load: Load) -> None:
    load.grant(0, cidr(NETWORK, "10.1.0.0/16", TCP_ONLY), LASTS)
    load.grant(0, dns(NAME, "*.example.com", TCP_ONLY), LASTS)


ENDS = [
    reject, reject_all, init_without, init_that_ends_it, expiry, new_expiry, clock_step, new_filters,
    granted_with_filters,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make_engine", ENGINES, ids=[engine.__name__ for engine in ENGINES])
@pytest.mark.parametrize("many_flows", [False, True], ids=["cached", "every-packet-judged"])
@pytest.mark.parametrize("end", ENDS, ids=[each.__name__ for each in ENDS])
def test_nothing_is_written_once_access_has_ended(make_engine: Any, many_flows: bool, end: Any) -> None:
    load = Load(make_engine, many_flows=many_flows)
    try:
        ends = [*ENDING, STAYING[0]] if end is reject_all else ENDING
        for _ in range(5):
            load.step(ENDING + STAYING)
        load.collect()
        assert {len(numbers) for numbers in load.out.values()} == {5 * PER_STEP}, "the load is not carried whole"
        assert len(load.out) == 2 * len(ENDING + STAYING)

        load.world.run(policy_world.START + LASTS - STEP - load.world.now)
        load.offer(ENDING + STAYING)
        load.collect()
        load.fill(ENDING + STAYING)
        end(load)
        began, first = load.world.now, len(load.offered)
        while load.world.now < began + LONGER_THAN_A_FLOW:
            load.step(ENDING + STAYING)
        load.collect()
        ended = {flood.name for flood in ends}
        offered = Counter(key for number, key in load.offered.items() if number >= first)
        assert min(offered.values()) / LONGER_THAN_A_FLOW >= 1000, "too little is offered"
        assert not {key: len(numbers) for key, numbers in load.out.items() if key[0] in ended}
        for key, count in offered.items():
            if key[0] not in ended:
                assert sum(number >= first for number in load.out[key]) == count, "other traffic suffers"
    finally:
        load.world.close()
