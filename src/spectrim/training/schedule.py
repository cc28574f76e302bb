"""Ranks that change while a truncated network trains: by energy, under a falling budget, or by a penalty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch.optim import Optimizer

from spectrim.core.errors import RuleError, TrainingError
from spectrim.core.execution import as_inputs
from spectrim.core.files import Frozen
from spectrim.core.plans import Budget, Energy
from spectrim.layers.cost import count_macs
from spectrim.layers.forms import forms_of
from spectrim.layers.tracing import trace
from spectrim.layers.types import Positions
from spectrim.linalg import Spectrum
from spectrim.planning.knapsack import Allocation, KnapsackItem
from spectrim.training.truncated import Truncation


@dataclass(frozen=True)
class NuclearNorm:
    """A penalty of `strength` times the sum of all singular values of every weight, above 0, on the scale of the loss.

    It acts by its proximal operator, soft-thresholding of the singular values (Cai, Candes & Shen 2010): values that
    the loss does not support reach 0, and the rank falls with them.
    """

    strength: float

    def __post_init__(self) -> None:
        strength = self.strength
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < math.inf:
            raise RuleError(f"NuclearNorm({strength!r}): a strength is a number above 0, such as NuclearNorm(1e-3)")

    def __str__(self) -> str:
        return f"NuclearNorm({self.strength:g})"


class RankStep(Frozen):
    """The ranks by layer name after a change, at optimiser step `step`; 0 for the ranks at the start.

    `kept` is what the network would cost if it were finished now, kept / dense: parameters, or MACs under a budget of
    MACs.
    """

    step: int = Field(ge=0)
    ranks: Mapping[str, int]
    kept: float = Field(ge=0)


class _State(Frozen):
    schedule: str
    step: int = Field(default=0, ge=0)
    held: dict[str, float] = Field(default_factory=dict)
    owed: dict[str, float] = Field(default_factory=dict)
    history: tuple[RankStep, ...] = ()


@dataclass(eq=False, repr=False)
class RankSchedule:
    """Change the ranks of a truncated network while it trains, from any loop.

        truncation = st.training.truncated_(model, st.Ratio(1.0), trainable_rank=True)
        ranks = st.training.RankSchedule(st.Budget(params=0.1), every=50, end=2000)
        for x, y in batches:
            ...
            optimizer.step()
            ranks.step(truncation, optimizer)
        small = truncation.finish()

    In a `TrainingRun` that is `on_step=lambda _: ranks.step(truncation)`. At every `every`-th step from `begin` to
    `end`, and at `end` itself:

    - `Energy`: each layer takes the smallest rank that has enough of the energy of W. Energy that W has lost already,
      since its residual decays, still counts as lost; otherwise the same share would be lost again and again.
    - `Budget`: the budget falls from what the network costs at the first step to the rule's share at `end`, fast at
      first and slowly in the end (cubic; Zhu & Gupta 2017), and is never exceeded. The ranks of all layers are chosen
      together, so that the sum of the lost shares of their energies is least; a layer may also be left dense.
    - `NuclearNorm`: the singular values of W_D are lowered by strength times the sum of the learning rates since the
      last change; the new ranks count those above 0, see `Truncation.soft_threshold`.

    Attributes:
        rule: What changes the ranks.
        every: Optimiser steps between two changes. A change by energy or budget decomposes every weight, about 0.2 s
            for 1024 x 1024; a rank from a quarter of the shorter side on costs as much at every step.
        begin: No change before this step.
        end: No change after this step; None for no end. A budget needs one.
        example_inputs: One batch for the model, to count the MACs that a budget limits.

    Raises:
        RuleError: a rule that does not change ranks, such as `Rank`, or a budget of bytes.
        TrainingError: steps that are not allowed, or a budget of MACs without `example_inputs`.
    """

    rule: Energy | Budget | NuclearNorm
    _: KW_ONLY
    every: int = 100
    begin: int = 0
    end: int | None = None
    example_inputs: Any = None

    def __post_init__(self) -> None:
        rule, end = self.rule, self.end
        if not isinstance(rule, Energy | Budget | NuclearNorm):
            raise RuleError(f"{rule!r} does not move ranks; give Energy(0.9), Budget(params=0.1) or NuclearNorm(1e-3)")
        self._limits = rule.limits if isinstance(rule, Budget) else None
        if self._limits in ("bytes", "latency") or (isinstance(rule, Budget) and rule.of):
            advice = "give params= or macs= of the whole network instead"
            raise RuleError(f"{rule} cannot be followed in training; {advice}")
        for name, value, least in (("every", self.every, 1), ("begin", self.begin, 0), ("end", end, self.begin + 1)):
            if name == "end" and end is None and self._limits is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TrainingError(f"{name}={value!r}: give a whole number of optimiser steps, at least {least}")
        if self._limits == "macs" and self.example_inputs is None:
            raise TrainingError(f"{rule} counts a forward pass; give RankSchedule(.., example_inputs=x)")
        self._costs: _Costs | None = None
        self._state = _State(schedule=self._name)

    def __repr__(self) -> str:
        return f"RankSchedule({self._name})"

    @property
    def history(self) -> tuple[RankStep, ...]:
        """The ranks before the first step and after every change, oldest first."""
        return self._state.history

    def step(self, truncation: Truncation, optimizer: Optimizer | None = None) -> bool:
        """Count one optimiser step, after it was taken, and change the ranks if it is time; returns whether it did.

        The truncation is the same one at every step. `NuclearNorm` needs the learning rates of the optimiser.

        Raises:
            RuleError: a budget below what is reachable, or above what the network costs already; at the first step.
            TrainingError: the truncation has ended, a weight became NaN, or there is no learning rate for the penalty.
                Neither the ranks nor the count are changed.
        """
        if isinstance(self.rule, NuclearNorm) and optimizer is None:
            raise TrainingError(f"{self.rule} needs the learning rate; call step(truncation, optimizer)")
        if self._costs is None or self._costs.truncation is not truncation:
            unit: Literal["params", "macs"] = "macs" if self._limits == "macs" else "params"
            self._costs = _Costs.of(truncation, self.example_inputs, unit=unit)
        costs, state = self._costs, self._state
        if not state.history:
            self._require_reachable(costs)
            state = state.model_copy(update={"history": (costs.record(0),)})
        now = state.step + 1
        active = self.begin <= now and (self.end is None or now <= self.end)
        owed = self._owed(state, truncation, optimizer) if active else {}
        state = state.model_copy(update={"step": now, "owed": owed})
        due = active and (now == self.end or (now - self.begin) % self.every == 0)
        if due:
            state = self._changed(state, truncation, costs)
            state = state.model_copy(update={"history": (*state.history, costs.record(now))})
        self._state = state
        return due

    def state_dict(self) -> dict[str, Any]:
        """What is needed to resume, in types that JSON has. The ranks themselves are part of the model's state."""
        return self._state.model_dump(mode="json")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from the result of `state_dict`.

        Raises `TrainingError` for one that is damaged, or of another rule or other steps; then nothing is changed.
        """
        try:
            state = _State.model_validate(dict(state_dict))
        except (TypeError, ValueError) as error:
            raise TrainingError(f"this is not the state of a RankSchedule: {error}") from error
        if state.schedule != self._name:
            raise TrainingError(f"this is the state of RankSchedule({state.schedule}), not of {self!r}; make that one")
        self._state = state

    @property
    def _name(self) -> str:
        return f"{self.rule}, every={self.every}, begin={self.begin}, end={self.end}"

    def _require_reachable(self, costs: "_Costs") -> None:
        if not isinstance(self.rule, Budget):
            return
        least, present = costs.least, costs.share(costs.truncation.ranks)
        if self.rule.share < least:
            raise RuleError(
                f"{self.rule} cannot be reached: with all {len(costs.options)} truncated layers as small as they can "
                f"be {math.ceil(1e4 * least) / 1e4:g} is kept; truncate more layers or give a larger budget"
            )
        if self.rule.share > present:
            raise RuleError(
                f"{self.rule} is above the {present:.4g} that the truncated network costs already; start from "
                "truncated_(model, Ratio(1.0), trainable_rank=True) or give a smaller budget"
            )

    def _owed(self, state: _State, truncation: Truncation, optimizer: Optimizer | None) -> dict[str, float]:
        """By layer, the sum of the learning rates since the last proximal step."""
        if not isinstance(self.rule, NuclearNorm) or optimizer is None:
            return {}
        rates = {id(weight): float(group["lr"]) for group in optimizer.param_groups for weight in group["params"]}
        owed = {}
        for name, weight in truncation.weights().items():
            if id(weight) not in rates:
                raise TrainingError(f"the weight of {name} is not among the optimiser's parameters; give the right one")
            owed[name] = state.owed.get(name, 0.0) + rates[id(weight)]
        return owed

    def _changed(self, state: _State, truncation: Truncation, costs: "_Costs") -> _State:
        match self.rule:
            case Energy(energy=energy):
                return _by_energy(state, truncation, energy)
            case Budget(share=share):
                assert self.end is not None
                target, start = Fraction(share).limit_denominator(10**12), Fraction(state.history[0].kept)
                to_go = Fraction(self.end - state.step, self.end - self.begin)
                truncation.set_ranks(costs.best_ranks(truncation.spectra(), target + (start - target) * to_go**3))
                return state
            case NuclearNorm(strength=strength):
                truncation.soft_threshold({name: strength * rate for name, rate in state.owed.items()})
                return state.model_copy(update={"owed": {}})


def _by_energy(state: _State, truncation: Truncation, energy: float) -> _State:
    present, spectra = truncation.ranks, truncation.spectra()
    ranks, held = {}, {}
    for name, values in spectra.items():
        shares = values.cumulative_energy
        # 1 while W still has all the energy that a lower rank has cost, as without any decay
        remaining = min(1.0, state.held.get(name, 1.0) / max(float(shares[present[name] - 1]), 1e-300))
        ranks[name] = values.rank_for(min(1.0, energy / remaining))
        held[name] = remaining * float(shares[ranks[name] - 1])
    truncation.set_ranks(ranks)
    return state.model_copy(update={"held": held})


@dataclass(frozen=True, eq=False)
class _Costs:
    """What the network costs, in parameters or MACs, at any ranks: dense, and apart from its truncated weights the
    `rest`.

    `finished` are the costs of each layer once it is finished, by its rank; `options` are its ranks for a budget: the
    full one, then all with fewer parameters and no more MACs.
    """

    truncation: Truncation
    dense: int
    rest: int
    finished: Mapping[str, Mapping[int, int]]
    options: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, truncation: Truncation, example_inputs: Any, *, unit: Literal["params", "macs"]) -> "_Costs":
        dense = sum(parameter.numel() for parameter in truncation.model.parameters())
        truncation.weights()
        weights = dict(truncation.units)
        if unit == "macs":
            traced = trace(truncation.model, as_inputs(example_inputs)).positions
            for name, weight in weights.items():
                places = (traced.get(site, Positions()) for site in weight.call_sites)
                weights[name] = weight.at(sum(places, Positions()))
            # after the trace has updated all truncations, so that only the layers themselves multiply
            dense = count_macs(truncation.model, example_inputs)
        finished, options = {}, {}
        for name, weight in weights.items():
            full, form = weight.geometry.full_rank, forms_of(weight)[0]
            whole = weight.geometry.dense_cost(weight.weight.positions)
            costs = {rank: form.cost(weight, (rank,)) for rank in range(1, full + 1)}
            smaller = [rank for rank, cost in costs.items() if cost.params < whole.params and cost.macs <= whole.macs]
            options[name] = [full, *smaller]
            costs |= {rank: whole for rank in costs if truncation.stays_dense(name, rank)}
            finished[name] = {rank: int(getattr(cost, unit)) for rank, cost in costs.items()}
        rest = dense - sum(costs[full] for costs, (full, *_) in zip(finished.values(), options.values(), strict=True))
        return cls(truncation, dense, rest, finished, options)

    @property
    def least(self) -> float:
        """kept / dense with every layer as small as it can be."""
        ranks = {name: min(own, key=self.finished[name].__getitem__) for name, own in self.options.items()}
        return self.share(ranks)

    def share(self, ranks: Mapping[str, int]) -> float:
        """kept / dense."""
        return (self.rest + sum(self.finished[name][rank] for name, rank in ranks.items())) / max(self.dense, 1)

    def record(self, step: int) -> RankStep:
        ranks = dict(self.truncation.ranks)
        return RankStep(step=step, ranks=ranks, kept=self.share(ranks))

    def best_ranks(self, spectra: Mapping[str, Spectrum], budget: Fraction) -> dict[str, int]:
        """The ranks that lose least of all energies together, at a cost of at most this share."""
        items = []
        for name, ranks in self.options.items():
            total = float(np.square(spectra[name].values).sum())
            lost = spectra[name].tail_energy[np.array(ranks) - 1]
            costs = np.array([self.finished[name][rank] for rank in ranks], dtype=np.int64)
            items.append(KnapsackItem(costs, lost / total if total > 0 else np.zeros(len(ranks))))
        limit = int(budget * self.dense) - self.rest
        solution = Allocation.of(items, limit=limit).solve(limit)
        return {name: ranks[at] for (name, ranks), at in zip(self.options.items(), solution, strict=True)}
