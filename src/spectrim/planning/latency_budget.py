"""A budget of latency, decided by the clock: plans are tried against the dense network, and refined once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.latency_table import latency_table
from spectrim.benchmark.measurement import resized
from spectrim.core.errors import RuleError
from spectrim.core.execution import Inputs, ProgressCallback
from spectrim.core.plans import DENSE, Budget, LayerPlan, Plan
from spectrim.layers.forms import form_named
from spectrim.layers.replacement import duplicate, factorize
from spectrim.layers.unfusing import fused
from spectrim.linalg import Factors
from spectrim.planning.budgets import Candidates, solve
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.reach import out_of_reach
from spectrim.planning.rules import candidates_of
from spectrim.runtimes.sessions import Runtime, Session, require_runtime
from spectrim.runtimes.timing import Interval, compare, interleaved

_ROUNDS = 31
_CLOSE, _FAR = 0.02, 0.05
"""A time this share above the target still meets it; one this far from its prediction shows the table to be off."""

Verify = Callable[[Plan], Interval]
"""Builds the network of a plan and times it: its share of the dense network's time, with the 95 % interval."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan with its prediction, what its layers lose together, and its measured share of the dense network's time."""

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
    multiple = None if options.rank_multiple == "auto" else options.rank_multiple
    runtime = require_runtime(rule.runtime or "torch", threads=rule.threads or 1)
    latencies = options.latencies or latency_table(
        model,
        example,
        analysis=analysis,
        runtime=runtime.name,
        threads=runtime.threads,
        batch=rule.batch,
        forms=options.forms,
        rank_multiple=multiple,
        on_progress=on_progress and (lambda name, done, of: on_progress(f"time {name}".strip(), done, of)),
    )
    candidates = candidates_of(analysis, rule, replace(options, rank_multiple=multiple, latencies=latencies))
    inputs = resized(example, rule.batch)
    with runtime.prepare(fused(model), inputs) as dense:
        verify = _Verification(model, analysis, inputs, runtime, dense, on_progress)
        return refined(candidates, rule, verify=verify)


@dataclass
class _Verification:
    """Times the network of a plan against the dense one, in turn, in the runtime of the budget."""

    model: nn.Module
    analysis: Analysis
    inputs: Inputs
    runtime: Runtime
    dense: Session
    on_progress: ProgressCallback | None
    tried: int = 0

    def __call__(self, plan: Plan) -> Interval:
        if self.on_progress is not None:
            self.on_progress(f"verify in {self.runtime}", self.tried, self.tried + 1)
        self.tried += 1
        small = fused(factorize(duplicate(self.model), plan, factors=self._factors, means=self._means(plan)))
        with self.runtime.prepare(small, self.inputs, checked=True) as session:
            timings = interleaved([session.timer(), self.dense.timer()], rounds=_ROUNDS)
        speedup = compare(*timings).ratio
        return Interval(value=1 / speedup.value, low=1 / speedup.high, high=1 / speedup.low)

    def _factors(self, layer: LayerPlan) -> Factors:
        """Random numbers: they take as long as the best factors, which would first have to be fitted."""
        if layer.unit:
            return self.analysis.factors(layer)
        unit, generator = self.analysis[layer.name].unit, torch.Generator().manual_seed(0)
        return form_named(layer.form).random_factors(unit, layer.ranks, generator=generator)

    def _means(self, plan: Plan) -> dict[str, Tensor]:
        """Means of 0, so that every layer gets the bias that correcting its mean gives it."""
        means: dict[str, Tensor] = {}
        for layer in plan.factored:
            geometry = self.analysis[layer.name].geometry
            assert geometry is not None
            zeros = torch.zeros(geometry.groups, geometry.width, dtype=torch.float64)
            means |= dict.fromkeys(self.analysis[layer.name].names, zeros)
        return means


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
    # rounded up, so that the table itself can meet it
    target, least = rule.share, candidates.least / candidates.whole + 1e-9
    if candidates.least >= candidates.whole:
        raise RuleError(out_of_reach(candidates, rule, least))
    solution = solve(candidates, rule, share=max(target, least))
    first = _verified(candidates, solution, rule, verify)
    tried, is_off = [first], abs(first.measured.value - first.predicted) > _FAR * first.predicted
    if is_off or not first.meets(target):
        corrected = solve(candidates, rule, share=max(least, _rescaled(first, target)))
        if corrected != solution:
            tried.append(_verified(candidates, corrected, rule, verify))
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
    """The share to ask the table for, so that the target is really met; by twice of what was missed less, at most.

    Close to the dense time what was saved may be less than nothing, which says nothing of other plans.
    """
    gain, missed = (1 - first.measured.value) / (1 - first.predicted), first.measured.value - target
    share = 1 - (1 - target) / gain if gain > 0 else 0.0
    return max(share, first.predicted - 2 * missed) if missed > 0 else share


def _with_measured(best: _Candidate, target: float, *, solved: int) -> Plan:
    """The best plan with what was measured; all dense where it is not surely faster."""
    note, share = best.plan.latency, best.measured
    assert note is not None
    took = f"{share.value:.3f} of the dense time in {note.runtime} (95 % interval {share.low:.3f} to {share.high:.3f})"
    update: dict[str, Any] = {"measured": share.value, "low": share.low, "high": share.high, "solved": solved}
    is_faster = share.high < 1
    if is_faster and not best.meets(target):
        update["missed"] = f"the target is {target:g}, and the fastest network found takes {took}"
    plan = best.plan.model_copy(update={"latency": note.model_copy(update=update)})
    return plan if is_faster else refused(plan, reason=f"not surely faster: measured {took}")


def refused(plan: Plan, *, reason: str) -> Plan:
    """The same plan with every layer dense, and why."""
    assert plan.latency is not None
    nothing = dict.fromkeys(("rank", "rank_in", "metric", "predicted_error", "unit"))
    undone = {"form": DENSE, **nothing, "reason": reason}
    layers = tuple(own.model_copy(update=undone | {"kept": own.dense}) if own.is_factored else own for own in plan)
    return plan.model_copy(update={"layers": layers, "latency": plan.latency.model_copy(update={"refused": reason})})
