"""A rule and an analysis give a plan: pure numbers, no network."""

from collections.abc import Mapping, Sequence

import numpy as np

from spectrim.analysis.metrics import metric_of
from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latencies import LatencyTable
from spectrim.core.arguments import checked
from spectrim.core.errors import PlanError, RuleError
from spectrim.core.plans import Budget, Energy, LayerPlan, Metric, Plan, Rank, Ratio, Rule
from spectrim.layers.forms import selected_forms
from spectrim.linalg import Ranks
from spectrim.planning.budgets import Candidates, solve
from spectrim.planning.decisions import (
    PlanOptions,
    dense,
    factored,
    limits_whole_size,
    listed,
    narrowed,
    possible_forms,
    why_impossible,
)
from spectrim.runtimes.rank_grid import Grid, multiple_of


@checked
def plan(
    analysis: Analysis,
    rule: Rule,
    *,
    metric: Metric | None = None,
    forms: Sequence[str] | None = None,
    rank_multiple: int | Grid | None = None,
    allow_growth: bool = False,
    latencies: LatencyTable | None = None,
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
        forms: Which of `channel`, `spatial`, `tucker2` convolutions may take, which of `linear`, `interpolative` linear
            layers and convolutions of one place, and whether layers may be narrowed together: `width` (the neurons of
            an MLP), `head_vo`, `head_qk` (values, queries and keys of an attention). By default a `Budget` in a data
            metric may use all of them (of MACs, latency, or of the body, none that saves numbers only:
            `interpolative`), and the other rules use the linear and the channel form; of several, those take the first
            that a layer has.
        rank_multiple: Use only ranks that are multiples of this number, or of the step that `st.probe` found, and full
            ones. By default 1, and under a budget of latency that of the table.
        allow_growth: Factor layers even when they grow (for tests and studies).
        latencies: From `st.latency_table`, for a budget of latency and only for that. Options that are slower than the
            layer are not taken. The plan notes what is predicted; `st.compress` also measures it.

    Raises:
        RuleError: a rank above the full rank of a layer it would apply to, a budget below what is reachable, a budget
            of latency without a table or with one of another runtime, or ranks that the table does not hold.
        PlanError: a metric that the analysis does not have, an unknown form, or a table of another network.
    """
    return plan_with(analysis, rule, PlanOptions(metric, forms, rank_multiple, allow_growth, latencies))


def plan_with(analysis: Analysis, rule: Rule, options: PlanOptions) -> Plan:
    """As `plan`."""
    if isinstance(rule, Budget):
        candidates = candidates_of(analysis, rule, options)
        return candidates.plan(rule, solve(candidates, rule, share=rule.share))
    metric, multiple = metric_of(analysis, options.metric, best=False), options.step
    forms = selected_forms(options.forms, closed_form=True)
    require_reachable(rule, _full_ranks(analysis, forms, metric))
    if options.latencies is not None:
        raise RuleError(f"latencies= belongs to a budget of latency, and the rule is {rule}")
    layers = tuple(_decide(layer, rule, metric=metric, forms=forms, options=options) for layer in analysis)
    return Plan(rule=rule, metric=metric, layers=layers, rank_multiple=multiple if multiple > 1 else None)


def _full_ranks(analysis: Analysis, forms: Sequence[str], metric: Metric) -> dict[str, tuple[Sequence[int], int]]:
    """The weight's shape, and the largest rank in the form that a per-layer rule would use, by the layer's name."""
    possible = ((layer, possible_forms(layer, forms, metric)) for layer in analysis)
    return {layer.name: (layer.shape, max(layer.full_ranks(own[0]))) for layer, own in possible if own}


def require_possible(analysis: Analysis, rule: Rule, options: PlanOptions, *, metric: Metric) -> None:
    """Check a rule against the shapes of the layers, before they are decomposed, and before any data are run.

    The plan is to be made in `metric`: all but `plain` give every layer a bias. A budget of latency is not checked,
    since nothing has been timed yet.

    Raises:
        RuleError: not a rule, a rank above the full rank of a layer, or a budget below what is reachable; says what is.
        PlanError: an unknown form.
    """
    if not isinstance(rule, Budget):
        require_reachable(rule, _full_ranks(analysis, selected_forms(options.forms, closed_form=True), "plain"))
    elif rule.limits != "latency":
        step, whole = multiple_of(options.rank_multiple) or 1, limits_whole_size(rule)
        forms = selected_forms(options.forms, for_size=whole)
        Candidates(analysis, rule.limits, metric, forms, step, lookups=whole).require(rule, share=rule.share)


def candidates_of(analysis: Analysis, rule: Budget, options: PlanOptions) -> Candidates:
    """Every candidate of every layer under a budget; raises as `plan` does."""
    candidates = Candidates.of(analysis, rule.limits, options, body=rule.of is not None)
    if rule.limits == "latency" and (timed := candidates.rule(rule.share)) != rule:
        raise RuleError(f"the latency table is for {timed}, and the rule is {rule}; make a table for that")
    return candidates


def refresh(edited: Plan, analysis: Analysis) -> Plan:
    """The plan with its forms, metrics and ranks as they are, and every other number computed anew from `analysis`.

    This is what makes editing the JSON by hand safe: only the decisions are taken from the file.

    Raises:
        PlanError: the plan names layers that this model does not have, has in other shapes, or cannot factor.
    """
    known = {layer.name: layer for layer in analysis}
    again: dict[str, LayerPlan] = {}
    for decided in edited.layers:
        layer = known.get(decided.name)
        if layer is None or layer.shape != decided.shape:
            here = f"has {decided.name} with shape {list(layer.shape)}" if layer else f"has no layer {decided.name!r}"
            raise PlanError(
                f"the plan is for another model: it wants {decided.name} with shape {list(decided.shape)}, "
                f"and this model {here}; make a plan for it with st.plan"
            )
        if decided.unit is None:
            again[decided.name] = _again(decided, layer, metric=edited.metric)
        elif decided.unit == decided.name:
            members = [*(known[feeder.name] for feeder in layer.feeders), layer]
            again |= {entry.name: entry for entry in _together(edited, decided, members)}
    alone = next((decided for decided in edited if decided.name not in again), None)
    if alone is not None:
        raise PlanError(
            f"the plan narrows {alone.name} together with {alone.unit}, which it does not narrow; remove the unit, "
            "form, rank and metric of the former"
        )
    layers = [again[decided.name] for decided in edited]
    same = all(new.form == old.form and new.kept == old.kept for new, old in zip(layers, edited, strict=True))
    # what was measured, and what divides the ranks, belongs to the ranks that stood there
    measured = {"rank_multiple": edited.rank_multiple, "latency": edited.latency} if same else {}
    return Plan(rule=edited.rule, metric=edited.metric, layers=tuple(layers)).model_copy(update=measured)


def _again(decided: LayerPlan, layer: LayerAnalysis, *, metric: Metric) -> LayerPlan:
    if not decided.is_factored or decided.metric is None:
        return dense(layer, reason=decided.reason, metric=metric, frozen=decided.frozen)
    if not layer.forms or layer.skip_reason:
        raise PlanError(f"the plan factors {layer.name}, which must stay dense: {layer.skip_reason}")
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
    full = layer.full_ranks(decided.form)
    if len(decided.ranks) != len(full):
        names = "rank" if len(full) == 1 else "rank_in and rank"
        raise PlanError(f"the plan wants {layer.name} in the {decided.form} form, which has {names}; give these")
    if any(rank > most for rank, most in zip(decided.ranks, full, strict=True)):
        raise PlanError(
            f"the plan wants rank {listed(decided.ranks)} for {layer.name}, above its full rank {listed(full)}"
        )
    fresh = factored(layer, decided.form, decided.ranks, metric=decided.metric, reason=decided.reason)
    if fresh.kept == decided.kept:
        return fresh
    return fresh.model_copy(update={"reason": f"rank {listed(decided.ranks)} set by hand in the plan"})


def _together(plan: Plan, decided: LayerPlan, members: Sequence[LayerAnalysis]) -> list[LayerPlan]:
    *feeders, last = members
    names, rank, metric = [layer.name for layer in feeders], decided.ranks, decided.metric
    there = {name: plan[name] for name in plan.feeders(last.name)}
    if decided.form not in last.joint_forms or sorted(there) != sorted(names):
        form = f"in the {' or '.join(last.joint_forms)} form " if names else ""
        raise PlanError(
            f"the plan narrows {last.name} in the {decided.form} form together with {', '.join(there) or 'nothing'}; "
            f"in this model it can be narrowed {form}together with {', '.join(names) or 'no other layer'}"
        )
    if any((entry.form, entry.ranks) != (decided.form, rank) for entry in there.values()):
        raise PlanError(
            f"the plan narrows {last.name} to rank {listed(rank)}, and {', '.join(names)} to another; give all the "
            "same form and rank"
        )
    if metric is None or metric == "plain" or metric not in last.problems:
        raise PlanError(f"the plan narrows {last.name} in the {metric} metric; pass data=, and plan activation or loss")
    if rank[0] > (full := last.full_ranks(decided.form)[0]):
        raise PlanError(f"the plan wants rank {rank[0]} for {last.name}, above its full rank {full}")
    fresh = narrowed(members, decided.form, rank, metric=metric, reason=decided.reason)
    if fresh[-1].kept == decided.kept:
        return fresh
    return [*fresh[:-1], fresh[-1].model_copy(update={"reason": f"rank {rank[0]} set by hand in the plan"})]


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
        layers = ", ".join(f"{name} {shape} has full rank {full}" for name, shape, full in short[:3])
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        raise RuleError(
            f"{rule} is above what some layers can have: {layers}{more}. "
            "Leave them out (exclude=.., or keep_last=True for the last layer) or choose a smaller rank"
        )


def _decide(
    layer: LayerAnalysis, rule: Rank | Ratio | Energy, *, metric: Metric, forms: Sequence[str], options: PlanOptions
) -> LayerPlan:
    possible, multiple = possible_forms(layer, forms, metric), options.step
    if not possible:
        reason = why_impossible(layer, metric) or f"it has no form among {', '.join(forms)}"
        return dense(layer, reason=reason, metric=metric)
    form = possible[0]
    ranks, because = _ranks(layer, form, rule, metric=metric)
    if multiple > 1:
        full = layer.full_ranks(form)
        ranks = tuple(min(most, -(-rank // multiple) * multiple) for rank, most in zip(ranks, full, strict=True))
        because += f", rounded up to a multiple of {multiple}"
    if not layer.shrinks(layer.cost(form, ranks, metric)) and not options.allow_growth:
        break_even = layer.break_even(form, metric)
        limit = f"only up to rank {break_even} (break-even)" if break_even else "at no rank"
        reason = f"rank {listed(ranks)} ({because}) would not be smaller; it shrinks {limit}"
        return dense(layer, reason=reason, metric=metric)
    return factored(layer, form, ranks, metric=metric, reason=because)


def _ranks(layer: LayerAnalysis, form: str, rule: Rank | Ratio | Energy, *, metric: Metric) -> tuple[Ranks, str]:
    """The ranks that a per-layer rule means in a form, and why."""
    full = layer.full_ranks(form)
    match rule:
        case Rank(rank=rank):
            return tuple(min(rank, most) for most in full), f"rank {rank} as asked"
        case Ratio(ratio=ratio):
            return tuple(rule.rank_of(most) for most in full), f"{ratio:.4g} of {listed(full)} singular values"
        case Energy(energy=energy):
            errors = layer.rank_errors(form, metric)
            enough = np.flatnonzero(errors.lost <= (1 - energy) * (1 + 1e-12))
            best = int(enough[np.argmin(errors.params[enough])]) if len(enough) else len(errors.lost) - 1
            because = f"holds {1 - errors.lost[best]:.4g} of the energy, at least {energy:.4g} asked"
            return tuple(int(rank) for rank in errors.ranks[best]), because
