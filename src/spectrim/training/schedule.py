"""Ranks that move while a truncated network trains: by energy, under a falling budget, or by a penalty."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError
from torch.optim import Optimizer

from spectrim.benchmark.measurement import count_macs
from spectrim.core.errors import RuleError, TrainingError
from spectrim.core.execution import as_inputs, trace
from spectrim.core.files import Frozen
from spectrim.core.plans import Budget, Energy
from spectrim.layers.registry import Positions
from spectrim.linalg import Spectrum
from spectrim.planning.knapsack import Allocation, Menu
from spectrim.training.truncated import Truncation


@dataclass(frozen=True)
class NuclearNorm:
    """A penalty of `strength` times the sum of all singular values of every weight, above 0, on the scale of the loss.

    What it acts by is its proximal operator, soft-thresholding of the singular values (Cai, Candes & Shen 2010), as in
    proximal gradient descent: values that the loss does not hold up reach 0, and the rank falls with them.
    """

    strength: float

    def __post_init__(self) -> None:
        given = self.strength
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise RuleError(f"NuclearNorm({given!r}): a strength is a number above 0, such as NuclearNorm(1e-3)")

    def __str__(self) -> str:
        return f"NuclearNorm({self.strength:g})"


class RankStep(Frozen):
    """The ranks after one move.

    Attributes:
        step: Optimiser steps taken until then; 0 for what training began with.
        ranks: By the layers' names.
        kept: What the network would cost if it were finished now, kept / dense, in [0, ..): its parameters, or its MACs
            under a budget of MACs.
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


class RankSchedule:
    """Move the ranks of a truncated network while it trains, from any loop.

        truncation = st.training.truncated_(model, st.Ratio(1.0), movable=True)
        ranks = st.training.RankSchedule(st.Budget(params=0.1), every=50, end=2000)
        for x, y in batches:
            ...
            optimizer.step()
            ranks.step(truncation, optimizer)
        small = truncation.finish()

    In `st.training.fit` that is `on_step=lambda _: ranks.step(truncation)`. At every `every`-th step from `begin` to
    `end`, and at `end` itself:

    - `Energy`: each layer takes the smallest rank whose share of the energy of W is enough. Energy that a lower rank
      has cost already, since the truncation shrinks W outside W_D, still counts as lost; otherwise the same share would
      be taken again and again.
    - `Budget`: the budget falls from what the network costs at the first step to the rule's share at `end`, fast at
      first and slowly in the end (cubic, as Zhu & Gupta 2017 prune). Each time the ranks of all layers are chosen
      together, so that the sum of the lost shares of their energies is least; a layer may also be left dense. What is
      kept never exceeds the budget of the moment.
    - `NuclearNorm`: the singular values of W_D are lowered by strength times the sum of the learning rates of the steps
      since the last time; see `Truncation.soft_threshold`. The ranks are those of the values left above 0.

    Attributes:
        rule: What moves the ranks.
        every: Optimiser steps between two moves. A move by energy or budget decomposes every weight, which takes about
            0.2 s for 1024 x 1024; ranks of a quarter of the shorter side and above cost as much at every step.
        begin: Before this step nothing moves.
        end: After this step nothing moves; None for no end. A budget needs one.

    Raises:
        RuleError: a rule that does not move ranks, such as `Rank`, or a budget of bytes.
        TrainingError: steps that cannot be meant, or a budget of MACs without `example_inputs`.
    """

    def __init__(
        self,
        rule: Energy | Budget | NuclearNorm,
        *,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(rule, Energy | Budget | NuclearNorm):
            raise RuleError(f"{rule!r} does not move ranks; give Energy(0.9), Budget(params=0.1) or NuclearNorm(1e-3)")
        if isinstance(rule, Budget) and rule.limits in ("bytes", "latency"):
            raise RuleError(f"{rule} cannot be followed in training; give params= or macs= instead")
        _require_steps(rule, every=every, begin=begin, end=end)
        if isinstance(rule, Budget) and rule.limits == "macs" and example_inputs is None:
            raise TrainingError(f"{rule} counts a forward pass; give RankSchedule(.., example_inputs=x)")
        self.rule, self.every, self.begin, self.end = rule, every, begin, end
        self._example = example_inputs
        self._costs: _Costs | None = None
        self._state = _State(schedule=self._name)

    def __repr__(self) -> str:
        return f"RankSchedule({self._name})"

    @property
    def history(self) -> tuple[RankStep, ...]:
        """The ranks before the first step and after every move, oldest first."""
        return self._state.history

    def step(self, truncation: Truncation, optimizer: Optimizer | None = None) -> bool:
        """Count one optimiser step, after it was taken, and move the ranks if it is time; whether it was.

        Args:
            truncation: From `truncated_`; the same one at every step.
            optimizer: The one that trains the network; `NuclearNorm` takes its learning rates.

        Raises:
            RuleError: a budget below what is reachable, or above what the network costs already; at the first step.
            TrainingError: the truncation has ended, a weight became NaN, or there is no learning rate for the penalty.
                Neither the ranks nor the count are changed.
        """
        if self._costs is None or self._costs.truncation is not truncation:
            self._costs = _Costs.of(truncation, self._unit, self._example)
        costs, state = self._costs, self._state
        if not state.history:
            self._require_reachable(costs)
            state = state.model_copy(update={"history": (costs.record(0),)})
        now = state.step + 1
        owed = self._owed(state, truncation, optimizer, now)
        state = state.model_copy(update={"step": now, "owed": owed})
        due = self._due(now)
        if due:
            state = self._moved(state, truncation, costs)
            state = state.model_copy(update={"history": (*state.history, costs.record(now))})
        self._state = state
        return due

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, fit for JSON. The ranks themselves are part of the model's state."""
        return self._state.model_dump(mode="json")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TrainingError: it is damaged, or of a schedule with another rule or other steps; nothing is changed.
        """
        try:
            state = _State.model_validate(dict(state_dict))
        except (ValidationError, TypeError, ValueError) as error:
            raise TrainingError(f"this is not the state of a RankSchedule: {error}") from error
        if state.schedule != self._name:
            raise TrainingError(f"this is the state of RankSchedule({state.schedule}), not of {self!r}; make that one")
        self._state = state

    @property
    def _name(self) -> str:
        return f"{self.rule}, every={self.every}, begin={self.begin}, end={self.end}"

    @property
    def _unit(self) -> Literal["params", "macs"]:
        return "macs" if isinstance(self.rule, Budget) and self.rule.limits == "macs" else "params"

    def _due(self, step: int) -> bool:
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return step == self.end or (step - self.begin) % self.every == 0

    def _require_reachable(self, costs: "_Costs") -> None:
        if not isinstance(self.rule, Budget):
            return
        least, present = costs.least, costs.share(costs.truncation.ranks)
        if self.rule.share < least:
            raise RuleError(
                f"{self.rule} cannot be reached: with all {len(costs.menus)} truncated layers as small as they can be "
                f"{math.ceil(1e4 * least) / 1e4:g} is kept; truncate more layers or give a larger budget"
            )
        if self.rule.share > present:
            raise RuleError(
                f"{self.rule} is above the {present:.4g} that the truncated network costs already; start from "
                "truncated_(model, Ratio(1.0), movable=True) or give a smaller budget"
            )

    def _owed(self, state: _State, truncation: Truncation, optimizer: Optimizer | None, step: int) -> dict[str, float]:
        """By layer, the sum of the learning rates since the last proximal step."""
        if not isinstance(self.rule, NuclearNorm):
            return {}
        if optimizer is None:
            raise TrainingError(f"{self.rule} needs the learning rate; call step(truncation, optimizer)")
        if step < self.begin or (self.end is not None and step > self.end):
            return {}
        rates = {id(one): float(group["lr"]) for group in optimizer.param_groups for one in group["params"]}
        owed = {}
        for name, weight in truncation.weights().items():
            if id(weight) not in rates:
                raise TrainingError(f"the weight of {name} is not among the optimiser's parameters; give the right one")
            owed[name] = state.owed.get(name, 0.0) + rates[id(weight)]
        return owed

    def _moved(self, state: _State, truncation: Truncation, costs: "_Costs") -> _State:
        match self.rule:
            case Energy(energy=energy):
                return _by_energy(state, truncation, energy)
            case Budget():
                truncation.set_ranks(costs.allocated(truncation.spectra(), self._budget(state)))
                return state
            case NuclearNorm(strength=strength):
                truncation.soft_threshold({name: strength * rate for name, rate in state.owed.items()})
                return state.model_copy(update={"owed": {}})

    def _budget(self, state: _State) -> Fraction:
        """The share of the dense network that may be kept at the present step."""
        assert isinstance(self.rule, Budget)
        assert self.end is not None
        target, start = Fraction(self.rule.share).limit_denominator(10**12), Fraction(state.history[0].kept)
        left = Fraction(self.end - state.step, self.end - self.begin)
        return target + (start - target) * left**3


def _require_steps(rule: Energy | Budget | NuclearNorm, *, every: int, begin: int, end: int | None) -> None:
    for name, value, least in (("every", every, 1), ("begin", begin, 0), ("end", end, begin + 1)):
        if name == "end" and value is None and not isinstance(rule, Budget):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TrainingError(f"{name}={value!r}: give a whole number of optimiser steps, at least {least}")


def _by_energy(state: _State, truncation: Truncation, energy: float) -> _State:
    present, spectra = truncation.ranks, truncation.spectra()
    ranks, held = {}, {}
    for name, values in spectra.items():
        shares = values.cumulative_energy
        # 1 while all that a lower rank has cost is still there in W, as without any shrinking
        left = min(1.0, state.held.get(name, 1.0) / max(float(shares[present[name] - 1]), 1e-300))
        ranks[name] = values.rank_for(min(1.0, energy / left))
        held[name] = left * float(shares[ranks[name] - 1])
    truncation.set_ranks(ranks)
    return state.model_copy(update={"held": held})


@dataclass(frozen=True, eq=False)
class _Costs:
    """What the network costs at any ranks."""

    truncation: Truncation
    unit: Literal["params", "macs"]
    whole: int
    positions: Mapping[str, Positions]

    @classmethod
    def of(cls, truncation: Truncation, unit: Literal["params", "macs"], example_inputs: Any) -> "_Costs":
        truncation.weights()
        if unit == "params":
            whole = sum(parameter.numel() for parameter in truncation.model.parameters())
            return cls(truncation, unit, whole, {})
        seen = trace(truncation.model, as_inputs(example_inputs)).positions
        positions = {
            name: sum((seen.get(site, Positions()) for site in target.sites), Positions())
            for name, target in truncation.targets.items()
        }
        # after the trace, which has brought all truncations up to date: only the layers themselves multiply now
        return cls(truncation, unit, count_macs(truncation.model, example_inputs), positions)

    @cached_property
    def menus(self) -> Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """By layer, what it can cost and the rank: dense first, then every rank that is smaller in both costs."""
        menus = {}
        for name, sizes in self.truncation.sizes.items():
            dense = sizes.dense_cost(self.positions.get(name, Positions()))
            options = [(self.cost(name, sizes.full_rank), sizes.full_rank)]
            for rank in range(1, sizes.full_rank):
                cost = sizes.cost("channel", (rank,), self.positions.get(name, Positions()))
                if cost.params < dense.params and cost.macs <= dense.macs:
                    options.append((int(getattr(cost, self.unit)), rank))
            costs, ranks = np.array(options, dtype=np.int64).T
            menus[name] = (costs, ranks)
        return MappingProxyType(menus)

    def cost(self, name: str, rank: int) -> int:
        """What a layer costs once it is finished at this rank."""
        sizes, positions = self.truncation.sizes[name], self.positions.get(name, Positions())
        dense = self.truncation.stays_dense(name, rank)
        found = sizes.dense_cost(positions) if dense else sizes.cost("channel", (rank,), positions)
        return int(getattr(found, self.unit))

    @cached_property
    def fixed(self) -> int:
        """What the network costs besides the truncated weights."""
        return self.whole - sum(self.cost(name, one.full_rank) for name, one in self.truncation.sizes.items())

    @property
    def least(self) -> float:
        """kept / dense with every layer as small as it can be."""
        return (self.fixed + sum(int(costs.min()) for costs, _ in self.menus.values())) / max(self.whole, 1)

    def share(self, ranks: Mapping[str, int]) -> float:
        """kept / dense."""
        return (self.fixed + sum(self.cost(name, rank) for name, rank in ranks.items())) / max(self.whole, 1)

    def record(self, step: int) -> RankStep:
        ranks = dict(self.truncation.ranks)
        return RankStep(step=step, ranks=ranks, kept=self.share(ranks))

    def allocated(self, spectra: Mapping[str, Spectrum], budget: Fraction) -> dict[str, int]:
        """The ranks that lose least of all energies together, at a cost of at most this share."""
        menus = []
        for name, (costs, ranks) in self.menus.items():
            tails = spectra[name].tail_energy
            total = float(np.square(spectra[name].values).sum())
            losses = tails[ranks - 1] / total if total > 0 else np.zeros(len(ranks))
            menus.append(Menu(costs, losses))
        limit = int(budget * self.whole) - self.fixed
        picked = Allocation.of(menus, limit=limit).pick(limit)
        return {name: int(ranks[one]) for (name, (_, ranks)), one in zip(self.menus.items(), picked, strict=True)}
