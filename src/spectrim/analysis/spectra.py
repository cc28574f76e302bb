"""Analysis: the spectrum of every layer in every metric, what it costs, and why a layer cannot be factored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spectrim.analysis.calibration import Calibration, pooled
from spectrim.benchmark.measurement import Measurement, count
from spectrim.core.errors import ModelError
from spectrim.core.execution import Trace, as_inputs, trace
from spectrim.core.plans import Cost, CostName, FormName, Metric
from spectrim.layers.registry import LAYERS, Geometry, Positions, decompose, forms_of, geometry, kernels, matrices
from spectrim.layers.selection import Patterns, Target, find_targets
from spectrim.linalg import (
    Decomposition,
    FloatArray,
    Problem,
    Ranks,
    Spectrum,
    is_finite,
    spectrum,
)


@dataclass(frozen=True, eq=False)
class Offers:
    """Every rank of one layer in one form, with what it costs: known from its shape alone.

    Attributes:
        form: The form.
        ranks: Whole numbers (n, 1), or (n, 2) of (rank_in, rank) in the tucker2 form.
        params: Numbers stored, bias included, (n,).
        macs: Multiply-accumulates of a pass, (n,).
    """

    form: FormName
    ranks: npt.NDArray[np.int64]
    params: npt.NDArray[np.int64]
    macs: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Choices(Offers):
    """The same with what each rank loses, before the fit is improved.

    Attributes:
        lost: Share of the energy lost, (n,); its root is the relative error.
    """

    lost: FloatArray


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What is known of one weight.

    Attributes:
        name: The layer's name.
        also: Other layers with the same weight.
        kind: Its class, such as `Linear`.
        shape: The weight's shape, as it is stored.
        forms: The forms its type of layer can take, the one with a closed solution first.
        refusal: Why it stays dense all the same, or None.
        has_bias: Whether the layer adds a bias.
        sites: The first name of each distinct layer that uses the weight (each keeps a bias of its own).
        sizes: Its groups, inputs, outputs and kernel; None for layers that are not matrices.
        positions: Vectors handled in one forward pass of the example inputs, all uses together.
        itemsize: Bytes of one number.
        dense: Its cost as it is.
        problems: What its factors approximate, by metric; empty for layers that cannot be factored.
    """

    name: str
    also: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    forms: tuple[FormName, ...]
    refusal: str | None
    has_bias: bool
    sites: tuple[str, ...]
    sizes: Geometry | None
    positions: Positions
    itemsize: int
    dense: Cost
    problems: Mapping[Metric, Problem] = field(repr=False)
    _weight: Tensor | None = field(repr=False, default=None)
    _found: dict[tuple[FormName, Metric], Decomposition] = field(repr=False, default_factory=dict)
    _offered: dict[tuple[FormName, Metric], Offers] = field(repr=False, default_factory=dict)
    _listed: dict[tuple[FormName, Metric], Choices] = field(repr=False, default_factory=dict)

    @property
    def form(self) -> FormName | None:
        """The form of the per-layer rules (linear or channel), or None."""
        return self.forms[0] if self.forms else None

    @property
    def full_rank(self) -> int:
        """The largest number of singular values the weight's matrix can have, in each group; 0 for no matrix."""
        return self.sizes.full_rank if self.sizes else 0

    @cached_property
    def spectra(self) -> Mapping[Metric, Spectrum]:
        """The singular values of the weight's matrix by metric; empty for layers that are not matrices."""
        found = {metric: self.decomposition(self.forms[0], metric) for metric in self.problems}
        if found:
            return {metric: one.spectrum for metric, one in found.items() if hasattr(one, "spectrum")}
        return {} if self._weight is None else {"plain": spectrum(self._weight)}

    def decomposition(self, form: FormName, metric: Metric) -> Decomposition:
        """The bases behind every rank of a form; worked out when first asked for."""
        if (form, metric) not in self._found:
            self._found[form, metric] = decompose(form, self.problems[metric])
        return self._found[form, metric]

    def choices(self, form: FormName, metric: Metric) -> Choices:
        """Every rank of a form with its cost and its error."""
        if (form, metric) not in self._listed:
            self._listed[form, metric] = self._list(form, metric)
        return self._listed[form, metric]

    def offers(self, form: FormName, metric: Metric) -> Offers:
        """Every rank of a form with its cost; nothing is decomposed for it."""
        if (form, metric) not in self._offered:
            self._offered[form, metric] = self._offer(form, metric)
        return self._offered[form, metric]

    def _offer(self, form: FormName, metric: Metric) -> Offers:
        assert self.sizes is not None
        ranks = self.sizes.ranks(form)
        costs = [self.sizes.cost(form, tuple(map(int, each)), self.positions) for each in ranks]
        return Offers(
            form,
            ranks,
            np.array([cost.params for cost in costs], dtype=np.int64) + self._biases(metric),
            np.array([cost.macs for cost in costs], dtype=np.int64),
        )

    def _list(self, form: FormName, metric: Metric) -> Choices:
        offers, total = self.offers(form, metric), self.problems[metric].total
        tails = self.decomposition(form, metric).tails.reshape(-1)
        lost = np.clip(tails / total, 0.0, 1.0) if total > 0 else np.zeros(len(tails))
        return Choices(**vars(offers), lost=lost)

    def error(self, form: FormName, ranks: Ranks, metric: Metric) -> float:
        """The relative error at `ranks`; between the ranks of a coarse grid that of the next smaller pair."""
        choices = self.choices(form, metric)
        below = (choices.ranks <= np.array(ranks)).all(axis=1)
        return float(np.sqrt(choices.lost[below].min())) if below.any() else 1.0

    def cost(self, form: FormName, ranks: Ranks, metric: Metric) -> Cost:
        """The cost of the factors at `ranks`, biases included."""
        assert self.sizes is not None
        return self.sizes.cost(form, ranks, self.positions) + Cost(params=self._biases(metric), macs=0)

    def break_even(self, form: FormName, metric: Metric) -> int:
        """The largest rank at which the factors are smaller than the layer, and no slower; 0 when none are.

        In the tucker2 form both ranks are taken to be the same.
        """
        if self.sizes is None or form not in self.forms:
            return 0
        fits = 0
        for rank in range(1, max(self.sizes.full_ranks(form)) + 1):
            cost = self.cost(form, (rank, rank) if form == "tucker2" else (rank,), metric)
            if not self.shrinks(cost):
                break
            fits = rank
        return fits

    def shrinks(self, cost: Cost) -> bool:
        """Whether a cost is below the layer's own."""
        return cost.params < self.dense.params and cost.macs <= self.dense.macs

    def _biases(self, metric: Metric) -> int:
        assert self.sizes is not None
        return len(self.sites) * self.sizes.groups * self.sizes.out if self.has_bias or metric != "plain" else 0


@dataclass(frozen=True, eq=False)
class Analysis:
    """The layers of one model in order of execution, with all that factors of any form and rank are made from.

    Attributes:
        layers: One entry a weight.
        metrics: The available metrics, the best one last.
        whole: What the whole model costs, other operations included.
        calibration: The statistics it was made with, if any.
        sensitivity: How much the network's answer feels a lost share of each layer's energy, from `st.sensitivity`;
            empty if it was not measured.
    """

    layers: tuple[LayerAnalysis, ...]
    metrics: tuple[Metric, ...]
    whole: Measurement
    calibration: Calibration | None = field(default=None, repr=False)
    sensitivity: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[LayerAnalysis]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerAnalysis:
        for layer in self.layers:
            if name in (layer.name, *layer.also):
                return layer
        raise KeyError(f"the analysis has no layer {name!r}; it has {', '.join(layer.name for layer in self.layers)}")

    @property
    def sites(self) -> set[str]:
        """The names of the layers that can be factored, one for each distinct layer: those that need statistics."""
        return {site for layer in self.layers if layer.problems for site in layer.sites}

    def fixed(self, cost: CostName) -> int:
        """What the model costs besides the layers of this analysis."""
        dense = sum((layer.dense for layer in self.layers), Cost(params=0, macs=0))
        if cost == "bytes":
            return self.whole.bytes - sum(layer.dense.params * layer.itemsize for layer in self.layers)
        return int(getattr(self.whole, cost)) - int(getattr(dense, cost))


def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Calibration | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
) -> Analysis:
    """Look at the singular values of every selected Linear and convolution weight.

    Args:
        model: Any module that runs on `example_inputs`; it is left as it is.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; costs are for one such pass.
        calibration: From `st.calibrate`; adds the activation metric.
        include: Patterns of layer names, as in a shell (`*`, `?`); one or several.
        exclude: Patterns of layers to leave out.
        keep_last: Leave the last layer that is called dense.

    Raises:
        ModelError: nothing to analyse, NaN or infinite weights, or a model that cannot run `example_inputs`.
        PatternError: a pattern that matches no layer.
        DataError: a calibration of another model.
    """
    targets, seen = survey(model, example_inputs, include=include, exclude=exclude, keep_last=keep_last)
    layers = tuple(_layer(target, calibration, seen) for target in targets)
    metrics: tuple[Metric, ...] = ("plain",)
    if calibration is not None:
        felt = any("loss" in layer.problems for layer in layers)
        metrics = ("plain", "activation", "loss") if felt else ("plain", "activation")
    return Analysis(layers, metrics, count(model, example_inputs), calibration)


def survey(
    model: nn.Module, example_inputs: Any, *, include: Patterns, exclude: Patterns, keep_last: bool
) -> tuple[tuple[Target, ...], Trace]:
    """Find the layers and check all that can be checked before any long work; raises as `analyze` does."""
    seen = trace(model, as_inputs(example_inputs))
    targets = find_targets(model, seen, include=include, exclude=exclude, keep_last=keep_last)
    _require_finite(targets)
    return targets, seen


def _require_finite(targets: tuple[Target, ...]) -> None:
    for target in targets:
        for name, parameter in target.module.named_parameters(recurse=False):
            if not parameter.is_meta and parameter.is_floating_point() and not is_finite(parameter):
                raise ModelError(
                    f"{target.name}.{name} holds NaN or infinite values, which have no singular values; "
                    "repair the checkpoint"
                )


def _problems(target: Target, calibration: Calibration | None) -> dict[Metric, Problem]:
    """What there is to approximate in every metric; nothing for a layer that cannot be factored."""
    if target.refusal is not None:
        return {}
    # a copy, since factors may be asked for after the model has been trained on
    weight = kernels(target.module).detach().clone()
    found: dict[Metric, Problem] = {"plain": Problem(weight)}
    if calibration and all(site in calibration.moments for site in target.sites):
        moments = [calibration.moments[site] for site in target.sites]
        covariance, noise = pooled(moments, name=target.name, width=weight.flatten(2).shape[2])
        found["activation"] = Problem(weight, covariance, noise=noise)
        felt = [one.felt for one in moments if one.felt is not None]
        if len(felt) == len(moments):
            found["loss"] = found["activation"].felt(torch.stack(felt).sum(dim=0))
    return found


def _layer(target: Target, calibration: Calibration | None, seen: Trace) -> LayerAnalysis:
    module = target.module
    # a subclass or a parametrised layer cannot be exchanged, but its weight has a spectrum all the same
    weight = getattr(module, "weight", None) if isinstance(module, LAYERS) else None
    has_bias = getattr(module, "bias", None) is not None
    positions = sum((seen.positions.get(site, Positions()) for site in target.sites), Positions())
    whole = isinstance(weight, Tensor) and not weight.is_meta and weight.is_floating_point()
    sizes = geometry(module) if whole else None
    if isinstance(weight, Tensor) and sizes is not None:
        biases = len(target.sites) * sizes.groups * sizes.out if has_bias else 0
        dense = sizes.dense_cost(positions) + Cost(params=biases, macs=0)
        shape = tuple(weight.shape)
    else:
        dense = Cost(params=sum(p.numel() for p in module.parameters(recurse=False)), macs=0)
        shape = tuple(next((p.shape for p in module.parameters(recurse=False) if p.ndim >= 2), ()))
    return LayerAnalysis(
        name=target.name,
        also=target.also,
        kind=type(module).__name__,
        shape=shape,
        forms=forms_of(module),
        refusal=target.refusal,
        has_bias=has_bias,
        sites=target.sites,
        sizes=sizes,
        positions=positions,
        itemsize=next((p.element_size() for p in module.parameters(recurse=False)), 4),
        dense=dense,
        problems=_problems(target, calibration),
        _weight=matrices(module).detach().clone() if sizes is not None and target.refusal is not None else None,
    )
