"""A rule and an analysis give a plan: pure numbers, no network."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from spectrim.allocate import Allocation, Menu
from spectrim.analyze import Analysis, Choices, LayerAnalysis
from spectrim.errors import PlanError, RuleError
from spectrim.linalg import Ranks
from spectrim.plan import (
    CONVOLUTION_FORMS,
    Budget,
    CostName,
    Energy,
    FormName,
    LayerPlan,
    Metric,
    Plan,
    Rank,
    Ratio,
    Rule,
)


def plan(
    analysis: Analysis,
    rule: Rule,
    *,
    metric: Metric | None = None,
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | None = None,
    allow_growth: bool = False,
) -> Plan:
    """Decide the form and the rank of every layer.

    A layer whose factors would not be smaller than itself stays dense, with the break-even rank as the reason. Under a
    `Budget` the sum of what the layers lose is smallest: each layer's lost share of energy, times its sensitivity if
    the analysis has it (see `st.sensitivity`).

    Args:
        analysis: From `st.analyze`.
        rule: `Rank`, `Ratio` or `Energy`, applied to each layer by itself, or a `Budget` for all layers together.
        metric: `plain`, `activation` or `loss`; by default the best that the analysis has for a `Budget`, and the
            activation metric, where it has that, for the other rules.
        forms: Which of `channel`, `spatial`, `tucker2` convolutions may take. By default a `Budget` may use all of
            them, and the other rules use the channel form; of several, those take the first that a layer has.
        rank_multiple: Use only ranks that are multiples of this number.
        allow_growth: Factor layers even when they grow (for tests and studies).

    Raises:
        RuleError: a rank above the full rank of a layer it would apply to, or a budget below what is reachable.
        PlanError: a metric that the analysis does not have, or an unknown form.
    """
    metric = _metric(analysis, metric, best=isinstance(rule, Budget))
    allowed = _forms(forms, CONVOLUTION_FORMS if isinstance(rule, Budget) else ("channel",))
    multiple = _multiple(rank_multiple)
    sizes = {
        layer.name: (layer.shape, max(layer.sizes.full_ranks(possible[0])))
        for layer in analysis
        if layer.sizes and (possible := _possible(layer, allowed, metric))
    }
    require_reachable(rule, sizes)
    if isinstance(rule, Budget):
        options = _Options(analysis, rule.limits, metric, allowed, multiple)
        return _budgeted(options, rule)
    layers = tuple(
        _decide(layer, rule, metric=metric, forms=allowed, multiple=multiple, allow_growth=allow_growth)
        for layer in analysis
    )
    return Plan(rule=rule, metric=metric, layers=layers)


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
    chosen, allowed = _metric(analysis, metric, best=True), _forms(forms, CONVOLUTION_FORMS)
    options = _Options(analysis, cost, chosen, allowed, _multiple(rank_multiple))
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
class _Options:
    """Every option of every layer under a budget."""

    analysis: Analysis
    cost: CostName
    metric: Metric
    forms: tuple[FormName, ...]
    multiple: int

    @property
    def whole(self) -> int:
        return int(getattr(self.analysis.whole, self.cost))

    @property
    def fixed(self) -> int:
        return self.analysis.fixed(self.cost)

    @cached_property
    def menus(self) -> list[tuple[Menu, list[tuple[FormName, Ranks]]]]:
        """By layer: costs and losses, the dense layer first, and the form and ranks of the others."""
        return [self._menu(layer) for layer in self.analysis]

    def _menu(self, layer: LayerAnalysis) -> tuple[Menu, list[tuple[FormName, Ranks]]]:
        costs, losses = [np.array([self._dense(layer)])], [np.zeros(1)]
        usual = float(np.median([*self.analysis.sensitivity.values()])) if self.analysis.sensitivity else 1.0
        named: list[tuple[FormName, Ranks]] = []
        for form in _possible(layer, self.forms, self.metric):
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
        layers = []
        for layer, (menu, named), one in zip(self.analysis, self.menus, picked, strict=True):
            if one:
                form, ranks = named[one - 1]
                share = menu.costs[one] / max(1, menu.costs[0])
                because = f"{form} at {share:.0%} of its {self.cost} loses least for what it saves"
                layers.append(_factored(layer, form, ranks, metric=self.metric, reason=because))
            else:
                layers.append(_dense(layer, reason=self._why_dense(layer, menu, named), metric=self.metric))
        return Plan(rule=rule, metric=self.metric, layers=tuple(layers))

    def _why_dense(self, layer: LayerAnalysis, menu: Menu, named: list[tuple[FormName, Ranks]]) -> str:
        if not named:
            return _why_impossible(layer, self.metric) or "no rank of any form allowed here would be smaller"
        best = 1 + int(np.argmin(menu.losses[1:]))
        form, ranks = named[best - 1]
        share = menu.costs[best] / max(1, menu.costs[0])
        return (
            f"the budget is met with less error elsewhere; the mildest option here, {form} at rank {_listed(ranks)}, "
            f"would save {1 - share:.0%} of its {self.cost}"
        )


def _budget(cost: CostName, share: float) -> Budget:
    match cost:
        case "macs":
            return Budget(macs=share)
        case "params":
            return Budget(params=share)
        case "bytes":
            return Budget(bytes=share)


def _budgeted(options: _Options, rule: Budget) -> Plan:
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


def refresh(edited: Plan, analysis: Analysis) -> Plan:
    """The plan with its forms, metrics and ranks as they are, and every other number computed anew from `analysis`.

    This is what makes editing the JSON by hand safe: only the decisions are taken from the file.

    Raises:
        PlanError: the plan names layers that this model does not have, has in other shapes, or cannot factor.
    """
    known = {layer.name: layer for layer in analysis}
    layers = []
    for decided in edited.layers:
        layer = known.get(decided.name)
        if layer is None or layer.shape != decided.shape:
            found = f"has {decided.name} with shape {list(layer.shape)}" if layer else f"has no layer {decided.name!r}"
            raise PlanError(
                f"the plan is for another model: it wants {decided.name} with shape {list(decided.shape)}, "
                f"and this model {found}; make a plan for it with st.plan"
            )
        layers.append(_again(decided, layer, metric=edited.metric))
    return Plan(rule=edited.rule, metric=edited.metric, layers=tuple(layers))


def _again(decided: LayerPlan, layer: LayerAnalysis, *, metric: Metric) -> LayerPlan:
    if decided.form == "dense" or decided.metric is None:
        return _dense(layer, reason=decided.reason, metric=metric, fixed=decided.fixed)
    if not layer.forms or layer.refusal:
        raise PlanError(f"the plan factors {layer.name}, which must stay dense: {layer.refusal}")
    if decided.form not in layer.forms:
        raise PlanError(
            f"the plan wants {layer.name} in the {decided.form} form; a {layer.kind} {list(layer.shape)} has "
            f"{', '.join(layer.forms)}"
        )
    if decided.metric not in layer.problems:
        raise PlanError(
            f"the plan wants {layer.name} in the {decided.metric} metric, and there is no calibration data for it; "
            "pass data= (or change the metric in the plan to plain)"
        )
    full = layer.sizes.full_ranks(decided.form) if layer.sizes else ()
    if any(rank > most for rank, most in zip(decided.ranks, full, strict=True)):
        raise PlanError(
            f"the plan wants rank {_listed(decided.ranks)} for {layer.name}, above its full rank {_listed(full)}"
        )
    fresh = _factored(layer, decided.form, decided.ranks, metric=decided.metric, reason=decided.reason)
    if fresh.kept == decided.kept:
        return fresh
    return fresh.model_copy(update={"reason": f"rank {_listed(decided.ranks)} set by hand in the plan"})


def require_reachable(rule: Rule, sizes: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """Check a rule against the layers it is meant for, by name their weight's shape and full rank, before long work.

    Raises:
        RuleError: not a rule, or a rank above the full rank of a layer.
    """
    if not isinstance(rule, Rank | Ratio | Energy | Budget):
        raise RuleError(f"{rule!r} is not a rule; give Rank(20), Ratio(0.25), Energy(0.9) or Budget(macs=0.5)")
    if not isinstance(rule, Rank):
        return
    short = [(name, list(shape), full) for name, (shape, full) in sizes.items() if full < rule.rank]
    if short:
        listed = ", ".join(f"{name} {shape} has full rank {full}" for name, shape, full in short[:3])
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        raise RuleError(
            f"{rule} is above what some layers can have: {listed}{more}. "
            "Leave them out (exclude=.., or keep_last=True for the last layer) or choose a smaller rank"
        )


def _metric(analysis: Analysis, metric: Metric | None, *, best: bool) -> Metric:
    usual: Metric = "activation" if "activation" in analysis.metrics else "plain"
    chosen = metric or (analysis.metrics[-1] if best else usual)
    if chosen not in analysis.metrics:
        how = "with gradients=True " if chosen == "loss" else ""
        raise PlanError(
            f"the analysis has no {chosen} metric, only {', '.join(analysis.metrics)}; "
            f"pass calibration=st.calibrate(model, batches) {how}to st.analyze"
        )
    return chosen


def _multiple(rank_multiple: int | None) -> int:
    if rank_multiple is None:
        return 1
    if isinstance(rank_multiple, bool) or not isinstance(rank_multiple, int) or rank_multiple < 1:
        raise RuleError(f"rank_multiple={rank_multiple!r}: give a whole number of at least 1, such as 8")
    return rank_multiple


def _forms(forms: Sequence[FormName] | None, default: tuple[FormName, ...]) -> tuple[FormName, ...]:
    """The forms that may be used; the linear form, which layers without a kernel have, always may."""
    chosen = default if forms is None else (forms,) if isinstance(forms, str) else tuple(forms)
    unknown = [form for form in chosen if form not in ("linear", *CONVOLUTION_FORMS)]
    if unknown or not chosen:
        raise PlanError(f"forms={forms!r}: give some of {', '.join(CONVOLUTION_FORMS)}")
    return ("linear", *chosen)


def _possible(layer: LayerAnalysis, forms: Sequence[FormName], metric: Metric) -> list[FormName]:
    """The allowed forms of a layer, in the order of `forms`; none for a layer that must stay dense."""
    if layer.refusal or metric not in layer.problems:
        return []
    # a transposed or one-dimensional convolution has no other form than channel
    only = [layer.forms[0]] if len(layer.forms) == 1 else []
    return [form for form in dict.fromkeys((*forms, *only)) if form in layer.forms]


def _why_impossible(layer: LayerAnalysis, metric: Metric) -> str | None:
    if not layer.forms or layer.refusal:
        return layer.refusal or "it has no factored form"
    if metric in layer.problems:
        return None
    reached = metric == "loss" and "activation" in layer.problems
    return "the network's outputs do not feel it" if reached else "the calibration data did not reach it"


def _decide(
    layer: LayerAnalysis,
    rule: Rank | Ratio | Energy,
    *,
    metric: Metric,
    forms: Sequence[FormName],
    multiple: int,
    allow_growth: bool,
) -> LayerPlan:
    possible = _possible(layer, forms, metric)
    if not possible:
        reason = _why_impossible(layer, metric) or f"it has no form among {', '.join(forms[1:])}"
        return _dense(layer, reason=reason, metric=metric)
    form = possible[0]
    ranks, because = _ranks(layer, form, rule, metric=metric)
    if multiple > 1:
        full = layer.sizes.full_ranks(form) if layer.sizes else ranks
        ranks = tuple(min(most, -(-rank // multiple) * multiple) for rank, most in zip(ranks, full, strict=True))
        because += f", rounded up to a multiple of {multiple}"
    if not layer.shrinks(layer.cost(form, ranks, metric)) and not allow_growth:
        break_even = layer.break_even(form, metric)
        limit = f"only up to rank {break_even} (break-even)" if break_even else "at no rank"
        reason = f"rank {_listed(ranks)} ({because}) would not be smaller; it shrinks {limit}"
        return _dense(layer, reason=reason, metric=metric)
    return _factored(layer, form, ranks, metric=metric, reason=because)


def _ranks(layer: LayerAnalysis, form: FormName, rule: Rank | Ratio | Energy, *, metric: Metric) -> tuple[Ranks, str]:
    """The ranks that a per-layer rule means in a form, and why."""
    assert layer.sizes is not None
    full = layer.sizes.full_ranks(form)
    match rule:
        case Rank(rank=rank):
            return tuple(min(rank, most) for most in full), f"rank {rank} as asked"
        case Ratio(ratio=ratio):
            # the small addition keeps 0.29 * 100 from becoming 28
            ranks = tuple(max(1, int(ratio * most + 1e-9)) for most in full)
            return ranks, f"{ratio:.4g} of {_listed(full)} singular values"
        case Energy(energy=energy):
            choices = layer.choices(form, metric)
            enough = np.flatnonzero(choices.lost <= (1 - energy) * (1 + 1e-12))
            best = int(enough[np.argmin(choices.params[enough])]) if len(enough) else len(choices.lost) - 1
            held = 1 - choices.lost[best]
            return (
                tuple(int(rank) for rank in choices.ranks[best]),
                f"holds {held:.4g} of the energy, at least {energy:.4g} asked",
            )


def _factored(layer: LayerAnalysis, form: FormName, ranks: Ranks, *, metric: Metric, reason: str) -> LayerPlan:
    assert layer.sizes is not None
    return LayerPlan(
        name=layer.name,
        also=layer.also,
        kind=layer.kind,
        shape=layer.shape,
        form=form,
        metric=metric,
        rank=ranks[-1],
        rank_in=ranks[0] if form == "tucker2" else None,
        full_rank=layer.sizes.full_ranks(form)[-1],
        break_even=layer.break_even(form, metric),
        predicted_error=layer.error(form, ranks, metric),
        dense=layer.dense,
        kept=layer.cost(form, ranks, metric),
        reason=reason,
    )


def _dense(layer: LayerAnalysis, *, reason: str, metric: Metric, fixed: bool = False) -> LayerPlan:
    return LayerPlan(
        name=layer.name,
        also=layer.also,
        kind=layer.kind,
        shape=layer.shape,
        form="dense",
        full_rank=layer.full_rank or None,
        break_even=layer.break_even(layer.forms[0], metric) if layer.forms else None,
        dense=layer.dense,
        kept=layer.dense,
        fixed=fixed or not layer.problems,
        reason=reason,
    )


def _listed(ranks: Sequence[int]) -> str:
    return " and ".join(map(str, ranks))
