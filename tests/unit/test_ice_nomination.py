"""Nomination, the send path, and agent states (spec connectivity 3.13, 3.14, D1)."""

from __future__ import annotations

import pytest

from fzg.ice.agent import CLIENT_DEFAULT, SERVER_DEFAULT, SERVER_IDLE, AgentState, Nominated, StateChanged
from fzg.wire import stun
from fzg.wire.candidate import Kind
from tests.unit.ice_world import (
    HOST4,
    HOST6,
    PEER4,
    PEER4_RELAY,
    RELAY4,
    RTT,
    Scripted,
    World,
    answer,
    client_agent,
    endpoint,
    gateway_agent,
    remote,
    request,
)


@pytest.fixture
def world():
    world = Scripted()
    world.host()
    world.run(0)
    return world


@pytest.fixture
def two_paths():
    """A gateway with a relayed and a direct pair, both healthy and both nominated, the direct one in use."""
    world = Scripted()
    world.host()
    world.learn("host", PEER4, 2130706175)
    world.learn("relay", PEER4_RELAY, 37748479)
    world.run(1)
    world.receive(request(nominate=True), PEER4_RELAY)
    world.receive(request(nominate=True), PEER4)
    return world


@pytest.mark.spec("CONN-55")
def test_the_first_use_candidate_moves_the_path_before_any_check_of_ours_is_answered(world):
    world.answers = lambda check: False

    sent = world.receive(request(nominate=True))

    assert world.paths(world.agent) == [Nominated(HOST4, PEER4, Kind.PRFLX, Kind.HOST)]
    assert [check.transaction_id is None for check in sent] == [True, False]


def test_a_plain_request_does_not_move_the_path(world):
    world.receive(request())

    assert world.paths(world.agent) == []


def test_a_freshly_nominated_pair_is_checked_at_once_and_a_repetition_is_not(world):
    world.learn("host", PEER4)
    world.run(0.1)
    assert world.checks(world.agent) == [0]

    assert len(world.receive(request(nominate=True))) == 2
    assert len(world.receive(request(nominate=True))) == 1


def test_a_nominated_pair_is_checked_ahead_of_everything():
    world = Scripted()
    world.host()
    for port in range(1, 20):
        world.learn("host", f"203.0.113.1:{port}")

    # nominated before the first pass
    world.agent.handle_message(request(nominate=True), endpoint("203.0.113.1:7"), HOST4, 0)
    world.run(0)

    requests = [check.destination.port for _, _, check in world.sent if check.transaction_id]
    assert requests[0] == 7
    assert len(requests) == 19


@pytest.mark.spec("CONN-56")
def test_the_path_moves_from_relay_to_host_and_not_back_on_a_repetition(world):
    world.relay()
    world.receive(request(nominate=True), PEER4_RELAY, RELAY4)
    assert world.agent.path.source == RELAY4

    world.run(1)
    world.receive(request(nominate=True), PEER4, HOST4)
    assert world.agent.path.source == HOST4

    for second in range(2, 60):
        world.run(second)
        world.receive(request(nominate=True), PEER4, HOST4)
        world.receive(request(nominate=True), PEER4_RELAY, RELAY4)
    assert [path.source for path in world.paths(world.agent)] == [RELAY4, HOST4]


@pytest.mark.spec("CONN-56")
def test_a_silent_path_gives_way_to_a_live_one_and_comes_back(two_paths):
    world = two_paths
    world.answers = lambda check: check.destination != PEER4
    assert world.agent.path.destination == PEER4
    moved = None
    for tick in range(100):
        world.run(1 + tick * 0.5)
        world.receive(request(nominate=True), PEER4_RELAY)
        if moved is None and world.agent.path.destination == PEER4_RELAY:
            moved = world.now
    assert moved is not None
    # two checks unanswered: the one 15 s after the last answer may be the first, the next one comes 15 s later
    assert 6 <= moved <= 31

    world.receive(request(nominate=True), PEER4)

    assert world.agent.path.destination == PEER4
    assert len(world.paths(world.agent)) == 4


def test_an_answered_check_brings_a_better_path_back(two_paths):
    world = two_paths
    world.answers = lambda check: check.destination != PEER4
    for tick in range(100):
        world.run(1 + tick * 0.5)
        world.receive(request(), PEER4_RELAY)
    assert world.agent.path.destination == PEER4_RELAY

    world.answers = lambda check: True
    world.run(world.now + 16)

    assert world.agent.path.destination == PEER4


def test_a_silent_path_stays_when_no_other_is_live(two_paths):
    world = two_paths
    world.answers = lambda check: False

    world.run(500)

    assert world.agent.path.destination == PEER4
    assert len(world.paths(world.agent)) == 2


def test_the_path_does_not_return_to_a_silent_one_when_its_replacement_falls_silent_too(two_paths):
    world = two_paths
    world.answers = lambda check: False
    for second in range(2, 50):
        world.run(second)
        world.receive(request(), PEER4_RELAY)
    assert world.agent.path.destination == PEER4_RELAY

    world.run(500)

    assert world.agent.path.destination == PEER4_RELAY


def test_a_path_with_requests_but_no_answers_stays(two_paths):
    world = two_paths
    world.answers = lambda check: check.destination != PEER4
    for second in range(2, 100):
        world.run(second)
        world.receive(request(), PEER4)
        world.receive(request(), PEER4_RELAY)

    assert world.agent.path.destination == PEER4


def test_silence_is_noticed_5_s_after_the_last_request_without_an_input(two_paths):
    world = two_paths
    # Our own checks of the direct path fail from now on; its requests go on until 40 s.
    world.answers = lambda check: check.destination != PEER4
    for tenth in range(20, 400):
        world.run(tenth / 10)
        if tenth % 20 == 0:
            world.receive(request(), PEER4)
    last = world.now - world.now % 2
    world.run(last + 4.5)
    world.receive(request(), PEER4_RELAY)
    assert world.agent.path.destination == PEER4
    assert world.agent.poll_timeout().reason == "ice silence"

    world.run(last + 5)

    assert world.agent.path.destination == PEER4_RELAY


def test_an_idle_connection_takes_30_s_for_live(two_paths):
    world = two_paths
    world.agent.set_timing(SERVER_IDLE, world.now)
    world.answers = lambda check: False
    world.run(30)
    world.receive(request(), PEER4_RELAY)

    world.run(50.9)
    assert world.agent.path.destination == PEER4
    world.run(51)  # the second check in vain; the other path was heard of 21 s ago

    assert world.agent.path.destination == PEER4_RELAY


def test_withdrawing_the_path_in_use_moves_to_the_next_nominated_at_once(two_paths):
    world = two_paths

    world.agent.invalidate_remote_candidate(remote("host", PEER4), world.now)

    assert world.agent.path.destination == PEER4_RELAY


def test_losing_the_relay_in_use_moves_to_the_next_nominated_at_once(world):
    world.relay()
    world.receive(request(nominate=True), PEER4, RELAY4)
    world.receive(request(nominate=True, priority=1), endpoint("203.0.113.9:1"), HOST4)
    world.agent.invalidate_local_candidate(RELAY4, 0)

    assert world.agent.path == Nominated(HOST4, endpoint("203.0.113.9:1"), Kind.PRFLX, Kind.HOST)


def test_an_outstanding_nomination_check_is_repeated_when_a_better_candidate_takes_the_path_over(world):
    world.answers = lambda check: False
    world.learn("srflx", PEER4, 1686109951)
    world.receive(request(nominate=True))
    before = len(world.checks(world.agent))

    world.learn("host", PEER4, 2130706175)
    world.run(0)

    assert len(world.checks(world.agent)) == before + 1
    assert world.agent.path.remote_kind is Kind.HOST
    assert world.agent.pair_count == 1


# The controlling side


def controlling():
    world = World()
    agent = world.add(client_agent(timing=CLIENT_DEFAULT))
    agent.add_local_candidate(Kind.HOST, PEER4, PEER4, now=0)
    world.on_check = lambda agent, check: None
    return world, agent


def respond(world, agent, destination):
    check = next(c for _, _, c in reversed(world.sent) if c.destination == destination and c.transaction_id)
    agent.handle_message(answer(check, key=b"gatewaypasswordaaaaa23"), destination, PEER4, world.now)


def nominating(world):
    return [c.destination for _, _, c in world.sent if c.transaction_id and stun.parse(c.payload).use_candidate]


def test_the_controlling_side_nominates_the_best_succeeded_pair_and_moves_when_a_better_one_succeeds():
    world, agent = controlling()
    agent.add_remote_candidate(remote("host", HOST4, 2130706175, ufrag="wxyz"), 0)
    agent.add_remote_candidate(remote("relay", RELAY4, 37748479, ufrag="wxyz"), 0)
    world.run(0)
    assert nominating(world) == []

    respond(world, agent, RELAY4)
    assert agent.path.destination == RELAY4
    assert nominating(world) == []  # its check goes out in the next pass, so that an initiation can precede it
    assert agent.poll_timeout().at <= world.now
    world.run(0.1)
    assert nominating(world) == [RELAY4]

    respond(world, agent, HOST4)
    world.run(0.2)
    assert agent.path.destination == HOST4
    assert nominating(world) == [RELAY4, HOST4]

    world.run(10)
    later = [c for at, _, c in world.sent if at > 1]
    assert later
    assert all(stun.parse(c.payload).use_candidate for c in later)
    assert all(stun.parse(c.payload).ice_controlling == agent.tie_breaker for c in later)


def test_the_check_that_nominates_goes_ahead_of_those_that_are_due_anyway():
    world, agent = controlling()
    agent.add_remote_candidate(remote("host", HOST4, 2130706175, ufrag="wxyz"), 0)
    agent.add_remote_candidate(remote("relay", RELAY4, 37748479, ufrag="wxyz"), 0)
    world.run(0)
    respond_at = 0.25

    world.after(respond_at, lambda: respond(world, agent, RELAY4))
    world.run(respond_at)

    assert [c.destination for at, _, c in world.sent if at == respond_at] == [RELAY4, HOST4]


def test_the_controlling_side_nominates_the_next_best_pair_when_the_path_is_removed():
    world, agent = controlling()
    agent.add_remote_candidate(remote("host", HOST4, 2130706175, ufrag="wxyz"), 0)
    agent.add_remote_candidate(remote("relay", RELAY4, 37748479, ufrag="wxyz"), 0)
    world.run(0)
    respond(world, agent, HOST4)
    for second in range(1, 30):
        world.run(second)
        respond(world, agent, RELAY4)

    assert agent.path.destination == RELAY4
    assert agent.pair_count == 1


# States


def test_the_states_follow_the_table():
    world = Scripted()
    agent = world.agent
    assert agent.state is AgentState.NEW
    world.run(0)
    assert agent.state is AgentState.CHECKING  # nothing known yet
    world.host()
    world.run(0)
    assert agent.state is AgentState.CHECKING
    world.learn("host", PEER4)
    world.learn("host", "203.0.113.9:1")
    world.run(0)
    assert agent.state is AgentState.CHECKING
    world.receive(request(nominate=True))
    assert agent.state is AgentState.CONNECTED
    agent.invalidate_remote_candidate(remote("host", "203.0.113.9:1"), 0)
    assert agent.state is AgentState.COMPLETED
    agent.invalidate_remote_candidate(remote("host", PEER4), 0)
    assert agent.state is AgentState.DISCONNECTED

    world.drain()
    assert world.states(agent) == ["CHECKING", "CONNECTED", "COMPLETED", "DISCONNECTED"]


@pytest.mark.spec("CONN-24")
def test_disjoint_families_disconnect_at_once_and_a_fitting_candidate_recovers():
    world = Scripted()
    world.host(HOST4)
    world.learn("host", "[2001:db8:9::9]:1")
    world.run(1.9)
    assert world.events[id(world.agent)] == [
        (0, StateChanged(AgentState.CHECKING)),
        (0, StateChanged(AgentState.DISCONNECTED)),
    ]

    world.learn("host", PEER4)
    world.run(1.9)

    assert world.agent.state is AgentState.CHECKING
    assert world.checks(world.agent) == [1.9]


def test_replacing_a_withdrawn_relay_within_the_grace_recovers():
    world = Scripted()
    world.relay()
    world.learn("host", PEER4)
    world.receive(request(nominate=True), PEER4, RELAY4)
    world.agent.invalidate_local_candidate(RELAY4, 0)
    assert world.agent.state is AgentState.DISCONNECTED

    world.relay(endpoint("198.51.100.4:61234"))
    world.run(0)

    assert world.agent.state is AgentState.CHECKING


# Two agents


def pair_of_agents():
    world = World()
    gateway = world.add(gateway_agent(timing=SERVER_DEFAULT), HOST4, HOST6, RELAY4)
    client = world.add(client_agent(timing=CLIENT_DEFAULT), PEER4, PEER4_RELAY)
    for kind, address in ((Kind.HOST, HOST4), (Kind.HOST, HOST6), (Kind.RELAY, RELAY4)):
        gateway.add_local_candidate(kind, address, address, now=0)
    for kind, address in ((Kind.HOST, PEER4), (Kind.RELAY, PEER4_RELAY)):
        client.add_local_candidate(kind, address, address, now=0)
    return world, gateway, client


def agree(gateway, client):
    return (gateway.path.source, gateway.path.destination) == (client.path.destination, client.path.source)


def test_the_message_order_of_a_connection_start_is_that_of_the_specification():
    world, gateway, client = pair_of_agents()
    for agent in (gateway, client):
        agent.invalidate_local_candidate(RELAY4, 0)
        agent.invalidate_local_candidate(PEER4_RELAY, 0)
    world.signal(gateway.local_candidates(), client)  # the client's own candidates arrive later than its check

    world.run(0.1)
    world.signal(client.local_candidates(), gateway)
    world.run(0.2)

    def name(agent, check):
        message = stun.parse(check.payload)
        who = "gateway" if agent is gateway else "client"
        return who, message.message_class.name, message.use_candidate

    assert [(round(at, 3), *name(agent, check)) for at, agent, check in world.sent] == [
        (0, "client", "REQUEST", False),
        (RTT / 2, "gateway", "SUCCESS", False),
        (RTT / 2, "gateway", "REQUEST", False),
        (RTT, "client", "SUCCESS", False),
        (RTT, "client", "REQUEST", True),
        (RTT * 1.5, "gateway", "SUCCESS", False),
        (RTT * 1.5, "gateway", "REQUEST", False),
        (RTT * 2, "client", "SUCCESS", False),
    ]
    assert agree(gateway, client)


def test_two_agents_agree_and_follow_each_other_when_the_direct_path_dies_and_returns():
    world, gateway, client = pair_of_agents()
    world.signal(gateway.local_candidates(), client)
    world.signal(client.local_candidates(), gateway)
    world.run(60)
    assert gateway.path == Nominated(HOST4, PEER4, Kind.HOST, Kind.HOST)
    assert agree(gateway, client)

    direct = {HOST4, PEER4}
    world.delay = lambda source, destination, now: None if {source, destination} == direct else RTT / 2
    world.run(95)

    assert agree(gateway, client)
    assert client.path.source == PEER4_RELAY or client.path.destination == RELAY4
    assert gateway.state is AgentState.CONNECTED


def test_two_agents_with_a_nat_between_them_agree():
    world = World()
    private, public = endpoint("10.0.0.5:52000"), endpoint("203.0.113.200:33333")
    gateway = world.add(gateway_agent(timing=SERVER_DEFAULT), HOST4, RELAY4)
    client = world.add(client_agent(timing=CLIENT_DEFAULT), private, PEER4_RELAY)
    world.nat(private, public)
    gateway.add_local_candidate(Kind.HOST, HOST4, HOST4, now=0)
    gateway.add_local_candidate(Kind.RELAY, RELAY4, RELAY4, now=0)
    client.add_local_candidate(Kind.HOST, private, private, now=0)
    client.add_local_candidate(Kind.SRFLX, public, private, now=0)
    client.add_local_candidate(Kind.RELAY, PEER4_RELAY, PEER4_RELAY, now=0)
    world.signal(gateway.local_candidates(), client)
    world.run(0.015)  # the client's first check is there already
    world.signal(client.local_candidates(), gateway)

    world.run(30)

    assert gateway.path == Nominated(HOST4, public, Kind.SRFLX, Kind.HOST)
    assert (client.path.source, client.path.destination) == (private, HOST4)


@pytest.mark.spec("CONN-57")
@pytest.mark.parametrize("seed", [2, 5, 7, 11])
def test_two_controlled_agents_settle_their_roles_and_connect(seed):
    world = World()
    gateway = world.add(gateway_agent(), HOST4)
    other = client_agent(timing=CLIENT_DEFAULT, seed=seed)
    other.role = gateway.role
    world.add(other, PEER4)
    gateway.add_local_candidate(Kind.HOST, HOST4, HOST4, now=0)
    other.add_local_candidate(Kind.HOST, PEER4, PEER4, now=0)
    world.signal(gateway.local_candidates(), other)
    world.signal(other.local_candidates(), gateway)

    world.run(5)

    keeps = gateway if gateway.tie_breaker > other.tie_breaker else other
    assert {agent.role.name for agent in (gateway, other)} == {"CONTROLLED", "CONTROLLING"}
    assert keeps.role.name == "CONTROLLED"
    assert gateway.path is not None
    assert agree(gateway, other)


def test_of_two_pairs_that_the_sides_rank_differently_the_one_that_the_client_prefers_is_used():
    """Behind its NAT the client checks our relay from a host address; we see a server-reflexive one."""
    world = Scripted()
    world.host()
    world.relay()
    world.learn("srflx", PEER4, 1686109951)
    world.learn("relay", PEER4_RELAY, 37748479)
    world.receive(request(nominate=True), PEER4_RELAY, HOST4)
    world.receive(request(nominate=True), PEER4, RELAY4)
    assert [(path.source, path.destination) for path in world.paths(world.agent)] == [
        (HOST4, PEER4_RELAY),
        (RELAY4, PEER4),
    ]
    world.receive(request(nominate=True), PEER4_RELAY, HOST4)
    assert world.agent.path.source == RELAY4


def test_a_relayed_check_that_comes_before_its_candidate_does_not_pass_for_a_direct_path():
    """PRIORITY of a check from a relay address: type preference 110, the local preference a relay's (3.8)."""
    world = Scripted()
    world.host()
    world.learn("srflx", PEER4, 1686109951)
    world.receive(request(nominate=True), PEER4, HOST4)
    world.receive(request(nominate=True, priority=1849687807), PEER4_RELAY, HOST4)
    assert world.agent.path.destination == PEER4
