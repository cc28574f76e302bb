"""Forms and ranks of all layers under one budget, and the whole trade-off."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from spectrim.allocate import Allocation, Menu
from spectrim.analyze import Analysis, Choices, LayerAnalysis
from spectrim.decisions import (
    dense,
    factored,
    forms_among,
    listed,
    metric_of,
    multiple_of,
    possible_forms,
    why_impossible,
)
from spectrim.errors import PlanError, RuleError
from spectrim.linalg import Ranks
from spectrim.plan import CONVOLUTION_FORMS, Budget, CostName, FormName, Metric, Plan


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

    cost: CostName
    points: tuple[Point, ...]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def pareto(
    analysis: Analysis,
    *,
    cost: CostName = "macs",
    points: int = 20,
    metric: Metric | None = None,
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | None = None,
) -> Curve:
    """The whole trade-off between cost and error from one decomposition of every layer.

    Args:
        analysis: From `st.analyze`.
        cost: `macs`, `params` or `bytes`.
        points: How many budgets, evenly spaced from the smallest that can be reached to just below the dense network.
        metric: As for `st.plan`.
        forms: As for `st.plan`.
        rank_multiple: As for `st.plan`.

    Raises:
        RuleError: fewer than 2 points, or a rank_multiple that is not at least 1.
        PlanError: an unknown cost, metric or form.
    """
    if cost not in ("macs", "params", "bytes"):
        raise PlanError(f"cost={cost!r}: there are macs, params and bytes")
    if points < 2:
        raise RuleError(f"points={points}: a curve needs at least 2")
    chosen, allowed = metric_of(analysis, metric, best=True), forms_among(forms, CONVOLUTION_FORMS)
    options = Options(analysis, cost, chosen, allowed, multiple_of(rank_multiple))
    solved = Allocation.of([menu for menu, _ in options.menus], limit=options.whole - options.fixed)
    least = Fraction(options.fixed + solved.cheapest, options.whole)
    shares = (least + (1 - least) * Fraction(step, points) for step in range(points))
    found = []
    for share in shares:
        picked = solved.pick(int(share * options.whole) - options.fixed)
        rule = _budget(cost, float(min(max(share, Fraction(1, 10**9)), 1 - Fraction(1, 10**9))))
        lost = sum(float(menu.losses[one]) for menu, one in zip(solved.menus, picked, strict=True))
        found.append(Point(options.kept(picked) / options.whole, lost, options.plan(rule, picked)))
    return Curve(cost, tuple(found))


@dataclass(frozen=True, eq=False)
class Options:
    """Every option of every layer under a budget."""

    analysis: Analysis
    cost: CostName
    metric: Metric
    forms: tuple[FormName, ...]
    multiple: int

    @property
    def whole(self) -> int:
        """What the dense network costs."""
        return int(getattr(self.analysis.whole, self.cost))

    @property
    def fixed(self) -> int:
        """What it costs besides the layers of the analysis."""
        return self.analysis.fixed(self.cost)

    @cached_property
    def menus(self) -> list[tuple[Menu, list[tuple[FormName, Ranks]]]]:
        """By layer: costs and losses, the dense layer first, and the form and ranks of the others."""
        return [self._menu(layer) for layer in self.analysis]

    def _menu(self, layer: LayerAnalysis) -> tuple[Menu, list[tuple[FormName, Ranks]]]:
        costs, losses = [np.array([self._dense(layer)])], [np.zeros(1)]
        usual = float(np.median([*self.analysis.sensitivity.values()])) if self.analysis.sensitivity else 1.0
        named: list[tuple[FormName, Ranks]] = []
        for form in possible_forms(layer, self.forms, self.metric):
            choices = layer.choices(form, self.metric)
            full = np.array(layer.sizes.full_ranks(form)) if layer.sizes else choices.ranks[-1]
            even = (choices.ranks % self.multiple == 0) | (choices.ranks == full)
            small = (choices.params < layer.dense.params) & (choices.macs <= layer.dense.macs)
            fits = np.flatnonzero(even.all(axis=1) & small)
            costs.append(self._factored(layer, choices)[fits])
            losses.append(choices.lost[fits] * self.analysis.sensitivity.get(layer.name, usual))
            named += [(form, tuple(int(rank) for rank in choices.ranks[one])) for one in fits]
        return Menu(np.concatenate(costs).astype(np.int64), np.concatenate(losses)), named

    def _dense(self, layer: LayerAnalysis) -> int:
        return layer.dense.macs if self.cost == "macs" else layer.dense.params * self._unit(layer)

    def _factored(self, layer: LayerAnalysis, choices: Choices) -> npt.NDArray[np.int64]:
        if self.cost == "macs":
            return choices.macs
        # each tensor of a file has an entry in its header
        tensors = len(choices.ranks[0]) + (not layer.has_bias and self.metric != "plain")
        entries = tensors * (len(layer.name) + 120) if self.cost == "bytes" else 0
        return choices.params * self._unit(layer) + entries * (1 + len(layer.also))

    def _unit(self, layer: LayerAnalysis) -> int:
        return layer.itemsize if self.cost == "bytes" else 1

    def kept(self, picked: Sequence[int]) -> int:
        """What the whole model costs with these options."""
        return self.fixed + sum(int(menu.costs[one]) for (menu, _), one in zip(self.menus, picked, strict=True))

    def plan(self, rule: Budget, picked: Sequence[int]) -> Plan:
        """These options as a plan, with reasons."""
        layers = []
        for layer, (menu, named), one in zip(self.analysis, self.menus, picked, strict=True):
            if one:
                form, ranks = named[one - 1]
                share = menu.costs[one] / max(1, menu.costs[0])
                because = f"{form} at {share:.0%} of its {self.cost} loses least for what it saves"
                layers.append(factored(layer, form, ranks, metric=self.metric, reason=because))
            else:
                layers.append(dense(layer, reason=self._why_dense(layer, menu, named), metric=self.metric))
        return Plan(rule=rule, metric=self.metric, layers=tuple(layers))

    def _why_dense(self, layer: LayerAnalysis, menu: Menu, named: list[tuple[FormName, Ranks]]) -> str:
        if not named:
            return why_impossible(layer, self.metric) or "no rank of any form allowed here would be smaller"
        best = 1 + int(np.argmin(menu.losses[1:]))
        form, ranks = named[best - 1]
        share = menu.costs[best] / max(1, menu.costs[0])
        return (
            f"the budget is met with less error elsewhere; the mildest option here, {form} at rank {listed(ranks)}, "
            f"would save {1 - share:.0%} of its {self.cost}"
        )


def budgeted(options: Options, rule: Budget) -> Plan:
    """The plan that loses least within a budget.

    Raises:
        RuleError: a budget below what is reachable; says what is.
    """
    budget = int(Fraction(rule.share).limit_denominator(10**12) * options.whole)
    solved = Allocation.of([menu for menu, _ in options.menus], limit=budget - options.fixed)
    least = options.fixed + solved.cheapest
    if budget < least:
        share = math.ceil(1e4 * least / options.whole) / 1e4
        open_to = sum(bool(named) for _, named in options.menus)
        raise RuleError(
            f"{rule} cannot be reached: the smallest this model can be is Budget({rule.limits}={share:g}), with all "
            f"{open_to} layers that can shrink at rank {options.multiple}; "
            f"{options.fixed / options.whole:.1%} of the {rule.limits} are outside the layers that were looked at"
        )
    return options.plan(rule, solved.pick(budget - options.fixed))


def _budget(cost: CostName, share: float) -> Budget:
    match cost:
        case "macs":
            return Budget(macs=share)
        case "params":
            return Budget(params=share)
        case "bytes":
            return Budget(bytes=share)
