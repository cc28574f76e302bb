"""Calibration: streamed means and covariances of the inputs of a trained network's layers; no activation is kept."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectrim.analysis.moments import PROBES, Moments, RunningCovariance, RunningFrequencies, RunningGradients
from spectrim.analysis.sampling import SamplingError
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, inputs_of, length_of
from spectrim.core.distributed import Accelerator, all_reduce, if_distributed, shard
from spectrim.core.errors import DataError, ModelError
from spectrim.core.execution import Inputs, call, evaluating, frozen, on_device_of, temporary
from spectrim.core.memory import Storage
from spectrim.core.nested import is_in_transform, joined
from spectrim.core.progress import progress_callback
from spectrim.layers.experts import rerouted
from spectrim.layers.tokens import TokenMasks, TokenPlaces, input_rows
from spectrim.layers.tracing import leaves_of, typed_layers, watching
from spectrim.layers.types import layer_type_of
from spectrim.layers.types.base import SampledPlaces
from spectrim.layers.unfusing import unfused


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every layer with a weight matrix that was called.

    Attributes:
        moments: By layer name.
        batches: How many batches were run.
    """

    moments: Mapping[str, Moments] = field(repr=False)
    batches: int

    @property
    def means(self) -> dict[str, Tensor]:
        """Mean inputs by layer name."""
        return {name: moments.mean for name, moments in self.moments.items()}

    @property
    def bytes(self) -> int:
        """What the statistics take in memory."""
        return sum(seen.bytes for seen in self.moments.values())

    def with_output_grads(self, gradients: Mapping[str, RunningGradients]) -> "Calibration":
        """These statistics with the gradients' moments of the same model, perhaps on less data."""
        moments = dict(self.moments)
        for name in moments.keys() & gradients.keys():
            moment, share = gradients[name].finish()
            moments[name] = replace(moments[name], output_grad_covariance=moment, output_grad_shrinkage=share)
        return replace(self, moments=moments)

    def without_output_grads(self) -> "Calibration":
        """Without the gradients' moments, once what is approximated has them."""
        moments = {name: replace(seen, output_grad_covariance=None) for name, seen in self.moments.items()}
        return replace(self, moments=moments)


@checked
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    labels: bool = False,
    mask: str | None = None,
    layers: Collection[str] | None = None,
    positions: int | Literal["auto"] | None = "auto",
    gradients: bool = False,
    accelerator: Accelerator | None = None,
    device: str | torch.device | None = None,
    offload: str | Path | None = None,
    progress: bool = False,
) -> Calibration:
    """Run batches through the model and stream the statistics of every Linear and convolution layer's input.

    Of an embedding they are how often each row is looked up.

    Memory: one (groups, in, in) float64 array per layer, where `in` counts the kernel's positions as well; of a layer
    with more than 2048 inputs the vectors themselves while there are fewer of them than inputs. The batches are not
    kept. The model's training flags, gradients and random state are as before afterwards.

    Args:
        model: Any module; batches are moved to its device.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments; NumPy arrays become tensors.
        max_batches: Stop after so many.
        labels: Batches are (inputs.., labels), or mappings with the entry "labels"; the labels are set aside.
        mask: Name of the input (batch, length) that is nonzero at tokens and zero at padding, which no statistic
            counts; by default `attention_mask` and the like, and `src_key_padding_mask` and the like, as in torch.
        layers: Names of the layers to watch; all by default.
        positions: Places of each sample that are looked at (output pixels of a convolution, tokens of a linear layer),
            chosen at random but the same for every sample; None for all of them. `auto` takes at most 64 of a map,
            whose neighbours are alike, and 512 of a sequence.
        gradients: Also stream the second moments of gradients that the loss metric is made of; takes about four times
            as long. No labels are used.
        accelerator: An `accelerate.Accelerator`, under `torchrun`: every process is given the same batches and runs
            those that are its turn, and all get the statistics of all, equal to one process's up to rounding, but for
            `shrinkage`, which each judges around a mean of its own.
        device: Where the statistics are added up; by default where the model is.
        offload: A folder on a fast disk, in which statistics of 16 MiB or more are files that are mapped into memory.
            They have no names, and their space is free again once the statistics are no longer used. The values are
            the same.
        progress: Show how far it is, as `st.compress` does.

    Raises:
        DataError: no batches, a batch the model cannot run or without the mask, or activations that are NaN or
            infinite.
        EngineError: a device that this machine does not have.
        FileError: a folder that cannot be written to, or that has no space left.
        ResourceError: the statistics of a layer take more memory than is free.
    """
    storage, model = Storage.of(device, offload), unfused(model)
    places = _places_of(positions)
    sums = dict[str, RunningCovariance | RunningFrequencies]()
    grads: defaultdict[str, RunningGradients] = defaultdict(partial(RunningGradients, storage=storage))

    def add_rows(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        is_lookup = layer_type_of(layer).is_lookup
        is_chosen = (layers is None or name in layers) and _reads(layer, x)
        if is_chosen and not is_in_transform(x):
            rows, samples = input_rows(
                layer, x.detach(), output=output, positions=places, masks=masks, samples=inputs.samples
            )
            empty = _no_frequencies(layer) if is_lookup else RunningCovariance(storage=storage)
            sums.setdefault(name, empty).add(rows, samples=samples)

    seen, freezes = 0, None
    number, visible = length_of(batches), progress and not (accelerator and accelerator.process_index)
    with evaluating(model), watching(model, add_rows), progress_callback(progress=visible) as report:
        data = batches_of(batches, what="the calibration data", max_batches=max_batches)
        for position, batch, is_own in shard(data, accelerator):
            report("calibrate", position, max(number, position + 1))
            seen = position + 1
            if not is_own:
                continue
            inputs, hint = inputs_of(batch, model, position=position, labels=labels, mask=mask)
            masks, what = TokenMasks.of(model, inputs), f"batch {position}"
            try:
                with rerouted(model, masks.routed):
                    if gradients:
                        run = partial(add_gradients, model, inputs, layers, grads, signs=position, what=what, hint=hint)
                        freezes = _run_frozen(model, run, freezes=freezes, sums=(sums, grads))
                    else:
                        call(model, inputs, what=what, hint=hint)
            except ModelError as error:
                raise DataError(str(error)) from error
            masks.warn_if_unused()
    if not seen:
        raise DataError("the calibration data is empty; give at least one batch")
    names = list(typed_layers(model))
    covariances = {name: part for name, part in sums.items() if isinstance(part, RunningCovariance)}
    frequencies = {name: part for name, part in sums.items() if isinstance(part, RunningFrequencies)}
    reduced: dict[str, RunningCovariance | RunningFrequencies] = {**_reduced(covariances, names, accelerator)}
    reduced |= _reduced_frequencies(frequencies, names, accelerator)
    moments = {name: statistics.finish(name) for name, statistics in reduced.items() if statistics.count}
    return Calibration(moments, seen).with_output_grads(_reduced_gradients(grads, names, accelerator))


def _run_frozen(
    model: nn.Module, run: Callable[[], None], *, freezes: bool | None, sums: Sequence[dict[str, Any]]
) -> bool:
    """Run a batch with frozen weights if that can be done, which the first batch tells; whether it can."""
    try:
        with frozen(model) if freezes is not False else nullcontext():
            run()
    except ModelError:
        if freezes is not None:
            raise
        for own in sums:  # of the pass that has failed
            own.clear()
        run()
        return False
    return freezes is not False


def _reads(layer: nn.Module, x: Tensor) -> bool:
    """Whether it multiplies or looks up what it is called with.

    A forward of its own may do something else: Whisper's positions are called with tokens, which are not all in range.
    """
    kind = layer_type_of(layer)
    if not (kind.is_lookup and kind.overrides(layer) and x.numel()):
        return kind.is_lookup != x.is_floating_point()
    return not x.is_floating_point() and 0 <= int(x.min()) <= int(x.max()) < len(layer.get_parameter("weight"))


def _places_of(positions: int | Literal["auto"] | None) -> SampledPlaces:
    if positions == "auto":
        return SampledPlaces()
    if positions is not None and (not isinstance(positions, int) or positions < 1):
        raise DataError(f"positions={positions!r}: give at least 1 place, None for all of them, or 'auto'")
    return SampledPlaces(positions, positions)


def add_gradients(
    model: nn.Module,
    inputs: Inputs,
    layers: Collection[str] | None,
    sums: defaultdict[str, RunningGradients],
    *,
    signs: torch.Generator | int,
    what: str,
    hint: str = "",
    probes: int = PROBES,
) -> None:
    """Add to `sums`, by layer name, one batch's share of `Moments.output_grad_covariance`.

    The mean over random signs of such a gradient's second moment is that of all outputs together (Hutchinson 1990).
    Frozen weights save memory, but forward passes that differentiate with respect to them cannot run. `signs` are what
    they are drawn from, or the number of the batch.

    Raises:
        ModelError: a batch the model cannot run, or a model that cannot be differentiated.
    """
    masks, signs = TokenMasks.of(model, inputs), signs_of(signs) if isinstance(signs, int) else signs
    own, hooks = on_device_of(model, inputs).map(Tensor.detach), _GradientHooks(sums, inputs.samples)
    with hooks.on(model, layers), torch.enable_grad():
        values = masks.mapped(call(model, own, what=what, hint=hint), TokenPlaces.take)
        for probe in range(probes):
            total = sum(((_signs(value, signs) * value).sum() for value in values), torch.zeros(()))
            if not total.requires_grad:
                return
            hooks.is_backward = True
            try:
                torch.autograd.grad(total, list(leaves_of(total)), retain_graph=probe + 1 < probes, allow_unused=True)
            except RuntimeError as error:
                raise ModelError(
                    f"{type(model).__name__} cannot be differentiated: {str(error).splitlines()[0]}; use the "
                    "activation metric, which needs no gradients"
                ) from error


@dataclass(eq=False)
class _GradientHooks:
    """Adds gradients with respect to layers' outputs to `sums` as they come, so that no output is kept for it.

    Attributes:
        sums: By layer name.
        samples: Of the batch.
        is_backward: Whether the pass is over. Before that a model may take gradients itself, which do not count, and
            after it layers may run again, where their outputs are not kept.
        handles: Of the hooks on outputs.
    """

    sums: defaultdict[str, RunningGradients]
    samples: int
    is_backward: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)

    @contextmanager
    def on(self, model: nn.Module, layers: Collection[str] | None) -> Iterator[None]:
        """Within this, the outputs of these layers have hooks; by default those of all."""
        chosen = ((name, model.get_submodule(name)) for name in typed_layers(model) if layers is None or name in layers)
        with temporary(layer.register_forward_hook(partial(self._tap, name)) for name, layer in chosen):
            try:
                yield
            finally:
                for handle in self.handles:
                    handle.remove()

    def _tap(self, name: str, layer: nn.Module, _: Any, output: Any) -> Tensor | None:
        is_number = isinstance(output, Tensor) and output.is_floating_point() and not output.is_inference()
        if not is_number or not output.numel() or not torch.is_grad_enabled() or is_in_transform(output):
            return None
        if output.is_leaf:  # no layer before it: what is differentiated begins here
            output.requires_grad_()
        value: Tensor = output.clone()  # what follows may work in place, where a hook on a view would be lost
        if not self.is_backward:
            self.handles.append(value.register_hook(partial(self._add, name, layer, value.size(0))))
        return value

    def _add(self, name: str, layer: nn.Module, size: int, gradient: Tensor) -> None:
        if self.is_backward:
            rows = layer_type_of(layer).output_rows(layer, joined(gradient), positions=None)
            self.sums[name].add(rows, samples=self.samples, size=size)


def _reduced(
    sums: dict[str, RunningCovariance], names: Sequence[str], accelerator: Accelerator | None
) -> dict[str, RunningCovariance]:
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


def _no_frequencies(layer: nn.Module) -> RunningFrequencies:
    return RunningFrequencies(torch.zeros(layer_type_of(layer).geometry(layer).into, dtype=torch.float64))


def _reduced_frequencies(
    sums: dict[str, RunningFrequencies], names: Sequence[str], accelerator: Accelerator | None
) -> dict[str, RunningFrequencies]:
    """The frequencies of all processes together."""
    over_all = partial(all_reduce, names=names, accelerator=accelerator)
    counts = over_all({name: part.counts for name, part in sums.items()})
    samples = over_all({name: torch.tensor([part.samples]).double() for name, part in sums.items()})
    return {name: RunningFrequencies(total, round(float(samples[name]))) for name, total in counts.items()}


def _reduced_gradients(
    sums: dict[str, RunningGradients], names: Sequence[str], accelerator: Accelerator | None
) -> dict[str, RunningGradients]:
    """The gradients of all processes together."""
    if if_distributed(accelerator) is None:
        return sums
    over_all = partial(all_reduce, names=names, accelerator=accelerator)
    for part in sums.values():
        part.merge()
    scatters = over_all({name: part.scatter for name, part in sums.items()})
    sizes = over_all(
        {
            name: torch.tensor([part.size, part.error.samples, part.error.squares]).double()
            for name, part in sums.items()
        }
    )
    return {
        name: RunningGradients(round(size), scatter, SamplingError(round(samples), squares))
        for name, scatter in scatters.items()
        for size, samples, squares in [sizes[name].tolist()]
    }


def signs_of(position: int) -> torch.Generator:
    """What a batch's random signs are drawn from: others for each batch, and the same in whichever process it is."""
    return torch.Generator().manual_seed(position)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random 1 and -1."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
