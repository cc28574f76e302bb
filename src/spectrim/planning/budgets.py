"""Forms and ranks of all layers under one budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from spectrim.analysis.metrics import metric_of
from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latencies import LatencyTable
from spectrim.core.errors import PlanError, RuleError
from spectrim.core.plans import Budget, LatencyNote, LayerPlan, Limit, Metric, Plan
from spectrim.layers.forms import RankCosts, find_form, joint_form_named, selected_forms
from spectrim.linalg import FloatArray, Ranks
from spectrim.planning.decisions import (
    SIZES,
    PlanOptions,
    dense,
    factored,
    listed,
    narrowed,
    possible_forms,
    why_impossible,
)
from spectrim.planning.groups import Group, grouped
from spectrim.planning.knapsack import Allocation, KnapsackItem
from spectrim.planning.reach import out_of_reach


@dataclass(frozen=True, eq=False)
class Candidates:
    """Every form and ranks that each layer may take under a budget.

    Attributes:
        analysis: The layers.
        cost: What is limited; latencies count in whole nanoseconds.
        metric: In what the losses count.
        forms: Those that may be taken.
        multiple: What divides the ranks, but full ones and what a table holds below it.
        latencies: The times of the layers, if the latency is limited. Factors slower than the dense layer are left out.
        lookups: Whether embeddings may be factored.
    """

    analysis: Analysis
    cost: Limit
    metric: Metric
    forms: tuple[str, ...]
    multiple: int
    latencies: LatencyTable | None = None
    lookups: bool = False

    @classmethod
    def of(cls, analysis: Analysis, cost: Limit, options: PlanOptions, *, body: bool = False) -> "Candidates":
        """The candidates for the network or its body, once it is known that table and multiple go together.

        Raises:
            RuleError: a latency without a table, a table without a latency, ranks that the table does not hold, or MACs
                of a network some of whose weights are multiplied by operators that cannot be counted.
            PlanError: a table of another network.
        """
        latencies, uncounted = options.latencies, analysis.whole.uncounted_weights
        if cost == "macs" and uncounted:
            raise RuleError(
                f"the MACs of this network are not known, since {', '.join(uncounted)} multiplies a weight and cannot "
                "be counted; limit params=, bytes= or latency= instead"
            )
        if (cost == "latency") != (latencies is not None):
            raise RuleError(
                "a budget of latency needs latencies=st.latency_table(model, example_inputs, analysis=..), and no "
                "other budget does; st.compress makes it by itself"
            )
        metric, whole = metric_of(analysis, options.metric, best=True), cost in SIZES and not body
        forms = selected_forms(options.forms, for_size=whole)
        if latencies is None:
            return cls(analysis, cost, metric, forms, options.step, lookups=whole)
        step = latencies.rank_multiple if options.rank_multiple is None else options.step
        if step % latencies.rank_multiple:
            raise RuleError(
                f"rank_multiple={step}: the table holds multiples of {latencies.rank_multiple}; make another table"
            )
        known = {layer.name for layer in analysis if layer.problems}
        foreign = [layer.name for layer in latencies.layers if layer.name not in known]
        if foreign:
            raise PlanError(f"the latency table is of another network: it has a layer {foreign[0]!r}; make a new one")
        return cls(analysis, cost, metric, forms, step, latencies)

    @property
    def whole(self) -> int:
        """What the dense network costs."""
        if self.latencies is not None:
            return _nanoseconds(self.latencies.network_ms)
        return int(getattr(self.analysis.whole, self.cost))

    @property
    def outside(self) -> int:
        """What it costs besides the layers of the analysis; below 0 where the times of single layers add up to more."""
        return self.whole - sum(self.dense(layer) for layer in self.analysis)

    def rule(self, share: float) -> Budget:
        """The budget of this share."""
        limits: dict[str, Any] = {self.cost: share}
        if self.latencies is not None:
            limits |= self.latencies.model_dump(include={"runtime", "batch", "threads"})
        return Budget(**limits)

    @cached_property
    def cheapest(self) -> dict[str, int]:
        """What the smallest factors of each layer cost, by name, from shapes and times; nothing is decomposed."""
        cheapest = {}
        for layer in self.analysis:
            each = (self._usable(layer, layer.rank_costs(form, self.metric))[1] for form in self._possible(layer))
            costs = [int(of_form.min()) for of_form in each if len(of_form)]
            if costs:
                cheapest[layer.name] = min(costs)
        return cheapest

    @property
    def least(self) -> int:
        """The smallest cost that a budget can ask for."""
        dense = {layer.name: self.dense(layer) for layer in self.analysis}
        least = {name: min(cost, self.cheapest.get(name, cost)) for name, cost in dense.items()}
        return self.outside + sum(least.values()) - sum(saved for _, saved in self._saved_together(least))

    @property
    def open_to(self) -> set[str]:
        """Names of the layers that can shrink, by themselves or together with others."""
        dense = {layer.name: self.dense(layer) for layer in self.analysis}
        together = (own for own, saved in self._saved_together(dense) if saved)
        return {*self.cheapest, *(layer.name for members in together for layer in members)}

    def _saved_together(self, least: Mapping[str, int]) -> Iterator[tuple[list[LayerAnalysis], int]]:
        """Layers that can be narrowed together, and how much less time they take than the `least` of each by itself."""
        for layer in self.analysis if self.latencies else ():
            for form in self._joint_forms(layer):
                members = [*(self.analysis[feeder.name] for feeder in layer.feeders), layer]
                dense = sum(least[own.name] for own in members)
                _, costs = self._timed(layer.name, layer.rank_costs(form, self.metric), dense=dense)
                yield members, dense - int(costs.min(initial=dense))

    @property
    def body(self) -> int:
        """What the dense layers cost that can shrink."""
        open_to = self.open_to
        return sum(self.dense(layer) for layer in self.analysis if layer.name in open_to)

    def require(self, rule: Budget, *, share: float) -> int:
        """What a network costs that keeps a share of the dense one, or of its body, in whole numbers.

        Raises:
            RuleError: it is below what is reachable; says what is.
        """
        part = self.body if rule.of else self.whole
        rest = self.whole - part
        budget = rest + int(Fraction(share).limit_denominator(10**12) * part)
        if budget < self.least or (rule.of and self.whole > 0 == part):
            raise RuleError(out_of_reach(self, rule, (self.least - rest) / part if part else 1.0))
        return budget

    @cached_property
    def _alone(self) -> dict[str, tuple[KnapsackItem, list[tuple[str, Ranks]]]]:
        """By layer: costs and losses, the dense layer first, and the form and ranks of the others."""
        return {layer.name: self._candidates_of(layer) for layer in self.analysis}

    @cached_property
    def groups(self) -> list[Group]:
        """What is chosen together: a layer, or several that can be narrowed together."""
        joint = [layer for layer in self.analysis if self._joint_forms(layer)]
        together = {layer.name: [self.analysis[feeder.name] for feeder in layer.feeders] for layer in joint}
        groups = [Group.of_each(members, self._alone) for members in grouped(self.analysis, together)]
        for place, group in enumerate(groups):
            for form in self._joint_forms(group.layers[-1]):
                groups[place] = groups[place].with_options(*self._joint(group.layers, form))
        return groups

    @cached_property
    def items(self) -> list[KnapsackItem]:
        """By group: costs and losses."""
        return [group.item for group in self.groups]

    @cached_property
    def _informed(self) -> set[str]:
        """Names of the layers that can be factored in the metric."""
        return {layer.name for layer in self.analysis if self.metric in layer.problems}

    def _joint_forms(self, layer: LayerAnalysis) -> list[str]:
        members = {layer.name, *(feeder.name for feeder in layer.feeders)}
        if self.metric == "plain" or not members <= self._informed:
            return []
        return [form for form in layer.joint_forms if form in self.forms]

    def _joint(self, members: Sequence[LayerAnalysis], form: str) -> tuple[Any, Any, Any]:
        """Costs and losses of layers that are narrowed together, and form and ranks."""
        *feeders, last = members
        errors = last.rank_errors(form, self.metric)
        if self.latencies is not None:
            fits, costs = self._timed(last.name, errors, dense=sum(map(self.dense, members)))
        else:
            full, costs = last.full_ranks(form)[0], self._factored(last, errors)
            for feeder in feeders:
                costs = costs + self._factored(
                    feeder, joint_form_named(form).feeder_costs(last.unit, feeder.weight, errors.ranks)
                )
            fits = np.flatnonzero((errors.ranks[:, 0] % self.multiple == 0) & (errors.ranks[:, 0] < full))
            costs = costs[fits]
        ranks = [(form, (int(rank),)) for rank in errors.ranks[fits, 0]]
        return costs, (errors.lost * self._sensitivity(last, form))[fits], ranks

    def _timed(
        self, name: str, rank_costs: RankCosts, *, dense: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Positions of the ranks at which a form is faster than what is `dense`, and their times."""
        assert self.latencies is not None
        layer, below = self.latencies.of(name), self.multiple if self.multiple == self.latencies.rank_multiple else 0
        times = layer.of(rank_costs.form) if layer else None
        if times is None:
            return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.int64)
        covered = times.covers(rank_costs.ranks, step=self.multiple, below=below)
        if not below:  # the largest ranks of a table may be off a coarser grid
            full = np.array(find_form(rank_costs.form).full_ranks(self.analysis[name].unit))
            covered &= ((rank_costs.ranks % self.multiple == 0) | (rank_costs.ranks == full)).all(axis=1)
        fits = np.flatnonzero(covered)
        costs = np.array([_nanoseconds(ms) for ms in times.at(rank_costs.ranks[fits])], dtype=np.int64)
        return fits[costs < dense], costs[costs < dense]

    @cached_property
    def _usual(self) -> float:
        """The sensitivity of layers whose own is not known."""
        return float(np.median([next(iter(own.values())) for own in self.analysis.sensitivity.values()] or [1.0]))

    def _sensitivity(self, layer: LayerAnalysis, form: str) -> float:
        known = self.analysis.sensitivity_of(layer.name, form)
        return self._usual if known is None else known

    def _candidates_of(self, layer: LayerAnalysis) -> tuple[KnapsackItem, list[tuple[str, Ranks]]]:
        costs, losses = [np.array([self.dense(layer)])], [np.zeros(1)]
        named: list[tuple[str, Ranks]] = []
        for form in self._possible(layer):
            errors = layer.rank_errors(form, self.metric)
            fits, cost = self._usable(layer, errors)
            costs.append(cost)
            losses.append(errors.lost[fits] * self._sensitivity(layer, form))
            named += [(form, tuple(int(rank) for rank in ranks)) for ranks in errors.ranks[fits]]
        return KnapsackItem(np.concatenate(costs).astype(np.int64), np.concatenate(losses)), named

    @property
    def _limit(self) -> Limit | None:
        return self.cost if self.lookups else None

    def _possible(self, layer: LayerAnalysis) -> list[str]:
        # before the data have been run, none is known to miss a layer
        metric = self.metric if self.metric in self.analysis.metrics else "plain"
        return possible_forms(layer, self.forms, metric, limit=self._limit)

    def _usable(
        self, layer: LayerAnalysis, rank_costs: RankCosts
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64] | FloatArray]:
        """Positions of the ranks on the grid that are smaller than the layer (and faster), and what they cost."""
        small = layer.shrunk(rank_costs)
        if self.latencies is None:
            full = np.array(layer.full_ranks(rank_costs.form))
            even = (rank_costs.ranks % self.multiple == 0) | (rank_costs.ranks == full)
            fits = np.flatnonzero(even.all(axis=1) & small)
            return fits, self._factored(layer, rank_costs)[fits]
        fits, costs = self._timed(layer.name, rank_costs, dense=self.dense(layer))
        return fits[small[fits]], costs[small[fits]]

    def dense(self, layer: LayerAnalysis) -> int:
        """What a layer costs as it is."""
        if self.latencies is not None:
            times = self.latencies.of(layer.name)
            return _nanoseconds(times.dense_ms) if times else 0
        return layer.dense.macs if self.cost == "macs" else layer.dense.params * self._unit(layer)

    def _factored(self, layer: LayerAnalysis, rank_costs: RankCosts) -> npt.NDArray[np.int64]:
        if self.cost == "macs":
            return rank_costs.macs
        # each tensor of a file has an entry in its header
        biased = layer.weight.biases < len(layer.call_sites) and self.metric != "plain" and not layer.is_lookup
        tensors = len(rank_costs.ranks[0]) + biased
        index = find_form(rank_costs.form).index_bytes(layer.unit)
        entries = (tensors + bool(index)) * (len(layer.name) + 120) + index if self.cost == "bytes" else 0
        return rank_costs.params * self._unit(layer) + entries * (1 + len(layer.tied_names))

    def _unit(self, layer: LayerAnalysis) -> int:
        return layer.weight.itemsize if self.cost == "bytes" else 1

    def cost_of(self, solution: Sequence[int]) -> int:
        """What the whole model costs with these options."""
        return self.outside + sum(int(item.costs[option]) for item, option in zip(self.items, solution, strict=True))

    def lost(self, solution: Sequence[int]) -> float:
        """What all layers lose together with these options."""
        return sum(float(item.losses[option]) for item, option in zip(self.items, solution, strict=True))

    def plan(self, rule: Budget, solution: Sequence[int]) -> Plan:
        """These options as a plan, with reasons."""
        chosen = zip(self.groups, solution, strict=True)
        planned = {layer.name: layer for group, option in chosen for layer in self._planned(group, option)}
        layers = [planned[layer.name] for layer in self.analysis]
        multiple = self.multiple if self.multiple > 1 else None
        note = self._note(self.cost_of(solution))
        return Plan(rule=rule, metric=self.metric, layers=tuple(layers), rank_multiple=multiple, latency=note)

    def _planned(self, group: Group, option: int) -> list[LayerPlan]:
        together = group.together(option)
        if together is not None:
            share = group.item.costs[option] / max(1, group.item.costs[0])
            why = f"{together[0]} at {share:.0%} of the {self.cost} of all {len(group.layers)} layers loses least"
            return narrowed(group.layers, *together, metric=self.metric, reason=f"{why} for what it saves")
        planned = []
        for layer, choice in zip(group.layers, group.options[option].tolist(), strict=True):
            item, named = self._alone[layer.name]
            if choice:
                form, ranks = named[choice - 1]
                because = f"{form} at {self._share(item, choice)} loses least for what it saves"
                planned.append(factored(layer, form, ranks, metric=self.metric, reason=because))
            else:
                planned.append(dense(layer, reason=self._why_dense(layer, item, named), metric=self.metric))
        return planned

    def _note(self, cost: int) -> LatencyNote | None:
        if self.latencies is None:
            return None
        setting = self.latencies.model_dump(include={"runtime", "threads", "batch", "fingerprint"})
        return LatencyNote(**setting, dense_ms=self.latencies.network_ms, predicted=cost / self.whole)

    def _share(self, item: KnapsackItem, option: int) -> str:
        share = item.costs[option] / max(1, item.costs[0])
        if self.latencies is None:
            return f"{share:.0%} of its {self.cost}"
        return f"{share:.0%} of its time ({item.costs[option] / 1e6:.3g} of {item.costs[0] / 1e6:.3g} ms)"

    def _why_dense(self, layer: LayerAnalysis, item: KnapsackItem, named: list[tuple[str, Ranks]]) -> str:
        if not named:
            return why_impossible(layer, self.metric, limit=self._limit) or self._why_nothing(layer)
        best = 1 + int(np.argmin(item.losses[1:]))
        form, ranks = named[best - 1]
        share = item.costs[best] / max(1, item.costs[0])
        what = self.cost if self.latencies is None else "time"
        return (
            f"the budget is met with less error elsewhere; the mildest option here, {form} at rank {listed(ranks)}, "
            f"would save {1 - share:.0%} of its {what}"
        )

    def _why_nothing(self, layer: LayerAnalysis) -> str:
        """Why a layer that can be factored has no option."""
        times = self.latencies.of(layer.name) if self.latencies else None
        possible = self._possible(layer)
        timed = [of_form for of_form in times.forms if of_form.form in possible] if times else []
        if times is None or not timed:
            return "no rank of any form allowed here would be smaller"
        least = min(timed, key=lambda of_form: min(of_form.ms))
        return (
            f"its factors do not pay: the fastest are in the {least.form} form and take {min(least.ms):.3g} ms, "
            f"the layer itself {times.dense_ms:.3g} ms"
        )


def _nanoseconds(ms: float) -> int:
    return round(ms * 1e6)


def solve(candidates: Candidates, rule: Budget, *, share: float) -> list[int]:
    """The option of every layer that together lose least at this share, which need not be the rule's own.

    Raises:
        RuleError: a share below what is reachable; says what is.
    """
    limit = candidates.require(rule, share=share) - candidates.outside
    return Allocation.of(candidates.items, limit=limit).solve(limit)
