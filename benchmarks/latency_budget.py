"""Budgets of latency, held against their bars: is the time of a network known before it is built, and is it met?

    python benchmarks/latency_budget.py                                          # predicted against measured
    python benchmarks/latency_budget.py --weights cifar_resnet20.safetensors     # and half of the time, with accuracy
    python benchmarks/latency_budget.py --networks resnet20 --runtime openvino   # another runtime; the bars stay

Predicted: the table of isolated layers; measured: dense and factored networks in turn, in the same runtime. Networks
are untrained there, since times do not depend on the weights. With `--weights`, ResNet-20 gets `Budget(latency=0.5)`,
and the budget of MACs whose network takes as long is searched for, once with all ranks and once with those on the
hardware's grid; all three are fitted to 1024 training images without labels, and the test set is opened once, at the
end. Run it on an idle machine: every figure is a time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cifar_zero_shot import accuracy, analysed, calibration
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import spectrim as st
from spectrim.benchmark.latencies import LatencyTable
from spectrim.benchmark.latency_table import latency_table
from spectrim.data import load
from spectrim.models import resolve

NETWORKS = {"resnet18": ("torchvision:resnet18", 224), "resnet20": ("spectrim:resnet20", 32)}
MACS, LATENCY = (0.6, 0.5, 0.4, 0.3), (0.75, 0.6, 0.5)
PREDICTION, SECONDS, HALF, MET = 0.05, 60.0, 0.5, 0.52


@dataclass
class Findings:
    """What was measured, and which bars are held."""

    console: Console
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def bar(self, what: str, *, got: str, bar: str, held: bool) -> None:
        """Note one bar."""
        self.bars.append((what, got, bar, held))

    def show(self) -> bool:
        """Print all bars; gives whether every one is held."""
        table = Table("", "measured", "bar", "")
        for what, got, bar, held in self.bars:
            table.add_row(what, got, bar, "PASS" if held else "MISS")
        self.console.print(table)
        return all(held for *_, held in self.bars)


def share_of(small: nn.Module, dense: nn.Module, x: Tensor, options: argparse.Namespace) -> float:
    """Time of the small network over that of the dense one."""
    speedup = st.measure(small, x, reference=dense, runtime=options.runtime, threads=options.threads).speedup
    assert speedup is not None
    return 1 / speedup.value


def predicted(name: str, options: argparse.Namespace, findings: Findings) -> None:
    """One network: seconds of its table, and predicted against measured over several budgets."""
    reference, side = NETWORKS[name]
    torch.manual_seed(0)
    model, x = resolve(reference).eval(), torch.randn(options.batch, 3, side, side)
    known = st.analyze(model, x)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        table = latency_table(
            model, x, analysis=known, runtime=options.runtime, threads=options.threads, folder=Path(folder)
        )
        seconds = time.perf_counter() - start
    console, budgets = findings.console, Table("budget", "MACs kept", "predicted", "measured", "off")
    rows = []
    for rule in (*(st.Budget(macs=share) for share in MACS), *(budget(share, options) for share in LATENCY)):
        try:
            plan = planned(known, rule, table)
        except st.errors.RuleError as error:
            console.print(f"{name}: {error}", soft_wrap=True)
            continue
        small = st.compress(model, plan, example_inputs=x, analysis=known)
        guess, seen = table.predict(plan) / table.network_ms, share_of(small.model, model, x, options)
        rows.append({"rule": str(rule), "predicted": guess, "measured": seen, "macs": small.measurement.macs_ratio})
        figures = (f"{small.measurement.macs_ratio:.3f}", f"{guess:.3f}", f"{seen:.3f}", f"{guess / seen - 1:+.1%}")
        budgets.add_row(f"{rule.limits} {rule.share:g}", *figures)
    off = statistics.mean(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    console.print(f"{name} in {options.runtime}: dense {table.network_ms:.2f} ms, ranks on {table.rank_multiple}")
    console.print(budgets)
    findings.figures[name] = {"seconds": seconds, "off": off, "budgets": rows, "table": table.model_dump()}
    findings.bar(
        f"{name}: prediction, mean absolute", got=f"{off:.1%}", bar=f"<= {PREDICTION:.0%}", held=off <= PREDICTION
    )
    findings.bar(f"{name}: table", got=f"{seconds:.1f} s", bar=f"< {SECONDS:g} s", held=seconds < SECONDS)


def budget(share: float, options: argparse.Namespace) -> st.Budget:
    """A budget of latency in the runtime asked for."""
    return st.Budget(latency=share, runtime=options.runtime, threads=options.threads)


def planned(known: st.Analysis, rule: st.Budget, table: LatencyTable) -> st.Plan:
    """The plan of either budget, with the ranks of the table."""
    if rule.limits == "latency":
        return st.plan(known, rule, latencies=table)
    return st.plan(known, rule, rank_multiple=table.rank_multiple)


def halved(options: argparse.Namespace, findings: Findings) -> None:
    """ResNet-20 in half of its time, and the budgets of MACs that take as long."""
    model, data = resolve("spectrim:resnet20", weights=options.weights).eval(), calibration(0)
    console = findings.console
    x, known = data[0][:1], analysed(model, data)
    rule = budget(HALF, options)
    start = time.perf_counter()
    small = st.compress(model, rule, example_inputs=x, data=data, analysis=known)
    seconds = time.perf_counter() - start
    note = small.plan.latency
    assert note is not None
    networks, macs_kept = {f"latency {HALF:g}": small.model}, {f"latency {HALF:g}": small.measurement.macs_ratio}
    shares = {f"latency {HALF:g}": share_of(small.model, model, x, options)}
    console.print(f"resnet20, {rule}: predicted {note.predicted:.3f}, verified {note.measured}, {seconds:.0f} s in all")
    for multiple in (None, small.plan.rank_multiple):
        fast = as_long(model, known, x, options, share_of_time=shares[f"latency {HALF:g}"], multiple=multiple)
        if fast is None:
            console.print(f"no budget of MACs is as fast with ranks on {multiple or 1}")
            continue
        share, seen = fast
        name = f"MACs {share:.3f}" + (f", ranks on {multiple}" if multiple else "")
        compressed = st.compress(
            model, st.Budget(macs=share), example_inputs=x, data=data, analysis=known, rank_multiple=multiple
        )
        networks[name], macs_kept[name], shares[name] = compressed.model, compressed.measurement.macs_ratio, seen
    test = load("cifar10", split="test")
    scores = {name: accuracy(network, test.images, test.labels) for name, network in networks.items()}
    table = Table("budget", "MACs kept", "time kept", "accuracy")
    for name, score in scores.items():
        table.add_row(name, f"{macs_kept[name]:.3f}", f"{shares[name]:.3f}", f"{score:.2f}")
    console.print(table)
    rows = {name: {"accuracy": scores[name], "latency": shares[name], "macs": macs_kept[name]} for name in scores}
    findings.figures["half of the time"] = rows | {"note": note.model_dump()}
    (_, own_score), *others = scores.items()
    taken = shares[f"latency {HALF:g}"]
    findings.bar(f"resnet20: Budget(latency={HALF:g})", got=f"{taken:.3f}", bar=f"<= {MET:g}", held=taken <= MET)
    for name, score in others[:1]:  # the first one has all ranks to choose from, as budgets of MACs have by default
        findings.bar(
            f"its accuracy, beside {name}", got=f"{own_score:.2f}", bar=f">= {score:.2f}", held=own_score >= score
        )


def as_long(
    model: nn.Module,
    known: st.Analysis,
    x: Tensor,
    options: argparse.Namespace,
    *,
    share_of_time: float,
    multiple: int | None,
) -> tuple[float, float] | None:
    """The largest share of the MACs whose network takes no more than `share_of_time`, and the time it takes."""
    low, high, best = 0.1, 1.0, (0.0, 0.0)
    for _ in range(7):
        share = (low + high) / 2
        try:
            plan = st.plan(known, st.Budget(macs=share), rank_multiple=multiple)
        except st.errors.RuleError:
            low = share
            continue
        small = st.compress(model, plan, example_inputs=x, analysis=known, reconstruct=False).model
        seen = share_of(small, model, x, options)
        if seen <= 1.005 * share_of_time:
            low, best = share, max(best, (share, seen))
        else:
            high = share
    return best if best[0] else None


def main() -> None:
    """Run everything and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18,resnet20", help="of the predictions; none with ''")
    parser.add_argument("--weights", type=Path, help="the published CIFAR ResNet-20 as safetensors")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="inputs of a pass in the predictions")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    findings = Findings(Console())
    for name in filter(None, options.networks.split(",")):
        predicted(name, options, findings)
    if options.weights:
        halved(options, findings)
    held = findings.show()
    if options.json:
        options.json.write_text(json.dumps(findings.figures, indent=1))
    sys.exit(not held)


if __name__ == "__main__":
    main()
