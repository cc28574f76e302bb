"""What a study tells while it runs."""

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


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Tell nobody."""


class Teller:
    """Counts the parts of a study and tells a listener about each step."""

    def __init__(self, listener: OnProgress, *, parts: int) -> None:
        self._listener = listener
        self._parts = parts
        self._finished = 0
        self._part = ""

    def begin(self, part: str) -> None:
        """A new part starts; one that has begun before is finished."""
        self._finished += bool(self._part)
        self._part = part
        self.tell(0, of=1)

    def tell(self, done: int, *, of: int, note: str = "") -> None:
        """`done` of `of` steps of the current part are behind us."""
        self._listener(Progress(self._part, done, of, note, self._finished, self._parts))

    def training(self, step: Step) -> None:
        """A step of training, as `on_step` wants it."""
        done = step.epoch * step.steps + step.step + 1
        self.tell(done, of=step.epochs * step.steps, note=f"epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}")

    def end(self) -> None:
        """Everything is done."""
        self._part, self._finished = "done", self._parts
        self.tell(1, of=1)
