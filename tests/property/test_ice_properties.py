"""ICE agents over a network that loses, delays and reorders, and one agent under arbitrary input."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fzg.ice.agent import CLIENT_DEFAULT, SERVER_DEFAULT, SERVER_IDLE
from fzg.wire.candidate import Kind
from tests.unit.ice_world import (
    HOST4,
    HOST6,
    PEER4,
    PEER4_RELAY,
    RELAY4,
    RELAY6,
    Scripted,
    World,
    answer,
    client_agent,
    endpoint,
    gateway_agent,
    remote,
    request,
)

if TYPE_CHECKING:
    from fzg.wire.endpoint import Endpoint

GATEWAY_CANDIDATES = [(Kind.HOST, HOST4), (Kind.HOST, HOST6), (Kind.RELAY, RELAY4), (Kind.RELAY, RELAY6)]
CLIENT_CANDIDATES = [
    (Kind.HOST, PEER4),
    (Kind.HOST, endpoint("[2001:db8:9::9]:40000")),
    (Kind.RELAY, PEER4_RELAY),
    (Kind.RELAY, endpoint("[2001:db8:99::1]:50001")),
]
LINKS = [
    (ours, theirs)
    for _, ours in GATEWAY_CANDIDATES
    for _, theirs in CLIENT_CANDIDATES
    if len(ours.ip) == len(theirs.ip)
]


class Lossy(World):
    """Both agents, `working` links, and loss and jitter until `calm`."""

    def __init__(self, seed: int, working: set[tuple[Endpoint, Endpoint]], loss: float, calm: float) -> None:
        super().__init__()
        self.working = set(working)
        self.gateway = self.add(gateway_agent(timing=SERVER_DEFAULT, seed=seed), *(a for _, a in GATEWAY_CANDIDATES))
        self.client = self.add(client_agent(timing=CLIENT_DEFAULT, seed=seed + 1), *(a for _, a in CLIENT_CANDIDATES))
        for kind, address in GATEWAY_CANDIDATES:
            self.gateway.add_local_candidate(kind, address, address, now=0)
        for kind, address in CLIENT_CANDIDATES:
            self.client.add_local_candidate(kind, address, address, now=0)
        chance = random.Random(seed)

        def delay(source: Endpoint, destination: Endpoint, now: float) -> float | None:
            if (source, destination) not in self.working and (destination, source) not in self.working:
                return None
            if now < calm and chance.random() < loss:
                return None
            return chance.uniform(0.001, 0.3)

        self.delay = delay

    def assert_agreed(self) -> None:
        ours, theirs = self.gateway.path, self.client.path
        assert ours is not None
        assert theirs is not None
        assert (ours.source, ours.destination) == (theirs.destination, theirs.source)
        assert (ours.source, ours.destination) == self.best()

    def best(self) -> tuple[Endpoint, Endpoint]:
        """By the candidates' priorities, as RFC 8445 6.1.2.3 ranks pairs."""
        ours = {candidate.address: candidate.priority for candidate in self.gateway.local_candidates()}
        theirs = {candidate.address: candidate.priority for candidate in self.client.local_candidates()}

        def rank(link: tuple[Endpoint, Endpoint]) -> int:
            d, g = ours[link[0]], theirs[link[1]]
            return (min(g, d) << 32) + 2 * max(g, d) + (g > d)

        return max(self.working, key=rank)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    working=st.sets(st.sampled_from(LINKS), min_size=1),
    loss=st.floats(0, 0.6),
    early=st.floats(0, 0.5),
    late=st.floats(0, 2),
)
@settings(max_examples=20, deadline=None)
def test_two_agents_agree_on_the_best_working_path_and_find_it_again(seed, working, loss, early, late):
    world = Lossy(seed, working, loss, calm=8)
    world.after(early, lambda: world.signal(world.gateway.local_candidates(), world.client))
    world.after(late, lambda: world.signal(world.client.local_candidates(), world.gateway))
    world.run(20)
    world.assert_agreed()

    dead = world.best()
    if len(world.working) == 1:
        return
    world.working.remove(dead)
    world.run(70)  # the client gives a pair up after 16.5 s, the gateway notices after two checks, 15 s apart
    world.assert_agreed()

    world.working.add(dead)
    world.run(110)
    world.assert_agreed()


ADDRESSES = [endpoint(f"203.0.113.{index % 3}:{index}") for index in range(1, 90)]
LOCALS = [HOST4, RELAY4, endpoint("192.0.2.11:52625"), endpoint("198.51.100.4:61234")]
OPERATIONS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 40)),
    st.tuples(st.just("local"), st.sampled_from(["host", "srflx", "relay"]), st.sampled_from(LOCALS)),
    st.tuples(st.just("withdraw local"), st.sampled_from(LOCALS)),
    st.tuples(st.just("remote"), st.sampled_from(list(Kind)), st.sampled_from(ADDRESSES), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("withdraw remote"), st.sampled_from(list(Kind)), st.sampled_from(ADDRESSES)),
    st.tuples(st.just("request"), st.sampled_from(ADDRESSES), st.sampled_from(LOCALS), st.booleans()),
    st.tuples(st.just("answer"), st.integers(0, 200), st.sampled_from(ADDRESSES)),
    st.tuples(st.just("conflict"), st.booleans()),
    st.tuples(st.just("timing"), st.sampled_from([SERVER_DEFAULT, SERVER_IDLE, CLIENT_DEFAULT])),
    st.tuples(st.just("flood"), st.booleans()),
)


@given(st.lists(OPERATIONS, max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_input_breaks_the_bookkeeping_of_an_agent(operations, answers):
    world = Scripted()
    world.answers = lambda check: answers
    agent = world.agent
    for operation in operations:
        match operation:
            case "wait", seconds:
                world.run(world.now + seconds)
            case "local", kind, address:
                agent.add_local_candidate(Kind(kind), address, HOST4, now=world.now)
            case "withdraw local", address:
                agent.invalidate_local_candidate(address, world.now)
            case "remote", kind, address, priority:
                agent.add_remote_candidate(remote(kind, address, priority), world.now)
            case "withdraw remote", kind, address:
                agent.invalidate_remote_candidate(remote(kind, address), world.now)
            case "request", source, destination, nominate:
                world.receive(request(nominate=nominate), source, destination)
            case "answer", index, mapped:
                checks = [check for _, _, check in world.sent if check.transaction_id]
                if checks:
                    check = checks[-1 - index % len(checks)]
                    world.receive(answer(check, mapped=mapped), check.destination, check.source)
            case "conflict", higher:
                tie_breaker = 2**64 - 1 if higher else 0
                ours = agent.role.name == "CONTROLLED"
                world.receive(
                    request(controlling=None if ours else tie_breaker, controlled=tie_breaker if ours else None)
                )
            case "timing", timing:
                agent.set_timing(timing, world.now)
            case "flood", nominate:
                for source in ADDRESSES:
                    world.receive(request(nominate=nominate), source)
        assert_consistent(agent)
    world.run(world.now)
    assert_consistent(agent)
    deadline = agent.poll_timeout()
    assert deadline is None or deadline.at > world.now


def assert_consistent(agent):
    pairs = agent._pairs
    assert len(pairs) <= 100
    assert agent.remote_candidate_count <= 64
    assert len(agent.local_candidates()) <= 64
    assert all(key == (pair.local.base, pair.remote.address) for key, pair in pairs.items())
    assert all(not pair.local.discarded and not pair.remote.discarded for pair in pairs.values())
    ids = {tid: pair for pair in pairs.values() for tid in pair.history.transaction_ids()}
    assert {tid: pair for tid, (pair, _) in agent._attempts.items()} == ids
    assert all(len(pair.history) <= agent.timing.max_retransmits for pair in pairs.values())
    assert agent._selected is None or agent._selected in pairs.values()
    for pair in pairs.values():
        theirs, ours = pair.remote.priority, pair.local.priority
        g, d = (theirs, ours) if agent.role.name == "CONTROLLED" else (ours, theirs)
        assert pair.priority == (min(g, d) << 32) + 2 * max(g, d) + (g > d)
