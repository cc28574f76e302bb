"""Fine-tuning a compressed network, with or without its dense self as the teacher."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spectrim.core.arguments import checked
from spectrim.core.batches import NamedLabels
from spectrim.core.distributed import Accelerator
from spectrim.core.errors import PatternError, TrainingError, near
from spectrim.core.execution import (
    ForwardFunction,
    ProgressCallback,
    device_of,
    evaluating,
    require_unwrapped,
    require_values,
)
from spectrim.core.progress import progress_callback
from spectrim.layers.factored import is_low_rank, low_rank_layers
from spectrim.layers.replacement import compressed_layers, duplicate
from spectrim.layers.selection import Patterns
from spectrim.layers.types import find_layer_type
from spectrim.training.checkpoint import Checkpoint, identity
from spectrim.training.history import History
from spectrim.training.loop import EpochData, Step, TrainingRun, train_in_place
from spectrim.training.losses import LossFunction
from spectrim.training.settings import LossName, Settings


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned copy of the model, and how training went, an entry an epoch."""

    model: nn.Module
    history: History


@checked
def finetune(
    model: nn.Module,
    data: Iterable[Any] | EpochData,
    *,
    teacher: nn.Module | None = None,
    train: Literal["all", "factors", "head"] | Patterns = "all",
    epochs: int = 3,
    lr: float = 1e-3,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warm_up: float = 0.1,
    clip: float | None = 1.0,
    temperature: float = 4.0,
    loss: LossName | LossFunction | None = None,
    axis: int | None = None,
    labels: str | None = None,
    forward: ForwardFunction | None = None,
    label_weight: float = 0.0,
    precision: Literal["float32", "bf16"] = "float32",
    frozen_norms: bool = True,
    held_out: Iterable[Any] | None = None,
    keep: Literal["last", "best"] | None = None,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | str | Path | None = None,
    save_every: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    accelerator: Accelerator | None = None,
    on_progress: ProgressCallback | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train a copy of a compressed network so that it regains what compression lost.

    A small learning rate, BatchNorm statistics left alone and the dense network as the teacher keep what the
    factorisation has already achieved. The network is an ordinary module: a loop of your own trains it as well.

    Args:
        model: The compressed network; left as it is.
        data: Batches (inputs.., labels), iterated anew each epoch, or a function of the epoch that gives them.
            A batch may be a mapping with the entry "labels". With a teacher and no `label_weight` it needs no labels.
        teacher: The dense network; its outputs take the labels' place.
        train: Every parameter (`"all"`); those of the factored layers (`"factors"`); of the Linear or convolution, or
            its factors, that is registered last (`"head"`, with all BatchNorm statistics frozen); or those whose name,
            or the name of a module around them, matches one of these patterns. Nothing else changes.
        loss: `"cross_entropy"`, `"mse"`, `"bce"` or `"kl"`, as `help(spectrim.training.Settings)` explains; by default
            cross-entropy of class indices, and KL with a teacher. Or a function from the outputs, as the network gives
            them, and the labels (or the teacher's outputs) to a scalar.
        axis: Dimension of the logits that holds the classes; for maps and sequences whose shapes do not tell it.
        labels: The entry of batches that are mappings which is the labels, where it has another name than "labels".
        forward: A function of the network (and the teacher) and a batch's inputs that gives the outputs, where they are
            not called with just these: `lambda model, batch: model(batch["x"], train=False)`.
        epochs: Passes over the data. `help(spectrim.training.Settings)` explains this and `lr`, `optimizer`,
            `momentum`, `weight_decay`, `warm_up`, `clip`, `temperature`, `label_weight`, `precision`, `keep`,
            `patience` and `seed`. By default `keep` is `"best"` with `patience` and `"last"` without.
        frozen_norms: BatchNorm leaves its running statistics as they are. If False, those of trained norms follow the
            batches.
        held_out: Batches (inputs.., labels) for an accuracy after each epoch; for the loss where it is not of classes.
        checkpoint: Where to save the state after each epoch and at an interrupt, and where to resume from, bit for bit
            on one thread. A path belongs to this network, teacher and settings; a file that is damaged or of others is
            an error. A `Checkpoint` says itself what identifies the run, and what to do with such a file.
        save_every: Steps between two saves within an epoch as well; None for none.
        on_step: Called after each step, with all that is known of it.
        accelerator: An `accelerate.Accelerator`, under `torchrun`: every process is given the same batches, trains on
            its share of each, and ends with the same network, that of one process up to rounding. (Dropout draws, and
            BatchNorm statistics that are not frozen, are each process's own.) The main process writes the checkpoint,
            which all read, and calls `on_step`. A teacher has to be on the accelerator's device.
        on_progress: Called after each step with the epoch and the loss, how many steps are done, and of how many.
        progress: Show the same on standard error, as `st.compress` does.

    Raises:
        TrainingError: a setting that is not allowed, nothing to train, a batch too small for BatchNorm, labels that may
            mean more than one thing without `loss`, no gradient at the first step, or a loss that became NaN.
        PatternError: a pattern matches nothing.
        DataError: empty data, an iterator that gives only one epoch, or labels that do not fit the outputs.
        FileError: a checkpoint that cannot be written, is damaged, or is of another run.
    """
    for network in (model, teacher):
        if network is not None:
            require_unwrapped(network)
            require_values(network)
    arguments = locals()  # as the fields of Settings are named
    options = {name: arguments[name] for name in Settings.model_fields}
    function, named = (loss, None) if callable(loss) else (None, loss)
    settings = Settings(**{**options, "loss": named, "keep": keep or ("last" if patience is None else "best")})
    student = duplicate(model)
    if accelerator is not None:
        student = student.to(accelerator.device)
        if teacher is not None and device_of(teacher) != device_of(student):
            raise TrainingError(
                f"the teacher is on {device_of(teacher)} and this process works on {device_of(student)}; "
                "give teacher.to(accelerator.device)"
            )
    trained = _trained(student, train)
    frozen = _frozen_norms(student, trained, train=train, frozen=frozen_norms)
    if isinstance(checkpoint, str | Path):
        others = {"loss": named or _name_of(function), "trained": sorted(trained), "frozen norms": len(frozen)}
        run_of = identity(model, teacher, {**settings.model_dump(), **others})
        checkpoint = Checkpoint(Path(checkpoint), run=run_of, unfit="refuse")
    run = TrainingRun(
        student,
        _with_labels(data, labels),
        settings=settings,
        loss=function,
        forward=forward,
        trained=list(trained.values()),
        frozen_modules=frozen,
        teacher=teacher,
        held_out=held_out if labels is None or held_out is None else NamedLabels(held_out, labels),
        checkpoint=checkpoint,
        save_every=save_every,
        on_step=on_step,
        accelerator=accelerator,
    )
    teaching = evaluating(teacher) if teacher is not None else nullcontext()
    visible = progress and not (accelerator and accelerator.process_index)
    with teaching, progress_callback(on_progress, progress=visible) as report:
        return Finetuned(student, train_in_place(replace(run, on_progress=report)))


def _with_labels(data: Iterable[Any] | EpochData, labels: str | None) -> Iterable[Any] | EpochData:
    if labels is None:
        return data
    return (lambda epoch: NamedLabels(data(epoch), labels)) if callable(data) else NamedLabels(data, labels)


def _name_of(function: LossFunction | None) -> str | None:
    """What tells one function from another in a checkpoint."""
    return function and f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _trained(model: nn.Module, train: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters to train, those that ask for gradients, by their first names."""
    match train:
        case "all":
            chosen = list(model.parameters())
        case "factors":
            chosen = list(nn.ModuleList(compressed_layers(model).values()).parameters())
        case "head":
            chosen = list(_head(model).parameters())
        case _:
            chosen = _matching(model, [train] if isinstance(train, str) else list(train))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)]: parameter for parameter in chosen if parameter.requires_grad}
    if not trained:
        what = "no parameter that asks for gradients" if chosen or train == "all" else "no factored layer"
        among = "" if train == "all" or not chosen else f" among those that train={train!r} chooses"
        raise TrainingError(f"{type(model).__name__} has {what}{among}, so there is nothing to train")
    return trained


def _head(model: nn.Module) -> nn.Module:
    """The Linear, convolution or factored layer with parameters that is registered last."""
    inner = {id(part) for layer in low_rank_layers(model).values() for part in layer.modules() if part is not layer}
    heads = [
        module
        for module in model.modules()
        if id(module) not in inner
        if is_low_rank(module) or ((kind := find_layer_type(module)) and not kind.is_lookup)
        if next(module.parameters(), None) is not None
    ]
    if not heads:
        raise TrainingError(f'{type(model).__name__} has no Linear or convolution layer, so train="head" finds none')
    return heads[-1]


def _matching(model: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    """Parameters whose name, or the name of a module around them, matches a pattern."""
    if not patterns:
        raise TrainingError('train=() freezes everything; give name patterns, or "all", "factors" or "head"')
    inside: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for path in accumulate(name.split("."), "{}.{}".format):
            inside.setdefault(path, []).append(parameter)
    chosen: set[int] = set()
    for pattern in patterns:
        matched = {id(parameter) for path in inside if fnmatchcase(path, pattern) for parameter in inside[path]}
        if not matched:
            raise PatternError(
                f"train={pattern!r} matches no parameter and no module with parameters{near(pattern, inside)}; or give "
                '"all", "factors" or "head"'
            )
        chosen |= matched
    return [parameter for parameter in model.parameters() if id(parameter) in chosen]


def _frozen_norms(
    model: nn.Module, trained: Mapping[str, nn.Parameter], *, train: str | Sequence[str], frozen: bool
) -> list[nn.Module]:
    """The layers with running statistics of batches that must not change: all if `frozen`, else the untrained ones."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    chosen = {id(parameter) for parameter in trained.values()}

    def is_trained(norm: nn.Module) -> bool:
        own = list(norm.parameters())
        return any(id(parameter) in chosen for parameter in own) if own else train == "all"

    return [norm for norm in norms if frozen or train == "head" or not is_trained(norm)]
