"""One layer's decision as a value: factored at some ranks, or dense, and what may be chosen from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spectrim.analysis.spectra import LayerAnalysis
from spectrim.benchmark.latencies import LatencyTable
from spectrim.core.errors import RuleError
from spectrim.core.plans import DENSE, Budget, LayerPlan, Limit, Metric, Plan, Rule
from spectrim.layers.forms import allowed_forms, joint_form_named
from spectrim.layers.selection import LOOKUP
from spectrim.linalg import Ranks
from spectrim.runtimes.rank_grid import Grid, multiple_of


@dataclass(frozen=True)
class PlanOptions:
    """What a caller may say of a plan besides the rule: the arguments of `st.plan`."""

    metric: Metric | None = None
    forms: Sequence[str] | str | None = None
    rank_multiple: int | Grid | Literal["auto"] | None = None
    allow_growth: bool = False
    latencies: LatencyTable | None = None

    @property
    def is_default(self) -> bool:
        """Whether nothing was said."""
        return self == PlanOptions()

    @property
    def step(self) -> int:
        """The number that ranks must be multiples of; raises `RuleError` for anything else."""
        if self.rank_multiple == "auto":
            raise RuleError(
                "rank_multiple='auto' has to probe the hardware, which a plan does not: "
                "give st.probe(runtime=.., threads=..), or let st.compress do it"
            )
        return multiple_of(self.rank_multiple) or 1


def limits_whole_size(rule_or_plan: Rule | Plan) -> bool:
    """Whether the whole network's size counts: then embeddings may be factored, and forms taken that save no time."""
    if isinstance(rule_or_plan, Plan):
        return limits_whole_size(rule_or_plan.rule)
    return isinstance(rule_or_plan, Budget) and rule_or_plan.limits in SIZES and rule_or_plan.of is None


def takes_layers_together(rule_or_plan: Rule | Plan) -> bool:
    """Whether layers may be narrowed together."""
    if isinstance(rule_or_plan, Plan):
        return any(layer.unit for layer in rule_or_plan)
    return isinstance(rule_or_plan, Budget)


SIZES = ("params", "bytes")


def possible_forms(
    layer: LayerAnalysis, forms: Sequence[str], metric: Metric, *, limit: Limit | None = None
) -> list[str]:
    """The allowed forms of a layer, in the order of `forms`; none for a layer that must stay dense.

    `limit` is what a budget limits; rules for single layers have none.
    """
    return [] if why_impossible(layer, metric, limit=limit) else allowed_forms(layer.forms, forms)


def why_impossible(layer: LayerAnalysis, metric: Metric, *, limit: Limit | None = None) -> str | None:
    """Why a layer must stay dense whatever the rank, or None."""
    if not layer.forms or layer.skip_reason:
        return layer.skip_reason or "it has no factored form"
    if layer.is_lookup and limit not in SIZES:
        return LOOKUP
    if metric in layer.problems:
        return None
    if metric == "loss" and "activation" in layer.problems:
        return "no gradient of the network's outputs reaches it"
    return "the calibration data did not reach it, or only inside of torch.func"


def factored(layer: LayerAnalysis, form: str, ranks: Ranks, *, metric: Metric, reason: str) -> LayerPlan:
    """A layer in a form at some ranks, with all its numbers."""
    planned = {
        "form": form,
        "metric": metric,
        "rank": ranks[-1],
        "rank_in": ranks[0] if len(ranks) > 1 else None,
        "full_rank": layer.full_ranks(form)[-1],
        "break_even": layer.break_even(form, metric),
        "predicted_error": layer.error(form, ranks, metric),
        "kept": layer.cost(form, ranks, metric),
        "frozen": False,
    }
    return dense(layer, reason=reason, metric=metric).model_copy(update=planned)


def narrowed(
    layers: Sequence[LayerAnalysis], form: str, ranks: Ranks, *, metric: Metric, reason: str
) -> list[LayerPlan]:
    """Layers in a form that narrows them together, the last of which reads what the others give."""
    *feeders, last = layers
    entry = factored(last, form, ranks, metric=metric, reason=reason).model_copy(update={"unit": last.name})
    shared = entry.model_dump(include={"form", "metric", "rank", "full_rank", "break_even", "unit"})
    planned = []
    for layer in feeders:
        alone = dense(layer, reason=f"narrowed together with {last.name}", metric=metric)
        cost = joint_form_named(form).feeder_cost(last.unit, layer.weight, ranks)
        planned.append(alone.model_copy(update=shared | {"predicted_error": 0.0, "kept": cost, "frozen": False}))
    return [*planned, entry]


def dense(layer: LayerAnalysis, *, reason: str, metric: Metric, frozen: bool = False) -> LayerPlan:
    """A layer as it is; `frozen` for one that nothing may change, as layers that cannot be factored are anyway."""
    return LayerPlan(
        name=layer.name,
        tied_names=layer.tied_names,
        kind=layer.kind,
        shape=layer.shape,
        form=DENSE,
        full_rank=layer.full_rank or None,
        break_even=layer.break_even(layer.forms[0], metric) if layer.forms else None,
        dense=layer.dense,
        kept=layer.dense,
        frozen=frozen or not layer.problems,
        stack=layer.stack,
        reason=reason,
    )


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return " and ".join(map(str, ranks))
