"""The one-call path: calibrate, analyse, plan, replace, count what was gained."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from spectrim.analyze import Analysis, analyze, survey
from spectrim.calibrate import calibrate
from spectrim.errors import PlanError
from spectrim.execution import Inputs, as_inputs
from spectrim.factorize import duplicate, factorize
from spectrim.forms import geometry
from spectrim.measure import Measurement, count
from spectrim.plan import FormName, Metric, Plan, Rule
from spectrim.ranks import plan as make_plan
from spectrim.ranks import refresh, require_reachable
from spectrim.reconstruct import Told
from spectrim.reconstruct import reconstruct as rebuild
from spectrim.surgery import Patterns


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model, the plan it was made by, and what it costs against its dense self (not timed)."""

    model: nn.Module
    plan: Plan
    measurement: Measurement


def compress(
    model: nn.Module,
    rule_or_plan: Rule | Plan,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    metric: Metric | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    allow_growth: bool = False,
    analysis: Analysis | None = None,
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | None = None,
    reconstruct: Literal["auto"] | bool = "auto",
    on_progress: Told | None = None,
    inplace: bool = False,
) -> Compressed:
    """Replace the layers of a trained network by low-rank factors.

    Without `data` each weight is approximated by itself (plain metric: truncated SVD, Eckart & Young 1936). With
    `data`, what counts is each layer's output on them (activation metric), and biases are corrected so that the mean
    output is exact. A layer that would not become smaller stays dense, and the plan says why.

    Args:
        model: A trained module; left bit-identical unless `inplace`.
        rule_or_plan: `Rank(20)`, `Ratio(0.25)`, `Energy(0.9)`, or a `Plan` (selection is then the plan's).
        example_inputs: One call's inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        data: Calibration batches, with or without labels (one element more than `example_inputs` is a label).
        max_batches: Use at most so many calibration batches.
        metric: `plain` or `activation`; by default activation when there is `data`.
        include: Patterns of layer names to factor, as in a shell.
        exclude: Patterns of layer names to leave dense.
        keep_last: Leave the last layer that the model calls dense.
        allow_growth: Factor a layer even if it grows.
        analysis: From `st.analyze` on this very model; saves calibrating and decomposing again for every rank.
        inplace: Change `model` itself and return it.

    Returns:
        The model (in the same training mode), the plan, and the counted costs.

    Raises:
        SpectrimError: one of its kinds, before anything has been changed.
    """
    selected = include != ("*",) or bool(exclude) or keep_last
    if isinstance(rule_or_plan, Plan) and (selected or metric or allow_growth):
        raise PlanError("a plan already says which layers and metric; give include, exclude, metric to st.plan instead")
    if analysis is not None and (selected or data is not None):
        raise PlanError("an analysis already has its layers and data; give include, exclude, calibration to st.analyze")
    batches = [as_inputs(batch) for batch in _unlabelled(data or (), as_inputs(example_inputs))][:max_batches]
    if analysis is None:
        layers = _layers(model, example_inputs, rule_or_plan, include=include, exclude=exclude, keep_last=keep_last)
        wanted = data is not None and metric != "plain" and _uses_data(rule_or_plan)
        analysis = analyze(
            model,
            example_inputs,
            calibration=calibrate(model, batches, layers=layers) if wanted else None,
            include=include,
            exclude=exclude,
            keep_last=keep_last,
        )
    if isinstance(rule_or_plan, Plan):
        plan = refresh(rule_or_plan, analysis)
    else:
        plan = make_plan(
            analysis, rule_or_plan, metric=metric, forms=forms, rank_multiple=rank_multiple, allow_growth=allow_growth
        )
    dense = count(model, example_inputs)
    moments = analysis.calibration.moments if analysis.calibration else {}
    factors = {
        layer.name: analysis[layer.name].decomposition(layer.form, layer.metric).factors(layer.ranks)
        for layer in plan.factored
        if layer.metric is not None
    }
    smaller = model if inplace else duplicate(model)
    if reconstruct and batches:
        refit = {layer.name for layer in analysis if layer.problems}
        smaller = rebuild(model, smaller, plan, batches=batches, factors=factors, refit=refit, on_progress=on_progress)
    else:
        smaller = factorize(smaller, plan, factors=factors, means={name: one.mean for name, one in moments.items()})
    return Compressed(smaller, plan, count(smaller, example_inputs).against(dense))


def _layers(
    model: nn.Module,
    example_inputs: Any,
    rule_or_plan: Rule | Plan,
    *,
    include: Patterns,
    exclude: Patterns,
    keep_last: bool,
) -> set[str]:
    """Names of the layers that need statistics; every mistake that can be seen without data is raised here."""
    targets, _ = survey(model, example_inputs, include=include, exclude=exclude, keep_last=keep_last)
    open_to = [target for target in targets if target.refusal is None]
    if isinstance(rule_or_plan, Plan):
        planned = {layer.name for layer in rule_or_plan.factored if layer.metric == "activation"}
        open_to = [target for target in open_to if target.name in planned]
    else:
        sizes = {
            target.name: (
                target.module.get_parameter("weight").shape,
                min(geometry(target.module).out, geometry(target.module).width),
            )
            for target in open_to
        }
        require_reachable(rule_or_plan, sizes)
    return {site for target in open_to for site in target.sites}


def _uses_data(rule_or_plan: Rule | Plan) -> bool:
    plan = rule_or_plan
    return not isinstance(plan, Plan) or any(layer.metric == "activation" for layer in plan.factored)


def _unlabelled(data: Iterable[Any], example: Inputs) -> Iterator[Any]:
    """The batches without what they have beyond the example's inputs: their labels."""
    wanted = len(example.args) or 1
    for batch in data:
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == wanted + 1:
            yield batch[0] if example.kwargs or wanted == 1 else batch[:-1]
        else:
            yield batch
