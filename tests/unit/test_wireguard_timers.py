"""WireGuard's timers on a virtual clock. Times are seconds after the connection was made."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fzg.wireguard.peer import Expired, HandshakeCompleted
from fzg.wireguard.timers import ICELESS
from tests.unit.wireguard_world import DATA, INITIATION, RESPONSE, START, World


def in_window(value: float, earliest: float, latest: float) -> bool:
    return earliest - 1e-6 <= value <= latest + 1e-6


def keepalives(world: World, host: object) -> list[float]:
    return [
        each.at - START
        for each in world.log
        if each.kind == DATA and len(each.datagram) == 32 and each.sender == host.name  # type: ignore[attr-defined]
    ]


@pytest.mark.spec("CONN-77")
@pytest.mark.parametrize(("timing", "timeout"), [(None, 10.0), (ICELESS, 5.0)])
def test_exactly_one_keepalive_is_sent_after_received_data_stays_unanswered(timing: object, timeout: float) -> None:
    world = World(timing=timing) if timing else World()  # type: ignore[arg-type]
    world.connect()
    world.run_until(3.0)
    world.send(world.client)
    world.run_until(3.0 + timeout - 0.01)
    assert keepalives(world, world.gateway) == []
    world.run_until(60.0)
    assert keepalives(world, world.gateway) == [pytest.approx(3.0 + timeout, abs=0.01)]


def test_a_stream_in_one_direction_gets_a_keepalive_per_10_seconds_and_no_handshake() -> None:
    world = World()
    world.connect()
    for second in range(1, 60):
        world.run_until(second)
        world.send(world.client)
    assert keepalives(world, world.gateway) == pytest.approx([11, 21, 31, 41, 51], abs=0.01)
    assert len(world.sent(world.client, INITIATION)) == 1


def test_an_answer_cancels_the_keepalive() -> None:
    world = World()
    world.connect()
    world.run_until(1.0)
    world.send(world.client)
    world.run_until(10.9)
    world.send(world.gateway)
    world.run_until(20.0)
    assert keepalives(world, world.gateway) == []
    world.run_until(20.95)
    assert keepalives(world, world.client) == [0.0, pytest.approx(20.9, abs=0.01)]


def test_a_handshake_message_cancels_the_keepalive() -> None:
    world = World()
    world.connect()
    world.run_until(1.0)
    world.send(world.client)
    world.run_until(5.0)
    world.connect()
    world.run_until(60.0)
    assert keepalives(world, world.gateway) == []


def test_a_keepalive_that_cannot_be_sealed_is_not_tried_again() -> None:
    world = World()
    world.connect()
    world.send(world.client)
    world.gateway.engine.seal = lambda peer, packet, now: None  # type: ignore[method-assign]
    world.run_until(60.0)
    assert len(world.gateway.wakes) <= 8


def test_a_keepalive_is_not_answered() -> None:
    world = World()
    world.connect()
    world.run_until(100.0)
    assert world.sent(world.gateway, DATA) == []
    assert world.sent(world.client, DATA) == [0.0]


@pytest.mark.spec("CONN-78")
@pytest.mark.parametrize("sender", ["client", "gateway"])
@pytest.mark.parametrize(("timing", "wait", "retry", "give_up"), [(None, 15.0, 5.0, 20.0), (ICELESS, 7.0, 2.0, 90.0)])
def test_unanswered_data_leads_to_an_initiation_retries_and_the_end(
    sender: str, timing: object, wait: float, retry: float, give_up: float
) -> None:
    world = World(timing=timing) if timing else World()  # type: ignore[arg-type]
    host = world.client if sender == "client" else world.gateway
    world.connect()
    world.log.clear()
    world.cut()
    world.run_until(2.0)
    world.send(host)
    world.run_until(6.0)
    world.send(host)  # a later one does not extend the wait
    world.run_until(2.0 + wait - 0.001)
    assert world.sent(host, INITIATION) == []
    world.run_until(2.0 + wait + 0.4)
    (first,) = world.sent(host, INITIATION)
    assert in_window(first, 2.0 + wait, 2.0 + wait + 0.4)
    world.run_until(first + give_up - 0.001)
    assert not host.expired
    world.run_until(first + give_up)
    assert host.events[-1] == Expired()
    sent = world.sent(host, INITIATION)
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert len(gaps) >= (3 if give_up == 20.0 else 35)
    assert all(in_window(gap, retry, retry + 0.4) for gap in gaps)
    assert len({round(gap, 6) for gap in gaps}) > 1, "no jitter"
    messages = world.datagrams(host, INITIATION)
    assert len({message[4:8] for message in messages}) == len(messages), "an index was reused"
    assert len({message[8:40] for message in messages}) == len(messages), "an ephemeral key was reused"
    assert host.engine.sessions == {}
    world.run_until(1000.0)
    assert world.sent(host, INITIATION) == sent


def test_an_answer_within_the_wait_prevents_the_initiation() -> None:
    world = World()
    world.connect()
    world.run_until(1.0)
    world.send(world.gateway)
    world.run_until(60.0)  # the client's keepalive answers at 11 s
    assert world.sent(world.gateway, INITIATION) == []


def test_an_authentic_initiation_within_the_wait_prevents_the_initiation() -> None:
    world = World()
    world.connect()
    world.run_until(1.0)
    world.cut()
    world.send(world.gateway)
    world.run_until(10.0)
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    world.run_until(60.0)
    assert world.sent(world.gateway, INITIATION) == []


def test_the_first_initiation_has_jitter_too() -> None:
    times = set()
    for seed in range(5):
        world = World(seed=seed)
        world.connect()
        world.cut()
        world.run_until(1.0)
        world.send(world.gateway)
        world.run_until(16.4)
        times.update(world.sent(world.gateway, INITIATION))
    assert len(times) == 5


def test_a_retry_that_is_answered_ends_the_attempt() -> None:
    world = World()
    world.connect()
    world.cut()
    world.run_until(1.0)
    world.send(world.gateway)
    world.run_until(18.0)
    world.heal()
    world.run_until(30.0)
    assert len(world.sent(world.gateway, INITIATION)) == 2
    world.run_until(100.0)
    assert len(world.sent(world.gateway, INITIATION)) == 2
    assert not world.gateway.expired
    world.send(world.client)
    world.send(world.gateway)
    assert (world.client.received, world.gateway.received) == ([b"data"], [b"data"])


def test_an_attempt_ends_when_the_peer_completes_a_handshake_of_its_own() -> None:
    world = World()
    world.connect()
    world.cut()
    world.run_until(1.0)
    world.send(world.gateway)
    world.run_until(17.0)
    world.passes = lambda logged: not (logged.sender == "gateway" and logged.kind == INITIATION)
    world.connect()
    world.run_until(60.0)
    assert not world.gateway.expired
    assert len(world.sent(world.gateway, INITIATION)) == 1


def test_no_keepalive_is_sent_while_an_initiation_is_outstanding() -> None:
    world = World()
    world.connect()
    world.run_until(1.0)
    world.passes = lambda logged: logged.sender == "client" and logged.kind == DATA
    world.gateway.peer.initiate(world.now)
    world.settle()
    world.send(world.client)
    world.run_until(20.5)
    assert keepalives(world, world.gateway) == []


@pytest.mark.spec("CONN-79")
def test_a_responder_never_initiates_because_of_age() -> None:
    world = World()
    world.connect()
    gateway = world.gateway
    for half_second in range(1, 361):  # data both ways until the session ends, and a client that never rekeys
        now = START + half_second / 2
        up = world.client.send(b"up", now)
        assert up is not None
        gateway.handle(up, world.client.source, now)
        down = gateway.send(b"down", now)
        assert down is not None
        assert world.client.engine.open(down, now) is not None
        gateway.peer.handle_timeout(now)
        assert gateway.drain() == []
    gateway.peer.handle_timeout(START + 180.5)
    assert gateway.drain() == []
    assert gateway.engine.sessions == {}


@pytest.mark.spec("CONN-79")
def test_a_responders_session_ends_after_180_seconds_in_both_directions() -> None:
    world = World()
    world.connect()
    late = world.client.send(b"late", world.now)
    assert late is not None
    world.cut()
    world.run_until(180.0)
    assert world.gateway.send(b"x", world.now) is not None
    assert world.gateway.engine.sessions
    world.run_until(180.01)
    assert world.gateway.send(b"x", world.now) is None
    world.gateway.handle(late, world.client.source, world.now)
    assert world.gateway.received == []
    assert world.gateway.engine.sessions == {}
    assert world.sent(world.gateway, INITIATION) == []


def test_an_initiator_stops_sending_after_170_seconds_but_still_receives() -> None:
    world = World()
    world.connect()
    world.passes = lambda logged: logged.kind not in {INITIATION, RESPONSE}
    world.run_until(170.0)
    assert world.client.send(b"x", world.now) is not None
    world.run_until(170.01)
    assert world.client.send(b"x", world.now) is None
    world.send(world.gateway)
    assert world.client.received == [b"data"]


def test_an_initiator_that_sent_data_rekeys_at_120_seconds() -> None:
    world = World()
    world.connect()
    world.run_until(50.0)
    world.send(world.client)
    world.run_until(119.999)
    assert len(world.sent(world.client, INITIATION)) == 1
    world.run_until(120.34)
    assert len(world.sent(world.client, INITIATION)) == 2
    assert world.sent(world.gateway, INITIATION) == []


def test_an_initiator_that_sends_its_first_data_late_rekeys_soon() -> None:
    world = World()
    world.connect()
    world.run_until(131.0)
    world.send(world.client)
    world.run_until(136.4)
    assert len(world.sent(world.client, INITIATION)) == 2


@pytest.mark.parametrize(("timing", "age"), [(None, 165.0), (ICELESS, 173.0)])
def test_an_initiator_that_received_data_rekeys_shortly_before_the_end(timing: object, age: float) -> None:
    world = World(timing=timing) if timing else World()  # type: ignore[arg-type]
    world.connect()
    world.run_until(30.0)
    world.send(world.gateway)
    world.run_until(age - 0.001)
    assert len(world.sent(world.client, INITIATION)) == 1
    world.run_until(age + 0.34)
    assert len(world.sent(world.client, INITIATION)) == 2


def test_data_sent_just_before_an_initiator_must_stop_still_leads_to_a_rekey() -> None:
    world = World()
    world.connect()
    world.run_until(169.9)
    world.passes = lambda logged: logged.kind != DATA
    world.send(world.client)
    world.run_until(170.4)
    assert len(world.sent(world.client, INITIATION)) == 2


def test_an_idle_initiator_renews_the_session_when_it_is_discarded() -> None:
    world = World()
    world.connect()
    world.run_until(180.0)
    assert len(world.sent(world.client, INITIATION)) == 1
    world.run_until(1000.0)
    sent = world.sent(world.client, INITIATION)
    assert len(sent) == 6
    assert all(in_window(b - a, 180.0, 180.4) for a, b in pairwise(sent))
    assert world.sent(world.gateway, INITIATION) == []
    assert not world.gateway.expired


@pytest.mark.spec("CONN-80")
def test_a_peer_that_never_handshakes_expires_after_540_seconds() -> None:
    world = World()
    world.run_until(539.999)
    assert not world.gateway.expired
    world.run_until(540.0)
    assert world.gateway.events == [Expired()]
    assert world.log == []
    assert world.gateway.wakes == [START + 540.0]


def test_a_client_that_vanishes_silently_expires_540_seconds_after_its_last_handshake() -> None:
    world = World()
    world.run_until(100.0)
    world.connect()
    world.cut()
    world.client.peer.close()
    world.run_until(639.999)
    assert not world.gateway.expired
    world.run_until(640.0)
    assert world.gateway.events == [HandshakeCompleted(START + 100.0), Expired()]


def test_an_explicit_initiation_has_no_jitter_and_is_not_repeated_while_one_is_in_progress() -> None:
    world = World()
    world.cut()
    world.client.peer.initiate(START)
    world.client.peer.initiate(START)
    world.settle()
    world.run_until(3.0)
    world.client.peer.initiate(world.now)
    world.settle()
    assert world.sent(world.client, INITIATION) == [0.0]
    world.run_until(20.0)
    assert world.client.events == [Expired()]


def test_an_idle_connection_wakes_about_once_per_10_seconds() -> None:
    world = World()
    world.connect()
    world.run_until(900.0)
    assert len(world.gateway.wakes) <= 96
    assert len(world.client.wakes) <= 130  # looks more often in the last third of a session
    assert all(
        later - earlier > 0 for earlier, later in zip(world.gateway.wakes, world.gateway.wakes[1:], strict=False)
    )


def test_nothing_happens_before_the_deadline() -> None:
    world = World()
    world.connect()
    world.send(world.client)
    deadline = world.gateway.peer.poll_timeout()
    assert deadline is not None
    looks = world.gateway.engine.looks
    world.gateway.peer.handle_timeout(deadline.at - 0.001)
    assert world.gateway.drain() == []
    assert world.gateway.engine.looks == looks
    assert world.gateway.peer.poll_timeout() == deadline
