"""What one training run is: a network, which of its parameters change, on which batches, and how."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from spectrim.core.distributed import Accelerator
from spectrim.core.errors import DataError, TrainingError
from spectrim.training.checkpoint import Checkpoint
from spectrim.training.settings import Settings

EpochData = Callable[[int], Iterable[Any]]
"""Batches (inputs.., targets) of an epoch, counted from 0."""


@dataclass(frozen=True)
class Step:
    """Where training stands after one optimiser step.

    Attributes:
        epoch: Counted from 0, of `epochs`.
        step: Counted from 0 within the epoch, of `steps`, which is 0 if the length of an epoch is unknown.
        loss: Of this step's batch.
        accuracy: Share of right answers in this epoch so far; None if the labels are not class indices.
        seconds_left: Estimated from the time per step so far; None if the length of an epoch is unknown.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """Everything that `train_in_place` needs; what is not explained here is as in `st.finetune`.

    Attributes:
        model: Trained in place.
        data: Batches (inputs.., targets), iterated anew each epoch, or a function of the epoch that gives them, always
            the same ones for an epoch. Targets are class indices (batch,), or a teacher's logits (batch, classes).
        settings: How it is trained.
        trained: The parameters that change, among those that ask for gradients; None for all of these.
        frozen_modules: Modules that stay in evaluation mode, such as norms whose statistics must not change.
        teacher: A network with the same outputs, in evaluation mode.

    Raises:
        TrainingError: `keep="best"` or `patience` without `held_out`, `label_weight` without `teacher`, or
            `save_every` without `checkpoint`.
        DataError: data that cannot be iterated, or only once where it is needed again.
        FileError: the checkpoint cannot be written.
    """

    model: nn.Module
    data: Iterable[Any] | EpochData
    _: KW_ONLY
    settings: Settings
    trained: Sequence[nn.Parameter] | None = None
    frozen_modules: Collection[nn.Module] = ()
    teacher: nn.Module | None = None
    held_out: Iterable[Any] | None = None
    checkpoint: Checkpoint | None = None
    save_every: int | None = None
    on_step: Callable[[Step], None] | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.label_weight > 0 and self.teacher is None:
            raise TrainingError(f"label_weight={settings.label_weight} needs a teacher; give teacher=, or leave it out")
        needing = "patience" if settings.patience is not None else "keep" if settings.keep == "best" else None
        if needing and self.held_out is None:
            raise TrainingError(
                f"{needing}={getattr(settings, needing)!r} goes by the accuracy on held-out data; give held_out="
            )
        if isinstance(self.data, Iterator) and (settings.epochs > 1 or self.checkpoint):
            raise DataError(
                f"the training data is a {type(self.data).__name__}, which is exhausted after one epoch; give a list, "
                "a DataLoader, or a function that makes the batches of an epoch: lambda epoch: .."
            )
        if not isinstance(self.data, Iterable) and not callable(self.data):
            raise DataError(f"the training data is a {type(self.data).__name__}; give batches (inputs, labels)")
        if isinstance(self.held_out, Iterator):
            kind = type(self.held_out).__name__
            raise DataError(f"held_out is a {kind}, which is exhausted after one epoch; give a list or a DataLoader")
        if self.save_every is not None and (self.checkpoint is None or self.save_every < 1):
            raise TrainingError(f"save_every={self.save_every!r}: give at least 1 step, and a checkpoint=")
        if self.checkpoint:
            self.checkpoint.require_writable()

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch."""
        return self.data if isinstance(self.data, Iterable) else self.data(epoch)


def norms(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that keep running statistics of batches."""
    return tuple(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
