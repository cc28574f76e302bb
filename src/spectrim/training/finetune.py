"""Fine-tuning a compressed network, with or without its dense self as the teacher."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spectrim.core.distributed import Accelerator
from spectrim.core.errors import PatternError, TrainingError
from spectrim.core.execution import WATCHED, device_of, evaluating
from spectrim.layers.factored import is_low_rank, low_rank_layers
from spectrim.layers.replacement import duplicate
from spectrim.layers.selection import Patterns, near
from spectrim.training.checkpoint import Checkpoint, fingerprint
from spectrim.training.history import History
from spectrim.training.job import EpochData, Job, Step, as_epochs, norms
from spectrim.training.loop import train as run
from spectrim.training.settings import Settings


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned copy of the model, and how training went, an entry an epoch."""

    model: nn.Module
    history: History


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
) -> Finetuned:
    """Train a copy of a compressed network so that it regains what compression lost.

    A small learning rate, BatchNorm statistics left alone and the dense network as the teacher keep what the
    factorisation has already achieved. The network is an ordinary module: a loop of your own trains it as well.

    Args:
        model: The compressed network; left as it is.
        data: Batches (inputs.., labels), iterated anew each epoch, or a function of the epoch that gives them.
            Labels are class indices (batch,), or a teacher's logits (batch, classes) computed beforehand.
        teacher: The dense network; its outputs take the labels' place.
        train: Every parameter (`"all"`); those of the factored layers (`"factors"`); of the Linear or convolution, or
            its factors, that is registered last (`"head"`, with all BatchNorm statistics frozen); or those whose name,
            or the name of a module around them, matches one of these patterns. Nothing else changes.
        epochs: Passes over the data.
        lr: Peak learning rate; cosine decay to zero.
        optimizer: `"adamw"`, or `"sgd"` with `momentum`.
        momentum: Of SGD.
        weight_decay: Decoupled for AdamW, as a gradient for SGD; of what is trained only.
        warm_up: Share of all steps with a rising learning rate.
        clip: Largest norm of the gradient; None for any.
        temperature: Of the distillation.
        label_weight: w in w * cross-entropy + (1 - w) * KL * temperature^2, the loss beside a `teacher` (Hinton 2015).
        precision: `"bf16"` computes in bfloat16 where that is safe (autocast); weights and loss stay float32.
        frozen_norms: BatchNorm uses its running statistics and leaves them; else that of trained norms only moves.
        held_out: Batches (inputs.., labels) for an accuracy after each epoch.
        keep: Whether the result has the weights of the last epoch, or of the best on `held_out` (the first of equals).
            By default the best one with `patience`, and the last one otherwise: the schedule is made to end there, and
            an accuracy by which weights were chosen flatters them.
        patience: Stop after so many epochs without a better accuracy on `held_out`.
        seed: Of what the model and the data draw; random states of the caller are put back.
        checkpoint: Where to keep the state after each epoch and at an interrupt, and to resume from, bit for bit on one
            thread. A path belongs to this network, teacher and settings: a damaged file, or one of others, is an error.
            A `Checkpoint` says itself what identifies the run, and what becomes of such a file.
        save_every: Steps between two saves within an epoch as well; None for none.
        on_step: Called after each step, for a progress bar.
        accelerator: An `accelerate.Accelerator`, under `torchrun`: every process is given the same batches, trains on
            its share of each, and ends with the same network, that of one process up to rounding. (Dropout draws, and
            BatchNorm statistics that are not frozen, are each process's own.) The main one writes the checkpoint, to be
            read by all, and calls `on_step`. A teacher has to be on the accelerator's device.

    Raises:
        TrainingError: settings that cannot be meant, nothing to train, a batch too small for BatchNorm, or a loss that
            became NaN.
        PatternError: a pattern matches nothing.
        DataError: empty data, an iterator that gives only one epoch, or labels that do not fit the outputs.
        FileError: a checkpoint that cannot be written, is damaged, or is of another run.
    """
    settings = Settings(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        warm_up=warm_up,
        clip=clip,
        temperature=temperature,
        label_weight=label_weight,
        precision=precision,
        keep=keep or ("last" if patience is None else "best"),
        patience=patience,
        seed=seed,
    )
    if label_weight > 0 and teacher is None:
        raise TrainingError(f"label_weight={label_weight} is a share beside a teacher; give teacher=, or leave it out")
    student = duplicate(model)
    if accelerator is not None:
        student = student.to(accelerator.device)
        if teacher is not None and device_of(teacher) != device_of(student):
            raise TrainingError(
                f"the teacher is on {device_of(teacher)} and this process works on {device_of(student)}; "
                "give teacher.to(accelerator.device)"
            )
    trained = _trained(student, train)
    still = _still(student, trained, frozen=frozen_norms or train == "head", all_trained=train == "all")
    job = Job(
        model=student,
        data=as_epochs(data, repeat=epochs > 1 or checkpoint is not None),
        settings=settings,
        trained=list(trained.values()),
        still=still,
        teacher=teacher,
        held_out=held_out,
        checkpoint=_place(checkpoint, model, teacher, settings, names=sorted(trained), still=len(still)),
        save_every=save_every,
        on_step=on_step,
        accelerator=accelerator,
    )
    with evaluating(teacher) if teacher is not None else nullcontext():
        return Finetuned(student, run(job))


def _trained(model: nn.Module, train: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """What is to be trained, by its first name, of all that asks for gradients."""
    named = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    chosen = _chosen(model, train)
    found = {named[id(one)]: one for one in chosen if one.requires_grad}
    if not found:
        what = "no parameter that asks for gradients" if chosen or train == "all" else "no factored layer"
        among = "" if train == "all" or not chosen else f" among those that train={train!r} chooses"
        raise TrainingError(f"{type(model).__name__} has {what}{among}, so there is nothing to train")
    return found


def _chosen(model: nn.Module, train: str | Sequence[str]) -> list[nn.Parameter]:
    """Each parameter once, in the order of the model."""
    match train:
        case "all":
            return list(model.parameters())
        case "factors":
            factors = [one for layer in low_rank_layers(model).values() for one in layer.parameters()]
            return list({id(one): one for one in factors}.values())
        case "head":
            return list(_head(model).parameters())
    return _matching(model, [train] if isinstance(train, str) else list(train))


def _head(model: nn.Module) -> nn.Module:
    """The Linear, convolution or factored layer with parameters that is registered last."""
    inner = {id(part) for layer in low_rank_layers(model).values() for part in layer.modules() if part is not layer}
    layers = [
        module
        for module in model.modules()
        if (is_low_rank(module) or isinstance(module, WATCHED)) and id(module) not in inner
    ]
    heads = [layer for layer in layers if next(layer.parameters(), None) is not None]
    if not heads:
        raise TrainingError(f'{type(model).__name__} has no Linear or convolution layer, so train="head" finds none')
    return heads[-1]


def _matching(model: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    """Parameters of which a name, or that of a module around them, matches a pattern."""
    if not patterns:
        raise TrainingError('train=() freezes everything; give name patterns, or "all", "factors" or "head"')
    known: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            known.setdefault(".".join(parts[:length]), []).append(parameter)
    hits: set[int] = set()
    for pattern in patterns:
        matched = [one for name, inside in known.items() if fnmatchcase(name, pattern) for one in inside]
        if not matched:
            raise PatternError(
                f"train={pattern!r} matches no parameter and no module with parameters{near(pattern, known)}; or give "
                '"all", "factors" or "head"'
            )
        hits |= {id(one) for one in matched}
    return [one for one in model.parameters() if id(one) in hits]


def _still(
    model: nn.Module, trained: dict[str, nn.Parameter], *, frozen: bool, all_trained: bool
) -> tuple[nn.Module, ...]:
    """The norms whose statistics stay: all, or those that are not trained themselves."""
    if frozen:
        return norms(model)
    chosen = {id(one) for one in trained.values()}

    def moves(norm: nn.Module) -> bool:
        own = list(norm.parameters())
        return any(id(one) in chosen for one in own) if own else all_trained

    return tuple(norm for norm in norms(model) if not moves(norm))


def _place(
    given: Checkpoint | str | Path | None,
    model: nn.Module,
    teacher: nn.Module | None,
    settings: Settings,
    *,
    names: Sequence[str],
    still: int,
) -> Checkpoint | None:
    """For a path, a checkpoint that knows what it belongs to."""
    if given is None or isinstance(given, Checkpoint):
        return given
    identity = {
        **fingerprint(model),
        **asdict(settings),
        "teacher": None if teacher is None else fingerprint(teacher)["weights"],
        "trained": list(names),
        "frozen norms": still,
    }
    return Checkpoint(Path(given), run=json.dumps(identity, sort_keys=True), unfit="refuse")
