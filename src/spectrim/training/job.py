"""What one training is: a network, what of it changes, on which batches, and how."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
        step: Counted from 0 within the epoch, of `steps`, which is 0 while the length of an epoch is unknown.
        loss: Of this step's batch.
        accuracy: Share of right answers in this epoch so far; None where the labels are no class indices.
        seconds_left: Estimated from the time that the steps took so far; None while the length is unknown.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Repeated:
    """The same batches, iterated anew in each epoch."""

    batches: Iterable[Any]

    def __call__(self, epoch: int) -> Iterable[Any]:
        """The batches."""
        return self.batches


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A network, what of it is trained, on what, and how.

    Attributes:
        model: Trained in place.
        data: Gives the batches of each epoch.
        settings: How.
        trained: The parameters that change; no other does.
        still: Modules that stay in evaluation mode.
        teacher: A network with the same outputs, in evaluation mode.
        held_out: Batches on which accuracy is taken after each epoch.
        checkpoint: Where the state is kept, and taken up from.
        save_every: Steps between two saves within an epoch; None for none.
        on_step: Called after each step.
        accelerator: The processes that train it together, each on its share of every batch.
    """

    model: nn.Module
    data: EpochData
    settings: Settings
    trained: Sequence[nn.Parameter]
    still: Collection[nn.Module] = ()
    teacher: nn.Module | None = None
    held_out: Iterable[Any] | None = None
    checkpoint: Checkpoint | None = None
    save_every: int | None = None
    on_step: Callable[[Step], None] | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        asked = "patience" if self.settings.patience is not None else "keep" if self.settings.keep == "best" else None
        if asked and self.held_out is None:
            raise TrainingError(
                f"{asked}={getattr(self.settings, asked)!r} goes by the accuracy on held-out data; give held_out="
            )
        if self.held_out is not None and isinstance(self.held_out, Iterator):
            raise DataError(f"held_out is a {_once(self.held_out)}; give a list or a DataLoader")
        if self.save_every is not None and (self.checkpoint is None or self.save_every < 1):
            raise TrainingError(f"save_every={self.save_every!r}: give at least 1 step, and a checkpoint=")
        if self.checkpoint:
            self.checkpoint.require_writable()


def norms(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that keep running statistics of batches."""
    return tuple(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))


def as_epochs(data: Iterable[Any] | EpochData, *, repeat: bool) -> EpochData:
    """The function that gives each epoch's batches; `repeat` says whether they may be asked for twice.

    Raises:
        DataError: nothing to iterate, or an iterator that would be exhausted when it is asked for again.
    """
    if isinstance(data, Iterator) and repeat:
        raise DataError(
            f"the training data is a {_once(data)}; give a list, a DataLoader, or a function that makes the batches of "
            "an epoch: lambda epoch: .."
        )
    if isinstance(data, Iterable):
        return Repeated(data)
    if callable(data):
        return data
    raise DataError(f"the training data is a {type(data).__name__}; give batches (inputs, labels), or a DataLoader")


def _once(data: object) -> str:
    return f"{type(data).__name__}, which is exhausted after one epoch"
