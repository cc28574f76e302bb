"""One layer's decision as a value: factored at some ranks, or dense, and what may be chosen from."""

from collections.abc import Sequence
from typing import Literal

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.errors import PlanError, RuleError
from spectrim.core.plans import CONVOLUTION_FORMS, FormName, LayerPlan, Metric
from spectrim.linalg import Ranks
from spectrim.runtimes.rank_grid import Grid


def metric_of(analysis: Analysis, metric: Metric | None, *, best: bool) -> Metric:
    """The metric asked for, or the usual one: the best that there is, or activation before plain."""
    usual: Metric = "activation" if "activation" in analysis.metrics else "plain"
    chosen = metric or (analysis.metrics[-1] if best else usual)
    if chosen not in analysis.metrics:
        how = "with gradients=True " if chosen == "loss" else ""
        raise PlanError(
            f"the analysis has no {chosen} metric, only {', '.join(analysis.metrics)}; "
            f"pass calibration=st.calibrate(model, batches) {how}to st.analyze"
        )
    return chosen


def multiple_of(rank_multiple: int | Grid | Literal["auto"] | None) -> int:
    """The number that ranks must be multiples of; raises `RuleError` for what is none."""
    number = rank_multiple.multiple if isinstance(rank_multiple, Grid) else rank_multiple
    if number is None:
        return 1
    if number == "auto":
        raise RuleError(
            "rank_multiple='auto' has to probe the hardware, which a plan does not: "
            "give st.probe(runtime=.., threads=..), or let st.compress do it"
        )
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RuleError(f"rank_multiple={rank_multiple!r}: give a whole number of at least 1, such as 8")
    return number


def forms_among(forms: Sequence[FormName] | None, default: tuple[FormName, ...]) -> tuple[FormName, ...]:
    """The forms that may be used; the linear form, which layers without a kernel have, always may."""
    chosen = default if forms is None else (forms,) if isinstance(forms, str) else tuple(forms)
    unknown = [form for form in chosen if form not in ("linear", *CONVOLUTION_FORMS)]
    if unknown or not chosen:
        raise PlanError(f"forms={forms!r}: give some of {', '.join(CONVOLUTION_FORMS)}")
    return ("linear", *chosen)


def possible_forms(layer: LayerAnalysis, forms: Sequence[FormName], metric: Metric) -> list[FormName]:
    """The allowed forms of a layer, in the order of `forms`; none for a layer that must stay dense."""
    if layer.refusal or metric not in layer.problems:
        return []
    # a transposed or one-dimensional convolution has no other form than channel
    only = [layer.forms[0]] if len(layer.forms) == 1 else []
    return [form for form in dict.fromkeys((*forms, *only)) if form in layer.forms]


def why_impossible(layer: LayerAnalysis, metric: Metric) -> str | None:
    """Why a layer must stay dense whatever the rule, or None."""
    if not layer.forms or layer.refusal:
        return layer.refusal or "it has no factored form"
    if metric in layer.problems:
        return None
    reached = metric == "loss" and "activation" in layer.problems
    return "the network's outputs do not feel it" if reached else "the calibration data did not reach it"


def factored(layer: LayerAnalysis, form: FormName, ranks: Ranks, *, metric: Metric, reason: str) -> LayerPlan:
    """A layer in a form at some ranks, with all its numbers."""
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


def dense(layer: LayerAnalysis, *, reason: str, metric: Metric, fixed: bool = False) -> LayerPlan:
    """A layer as it is; `fixed` for one that nothing may change, as layers that cannot be factored are anyway."""
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


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return " and ".join(map(str, ranks))
