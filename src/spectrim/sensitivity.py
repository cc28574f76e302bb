"""How much a network's answer feels an error in each layer: measured, by making one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace as with_changes

import torch
from torch import Tensor, nn

from spectrim.analyze import Analysis, LayerAnalysis
from spectrim.calibrate import Calibration, calibrate
from spectrim.errors import DataError, ModelError
from spectrim.execution import Inputs, call, evaluating, tensors
from spectrim.factorize import factored_at, mean_corrections
from spectrim.plan import Metric
from spectrim.surgery import replace

_LOST = 0.1
SAMPLES = 128

Told = Callable[[str, int, int], None]


def sensitivity(
    model: nn.Module,
    analysis: Analysis,
    batches: Sequence[Inputs],
    *,
    metric: Metric = "activation",
    on_progress: Told | None = None,
) -> Analysis:
    """The analysis with `sensitivity`: squared error of the network's outputs for each share of energy a layer loses.

    Each layer by itself is factored at a rank that loses about a tenth of its energy, and the network is run on about
    128 samples. Makes budgets better where layers differ in what they matter; no labels are used.

    Args:
        model: The model that was analysed; put back as it was after each layer.
        analysis: From `st.analyze` with a calibration.
        batches: Inputs; as many as are needed are used, whatever their order.
        metric: In which metric the layers are factored.
        on_progress: Told about every layer.

    Raises:
        DataError: no batches.
    """
    used = subset(batches, samples=SAMPLES)
    if not used:
        raise DataError("there is no data to measure sensitivities on; give at least one batch")
    means = {name: one.mean for name, one in analysis.calibration.moments.items()} if analysis.calibration else {}
    layers = [layer for layer in analysis if metric in layer.problems]
    whole = _outputs(model, used)
    found: dict[str, float] = {}
    for done, layer in enumerate(layers):
        if on_progress is not None:
            on_progress(layer.name, done, len(layers))
        found[layer.name] = _felt(model, layer, used, whole, metric=metric, means=means)
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
        return statistics.feeling(calibrate(model, subset(batches, samples=SAMPLES), layers=layers, gradients=True))
    except (DataError, ModelError):
        if required:
            raise
        return statistics


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
    model: nn.Module,
    layer: LayerAnalysis,
    batches: Sequence[Inputs],
    whole: Sequence[Tensor],
    *,
    metric: Metric,
    means: dict[str, Tensor],
) -> float:
    form = "spatial" if "spatial" in layer.forms else layer.forms[0]
    choices = layer.choices(form, metric)
    nearest = int(abs(choices.lost - _LOST).argmin())
    lost = float(choices.lost[nearest])
    if lost <= 0:
        return 0.0
    names = (layer.name, *layer.also)
    before = {name: model.get_submodule(name) for name in names}
    factors = layer.decomposition(form, metric).factors(tuple(int(rank) for rank in choices.ranks[nearest]))
    replace(model, factored_at(model, names, form=form, factors=factors, bias=mean_corrections(means)))
    try:
        now = _outputs(model, batches)
    finally:
        replace(model, before)
    squares = sum(float((one - other).square().sum()) for one, other in zip(whole, now, strict=True))
    return squares / max(1, sum(one.numel() for one in whole)) / lost


def _outputs(model: nn.Module, batches: Sequence[Inputs]) -> list[Tensor]:
    found: list[Tensor] = []
    with evaluating(model):
        for position, batch in enumerate(batches):
            answer = call(model, batch, what=f"batch {position}")
            found += [one.detach().to(torch.float32, copy=True) for one in tensors(answer) if one.is_floating_point()]
    return found
