"""What a study reports while it runs."""

from collections.abc import Callable
from dataclasses import dataclass

from spectrim.training import Step


@dataclass(frozen=True)
class Progress:
    """Where a study stands: within the current part, and how many parts of all are finished."""

    part: str
    done: int
    of: int
    note: str
    parts_done: int
    parts: int


ProgressCallback = Callable[[Progress], None]


class ProgressReporter:
    """Counts the parts of a study and calls back at each step."""

    def __init__(self, callback: ProgressCallback | None = None, *, parts: int = 1) -> None:
        self._callback = callback
        self._parts = parts
        self._finished = 0
        self._part = ""

    def begin(self, part: str) -> None:
        """Start a new part; the one before it is finished."""
        self._finished += bool(self._part)
        self._part = part
        self.update(0, of=1)

    def update(self, done: int, *, of: int, note: str = "") -> None:
        """`done` of `of` steps of the current part are finished."""
        if self._callback is not None:
            self._callback(Progress(self._part, done, of, note, self._finished, self._parts))

    def training_step(self, step: Step) -> None:
        """A step of training, as `on_step` is called with it."""
        done = step.epoch * step.steps + step.step + 1
        note = f"epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}"
        self.update(done, of=step.epochs * step.steps, note=note)

    def end(self) -> None:
        """Everything is done."""
        self._part, self._finished = "done", self._parts
        self.update(1, of=1)
