"""Fine-tuning a compressed network, with or without its dense self as the teacher."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from spectrim.errors import TrainingError
from spectrim.execution import evaluating
from spectrim.factorize import duplicate
from spectrim.layers import low_rank_layers
from spectrim.measure import Epoch
from spectrim.training.checkpoint import Checkpoint
from spectrim.training.loop import EpochData, Step, fit


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned copy of the model, and how training went, an entry an epoch."""

    model: nn.Module
    history: tuple[Epoch, ...]


def finetune(
    model: nn.Module,
    data: Iterable[Any] | EpochData,
    *,
    teacher: nn.Module | None = None,
    train: Literal["all", "factors"] = "all",
    epochs: int = 3,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    temperature: float = 4.0,
    held_out: Sequence[Any] | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Finetuned:
    """Train a copy of a compressed network so that it regains what compression lost.

    A small learning rate, BatchNorm statistics left alone and the dense network as the teacher keep what the
    factorisation has already achieved.

    Args:
        model: The compressed network; left as it is.
        data: Batches (inputs.., labels), iterated anew each epoch, or a function of the epoch that gives them.
            Labels are class indices (batch,), or a teacher's logits (batch, classes) computed beforehand.
        teacher: The dense network; its outputs take the labels' place.
        train: Every parameter, or only those of the factored layers.
        epochs: Passes over the data.
        lr: Peak learning rate, after a tenth of the steps; cosine decay to zero.
        weight_decay: Decoupled, as in AdamW.
        temperature: Of the distillation.
        held_out: Batches (inputs.., labels) for an accuracy after each epoch.
        seed: Of what the model itself draws, such as dropout.
        checkpoint: Where to keep the state after each epoch, and to resume from.
        on_step: Called after each step, for a progress bar.

    Raises:
        TrainingError: nothing to train, fewer than one epoch, or a loss that became NaN.
        DataError: empty data, or labels that do not fit the outputs.
    """
    if epochs < 1 or lr <= 0:
        raise TrainingError(f"epochs={epochs}, lr={lr}: give at least one epoch and a learning rate above 0")
    student = duplicate(model)
    factors = [p for layer in low_rank_layers(student).values() for p in layer.parameters()]
    parameters = list(student.parameters()) if train == "all" else list({id(p): p for p in factors}.values())
    if not any(parameter.requires_grad for parameter in parameters):
        what = "no factored layer" if train == "factors" and not factors else "no parameter that asks for gradients"
        raise TrainingError(f"{type(model).__name__} has {what}, so there is nothing to train")
    batches: EpochData = data if callable(data) else lambda epoch: data
    keep = nn.Identity() if teacher is None else teacher
    with evaluating(keep):
        history = fit(
            student,
            batches,
            epochs=epochs,
            lr=lr,
            parameters=parameters,
            teacher=teacher,
            temperature=temperature,
            weight_decay=weight_decay,
            clip=1.0,
            held_out=held_out,
            frozen_norms=True,
            seed=seed,
            checkpoint=checkpoint,
            on_step=on_step,
        )
    return Finetuned(student, history)
