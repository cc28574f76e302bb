"""A rule and an analysis give a plan: pure numbers, no network."""

from collections.abc import Mapping, Sequence

from spectrim.analyze import Analysis, LayerAnalysis
from spectrim.errors import PlanError, RuleError
from spectrim.linalg import Spectrum
from spectrim.plan import Energy, LayerPlan, Metric, Plan, Rank, Ratio, Rule


def plan(analysis: Analysis, rule: Rule, *, metric: Metric | None = None, allow_growth: bool = False) -> Plan:
    """Decide the form and the rank of every layer.

    A layer whose factors would not be smaller than itself stays dense, with the break-even rank as the reason.

    Args:
        analysis: From `st.analyze`.
        rule: `Rank`, `Ratio` or `Energy`, applied to each layer by itself.
        metric: `plain` or `activation`; by default the activation metric where the analysis has it.
        allow_growth: Factor layers even when they grow (for tests and studies).

    Raises:
        RuleError: a rank above the full rank of a layer it would apply to.
        PlanError: a metric that the analysis does not have.
    """
    metric = metric or analysis.metrics[-1]
    if metric not in analysis.metrics:
        raise PlanError(
            f"the analysis has no {metric} metric, only {', '.join(analysis.metrics)}; "
            "pass calibration=st.calibrate(model, batches) to st.analyze"
        )
    sizes = {layer.name: (layer.shape, layer.full_rank) for layer in analysis if layer.form and not layer.refusal}
    require_reachable(rule, sizes)
    layers = tuple(_decide(layer, rule, metric=metric, allow_growth=allow_growth) for layer in analysis)
    return Plan(rule=rule, metric=metric, layers=layers)


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
    if decided.form == "dense" or decided.rank is None or decided.metric is None:
        return _dense(layer, reason=decided.reason, metric=metric)
    if layer.form is None or layer.refusal:
        raise PlanError(f"the plan factors {layer.name}, which must stay dense: {layer.refusal}")
    if decided.metric not in layer.spectra:
        raise PlanError(
            f"the plan wants {layer.name} in the {decided.metric} metric, and there is no calibration data for it; "
            "pass data= (or change the metric in the plan to plain)"
        )
    if decided.rank > layer.full_rank:
        raise PlanError(f"the plan wants rank {decided.rank} for {layer.name}, above its full rank {layer.full_rank}")
    fresh = _factored(layer, rank=decided.rank, metric=decided.metric, reason=decided.reason)
    stale = fresh.predicted_error is not None and fresh.kept != decided.kept
    return fresh.model_copy(update={"reason": f"rank {decided.rank} set by hand in the plan"}) if stale else fresh


def require_reachable(rule: Rule, sizes: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """Check a rule against the layers it is meant for, by name their weight's shape and full rank, before long work.

    Raises:
        RuleError: not a rule, or a rank above the full rank of a layer.
    """
    if not isinstance(rule, Rank | Ratio | Energy):
        raise RuleError(f"{rule!r} is not a rule; give Rank(20), Ratio(0.25) or Energy(0.9)")
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


def _decide(layer: LayerAnalysis, rule: Rule, *, metric: Metric, allow_growth: bool) -> LayerPlan:
    if layer.form is None or layer.refusal:
        return _dense(layer, reason=layer.refusal or "it has no factored form", metric=metric)
    if metric not in layer.spectra:
        return _dense(layer, reason="the calibration data did not reach it", metric=metric)
    rank, because = _rank(layer.spectra[metric], rule)
    break_even = layer.break_even(metric)
    if rank > break_even and not allow_growth:
        limit = f"only up to rank {break_even} (break-even)" if break_even else "at no rank"
        return _dense(layer, reason=f"rank {rank} ({because}) would not be smaller; it shrinks {limit}", metric=metric)
    return _factored(layer, rank=rank, metric=metric, reason=because)


def _rank(spectrum: Spectrum, rule: Rule) -> tuple[int, str]:
    full = len(spectrum)
    match rule:
        case Rank(rank=rank):
            return rank, f"rank {rank} as asked"
        case Ratio(ratio=ratio):
            # the small addition keeps 0.29 * 100 from becoming 28
            return max(1, int(ratio * full + 1e-9)), f"{ratio:.4g} of {full} singular values"
        case Energy(energy=energy):
            rank = spectrum.rank_for(energy)
            return rank, f"holds {spectrum.cumulative_energy[rank - 1]:.4g} of the energy, at least {energy:.4g} asked"


def _factored(layer: LayerAnalysis, *, rank: int, metric: Metric, reason: str) -> LayerPlan:
    assert layer.form is not None
    return LayerPlan(
        name=layer.name,
        also=layer.also,
        kind=layer.kind,
        shape=layer.shape,
        form=layer.form,
        metric=metric,
        rank=rank,
        full_rank=layer.full_rank,
        break_even=layer.break_even(metric),
        predicted_error=layer.spectra[metric].error_at(rank),
        dense=layer.dense,
        kept=layer.cost(rank=rank, metric=metric),
        reason=reason,
    )


def _dense(layer: LayerAnalysis, *, reason: str, metric: Metric) -> LayerPlan:
    return LayerPlan(
        name=layer.name,
        also=layer.also,
        kind=layer.kind,
        shape=layer.shape,
        form="dense",
        full_rank=layer.full_rank or None,
        break_even=layer.break_even(metric) if layer.form else None,
        dense=layer.dense,
        kept=layer.dense,
        reason=reason,
    )
