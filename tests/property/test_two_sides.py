"""Both ends of a connection over a network that loses, delays, reorders and duplicates up to 30 % of what it carries.

Whatever the weather was, once a path works both sides send by the same pair, the best that works, within the time that
the check intervals of the specification give; and no run spins (the worlds assert it) or leaves anything behind.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fzg.ice.agent import CLIENT_DEFAULT, SERVER_DEFAULT
from fzg.wire import stun
from fzg.wire.candidate import Kind
from tests.property.effort import RUNS, share
from tests.property.model_client import ModelClient
from tests.property.test_ice_properties import CLIENT_CANDIDATES, GATEWAY_CANDIDATES, LINKS, assert_consistent
from tests.unit.gateway_world import (
    close_worlds,  # noqa: F401
    world,
)
from tests.unit.ice_world import CLIENT, GATEWAY, HOST4, PEER4, World, client_agent, endpoint, gateway_agent

if TYPE_CHECKING:
    from fzg.wire.endpoint import Endpoint

MOST = 0.3
SLOWEST = 0.3
"""Seconds a datagram takes at most in one direction."""

# A pair the client has not given up is checked every 1.5 s; one it gave up in the bad weather comes back with a check
# of the gateway, every 15 s. Then an answer, and the nomination that reaches the gateway.
SETTLES = 15.0 + 1.5 + 3 * SLOWEST
# Without losses the first check of each pair does it: there and back, and the nomination. But a first check that comes
# before the other side has the candidates, or a pair that forms later, costs the ladder's next steps.
SETTLES_WITHOUT_LOSS = 3 * SLOWEST + 0.75
# The client gives a dead pair up after 16.5 s; the gateway takes another when two checks, 15 s apart, are unanswered
# and nothing was heard for 5 s (connectivity 3.2, D1); the third check is sent 0.5 s after the second.
LEAVES_A_DEAD_PAIR = 16.5 + 15.0 + 15.0 + 5.0
# A path that works again is found by the checks that pairs get for as long as they exist, and by new ones if not.
RETURNS = 15.0 + 15.0 + 3.0

PUBLIC_GATEWAY, PUBLIC_CLIENT = endpoint("198.18.0.1:31000"), endpoint("198.18.0.2:32000")

rates = st.floats(0, MOST)


@dataclass(frozen=True)
class Weather:
    """Shares of datagrams, until `calm`; delays stay."""

    lost: float
    doubled: float
    delayed: float
    calm: float


weathers = st.builds(Weather, lost=rates, doubled=rates, delayed=rates, calm=st.floats(0, 20))


class Rough(World):
    """Two agents, the `working` links between their candidates, the weather, and perhaps NATs before the two."""

    def __init__(self, seed: int, working: set[tuple[Endpoint, Endpoint]], weather: Weather, client, nats) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.working = set(working)
        self.weather = weather
        self.carried: dict[bytes, int] = {}
        self.gateway = self.add(gateway_agent(timing=SERVER_DEFAULT, seed=seed), *(a for _, a in GATEWAY_CANDIDATES))
        self.client = self.add(client, *(a for _, a in CLIENT_CANDIDATES))
        for agent, candidates, private, public, natted in (
            (self.gateway, GATEWAY_CANDIDATES, HOST4, PUBLIC_GATEWAY, nats[0]),
            (self.client, CLIENT_CANDIDATES, PEER4, PUBLIC_CLIENT, nats[1]),
        ):
            for kind, address in candidates:
                agent.add_local_candidate(kind, address, address, now=0)
            if natted:
                self.nat(private, public)
                agent.add_local_candidate(Kind.SRFLX, public, private, now=0)

    def seen(self, address: Endpoint) -> Endpoint:
        """What the world sees of an address."""
        return self._public.get(address, address)

    def _carry(self, agent, check) -> None:
        inside = {public: private for private, public in self._public.items()}.get(check.destination)
        target = inside or check.destination
        owner = self._owners.get(target)
        if owner is None or (inside is None and target in self._public):
            return
        if (check.source, target) not in self.working and (target, check.source) not in self.working:
            return
        rough, source = self.now < self.weather.calm, self.seen(check.source)
        if rough and self.chance.random() < self.weather.lost:
            return
        for _ in range(1 + (rough and self.chance.random() < self.weather.doubled)):
            slow = self.chance.random() < self.weather.delayed
            self.after(
                self.chance.uniform(0.001, SLOWEST if slow else 0.02),
                lambda: owner.handle_message(stun.parse(check.payload), source, target, self.now),
            )

    def has_agreed(self) -> bool:
        ours, theirs = self.gateway.path, self.client.path
        if ours is None or theirs is None:
            return False
        link = ours.source, theirs.source
        return (
            link == self.best()
            and ours.destination == self.seen(theirs.source)
            and theirs.destination == self.seen(ours.source)
        )

    def both_reach(self) -> bool:
        """Each side sends by a path that works, the same or another."""
        ours, theirs = self.gateway.path, self.client.path
        return any(ours and ours.source == g and ours.destination == self.seen(c) for g, c in self.working) and any(
            theirs and theirs.source == c and theirs.destination == self.seen(g) for g, c in self.working
        )

    def best(self) -> tuple[Endpoint, Endpoint]:
        """As the client, which decides, ranks what works: its local candidate and ours as the world sees it."""
        ours = {one.address: one.priority for one in self.gateway.local_candidates() if one.kind is not Kind.PRFLX}
        theirs = {one.address: one.priority for one in self.client.local_candidates() if one.kind is not Kind.PRFLX}

        def rank(link: tuple[Endpoint, Endpoint]) -> int:
            d, g = ours[self.seen(link[0])], theirs[link[1]]
            return (min(g, d) << 32) + 2 * max(g, d) + (g > d)

        return max(self.working, key=rank)

    def settle(self, within: float, condition) -> float:
        """Run until the condition holds for good, and say how long it took."""
        began, held_since = self.now, None
        while self.now < began + within + 2.0:
            self.run(self.now + 0.1)
            held_since = None if not condition() else held_since or self.now
        assert held_since is not None, f"{self.gateway.path} against {self.client.path}, best {self.best()}"
        assert held_since - began <= within + 0.11
        return held_since - began

    def assert_nothing_is_left(self) -> None:
        for agent in (self.gateway, self.client):
            if not isinstance(agent, ModelClient):
                assert_consistent(agent)
        assert len(self._queue) <= 4 * len(LINKS)


scenarios = {
    "seed": st.integers(0, 2**32),
    "working": st.sets(st.sampled_from(LINKS), min_size=1),
    "weather": weathers,
    "early": st.floats(0, 0.5),
    "late": st.floats(0, 2),
    "nats": st.tuples(st.booleans(), st.booleans()),
    "failing": st.booleans(),
}


def live_through(rough: Rough, early: float, late: float, *, failing: bool, agreed) -> None:
    """A connection's life: it comes up in the weather, its path dies, the path comes back."""
    rough.after(early, lambda: rough.signal(rough.gateway.local_candidates(), rough.client))
    rough.after(late, lambda: rough.signal(rough.client.local_candidates(), rough.gateway))
    if rough.weather.lost == 0:
        rough.run(max(early, late))
        took = rough.settle(SETTLES_WITHOUT_LOSS, agreed)
    else:
        rough.run(max(early, late, rough.weather.calm))
        took = rough.settle(SETTLES, agreed)
    event("agreed within " + next(f"{bound} s" for bound in (0, 0.5, 1, 2, 5, 20) if took <= bound))
    if not failing:
        return
    dead = rough.best()
    rough.working.remove(dead)
    if rough.working:
        rough.settle(LEAVES_A_DEAD_PAIR, agreed)
    else:
        rough.run(rough.now + 8.0)  # a suspended peer, or a cable pulled: shorter than what gives pairs up
    rough.working.add(dead)
    rough.settle(RETURNS, agreed)


@pytest.mark.slow
@given(**scenarios)
@settings(max_examples=share(RUNS, 40), deadline=None, suppress_health_check=list(HealthCheck))
def test_two_agents_agree_on_the_best_path_that_works(seed, working, weather, early, late, nats, failing):
    rough = Rough(seed, working, weather, client_agent(timing=CLIENT_DEFAULT, seed=seed + 1), nats)
    live_through(rough, early, late, failing=failing, agreed=rough.has_agreed)
    rough.assert_nothing_is_left()


@pytest.mark.slow
@given(keeps_provisional_priority=st.booleans(), **scenarios)
@settings(max_examples=share(RUNS, 40), deadline=None, suppress_health_check=list(HealthCheck))
def test_an_agent_and_a_client_of_the_specification_agree(
    seed, working, weather, early, late, nats, failing, keeps_provisional_priority
):
    """A client that ranks pairs by how it met them first (3.11) may prefer another pair: then both must reach."""
    client = ModelClient(
        local=CLIENT,
        remote=GATEWAY,
        random=random.Random(seed + 1).randbytes,
        keeps_provisional_priority=keeps_provisional_priority,
    )
    rough = Rough(seed, working, weather, client, nats)
    agreed = rough.both_reach if keeps_provisional_priority else rough.has_agreed
    live_through(rough, early, late, failing=failing, agreed=agreed)
    rough.assert_nothing_is_left()


# -- the whole of both: relays, NATs, handshakes, the portal between them

PLACEMENTS = ("public", "nat", "symmetric")
# Above what agents need: the client asks anew when its connection failed, at the latest when WireGuard gives up
# (connectivity 5.5: 36 s), and the handshake's next try comes 5.3 s after one that was lost.
CONNECTS = 36.0 + SETTLES + 2 * 5.333


class Connected:
    """A gateway and a client of a world, looked at from both ends."""

    def __init__(self, w) -> None:
        self.w = w
        self.asked_at = float("-inf")

    def ask(self) -> None:
        """What a client does for traffic when it has no connection."""
        if self.w.client.node.connection("gateway") is None and self.w.net.now > self.asked_at + 2.0:
            self.asked_at = self.w.net.now
            self.w.authorize()

    def is_one_pair(self) -> bool:
        ours, theirs = self.w.connection, self.w.client.node.connection("gateway")
        if ours is None or theirs is None or ours.path is None or theirs.path is None:
            return False
        return (
            self._seen(self.w.gateway, ours.path) == theirs.path.destination
            and self._seen(self.w.client, theirs.path) == ours.path.destination
        )

    def _seen(self, party, path):
        if path.relayed or party.nat is None or not path.source.is_ipv4:
            return path.source
        return party.nat.outgoing(path.source, path.destination)

    def assert_nothing_is_left(self) -> None:
        w = self.w
        w.reject()
        w.net.run(20.0)
        node, core = w.gateway.node, w.gateway.core
        tables = [
            node._connections, node._by_index, node._by_username, node._by_public_key, node._timers, node._relayed,
            node._requests, node._homeless, core._handles, core._clients, core._waiting,
        ]  # fmt: skip
        assert [len(table) for table in tables] == [0] * len(tables)
        assert core.tunnel.client_count == 0
        assert len(w.net._queue) < 20


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    gateway=st.sampled_from(PLACEMENTS),
    client=st.sampled_from(PLACEMENTS),
    ipv6=st.booleans(),
    weather=weathers,
)
@settings(max_examples=share(RUNS, 20), deadline=None, suppress_health_check=list(HealthCheck))
def test_a_gateway_and_a_client_agree_on_a_path_that_carries_packets(seed, gateway, client, ipv6, weather):
    w = world(gateway=gateway, client=client, ipv6=ipv6).start()
    both, chance = Connected(w), random.Random(seed)
    calm = w.net.now + weather.calm

    def copies() -> list[float]:
        if w.net.now >= calm:
            return [0.0]
        if chance.random() < weather.lost:
            return []
        slow = SLOWEST if chance.random() < weather.delayed else 0.01
        return [chance.uniform(0.0, slow) for _ in range(1 + (chance.random() < weather.doubled))]

    w.net.lateness = copies
    while w.net.now < calm:
        both.ask()
        w.net.run(0.5)
    while not (both.is_one_pair() and w.traffic_flows()):
        assert w.net.now < calm + CONNECTS, f"{w.connection and w.connection.path} against {w.client.path}"
        both.ask()
        w.net.run(0.5)
    for _ in range(5):
        w.net.run(4.0)
        assert both.is_one_pair()
        assert w.traffic_flows()
    both.assert_nothing_is_left()
