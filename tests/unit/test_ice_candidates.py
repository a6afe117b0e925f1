"""Which candidates and pairs an agent has, and what it signals (spec connectivity 3.8 to 3.11, 3.15, 3.17, 3.19)."""

from __future__ import annotations

import random
import re

import pytest

from fzg.ice.priority import check_priority, local_priority, pair_priority
from fzg.wire import candidate as candidate_format
from fzg.wire.candidate import Kind
from tests.unit.ice_world import (
    HOST4,
    HOST6,
    PEER4,
    PEER4_RELAY,
    RELAY4,
    RELAY6,
    Scripted,
    answer,
    endpoint,
    gateway_agent,
    remote,
    request,
)

GRAMMAR = re.compile(
    r"candidate:[A-Za-z0-9+/]{1,32} 1 udp \d{1,10} [0-9a-f.:]+ \d{1,5} typ (host|srflx|prflx|relay)"
    r"( raddr [0-9.:]+ rport \d+)?( ufrag \S+)?"
)


@pytest.fixture
def world():
    return Scripted()


@pytest.fixture
def agent(world):
    return world.agent


@pytest.mark.spec("CONN-47")
@pytest.mark.parametrize(
    ("kind", "first4", "second4", "first6", "second6"),
    [
        (Kind.HOST, 2130706175, 2130705663, 2130706431, 2130705919),
        (Kind.SRFLX, 1686109951, 1686109439, 1686110207, 1686109695),
        (Kind.RELAY, 37748479, 37747967, 37748735, 37748223),
    ],
)
def test_priorities_fall_with_each_candidate_of_a_kind_and_family(agent, kind, first4, second4, first6, second6):
    def add(address, base):
        return agent.add_local_candidate(kind, endpoint(address), endpoint(base), now=0).priority

    assert add("192.0.2.1:1", "10.0.0.1:1") == first4
    assert add("192.0.2.2:1", "10.0.0.2:1") == second4
    assert add("[2001:db8::1]:1", "[fd00::1]:1") == first6
    assert add("[2001:db8::2]:1", "[fd00::2]:1") == second6


@pytest.mark.spec("CONN-47")
def test_a_relay_of_another_family_than_its_socket_ranks_1000_lower(agent):
    assert agent.add_local_candidate(Kind.RELAY, RELAY6, RELAY6, family_mismatch=True, now=0).priority == 37492735
    assert agent.add_local_candidate(Kind.RELAY, RELAY4, RELAY4, family_mismatch=True, now=0).priority == 37492479


def test_a_check_has_the_type_preference_of_a_peer_reflexive_candidate():
    assert [check_priority(p) for p in (2130706175, 2130706431, 37748479, 37748735)] == [
        1862270719,
        1862270975,
        1849687807,
        1849688063,
    ]


def test_the_local_preference_never_wraps():
    assert local_priority(Kind.RELAY, ipv4=True, index=8191, family_mismatch=True) == (2 << 24) + 255


@pytest.mark.spec("CONN-48")
def test_pair_priorities_follow_the_formula():
    assert pair_priority(2130706175, 2130706175) == 9151313343271665150
    assert pair_priority(5, 3) == (3 << 32) + 10 + 1
    assert pair_priority(3, 5) == (3 << 32) + 10


# Local candidates


@pytest.mark.spec("CONN-59")
def test_what_is_signalled_follows_the_grammar_with_ufrag_and_a_hidden_base(agent):
    base = endpoint("10.0.0.7:52625")
    base6 = endpoint("[fd00::7]:52625")
    added = [
        agent.add_local_candidate(Kind.HOST, base, base, now=0),
        agent.add_local_candidate(Kind.SRFLX, endpoint("192.0.2.80:52625"), base, now=0),
        agent.add_local_candidate(Kind.SRFLX, endpoint("[2001:db8::80]:52625"), base6, now=0),
        agent.add_local_candidate(Kind.RELAY, RELAY4, RELAY4, now=0),
        agent.add_local_candidate(Kind.RELAY, RELAY6, RELAY6, now=0),
    ]

    lines = [candidate_format.encode(one) for one in added]

    assert all(GRAMMAR.fullmatch(line) for line in lines)
    assert [line.partition(" ")[2] for line in lines] == [
        "1 udp 2130706175 10.0.0.7 52625 typ host ufrag wxyz",
        "1 udp 1686109951 192.0.2.80 52625 typ srflx raddr 0.0.0.0 rport 0 ufrag wxyz",
        "1 udp 1686110207 2001:db8::80 52625 typ srflx raddr :: rport 0 ufrag wxyz",
        "1 udp 37748479 198.51.100.3 61234 typ relay raddr 0.0.0.0 rport 0 ufrag wxyz",
        "1 udp 37748735 2001:db8::3 61234 typ relay raddr :: rport 0 ufrag wxyz",
    ]
    assert agent.local_candidates() == added


@pytest.mark.parametrize(
    "address",
    ["169.254.1.1:1", "255.255.255.255:1", "224.0.0.1:1", "239.255.0.1:1", "0.0.0.0:1", "[ff02::1]:1", "[::]:1"],
)
def test_addresses_that_cannot_be_ours_are_refused(agent, address):
    assert agent.add_local_candidate(Kind.HOST, endpoint(address), endpoint(address), now=0) is None
    assert agent.local_candidates() == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "10.0.0.1:1", "[::1]:1", "[fe80::1]:1", "[fd00::1]:1"])
def test_loopback_private_and_ipv6_link_local_addresses_pass(agent, address):
    assert agent.add_local_candidate(Kind.HOST, endpoint(address), endpoint(address), now=0) is not None


def test_a_reflexive_address_of_another_family_than_its_base_is_refused(agent):
    assert agent.add_local_candidate(Kind.SRFLX, HOST6, HOST4, now=0) is None


def test_peer_reflexive_candidates_cannot_be_offered(agent):
    with pytest.raises(ValueError, match="discovered"):
        agent.add_local_candidate(Kind.PRFLX, HOST4, HOST4, now=0)


def test_a_candidate_offered_again_is_not_signalled_again(world, agent):
    assert world.host() is not None

    assert world.host() is None
    assert agent.add_local_candidate(Kind.SRFLX, HOST4, HOST4, now=0) is None
    assert len(agent.local_candidates()) == 1


def test_a_better_kind_at_the_same_address_takes_over_and_keeps_the_path(world, agent):
    agent.add_local_candidate(Kind.SRFLX, HOST4, HOST4, now=0)
    world.learn("host", PEER4)
    world.run(1)

    assert world.host().kind is Kind.HOST
    world.run(1)

    assert [one.kind for one in agent.local_candidates()] == [Kind.HOST]
    assert agent.pair_count == 1
    assert world.checks(agent) == [0, 0.25, 0.75]


def test_a_withdrawn_relay_address_is_signalled_unranked_and_without_ufrag(world, agent):
    world.host()
    added = world.relay()
    world.learn("host", PEER4)
    assert agent.pair_count == 2

    line = candidate_format.encode(agent.invalidate_local_candidate(RELAY4, 0))

    assert line.partition(" ")[2] == "1 udp 50331391 198.51.100.3 61234 typ relay raddr 0.0.0.0 rport 0"
    assert agent.pair_count == 1
    assert added not in agent.local_candidates()
    assert agent.invalidate_local_candidate(RELAY4, 0) is None


@pytest.mark.spec("CONN-38")
def test_only_relay_addresses_can_be_withdrawn(world, agent):
    world.host()
    agent.add_local_candidate(Kind.SRFLX, endpoint("203.0.113.99:1"), HOST4, now=0)

    assert agent.invalidate_local_candidate(HOST4, 0) is None
    assert agent.invalidate_local_candidate(endpoint("203.0.113.99:1"), 0) is None
    assert len(agent.local_candidates()) == 2


def test_a_withdrawn_relay_address_that_comes_back_is_signalled_as_before(world, agent):
    added = world.relay()
    world.learn("host", PEER4)
    agent.invalidate_local_candidate(RELAY4, 0)

    assert world.relay() == added
    assert agent.pair_count == 1


def test_a_request_at_a_withdrawn_relay_address_creates_nothing(world, agent):
    world.relay()
    agent.invalidate_local_candidate(RELAY4, 0)
    world.run(0)

    assert world.receive(request(), destination=RELAY4) == []
    assert agent.dropped["local candidate is withdrawn"] == 1


def test_a_mapped_address_becomes_a_peer_reflexive_candidate_that_is_not_paired(world, agent):
    world.host()
    world.learn("host", PEER4)
    world.answers = lambda check: False
    world.run(0)
    mapped = endpoint("203.0.113.99:1234")

    world.receive(answer(world.sent[-1][2], mapped=mapped))

    found = agent.local_candidates()[-1]
    assert candidate_format.encode(found).partition(" ")[2] == "1 udp 1862270719 203.0.113.99 1234 typ prflx ufrag wxyz"
    assert agent.pair_count == 1


def test_a_peer_reflexive_candidate_does_not_take_over_from_the_relay_that_is_its_base(world, agent):
    world.relay()
    world.learn("host", PEER4)
    world.answers = lambda check: False
    world.run(0)
    world.receive(answer(world.sent[-1][2], mapped=endpoint("203.0.113.99:1234")))

    world.learn("host", "203.0.113.50:7")

    assert {pair.local.kind for pair in agent._pairs.values()} == {Kind.RELAY}
    assert agent.pair_count == 2


def test_mapped_addresses_cannot_fill_the_memory(world, agent):
    world.host()
    world.relay()
    world.learn("host", PEER4)
    world.answers = lambda check: False
    for index in range(200):
        world.run(index * 15.0)
        world.receive(request())
        check = [check for _, _, check in world.sent if check.transaction_id and check.source == HOST4][-1]
        world.receive(answer(check, mapped=endpoint(f"203.0.113.99:{1000 + index}")))

    kept = agent.local_candidates()
    assert len(kept) == 64
    assert {HOST4, RELAY4} <= {one.address for one in kept}
    assert kept[-1].address.port == 1199


def test_a_connection_of_many_relays_forgets_the_oldest(world, agent):
    for index in range(300):
        address = endpoint(f"198.51.100.3:{1024 + index}")
        assert world.relay(address) is not None
        assert agent.invalidate_local_candidate(address, 0) is not None

    assert len(agent._locals._all) <= 65


# Remote candidates


@pytest.mark.spec("CONN-60")
@pytest.mark.parametrize("change", [{"component": 2}, {"ufrag": "abce"}, {"transport": "tcp"}])
def test_candidates_of_others_are_ignored(world, agent, change):
    world.host()

    assert not world.learn("host", PEER4, **change)
    assert agent.remote_candidate_count == 0
    assert agent.pair_count == 0


def test_a_candidate_without_ufrag_is_used(world, agent):
    world.host()

    assert world.learn("host", PEER4, ufrag=None)
    assert agent.pair_count == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9", "169.254.3.3:9", "10.1.1.1:9", "255.255.255.255:9"])
def test_any_remote_address_is_tried(world, agent, address):
    world.host()

    assert world.learn("host", address)
    assert agent.pair_count == 1


def test_only_equal_families_pair(world, agent):
    world.host(HOST4)
    world.host(HOST6)
    world.relay(RELAY4)
    world.learn("host", PEER4)
    assert agent.pair_count == 2

    world.learn("host", "[2001:db8:9::9]:1")

    assert agent.pair_count == 3


def test_a_candidate_signalled_twice_is_nothing_new(world, agent):
    world.host()

    assert world.learn("srflx", PEER4)
    assert not world.learn("srflx", PEER4, 5, foundation="other")
    assert agent.remote_candidate_count == 1


def test_a_reflexive_local_candidate_adds_no_pair_to_that_of_its_base(world, agent):
    world.host()
    agent.add_local_candidate(Kind.SRFLX, endpoint("203.0.113.99:1"), HOST4, now=0)

    world.learn("host", PEER4)
    world.run(0)

    assert agent.pair_count == 1
    assert [check.source for _, _, check in world.sent] == [HOST4]


def test_a_candidate_whose_pairs_have_died_is_tried_again_when_it_is_signalled_again(world, agent):
    world.answers = lambda check: False
    world.host()
    world.learn("host", PEER4)
    world.run(700)
    assert agent.pair_count == 0

    assert world.learn("host", PEER4)

    world.run(700)
    assert world.checks(agent)[-1] == 700


@pytest.mark.spec("CONN-61")
def test_a_withdrawal_matches_by_address_and_kind_and_can_be_taken_back(world, agent):
    world.host()
    world.learn("relay", PEER4_RELAY, 37748479)
    withdrawal = remote("relay", PEER4_RELAY, 50331391, foundation="another", ufrag=None, related=None)

    assert not agent.invalidate_remote_candidate(remote("srflx", PEER4_RELAY), 0)
    assert agent.invalidate_remote_candidate(withdrawal, 0)
    assert (agent.pair_count, agent.remote_candidate_count) == (0, 0)
    assert not agent.invalidate_remote_candidate(withdrawal, 0)

    assert world.learn("relay", PEER4_RELAY, 37748479)
    assert (agent.pair_count, agent.remote_candidate_count) == (1, 1)


def test_a_withdrawal_that_names_our_own_address_does_not_touch_ours(world, agent):
    world.relay()

    assert not agent.invalidate_remote_candidate(remote("relay", RELAY4, 50331391, ufrag=None), 0)
    assert len(agent.local_candidates()) == 1


@pytest.mark.spec("CONN-54")
def test_a_withdrawn_address_is_not_answered_until_it_is_signalled_again(world, agent):
    world.host()
    world.learn("relay", PEER4_RELAY, 37748479)
    agent.invalidate_remote_candidate(remote("relay", PEER4_RELAY), 0)
    world.run(0)

    assert world.receive(request(), PEER4_RELAY) == []
    assert agent.dropped["remote candidate is withdrawn"] == 1
    world.learn("relay", PEER4_RELAY, 37748479)

    assert world.receive(request(), PEER4_RELAY) != []


def test_withdrawing_one_of_two_kinds_at_an_address_keeps_the_path_of_the_other(world, agent):
    world.host()
    world.learn("srflx", PEER4, 1686109951)
    world.learn("host", PEER4, 2130706175)
    assert agent.pair_count == 1

    agent.invalidate_remote_candidate(remote("host", PEER4), 0)

    assert agent.pair_count == 1
    assert world.receive(request()) != []


@pytest.mark.spec("CONN-53")
def test_a_request_from_an_unknown_address_is_answered_and_checked_at_once(world, agent):
    world.host()
    world.host(endpoint("192.0.2.11:52625"))
    world.run(1)

    reply, check = world.receive(request())

    assert (reply.destination, reply.transaction_id) == (PEER4, None)
    assert (check.source, check.destination) == (HOST4, PEER4)
    assert check.transaction_id is not None
    assert (agent.pair_count, agent.remote_candidate_count) == (1, 1)
    world.run(1)
    assert world.checks(agent) == [1]


def test_a_learned_address_is_merged_in_place_when_it_is_signalled(world, agent):
    world.host()
    world.relay()
    world.receive(request(priority=1862270719, nominate=True))
    (pair,) = agent._pairs.values()
    assert pair.priority == pair_priority(1862270719, 2130706175)

    assert world.learn("srflx", PEER4, 1686109951)

    assert agent.remote_candidate_count == 1
    assert agent._pairs[HOST4, PEER4] is pair
    assert pair.is_nominated
    assert pair.priority == pair_priority(1686109951, 2130706175)
    assert agent.pair_count == 2
    assert [one.kind for one in agent.remote_candidates()] == [Kind.SRFLX]
    assert world.paths(agent)[-1].remote_kind is Kind.PRFLX
    world.run(0)
    assert world.paths(agent)[-1].remote_kind is Kind.SRFLX


def test_the_real_priority_of_a_learned_candidate_can_move_the_path(world, agent):
    world.host()
    relayed, direct = PEER4_RELAY, PEER4
    world.receive(request(priority=1862270719, nominate=True), relayed)  # the relay's check came first
    world.learn("srflx", direct, 1686109951)
    world.receive(request(nominate=True), direct)
    assert agent.path.destination == relayed

    world.learn("relay", relayed, 37748479)

    assert agent.path.destination == direct


# Limits


@pytest.mark.spec("CONN-58")
def test_of_150_pairs_the_best_100_remain(world, agent, caplog):
    for index in range(3):
        world.relay(endpoint(f"198.51.100.3:{61000 + index}"))
    priorities = random.Random(5).sample(range(1_000_000, 2_000_000_000), 50)
    for index, priority in enumerate(priorities):
        assert world.learn("host", f"203.0.113.1:{1000 + index}", priority)

    locals_ = [candidate.priority for candidate in agent.local_candidates()]
    best = sorted((pair_priority(theirs, ours) for theirs in priorities for ours in locals_), reverse=True)[:100]
    assert sorted((pair.priority for pair in agent._pairs.values()), reverse=True) == best
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_nominated_pair_is_not_dropped_for_better_ones(world, agent):
    world.relay()
    world.receive(request(nominate=True, priority=1), PEER4, RELAY4)
    for index in range(3):
        world.host(endpoint(f"192.0.2.{index + 1}:1"))
    for index in range(60):
        world.learn("host", f"203.0.113.1:{1000 + index}")

    assert agent.pair_count == 100
    assert agent._pairs[RELAY4, PEER4].is_nominated


def test_remote_candidates_are_capped_and_learned_ones_make_room_for_signalled_ones(world, agent):
    world.host()
    for index in range(200):
        world.receive(request(), endpoint(f"203.0.113.1:{1000 + index}"))
    assert agent.remote_candidate_count == 64

    for index in range(100):
        assert world.learn("relay", f"198.51.100.9:{1000 + index}", 37748479) is (index < 64)

    assert agent.remote_candidate_count == 64
    assert world.receive(request()) == []
    assert agent.dropped["too many remote candidates"] > 0
    assert len(agent._attempts) == sum(len(pair.history) for pair in agent._pairs.values())


def test_signalled_candidates_whose_pairs_have_died_make_room_for_new_ones(world, agent):
    """A client behind a line that gets another address each day signals each, and withdraws none."""
    world.host()
    world.answers = lambda check: check.destination == PEER4
    assert world.learn("host", PEER4)
    for day in range(1, 100):
        assert world.learn("srflx", f"198.51.100.9:{1000 + day}", 1686109951), day
        world.run(world.now + 700.0)
    assert agent.remote_candidate_count <= 64
    assert agent.dropped["too many remote candidates"] == 0
    assert any(pair.remote.address == PEER4 for pair in agent._pairs.values()), "the one that answers stays"


def test_withdrawn_remote_candidates_are_forgotten_in_the_end(world, agent):
    world.host()
    for index in range(300):
        assert world.learn("relay", f"198.51.100.9:{1000 + index}", 37748479)
        assert agent.invalidate_remote_candidate(remote("relay", f"198.51.100.9:{1000 + index}"), 0)

    assert len(agent._remotes._all) <= 65


# Optimistic candidates


def optimistic(world):
    world.run(world.now)
    return [check.destination for _, _, check in world.sent if check.transaction_id]


@pytest.mark.spec("CONN-62")
def test_a_reflexive_address_is_also_tried_with_the_port_of_a_host_candidate(world, agent):
    world.host()
    world.learn("host", "10.9.9.9:52625")
    world.learn("srflx", "203.0.113.7:40000", 1686109951)

    assert set(optimistic(world)) == {
        endpoint("10.9.9.9:52625"),
        endpoint("203.0.113.7:40000"),
        endpoint("203.0.113.7:52625"),
    }
    assert endpoint("203.0.113.7:52625") not in [one.address for one in agent.remote_candidates()]
    assert [one.address for one in agent.local_candidates()] == [HOST4]
    assert agent._pairs[HOST4, endpoint("203.0.113.7:52625")].remote.priority == 1694498559


@pytest.mark.spec("CONN-62")
def test_at_most_two_guesses_are_made_per_candidate(world, agent):
    world.host()
    for port in range(1, 8):
        world.learn("host", f"10.9.9.9:{port}")
    before = agent.remote_candidate_count

    world.learn("srflx", "203.0.113.7:40000", 1686109951)
    assert agent.remote_candidate_count == before + 3
    world.learn("relay", PEER4_RELAY, 37748479)
    assert agent.remote_candidate_count == before + 6


@pytest.mark.spec("CONN-62")
def test_no_guesses_are_made_for_ipv6(world, agent):
    world.host(HOST6)
    world.learn("host", "[fd00::9]:52625")
    world.learn("srflx", "[2001:db8:9::9]:40000", 1686110207)

    assert agent.remote_candidate_count == 2


def test_a_guess_that_is_already_known_is_not_made(world, agent):
    world.host()
    world.learn("host", "10.9.9.9:52625")
    world.learn("srflx", "203.0.113.7:52625", 1686109951)

    assert agent.remote_candidate_count == 2


def test_a_guess_that_is_signalled_takes_the_signalled_priority(world, agent):
    world.host()
    world.learn("host", "10.9.9.9:52625")
    world.learn("srflx", "203.0.113.7:40000", 1686109951)

    assert world.learn("srflx", "203.0.113.7:52625", 1686109439)

    assert agent.remote_candidate_count == 3
    assert agent._pairs[HOST4, endpoint("203.0.113.7:52625")].remote.priority == 1686109439


def test_the_tie_breaker_is_drawn_once():
    assert gateway_agent(seed=1).tie_breaker != gateway_agent(seed=2).tie_breaker
