"""How much a network's outputs change with an error in each layer, measured by factoring one layer at a time."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace as with_changes
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import (
    ActivationCache,
    blocks_after_feeders,
    default_bytes,
)
from spectrim.analysis.calibration import Calibration, add_gradients, signs_of
from spectrim.analysis.metrics import measured_in, metric_of
from spectrim.analysis.moments import PROBES, RunningGradients
from spectrim.analysis.output_distance import NoDistanceError, outputs_of, outputs_with, squared_distances
from spectrim.analysis.recalled_pass import ForgottenOutputError
from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, inputs_of
from spectrim.core.errors import DataError, ModelError, PlanError, warn
from spectrim.core.execution import Inputs, ProgressCallback, evaluating, frozen
from spectrim.core.memory import IN_PLACE, Storage
from spectrim.core.plans import Metric
from spectrim.core.progress import progress_callback
from spectrim.layers.forms import find_form
from spectrim.layers.replacement import BiasOf, factored_at, mean_corrections, narrowed_at, product
from spectrim.layers.tokens import TokenMasks
from spectrim.layers.unfusing import unfused_as
from spectrim.layers.units import SingleWeight
from spectrim.linalg import Factors, Ranks

DIFFERENTIATED = 16
"""How many samples gradients are taken of at a time."""

_LEAST, _MOST, _GRADIENTS = 32, 256, 128
_PLACES, _GRADIENT_PLACES = 512, 4096
_LOST, _LEAST_LOST, _PRECISION = 0.1, 1e-9, 0.15


@checked
def sensitivity(
    model: nn.Module,
    analysis: Analysis,
    batches: Iterable[Any],
    *,
    labels: bool = False,
    metric: Metric | None = None,
    cache: int | None = None,
    on_progress: ProgressCallback | None = None,
    progress: bool = False,
) -> Analysis:
    """The analysis with `sensitivity`: squared error of the network's outputs for each share of energy a layer loses.

    Each layer by itself is factored, in the form with a closed solution, at a rank that loses about a tenth of its
    energy, and layers that can be narrowed together are narrowed, in each form in which they can. The network is run on
    32 to 256 samples, until the mean over them is known to 15 %; of a network that gives something at every place of a
    text, on 512 places or more. Makes budgets better where layers differ in how much they matter; no labels are used.
    The experts of a mixture are factored together, one projection at a time, and what the outputs change by is shared
    out by the energy that each of them loses.

    Args:
        model: The model that was analysed; put back as it was after each layer.
        analysis: From `st.analyze` with a calibration.
        batches: As for `st.calibrate`; as many as are needed are used, whatever their order.
        labels: Batches have labels, as for `st.calibrate`.
        metric: In which metric the layers are factored, by default the one that a budget takes: the best there is.
        cache: Bytes of blocks' outputs that may be kept, so that not every pass has to begin at the first layer.
            By default what the statistics take, or 512 to 768 MiB by the memory that is free.
        on_progress: Called with each layer's name, or that of a stack of experts, how many are done, and of how many.
        progress: Show the same on standard error, as `st.compress` does.

    Raises:
        DataError: no batches.
        PlanError: a negative `cache`, an analysis of another model, or one without the metric.
    """
    require_cache_bytes(cache)
    model = unfused_as(model, analysis.names)
    analysis.require_model(model)
    chosen = metric_of(analysis, metric, best=True)
    data = enumerate(batches_of(batches, what="the data to measure sensitivities on"))
    read = [inputs_of(batch, model, position=position, labels=labels) for position, batch in data]
    whole = subset(model, [inputs for inputs, _ in read], samples=_MOST)
    used = [part for batch in whole for few in batch.parts(places=_PLACES) for part in few.split(_LEAST)]
    if not used:
        raise DataError("there is no data to measure sensitivities on; give at least one batch")
    groups: dict[str, list[LayerAnalysis]] = {}
    for layer in analysis:
        if measured_in(layer, chosen):
            groups.setdefault(layer.stack or layer.name, []).append(layer)
    pairs = [(feeder.name, layer.name) for layer in analysis if layer.joint_forms for feeder in layer.feeders]
    activations = ActivationCache(model, cache_bytes_of(analysis, cache), used[0]).of(
        model, never=blocks_after_feeders(model, used[0], pairs)
    )
    moments = analysis.calibration.moments if analysis.calibration else {}
    counts = {name: seen.count for name, seen in moments.items()}
    runs = _SingleLayerRuns(activations, used, chosen, analysis.means, counts, hint=read[0][1])
    keeping = activations.of(model, forgets=False)
    del activations
    sensitivities: dict[str, dict[str, float]] = {}
    try:
        with progress_callback(on_progress, progress=progress) as report:
            for done, (name, group) in enumerate(groups.items()):
                report(name, done, len(groups))
                try:
                    sensitivities |= runs.of_group(group)
                except ForgottenOutputError:  # a batch for which the network reads more than the first one
                    runs = with_changes(runs, cache=keeping)
                    sensitivities |= runs.of_group(group)
    except NoDistanceError as error:
        warn(
            f"{str(error).format(type(model).__name__)}, so that no distance to the dense network can be measured; "
            "all layers count alike. A wrapper that returns what comes before a selection (scores and boxes of all "
            "places, say) makes budgets better"
        )
        sensitivities = {}
    layers = tuple(_possible(layer, sensitivities.get(layer.name)) for layer in analysis)
    return with_changes(analysis, layers=layers, sensitivity=sensitivities)


def _possible(layer: LayerAnalysis, measured: Mapping[str, float] | None) -> LayerAnalysis:
    """A layer that is not narrowed together with others if that has failed."""
    if measured is None or set(layer.joint_forms) <= set(measured) or not isinstance(layer.unit, SingleWeight):
        return layer
    return with_changes(layer, unit=with_changes(layer.unit, feeders=(), heads=None, scores=None))


def with_output_grads(
    model: nn.Module,
    statistics: Calibration,
    batches: Sequence[Inputs],
    *,
    layers: Collection[str] | None = None,
    required: bool = True,
    storage: Storage = IN_PLACE,
) -> Calibration:
    """The statistics with the gradients' moments that the loss metric needs, from about 128 samples or 4096 tokens.

    Raises:
        SpectrimError: the model cannot be differentiated; if not `required`, the statistics are given back as they are.
    """
    for freezes in (True, False):
        parts = list(_parts_for_gradients(model, batches))
        probes = 1 if sum(few.samples for _, few, _ in parts) >= _GRADIENTS else PROBES
        sums = defaultdict[str, RunningGradients](partial(RunningGradients, storage=storage))
        try:
            with evaluating(model), frozen(model) if freezes else nullcontext():
                for position, part, signs in parts:
                    add_gradients(model, part, layers, sums, what=f"batch {position}", signs=signs, probes=probes)
            return statistics.with_output_grads({name: part for name, part in sums.items() if part.tells})
        except (DataError, ModelError):
            if required and not freezes:
                raise
    return statistics


def _parts_for_gradients(model: nn.Module, batches: Sequence[Inputs]) -> Iterator[tuple[int, Inputs, torch.Generator]]:
    """The number of a batch, a part of it, and what the signs of all its parts are drawn from."""
    places = 0
    for position, batch in enumerate(subset(model, batches, samples=_GRADIENTS)):
        signs, parts = signs_of(position), batch.parts(places=_PLACES)
        for part in parts:
            yield from ((position, few, signs) for few in part.split(DIFFERENTIATED))
            places += part.places
            if len(parts) > 1 and places >= _GRADIENT_PLACES:
                return


def without_blocked_loss(analysis: Analysis) -> Analysis:
    """The analysis, without the loss metric if a layer matters that no gradient reaches, as below `no_grad`."""
    without = (layer for layer in analysis if "activation" in layer.problems and "loss" not in layer.problems)
    if not any(analysis.sensitivity_of(layer.name, layer.forms[0]) for layer in without):
        return analysis
    return with_changes(analysis, metrics=tuple(metric for metric in analysis.metrics if metric != "loss"))


def require_cache_bytes(cache: int | None) -> None:
    """Raise `PlanError` for a negative number of bytes, before any long work."""
    if cache is not None and cache < 0:
        raise PlanError(f"cache={cache}: a number of bytes, 0 to keep nothing")


def cache_bytes_of(analysis: Analysis, cache: int | None) -> int:
    """Bytes of activations that may be kept: as asked for, or as many again as the statistics take, or more."""
    if cache is not None:
        return cache
    return max(default_bytes(), analysis.calibration.bytes if analysis.calibration else 0)


def subset(model: nn.Module, batches: Sequence[Inputs], *, samples: int) -> list[Inputs]:
    """Whole batches with at least so many samples, the same ones in whatever order they come, long and short ones."""
    ordered = sorted(batches, key=lambda batch: _total(model, batch))
    used: list[Inputs] = []
    number = 0
    for place in sorted(range(len(ordered)), key=lambda place: _halving(place, len(ordered))):
        if number >= samples:
            break
        used.append(ordered[place])
        number += ordered[place].samples
    return used


def _total(model: nn.Module, batch: Inputs) -> float:
    """The sum of a batch's numbers, but those at padding; matrices hold one number for each token."""
    masks, total = TokenMasks.of(model, batch), 0.0
    for tensor in batch.tensors():
        places = masks.places((*tensor.shape, 1) if tensor.ndim == 2 else tensor.shape) if masks.masks else None
        total += float((tensor if places is None else places.take(tensor)).double().sum())
    return total


def _halving(place: int, number: int) -> tuple[bool, str]:
    """Sorts places of so many into the middle one, those in the middle of the halves, and so on."""
    digits = f"{place:0{number.bit_length()}b}"
    return not place, digits[::-1]


@dataclass(frozen=True, eq=False)
class _SingleLayerRuns:
    """Runs a network with one layer factored, or a stack of experts, and compares its outputs with the dense ones."""

    cache: ActivationCache
    batches: Sequence[Inputs]
    metric: Metric
    means: Mapping[str, Tensor]
    counts: Mapping[str, int]
    dense_outputs: list[list[Tensor]] = field(default_factory=list)
    hint: str = ""

    def of_group(self, layers: Sequence[LayerAnalysis]) -> dict[str, dict[str, float]]:
        """The sensitivities of layers that are factored together, by name and form."""
        measured: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
        for form in (layers[0].forms[0], *layers[0].joint_forms):
            try:
                slopes = self._measure(layers, form)
            except ModelError:
                if form not in layers[0].joint_forms:
                    raise
                continue  # on these data other layers read what it narrows
            for name, slope in slopes.items():
                measured[name][form] = slope
        for layer in layers:
            layer.release()
        return measured

    def _measure(self, layers: Sequence[LayerAnalysis], form: str) -> dict[str, float]:
        tried = [candidate for layer in layers if (candidate := self._candidate(layer, form))]
        slopes = dict.fromkeys((layer.name for layer in layers), 0.0)
        if not tried:
            return slopes
        bias, after = mean_corrections(self.means), dict[str, nn.Module]()
        for candidate in tried:
            after |= candidate.replacements(self.cache.model, bias)
        change = float(self._squares(after).mean())
        if len(layers) == 1:
            return {candidate.layer.name: change / candidate.lost for candidate in tried}
        usual = 0 if self.counts else 1
        seen = {layer.name: sum(self.counts.get(site, usual) for site in layer.call_sites) for layer in layers}
        even = sum(seen.values()) / len(seen)
        total = sum(seen[candidate.layer.name] * candidate.energy * candidate.lost for candidate in tried)
        for candidate in tried if total else ():
            # half as often as on these data, and half as often as all others, so that no expert counts for nothing
            slopes[candidate.layer.name] = change * (seen[candidate.layer.name] + even) / 2 * candidate.energy / total
        return slopes

    def _squares(self, after: Mapping[str, nn.Module]) -> Tensor:
        """By sample how much the outputs change with these layers in the place of the dense ones."""
        squares = torch.zeros(0, dtype=torch.float64)
        for position, batch in enumerate(self.batches):
            if position == len(self.dense_outputs):
                self.dense_outputs.append(outputs_of(self.cache.model, batch, position, hint=self.hint))
            changed = outputs_with(self.cache, after, batch=batch, position=position)
            lost_here = squared_distances(self.dense_outputs[position], changed, batch)
            squares = torch.cat([squares, lost_here])
            mean, least = float(squares.mean()), _LEAST if len(lost_here) <= batch.samples else _PLACES
            if len(squares) >= least and 0 < mean >= float(squares.std()) / (_PRECISION * len(squares) ** 0.5):
                break
        return squares

    def _candidate(self, layer: LayerAnalysis, form: str) -> "_Candidate | None":
        """Factors that lose about a tenth of the energy, and how much on these samples; None if none lose anything.

        Of other samples they may lose much more, where these are few. What loses nothing would look free, so that then
        smaller ranks are tried.
        """
        metric = measured_in(layer, self.metric)
        assert metric is not None
        problem, errors = layer.problems[metric], layer.rank_errors(form, metric)
        dense, total = self.cache.model.get_submodule(layer.name), problem.seen_error(0)
        losing = np.flatnonzero(errors.lost > _LEAST_LOST)
        place = len(losing) and 1 + int(np.abs(errors.lost[losing] - _LOST).argmin())
        while place and min(total, problem.total) > 0:
            ranks = tuple(int(rank) for rank in errors.ranks[losing[place - 1]])
            factors = layer.decomposition(form, metric).factors(ranks)
            lost = float(errors.lost[losing[place - 1]])
            if not find_form(form).narrows_outputs:
                lost = problem.seen_error(product(dense, form=form, factors=factors)) / problem.total
            if lost > _LEAST_LOST:
                return _Candidate(layer, form, ranks, factors, lost, problem.total)
            place //= 2
        return None


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A layer in a form at some ranks; `lost` is the share of its `energy` that it loses."""

    layer: LayerAnalysis
    form: str
    ranks: Ranks
    factors: Factors
    lost: float
    energy: float

    def replacements(self, model: nn.Module, bias: BiasOf) -> dict[str, nn.Module]:
        """The layers that take its place, by name."""
        layer, form = self.layer, self.form
        if form not in layer.joint_forms:
            return factored_at(model, layer.names, form=form, factors=self.factors, bias=bias)
        feeders, (rank,) = [feeder.name for feeder in layer.feeders], self.ranks
        return narrowed_at(model, layer.name, feeders, form=form, rank=rank, factors=self.factors, bias=bias)
