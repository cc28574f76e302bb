"""Progress of long calls: a bar in a terminal, a line that changes in a notebook, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spectrim.core.execution import ProgressCallback


@contextmanager
def progress_callback(on_progress: ProgressCallback | None = None, *, progress: bool) -> Iterator[ProgressCallback]:
    """What a long call reports to: `on_progress`, and with `progress` people as well, on standard error.

    A bar in a terminal is gone afterwards; the line in a notebook says how long it took.
    """
    console, begun, latest = Console(stderr=True), time.monotonic(), -inf
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    in_terminal, in_notebook = progress and console.is_interactive, progress and console.is_jupyter
    write, every = (_cell(), 0.2) if in_notebook else (console.file.write, 5.0)

    def report(what: str, done: int, total: int) -> None:
        nonlocal latest
        seconds = time.monotonic() - begun
        if in_terminal:
            bars.update(bar, description=what, completed=done, total=total)
        elif progress and seconds - latest >= every:
            latest = seconds
            write(f"[{'#' * (20 * done // max(total, 1)):.<20}] {done}/{total} {what}, {seconds:.0f} s\n")
        if on_progress is not None:
            on_progress(what, done, total)

    with Progress(*columns, console=console, transient=True, disable=not in_terminal) as bars:
        bar = bars.add_task("", total=None)
        yield report
    if in_notebook:
        write(f"done in {time.monotonic() - begun:.0f} s")


def _cell() -> Callable[[str], object]:
    """Writes to a line below a notebook's cell, in place of what was there."""
    from IPython import display

    line = display.display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda text: line.update({"text/plain": text.strip()}, raw=True)
