"""Calibration: streamed means and covariances of the inputs of a trained network's layers; no activation is kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.analysis.sampling import SamplingError, shrinkage
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, inputs_of
from spectrim.core.distributed import Accelerator, all_reduce, if_distributed, shard
from spectrim.core.errors import DataError, ModelError
from spectrim.core.execution import Inputs, call, evaluating, on_device_of, temporary
from spectrim.core.nested import tensors
from spectrim.layers.tracing import typed_layers, watching
from spectrim.layers.types import layer_type_of
from spectrim.linalg import Covariance, LowRankCovariance, add_covariances, matrix_of, square_of, to_float64
from spectrim.linalg.covariance import add_outer

_PROBES = 2
_WIDE = 2048
"""Inputs of a layer above which few vectors are held as they are, and not as a matrix."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one layer's inputs.

    Attributes:
        count: Number of input vectors.
        mean: Their mean, float64 (groups, in); a convolution's input vectors are the patches that its kernel sees.
        compact: Their covariance (divided by `count`): a matrix in float64, or of fewer vectors than inputs of a wide
            layer the vectors themselves, in the type in which the layer got them.
        rounding_tolerance: Relative rounding error of the covariance, from the precision it was summed in.
        samples: Number of samples (images, texts) that the vectors are of.
        shrinkage: Share of the covariance, from 0 to 1, that is better exchanged for the mean variance, as in the plain
            metric: what so few samples do not know of others (Ledoit & Wolf 2004); 1 for a single sample.
        output_grad_covariance: Second moment of the gradient of random combinations of the network's outputs with
            respect to this layer's output, summed over places, float64 (groups, out, out); None if not asked for.
        output_grad_shrinkage: As `shrinkage`, of that moment.
    """

    count: int
    mean: Tensor
    compact: Covariance
    rounding_tolerance: float
    samples: int
    shrinkage: float
    output_grad_covariance: Tensor | None = None
    output_grad_shrinkage: float = 0.0

    @property
    def covariance(self) -> Tensor:
        """The covariance as a matrix, float64 (groups, in, in); made anew at each access if the vectors are held."""
        return matrix_of(self.compact)

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        compact = vars(self.compact).values() if isinstance(self.compact, LowRankCovariance) else [self.compact]
        tensors = [tensor for tensor in (*compact, self.mean, self.output_grad_covariance) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
        return sum(seen.bytes for seen in self.moments.values())

    def with_output_grads(self, gradients: "Mapping[str, RunningGradients]") -> "Calibration":
        """These statistics with the gradients' moments of the same model, perhaps on less data."""
        moments = dict(self.moments)
        for name in moments.keys() & gradients.keys():
            total, share = gradients[name].total, gradients[name].shrinkage
            moments[name] = replace(moments[name], output_grad_covariance=total, output_grad_shrinkage=share)
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

    Memory: one (groups, in, in) float64 array per layer, where `in` counts the kernel's positions as well; of a layer
    with more than 2048 inputs the vectors themselves while there are fewer of them than inputs. The batches are not
    kept. The model's training flags, gradients and random state are as before afterwards.

    Args:
        model: Any module; batches are moved to its device.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments; NumPy arrays become tensors.
        max_batches: Stop after so many.
        labels: Batches are (inputs.., labels), or mappings with the entry "labels"; the labels are set aside.
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
    gradient_sums: dict[str, RunningGradients] = {}

    def add_rows(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if (layers is None or name in layers) and x.is_floating_point():
            rows = layer_type_of(layer).input_rows(layer, x.detach(), output=output, positions=positions)
            sums.setdefault(name, RunningCovariance()).add(rows, samples=samples)

    seen = samples = 0
    with evaluating(model), watching(model, add_rows):
        data = islice(batches_of(batches, what="the calibration data"), max_batches)
        for position, batch, is_own in shard(data, accelerator):
            seen = position + 1
            if not is_own:
                continue
            inputs, hint = inputs_of(batch, model, position=position, labels=labels)
            samples = inputs.samples
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
    gradient_sums = _reduced_gradients(gradient_sums, names, accelerator)
    return Calibration(moments, seen).with_output_grads(gradient_sums)


@dataclass(frozen=True, eq=False)
class PooledCovariance:
    """Statistics of the inputs of several call sites, each around its own mean, as each gets a bias of its own.

    Attributes:
        covariance: Float64 (groups, in, in), or the vectors it is made of.
        rounding_tolerance: See `Moments`.
        shrinkage: See `Moments`.
    """

    covariance: Covariance
    rounding_tolerance: float
    shrinkage: float


def pooled(moments: Sequence[Moments], *, name: str, width: int) -> PooledCovariance:
    """The statistics of all call sites of one weight.

    Raises:
        DataError: they are of another width than the weight.
    """
    for seen in moments:
        if seen.mean.shape[1] != width:
            raise DataError(
                f"the calibration saw inputs of size {seen.mean.shape[1]} at layer {name!r}, which takes {width}; "
                "it was made with another model"
            )
    total = sum(seen.count for seen in moments)
    whole = moments[0].compact
    if len(moments) > 1:
        whole = add_covariances([(seen.compact, seen.count / total) for seen in moments])
    shrunk_by = sum(seen.shrinkage * seen.count / total for seen in moments)
    return PooledCovariance(whole, max(seen.rounding_tolerance for seen in moments), shrunk_by)


def add_gradients(
    model: nn.Module,
    inputs: Inputs,
    layers: Collection[str] | None,
    sums: "dict[str, RunningGradients]",
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
        if not isinstance(output, Tensor) or not output.requires_grad or not output.numel():
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
                    sums.setdefault(name, RunningGradients()).add(rows, samples=inputs.samples, size=len(output))


def _reduced(
    sums: "dict[str, RunningCovariance]", names: Sequence[str], accelerator: Accelerator | None
) -> "dict[str, RunningCovariance]":
    """The statistics of all processes together."""
    if if_distributed(accelerator) is None:
        return sums
    own = {name: part for name, part in sums.items() if part.count}
    for part in own.values():
        part.merge()
    variations = {name: part.variation(part.mean, part.scatter / part.count) for name, part in own.items()}
    over_all = partial(all_reduce, names=names, accelerator=accelerator)
    counts = over_all(
        {
            name: torch.tensor([part.count, 1, part.rounding_tolerance, part.error.samples, variations[name]]).double()
            for name, part in own.items()
        }
    )
    means = over_all({name: part.mean * part.count for name, part in own.items()})
    means = {name: whole / counts[name][0] for name, whole in means.items()}
    scatters = over_all({name: part.around(means[name]) for name, part in own.items()})
    reduced = {}
    for name, sizes in counts.items():
        count, processes, tolerance, samples, variation = sizes.tolist()
        squares = variation + samples * float((scatters[name] / count).square().sum())
        reduced[name] = RunningCovariance(
            round(count),
            tolerance / processes,
            means[name],
            scatters[name],
            centre=means[name],
            error=SamplingError(round(samples), squares),
        )
    return reduced


def _reduced_gradients(
    sums: "dict[str, RunningGradients]", names: Sequence[str], accelerator: Accelerator | None
) -> "dict[str, RunningGradients]":
    """The gradients of all processes together."""
    if if_distributed(accelerator) is None:
        return sums
    over_all = partial(all_reduce, names=names, accelerator=accelerator)
    totals = over_all({name: part.total for name, part in sums.items()})
    sizes = over_all(
        {
            name: torch.tensor([part.count, part.error.samples, part.error.squares]).double()
            for name, part in sums.items()
        }
    )
    return {
        name: RunningGradients(round(count), total, SamplingError(round(samples), squares))
        for name, total in totals.items()
        for count, samples, squares in [sizes[name].tolist()]
    }


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random 1 and -1."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1


@dataclass(eq=False)
class RunningGradients:
    """Second moment of gradients, added up batch by batch, one probe at a time."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()).double())
    error: SamplingError = field(default_factory=SamplingError)

    def add(self, rows: Tensor, *, samples: int, size: int) -> None:
        """Add gradients (groups, n, out) of so many samples, with respect to a layer's batch of a size."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.total = self.total + to_float64(rows.mT @ rows) / (_PROBES * size)
        self.count += 1
        self.error.add(rows * (rows.shape[1] / size) ** 0.5, samples=samples)

    @property
    def shrinkage(self) -> float:
        """See `Moments`."""
        mean = self.total * (_PROBES / self.count)
        return shrinkage(mean, samples=self.error.samples, variation=self.error.variation(square_of(mean)))


@dataclass(eq=False)
class RunningCovariance:
    """Mean and centred second moment, merged batch by batch (Chan, Golub & LeVeque 1979), never cancelling.

    The vectors of a wide layer are held in `batches`, and merged once they are as many as its inputs.
    """

    count: int = 0
    rounding_tolerance: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))
    batches: list[Tensor] = field(default_factory=list)
    centre: Tensor = field(default_factory=lambda: torch.empty(0))
    error: SamplingError = field(default_factory=SamplingError)

    def add(self, rows: Tensor, *, samples: int) -> None:
        """Add input vectors (groups, n, in) of so many samples, those of each one after the other.

        Products are summed in at least float32, batches are merged in float64.
        """
        number, width = rows.shape[1:]
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        self.rounding_tolerance = max(self.rounding_tolerance, 4 * torch.finfo(rows.dtype).eps)
        self.count += number
        if number:
            self.centre = self.centre if self.centre.numel() else rows.mean(dim=1)
            self.error.add(rows - self.centre.to(rows).unsqueeze(1), samples=samples)
        if number and (width <= _WIDE or self.scatter.numel()):
            self._merge(rows)
        elif number:
            self.batches.append(rows.clone())
            if self.count >= width:
                self.merge()

    def merge(self) -> None:
        """Turn vectors that are held into their scatter."""
        batches, self.batches = self.batches, []
        if batches:
            self.count = 0
        for rows in batches:
            self.count += rows.shape[1]
            self._merge(rows)

    def _merge(self, rows: Tensor) -> None:
        number = rows.shape[1]
        mean = rows.mean(dim=1)
        centred = rows - mean.unsqueeze(1)
        scatter, mean = centred.mT @ centred, to_float64(mean)
        if self.count == number:
            self.mean, self.scatter = mean, to_float64(scatter)
            return
        shift = mean - self.mean
        # in place, since these are the largest arrays there are
        self.scatter += scatter.to(self.scatter.device)
        self.scatter.baddbmm_(shift.unsqueeze(2), shift.unsqueeze(1), alpha=(self.count - number) * number / self.count)
        self.mean = self.mean + shift * (number / self.count)

    def around(self, mean: Tensor) -> Tensor:
        """The scatter around another mean (groups, in)."""
        shift = self.mean - mean
        return self.scatter + self.count * shift.unsqueeze(2) * shift.unsqueeze(1)

    def finish(self, name: str) -> Moments:
        """The moments; `name` is for the message when they are not finite."""
        mean, compact = self._compact() if self.batches else (self.mean, self.scatter / self.count)
        values = compact if isinstance(compact, Tensor) else compact.rows
        if not torch.isfinite(values).all():
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        samples = self.error.samples
        share = shrinkage(compact, samples=samples, variation=self.variation(mean, compact))
        return Moments(self.count, mean, compact, self.rounding_tolerance, samples, share)

    def variation(self, mean: Tensor, covariance: Covariance) -> float:
        """How much the samples differ, see `SamplingError`."""
        away = mean - self.centre.to(mean)
        return self.error.variation(square_of(add_outer(covariance, away)))

    def _compact(self) -> tuple[Tensor, LowRankCovariance]:
        """The mean, and the vectors around it."""
        mean = torch.stack([to_float64(rows).sum(dim=1) for rows in self.batches]).sum(dim=0) / self.count
        middle, root = mean.unsqueeze(1), self.count**0.5
        rows = torch.cat([((to_float64(rows) - middle) / root).to(rows.dtype) for rows in self.batches], dim=1)
        return mean, LowRankCovariance(rows, mean.new_zeros(len(mean)))
