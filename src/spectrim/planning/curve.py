"""The trade-off between what a network costs and what it loses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.latencies import LatencyTable
from spectrim.core.arguments import checked
from spectrim.core.errors import PlanError, RuleError
from spectrim.core.plans import Limit, Metric, Plan
from spectrim.planning.budgets import Candidates
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.knapsack import Allocation
from spectrim.runtimes.rank_grid import Grid


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a trade-off curve.

    Attributes:
        kept: The share of the dense network's cost that is kept.
        lost: What all layers lose together: shares of their energies, times their sensitivities if these were measured.
        plan: The plan that does it.
    """

    kept: float
    lost: float
    plan: Plan


@dataclass(frozen=True, eq=False)
class Curve:
    """What every budget would lose, cheapest first. `cost` is what `kept` is a share of."""

    cost: Limit
    points: tuple[Point, ...]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


@checked
def pareto(
    analysis: Analysis,
    *,
    cost: Limit = "macs",
    points: int = 20,
    metric: Metric | None = None,
    forms: Sequence[str] | None = None,
    rank_multiple: int | Grid | None = None,
    latencies: LatencyTable | None = None,
) -> Curve:
    """The whole trade-off between cost and error from one decomposition of every layer.

    Args:
        analysis: From `st.analyze`.
        cost: `macs`, `params` or `bytes`, or `latency` as predicted from `latencies`.
        points: How many budgets, evenly spaced from the smallest that can be reached to just below the dense network.
        metric: As for `st.plan`.
        forms: As for `st.plan`.
        rank_multiple: As for `st.plan`.
        latencies: As for `st.plan`; only for the latency.

    Raises:
        RuleError: fewer than 2 points, a rank_multiple that is not at least 1, or a latency without a table.
        PlanError: an unknown cost, metric or form, or a table of another network.
    """
    if cost not in ("macs", "params", "bytes", "latency"):
        raise PlanError(f"cost={cost!r}: there are macs, params and bytes, and latency")
    if points < 2:
        raise RuleError(f"points={points}: a curve needs at least 2")
    options = PlanOptions(metric=metric, forms=forms, rank_multiple=rank_multiple, latencies=latencies)
    candidates = Candidates.of(analysis, cost, options)
    solved = Allocation.of(candidates.items, limit=candidates.whole - candidates.outside)
    least = Fraction(candidates.least, candidates.whole)
    shares = (least + (1 - least) * Fraction(step, points) for step in range(points))
    curve = []
    for share in shares:
        solution = solved.solve(int(share * candidates.whole) - candidates.outside)
        rule = candidates.rule(float(min(max(share, Fraction(1, 10**9)), 1 - Fraction(1, 10**9))))
        ratio = candidates.cost_of(solution) / candidates.whole
        curve.append(Point(ratio, candidates.lost(solution), candidates.plan(rule, solution)))
    return Curve(cost, tuple(curve))
