"""When the portal is dialled again (spec portal 1.13)."""

from __future__ import annotations

import pytest

from fzg.portal.backoff import Reconnect

NEVER = b"\x00" * 7  # U = 0
ALMOST_ONE = b"\xff" * 7


def delays(reconnect, limit=100000):
    out = []
    while (retry := reconnect.handle_failure()) is not None and len(out) < limit:
        out.append(retry.delay)
    return out


def joined(**options):
    reconnect = Reconnect(**{"random": lambda n: NEVER[:n], "max_partition": 86400.0} | options)
    reconnect.handle_joined()
    return reconnect


@pytest.mark.spec("PORTAL-32")
def test_before_the_first_join_there_are_fifteen_retries_each_second():
    assert delays(Reconnect(random=lambda n: ALMOST_ONE[:n])) == [1.0] * 15


@pytest.mark.spec("PORTAL-33")
def test_after_a_join_delays_grow_by_half_from_half_a_second_to_a_minute():
    got = delays(joined(), 20)
    expected = [0.5]
    while len(expected) < 20:
        expected.append(min(expected[-1] * 1.5, 60.0))
    assert got == pytest.approx(expected)


@pytest.mark.spec("PORTAL-33")
def test_jitter_adds_up_to_the_delay_itself():
    got = delays(joined(random=lambda n: ALMOST_ONE[:n]), 30)
    assert got[0] == pytest.approx(1.0)
    assert got[-1] == pytest.approx(120.0)
    assert max(got) <= 120.0


@pytest.mark.spec("PORTAL-33")
def test_a_join_starts_the_next_outage_anew():
    reconnect = joined()
    assert [reconnect.handle_failure().delay for _ in range(3)] == pytest.approx([0.5, 0.75, 1.125])
    reconnect.handle_joined()
    assert reconnect.handle_failure().delay == 0.5


@pytest.mark.spec("PORTAL-34")
def test_the_budget_is_the_sum_of_the_delays():
    # 0.5 + 0.75 + 1.125 + 1.6875 = 4.0625; the next, 2.53125, would exceed 5
    assert delays(joined(max_partition=5.0)) == pytest.approx([0.5, 0.75, 1.125, 1.6875])


def test_a_day_of_outage_is_survived_at_full_delay():
    got = delays(joined())
    assert 86400 - 60 < sum(got) <= 86400
    assert len(got) > 1400


def test_the_budget_left_is_told():
    reconnect = Reconnect(random=lambda n: NEVER[:n])
    assert reconnect.handle_failure() == (1.0, 14.0)
    assert reconnect.handle_failure() == (1.0, 13.0)
    assert reconnect.handle_failure(retry_after=60.0) == (60.0, 13.0)


@pytest.mark.spec("OPS-25", "PORTAL-31")
def test_retry_after_replaces_the_delay_and_costs_no_budget():
    reconnect = Reconnect(random=lambda n: NEVER[:n])
    assert [reconnect.handle_failure(60.0).delay for _ in range(100)] == [60.0] * 100
    assert delays(reconnect) == [1.0] * 15
    assert reconnect.handle_failure(1.0).delay == 1.0
    grown = joined()
    assert grown.handle_failure().delay == 0.5
    assert grown.handle_failure(9.0).delay == 9.0
    assert grown.handle_failure().delay == 0.75


def test_retry_after_zero_dials_at_once_and_starts_the_back_off_anew():
    reconnect = Reconnect(random=lambda n: NEVER[:n])
    for _ in range(10):
        reconnect.handle_failure()
    assert reconnect.handle_failure(0.0).delay == 0.0
    assert delays(reconnect) == [1.0] * 15


def test_a_portal_that_always_says_at_once_is_dialled_at_once_only_once():
    reconnect = Reconnect(random=lambda n: NEVER)
    assert [reconnect.handle_failure(retry_after=0.0).delay for _ in range(4)] == [0.0, 1.0, 1.0, 1.0]
