"""Calibration: what the layers of a trained network see, as streamed means and covariances. No activation is kept."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.errors import DataError, ModelError
from spectrim.execution import as_inputs, call, evaluating, split_labels, watching
from spectrim.linalg import algebra, is_finite


@dataclass(frozen=True, eq=False)
class Moments:
    """What one layer saw.

    Attributes:
        count: Number of input vectors.
        mean: Their mean, float64 (groups, in); a convolution's input vectors are the patches that its kernel sees.
        covariance: Their covariance (divided by `count`), float64 (groups, in, in).
        noise: Relative rounding noise of the covariance, from the precision it was summed in.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every Linear and convolution layer that was called.

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
    positions: int | None = 64,
) -> Calibration:
    """Run batches through the model and stream the statistics of every Linear and convolution layer's input.

    Memory: one (groups, in, in) float64 array per layer, where `in` counts the kernel's positions as well. The model's
    training flags, gradients and random state are as before afterwards.

    Args:
        model: Any module; batches are moved to its device.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments.
        max_batches: Stop after so many.
        labels: Batches are (inputs.., labels); the labels are set aside.
        layers: Names of the layers to watch; all by default.
        positions: Output positions of a convolution that are looked at in each image, evenly spread at random but the
            same for every image; None for all of them.

    Raises:
        DataError: no batches, a batch the model cannot run, or activations that are NaN or infinite.
    """
    sums: dict[str, _Running] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, _: Tensor) -> None:
        if (layers is None or name in layers) and given.is_floating_point():
            rows = patches(layer, given, positions=positions)
            sums.setdefault(name, _Running()).add(rows)

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


def patches(layer: nn.Module, given: Tensor, *, positions: int | None) -> Tensor:
    """The vectors that the layer multiplies its weight with: (groups, n, in).

    Args:
        layer: A Linear, Conv1d or Conv2d.
        given: Its input.
        positions: Output positions looked at in each image; None for all of them.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return given.reshape(1, -1, given.shape[-1])
    flat = isinstance(layer, nn.Conv1d)
    spatial = 1 if flat else 2
    x = given if given.ndim == spatial + 2 else given.unsqueeze(0)
    # torch keeps the padding of every mode, `same` included, as pairs from the last dimension on
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = (
        ((1, *option) if flat else tuple(option)) for option in (layer.kernel_size, layer.stride, layer.dilation)
    )
    columns = functional.unfold(x.unsqueeze(2) if flat else x, kernel, dilation=dilation, stride=stride)
    if positions is not None and positions < columns.shape[2]:
        chosen = torch.randperm(columns.shape[2], generator=torch.Generator().manual_seed(0))[:positions]
        columns = columns[:, :, chosen.to(columns.device)]
    images, _, places = columns.shape
    grouped = columns.reshape(images, layer.groups, -1, places)
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, images * places, -1)


class _Running:
    """Mean and centred second moment, merged batch by batch (Chan, Golub & LeVeque 1979), never cancelling."""

    def __init__(self) -> None:
        self.count = 0
        self.noise = 0.0
        self.mean = torch.empty(0)
        self.scatter = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Add input vectors (groups, n, in). Products are summed in at least float32, batches are merged in float64."""
        number = rows.shape[1]
        if not number:
            return
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        mean = rows.mean(dim=1)
        centred = rows - mean.unsqueeze(1)
        scatter, mean = algebra(centred.mT @ centred), algebra(mean)
        self.noise = max(self.noise, 4 * torch.finfo(rows.dtype).eps)
        if not self.count:
            self.count, self.mean, self.scatter = number, mean, scatter
            return
        total = self.count + number
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += (self.count * number / total) * shift.unsqueeze(2) * shift.unsqueeze(1)
        self.mean = self.mean + shift * (number / total)
        self.count = total

    def finish(self, name: str) -> Moments:
        if not is_finite(self.scatter):
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        return Moments(self.count, self.mean, self.scatter / self.count, self.noise)
