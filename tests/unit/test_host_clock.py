from __future__ import annotations

import time

import pytest

from fzg.host.clock import StepDetector, now


def test_now_is_the_boot_clock():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= now() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_wall_clock_that_runs_along_is_no_step():
    detector = StepDetector(now=100.0, wall=1_700_000_000.0)
    assert detector.check(101.0, 1_700_000_001.0) is None
    assert detector.check(90_000.0, 1_700_089_900.0) is None


@pytest.mark.parametrize("jump", [1.0, 3600.0, -1.0, -86_400.0])
def test_a_jump_of_a_second_or_more_is_reported_once(jump):
    detector = StepDetector(now=100.0, wall=1_700_000_000.0)
    assert detector.check(101.0, 1_700_000_001.0 + jump) == jump
    assert detector.check(102.0, 1_700_000_002.0 + jump) is None
    assert detector.offset == 1_700_000_000.0 - 100.0 + jump


def test_small_corrections_count_when_they_add_up_to_a_second():
    detector = StepDetector(now=0.0, wall=1000.0)
    steps = [detector.check(float(i), 1000.0 + i + 0.25 * i) for i in range(1, 9)]
    assert steps == [None, None, None, 1.0, None, None, None, 1.0]
