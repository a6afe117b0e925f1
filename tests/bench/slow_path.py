"""What the core decides in Python, on one core: `python -m tests.bench.slow_path`.

Parse, policy, NAT, rewrite and checksums count, flows are installed in the engine that the gateway would use, and time
goes on with all its housekeeping; ciphers and system calls are left out. A hundred clients are connected, over a relay
and a network in memory.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import statistics
import time
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from fzg.dataplane.select import make_engine
from fzg.portal import messages
from fzg.tunnel.resources import CidrResource
from tests.unit.dataplane_world import CLIENT, GATEWAY, SYN, tcp, udp
from tests.unit.gateway_world import World, cidr, world
from tests.unit.tunnel_world import control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fzg.sansio import Transmit
    from tests.unit.gateway_world import ClientParty

Batch = list[tuple[int, bytes]]
"""Handles of clients and their packets; 0 for a packet of the host."""

CLIENTS = 100
FLOWS = 10_000  # that exist, of all clients
SECONDS = 10.0
BATCH = 64  # packets between two looks at the clock, as in a turn of the engine
NAMES_ID, NETWORK_ID = (f"00000000-0000-4000-8000-{number:012x}" for number in (1, 2))
NETWORK, SERVER = "10.1.0.0/16", bytes((10, 1, 0, 5))
PROXIES = [bytes((100, 96, 0, 1 + i)) for i in range(4)]
REALS = [ip_address(f"10.2.0.{1 + i}") for i in range(4)]
PATH = CLIENT, GATEWAY
SEALED = b"a data message"
FULL_SESSIONS, FULL_RESOURCES = 100_000, 10_000


class CoreEngine:
    """The tables of the engine that the gateway would use, without its ciphers and queues."""

    def __init__(self) -> None:
        real = make_engine()
        for name in (
            "activity", "add_session", "clear_path", "install_flow", "note_handshake", "remove_peer", "remove_session",
            "revoke", "set_channel", "set_path", "sweep", "use_session",
        ):  # fmt: skip
            setattr(self, name, getattr(real, name))
        self.written = self.sealed = 0

    def write_tun(self, packet: bytes, peer: int | None = None) -> None:
        self.written += 1

    def seal(self, peer: int, packet: bytes, now: float) -> bytes:
        self.sealed += 1
        return SEALED


class Core:
    """A gateway's core with its clients connected, each with a network and a name that it may use."""

    def __init__(self, clients: int = CLIENTS) -> None:
        self.world: World = world(relays=1).start()
        self.core = self.world.gateway.core
        self.now = self.world.net.now
        self.engine = CoreEngine()
        self.clients = [self._introduce(self.world.client), *(self.add_client() for _ in range(clients - 1))]

    def add_client(self) -> tuple[int, bytes]:
        """Connect another one; its handle and tunnel address."""
        return self._introduce(self.world.add_client())

    def _introduce(self, client: ClientParty) -> tuple[int, bytes]:
        core, gateway = self.core, self.world.gateway
        core.engine = gateway.engine
        self.world.connect(client, resource=cidr(NETWORK, resource_id=NETWORK_ID))
        name = messages.DnsResource(
            id=messages.Id(NAMES_ID), address="*.example.com", name="Names", filters=messages.Filters()
        )
        self.world.authorize(client, resource=name)
        self.now = self.world.net.now
        handle = core._handles[client.client_id]
        listed = ",".join(f'"{ip_address(proxy)}"' for proxy in PROXIES)
        event = f'{{"resource":"{NAMES_ID}","domain":"a.example.com","proxy_ips":[{listed}]}}'
        core.handle_inner_packet(handle, control(0, event.encode()), 0, self.now)
        gateway.drain()
        core.handle_resolved(gateway.resolutions.pop().request, REALS, self.now)
        gateway.drain()
        core.engine = self.engine  # type: ignore[assignment]
        connection = core.node.connection(client.client_id)
        assert connection is not None
        connection._engine = self.engine  # type: ignore[assignment]
        return handle, client.ipv4

    def close(self) -> None:
        self.world.close()

    def rate(self, batches: Iterator[Batch], handle: Callable[[Core, Batch], None], seconds: float = SECONDS) -> float:
        """Packets a second of CPU time; making batches and the network do not count."""
        handled, spent = 0, 0.0
        while spent < seconds:
            batch = next(batches)
            began = time.thread_time()
            handle(self, batch)
            while (deadline := self.core.poll_timeout()) is not None and deadline.at <= self.now:
                self.core.handle_timeout(self.now)
            sent = self.take_data()
            took = time.thread_time() - began
            handled, spent, self.now = handled + len(batch), spent + took, self.now + took
            for transmit in sent:
                self.world.gateway.engine.transmit(transmit)
            self.world.gateway.drain()
            self.world.net.run(self.now - self.world.net.now)
        return handled / spent

    def take_data(self) -> list[Transmit]:
        """Poll all transmits; those that are no data."""
        others = []
        while (transmit := self.core.poll_transmit()) is not None:
            if transmit.payload is not SEALED:
                others.append(transmit)
        return others


def from_clients(core: Core, batch: Batch) -> None:
    """Packets of clients, as the engine hands them over."""
    handle_inner_packet, now = core.core.handle_inner_packet, core.now
    for handle, packet in batch:
        handle_inner_packet(handle, packet, 0, now, PATH)


def both_ways(core: Core, batch: Batch) -> None:
    """The same, and packets of the host where the handle is 0."""
    handle_inner_packet, handle_outbound_packet = core.core.handle_inner_packet, core.core.handle_outbound_packet
    now = core.now
    for handle, packet in batch:
        if handle:
            handle_inner_packet(handle, packet, 0, now, PATH)
        else:
            handle_outbound_packet(packet, now)


def new_flows(core: Core) -> Iterator[Batch]:
    """First packets of connections, TCP and UDP, to a network and to a proxy IP in turn; no 5-tuple comes twice."""
    batch: Batch = []
    for port in itertools.cycle(range(1024, 65_536)):
        for number, (handle, own) in enumerate(core.clients):
            destination = PROXIES[0] if (port + number) & 1 else SERVER
            if (port + number) & 2:
                packet = tcp(source=own, destination=destination, sport=port, dport=443, flags=SYN)
            else:
                packet = udp(bytes(64), source=own, destination=destination, sport=port, dport=53)
            batch.append((handle, packet))
            if len(batch) == BATCH:
                yield batch
                batch = []


def known_flows(core: Core) -> Iterator[Batch]:
    """Packets of connections that exist, one way and the other."""
    packets: Batch = []
    for number in range(FLOWS // len(core.clients)):
        for handle, own in core.clients:
            make = tcp if number & 1 else udp
            payload = os.urandom((64, 1100)[number >> 1 & 1])
            destination, real = (PROXIES[0], REALS[0].packed) if number & 4 else (SERVER, SERVER)
            port = 2000 + number
            packets.append((handle, make(payload, source=own, destination=destination, sport=port, dport=443)))
            packets.append((0, make(payload, source=real, destination=own, sport=443, dport=port)))
    for start in itertools.cycle(range(0, len(packets) - BATCH, BATCH)):
        yield packets[start : start + BATCH]


class Tables:
    """A client whose NAT table and resources are as many as told, and packets that look into all of them."""

    def __init__(self, core: Core, *, sessions: int, resources: int) -> None:
        r = random.Random(1)
        self.core = core
        self.handle, self.own = core.add_client()
        self.client_id = core.world.clients[-1].client_id
        networks = [ip_network(NETWORK)]
        while len(networks) < resources:
            prefix = r.choice((32, 32, 24, 24, *range(12, 33)))
            networks.append(ip_network((0x20000000 | r.getrandbits(29), prefix), strict=False))
        for number, network in enumerate(networks[1:], 10):
            resource = CidrResource(f"00000000-0000-4000-8000-{number:012x}", network)
            ipv6 = core.world.clients[-1].ipv6
            assert core.core.tunnel.grant(self.client_id, self.own, ipv6, resource, None, core.now)
        self._networks = [(network.network_address.packed, network.num_addresses) for network in networks]
        self._sessions = [
            udp(bytes(64), source=self.own, destination=PROXIES[i % len(PROXIES)], sport=1024 + i // len(PROXIES))
            for i in range(sessions)
        ]
        from_clients(core, [(self.handle, packet) for packet in self._sessions])
        self._random = r

    def batch(self) -> Batch:
        """Half of it into a session, half to a network."""
        choice, randrange = self._random.choice, self._random.randrange
        made = []
        for _ in range(BATCH // 2):
            first, count = choice(self._networks)
            destination = (int.from_bytes(first, "big") + randrange(count)).to_bytes(4, "big")
            made.append((self.handle, bytes(memoryview(choice(self._sessions)))))  # as fresh in the cache as one read
            made.append((self.handle, udp(bytes(64), source=self.own, destination=destination, sport=5000)))
        return made


def empty_and_full(core: Core) -> tuple[Tables, Tables]:
    """Two clients of one core to compare."""
    empty = Tables(core, sessions=len(PROXIES), resources=1)
    full = Tables(core, sessions=FULL_SESSIONS, resources=FULL_RESOURCES)
    assert core.core.tunnel.nat_session_count >= FULL_SESSIONS
    return empty, full


def slowdown(empty: Tables, full: Tables, seconds: float = SECONDS) -> float:
    """Time for a packet with full tables, divided by that with empty ones; batches of both in turn."""
    core = full.core
    took: dict[Tables, list[float]] = {empty: [], full: []}
    spent = 0.0
    while spent < seconds:
        for tables in (empty, full):
            batch = tables.batch()
            began = time.thread_time()
            from_clients(core, batch)
            took[tables].append(time.thread_time() - began)
            spent += took[tables][-1]
            core.now += took[tables][-1]
            core.core.engine.sweep(core.now)
    return statistics.median(took[full]) / statistics.median(took[empty])


def main() -> None:
    logging.getLogger("fzg").setLevel(logging.ERROR)
    core = Core()
    try:
        print(f"{core.rate(known_flows(core), both_ways):12,.0f} uncached packets/s")
        print(f"{core.rate(new_flows(core), from_clients):12,.0f} new flows/s")
        full = f"{FULL_SESSIONS:,} sessions and {FULL_RESOURCES:,} resources"
        print(f"{slowdown(*empty_and_full(core)):12.2f} times the time with {full}")
    finally:
        core.close()


if __name__ == "__main__":
    main()
