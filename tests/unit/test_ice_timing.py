"""Check schedules and the life of pairs (spec connectivity 3.2), on a virtual clock."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fzg.ice.agent import CLIENT_DEFAULT, CLIENT_IDLE, SERVER_DEFAULT, SERVER_IDLE, Role, Timing
from fzg.ice.timing import Attempt, CheckHistory
from tests.unit.ice_world import HOST4, PEER4, Scripted, answer, endpoint, request


def connected(**arguments) -> Scripted:
    world = Scripted(**arguments)
    world.host()
    world.learn("host", PEER4)
    return world


def gaps(times: list[float]) -> list[float]:
    return [round(later - earlier, 3) for earlier, later in pairwise(times)]


@pytest.mark.parametrize(
    ("timing", "established", "unanswered"),
    [
        (SERVER_DEFAULT, 615.5, 600.75),
        (SERVER_IDLE, 1000.0, 1000.0),
        (CLIENT_DEFAULT, 16.5, 15.25),
        (CLIENT_IDLE, 100.0, 100.0),
        (Timing(9, 3.0, 0.25), 21.5, 18.75),
    ],
)
def test_the_profiles_add_up_to_the_timeouts_of_the_table(timing, established, unanswered):
    n = timing.max_retransmits

    assert timing.delay(n) + sum(timing.delay(i) for i in range(2, n + 1)) == established
    assert timing.delay(n) + sum(timing.delay(i) for i in range(1, n)) == unanswered
    assert timing.delay(0) == 0


@pytest.mark.spec("CONN-49")
@pytest.mark.parametrize("answered", [True, False])
def test_a_new_pair_is_checked_on_the_ladder_of_the_server_profile(answered):
    world = connected()
    world.answers = lambda check: answered

    world.run(50)

    assert world.checks(world.agent) == [0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75, 30.75, 45.75]


def test_a_new_pair_is_checked_on_the_ladder_of_the_client_profile():
    world = connected(timing=CLIENT_DEFAULT)

    world.run(7)

    assert world.checks(world.agent) == [0, 0.25, 0.75, 1.75, 3.25, 4.75, 6.25]


def test_an_idle_profile_checks_every_25_seconds():
    world = connected(timing=SERVER_IDLE)

    world.run(80)

    assert world.checks(world.agent) == [0, 25, 50, 75]


@pytest.mark.spec("CONN-52")
def test_every_check_has_its_own_transaction_id():
    world = connected()
    world.answers = lambda check: False
    world.run(600)

    ids = [check.transaction_id for _, _, check in world.sent]

    assert len(set(ids)) == len(ids) == 45


@pytest.mark.spec("CONN-50")
def test_a_dead_pair_is_checked_on_the_ladder_from_its_start_and_removed_615_5_s_after_the_first_failure():
    world = connected()
    world.run(75.7)
    world.answers = lambda check: False

    world.run(900)

    after = [at for at in world.checks(world.agent) if at > 75.7]
    assert after[0] == 75.75
    assert gaps(after)[:10] == [15, 0.5, 1, 2, 4, 8, 15, 15, 15, 15]
    assert len(after) == 45
    removed = [at for at, event in world.events[id(world.agent)] if event.state.name == "DISCONNECTED"]
    assert removed == [75.75 + 615.5]
    assert world.agent.pair_count == 0


def test_a_pair_that_never_answers_is_removed_after_600_75_s():
    world = connected()
    world.answers = lambda check: False

    world.run(600.7)
    assert world.agent.pair_count == 1
    world.run(600.75)

    assert world.agent.pair_count == 0
    assert world.states(world.agent) == ["CHECKING", "DISCONNECTED"]


@pytest.mark.spec("CONN-51")
def test_requests_keep_a_pair_whose_checks_all_fail():
    world = connected(timing=CLIENT_DEFAULT)
    world.answers = lambda check: False
    for second in range(0, 60, 5):
        world.run(second)
        world.receive(request())
    assert world.agent.pair_count == 1

    world.run(55 + 14.9)
    assert world.agent.pair_count == 1
    world.run(55 + 15 + 1.5)

    assert world.agent.pair_count == 0


@pytest.mark.spec("CONN-51")
def test_a_nominated_pair_is_removed_too_when_nothing_is_heard():
    world = connected(timing=CLIENT_DEFAULT)
    world.answers = lambda check: False
    world.receive(request(nominate=True))

    world.run(40)

    assert world.agent.pair_count == 0
    assert world.states(world.agent) == ["CHECKING", "COMPLETED", "DISCONNECTED"]


@pytest.mark.spec("CONN-25")
def test_leaving_idle_checks_overdue_pairs_at_once_and_the_others_15_s_after_their_last_check():
    world = connected()
    world.run(46)  # checked at 45.75
    second = endpoint("203.0.113.8:40000")
    world.learn("host", second)
    world.run(75)  # first at 60.75; second in its ladder up to 46 + 15.75 = 61.75
    world.agent.set_timing(SERVER_IDLE, world.now)
    world.run(101)
    assert world.checks(world.agent, PEER4)[-2:] == [60.75, 85.75]
    assert world.checks(world.agent, second)[-2:] == [61.75, 86.75]

    world.agent.set_timing(SERVER_DEFAULT, world.now)
    world.run(120)

    assert world.checks(world.agent, PEER4)[-2:] == [101, 116]
    assert world.checks(world.agent, second)[-2:] == [101.75, 116.75]


def test_what_is_overdue_after_a_change_of_timing_is_due_now_and_nothing_spins():
    world = connected(timing=SERVER_IDLE)
    world.run(20)
    world.agent.set_timing(SERVER_DEFAULT, 20)

    world.run(20)

    # one attempt so far: the ladder's first step is long over
    assert world.checks(world.agent) == [0, 20]
    deadline = world.agent.poll_timeout()
    assert deadline is not None
    assert deadline.at > 20


def test_setting_the_same_timing_changes_nothing():
    world = connected()
    world.run(10)
    before = world.agent.poll_timeout()

    world.agent.set_timing(SERVER_DEFAULT, 10)

    assert world.agent.poll_timeout() == before


def test_an_early_timeout_does_nothing():
    world = connected()
    world.run(1)
    count = len(world.sent)

    world.agent.handle_timeout(1.5)
    world.drain()

    assert len(world.sent) == count


def test_a_late_answer_to_an_older_attempt_counts():
    world = Scripted(timing=CLIENT_DEFAULT)
    world.host()
    world.learn("host", PEER4)
    held = []
    world.on_check = lambda agent, check: held.append(check)
    world.run(10)
    world.receive(answer(held[-3]))
    for check in held[:-12]:  # forgotten by then
        world.receive(answer(check))

    assert world.agent.dropped["unknown transaction"] == len(held[:-12])
    world.run(10 + 14)
    assert world.agent.pair_count == 1


def test_only_attempts_after_the_last_answered_one_are_unanswered():
    history = CheckHistory(SERVER_DEFAULT)
    attempts = [
        Attempt(bytes([n]) * 12, float(n), priority=0, role=Role.CONTROLLED, nominating=False) for n in range(5)
    ]
    for attempt in attempts:
        history.record(attempt)

    history.answer(attempts[1], 5)
    assert history.unanswered == 3
    history.answer(attempts[3], 5)
    assert history.unanswered == 1
    history.answer(attempts[0], 6)
    assert history.unanswered == 1


def test_the_deadline_names_its_reason():
    world = Scripted()
    assert world.agent.poll_timeout().reason == "ice input"
    world.run(0)
    assert world.agent.poll_timeout() is None

    world.host(HOST4)
    world.learn("host", PEER4)
    world.run(0)

    assert world.agent.poll_timeout() == (0.25, "ice check")
