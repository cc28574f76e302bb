"""A budget of time, decided by the clock: plans are tried against the dense network, and corrected once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectrim.core.errors import RuleError
from spectrim.core.plans import Budget, LayerPlan, Plan
from spectrim.planning.budgets import Options, out_of_reach, picked_at
from spectrim.runtimes.timing import Interval


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


_CLOSE, _FAR = 0.02, 0.05
"""A time this share above the target still meets it; one this far from its prediction shows the table to be off."""

Verify = Callable[[Plan], Interval]
"""Builds the network of a plan and times it against the dense one: its share of the dense time, with the interval."""


def settled(options: Options, rule: Budget, *, verify: Verify) -> Plan:
    """The plan that meets a budget of latency with the least loss, by the clock and not only by the table.

    Where the first plan's time is more than 5 % off its prediction, or misses the target, the predicted savings are
    scaled by what was saved in truth, and forms and ranks are chosen once more. Of both plans the one that meets the
    target with less loss is taken, or the faster one where neither does. Is that not surely faster than the dense
    network, every layer stays dense, and the plan says so.

    What is out of reach is never told by the table alone: a network that has become small enough for the processor's
    caches takes less than the sum of its layers.

    Raises:
        RuleError: no layer would be faster in factors, or the fastest network misses the budget; says what it takes.
    """
    # rounded up, so that the table itself holds it
    target, least = rule.share, options.least / options.whole + 1e-9
    if not options.cheapest:
        raise RuleError(out_of_reach(options, rule, least))
    first = _judged(options, rule, picked_at(options, rule, share=max(target, least)), verify)
    tried = [first]
    if abs(first.measured.value - first.predicted) > _FAR * first.predicted or not first.meets(target):
        picked = picked_at(options, rule, share=max(least, _rescaled(first, target)))
        if options.plan(rule, picked).layers != first.plan.layers:
            tried.append(_judged(options, rule, picked, verify))
    meeting = [one for one in tried if one.meets(target)]
    best = min(meeting, key=lambda one: one.lost) if meeting else min(tried, key=lambda one: one.measured.value)
    if least > target and not meeting:
        raise RuleError(out_of_reach(options, rule, best.measured.value, how="measured"))
    return _noted(best, target, solved=len(tried))


def _judged(options: Options, rule: Budget, picked: Sequence[int], verify: Verify) -> _Candidate:
    plan = options.plan(rule, picked)
    return _Candidate(plan, options.lost(picked), verify(plan))


def _rescaled(first: _Candidate, target: float) -> float:
    """The share to ask the table for, so that what is saved in truth is what is wanted; 0 where nothing was saved."""
    gain = (1 - first.measured.value) / (1 - first.predicted)
    return 1 - (1 - target) / gain if gain > 0 else 0.0


def _noted(best: _Candidate, target: float, *, solved: int) -> Plan:
    """The best plan with what was measured; all dense where it is not surely faster."""
    note, share = best.plan.latency, best.measured
    assert note is not None
    said = f"{share.value:.3f} of the dense time in {note.runtime} (95 % interval {share.low:.3f} to {share.high:.3f})"
    seen = {"measured": share.value, "low": share.low, "high": share.high, "solved": solved}
    if share.high >= 1:
        why = f"not surely faster: measured {said}"
        return refused(best.plan.model_copy(update={"latency": note.model_copy(update=seen)}), reason=why)
    missed = None if best.meets(target) else f"the target is {target:g}, and the fastest network found takes {said}"
    return best.plan.model_copy(update={"latency": note.model_copy(update={**seen, "missed": missed})})


def refused(plan: Plan, *, reason: str) -> Plan:
    """The same plan with every layer dense, and why."""
    assert plan.latency is not None
    layers = tuple(_left(layer, reason=reason) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers, "latency": plan.latency.model_copy(update={"refused": reason})})


def _left(layer: LayerPlan, *, reason: str) -> LayerPlan:
    if layer.form == "dense":
        return layer
    undone = {"form": "dense", "rank": None, "rank_in": None, "metric": None, "predicted_error": None}
    return layer.model_copy(update={**undone, "kept": layer.dense, "reason": reason})
