"""The wall clock is set while the gateway runs: access ends by the latest time that it ever showed (tunnel 5.7)."""

from __future__ import annotations

import logging

import pytest

from tests.unit import policy_world
from tests.unit.tunnel_world import udp

CLIENT = "11111111-2222-4333-8444-555555555555"
OWN = ("100.64.0.1", "fd00:2021:1111::1")
RESOURCE = {
    "type": "cidr",
    "id": "00000000-0000-4000-8000-000000000001",
    "address": "10.0.0.0/24",
    "name": "n",
    "filters": [],
}
HOUR = 3600.0


class World(policy_world.World):
    """One client; Unix times are those that the portal has: the ones before any step."""

    def __init__(self) -> None:
        super().__init__()
        self.portal("init", policy_world.init())

    def grant(self, seconds: float) -> None:
        expires_at = int(self.unix + seconds)
        self.portal("create_authorization", policy_world.authorization(CLIENT, *OWN, RESOURCE, expires_at))

    def list_again(self, seconds: float) -> None:
        pair = {"client_id": CLIENT, "resource_id": RESOURCE["id"], "expires_at": int(self.unix + seconds)}
        self.portal("init", policy_world.init(authorizations=[pair]))

    def move_expiry(self, seconds: float) -> None:
        pair = {"client_id": CLIENT, "resource_id": RESOURCE["id"], "expires_at": int(self.unix + seconds)}
        self.portal("access_authorization_expiry_updated", pair)

    def step(self, delta: float) -> None:
        self.core.handle_clock_step(delta, self.now)
        self.drain()

    def passes(self) -> bool:
        if CLIENT not in self.node.lines:
            return False
        self.from_client(CLIENT, udp(OWN[0], "10.0.0.5", 1, 80))
        return bool(self.written())

    def lasts(self, seconds: float) -> bool:
        """Passes until then, and from then on no more."""
        self.run(seconds - 0.5)
        before = self.passes()
        self.run(1.0)
        return before and not self.passes()


@pytest.mark.parametrize("tell", [World.list_again, World.move_expiry, World.grant])
def test_a_clock_that_was_set_back_lengthens_nothing_that_the_portal_says_later(tell):
    world = World()
    world.grant(100)
    world.step(-HOUR)
    tell(world, 50)
    assert world.lasts(50)


def test_a_clock_that_is_set_back_and_right_again_has_changed_nothing():
    world = World()
    world.grant(100)
    world.step(-HOUR)
    world.step(HOUR)
    assert world.passes()
    world.list_again(50)
    assert world.lasts(50)


def test_only_the_part_of_a_step_forward_counts_that_no_step_back_took_away():
    world = World()
    world.grant(100)
    world.step(-HOUR)
    world.step(HOUR + 60)
    assert world.lasts(40)


def test_after_a_step_forward_later_expiries_are_judged_by_the_new_time():
    world = World()
    world.grant(HOUR + 100)
    world.step(HOUR)
    world.list_again(HOUR + 50)
    assert world.lasts(50)


def test_small_steps_forward_count_once_they_are_a_second():
    world = World()
    world.grant(10)
    for _ in range(5):
        world.step(-2.0)
        world.step(2.5)
    assert world.lasts(8)


@pytest.mark.parametrize("expires_at", [1 << 41, 10**15])
def test_an_expiry_that_no_clock_can_hold_is_in_a_day(expires_at):
    world = World()
    world.portal("create_authorization", policy_world.authorization(CLIENT, *OWN, RESOURCE, expires_at))
    world.now += 86_399.0
    assert world.passes()
    world.now += 1.0
    world.handle_timeout()
    assert world.node.goodbyes == [CLIENT]


def test_a_clock_set_back_by_a_minute_or_more_is_one_warning_with_a_remedy(caplog):
    caplog.set_level(logging.WARNING)
    world = World()
    world.step(-59.0)
    assert caplog.messages == []
    world.step(-HOUR)
    (message,) = caplog.messages
    assert "set back by 3659 s" in message
    assert "restart the gateway" in message
