"""Comparing times on a machine that does other things too: interleaved rounds, paired ratios, and a verdict.

Milliseconds are wall time. Ratios of runs that compute in one thread are of processor time where it can be measured,
since that does not count the time of other processes.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from spectrim.core.files import Frozen

_T = TypeVar("_T")
Z95 = 1.959963984540054
"""Standard deviations of a normal distribution to both sides that hold 95 % of it."""
_FINE = 1e-5
"""Seconds: a processor clock that ticks more coarsely is of no use."""
_WIDE = 0.15
"""An interval near 1 that is wider than this share of its value says too little."""

_ISOLATED = 8
"""Passes of one timing, where something has to be done between them."""
_LEAST, _FEWEST = 2e-3, 5
"""Seconds that a timing lasts at least, and rounds that are done in any case."""

Verdict = Literal["faster", "slower", "no difference", "too noisy to tell"]


class Interval(Frozen):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Timing(NamedTuple):
    """Seconds that one pass took.

    Attributes:
        wall: Wall time.
        cpu: Processor time of all threads of this process together; None where other threads compute as well.
    """

    wall: float
    cpu: float | None = None


class Comparison(Frozen):
    """Two runs, timed in the same rounds.

    Attributes:
        ratio: Time of the reference over time of the other: median of the paired rounds and its 95 % interval.
        drift: The reference against itself: its median in the first half of the rounds over that in the second. It is
            1 on a machine whose speed does not change.
    """

    ratio: Interval
    drift: float

    @property
    def verdict(self) -> Verdict:
        """What the rounds show.

        They are too noisy to tell where the interval is wide and lies no farther from 1 than it is wide, and where the
        machine changed by more than the difference.
        """
        ratio, width = self.ratio, self.ratio.high - self.ratio.low
        near = ratio.low - width <= 1 <= ratio.high + width
        if near and width > _WIDE * ratio.value:
            return "too noisy to tell"
        if ratio.low <= 1 <= ratio.high:
            return "no difference"
        if abs(math.log(ratio.value)) <= abs(math.log(self.drift)):
            return "too noisy to tell"
        return "faster" if ratio.value > 1 else "slower"


def compare(own: Sequence[Timing], reference: Sequence[Timing]) -> Comparison:
    """How much faster `own` is than `reference`, from timings in the same interleaved rounds, at least two."""
    times, others = steady(own, reference)
    ratio = median_interval([other / time for time, other in zip(times, others, strict=True)])
    half = len(others) // 2
    return Comparison(ratio=ratio, drift=statistics.median(others[:half]) / statistics.median(others[-half:]))


def steady(*series: Sequence[Timing]) -> list[list[float]]:
    """The seconds of each series to compare by: all of them of the processor, or all of the wall.

    Processor time is taken where every timing has it and no series used more of it than one thread can; more means that
    other threads of this process were at work.
    """
    sums = [[sum(timing.cpu or 0 for timing in own), sum(timing.wall for timing in own)] for own in series]
    by_cpu = all(timing.cpu for own in series for timing in own) and all(cpu <= 1.1 * wall for cpu, wall in sums)
    return [[timing.cpu if by_cpu and timing.cpu else timing.wall for timing in timings] for timings in series]


def medians_ms(*series: Sequence[Timing]) -> list[float]:
    """The median of each series in milliseconds; see `steady`."""
    return [statistics.median(seconds) * 1e3 for seconds in steady(*series)]


def pass_timer(
    run: Callable[[], object],
    *,
    finish: Callable[[], object] | None = None,
    cpu: bool = False,
    between: Callable[[], object] | None = None,
) -> Callable[[], Timing]:
    """Warm up, and give a function that times enough passes to outlast the clock's grain: mean seconds of a pass.

    Args:
        run: One pass.
        finish: Waits until the device is done, after the last pass.
        cpu: The pass computes in one thread of this process, so that its processor time can be measured as well.
        between: Called before every pass and not timed; there are then at most 8 passes.
    """
    wait = finish or (lambda: None)
    cpu = cpu and time.get_clock_info("process_time").resolution <= _FINE

    def block(number: int) -> Timing:
        wait()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(number):
            run()
        wait()
        spent = time.process_time() - used
        return Timing((time.perf_counter() - start) / number, spent / number if cpu else None)

    def passes(number: int) -> Timing:
        if between is None:
            return block(number)
        timings = []
        for _ in range(min(number, _ISOLATED)):
            between()
            timings.append(block(1))
        wall = statistics.fmean(timing.wall for timing in timings)
        return Timing(wall, statistics.fmean(timing.cpu or 0.0 for timing in timings) if cpu else None)

    warm = passes(1).wall
    if warm < 0.05:  # a first pass may be slow for once
        passes(2)
        warm = passes(3).wall
    number = max(1, math.ceil(_LEAST / max(warm, 1e-7)))
    return lambda: passes(number)


def interleaved(runs: Sequence[Callable[[], _T]], *, rounds: int, patience: float = 30.0) -> list[list[_T]]:
    """Call every run once in each round, in an order that alternates, so that drift of the machine cancels.

    After 5 rounds, no further one is begun once `patience` seconds have passed. Returns the results of each run, by
    round.
    """
    results: list[list[_T]] = [[] for _ in runs]
    start = time.perf_counter()
    for number in range(rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for position in order:
            results[position].append(runs[position]())
        if number + 1 >= _FEWEST and time.perf_counter() - start > patience:
            break
    return results


def median_interval(values: Sequence[float]) -> Interval:
    """Median and its distribution-free 95 % interval, from order statistics."""
    ordered, n = sorted(values), len(values)
    reach = Z95 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return Interval(value=statistics.median(ordered), low=ordered[max(0, low)], high=ordered[min(n - 1, high)])
