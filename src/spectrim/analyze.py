"""Analysis: the spectrum of every layer in every metric, what it costs, and why a layer cannot be factored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.calibrate import Calibration, Moments
from spectrim.errors import DataError, ModelError
from spectrim.execution import Trace, as_inputs, trace
from spectrim.forms import FORMS, dense_cost, full_rank, matrices, rank_cost, sizes_of
from spectrim.linalg import (
    Decomposition,
    Spectrum,
    is_finite,
    metric_decomposition,
    plain_decomposition,
    spectrum,
)
from spectrim.plan import Cost, FormName, Metric
from spectrim.surgery import Patterns, Target, find_targets


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What is known of one weight.

    Attributes:
        name: The layer's name.
        also: Other layers with the same weight.
        kind: Its class, such as `Linear`.
        shape: The weight's shape, output first.
        form: The form its type of layer can take, or None.
        refusal: Why it stays dense all the same, or None.
        has_bias: Whether the layer adds a bias.
        places: How many distinct layers use the weight (each keeps a bias of its own).
        positions: Output vectors made in one forward pass of the example inputs, all uses together.
        full_rank: The largest number of singular values the weight can have, in each group.
        dense: Its cost as it is.
        per_rank: What each unit of rank costs in the factored form, without the bias.
        spectra: The singular values by metric; empty for layers that are not matrices.
    """

    name: str
    also: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    form: FormName | None
    refusal: str | None
    has_bias: bool
    places: int
    positions: int
    full_rank: int
    dense: Cost
    per_rank: Cost
    spectra: Mapping[Metric, Spectrum]

    def cost(self, *, rank: int, metric: Metric) -> Cost:
        """The cost of the factored form at `rank`."""
        return Cost(params=rank * self.per_rank.params + self._biases(metric), macs=rank * self.per_rank.macs)

    def break_even(self, metric: Metric) -> int:
        """The largest rank at which the factored form stores fewer numbers than the layer; 0 when none does."""
        room = self.dense.params - self._biases(metric) - 1
        return max(0, room // self.per_rank.params) if self.form else 0

    def _biases(self, metric: Metric) -> int:
        return self.places * self.shape[0] if self.has_bias or metric == "activation" else 0


@dataclass(frozen=True, eq=False)
class Analysis:
    """The layers of one model in order of execution, and the decompositions that factors of any rank are cut from.

    Attributes:
        layers: One entry a weight.
        metrics: The available metrics, the best one last.
        decompositions: By layer name and metric; not part of the printed value.
        calibration: The statistics it was made with, if any.
    """

    layers: tuple[LayerAnalysis, ...]
    metrics: tuple[Metric, ...]
    decompositions: Mapping[tuple[str, Metric], Decomposition] = field(repr=False)
    calibration: Calibration | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[LayerAnalysis]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerAnalysis:
        for layer in self.layers:
            if name in (layer.name, *layer.also):
                return layer
        raise KeyError(f"the analysis has no layer {name!r}; it has {', '.join(layer.name for layer in self.layers)}")


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
    decompositions: dict[tuple[str, Metric], Decomposition] = {}
    layers = []
    for target in targets:
        found = _decompose(target, calibration)
        decompositions |= {(target.name, metric): one for metric, one in found.items()}
        layers.append(_describe(target, found, positions=sum(seen.positions.get(site, 0) for site in target.sites)))
    metrics: tuple[Metric, ...] = ("plain",) if calibration is None else ("plain", "activation")
    return Analysis(tuple(layers), metrics, decompositions, calibration)


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


def _decompose(target: Target, calibration: Calibration | None) -> dict[Metric, Decomposition]:
    """Both decompositions of a layer that can be factored; none for the others."""
    if target.refusal is not None:
        return {}
    weight = matrices(target.module)
    found: dict[Metric, Decomposition] = {"plain": plain_decomposition(weight)}
    if calibration and all(site in calibration.moments for site in target.sites):
        moments = [calibration.moments[site] for site in target.sites]
        covariance, noise = _pooled(moments, name=target.name, width=weight.shape[2])
        found["activation"] = metric_decomposition(weight, covariance, noise=noise)
    return found


def _pooled(moments: list[Moments], *, name: str, width: int) -> tuple[Tensor, float]:
    """The covariance around each place's own mean, since each place gets a bias of its own."""
    for one in moments:
        if one.mean.shape[1] != width:
            raise DataError(
                f"the calibration saw inputs of size {one.mean.shape[1]} at layer {name!r}, which takes {width}; "
                "it was made with another model"
            )
    if len(moments) == 1:
        return moments[0].covariance, moments[0].noise
    total = sum(one.count for one in moments)
    weighted = torch.stack([one.covariance * (one.count / total) for one in moments])
    return weighted.sum(dim=0), max(one.noise for one in moments)


def _describe(target: Target, found: dict[Metric, Decomposition], *, positions: int) -> LayerAnalysis:
    module = target.module
    # a subclass or a parametrised layer cannot be exchanged, but its weight has a spectrum all the same
    weight = getattr(module, "weight", None) if isinstance(module, tuple(FORMS)) else None
    has_bias = getattr(module, "bias", None) is not None
    spectra: dict[Metric, Spectrum] = {metric: one.spectrum for metric, one in found.items()}
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        dense = Cost(params=sum(p.numel() for p in module.parameters(recurse=False)), macs=0)
        shape = tuple(next((p.shape for p in module.parameters(recurse=False) if p.ndim >= 2), ()))
        per_rank, rank = Cost(params=1, macs=0), 0
    else:
        sizes = sizes_of(module)
        biases = len(target.sites) * len(weight) if has_bias else 0
        dense = dense_cost(sizes, positions=positions) + Cost(params=biases, macs=0)
        shape, per_rank, rank = tuple(weight.shape), rank_cost(sizes, positions=positions), full_rank(sizes)
        if not spectra:
            spectra = {"plain": spectrum(matrices(module))}
    return LayerAnalysis(
        name=target.name,
        also=target.also,
        kind=type(module).__name__,
        shape=shape,
        form=FORMS.get(type(module)),
        refusal=target.refusal,
        has_bias=has_bias,
        places=len(target.sites),
        positions=positions,
        full_rank=rank,
        dense=dense,
        per_rank=per_rank,
        spectra=spectra,
    )
