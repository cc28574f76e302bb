"""What a study reports while it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass
class ProgressReporter:
    """Counts the parts of a study and calls back at each step."""

    callback: ProgressCallback | None = None
    parts: int = 1
    _finished: int = field(default=0, init=False)
    _part: str = field(default="", init=False)

    def begin(self, part: str) -> None:
        """Start a new part; the one before it is finished."""
        self._finished += bool(self._part)
        self._part = part
        self.update(0, of=1)

    def update(self, done: int, *, of: int, note: str = "") -> None:
        """`done` of `of` steps of the current part are finished."""
        if self.callback is not None:
            self.callback(Progress(self._part, done, of, note, self._finished, self.parts))

    def training_step(self, step: Step) -> None:
        """A step of training, as `on_step` is called with it."""
        done = step.epoch * step.steps + step.step + 1
        note = f"epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}"
        self.update(done, of=step.epochs * step.steps, note=note)

    def end(self) -> None:
        """Everything is done."""
        self._part, self._finished = "done", self.parts
        self.update(1, of=1)
