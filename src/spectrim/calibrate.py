"""Calibration: what the layers of a trained network see, as streamed means and covariances. No activation is kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
        felt: Second moment of the gradient of random combinations of the network's outputs with respect to this layer's
            output, summed over places, float64 (groups, out, out); None if it was not asked for.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    noise: float
    felt: Tensor | None = None


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
    sums: dict[str, Running] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if (layers is None or name in layers) and given.is_floating_point():
            rows = patches(layer, given, positions=positions, size=output.shape[-2:])
            sums.setdefault(name, Running()).add(rows)

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


def patches(layer: nn.Module, given: Tensor, *, positions: int | None, size: Sequence[int] = ()) -> Tensor:
    """The vectors that the layer multiplies its weight with (see `forms.kernels`): (groups, n, in).

    Args:
        layer: A Linear, Conv1d, Conv2d or ConvTranspose2d.
        given: Its input.
        positions: Output positions looked at in each image; None for all of them.
        size: Height and width of the output, needed for a transposed convolution called with `output_size`.
    """
    if isinstance(layer, nn.Linear):
        return given.reshape(1, -1, given.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    flat = isinstance(layer, nn.Conv1d)
    x = given if given.ndim == len(layer.kernel_size) + 2 else given.unsqueeze(0)
    kernel, stride, dilation = (
        ((1, *option) if flat else tuple(option)) for option in (layer.kernel_size, layer.stride, layer.dilation)
    )
    if isinstance(layer, nn.ConvTranspose2d):
        x, stride = _stretched(layer, x, size), (1, 1)
    else:
        # torch keeps the padding of every mode, `same` included, as pairs from the last dimension on
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = x.unsqueeze(2) if flat else x
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
    windows = windows[..., :: dilation[0], :: dilation[1]]
    images, channels, height, width = windows.shape[:4]
    # picked from a view, so that only the sampled windows are ever copied
    chosen = sample(height * width, positions).to(x.device)
    windows = windows[:, :, chosen // width, chosen % width]
    grouped = windows.reshape(images, layer.groups, channels // layer.groups, len(chosen), -1)
    return grouped.permute(1, 0, 3, 2, 4).reshape(layer.groups, images * len(chosen), -1)


def answers(layer: nn.Module, output: Tensor, *, positions: int | None) -> Tensor:
    """The layer's outputs at the places of `patches`: (groups, n, out)."""
    if isinstance(layer, nn.Linear):
        return output.reshape(1, -1, output.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    y = output if output.ndim == len(layer.kernel_size) + 2 else output.unsqueeze(0)
    columns = y.flatten(2)
    columns = columns[:, :, sample(columns.shape[2], positions).to(columns.device)]
    images, _, places = columns.shape
    grouped = columns.reshape(images, layer.groups, -1, places)
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, images * places, -1)


def sample(places: int, positions: int | None) -> Tensor:
    """The places that are looked at: all of them, or `positions` at random, the same ones every time."""
    if positions is None or positions >= places:
        return torch.arange(places)
    return torch.randperm(places, generator=torch.Generator().manual_seed(0))[:positions]


def _stretched(layer: nn.ConvTranspose2d, x: Tensor, size: Sequence[int]) -> Tensor:
    """The input of the ordinary convolution that a transposed one amounts to: zeros between and around its entries."""
    height, width = ((n - 1) * step + 1 for n, step in zip(x.shape[-2:], layer.stride, strict=True))
    wide = x.new_zeros(*x.shape[:2], height, width)
    wide[:, :, :: layer.stride[0], :: layer.stride[1]] = x
    pads: list[int] = []
    for axis in (1, 0):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        before = reach - int(layer.padding[axis])
        shape = wide.shape[2 + axis] + 2 * before - reach + layer.output_padding[axis]
        after = before + layer.output_padding[axis] + (size[axis] - shape if size else 0)
        pads += [before, after]
    return functional.pad(wide, pads)


class Running:
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
        """The moments; `name` is for the message when they are not finite."""
        if not is_finite(self.scatter):
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        return Moments(self.count, self.mean, self.scatter / self.count, self.noise)
