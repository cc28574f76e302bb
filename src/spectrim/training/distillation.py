"""Distillation without labels: a compressed network learns what the dense one computes on the same inputs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, collected, split_labels, without_labels
from spectrim.core.errors import DataError, TrainingError, warn
from spectrim.core.execution import (
    Inputs,
    ProgressCallback,
    call,
    device_of,
    evaluating,
    require_unwrapped,
    require_values,
    temporary,
)
from spectrim.core.memory import free_bytes
from spectrim.core.nested import fractions, logits_of, size_of, stored_tensors
from spectrim.core.progress import progress_callback
from spectrim.layers.factored import is_low_rank
from spectrim.layers.replacement import duplicate
from spectrim.layers.tokens import TokenMasks
from spectrim.layers.types import find_layer_type
from spectrim.training.checkpoint import Checkpoint, digest, identity
from spectrim.training.finetuning import Finetuned
from spectrim.training.history import History
from spectrim.training.loop import EpochData, TrainingRun, train_in_place
from spectrim.training.losses import Objective, divergence, scaled_error
from spectrim.training.settings import Settings

_ASIDE_OF, _PATIENCE = 16, 3
_RATE, _MOST = 6e-4, 5e-4
_STATE = "last_hidden_state"


@checked
def distill(
    model: nn.Module,
    teacher: nn.Module,
    *,
    data: Iterable[Any],
    held_out: Iterable[Any] | None = None,
    epochs: int = 5,
    minutes: float | None = None,
    lr: float | None = None,
    batch: int = 16,
    loss: Literal["kl", "mse"] | None = None,
    hidden: bool = True,
    mask: str | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | str | Path | None = None,
    on_progress: ProgressCallback | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train a copy of a compressed network to compute what the dense one does, on inputs without labels.

    It learns the dense network's outputs and its last hidden state, with AdamW and a learning rate that rises and then
    decays along a cosine, all modules in evaluation mode: dropout is off and BatchNorm statistics stay. It never ends
    worse than it began on inputs that are kept aside: the network comes back as it was at the end of the best epoch, or
    before the first. Other inputs than those the compressed network was fitted to gain most.

    Args:
        model: The compressed network; left as it is.
        teacher: The dense network.
        data: Batches as for `st.finetune`. Labels in them are not used; the last entry of a tuple counts as them.
        held_out: Batches that are kept aside. By default a sixteenth of `data`, at least one batch, which is not
            trained on; all of `data` is kept in memory then.
        epochs: Passes over the data; those of a list come in another order each time. Ends early after three epochs
            without a better one.
        minutes: End after about so many, however many epochs are left; the learning rate decays until then.
        lr: Peak learning rate. One that is too large undoes what the fit has reached, and a warning says so. By default
            6e-4 times the loss that it begins with on what is kept aside, at most 5e-4: the steps' own noise adds
            to the loss about in proportion to the rate.
        batch: Larger batches are split into parts of so many samples, a step each, where it is clear what of them is a
            sample; those of a `DataLoader` with `held_out` are taken as they come.
        loss: How outputs are compared: `"kl"` of the classes, or `"mse"`, the mean squared error over the variance of
            the dense outputs. By default `"kl"` for the logits of Hugging Face's models, else `"mse"`.
        hidden: Whether the last hidden state counts as well, by its mean squared error over its variance. It is what
            Hugging Face's models call so, else what the last layer with a weight reads; where there is none of one
            size in both networks, outputs count alone.
        mask: Name of the input (batch, length) that is nonzero at tokens, as for `st.compress`. Padding does not count.
        seed: Of the batches that are kept aside, their order, and what data draw.
        checkpoint: Where to save the state and resume from, as in `st.finetune`.
        on_progress: Called after each step with the epoch and the loss, how many steps are done, and of how many.
        progress: Show the same on standard error, as `st.compress` does.

    Returns:
        The trained copy, and its history with the loss on the inputs that were kept aside. `history.weights_of` is None
        where the copy is as it was, because nothing was better; a warning says so.

    Raises:
        DataError: no data, a single batch without `held_out`, or networks with different outputs.
        TrainingError: a setting that is not allowed, or a loss that became NaN.
        FileError: a checkpoint that cannot be written, is damaged, or is of another run.
    """
    for network in (model, teacher):
        require_unwrapped(network)
        require_values(network)
    settings = _settings(epochs=epochs, minutes=minutes, lr=lr, batch=batch, seed=seed, loss=loss)
    batches, aside = _split(data, held_out, model=model, batch=batch, seed=seed)
    student = duplicate(model)
    function = _Comparison(loss, mask)
    with evaluating(teacher), function.hooks(student, teacher, aside, hidden=hidden):
        dense = _Teacher(teacher, function.teacher, comes_again=callable(batches))
        before = Objective(settings, type(model).__name__, dense, function).held_out(student, aside)[1] or 0.0
        if before == 0:
            warn("the network computes what the dense one does already, and is left as it is")
            return Finetuned(student, History())
        settings = settings if lr is not None else settings.model_copy(update={"lr": min(_MOST, _RATE * before)})
        if isinstance(checkpoint, str | Path):
            others = {"minutes": minutes, "batch": batch, "loss": loss, "hidden": hidden, "mask": mask}
            run_of = identity(model, teacher, {**settings.model_dump(), **others})
            checkpoint = Checkpoint(Path(checkpoint), run=run_of, unfit="refuse")
        with progress_callback(on_progress, progress=progress) as report:
            run = TrainingRun(
                student,
                batches,
                settings=settings,
                loss=function,
                frozen_modules=[student],
                teacher=dense,
                held_out=aside,
                checkpoint=checkpoint,
                minutes=minutes,
                on_progress=report,
            )
            history = train_in_place(run)
    return _no_worse(Finetuned(student, history), model, before=before, lr=settings.lr)


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation:
    """How `st.compress(.., distill=)` distils the compressed network; the fields are arguments of `st.distill`.

    Attributes:
        data: Batches like the example, with or without labels; by default the calibration batches, to which the network
            has been fitted already: other ones gain more. They are kept in memory.
    """

    epochs: int = 5
    minutes: float | None = None
    lr: float | None = None
    batch: int = 16
    loss: Literal["kl", "mse"] | None = None
    hidden: bool = True
    seed: int = 0
    data: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        _ = _settings(**{name: value for name, value in self._options.items() if name != "hidden"})

    @property
    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "data"}

    def batches(self, calibration: Sequence[Inputs], *, like: Inputs) -> Sequence[Inputs]:
        """What it learns from, in parts. Raises `DataError` where there are fewer than two."""
        own = calibration if self.data is None else collected(without_labels(self.data, like=like, what="distill.data"))
        return _parts(own, self.batch, least=2)

    def distilled(
        self, model: nn.Module, teacher: nn.Module, batches: Sequence[Inputs], *, on_progress: ProgressCallback | None
    ) -> nn.Module:
        """The network after `st.distill`; warns of a convolutional one that has no other data than its calibration."""
        if self.data is None and _is_convolutional(teacher):
            warn(
                "distillation on the calibration inputs alone gives a convolutional network next to nothing; give "
                "others, without labels: distill=Distillation(data=batches)"
            )

        def report(what: str, done: int, total: int) -> None:
            if on_progress is not None:
                for number in (0, 1) if done == 1 else (done,):  # stages begin at 0
                    on_progress(what, number, total)

        mask = batches[0].mask if isinstance(batches[0].mask, str) else None
        return distill(model, teacher, data=batches, mask=mask, on_progress=report, **self._options).model


@dataclass
class _Signals:
    """What hooks record of a network's present call."""

    hidden: Tensor | None = None
    masks: TokenMasks = field(default_factory=lambda: TokenMasks(()))

    def record(self, _: nn.Module, args: Any, output: Any) -> None:
        """The hook on the module with the last hidden state, or on the one that reads it."""
        self.hidden = output[_STATE] if _has_state(output) else args[0]


@dataclass
class _Comparison:
    """The loss of a batch, between what both networks give; the hidden states come from hooks on them."""

    loss: Literal["kl", "mse"] | None
    mask: str | None
    student: _Signals = field(default_factory=_Signals)
    teacher: _Signals = field(default_factory=_Signals)

    @contextmanager
    def hooks(self, student: nn.Module, teacher: nn.Module, data: Iterable[Any], *, hidden: bool) -> Iterator[None]:
        """Hooks on the networks that record what the loss needs."""
        example = next(_inputs(data, student, "held_out"), None)
        if example is None:
            raise DataError("held_out is empty; give at least one batch")
        _ = TokenMasks.of(teacher, replace(example, mask=self.mask))
        place = _hidden_place(student, teacher, example)
        handles = [teacher.register_forward_pre_hook(self._read_mask, with_kwargs=True)]
        for network, signals in ((student, self.student), (teacher, self.teacher)) if place and hidden else ():
            handles.append(network.get_submodule(place or "").register_forward_hook(signals.record))
        with temporary(handles):
            yield

    def __call__(self, outputs: Any, taught: Any) -> Tensor:
        """The loss."""
        own, goal = self._values(outputs), self._values(taught)
        pairs = [pair for pair in zip(own, goal, strict=True) if pair[0].shape == pair[1].shape]
        has_logits = isinstance(taught, Mapping) and "logits" in taught and goal[0].shape[-1] > 1
        compare = _kl if self.loss == "kl" or (self.loss is None and has_logits) else scaled_error
        total = torch.stack([compare(*pair) for pair in pairs]).mean()
        if self.teacher.hidden is not None and self.student.hidden is not None:
            states = [self._values(signals.hidden) for signals in (self.student, self.teacher)]
            total = total + scaled_error(states[0][0], states[1][0])
        return total

    def _values(self, outputs: Any) -> list[Tensor]:
        values = self.teacher.masks.mapped(logits_of(outputs), lambda places, tensor: places.take(tensor))
        return [value.float() if value.itemsize < 4 else value for value in values]

    def _read_mask(self, teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.teacher.masks = TokenMasks.of(teacher, Inputs(args, kwargs, self.mask))


class _Teacher(nn.Module):
    """The dense network, run once on each batch that comes again, as far as a quarter of the free memory goes."""

    def __init__(self, network: nn.Module, signals: _Signals, *, comes_again: bool) -> None:
        super().__init__()
        self.network, self.signals = network, signals
        self.free = free_bytes(device_of(network)) // 4 if comes_again else 0
        self.known: dict[str, tuple[Any, Tensor | None, TokenMasks]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, with what hooks recorded of them."""
        batch = enumerate(stored_tensors((args, kwargs)))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        key = f"{digest({f'{place} {list(tensor.shape)}': tensor for place, tensor in batch})} {structure} {others}"
        if key in self.known:
            outputs, self.signals.hidden, self.signals.masks = self.known[key]
            return outputs
        outputs = self.network(*args, **kwargs)
        if isinstance(outputs, Mapping):  # without caches of keys and values, whose size cannot be told
            outputs = {name: value for name, value in outputs.items() if size_of(value)}
        self.free -= size_of((outputs, self.signals.hidden))
        if self.free > 0:
            self.known[key] = (outputs, self.signals.hidden, self.signals.masks)
        return outputs


def _hidden_place(student: nn.Module, teacher: nn.Module, example: Inputs) -> str | None:
    """The module, in both networks, whose output has the last hidden state, or whose input is it; None without any.

    Raises `DataError` where the outputs differ in more than their values.
    """
    (own, states), (goal, dense_states) = (_signature(network, example) for network in (student, teacher))
    if len(own) != len(goal) or not any(map(torch.Size.__eq__, own, goal)):
        raise DataError(
            f"the network's outputs that are fractions have the shapes {list(map(list, own))}, and the dense one's "
            f"{list(map(list, goal))}; distillation compares those of the same shape"
        )
    name = next(reversed(dense_states), "")
    return name if name and states.get(name) == dense_states[name] else None


def _signature(network: nn.Module, example: Inputs) -> tuple[list[torch.Size], dict[str, torch.Size]]:
    """Shapes of a network's outputs, and of what may be the last hidden state, by module, the likeliest one last."""
    states, reads = dict[str, torch.Size](), dict[str, torch.Size]()

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kind = find_layer_type(module)
        for shapes in (states, reads):
            shapes.pop(name, None)  # of several calls the last one counts
        if _has_state(output):
            states[name] = output[_STATE].shape
        elif (is_low_rank(module) or (kind and not kind.is_lookup)) and args and isinstance(args[0], Tensor):
            reads[name] = args[0].shape

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in network.named_modules()]
    with evaluating(network), temporary(hooks):
        outputs = fractions(logits_of(call(network, example, what="the first batch")))
    return [tensor.shape for tensor in outputs], {**reads, **states}


def _has_state(output: Any) -> bool:
    return isinstance(output, Mapping) and isinstance(output.get(_STATE), Tensor)


def _kl(outputs: Tensor, goal: Tensor) -> Tensor:
    """Of the classes, which are the second dimension of maps and else the last."""
    return divergence(outputs, goal, axis=1 if outputs.ndim == 4 else -1)


def _settings(
    *, epochs: int, minutes: float | None, lr: float | None, batch: int, seed: int, loss: str | None
) -> Settings:
    """Those of the run; everything is checked. Raises `TrainingError` for what is not allowed."""
    if loss not in ("kl", "mse", None):
        raise TrainingError(f'loss={loss!r}: there are "kl" and "mse"')
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise TrainingError(f"minutes={minutes!r}: give a number above 0, or None")
    if not isinstance(batch, int) or batch < 1:
        raise TrainingError(f"batch={batch!r}: give at least 1 sample")
    return Settings(epochs=epochs, lr=_MOST if lr is None else lr, seed=seed, keep="best", patience=_PATIENCE)


def _inputs(data: Iterable[Any], model: nn.Module, what: str) -> Iterator[Inputs]:
    """Batches without their labels."""
    for position, batch in enumerate(batches_of(data, what=what)):
        yield split_labels(batch, position=position, model=model, required=False)[0]


def _split(
    data: Iterable[Any], held_out: Iterable[Any] | None, *, model: nn.Module, batch: int, seed: int
) -> tuple[Iterable[Any] | EpochData, Iterable[Any]]:
    """What is trained on, in another order each epoch, and what is kept aside."""
    if held_out is not None and not isinstance(data, Sequence):
        return data, held_out
    parts = _parts(collected(_inputs(data, model, "data")), batch, least=2 if held_out is None else 1)
    if held_out is None:
        order, number = _order(len(parts), seed), -(-len(parts) // _ASIDE_OF)
        held_out, parts = ([parts[place] for place in places] for places in (order[:number], sorted(order[number:])))
    return (lambda epoch: [parts[place] for place in _order(len(parts), seed + 100_003 * (epoch + 1))]), held_out


def _order(number: int, seed: int) -> list[int]:
    places: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return places


def _parts(batches: Sequence[Inputs], size: int, *, least: int) -> list[Inputs]:
    parts = [part for inputs in batches for part in inputs.split(size) if part.samples]
    if len(parts) < least:
        raise DataError(
            f"distillation learns from some inputs and keeps others aside, and the number of parts, of up to {size} "
            f"samples, is {len(parts)}; give data=, more samples or smaller batches (st.distill also takes held_out=)"
        )
    return parts


def _is_convolutional(model: nn.Module) -> bool:
    """Whether most of the weights are those of convolutions."""
    kinds = ((module, find_layer_type(module)) for module in model.modules())
    inside = [module for module, kind in kinds if kind and not kind.is_lookup and kind.geometry(module).kernel]
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (nn.ModuleList(inside), model)]
    return 2 * sizes[0] > sizes[1]


def _no_worse(trained: Finetuned, model: nn.Module, *, before: float, lr: float) -> Finetuned:
    """The network as it was where no epoch was better; warns of that, and of a learning rate that undoes the fit."""
    history = trained.history
    first, best = history[0].held_out_loss or 0.0, min(epoch.held_out_loss or 0.0 for epoch in history)
    change = f"the loss on inputs kept aside went from {before:.3g} to {first:.3g} in the first epoch"
    if best < before:
        if first > 1.05 * before:
            advice = "a third of it may end better"
            warn(f"{change}: lr={lr:.2g} undid what the fit had reached; {advice}")
        return trained
    advice = f"give a smaller lr= than {lr:.2g}" if first > before else "give other inputs than those it was fitted to"
    what = f"distillation made nothing better ({change}), and the network is left as it was"
    warn(f"{what}; {advice}")
    return Finetuned(duplicate(model), History(history, lr=history.lr, stopped_early=history.stopped_early))
