"""What a command shows: its progress, a bar a stage in a terminal and a line a stage elsewhere, then its results."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from spectrim.cli.outputs import OutputFiles
from spectrim.reporting.listings import Listing

_Item = TypeVar("_Item")
_TITLES = {
    "calibrate": "calibrate",
    "weigh": "weigh {} layers",
    "time": "time {} shapes of layers",
    "fit": "reconstruct {} layers",
}
"""Titles of the library's stages that have steps, by the first word of what it reports."""


@dataclass
class Stages:
    """One stage after the other; the next one ends the one before. `closing` is closed when the command ends."""

    console: Console
    bars: Progress
    closing: ExitStack
    _current: TaskID | None = None

    def begin(self, title: str, *, total: int | None = None) -> None:
        """The next stage, and of how many steps it is, if that is known."""
        self.end()
        self._current = self.bars.add_task(title, total=total)
        if not self.console.is_terminal:
            self.say(title)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, done: int | None = None, *, detail: str | None = None) -> None:
        """Set how many steps of this stage are done, and its description in a terminal."""
        if self._current is not None:
            self.bars.update(self._current, completed=done, description=detail)

    def follow(self, what: str, done: int, total: int) -> None:
        """Show what the library reports: a stage, or a stage and the layer that is next."""
        verb = what.partition(" ")[0]
        if done == 0 or verb not in _TITLES:
            self.begin(_TITLES.get(verb, what).format(total), total=total)
        self.update(done, detail=what)

    def each(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, one step each."""
        for done, item in enumerate(items):
            self.update(done)
            yield item

    def end(self) -> None:
        """End this stage."""
        if self._current is not None:
            total = self.bars.tasks[self._current].total or 1
            self.bars.update(self._current, completed=total, total=total)


@contextmanager
def stages(*, state: Callable[[], str] = lambda: "nothing was written") -> Iterator[Stages]:
    """Show stages; an interrupt ends the command as in `interruptible`."""
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    with interruptible(state), bars, ExitStack() as closing:
        progress = Stages(console, bars, closing)
        yield progress
        progress.end()


@contextmanager
def interruptible(state: Callable[[], str]) -> Iterator[None]:
    """End the command at an interrupt, with exit code 130 and one line about the state that it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        text = f"interrupted; {state()}"
        Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def show(*parts: Listing | Table | str | None) -> None:
    """Print tables, and lines of text as they are; None is nothing."""
    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        elif part is not None:
            console.print(part)


def show_files(folder: Path, files: OutputFiles) -> None:
    """Print where each file is, and what is in it."""
    show(*(f"  {folder / name}" + (f"  ({content})" if content else "") for name, (_, content) in files.items()))
