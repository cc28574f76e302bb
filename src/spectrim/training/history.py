"""What a training run reports afterwards."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from spectrim.benchmark.measurement import Epoch
from spectrim.core.arguments import checked
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, parse, read_text, write_text


class _File(Frozen):
    version: Literal[1] = 1
    epochs: tuple[Epoch, ...]
    lr: tuple[float, ...]
    stopped_early: bool
    kept: int | None = Field(default=None, ge=0)


def position_of_best(curve: Sequence[Epoch]) -> int:
    """Position of the highest held-out accuracy, else of the lowest held-out loss, the first of equals."""

    def quality(position: int) -> tuple[float, float]:
        loss = curve[position].held_out_loss
        return curve[position].held_out or 0.0, -math.inf if loss is None or math.isnan(loss) else -loss

    return max(range(len(curve)), key=quality)


class History(tuple[Epoch, ...]):
    """The epochs of a run as a tuple, in order, those before an interruption included.

    Attributes:
        lr: The learning rate of the last step of each epoch.
        stopped_early: Whether patience ended the run before its last epoch.
        weights_of: Position of the epoch whose weights the network has; None for those before the first one.
    """

    lr: tuple[float, ...]
    stopped_early: bool
    weights_of: int | None

    @checked
    def __new__(
        cls,
        epochs: Collection[Epoch] = (),
        *,
        lr: Collection[float] = (),
        stopped_early: bool = False,
        weights_of: int | None = None,
    ) -> Self:
        """A history of these epochs."""
        history = super().__new__(cls, epochs)
        history.lr, history.stopped_early, history.weights_of = tuple(lr), stopped_early, weights_of
        return history

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"History({super().__repr__()}, {fields})"

    @property
    def best(self) -> Epoch | None:
        """The epoch of the best accuracy on held-out data, or of their lowest loss, the first of equals; None without
        such data.
        """
        return self[position_of_best(self)] if self.measured_by else None

    @property
    def measured_by(self) -> Literal["accuracy", "loss"] | None:
        """What was taken on held-out data, which decides the best epoch; None without such data."""
        if any(epoch.held_out is not None for epoch in self):
            return "accuracy"
        return "loss" if any(epoch.held_out_loss is not None for epoch in self) else None

    def to_json(self) -> str:
        """JSON text, from which `from_json` makes an equal history."""
        file = _File(epochs=self, lr=self.lr, stopped_early=self.stopped_early, kept=self.weights_of)
        return file.model_dump_json(indent=1)

    @classmethod
    @checked
    def from_json(cls, text: str, *, origin: str = "the text") -> "History":
        """The history in JSON `text`; `origin` names the text in messages. Raises `FileError` if it is not one."""
        file = parse(_File, text, origin=origin)
        if len(file.lr) != len(file.epochs) or not (file.kept is None or file.kept < len(file.epochs)):
            raise FileError(f"{origin} is not a valid history: {len(file.epochs)} epochs, lr and kept do not fit them")
        return cls(file.epochs, lr=file.lr, stopped_early=file.stopped_early, weights_of=file.kept)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write JSON, wholly or not at all. Raises `FileError` if that is not possible."""
        return write_text(Path(path), self.to_json() + "\n")

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "History":
        """Read JSON. Raises `FileError` for a missing, cut or invalid file."""
        return cls.from_json(read_text(Path(path)), origin=str(path))
