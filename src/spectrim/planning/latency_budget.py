"""A budget of latency, decided by the clock: plans are tried against the dense network, and refined once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latency_table import latency_table
from spectrim.benchmark.measurement import batched
from spectrim.core.errors import RuleError
from spectrim.core.execution import Inputs, ProgressCallback
from spectrim.core.plans import DENSE, Budget, LayerPlan, Plan
from spectrim.layers.forms import form_named
from spectrim.layers.replacement import duplicate, factorize
from spectrim.linalg import Factors
from spectrim.planning.budgets import Candidates, out_of_reach, solve
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.rules import candidates_of
from spectrim.runtimes.sessions import Session, prepare
from spectrim.runtimes.timing import Interval, compare, interleaved

_ROUNDS = 31
_CLOSE, _FAR = 0.02, 0.05
"""A time this share above the target still meets it; one this far from its prediction shows the table to be off."""


class Verify(Protocol):
    """Builds the network of a plan and times it against the dense one."""

    def __call__(self, plan: Plan) -> Interval:
        """The share of the dense network's time, with its 95 % interval."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan that was tried.

    Attributes:
        plan: The plan, with its prediction.
        lost: What its layers lose together.
        measured: Its share of the dense network's time.
    """

    plan: Plan
    lost: float
    measured: Interval

    @property
    def predicted(self) -> float:
        """The share that was expected."""
        assert self.plan.latency is not None
        return self.plan.latency.predicted

    def meets(self, target: float) -> bool:
        """Whether the target is met, as well as can be measured."""
        return self.measured.value <= target * (1 + _CLOSE)


def plan_latency(
    model: nn.Module,
    example: Inputs,
    rule: Budget,
    *,
    analysis: Analysis,
    options: PlanOptions,
    on_progress: ProgressCallback | None = None,
) -> Plan:
    """The plan of a budget of latency: layers are timed, forms and ranks chosen, and the network they give is timed.

    Arguments and errors are those of `compress`; the model stays as it is.
    """
    assert rule.runtime is not None
    assert rule.threads is not None
    multiple = None if options.rank_multiple == "auto" else options.rank_multiple
    latencies = options.latencies or latency_table(
        model,
        example,
        analysis=analysis,
        runtime=rule.runtime,
        threads=rule.threads,
        batch=rule.batch,
        forms=options.forms,
        rank_multiple=multiple,
        on_progress=on_progress and (lambda name, done, of: on_progress(f"time {name}".strip(), done, of)),
    )
    candidates = candidates_of(analysis, rule, replace(options, rank_multiple=multiple, latencies=latencies))
    inputs = example if rule.batch is None else batched(example, rule.batch)
    with prepare(model, inputs, runtime=rule.runtime, threads=rule.threads) as dense:
        return refined(candidates, rule, verify=_Verification(model, analysis, inputs, rule, dense, on_progress))


@dataclass
class _Verification:
    """Times the network of a plan against the dense one, in turn, in the runtime of the budget."""

    model: nn.Module
    analysis: Analysis
    inputs: Inputs
    rule: Budget
    dense: Session
    on_progress: ProgressCallback | None
    tried: int = 0

    def __call__(self, plan: Plan) -> Interval:
        rule = self.rule
        assert rule.runtime is not None
        assert rule.threads is not None
        if self.on_progress is not None:
            self.on_progress(f"verify in {rule.runtime}", self.tried, self.tried + 1)
        self.tried += 1
        means = {name: zeros for layer in plan.factored for name, zeros in _no_means(self.analysis[layer.name]).items()}
        small = factorize(duplicate(self.model), plan, factors=self._factors, means=means)
        with prepare(small, self.inputs, runtime=rule.runtime, threads=rule.threads, checked=True) as session:
            timings = interleaved([session.timer(), self.dense.timer()], rounds=_ROUNDS)
        speedup = compare(*timings).ratio
        return Interval(value=1 / speedup.value, low=1 / speedup.high, high=1 / speedup.low)

    def _factors(self, layer: LayerPlan) -> Factors:
        """Random numbers: they take as long as the best ones, and need not be found."""
        unit, generator = self.analysis[layer.name].unit, torch.Generator().manual_seed(0)
        return form_named(layer.form).random_factors(unit, layer.ranks, generator=generator)


def _no_means(layer: LayerAnalysis) -> dict[str, Tensor]:
    """Means of 0, so that every layer gets the bias that correcting its mean gives it."""
    assert layer.geometry is not None
    zeros = torch.zeros(layer.geometry.groups, layer.geometry.width, dtype=torch.float64)
    return dict.fromkeys(layer.unit.names, zeros)


def refined(candidates: Candidates, rule: Budget, *, verify: Verify) -> Plan:
    """The plan that meets a budget of latency with the least loss, by the clock and not only by the table.

    Where the first plan's time is more than 5 % off its prediction, or misses the target, the predicted savings are
    scaled by what was really saved, and forms and ranks are chosen once more. Of both plans the one that meets the
    target with less loss is taken, or the faster one where neither does. If that is not surely faster than the dense
    network, every layer stays dense, and the plan says so.

    The table alone never decides that a budget is out of reach: a network that has become small enough for the
    processor's caches takes less time than the sum of its layers.

    Raises:
        RuleError: no layer would be faster in factors, or the fastest network misses the budget; says what it takes.
    """
    # rounded up, so that the table itself holds it
    target, least = rule.share, candidates.least / candidates.whole + 1e-9
    if not candidates.cheapest:
        raise RuleError(out_of_reach(candidates, rule, least))
    first = _verified(candidates, solve(candidates, rule, share=max(target, least)), rule, verify)
    tried = [first]
    if abs(first.measured.value - first.predicted) > _FAR * first.predicted or not first.meets(target):
        solution = solve(candidates, rule, share=max(least, _rescaled(first, target)))
        if candidates.plan(rule, solution).layers != first.plan.layers:
            tried.append(_verified(candidates, solution, rule, verify))
    meeting = [candidate for candidate in tried if candidate.meets(target)]
    fastest = min(tried, key=lambda candidate: candidate.measured.value)
    best = min(meeting, key=lambda candidate: candidate.lost) if meeting else fastest
    if least > target and not meeting:
        raise RuleError(out_of_reach(candidates, rule, best.measured.value, how="measured"))
    return _with_measured(best, target, solved=len(tried))


def _verified(candidates: Candidates, solution: Sequence[int], rule: Budget, verify: Verify) -> _Candidate:
    plan = candidates.plan(rule, solution)
    return _Candidate(plan, candidates.lost(solution), verify(plan))


def _rescaled(first: _Candidate, target: float) -> float:
    """The share to ask the table for, so that what is really saved is what is wanted; 0 where nothing was saved."""
    gain = (1 - first.measured.value) / (1 - first.predicted)
    return 1 - (1 - target) / gain if gain > 0 else 0.0


def _with_measured(best: _Candidate, target: float, *, solved: int) -> Plan:
    """The best plan with what was measured; all dense where it is not surely faster."""
    note, share = best.plan.latency, best.measured
    assert note is not None
    took = f"{share.value:.3f} of the dense time in {note.runtime} (95 % interval {share.low:.3f} to {share.high:.3f})"
    update: dict[str, Any] = {"measured": share.value, "low": share.low, "high": share.high, "solved": solved}
    if share.high >= 1:
        plan = best.plan.model_copy(update={"latency": note.model_copy(update=update)})
        return refused(plan, reason=f"not surely faster: measured {took}")
    update["missed"] = None
    if not best.meets(target):
        update["missed"] = f"the target is {target:g}, and the fastest network found takes {took}"
    return best.plan.model_copy(update={"latency": note.model_copy(update=update)})


def refused(plan: Plan, *, reason: str) -> Plan:
    """The same plan with every layer dense, and why."""
    assert plan.latency is not None
    layers = tuple(_dense_again(layer, reason=reason) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers, "latency": plan.latency.model_copy(update={"refused": reason})})


def _dense_again(layer: LayerPlan, *, reason: str) -> LayerPlan:
    if not layer.is_factored:
        return layer
    undone = {"form": DENSE, "rank": None, "rank_in": None, "metric": None, "predicted_error": None}
    return layer.model_copy(update={**undone, "kept": layer.dense, "reason": reason})
