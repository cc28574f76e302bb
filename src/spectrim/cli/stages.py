"""Progress of a command that works in stages: a bar each in a terminal, a line each elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_Item = TypeVar("_Item")


@dataclass
class Stages:
    """One stage after the other; the next one ends the one before."""

    console: Console
    bars: Progress
    _now: TaskID | None = None

    def begin(self, what: str, *, of: int | None = None) -> None:
        """The next stage, and of how many steps it is, if that is known."""
        self.end()
        self._now = self.bars.add_task(what, total=of)
        if not self.console.is_terminal:
            self.console.print(what, markup=False, soft_wrap=True)

    def say(self, detail: str) -> None:
        """Another description of this stage, for terminals."""
        if self._now is not None:
            self.bars.update(self._now, description=detail)

    def reach(self, done: int) -> None:
        """So many steps of this stage are done."""
        if self._now is not None:
            self.bars.update(self._now, completed=done)

    def layers(self, verb: str) -> Callable[[str, int, int], None]:
        """What the library is to tell about each layer; the first one begins the stage."""

        def told(_: str, done: int, of: int) -> None:
            if done == 0:
                self.begin(f"{verb} {of} layers", of=of)
            self.reach(done)

        return told

    def each(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, one step each."""
        for done, item in enumerate(items):
            self.reach(done)
            yield item

    def end(self) -> None:
        """This stage is over."""
        if self._now is not None:
            total = self.bars.tasks[self._now].total or 1
            self.bars.update(self._now, completed=total, total=total)


@contextmanager
def stages(*, left: Callable[[], str] = lambda: "nothing was written") -> Iterator[Stages]:
    """Stages as they are shown; an interrupt ends the command with one line, of what is `left`, and exit code 130."""
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        try:
            shown = Stages(console, bars)
            yield shown
            shown.end()
        except KeyboardInterrupt:
            bars.stop()
            said = f"interrupted; {left()}"
            Console(stderr=True, highlight=False).print(said, markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
