"""Compression of networks of many architectures, and what must hold for each: nothing fails, nothing is silently wrong.

    python benchmarks/architectures.py --json rows.json                  # everything; about an hour of one thread
    python benchmarks/architectures.py --source hf --only "Bert*|T5*"
    python benchmarks/architectures.py --share 0.1                       # every tenth network
    python benchmarks/architectures.py --json rows.json --table          # what the file holds, nothing is run

Each network is small, untrained and awake (see `architecture_catalogue`), and goes through `st.compress` under
`Budget(macs=0.6)` with three batches of random data in a process of its own. Where that budget is out of reach, it is
half way between 1 and the smallest there is, as the message says. Of networks with many or wide layers, so many are
factored as some seconds allow; the others are excluded.

Then: no exceptions but those of Spectrim; the MACs counted are those that the plan promises, within the budget; outputs
are finite, of the structure, shapes and number types of the dense ones; a file gives back the same network bit by bit;
with `--onnx`, an ONNX file agrees wherever the dense network has one that does.
"""

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from architecture_catalogue import Architecture, catalogue, run
from rich.console import Console
from rich.table import Table
from torch import nn

import spectrim as st
from spectrim.core.nested import tensors
from spectrim.layers.tracing import typed_layers

SHARE, BATCHES = 0.6, 2
FEWEST, MOST, WORK = 5, 20, 3e8
"""Layers that are factored: so many that this number times the network's MACs is not above `WORK`, within bounds."""

WIDEST = 600
"""How many inputs (those of all kernel places) and outputs the widest of them has."""

SECONDS, GIBIBYTES = 180, 8
"""Of one network: time of the processor, and memory."""

TOLERANCE = 1e-3
"""Of ONNX files, of the largest output: deep networks that are not trained make more of rounding than others."""

PATIENCE = 5
"""So many times as long may it take by the clock, on a machine that others use."""

PRELOADED = ("timm", "torchvision", "spectrim", "rich.console", "transformers.models.llama.modeling_llama")
"""What takes long to import, and is therefore imported once; packages that are missing are passed over."""

FAILURES = (
    *("exception", "crash", "cost differs", "over budget", "not finite", "structure differs"),
    *("loaded differs", "onnx differs"),
)
REACHABLE = re.compile(r"the smallest this model can be is Budget\(macs=([\d.e-]+)\)")


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Attributes:
        id: Of the architecture.
        outcome: `compressed`, `refused`, `time`, or a failure: `exception`, `crash`.
        detail: The reason of a refusal, or where an exception came from.
        seconds: For everything, of the processor.
        failures: What did not hold of the compressed network.
        share: The budget, of the dense MACs.
        macs: Of the dense network.
        ratio: Measured, kept / dense.
        layers: Layers of the plan.
        factored: Those of them that were replaced.
        onnx: `agrees`, or why it was not compared.
    """

    id: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    share: float = SHARE
    macs: int = 0
    ratio: float = 0.0
    layers: int = 0
    factored: int = 0
    onnx: str = ""


# -------------------------------------------------------------------------------------------------------- one network


def examine(network: Architecture, *, onnx: bool = False) -> Row:
    """Compress one network and check everything."""
    model = network.awake()
    example = network.inputs(2)
    data = [network.inputs(4) for _ in range(BATCHES)]
    try:
        dense = st.measure(model, example, latency=False)
        exclude = costly_layers(model, macs=dense.macs)
        compressed, share = compressed_within(model, example, data, exclude=exclude)
    except st.errors.SpectrimError as error:
        return Row(network.id, "refused", f"{type(error).__name__}: {error}")
    measured, plan = compressed.measurement, compressed.plan
    failures = list(differences(compressed, dense, share=share))
    expected, outputs = run(model, example), run(compressed.model, example)
    failures += compared(expected, outputs)
    with tempfile.TemporaryDirectory() as folder:
        saved = st.save(compressed.model, Path(folder) / "model.safetensors")
        again = st.load(saved, network.build()).eval()
        if not all(map(same, tensors(outputs), tensors(run(again, example)))):
            failures.append("loaded differs")
        note = exported(model, compressed.model, example, Path(folder)) if onnx else ""
    if note == "differs":
        failures.append("onnx differs")
    return Row(
        id=network.id,
        outcome="compressed",
        failures=tuple(failures),
        share=share,
        macs=dense.macs,
        ratio=measured.macs_ratio or 0.0,
        layers=len(plan),
        factored=len(plan.factored),
        onnx=note,
    )


def compressed_within(
    model: nn.Module, example: Any, data: Sequence[Any], *, exclude: Sequence[str]
) -> tuple[st.Compressed, float]:
    """The network under the budget, or else under one that can be reached; and that budget's share."""

    def compress(share: float) -> tuple[st.Compressed, float]:
        budget = st.Budget(macs=share)
        return st.compress(model, budget, example_inputs=example, data=data, exclude=exclude), share

    try:
        return compress(SHARE)
    except st.errors.RuleError as error:
        reachable = REACHABLE.search(str(error))
        if reachable is None or float(reachable.group(1)) >= 1:
            raise
    return compress((1 + float(reachable.group(1))) / 2)


def costly_layers(model: nn.Module, *, macs: int) -> list[str]:
    """Names of layers to exclude: wide ones, and of the others so many that few remain, evenly spread."""
    most = int(max(FEWEST, min(MOST, WORK // max(1, macs))))
    layers = {name: model.get_submodule(name).weight for name in typed_layers(model)}
    wide = [name for name, weight in layers.items() if max(weight.shape[0], weight[0].numel()) > WIDEST]
    narrow = [name for name in layers if name not in wide]
    spread = {place * len(narrow) // most for place in range(most)}
    return [*wide, *(name for place, name in enumerate(narrow) if place not in spread)]


def differences(compressed: st.Compressed, dense: st.Measurement, *, share: float) -> Iterable[str]:
    """What the costs counted do not keep of the plan's promise."""
    measured, plan = compressed.measurement, compressed.plan
    saved = plan.dense_cost.macs - plan.kept_cost.macs
    if dense.macs - measured.macs != saved:
        yield f"cost differs: {dense.macs - measured.macs} MACs saved, {saved} planned"
    params = plan.dense_cost.params - plan.kept_cost.params
    if dense.params - measured.params != params:
        yield f"cost differs: {dense.params - measured.params} parameters saved, {params} planned"
    if measured.macs > share * dense.macs:
        yield f"over budget: {measured.macs / dense.macs:.4f} of {share:.4f}"


def compared(expected: Any, outputs: Any) -> Iterable[str]:
    """What the outputs of the compressed network do not have of the dense ones."""
    pairs = [list(tensors(value)) for value in (expected, outputs)]
    described = [[(tensor.shape, tensor.dtype) for tensor in leaves] for leaves in pairs]
    if type(expected) is not type(outputs) or described[0] != described[1] or not described[0]:
        yield "structure differs"
    elif not all(torch.equal(first.isfinite(), second.isfinite()) for first, second in zip(*pairs, strict=True)):
        yield "not finite"


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit by bit, NaN included."""
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(), second.nan_to_num())


def exported(dense: nn.Module, small: nn.Module, example: Any, folder: Path) -> str:
    """`agrees`, `differs`, or that the dense network's own export does not work."""
    try:
        st.export_onnx(dense, folder / "dense.onnx", example_inputs=example, tolerance=TOLERANCE)
    except st.errors.SpectrimError as error:
        return f"the dense network has none: {str(error)[:160]}"
    try:
        st.export_onnx(small, folder / "small.onnx", example_inputs=example, tolerance=TOLERANCE)
    except st.errors.SpectrimError:
        return "differs"
    return "agrees"


# ---------------------------------------------------------------------------------------------------- their processes


def guarded(name: str, options: Mapping[str, Any], results: Connection) -> None:
    """In a process of its own: examine, and send the row even if it fails."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES << 30, GIBIBYTES << 30))
    began, limit = time.process_time(), options["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (int(began + limit) + 1, int(began + limit) + 30))
    warnings.simplefilter("ignore")
    try:
        row = examine(catalogue()[name], onnx=options["onnx"])
    except Exception as error:  # this is what is looked for
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "spectrim" in frame.filename]
        at = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
        row = Row(name, "exception", f"{type(error).__name__}: {str(error)[:300]} [{at}]")
    results.send(dataclasses.replace(row, seconds=round(time.process_time() - began, 1)))


def isolated(name: str, *, onnx: bool, seconds: float) -> Row:
    """The row of one network, also where its process dies or takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=guarded, args=(name, {"onnx": onnx, "seconds": seconds}, sender), daemon=True)
    process.start()
    sender.close()
    late = Row(name, "time", f"more than {seconds:g} s", seconds=seconds)
    try:
        row = receiver.recv() if receiver.poll(PATIENCE * seconds) else late
    except EOFError:
        process.join()
        ended = f"the process ended with {process.exitcode}"
        row = late if process.exitcode == -signal.SIGXCPU else Row(name, "crash", ended)
    process.kill()
    process.join()
    return row


# -------------------------------------------------------------------------------------------------------- the results


def read_rows(path: Path | None) -> dict[str, Row]:
    """Of an earlier run, by id."""
    if path is None or not path.exists():
        return {}
    rows = (Row(**fields | {"failures": tuple(fields["failures"])}) for fields in json.loads(path.read_text()))
    return {row.id: row for row in rows}


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """All of them."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows.values()], indent=1))


def reason_of(row: Row) -> str:
    """A refusal without the names and numbers of the network, so that equal reasons are counted together."""
    what, _, message = row.detail.partition(": ")
    return f"{what}: {re.sub(r'[0-9][0-9.e%-]*', '#', message)[:110]}"


def tables(rows: Iterable[Row]) -> list[Table]:
    """How many of each source came how far, with which failures; the refusals by reason; and what failed."""
    rows = list(rows)
    summary = Table("source", "tried", "compressed", "at 0.6", "refused", "time", *FAILURES, "ONNX compared", "minutes")
    sources = list(dict.fromkeys(row.id.partition("/")[0] for row in rows))
    for source in [*sources, "all"]:
        own = [row for row in rows if source in ("all", row.id.partition("/")[0])]
        outcomes = Counter(row.outcome for row in own)
        failed = Counter(
            kind for row in own for kind in FAILURES if row.outcome == kind or kind in " ".join(row.failures)
        )
        summary.add_row(
            source,
            str(len(own)),
            str(outcomes["compressed"]),
            str(sum(row.outcome == "compressed" and row.share == SHARE for row in own)),
            *(str(outcomes[kind]) for kind in ("refused", "time")),
            *(str(failed[kind]) for kind in FAILURES),
            str(sum(row.onnx in ("agrees", "differs") for row in own)),
            f"{sum(row.seconds for row in own) / 60:.1f}",
        )
    refusals = Table("refused", "networks")
    for reason, number in Counter(reason_of(row) for row in rows if row.outcome == "refused").most_common():
        refusals.add_row(reason, str(number))
    failures = Table("failed", "what")
    for row in rows:
        if row.failures or row.outcome in FAILURES:
            failures.add_row(row.id, "; ".join(row.failures) or f"{row.outcome}: {row.detail}")
    return [summary, *(table for table in (refusals, failures) if table.row_count)]


def selected(options: argparse.Namespace) -> list[str]:
    """The ids that were asked for."""
    patterns = options.only.split("|")
    names = [
        name
        for name in catalogue()
        if options.source in (None, name.partition("/")[0])
        and any(
            fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.partition("/")[2], pattern) for pattern in patterns
        )
    ]
    return names[:: max(1, round(1 / options.share))]


def main() -> None:
    """Run what is missing in the file, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("timm", "torchvision", "hf"))
    parser.add_argument("--only", default="*", help="patterns of names, separated by |")
    parser.add_argument("--share", type=float, default=1.0, help="0.1: every tenth")
    parser.add_argument("--json", type=Path, help="file of results; networks that it holds are not run again")
    parser.add_argument("--onnx", action="store_true", help="also compare ONNX files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one network")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    console = Console(width=180, highlight=False)
    rows = read_rows(options.json)
    names = selected(options)
    for name in () if options.table else names:
        if name in rows:
            continue
        row = rows[name] = isolated(name, onnx=options.onnx, seconds=options.seconds)
        what = (
            "; ".join(row.failures)
            or row.detail
            or f"{row.ratio:.3f} of {row.share:.3f}, {row.factored} of {row.layers}"
        )
        print(f"{row.seconds:6.1f} s  {name}: {row.outcome}, {what} {row.onnx}", flush=True)
        if options.json:
            write_rows(options.json, rows)
    chosen = [rows[name] for name in names if name in rows]
    for table in tables(chosen):
        console.print(table)
    sys.exit(any(row.failures or row.outcome in FAILURES for row in chosen))


if __name__ == "__main__":
    main()
