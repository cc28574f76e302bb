"""Calibration: what the layers of a trained network see, as streamed means and covariances. No activation is kept."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import DataError, ModelError
from spectrim.execution import as_inputs, call, evaluating, split_labels, watching
from spectrim.linalg import algebra, is_finite


@dataclass(frozen=True, eq=False)
class Moments:
    """What one layer saw.

    Attributes:
        count: Number of input vectors.
        mean: Their mean, float64 (in,).
        covariance: Their covariance (divided by `count`), float64 (in, in).
        noise: Relative rounding noise of the covariance, from the precision it was summed in.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every Linear layer that was called.

    Attributes:
        moments: By layer name.
        batches: How many batches were run.
    """

    moments: Mapping[str, Moments]
    batches: int


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    labels: bool = False,
    layers: Collection[str] | None = None,
) -> Calibration:
    """Run batches through the model and stream the statistics of every Linear layer's input.

    Memory: one (in, in) float64 matrix per layer. The model's training flags, gradients and random state
    are as before afterwards.

    Args:
        model: Any module; batches are moved to its device.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments.
        max_batches: Stop after so many.
        labels: Batches are (inputs.., labels); the labels are set aside.
        layers: Names of the layers to watch; all Linear layers by default.

    Raises:
        DataError: no batches, a batch the model cannot run, or activations that are NaN or infinite.
    """
    sums: dict[str, _Running] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, _: Tensor) -> None:
        wanted = layers is None or name in layers
        if wanted and isinstance(layer, nn.Linear) and given.is_floating_point():
            sums.setdefault(name, _Running()).add(given.reshape(-1, given.shape[-1]))

    hint = "" if labels else " If the batches are pairs of inputs and labels, pass labels=True."
    seen = 0
    with evaluating(model), watching(model, watch):
        for position, batch in enumerate(batches):
            if max_batches is not None and position >= max_batches:
                break
            inputs = split_labels(batch, position=position)[0] if labels else as_inputs(batch)
            try:
                call(model, inputs, what=f"batch {position}", hint=hint)
            except ModelError as error:
                raise DataError(str(error)) from error
            seen += 1
    if not seen:
        raise DataError("the calibration data is empty; give at least one batch")
    return Calibration({name: running.finish(name) for name, running in sums.items() if running.count}, seen)


class _Running:
    """Mean and centred second moment, merged batch by batch (Chan, Golub & LeVeque 1979), never cancelling."""

    def __init__(self) -> None:
        self.count = 0
        self.noise = 0.0
        self.mean = torch.empty(0)
        self.scatter = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Add input vectors (n, in). Products are summed in at least float32, batches are merged in float64."""
        if not len(rows):
            return
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        mean = rows.mean(dim=0)
        centred = rows - mean
        scatter, mean = algebra(centred.T @ centred), algebra(mean)
        self.noise = max(self.noise, 4 * torch.finfo(rows.dtype).eps)
        if not self.count:
            self.count, self.mean, self.scatter = len(rows), mean, scatter
            return
        total = self.count + len(rows)
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    def finish(self, name: str) -> Moments:
        if not is_finite(self.scatter):
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        return Moments(self.count, self.mean, self.scatter / self.count, self.noise)
