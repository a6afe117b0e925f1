"""Virtual time for ICE agents: one agent with a scripted peer, or several joined by an in-memory network."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import TYPE_CHECKING

from fzg.ice.agent import SERVER_DEFAULT, Agent, Check, Credentials, Event, Nominated, Role, StateChanged, Timing
from fzg.secret import Secret
from fzg.wire import candidate as candidate_format
from fzg.wire import stun
from fzg.wire.candidate import Candidate, Kind
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

# Appendix A of the connectivity part.
GATEWAY = Credentials("wxyz", Secret("gatewaypasswordaaaaa23"))
CLIENT = Credentials("abcd", Secret("clientpasswordbbbbbb45"))
GATEWAY_KEY = b"gatewaypasswordaaaaa23"
CLIENT_KEY = b"clientpasswordbbbbbb45"
A1 = bytes.fromhex(
    "000100482112a4420102030405060708090a0b0c000600097778797a3a61626364000000802a0008112233445566"
    "7788002400046efffeff00250000000800142986f3c3ec8ffede59cbcc8df495625378270e49802800049e05f73e"
)

HOST4 = Endpoint.parse("192.0.2.10:52625")
HOST6 = Endpoint.parse("[2001:db8:1::10]:52625")
RELAY4 = Endpoint.parse("198.51.100.3:61234")
RELAY6 = Endpoint.parse("[2001:db8::3]:61234")
PEER4 = Endpoint.parse("203.0.113.7:40000")
PEER4_RELAY = Endpoint.parse("198.51.100.99:50001")

RTT = 0.02


def endpoint(text: str) -> Endpoint:
    return Endpoint.parse(text)


def remote(kind: str, address: Endpoint | str, priority: int = 2130706175, **changes) -> Candidate:
    """A candidate as the peer signals it."""
    address = Endpoint.parse(address) if isinstance(address, str) else address
    related = Endpoint(bytes(len(address.ip)), 0) if kind in ("srflx", "relay") else None
    fields = {"foundation": "f", "component": 1, "transport": "udp", "related": related, "ufrag": "abcd"} | changes
    return Candidate(priority=priority, address=address, kind=Kind(kind), **fields)


def request(
    *,
    tid: bytes | None = None,
    username: str = "wxyz:abcd",
    key: bytes = GATEWAY_KEY,
    priority: int | None = 1862270719,
    nominate: bool = False,
    controlling: int | None = 1,
    controlled: int | None = None,
    extra: tuple[tuple[int, bytes], ...] = (),
) -> stun.Message:
    """A check of the client, as the gateway's demultiplexer hands it over."""
    attributes: list[tuple[int, bytes]] = [(0x0006, username.encode()), *extra]
    if controlling is not None:
        attributes.append((0x802A, controlling.to_bytes(8, "big")))
    if controlled is not None:
        attributes.append((0x8029, controlled.to_bytes(8, "big")))
    if priority is not None:
        attributes.append((0x0024, priority.to_bytes(4, "big")))
    if nominate:
        attributes.append((0x0025, b""))
    tid = tid or random.randbytes(12)
    return stun.parse(stun.encode(1, 0, tid, attributes, integrity_key=key, fingerprint=True))


def answer(check: Check, *, mapped: Endpoint | None = None, key: bytes = CLIENT_KEY) -> stun.Message:
    """The peer's success response to a check of ours."""
    tid = check.transaction_id
    assert tid is not None
    attributes = [(0x0020, stun.xor_address(mapped or check.source, tid))]
    return stun.parse(stun.encode(1, 2, tid, attributes, integrity_key=key, fingerprint=True))


def gateway_agent(*, now: float = 0.0, timing: Timing = SERVER_DEFAULT, seed: int = 1) -> Agent:
    return Agent(
        role=Role.CONTROLLED,
        local=GATEWAY,
        remote=CLIENT,
        timing=timing,
        random=random.Random(seed).randbytes,
        now=now,
    )


def client_agent(*, timing: Timing, now: float = 0.0, seed: int = 2) -> Agent:
    return Agent(
        role=Role.CONTROLLING,
        local=CLIENT,
        remote=GATEWAY,
        timing=timing,
        random=random.Random(seed).randbytes,
        now=now,
    )


class World:
    """Agents, the addresses that lead to them, and what happens to each datagram."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[float, Agent, Check]] = []
        self.events: dict[int, list[tuple[float, Event]]] = {}
        self.delay: Callable[[Endpoint, Endpoint, float], float | None] = lambda source, destination, now: RTT / 2
        self.on_check: Callable[[Agent, Check], None] | None = None  # stands in for peers that are no agents
        self._agents: list[Agent] = []
        self._owners: dict[Endpoint, Agent] = {}
        self._public: dict[Endpoint, Endpoint] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def add(self, agent: Agent, *addresses: Endpoint) -> Agent:
        self._agents.append(agent)
        self.events[id(agent)] = []
        self._owners |= dict.fromkeys(addresses, agent)
        return agent

    def nat(self, private: Endpoint, public: Endpoint) -> None:
        """A full-cone mapping: the world sees `public`."""
        self._public[private] = public

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action))

    def signal(self, candidates: list[Candidate], to: Agent) -> None:
        """What the portal does: lines, in the order of their priority."""
        for one in sorted(candidates, key=lambda one: -one.priority):
            to.add_remote_candidate(candidate_format.parse(candidate_format.encode(one)), self.now)

    def run(self, until: float) -> None:
        passes = 0
        self.drain()
        while True:
            at = self._next()
            if at is None or at > until:
                break
            passes = passes + 1 if at <= self.now else 0
            assert passes < 500, "a deadline spins"
            self.now = max(at, self.now)
            while self._queue and self._queue[0][0] <= self.now:
                heapq.heappop(self._queue)[2]()
                self.drain()
            for agent in self._agents:
                agent.handle_timeout(self.now)
            self.drain()
        self.now = until

    def drain(self) -> None:
        for agent in self._agents:
            while (event := agent.poll_event()) is not None:
                self.events[id(agent)].append((self.now, event))
            while (check := agent.poll_transmit()) is not None:
                self.sent.append((self.now, agent, check))
                self._carry(agent, check)

    def checks(self, agent: Agent, destination: Endpoint | None = None) -> list[float]:
        """When `agent` sent requests."""
        return [
            at
            for at, sender, check in self.sent
            if sender is agent and check.transaction_id and destination in (None, check.destination)
        ]

    def paths(self, agent: Agent) -> list[Nominated]:
        return [event for _, event in self.events[id(agent)] if isinstance(event, Nominated)]

    def states(self, agent: Agent) -> list[str]:
        return [event.state.name for _, event in self.events[id(agent)] if isinstance(event, StateChanged)]

    def _carry(self, agent: Agent, check: Check) -> None:
        if self.on_check is not None:
            self.on_check(agent, check)
            return
        source = self._public.get(check.source, check.source)
        seen = {public: private for private, public in self._public.items()}.get(check.destination, check.destination)
        owner = self._owners.get(seen)
        delay = self.delay(check.source, seen, self.now)
        if owner is None or delay is None or (seen in self._public and seen == check.destination):
            return  # nobody there, lost, or a private address seen from outside

        def arrive() -> None:
            owner.handle_message(stun.parse(check.payload), source, seen, self.now)

        self.after(delay, arrive)

    def _next(self) -> float | None:
        deadlines = [deadline.at for agent in self._agents if (deadline := agent.poll_timeout()) is not None]
        if self._queue:
            deadlines.append(self._queue[0][0])
        return min(deadlines, default=None)


class Scripted(World):
    """One gateway agent whose peer answers a check when `answers(check)` says so."""

    def __init__(self, *, timing: Timing = SERVER_DEFAULT) -> None:
        super().__init__()
        self.agent = self.add(gateway_agent(timing=timing))
        self.answers: Callable[[Check], bool] = lambda check: True
        self.on_check = self._respond

    def host(self, address: Endpoint = HOST4) -> Candidate | None:
        return self.agent.add_local_candidate(Kind.HOST, address, address, now=self.now)

    def relay(self, address: Endpoint = RELAY4) -> Candidate | None:
        return self.agent.add_local_candidate(Kind.RELAY, address, address, now=self.now)

    def learn(self, kind: str, address: Endpoint | str, priority: int = 2130706175, **changes) -> bool:
        return self.agent.add_remote_candidate(remote(kind, address, priority, **changes), self.now)

    def receive(self, message: stun.Message, source: Endpoint = PEER4, destination: Endpoint = HOST4) -> list[Check]:
        """Hand a message over; returns what the agent sends at once."""
        self.drain()
        before = len(self.sent)
        self.agent.handle_message(message, source, destination, self.now)
        self.drain()
        return [check for _, _, check in self.sent[before:]]

    def _respond(self, agent: Agent, check: Check) -> None:
        if check.transaction_id is None or not self.answers(check):
            return
        self.after(RTT, lambda: agent.handle_message(answer(check), check.destination, check.source, self.now))
