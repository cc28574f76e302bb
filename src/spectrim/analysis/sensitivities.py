"""How much a network's answer feels an error in each layer: measured, by making one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace as with_changes

import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import CACHE, Prefix
from spectrim.analysis.calibration import Calibration, gradient_moments
from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.errors import DataError, ModelError, PlanError
from spectrim.core.execution import Inputs, call, evaluating, tensors
from spectrim.core.plans import Metric
from spectrim.layers.replacement import factored_at, mean_corrections
from spectrim.layers.selection import replace

_LEAST, _MOST = 32, 256
_GRADIENTS = 128
_LOST = 0.1
_PRECISION = 0.15

Told = Callable[[str, int, int], None]


def sensitivity(
    model: nn.Module,
    analysis: Analysis,
    batches: Sequence[Inputs],
    *,
    metric: Metric = "activation",
    cache: int | None = None,
    on_progress: Told | None = None,
) -> Analysis:
    """The analysis with `sensitivity`: squared error of the network's outputs for each share of energy a layer loses.

    Each layer by itself is factored, in the form with a closed solution, at a rank that loses about a tenth of its
    energy, and the network is run on 32 to 256 samples, until the mean over them is known to 15 %. Makes budgets better
    where layers differ in what they matter; no labels are used.

    Args:
        model: The model that was analysed; put back as it was after each layer.
        analysis: From `st.analyze` with a calibration.
        batches: Inputs; as many as are needed are used, whatever their order.
        metric: In which metric the layers are factored.
        cache: Bytes of blocks' outputs that may be kept, so that not every pass has to begin at the first layer.
            By default what the statistics take, at least 160 MiB.
        on_progress: Told about every layer.

    Raises:
        DataError: no batches.
        PlanError: a negative `cache`.
    """
    require_room(cache)
    used = subset(batches, samples=_MOST)
    if not used:
        raise DataError("there is no data to measure sensitivities on; give at least one batch")
    means = {name: one.mean for name, one in analysis.calibration.moments.items()} if analysis.calibration else {}
    layers = [layer for layer in analysis if metric in layer.problems]
    answers: list[list[Tensor]] = []
    prefix = Prefix(model, room=room(analysis, cache))
    found: dict[str, float] = {}
    for done, layer in enumerate(layers):
        if on_progress is not None:
            on_progress(layer.name, done, len(layers))
        found[layer.name] = _felt(prefix, layer, used, answers, metric=metric, means=means)
    return with_changes(analysis, sensitivity=found)


def felt(
    model: nn.Module,
    statistics: Calibration,
    batches: Sequence[Inputs],
    *,
    layers: Collection[str] | None = None,
    required: bool = True,
) -> Calibration:
    """The statistics with the gradients' moments that the loss metric needs, from about 128 samples.

    Raises:
        SpectrimError: the model cannot be differentiated; if not `required`, the statistics are given back as they are.
    """
    try:
        return statistics.feeling(gradient_moments(model, subset(batches, samples=_GRADIENTS), layers=layers))
    except (DataError, ModelError):
        if required:
            raise
        return statistics


def require_room(cache: int | None) -> None:
    """Refuse a negative number of bytes, before any long work."""
    if cache is not None and cache < 0:
        raise PlanError(f"cache={cache}: a number of bytes, 0 to keep nothing")


def room(analysis: Analysis, cache: int | None) -> int:
    """Bytes of activations that may be kept: as asked for, or as many again as the statistics take."""
    if cache is not None:
        return cache
    return max(CACHE, analysis.calibration.bytes) if analysis.calibration else CACHE


def subset(batches: Sequence[Inputs], *, samples: int) -> list[Inputs]:
    """Whole batches with at least so many samples, the same ones in whatever order they come."""
    used: list[Inputs] = []
    taken = 0
    for batch in sorted(batches, key=_digest):
        if taken >= samples:
            break
        used.append(batch)
        taken += max((len(one) for one in tensors((batch.args, batch.kwargs)) if one.ndim), default=1)
    return used


def _digest(batch: Inputs) -> float:
    """A number that tells batches apart."""
    return sum(float(one.double().sum()) for one in tensors((batch.args, batch.kwargs)))


def _felt(
    prefix: Prefix,
    layer: LayerAnalysis,
    batches: Sequence[Inputs],
    answers: list[list[Tensor]],
    *,
    metric: Metric,
    means: dict[str, Tensor],
) -> float:
    """The sensitivity of one layer; the dense network's answers are added as they are needed."""
    form = layer.forms[0]
    choices = layer.choices(form, metric)
    nearest = int(abs(choices.lost - _LOST).argmin())
    lost = float(choices.lost[nearest])
    if lost <= 0:
        return 0.0
    model, names = prefix.model, (layer.name, *layer.also)
    before = {name: model.get_submodule(name) for name in names}
    factors = layer.decomposition(form, metric).factors(tuple(int(rank) for rank in choices.ranks[nearest]))
    after = factored_at(model, names, form=form, factors=factors, bias=mean_corrections(means))
    squares = torch.zeros(0, dtype=torch.float64)
    for position, batch in enumerate(batches):
        if position == len(answers):
            answers.append(_answer(model, batch, position))
        replace(model, after)
        try:
            changed = _from(prefix, after, batch, position)
        finally:
            replace(model, before)
        squares = torch.cat([squares, _by_sample(answers[position], changed)])
        mean = float(squares.mean())
        if len(squares) >= _LEAST and 0 < mean >= float(squares.std()) / (_PRECISION * len(squares) ** 0.5):
            break
    return float(squares.mean()) / lost


def _from(prefix: Prefix, after: Mapping[str, nn.Module], batch: Inputs, position: int) -> list[Tensor]:
    """The network's answer with the layers `after` in it; what comes before them is remembered."""
    with prefix.passing(position) as reached:
        handles = [layer.register_forward_pre_hook(lambda *_: reached()) for layer in after.values()]
        try:
            return _answer(prefix.model, batch, position)
        finally:
            for handle in handles:
                handle.remove()


def _by_sample(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Mean squares of differences, sample by sample if all tensors have as many; else of everything, (1,)."""
    rows = {len(each) if each.ndim > 1 else 1 for each in one}
    number = rows.pop() if len(rows) == 1 else 1
    differences = [(a - b).reshape(number, -1) for a, b in zip(one, other, strict=True)]
    return torch.cat(differences, dim=1).double().square().mean(dim=1).cpu()


def _answer(model: nn.Module, batch: Inputs, position: int) -> list[Tensor]:
    with evaluating(model):
        answer = call(model, batch, what=f"batch {position}")
    return [one.detach().to(torch.float32, copy=True) for one in tensors(answer) if one.is_floating_point()]
