"""Interleaved rounds, intervals, and what can be said of them."""

import random
import time
from typing import Any

import pytest

from spectrim.runtimes.timing import (
    Comparison,
    Interval,
    Timing,
    compare,
    interleaved,
    median_interval,
    pass_timer,
    steady,
)


def test_rounds_alternate_their_order() -> None:
    order: list[str] = []

    def run(name: str) -> Any:
        return lambda: order.append(name) or 0.0

    interleaved([run("a"), run("b")], rounds=3)
    assert "".join(order) == "abbaab"


def test_without_patience_the_fewest_rounds_are_done() -> None:
    assert len(interleaved([lambda: 1.0], rounds=100, patience=0.0)[0]) == 5
    assert len(interleaved([lambda: 1.0], rounds=2, patience=0.0)[0]) == 2


def test_the_interval_of_the_median_comes_from_order_statistics() -> None:
    interval = median_interval([float(number) for number in range(31, 0, -1)])
    assert (interval.value, interval.low, interval.high) == (16, 11, 22)  # binomial(31, 1/2): ranks 10..22 cover 95 %


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    covered = sum(
        (interval := median_interval([draw.lognormvariate(0, 0.3) for _ in range(31)])).low <= 1 <= interval.high
        for _ in range(400)
    )
    assert 0.92 <= covered / 400 <= 1


def test_a_timer_gives_the_mean_of_enough_passes() -> None:
    calls: list[str] = []
    timer = pass_timer(lambda: calls.append("run"), finish=lambda: calls.append("finish"))
    calls.clear()
    timing = timer()
    assert calls[0] == calls[-1] == "finish"
    assert calls.count("run") >= 1
    assert timing.wall > 0
    assert timing.cpu is None


def test_processor_time_does_not_count_waiting() -> None:
    timing = pass_timer(lambda: time.sleep(0.06), cpu=True)()
    assert timing.wall >= 0.06
    assert timing.cpu is not None
    assert timing.cpu < timing.wall


def test_a_slow_pass_is_not_warmed_up_for_long() -> None:
    calls: list[int] = []
    timer = pass_timer(lambda: (calls.append(1), time.sleep(0.06)))
    assert len(calls) == 1
    timer()
    assert len(calls) == 2


def test_ratios_are_paired_by_round() -> None:
    """The machine becomes ten times slower half way: the paired ratios do not change, the drift shows it."""
    speed = [1.0] * 10 + [0.1] * 10
    comparison = compare([Timing(2 / factor) for factor in speed], [Timing(3 / factor) for factor in speed])
    assert comparison.ratio == Interval(value=1.5, low=1.5, high=1.5)
    assert comparison.drift == pytest.approx(0.1)
    assert comparison.verdict == "too noisy to tell"


def test_processor_time_is_used_where_every_timing_has_it() -> None:
    with_cpu, without = [Timing(3.0, 1.0), Timing(9.0, 1.0)], [Timing(2.0), Timing(2.0)]
    assert steady(with_cpu, with_cpu) == [[1.0, 1.0], [1.0, 1.0]]
    assert steady(with_cpu, without) == [[3.0, 9.0], [2.0, 2.0]]


def test_processor_time_of_several_threads_is_not_taken() -> None:
    assert steady([Timing(1.0, 1.9)], [Timing(1.0, 1.0)]) == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("value", "low", "high", "drift", "verdict"),
    [
        (1.5, 1.48, 1.52, 1.01, "faster"),
        (0.7, 0.69, 0.71, 0.99, "slower"),
        (1.01, 0.99, 1.03, 1.0, "no difference"),
        (1.5, 1.2, 1.8, 1.0, "too noisy to tell"),
        (2.1, 1.95, 2.3, 1.0, "faster"),  # how much is not sure, and that it is faster is
        (0.4, 0.3, 0.5, 1.0, "slower"),
        (0.8, 0.7, 0.9, 1.0, "too noisy to tell"),
        (1.05, 0.95, 1.15, 1.0, "too noisy to tell"),
        (1.04, 1.02, 1.06, 1.10, "too noisy to tell"),
        (0.96, 0.94, 0.98, 0.90, "too noisy to tell"),
    ],
)
def test_the_verdict(value: float, low: float, high: float, drift: float, verdict: str) -> None:
    assert Comparison(ratio=Interval(value=value, low=low, high=high), drift=drift).verdict == verdict


def test_a_difference_is_distinguished_from_noise() -> None:
    """Lognormal noise of one size; only the truth differs."""

    def verdict(truth: float, spread: float) -> str:
        draw = random.Random(1)
        own = [Timing(draw.lognormvariate(0, spread)) for _ in range(31)]
        return compare(own, [Timing(truth * draw.lognormvariate(0, spread)) for _ in range(31)]).verdict

    assert verdict(1.5, 0.02) == "faster"
    assert verdict(1 / 1.5, 0.02) == "slower"
    assert verdict(1.0, 0.02) == "no difference"
    assert verdict(1.5, 0.8) == "too noisy to tell"


def test_what_happens_between_passes_is_not_timed() -> None:
    order: list[str] = []

    def between() -> None:
        order.append("between")
        time.sleep(2e-3)

    timer = pass_timer(lambda: order.append("pass"), cpu=True, between=between)
    del order[:]
    timing = timer()
    assert order[:4] == ["between", "pass", "between", "pass"]
    assert 2 <= len(order) <= 16
    assert timing.wall < 2e-3  # arithmetic: a sleep of that length would be in it
    assert timing.cpu is not None
