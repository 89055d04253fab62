"""Rounds: the clock that is asked, what is called unwatched, and ratios that stay within a round."""

import math

import pytest
import torch

from initlab.tasks.course.rotated_timing import (
    FEWEST_SAMPLES,
    SAMPLE_SECONDS,
    Runner,
    calibrate,
    round_ratios,
    run_rounds,
    share_rounds,
)

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def runner(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return Runner(call)


def measured(clock, runners, rounds=5, seconds=1.0, **options):
    for runner in runners:
        calibrate(runner, CPU, clock)
    share_rounds(runners, rounds, seconds)
    clock.calls.clear()
    run_rounds(runners, CPU, clock, **options)


def test_the_clock_that_is_given_is_the_one_that_counts():
    clock = Clock()
    runner = clock.runner("a", 0.125)
    measured(clock, [runner])
    assert list(runner.samples.values()) == [0.125] * 5


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 4.9e-3, 0.01])
def test_samples_are_long_enough_and_no_longer_than_needed(seconds):
    clock = Clock()
    runner = clock.runner("a", seconds)
    calibrate(runner, CPU, clock)
    assert SAMPLE_SECONDS * 0.999 <= runner.inner * seconds <= max(2 * seconds, 2.1 * SAMPLE_SECONDS)


def test_a_short_call_is_warmed_and_a_long_one_is_not():
    clock = Clock()
    measured(clock, [clock.runner("short", 0.01), clock.runner("long", 0.1)], rounds=3, warm=0.05)
    assert "".join(name[0] for name in clock.calls) == "ssl" + "lss" + "ssl"


def test_ratios_are_taken_within_a_round():
    over, under = Runner(lambda: None, samples={0: 2.0, 1: 6.0, 2: 2.0}), Runner(lambda: None, samples={0: 1.0, 1: 3.0})
    assert round_ratios(over, under) == [2.0, 2.0, 2 / 3]  # the last against the reference's last before
    assert round_ratios(over, Runner(lambda: None)) == round_ratios(Runner(lambda: None), under) == []


def test_what_was_not_calibrated_takes_no_part():
    runner = Runner(lambda: None)
    share_rounds([runner], 5, 1.0)
    assert math.isnan(runner.seconds) and runner.rounds == 0
    run_rounds([runner], CPU)
    assert runner.samples == {}


def test_a_slow_call_is_sampled_a_few_times():
    clock = Clock()
    slow, fast = clock.runner("slow", 9.0), clock.runner("fast", 0.01)
    measured(clock, [slow, fast], rounds=12)
    assert len(slow.samples) == FEWEST_SAMPLES and len(fast.samples) == 12
    assert min(slow.samples) == 0 and max(slow.samples) >= 8
