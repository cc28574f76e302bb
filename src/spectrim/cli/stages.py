"""What a command shows: its progress, a bar a stage in a terminal and lines elsewhere, then its results."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from spectrim.cli.options import Output
from spectrim.cli.outputs import OutputFiles
from spectrim.reporting import words
from spectrim.reporting.listings import Listing

_Item = TypeVar("_Item")
_ANY_WIDTH = 1_000_000
_SECONDS = 30.0
"""After how many a line says how far a stage is, where there is no terminal."""

_TITLES = {
    "calibrate": "calibrate",
    "weigh": "weigh {} layers",
    "time": "time {} shapes of layers",
    "fit": "reconstruct {} layers",
    "distil": "distil in {} steps",
}
"""Titles of the library's stages that have steps, by the first word of what it reports."""


@dataclass
class Stages:
    """One stage after the other; the next one ends the one before. `closing` is closed when the command ends."""

    console: Console
    bars: Progress
    closing: ExitStack
    _current: TaskID | None = None
    _latest: float = 0.0

    def begin(self, title: str, *, total: int | None = None) -> None:
        """The next stage, and of how many steps it is, if that is known."""
        self.end()
        self._current = self.bars.add_task(title, total=total)
        if not self.console.is_terminal:
            self.say(title)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._latest = time.monotonic()

    def update(self, done: int | None = None, *, detail: str | None = None) -> None:
        """Set how many steps of this stage are done, and its description in a terminal."""
        if self._current is None:
            return
        self.bars.update(self._current, completed=done, description=detail)
        if done and not self.console.is_terminal and time.monotonic() - self._latest >= _SECONDS:
            total = self.bars.tasks[self._current].total
            self.say(f"  {done}{f' of {total:.0f}' if total else ''}, {self.bars.tasks[self._current].description}")

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
    console = Console(stderr=True, highlight=False)
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
        say(f"interrupted; {state()}")
        raise typer.Exit(130) from None


def say(text: str) -> None:
    """Print a line on standard error."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def show(*parts: Listing | str | None, output: Output | None = None) -> None:
    """Print tables, and lines of text as they are; None is nothing. Outside of a terminal a table is as wide as it is.

    Tables that `output` asks for as JSON or CSV stand alone on standard output; the text goes to standard error then.
    """
    machine = output is not None and (output.json or output.csv)
    console = Console(stderr=machine, highlight=False)
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        elif part is not None:
            console.print(part.note if machine else part)
    tables = [part for part in parts if isinstance(part, Listing)]
    if output is not None and output.json and tables:
        values = [{"title": part.title, "rows": _records(part), "note": part.note} for part in tables]
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=float))
    elif machine:
        typer.echo("\n".join(map(_as_csv, tables)), nl=False)


def file_lines(folder: Path, files: OutputFiles) -> list[str]:
    """Where each file is that was written, and what is in it."""
    there = [(folder / name, content) for name, (_, content) in files.items() if (folder / name).exists()]
    return [f"  {path}" + (f"  ({content})" if content else "") for path, content in there]


def _records(table: Listing) -> list[dict[str, object]]:
    """The rows of a table by the names of its columns, with numbers where the cells have one, and all the same keys."""
    records: list[dict[str, object]] = [{} for _ in table.rows]
    for at, column in enumerate(table.columns):
        head = column.head.partition("[")[0].replace("\n", " ").strip() or ("Remark" if at else "Name")
        for record, row in zip(records, table.rows, strict=True):
            cell, plain = row[at], row[at].replace(",", "")
            text = None if cell in ("", words.NOTHING) else cell.replace("\n", " ")
            values = {"": int(plain) if column.number and plain.isdecimal() else text}
            for part, value in (cell.values if isinstance(cell, words.Cell) else values).items():
                record[f"{head} {part}".strip()] = value
    keys = dict.fromkeys(key for record in records for key in record)
    return [{key: record.get(key) for key in keys} for record in records]


def _as_csv(table: Listing) -> str:
    text, records = io.StringIO(), _records(table)
    writer = csv.DictWriter(text, records[0] if records else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
