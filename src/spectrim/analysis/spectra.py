"""Analysis: the spectrum of every unit in every metric, what it costs, and why a layer cannot be factored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spectrim.analysis.calibration import Calibration
from spectrim.analysis.experts import with_experts_of
from spectrim.analysis.problems import mean_output, partner_moments, problems_of
from spectrim.core.arguments import checked
from spectrim.core.display import Displayed
from spectrim.core.errors import ModelError, PlanError
from spectrim.core.execution import as_inputs, require_unwrapped, require_values
from spectrim.core.plans import Cost, CostName, LayerPlan, Metric
from spectrim.layers.cost import NetworkCost, count
from spectrim.layers.forms import RankCosts, find_form, forms_of, joint_forms_of
from spectrim.layers.narrowing import selected_units
from spectrim.layers.selection import LayerSelection, Patterns, TreatAs
from spectrim.layers.types import layer_type_of
from spectrim.layers.unfusing import unfused
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, FloatArray, Problem, Ranks, Spectrum, spectrum

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class RankErrors(RankCosts):
    """What every rank costs, and what it loses before the fit is improved.

    Attributes:
        lost: Share of the energy lost, (n,); its root is the relative error.
    """

    lost: FloatArray


class _OfUnit(Generic[_T]):
    """An attribute of a layer's unit, readable from its analysis as well."""

    def __init__(self, read: Callable[[Unit], _T]) -> None:
        self.read = read

    def __get__(self, layer: "LayerAnalysis", _: object) -> _T:
        return self.read(layer.unit)


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What is known of one unit.

    Attributes:
        unit: Its weight, and the layers that use it.
        forms: Names of the forms that it can take, one with a closed solution first.
        problems: What its factors approximate, by metric; empty for layers that cannot be factored.
        weight: The unit's first weight; its only one so far.
        name: The layer's name.
        names: `name` and `tied_names`, other layers with the same weight.
        call_sites: The first name of each distinct layer that uses the weight (each keeps a bias of its own).
        kind: Its class, such as `Linear`.
        shape: The weight's shape, as it is stored.
        geometry: Its groups, inputs, outputs and kernel; None for layers that are not matrices.
        positions: Vectors handled in one forward pass of the example inputs, all uses together.
        skip_reason: Why it stays dense, or None.
        is_lookup, stack, feeders: See `Weight` and `SingleWeight`.
        dense: Its cost as it is.
        full_rank: The largest number of singular values the weight's matrix can have, in each group; 0 for no matrix.
    """

    unit: Unit
    forms: tuple[str, ...]
    problems: Mapping[Metric, Problem] = field(repr=False)
    _matrices: Tensor | None = field(repr=False, default=None)
    _bias: Tensor | None = field(repr=False, default=None)
    _decompositions: dict[tuple[str, Metric], Decomposition] = field(repr=False, default_factory=dict)
    _rank_errors: dict[tuple[str, Metric], RankErrors] = field(repr=False, default_factory=dict)

    weight = _OfUnit(lambda unit: unit.weights[0])
    name = _OfUnit(lambda unit: unit.name)
    names = _OfUnit(lambda unit: unit.names)
    tied_names = _OfUnit(lambda unit: unit.weights[0].tied_names)
    call_sites = _OfUnit(lambda unit: unit.call_sites)
    kind = _OfUnit(lambda unit: unit.weights[0].kind)
    shape = _OfUnit(lambda unit: unit.weights[0].shape)
    geometry = _OfUnit(lambda unit: unit.weights[0].geometry)
    positions = _OfUnit(lambda unit: unit.weights[0].positions)
    skip_reason = _OfUnit(lambda unit: unit.skip_reason)
    is_lookup = _OfUnit(lambda unit: unit.weights[0].is_lookup)
    stack = _OfUnit(lambda unit: unit.weights[0].stack)
    feeders = _OfUnit(lambda unit: unit.feeders if isinstance(unit, SingleWeight) else ())
    dense = _OfUnit(lambda unit: unit.dense_cost)
    full_rank = _OfUnit(lambda unit: unit.weights[0].geometry.full_rank if unit.weights[0].geometry else 0)

    @cached_property
    def joint_forms(self) -> tuple[str, ...]:
        """Names of the forms that it can take together with the layers that feed it."""
        return tuple(form.name for form in joint_forms_of(self.unit)) if self.forms else ()

    def _of(self, problems: Mapping[Metric, Problem]) -> "LayerAnalysis":
        """The same with other problems."""
        return LayerAnalysis(self.unit, self.forms, problems, _bias=self._bias)

    @property
    def form(self) -> str | None:
        """The form of the per-layer rules (linear or channel), or None."""
        return self.forms[0] if self.forms else None

    def full_ranks(self, form: str) -> Ranks:
        """The largest ranks that change anything in a form."""
        return find_form(form).full_ranks(self.unit)

    @cached_property
    def spectra(self) -> Mapping[Metric, Spectrum]:
        """The singular values of the weight's matrix by metric; empty for layers that are not matrices."""
        if self.problems:
            solved = {metric: self.decomposition(self.forms[0], metric) for metric in self.problems}
            return {metric: bases.spectrum for metric, bases in solved.items() if hasattr(bases, "spectrum")}
        return {} if self._matrices is None else {"plain": spectrum(self._matrices)}

    def decomposition(self, form: str, metric: Metric) -> Decomposition:
        """The bases behind every rank of a form; worked out when first asked for."""
        form = find_form(form).solved_as or form
        if (form, metric) not in self._decompositions:
            self._decompositions[form, metric] = find_form(form).decompose_unit(self.problems[metric], self.unit)
        return self._decompositions[form, metric]

    def rank_costs(self, form: str, metric: Metric) -> RankCosts:
        """Every rank of a form with its cost; nothing is decomposed for it."""
        chosen = find_form(form)
        return chosen.costs(self.unit, chosen.rank_grid(self.unit), biases=self._biases(metric))

    def rank_errors(self, form: str, metric: Metric) -> RankErrors:
        """Every rank of a form with its cost and its error."""
        if (form, metric) not in self._rank_errors:
            costs, tails = self.rank_costs(form, metric), self.decomposition(form, metric).tails
            total = self.problems[metric].total
            lost = np.clip(tails / total, 0.0, 1.0) if total > 0 else np.zeros(len(tails))
            self._rank_errors[form, metric] = RankErrors(**vars(costs), lost=lost)
            self.release()
        return self._rank_errors[form, metric]

    def release(self) -> None:
        """Give back memory; see `Problem`."""
        for problem in self.problems.values():
            problem.release()

    def keep(self, planned: LayerPlan) -> None:
        """Give up the bases that a plan does not take; they are worked out again if they are asked for."""
        taken = find_form(planned.form).solved_as or planned.form if planned.is_factored else None
        for other in self._decompositions.keys() - {(taken, "plain"), (taken, planned.metric)}:
            del self._decompositions[other]

    def error(self, form: str, ranks: Ranks, metric: Metric) -> float:
        """The relative error at `ranks`; between the ranks of a coarse grid that of the next smaller pair."""
        tail, total = self.decomposition(form, metric).tail_at(ranks), self.problems[metric].total
        return float(np.sqrt(np.clip(tail / total, 0.0, 1.0))) if total > 0 else 0.0

    def cost(self, form: str, ranks: Ranks, metric: Metric) -> Cost:
        """The cost of the factors at `ranks`, biases included."""
        return find_form(form).cost(self.unit, ranks, biases=self._biases(metric))

    def break_even(self, form: str, metric: Metric) -> int:
        """The largest rank at which the factors are smaller than the layer, and no slower; 0 when none are.

        Factors of an embedding are always slower, and need only be smaller. Both ranks of tucker2 are taken as equal.
        """
        if form in self.joint_forms:
            return max(self.full_ranks(form)) - 1
        if self.geometry is None or form not in self.forms:
            return 0
        chosen = find_form(form)
        equal = np.arange(1, max(chosen.full_ranks(self.unit)) + 1, dtype=np.int64)
        costs = chosen.costs(self.unit, np.stack([equal] * chosen.rank_count, axis=1), biases=self._biases(metric))
        return int(np.argmin([*self.shrunk(costs), False]))

    def shrinks(self, cost: Cost) -> bool:
        """Whether a cost is below the layer's own."""
        return cost.params < self.dense.params and (self.is_lookup or cost.macs <= self.dense.macs)

    def shrunk(self, costs: RankCosts) -> npt.NDArray[np.bool_]:
        """The same for every rank, (n,)."""
        return (costs.params < self.dense.params) & (self.is_lookup | (costs.macs <= self.dense.macs))

    def _biases(self, metric: Metric) -> int:
        """How many the factors have: a data metric corrects the mean at every call site, not of lookups and experts."""
        return self.weight.biases if metric == "plain" or self.is_lookup or self.stack else len(self.call_sites)


@dataclass(frozen=True, eq=False)
class Analysis(Displayed):
    """The units of one model in order of execution, with all that factors of any form and rank are made from.

    Attributes:
        layers: One entry a unit.
        metrics: The available metrics, the best one last.
        whole: What the whole model costs, other operations included.
        calibration: The statistics it was made with, if any.
        sensitivity: By layer and form how much the network's outputs change with a lost share of the layer's energy,
            from `st.sensitivity`; empty if it was not measured.
    """

    layers: tuple[LayerAnalysis, ...]
    metrics: tuple[Metric, ...]
    whole: NetworkCost
    calibration: Calibration | None = field(default=None, repr=False)
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[LayerAnalysis]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerAnalysis:
        if name in self._by_name:
            return self._by_name[name]
        raise KeyError(f"the analysis has no layer {name!r}; it has {', '.join(layer.name for layer in self.layers)}")

    @cached_property
    def _by_name(self) -> dict[str, LayerAnalysis]:
        return {name: layer for layer in reversed(self.layers) for name in layer.names}

    @property
    def names(self) -> set[str]:
        """All names of its layers."""
        return {name for layer in self.layers for name in layer.names}

    @property
    def call_sites(self) -> set[str]:
        """The names of the layers that can be factored, one for each distinct layer: those that need statistics."""
        return {site for layer in self.layers if layer.problems for site in layer.call_sites}

    def factors(self, planned: LayerPlan) -> Factors:
        """The factors of a planned layer, from its input to its output, before they are fitted to anything else."""
        assert planned.metric is not None
        layer = self[planned.name]
        factors = layer.decomposition(planned.form, planned.metric).factors(planned.ranks)
        layer.release()
        return factors

    def sensitivity_of(self, name: str, form: str) -> float | None:
        """That of a layer in a form, or where it was not measured in this one, in its first; None if it was in none."""
        known = self.sensitivity.get(name, {})
        return known.get(form, next(iter(known.values()), None))

    @property
    def means(self) -> dict[str, Tensor]:
        """Mean inputs of the layers by name, less those of layers that get no bias; none without a calibration."""
        experts = {site for layer in self.layers if layer.stack for site in layer.call_sites}
        means = self.calibration.means if self.calibration else {}
        return {name: mean for name, mean in means.items() if name not in experts | self.tied_outputs}

    @property
    def tied_outputs(self) -> set[str]:
        """Names of the output layers that are factored together with an embedding, whose weight they share."""
        return {name for layer in self.layers for name in layer.weight.outputs}

    def require_model(self, model: nn.Module) -> None:
        """Raise `PlanError` for a model that lacks a layer of this analysis, or has it with a weight of another shape.

        Raises:
            ModelError: a model whose layers cannot be followed, or that has weights without values.
        """
        require_unwrapped(model)
        require_values(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        shapes = {name: layer.shape for layer in self.layers if layer.problems for name in layer.names}
        for name, shape in shapes.items():
            weight = modules[name]._parameters.get("weight") if name in modules else None
            if weight is None or tuple(weight.shape) != shape:
                raise PlanError(
                    f"the analysis is of another model: it has {name} with a weight {list(shape)}, which this "
                    f"{type(model).__name__} does not have; analyse this one with st.analyze"
                )

    def outside(self, cost: CostName) -> int:
        """What the model costs besides the layers of this analysis."""
        if cost == "bytes":
            return self.whole.bytes - sum(layer.dense.params * layer.weight.itemsize for layer in self.layers)
        return int(getattr(self.whole, cost)) - sum(int(getattr(layer.dense, cost)) for layer in self.layers)


@checked
def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Calibration | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    treat_as: TreatAs | None = None,
) -> Analysis:
    """Look at the singular values of every selected Linear and convolution weight.

    Args:
        model: Any module that runs on `example_inputs`; it is left as it is.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; costs are for one such pass.
        calibration: From `st.calibrate`; adds the activation metric.
        include: Patterns of layer names, as in a shell (`*`, `?`); one or several.
        exclude: Patterns of layers to leave out.
        keep_last: Leave the last layer that is called dense.
        treat_as: By a class of layers that overrides `forward`, the class of torch that it is to be taken for, such as
            `{MyConv2d: nn.Conv2d}`. A layer whose outputs on `example_inputs` are not those of that class stays dense.

    Raises:
        ModelError: nothing to analyse, NaN or infinite weights, or a model that cannot run `example_inputs`.
        PatternError: a pattern that matches no layer.
        DataError: a calibration of another model.
    """
    selection = LayerSelection(include, exclude, keep_last, {} if treat_as is None else treat_as)
    return analyze_selected(
        unfused(model, selection.unfuses), example_inputs, selection=selection, calibration=calibration
    )


def analyze_selected(
    model: nn.Module,
    example_inputs: Any,
    *,
    selection: LayerSelection,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
) -> Analysis:
    """As `analyze`, of a model whose attentions are as they are to be looked at; decomposed on `device`."""
    inputs = as_inputs(example_inputs)
    units = selected_units(model, inputs, selection)
    return analyze_units(model, units, whole=count(model, inputs), calibration=calibration, device=device)


def analyze_units(
    model: nn.Module,
    units: Sequence[Unit],
    *,
    whole: NetworkCost,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
) -> Analysis:
    """As `analyze_selected`, of units that were found before, in a model that costs `whole`."""
    statistics = with_experts_of(calibration, units)
    layers = _with_partners([_layer(model, unit, statistics, device) for unit in units], statistics)
    return Analysis(layers, _metrics(layers, calibration), whole, calibration)


def with_statistics(bare: Analysis, calibration: Calibration) -> Analysis:
    """An analysis without statistics with those of a calibration; the weights are not copied again."""
    statistics = with_experts_of(calibration, [layer.unit for layer in bare])
    layers = [
        layer._of(problems_of(layer.unit, layer.problems["plain"].weight, statistics)) if layer.problems else layer
        for layer in bare
    ]
    known, metrics = _with_partners(layers, statistics), _metrics(layers, calibration)
    return replace(bare, layers=known, metrics=metrics, calibration=calibration)


def _metrics(layers: Sequence[LayerAnalysis], calibration: Calibration | None) -> tuple[Metric, ...]:
    number = 1 if calibration is None else 2 + any("loss" in layer.problems for layer in layers)
    return get_args(Metric)[:number]


def _layer(model: nn.Module, unit: Unit, calibration: Calibration | None, device: torch.device | None) -> LayerAnalysis:
    assert isinstance(unit, SingleWeight)
    layer, forms = model.get_submodule(unit.name), tuple(form.name for form in forms_of(unit))
    for name, parameter in layer.named_parameters(recurse=False):
        # of layers that stay dense too, since their spectra are shown; others are none of our business
        if unit.weight.geometry is not None and not torch.isfinite(parameter.detach()).all():
            raise ModelError(
                f"{unit.name}.{name} holds NaN or infinite values, which have no singular values; repair the checkpoint"
            )
    if unit.weight.geometry is None or (unit.skip_reason is not None and unit.weight.is_lookup):
        return LayerAnalysis(unit, forms, {})
    # a copy, since factors may be asked for after the model has been trained on
    kernels = layer_type_of(layer).kernels(layer).detach()
    kernels = kernels.clone() if device is None else kernels.to(device, copy=True)
    if unit.skip_reason is not None:
        return LayerAnalysis(unit, forms, {}, kernels.flatten(2))
    bias = layer._parameters.get("bias")
    own = None if bias is None else bias.detach().clone()
    return LayerAnalysis(unit, forms, problems_of(unit, kernels, calibration), _bias=own)


def _with_partners(layers: Sequence[LayerAnalysis], calibration: Calibration | None) -> tuple[LayerAnalysis, ...]:
    """Those of the keys of an attention with the moments of its queries."""
    by_name, known = {layer.name: layer for layer in layers}, calibration.moments if calibration else {}
    for key, layer in by_name.items():
        unit = layer.unit
        if isinstance(unit, SingleWeight) and unit.scores and (name := unit.feeders[0].name) in known:
            queries, other = by_name[key if unit.gives_queries else name], by_name[name].problems
            mean = mean_output(queries.problems["activation"], known[queries.name].mean, queries._bias)
            partner = partner_moments(other, mean, gives_queries=unit.gives_queries)
            by_name[key] = layer._of({metric: replace(own, partner=partner) for metric, own in layer.problems.items()})
    return tuple(by_name.values())
