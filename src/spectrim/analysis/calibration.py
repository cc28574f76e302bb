"""Calibration: what the layers of a trained network see, as streamed means and covariances. No activation is kept."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.distributed import Accelerator, in_turn, summed
from spectrim.core.errors import DataError, ModelError
from spectrim.core.execution import (
    WATCHED,
    Inputs,
    as_inputs,
    call,
    device_of,
    evaluating,
    split_labels,
    tensors,
    to_device,
    watching,
)
from spectrim.linalg import algebra, is_finite

_PROBES = 2


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

    @property
    def bytes(self) -> int:
        """What the statistics take in memory."""
        kept = [
            one for each in self.moments.values() for one in (each.mean, each.covariance, each.felt) if one is not None
        ]
        return sum(one.numel() * one.element_size() for one in kept)

    def feeling(self, gradients: Mapping[str, Tensor]) -> "Calibration":
        """These statistics with the gradients' moments of the same model, perhaps on less data."""
        return replace(
            self, moments={name: replace(one, felt=gradients.get(name)) for name, one in self.moments.items()}
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    labels: bool = False,
    layers: Collection[str] | None = None,
    positions: int | None = 64,
    gradients: bool = False,
    accelerator: Accelerator | None = None,
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
        positions: Places of each sample that are looked at (output pixels of a convolution, time steps of a linear
            layer), chosen at random but the same for every sample; None for all of them.
        gradients: Also stream the second moments of gradients that the loss metric is made of; takes about four times
            as long. No labels are used.
        accelerator: An `accelerate.Accelerator`, under `torchrun`: every process is given the same batches and runs
            those that are its turn, and all get the statistics of all, equal to one process's up to rounding.

    Raises:
        DataError: no batches, a batch the model cannot run, or activations that are NaN or infinite.
    """
    sums: dict[str, Running] = {}
    felt: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if (layers is None or name in layers) and given.is_floating_point():
            rows = patches(layer, given.detach(), positions=positions, size=output.shape[-2:])
            sums.setdefault(name, Running()).add(rows)

    hint = "" if labels else " If the batches are pairs of inputs and labels, pass labels=True."
    seen = 0
    with evaluating(model), watching(model, watch):
        for position, batch, mine in in_turn(batches, accelerator):
            if max_batches is not None and position >= max_batches:
                break
            seen += 1
            if not mine:
                continue
            inputs = split_labels(batch, position=position)[0] if labels else as_inputs(batch)
            try:
                if gradients:
                    _feel(model, inputs, layers, felt, what=f"batch {position}", hint=hint)
                else:
                    call(model, inputs, what=f"batch {position}", hint=hint)
            except ModelError as error:
                raise DataError(str(error)) from error
    if not seen:
        raise DataError("the calibration data is empty; give at least one batch")
    names = [name for name, one in model.named_modules() if isinstance(one, WATCHED)]
    sums, felt = _pooled_sums(sums, names, accelerator), summed(felt, names=names, accelerator=accelerator)
    moments = {name: running.finish(name) for name, running in sums.items() if running.count}
    return Calibration({name: replace(one, felt=felt.get(name)) for name, one in moments.items()}, seen)


def gradient_moments(
    model: nn.Module, batches: Iterable[Inputs], *, layers: Collection[str] | None = None
) -> dict[str, Tensor]:
    """By layer name, what `Moments.felt` is, without any other statistics.

    Raises:
        ModelError: a batch the model cannot run, or a model that cannot be differentiated.
    """
    felt: dict[str, Tensor] = {}
    with evaluating(model):
        for position, batch in enumerate(batches):
            _feel(model, batch, layers, felt, what=f"batch {position}")
    return felt


def pooled(moments: list[Moments], *, name: str, width: int) -> tuple[Tensor, float]:
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


def patches(layer: nn.Module, given: Tensor, *, positions: int | None, size: Sequence[int] = ()) -> Tensor:
    """The vectors that the layer multiplies its weight with (see `forms.kernels`): (groups, n, in).

    Args:
        layer: A Linear, Conv1d, Conv2d or ConvTranspose2d.
        given: Its input.
        positions: Output positions looked at in each image; None for all of them.
        size: Height and width of the output, needed for a transposed convolution called with `output_size`.
    """
    if isinstance(layer, nn.Linear):
        return _steps(given, positions)
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
    """The layer's outputs at the places of `patches`, copied: (groups, n, out)."""
    if isinstance(layer, nn.Linear):
        return _steps(output, positions).clone()
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    y = output if output.ndim == len(layer.kernel_size) + 2 else output.unsqueeze(0)
    columns = y.flatten(2)
    columns = columns[:, :, sample(columns.shape[2], positions).to(columns.device)]
    images, _, places = columns.shape
    grouped = columns.reshape(images, layer.groups, -1, places)
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, images * places, -1)


def _steps(vectors: Tensor, positions: int | None) -> Tensor:
    """Vectors (batch, .., size), sampled over what lies between, as (1, n, size)."""
    if vectors.ndim < 3:
        return vectors.reshape(1, -1, vectors.shape[-1])
    between = vectors.flatten(1, -2)
    return between[:, sample(between.shape[1], positions).to(vectors.device)].flatten(0, 1).unsqueeze(0)


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


def _feel(
    model: nn.Module,
    inputs: Inputs,
    layers: Collection[str] | None,
    felt: dict[str, Tensor],
    *,
    what: str,
    hint: str = "",
) -> None:
    """Add the second moments, per sample, of the gradients of random signs times the network's outputs.

    The mean over random signs of such a gradient's second moment is that of all outputs together (Hutchinson 1990);
    signs have no mean over an output's last dimension, since logits are only known up to a constant.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def tap(name: str, layer: nn.Module) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            outputs.append((name, layer, output))
            # what follows may work in place, and would take the tensor out from under us
            return output.clone()

        return hook

    chosen = [(name, one) for name, one in model.named_modules() if isinstance(one, WATCHED)]
    handles = [one.register_forward_hook(tap(name, one)) for name, one in chosen if layers is None or name in layers]
    signs = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            answer = call(model, _differentiable(to_device(inputs, device_of(model))), what=what, hint=hint)
            for probe in range(_PROBES):
                total = sum(((_signs(one, signs) * one).sum() for one in _answers(answer)), torch.zeros(()))
                if not total.requires_grad:
                    return
                wanted = [output for _, _, output in outputs]
                try:
                    found = torch.autograd.grad(total, wanted, retain_graph=probe + 1 < _PROBES, allow_unused=True)
                except RuntimeError as error:
                    raise ModelError(
                        f"{type(model).__name__} cannot be differentiated: {str(error).splitlines()[0]}; use the "
                        "activation metric, which needs no gradients"
                    ) from error
                for (name, layer, output), gradient in zip(outputs, found, strict=True):
                    if gradient is not None:
                        rows = _summable(answers(layer, gradient, positions=None))
                        moment = algebra(rows.mT @ rows) / (_PROBES * len(output))
                        felt[name] = felt[name] + moment if name in felt else moment
    finally:
        for handle in handles:
            handle.remove()


def _pooled_sums(
    sums: "dict[str, Running]", names: Sequence[str], accelerator: Accelerator | None
) -> "dict[str, Running]":
    """The statistics of all processes together."""
    if accelerator is None or accelerator.num_processes == 1:
        return sums
    sums = {name: one for name, one in sums.items() if one.count}

    def over_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return summed(tensors, names=names, accelerator=accelerator)

    counts = over_all({name: torch.tensor([one.count, 1, one.noise]).double() for name, one in sums.items()})
    means = over_all({name: one.mean * one.count for name, one in sums.items()})
    means = {name: whole / counts[name][0] for name, whole in means.items()}
    scatters = over_all({name: one.around(means[name]) for name, one in sums.items()})
    made = {}
    for name, (count, processes, noise) in ((name, one.tolist()) for name, one in counts.items()):
        made[name] = Running()
        made[name].count, made[name].noise = round(count), noise / processes
        made[name].mean, made[name].scatter = means[name], scatters[name]
    return made


def _differentiable(inputs: Inputs) -> Inputs:
    """Inputs that gradients flow from, so that layers with frozen weights are reached as well."""

    def free(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_().clone()
        return value

    return Inputs(tuple(map(free, inputs.args)), {key: free(value) for key, value in inputs.kwargs.items()})


def _answers(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's answer."""
    return [one for one in tensors(value) if one.is_floating_point()]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random 1 and -1, less their mean over the last dimension where it has several entries."""
    signs = torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
    return signs - signs.mean(dim=-1, keepdim=True) if like.ndim > 1 and like.shape[-1] > 1 else signs


def _summable(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


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
        rows = _summable(rows.detach())
        mean = rows.mean(dim=1)
        centred = rows - mean.unsqueeze(1)
        scatter, mean = centred.mT @ centred, algebra(mean)
        self.noise = max(self.noise, 4 * torch.finfo(rows.dtype).eps)
        if not self.count:
            self.count, self.mean, self.scatter = number, mean, algebra(scatter)
            return
        total = self.count + number
        shift = mean - self.mean
        # in place, since these are the largest arrays there are
        self.scatter += scatter.to(self.scatter.device)
        self.scatter.baddbmm_(shift.unsqueeze(2), shift.unsqueeze(1), alpha=self.count * number / total)
        self.mean = self.mean + shift * (number / total)
        self.count = total

    def around(self, mean: Tensor) -> Tensor:
        """The scatter around another mean (groups, in)."""
        shift = self.mean - mean
        return self.scatter + self.count * shift.unsqueeze(2) * shift.unsqueeze(1)

    def finish(self, name: str) -> Moments:
        """The moments; `name` is for the message when they are not finite."""
        if not is_finite(self.scatter):
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        return Moments(self.count, self.mean, self.scatter / self.count, self.noise)
