"""Calibration: streamed means and covariances of the inputs of a trained network's layers; no activation is kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.distributed import Accelerator, all_reduce, if_distributed, shard
from spectrim.core.errors import DataError, ModelError
from spectrim.core.execution import Inputs, as_inputs, call, evaluating, on_device_of, split_labels, temporary
from spectrim.core.nested import tensors
from spectrim.layers.tracing import typed_layers, watching
from spectrim.layers.types import layer_type_of
from spectrim.linalg import to_float64

_PROBES = 2


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one layer's inputs.

    Attributes:
        count: Number of input vectors.
        mean: Their mean, float64 (groups, in); a convolution's input vectors are the patches that its kernel sees.
        covariance: Their covariance (divided by `count`), float64 (groups, in, in).
        rounding_tolerance: Relative rounding error of the covariance, from the precision it was summed in.
        output_grad_covariance: Second moment of the gradient of random combinations of the network's outputs with
            respect to this layer's output, summed over places, float64 (groups, out, out); None if not asked for.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    rounding_tolerance: float
    output_grad_covariance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every layer with a weight matrix that was called.

    Attributes:
        moments: By layer name.
        batches: How many batches were run.
    """

    moments: Mapping[str, Moments]
    batches: int

    @property
    def means(self) -> dict[str, Tensor]:
        """Mean inputs by layer name."""
        return {name: moments.mean for name, moments in self.moments.items()}

    @property
    def bytes(self) -> int:
        """What the statistics take in memory."""
        tensors = (tensor for seen in self.moments.values() for tensor in vars(seen).values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))

    def with_output_grads(self, covariances: Mapping[str, Tensor]) -> "Calibration":
        """These statistics with the gradients' moments of the same model, perhaps on less data."""
        of_all = self.moments.items()
        moments = {name: replace(seen, output_grad_covariance=covariances.get(name)) for name, seen in of_all}
        return replace(self, moments=moments)


@checked
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
    sums: dict[str, RunningCovariance] = {}
    gradient_sums: dict[str, Tensor] = {}

    def add_rows(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if (layers is None or name in layers) and x.is_floating_point():
            rows = layer_type_of(layer).input_rows(layer, x.detach(), output=output, positions=positions)
            sums.setdefault(name, RunningCovariance()).add(rows)

    hint = "" if labels else " If the batches are pairs of inputs and labels, pass labels=True."
    seen = 0
    with evaluating(model), watching(model, add_rows):
        for position, batch, is_own in shard(islice(batches, max_batches), accelerator):
            seen = position + 1
            if not is_own:
                continue
            inputs = split_labels(batch, position=position)[0] if labels else as_inputs(batch)
            try:
                if gradients:
                    add_gradients(model, inputs, layers, gradient_sums, what=f"batch {position}", hint=hint)
                else:
                    call(model, inputs, what=f"batch {position}", hint=hint)
            except ModelError as error:
                raise DataError(str(error)) from error
    if not seen:
        raise DataError("the calibration data is empty; give at least one batch")
    names = list(typed_layers(model))
    sums = _reduced(sums, names, accelerator)
    moments = {name: statistics.finish(name) for name, statistics in sums.items() if statistics.count}
    gradient_sums = all_reduce(gradient_sums, names=names, accelerator=accelerator)
    return Calibration(moments, seen).with_output_grads(gradient_sums)


def pooled(moments: Sequence[Moments], *, name: str, width: int) -> tuple[Tensor, float]:
    """The covariance around each call site's own mean, as each gets a bias of its own; and its rounding tolerance."""
    for seen in moments:
        if seen.mean.shape[1] != width:
            raise DataError(
                f"the calibration saw inputs of size {seen.mean.shape[1]} at layer {name!r}, which takes {width}; "
                "it was made with another model"
            )
    if len(moments) == 1:
        return moments[0].covariance, moments[0].rounding_tolerance
    total = sum(seen.count for seen in moments)
    weighted = torch.stack([seen.covariance * (seen.count / total) for seen in moments])
    return weighted.sum(dim=0), max(seen.rounding_tolerance for seen in moments)


def add_gradients(
    model: nn.Module,
    inputs: Inputs,
    layers: Collection[str] | None,
    sums: dict[str, Tensor],
    *,
    what: str,
    hint: str = "",
) -> None:
    """Add to `sums`, by layer name, one batch's share of `Moments.output_grad_covariance`.

    The mean over random signs of such a gradient's second moment is that of all outputs together (Hutchinson 1990).

    Raises:
        ModelError: a batch the model cannot run, or a model that cannot be differentiated.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def tap(name: str, layer: nn.Module, _: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        outputs.append((name, layer, output))
        return output.clone()  # what follows may work in place

    chosen = ((name, model.get_submodule(name)) for name in typed_layers(model) if layers is None or name in layers)
    signs = torch.Generator().manual_seed(0)
    with temporary(layer.register_forward_hook(partial(tap, name)) for name, layer in chosen), torch.enable_grad():
        # gradients flow from the inputs, so that layers with frozen weights are reached as well
        own = on_device_of(model, inputs).map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
        values = [tensor for tensor in tensors(call(model, own, what=what, hint=hint)) if tensor.is_floating_point()]
        taps = tuple(outputs)  # where activations are computed again for the gradient, hooks run again
        for probe in range(_PROBES):
            total = sum(((_signs(value, signs) * value).sum() for value in values), torch.zeros(()))
            if not total.requires_grad:
                return
            wrt = [output for _, _, output in taps]
            try:
                gradients = torch.autograd.grad(total, wrt, retain_graph=probe + 1 < _PROBES, allow_unused=True)
            except RuntimeError as error:
                raise ModelError(
                    f"{type(model).__name__} cannot be differentiated: {str(error).splitlines()[0]}; use the "
                    "activation metric, which needs no gradients"
                ) from error
            for (name, layer, output), gradient in zip(taps, gradients, strict=True):
                if gradient is not None:
                    rows = layer_type_of(layer).output_rows(layer, gradient, positions=None)
                    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                    moment = to_float64(rows.mT @ rows) / (_PROBES * len(output))
                    sums[name] = sums[name] + moment if name in sums else moment


def _reduced(
    sums: "dict[str, RunningCovariance]", names: Sequence[str], accelerator: Accelerator | None
) -> "dict[str, RunningCovariance]":
    """The statistics of all processes together."""
    if if_distributed(accelerator) is None:
        return sums
    own = {name: part for name, part in sums.items() if part.count}
    over_all = partial(all_reduce, names=names, accelerator=accelerator)
    counts = over_all(
        {name: torch.tensor([part.count, 1, part.rounding_tolerance]).double() for name, part in own.items()}
    )
    means = over_all({name: part.mean * part.count for name, part in own.items()})
    means = {name: whole / counts[name][0] for name, whole in means.items()}
    scatters = over_all({name: part.around(means[name]) for name, part in own.items()})
    reduced = {}
    for name, sizes in counts.items():
        count, processes, tolerance = sizes.tolist()
        reduced[name] = RunningCovariance(round(count), tolerance / processes, means[name], scatters[name])
    return reduced


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random 1 and -1."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1


@dataclass(eq=False)
class RunningCovariance:
    """Mean and centred second moment, merged batch by batch (Chan, Golub & LeVeque 1979), never cancelling."""

    count: int = 0
    rounding_tolerance: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, rows: Tensor) -> None:
        """Add input vectors (groups, n, in). Products are summed in at least float32, batches are merged in float64."""
        number = rows.shape[1]
        if not number:
            return
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        mean = rows.mean(dim=1)
        centred = rows - mean.unsqueeze(1)
        scatter, mean = centred.mT @ centred, to_float64(mean)
        self.rounding_tolerance = max(self.rounding_tolerance, 4 * torch.finfo(rows.dtype).eps)
        if not self.count:
            self.count, self.mean, self.scatter = number, mean, to_float64(scatter)
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
        if not torch.isfinite(self.scatter).all():
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        return Moments(self.count, self.mean, self.scatter / self.count, self.rounding_tolerance)
