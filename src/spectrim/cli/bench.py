"""`spectrim bench`: how much faster a compressed network really is, in each runtime, by the clock."""

import multiprocessing
import shlex
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pydantic import Field
from rich.console import Console

from spectrim.benchmark.measurement import Measurement, measure, runtime_gain
from spectrim.cli.options import Flatten, Model, Option, WithSource, arguments, numbers, one_of, unfolded
from spectrim.cli.outputs import outputs
from spectrim.cli.stages import Stages, stages
from spectrim.cli.subject import subject
from spectrim.core.errors import DependencyError, EngineError, ModelError
from spectrim.core.files import Frozen, parse, read_text, write_text
from spectrim.layers.saving import load
from spectrim.models import resolve
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.sessions import RUNTIMES, RuntimeName, require_runtime, require_threads
from spectrim.runtimes.timing import Comparison

_NETWORK, _HOW = "The network", "How it is timed"
_NOISY = "too noisy to tell"


@dataclass(frozen=True, kw_only=True)
class Timed(WithSource):
    """The compressed network, and what it is run on."""

    model: Model
    weights: Annotated[
        Path,
        typer.Option(
            metavar="FILE|DIR",
            rich_help_panel=_NETWORK,
            help="The compressed network: the folder that `spectrim compress` wrote, or its .safetensors file.",
        ),
    ]
    option: Option = None
    input: Annotated[str, typer.Option(metavar="3,32,32", rich_help_panel=_NETWORK, help="Shape of one input.")]
    flatten: Flatten = False


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where and how it is timed."""

    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            rich_help_panel=_HOW,
            help=f"Runtimes with commas between them, of {', '.join(RUNTIMES)}; or all that are installed.",
        ),
    ] = "all"
    batch: Annotated[
        str, typer.Option(metavar="1,8,64", rich_help_panel=_HOW, help="Inputs of one pass, with commas between them.")
    ] = "1"
    threads: Annotated[int, typer.Option(metavar="N", rich_help_panel=_HOW, help="Threads of one pass.")] = 1
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=5,
            rich_help_panel=_HOW,
            help="How often both networks are timed; fewer where that takes half a minute.",
        ),
    ] = 31

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """Those that were asked for, each once."""
        if self.takes_any:
            return RUNTIMES
        return tuple(dict.fromkeys(one_of(RUNTIMES, name, option="--runtime") for name in self.runtime.split(",")))

    @property
    def takes_any(self) -> bool:
        """Whether runtimes that cannot be had are left out, since none was named."""
        return self.runtime == "all"

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(int(size) for size in numbers(self.batch, option="--batch", whole=True)))


class Row(Frozen):
    """One runtime and batch size.

    Attributes:
        runtime: Where both networks were timed.
        batch: Inputs of one pass.
        measured: The compressed network, against the dense one in this runtime.
        gain: The dense network in torch eager against itself in this runtime; None in torch eager.
    """

    runtime: RuntimeName
    batch: int
    measured: Measurement
    gain: Comparison | None = None

    @property
    def noisy(self) -> bool:
        """Whether the machine was too noisy to tell any of its ratios."""
        return _NOISY in (self.measured.verdict, self.gain and self.gain.verdict)


class Benched(Frozen):
    """What `spectrim bench --json` writes: every row, and why runtimes that nobody named were left out."""

    version: Literal[1] = 1
    command: str
    threads: int
    rows: tuple[Row, ...]
    left_out: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Benched":
        """Read one. Raises `FileError` for a missing, cut or invalid file."""
        return parse(cls, read_text(path), origin=str(path))


@unfolded
def bench_network(
    *,
    timed: Timed,
    timing: Timing,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there.")] = None,
) -> None:
    """Time a compressed network against its dense self in each runtime, and hold that against what its MACs promise."""
    _check(timed, timing)
    files = nullcontext() if json is None else outputs(json.parent, {json.name: Benched.load})
    command = ["spectrim", "bench", *arguments(timed, timing), *(["--json", str(json)] if json else [])]
    with stages() as shown, files as folder:
        _try(timed, shown)
        left_out: dict[str, str] = {}
        rows = tuple(_rows(timed, timing, shown, left_out))
        found = Benched(command=shlex.join(command), threads=timing.threads, rows=rows, left_out=left_out)
        if not rows:
            raise EngineError(f"no runtime could be timed: {'; '.join(f'{n}: {why}' for n, why in left_out.items())}")
        if json is not None and folder is not None:
            write_text(folder / json.name, found.model_dump_json(indent=1, exclude_none=True) + "\n")
    _show(found, json)


@dataclass(frozen=True)
class _Task:
    """What a process of its own is to time; nothing but plain values, since it travels there."""

    model: str
    options: dict[str, object]
    weights: Path
    shape: tuple[int, ...]
    runtime: RuntimeName
    batch: int
    threads: int
    rounds: int


def _timed_in_process(task: _Task) -> Row:
    """The whole of a row. Runs in a process of its own, so that no other runtime's threads are about."""
    dense = resolve(task.model, options=task.options).eval()
    small = load(task.weights, dense).eval()
    example = torch.randn(1, *task.shape, generator=torch.Generator().manual_seed(0))
    runtime, threads, batch, rounds = task.runtime, task.threads, task.batch, task.rounds
    measured = measure(small, example, reference=dense, runtime=runtime, threads=threads, batch=batch, rounds=rounds)
    gain = None
    if runtime != "torch":
        gain = runtime_gain(dense, example, runtime=runtime, threads=threads, batch=batch, rounds=rounds)
    return Row(runtime=task.runtime, batch=task.batch, measured=measured, gain=gain)


def _check(timed: Timed, timing: Timing) -> None:
    """Mistakes that can be seen before anything is loaded."""
    _ = timed.source.options, timing.batches
    require_threads(timing.threads)
    for name in timing.runtimes:
        if not timing.takes_any:
            require_runtime(name, threads=timing.threads)


def _try(timed: Timed, shown: Stages) -> None:
    """Make both networks once here, where a mistake is told at once and in full."""
    load(timed.weights, subject(timed.source, shown, filled_later=True).model)


def _rows(timed: Timed, timing: Timing, shown: Stages, left_out: dict[str, str]) -> Iterator[Row]:
    """The rows, one after the other, each runtime in a process of its own."""
    source = timed.source
    shape = tuple(int(size) for size in numbers(timed.input, option="--input", whole=True))
    shape = (torch.Size(shape).numel(),) if timed.flatten else shape
    for name in timing.runtimes:
        shown.begin(f"time in {name}", of=len(timing.batches))
        tasks = [
            _Task(timed.model, source.options, timed.weights, shape, name, batch, timing.threads, timing.rounds)
            for batch in timing.batches
        ]
        try:
            require_runtime(name, threads=timing.threads)
            yield from shown.each(_in_process(tasks))
        except (DependencyError, EngineError, ModelError) as error:
            if not timing.takes_any:
                raise
            left_out[name] = str(error)


def _in_process(tasks: list[_Task]) -> Iterator[Row]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as worker:
        for task in tasks:
            try:
                with _interrupts_held_back():
                    timed = worker.submit(_timed_in_process, task)
                yield timed.result()
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
            except BrokenProcessPool as error:
                raise EngineError(
                    f"the process that timed {task.runtime} at batch {task.batch} ended by itself, perhaps for want of "
                    "memory; try a smaller --batch"
                ) from error


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process that is started here never sees an interrupt: its parent ends it. One that comes now comes after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show(found: Benched, path: Path | None) -> None:
    console = Console(highlight=False)
    console.print(_table(found))
    for name, why in found.left_out.items():
        console.print(f"Left out is {name}: {why}.", markup=False, soft_wrap=True)
    noisy = [f"{row.runtime} at batch {row.batch}" for row in found.rows if row.noisy]
    if noisy:
        said = f"The machine was too noisy to tell: {', '.join(noisy)}. Stop what else is running, and time again."
        console.print(said, markup=False, soft_wrap=True)
    if path is not None:
        console.print(f"  {path}  (every number)", markup=False, soft_wrap=True)


def _table(found: Benched) -> Listing:
    columns = (
        Column("Runtime", number=False),
        Column("Batch"),
        Column("Dense", 2),
        Column("Compressed", 2),
        Column("Speed-up\n[95 %]"),
        Column("MACs\nspeed-up", 1),
        Column("Efficiency"),
        Column("Runtime's\nown gain", 1),
        Column("Verdict", 1, number=False),
    )
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    note = (
        f"{threads}. Speed-up: over dense in the same runtime. Efficiency: that over the speed-up of the MACs. The "
        "runtime's own gain: dense there over dense in torch. Medians of interleaved rounds"
    )
    note += "; ratios are of processor time." if found.threads == 1 else "."
    return Listing("Speed", columns, tuple(map(_cells, found.rows)), note=note)


def _cells(row: Row) -> tuple[str, ...]:
    one = row.measured
    assert one.speedup is not None
    efficiency, promised, gain = one.efficiency, one.macs_speedup, row.gain
    return (
        row.runtime,
        str(row.batch),
        words.milliseconds(one.reference_ms),
        words.milliseconds(one.latency_ms),
        f"{words.factor(one.speedup.value)} [{words.bounds(one.speedup)}]",
        words.NOTHING if promised is None else words.factor(promised),
        words.NOTHING if efficiency is None else f"{efficiency.value:.2f}",
        words.NOTHING if gain is None else words.factor(gain.ratio.value),
        str(one.verdict),
    )
