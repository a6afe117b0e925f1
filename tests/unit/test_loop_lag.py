"""How late timers fire."""

from __future__ import annotations

import gevent
import pytest

from fzg.ops import lag
from fzg.ops.lag import Histogram, LoopLag


def test_a_value_belongs_to_the_first_bound_that_is_not_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == 12.0


@pytest.fixture
def sampler(monkeypatch):
    monkeypatch.setattr(lag, "SAMPLE_INTERVAL", 0.01)
    moment = [100.0]
    sampler = LoopLag(lambda: moment[0])
    sampler.moment = moment
    yield sampler
    sampler.stop()


def samples(sampler):
    return sampler.histogram.cumulative()[-1][1]


def until_sampled(sampler, times=1):
    wanted = samples(sampler) + times
    while samples(sampler) < wanted:
        gevent.sleep(0.005)


def test_a_loop_that_is_late_is_not_healthy_until_it_is_in_time_again(sampler):
    sampler.start()
    gevent.sleep(0)
    assert sampler.is_healthy
    sampler.moment[0] += 0.01 + 2.5
    assert not sampler.is_healthy, "it is late already, before the timer fired"
    until_sampled(sampler)
    assert sampler.last == pytest.approx(2.5)
    assert not sampler.is_healthy
    sampler.moment[0] += 0.01
    until_sampled(sampler)
    assert sampler.last == 0
    assert sampler.is_healthy


def test_a_sampler_that_has_not_begun_has_nothing_to_complain_of():
    assert LoopLag().is_healthy
