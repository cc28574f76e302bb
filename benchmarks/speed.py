"""Efficiency over runtimes and batch sizes, compared with the bars: measured speed-up over that of the MACs.

    python benchmarks/speed.py                                                             # everything; half an hour
    python benchmarks/speed.py --only resnet18 --runtimes onnxruntime,openvino --batches 1
    python benchmarks/speed.py --only total --json total.json                              # against dense torch eager

The speed-up is over dense in the same runtime: medians of interleaved pairs in one thread, each cell in its own
process. Ranks are multiples of the step that is probed first. Where they are not (rank 20), a copy padded to the step
is timed as well, and the faster one counts.
`total` is ResNet-18 at 0.35 of its MACs in each runtime against its dense self in torch eager.
The networks are untrained: time does not depend on the weights' values.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import spectrim as st
from spectrim.benchmark.measurement import runtime_gain
from spectrim.layers.padding import padded
from spectrim.models import mlp, resnet20, resolve
from spectrim.runtimes.rank_grid import probe
from spectrim.runtimes.sessions import RUNTIMES, require_runtime

HALF, THIRD, TOTAL = 0.5, 1 / 3, 0.35
MNIST_RANKS = (20, 16, 32, 48, 64)
FORMS = ("channel", "spatial", "tucker2")


@dataclass(frozen=True)
class Network:
    """A network, the shape of one input, and how small it is made: shares of its MACs, or a rank."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rules: Mapping[str, st.Budget | st.Rank]
    slow: bool = False


NETWORKS = {
    "resnet18": Network(
        lambda: resolve("torchvision:resnet18"),
        (3, 224, 224),
        {"1/2": st.Budget(macs=HALF), "1/3": st.Budget(macs=THIRD), "0.35": st.Budget(macs=TOTAL)},
        slow=True,
    ),
    "resnet20": Network(resnet20, (3, 32, 32), {"1/2": st.Budget(macs=HALF)}),
    "mnist": Network(mlp, (784,), {f"rank {rank}": st.Rank(rank) for rank in MNIST_RANKS}),
    "transformer": Network(
        lambda: nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), (128, 512), {"1/2": st.Budget(macs=HALF)}
    ),
}
BARS: dict[tuple[str, str, str, int], float] = {
    ("resnet18", "1/2", "onnxruntime", 1): 0.95,
    ("resnet18", "1/3", "onnxruntime", 1): 0.93,
    ("resnet18", "1/2", "onnxruntime", 64): 0.90,
    ("resnet18", "1/3", "onnxruntime", 64): 0.90,
    ("resnet18", "1/2", "openvino", 1): 0.88,
    ("resnet18", "1/3", "openvino", 1): 0.88,
    ("resnet18", "1/2", "channels_last", 1): 0.80,
    ("resnet18", "1/3", "channels_last", 1): 0.80,
    ("resnet20", "1/2", "onnxruntime", 1): 0.88,
    **{("mnist", f"rank {rank}", "onnxruntime", 1): 1.0 for rank in MNIST_RANKS},
    **{("mnist", f"rank {rank}", "onnxruntime", 64): 0.95 for rank in MNIST_RANKS},
}
TOTAL_BARS = {"float32": 4.0, "bfloat16": 7.0}


@dataclass(frozen=True)
class Cell:
    """One network at one size in one runtime and batch size; nothing but plain values, since it travels."""

    network: str
    size: str
    runtime: str
    batch: int
    folder: str
    step: int

    @property
    def bar(self) -> float | None:
        """The bar for the efficiency, if there is one."""
        return BARS.get((self.network, self.size, self.runtime, self.batch))

    @property
    def rounds(self) -> int:
        """Fewer where a pass takes seconds."""
        return (31 if self.batch == 1 else 11 if self.batch < 64 else 5) if NETWORKS[self.network].slow else 31


@dataclass(frozen=True)
class CellResult:
    """The figures of a cell; `value` is the efficiency, or the whole gain over dense torch eager."""

    cell: Cell
    dense_ms: float
    small_ms: float
    speedup: float
    macs_speedup: float
    value: float
    low: float
    high: float
    verdict: str
    note: str
    seconds: float


def dense(name: str) -> nn.Module:
    """The network as its own code initialises it, seed 0."""
    torch.manual_seed(0)
    return NETWORKS[name].make().eval()


def example(name: str) -> torch.Tensor:
    """One input."""
    return torch.randn(1, *NETWORKS[name].shape, generator=torch.Generator().manual_seed(0))


@cache
def analysed(name: str) -> st.Analysis:
    """Of the weights alone, once for all sizes."""
    return st.analyze(dense(name), example(name))


def compressed(name: str, size: str, forms: Sequence[str], step: int, folder: Path) -> Path:
    """The file of the compressed network, made once."""
    path = folder / f"{name}-{size.replace('/', '_')}-{'+'.join(forms)}-{step}.safetensors"
    if not path.exists():
        rule = NETWORKS[name].rules[size]
        whole, x = dense(name), example(name)
        if isinstance(rule, st.Rank):
            small = st.compress(whole, rule, example_inputs=x, exclude=("head",))
        else:
            small = st.compress(whole, rule, example_inputs=x, forms=forms, rank_multiple=step, analysis=analysed(name))
        st.save(small.model, path)
    return path


def measured(cell: Cell) -> CellResult:
    """Efficiency in a runtime. Runs in a process of its own."""
    start, whole, x = time.perf_counter(), dense(cell.network), example(cell.network)
    small = st.load(cell.folder, whole).eval()
    variants = {"": small}
    if isinstance(NETWORKS[cell.network].rules[cell.size], st.Rank):
        variants[f"padded to {cell.step}"] = padded(small, cell.step)
    macs = st.measure(small, x, reference=whole, latency=False).macs_speedup or 1.0
    best: tuple[st.Measurement, str] | None = None
    for note, model in variants.items():
        timed = st.measure(model, x, reference=whole, runtime=cell.runtime, batch=cell.batch, rounds=cell.rounds)
        if best is None or timed.speedup.value > best[0].speedup.value:
            best = timed, note
    fastest, note = best
    return CellResult(
        cell=cell,
        dense_ms=fastest.reference_ms,
        small_ms=fastest.latency_ms,
        speedup=fastest.speedup.value,
        macs_speedup=macs,
        value=fastest.speedup.value / macs,
        low=fastest.speedup.low / macs,
        high=fastest.speedup.high / macs,
        verdict=fastest.verdict,
        note=note,
        seconds=time.perf_counter() - start,
    )


def total(cell: Cell) -> CellResult:
    """The compressed network in a runtime against the dense one in torch eager. Runs in a process of its own."""
    start, whole, x = time.perf_counter(), dense(cell.network), example(cell.network)
    small = st.load(cell.folder, whole).eval()
    counted = st.measure(small, x, reference=whole, latency=False)
    gain = runtime_gain(small, x, reference=whole, runtime=cell.runtime, batch=cell.batch, rounds=cell.rounds)
    small_ms = st.measure(small, x, runtime=cell.runtime, batch=cell.batch, rounds=5).latency_ms
    ratio = gain.ratio
    return CellResult(
        cell=cell,
        dense_ms=small_ms * ratio.value,
        small_ms=small_ms,
        speedup=ratio.value,
        macs_speedup=counted.macs_speedup,
        value=ratio.value,
        low=ratio.low,
        high=ratio.high,
        verdict=gain.verdict,
        note="",
        seconds=time.perf_counter() - start,
    )


def isolated(work: Callable[[Cell], CellResult], cells: Sequence[Cell]) -> Iterator[CellResult]:
    """Each cell in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    for cell in cells:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as worker:
            yield worker.submit(work, cell).result()


def efficiencies(options: argparse.Namespace, step: int, folder: Path, console: Console) -> list[CellResult]:
    """The table of efficiencies."""
    cells = [
        Cell(name, size, runtime, batch, str(compressed(name, size, options.forms, step, folder)), step)
        for name in NETWORKS
        if name in options.only
        for size in NETWORKS[name].rules
        if size != "0.35"
        for runtime in options.runtimes
        for batch in options.batches
    ]
    table = Table("network", "size", "runtime", "batch", "dense ms", "ms", "speed-up", "MACs", "efficiency", "bar", "")
    results = []
    for result in isolated(measured, cells):
        results.append(result)
        cell, bar = result.cell, result.cell.bar
        mark = "" if bar is None else "PASS" if result.value >= bar else "MISS"
        efficiency = f"{result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"
        noisy = result.verdict if result.verdict == "too noisy to tell" else ""
        console.print(f"{cell.network} {cell.size} {cell.runtime} {cell.batch}: {efficiency} ({result.seconds:.0f} s)")
        times = (f"{result.dense_ms:.4g}", f"{result.small_ms:.4g}")
        table.add_row(
            *(cell.network, cell.size, cell.runtime, str(cell.batch), *times),
            *(f"{result.speedup:.3f}", f"{result.macs_speedup:.3f}", efficiency, "" if bar is None else f"{bar:.2f}"),
            " ".join(filter(None, (mark, result.note, noisy))),
        )
    if results:
        console.print(table)
    return results


def totals(options: argparse.Namespace, step: int, folder: Path, console: Console) -> list[CellResult]:
    """The best runtime in each precision against dense torch eager."""
    if "total" not in options.only:
        return []
    path = str(compressed("resnet18", "0.35", options.forms, step, folder))
    cells = [Cell("resnet18", "0.35", runtime, 1, path, step) for runtime in options.runtimes]
    results, table = list(isolated(total, cells)), Table("precision", "runtime", "over dense torch eager", "bar", "")
    for result in results:
        gain = f"{result.value:.2f} ({result.seconds:.0f} s)"
        console.print(f"resnet18 0.35 {result.cell.runtime} over dense torch eager: {gain}")
    for precision, bar in TOTAL_BARS.items():
        same = [result for result in results if precision_of(result.cell.runtime) == precision]
        if same:
            best = max(same, key=lambda result: result.value)
            noisy = best.verdict if best.verdict == "too noisy to tell" else ""
            table.add_row(
                *(precision, best.cell.runtime, f"{best.value:.2f} [{best.low:.2f}, {best.high:.2f}]", f"{bar:.0f}"),
                f"{'PASS' if best.value >= bar else 'MISS'} {noisy}",
            )
    console.print(table)
    return results


def precision_of(runtime: str) -> str:
    """The number type that a runtime computes in."""
    return "bfloat16" if runtime.endswith("bf16") else "float32"


def missed(efficient: Sequence[CellResult], whole: Sequence[CellResult]) -> bool:
    """Whether a bar was missed."""
    if any(result.cell.bar is not None and result.value < result.cell.bar for result in efficient):
        return True
    for precision, bar in TOTAL_BARS.items():
        values = [result.value for result in whole if precision_of(result.cell.runtime) == precision]
        if values and max(values) < bar:
            return True
    return False


def listed(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(text.split(","))


def main() -> None:
    """Compress each network once, time it in each runtime, and compare the efficiencies with the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*NETWORKS, "total")
    parser.add_argument("--only", type=listed, default=names, help=f"of {', '.join(names)}, with commas")
    parser.add_argument("--runtimes", type=listed, default=RUNTIMES, help=f"of {', '.join(RUNTIMES)}, with commas")
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=(1, 8, 64))
    parser.add_argument("--forms", type=listed, default=("channel", "spatial"), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--step", type=int, help="ranks are multiples of it; probed in the first runtime by default")
    parser.add_argument("--work", type=Path, help="folder that keeps the compressed networks for the next time")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args()
    if unknown := [*set(options.only) - set(names), *set(options.forms) - set(FORMS)]:
        parser.error(f"unknown: {', '.join(unknown)}")
    for runtime in options.runtimes:
        require_runtime(runtime)
    torch.set_num_threads(1)
    console = Console(width=160, highlight=False)
    favourite = "onnxruntime" if "onnxruntime" in options.runtimes else options.runtimes[0]
    step = options.step or probe(runtime=favourite).multiple
    console.print(f"ranks are multiples of {step}, forms {', '.join(options.forms)}, one thread")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        efficient = efficiencies(options, step, folder, console)
        whole = totals(options, step, folder, console)
    if options.json:
        figures = {"step": step, "efficiency": [*map(asdict, efficient)], "total": [*map(asdict, whole)]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(1 if missed(efficient, whole) else 0)


if __name__ == "__main__":
    main()
