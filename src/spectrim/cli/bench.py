"""`spectrim bench`: the measured speed-up of a compressed network in each runtime."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from pydantic import Field

from spectrim.benchmark.measurement import Measurement, measure, runtime_gain
from spectrim.cli.deployment import Bench, Timing
from spectrim.cli.loading import load_network, load_source
from spectrim.cli.options import Machine, Source
from spectrim.cli.outputs import OutputFiles, Record, outputs
from spectrim.cli.stages import Stages, file_lines, show, stages
from spectrim.core.errors import DependencyError, EngineError, ModelError
from spectrim.core.files import Frozen
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.runtimes.sessions import RuntimeName, require_runtime, require_threads
from spectrim.runtimes.timing import Comparison

_NOISY = "too noisy to tell"


class Row(Frozen):
    """Both networks timed in one runtime, `batch` inputs a pass.

    `measured` is the compressed network against the dense one; `gain` the dense one in torch eager against itself in
    this runtime, None in torch eager.
    """

    runtime: RuntimeName
    batch: int
    measured: Measurement
    gain: Comparison | None = None

    @property
    def noisy(self) -> bool:
        """Whether the machine was too noisy for any of its ratios."""
        return _NOISY in (self.measured.verdict, self.gain and self.gain.verdict)


class Benched(Record):
    """What `spectrim bench --out` writes: every row, and why runtimes that nobody named were left out."""

    threads: int
    rows: tuple[Row, ...]
    left_out: dict[str, str] = Field(default_factory=dict)


def bench_network(command: Bench) -> None:
    """The table of every runtime, and a file of every number."""
    source, timing, out = command.source, command.timing, command.out
    _ = source.options, timing.batches
    require_threads(timing.threads)
    for name in timing.runtimes if timing.runtime != "all" else ():
        require_runtime(name, threads=timing.threads)
    files: OutputFiles = {out.name: (Benched.load, "every number")} if out else {}
    with stages() as progress, outputs(out.parent, files) if out else nullcontext() as folder:
        load_source(source, progress, Machine(threads=timing.threads))  # here a mistake is reported at once and in full
        left_out: dict[str, str] = {}
        rows = tuple(_rows(source, timing, progress=progress, left_out=left_out))
        record = Benched(command=str(command.invocation), threads=timing.threads, rows=rows, left_out=left_out)
        if not rows:
            raise EngineError(f"no runtime could be timed: {'; '.join(f'{n}: {why}' for n, why in left_out.items())}")
        if out is not None and folder is not None:
            record.save(folder / out.name)
    show(*_results(record), *(file_lines(out.parent, files) if out else ()), output=command.output)


def _rows(source: Source, timing: Timing, *, progress: Stages, left_out: dict[str, str]) -> Iterator[Row]:
    """The rows, one after the other, each runtime in a process of its own."""
    for name in timing.runtimes:
        progress.begin(f"time in {name}", total=len(timing.batches))
        try:
            require_runtime(name, threads=timing.threads)
            yield from progress.each(_in_process(source, timing, runtime=name))
        except (DependencyError, EngineError, ModelError) as error:
            if timing.runtime != "all":
                raise
            left_out[name] = str(error)


def _in_process(source: Source, timing: Timing, *, runtime: RuntimeName) -> Iterator[Row]:
    """The rows of a runtime, timed in a process of its own, in which no other runtime's threads run."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as worker:
        for batch in timing.batches:
            try:
                with _interrupts_held_back():
                    row = worker.submit(_time, source, timing, runtime=runtime, batch=batch)
                yield row.result()
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
            except BrokenProcessPool as error:
                raise EngineError(
                    f"the process that timed {runtime} at batch {batch} ended unexpectedly, perhaps for lack of "
                    "memory; try a smaller --batch"
                ) from error


def _time(source: Source, timing: Timing, *, runtime: RuntimeName, batch: int) -> Row:
    dense, small = (load_network(source, weights) for weights in (None, source.weights))
    shape = (prod(source.shape),) if source.flatten else source.shape
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"runtime": runtime, "threads": timing.threads, "batch": batch, "rounds": timing.rounds}
    measured = measure(small, example, reference=dense, **how)
    gain = None if runtime == "torch" else runtime_gain(dense, example, **how)
    return Row(runtime=runtime, batch=batch, measured=measured, gain=gain)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delay interrupts. A process that is started meanwhile never gets one; its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _results(record: Benched) -> Iterator[Listing | str]:
    yield _table(record)
    yield from (f"Left out is {name}: {why}." for name, why in record.left_out.items())
    noisy = [f"{row.runtime} at batch {row.batch}" for row in record.rows if row.noisy]
    if noisy:
        yield f"The machine was too noisy to tell: {', '.join(noisy)}. Stop what else is running, and time again."


def _table(record: Benched) -> Listing:
    columns: dict[Column, Callable[[Row], str]] = {
        Column("Runtime", number=False): lambda row: row.runtime,
        Column("Batch"): lambda row: str(row.batch),
        Column("Dense", 2): lambda row: words.milliseconds(row.measured.reference_ms),
        Column("Compressed", 2): lambda row: words.milliseconds(row.measured.latency_ms),
        Column("Speed-up\n[95 %]"): _speedup,
        Column("MACs\nspeed-up", 1): lambda row: words.factor(row.measured.macs_speedup),
        Column("Efficiency"): _efficiency,
        Column("Runtime's\nown gain", 1): lambda row: words.factor(row.gain.ratio.value if row.gain else None),
        Column("Verdict", 1, number=False): lambda row: str(row.measured.verdict),
    }
    note = (
        f"{words.threads(record.threads)}. Speed-up: over dense in the same runtime. Efficiency: that over the "
        "speed-up of the MACs. The runtime's own gain: dense there over dense in torch. Medians of interleaved rounds"
    )
    note += "; ratios are of processor time." if record.threads == 1 else "."
    return listing("Speed", record.rows, columns, note=note)


def _efficiency(row: Row) -> str:
    value = row.measured.efficiency.value if row.measured.efficiency else None
    return words.NOTHING if value is None else words.Cell(f"{value:.2f}", value)


def _speedup(row: Row) -> str:
    speedup = row.measured.speedup
    if speedup is None:
        return words.NOTHING
    text = f"{words.factor(speedup.value)} [{words.bounds(speedup)}]"
    return words.Cell(text, **{"": speedup.value, "low": speedup.low, "high": speedup.high})
