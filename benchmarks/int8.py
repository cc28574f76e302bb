"""ResNet-20 on CIFAR-10: dense, dense + int8, low rank, low rank + int8, as files, held against the bar.

    python benchmarks/int8.py --weights cifar_resnet20.safetensors                            # three seeds, test images
    python benchmarks/int8.py --weights cifar_resnet20.safetensors --seeds 0 --held-out       # to choose share and rate
    python benchmarks/int8.py --weights cifar_resnet20.safetensors --epochs 0                 # without fine-tuning

The bar: low rank + int8 at least 1.8x smaller on disk than dense + int8, and at most 1.2 points below the dense float32
network. It is held if one int8 scheme holds both, on average over the seeds (which 1024 training images, without
labels). Afterwards the network is fine-tuned for a few epochs with the dense network's answers, no labels either.
The rate was chosen on training images that neither calibration nor fine-tuning saw (`--held-out`), where it hardly
matters; the share for the size of the files alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from cifar_zero_shot import Augmented, analysed, calibration, network, padded, split
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import spectrim as st
from spectrim.data import load
from spectrim.models import cifar_inputs
from spectrim.quantization import QuantizedTable, Scheme, compare_quantized

SMALLER, POINTS = 1.8, 1.2
SCHEMES: tuple[Scheme, ...] = ("int8-weights", "int8-static")
INT8_IMAGES = 512


def main() -> None:
    """Compress, fine-tune, quantise, compare; exit with 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the published network as safetensors")
    parser.add_argument("--share", type=float, default=0.5, help="parameters kept")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning; 0 for none")
    parser.add_argument("--images", type=int, default=10_000, help="training images for that")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--held-out", action="store_true", help="accuracy on held-out training images instead")
    parser.add_argument("--latency", action="store_true", help="time the files as well, one image, one thread")
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime or openvino")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args()
    given.network = "resnet20"
    console, dense = Console(), network(given)
    tables = {int(seed): compared(given, dense, int(seed), console) for seed in given.seeds.split(",")}
    held = report(console, tables)
    if given.json:
        found = {seed: one.model_dump(mode="json") for seed, one in tables.items()}
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    sys.exit(not held)


def compared(given: argparse.Namespace, dense: nn.Module, seed: int, console: Console) -> QuantizedTable:
    """Everything for one seed."""
    data = calibration(seed)
    made = st.compress(
        dense,
        st.Budget(params=given.share),
        example_inputs=data[0][:1],
        data=data,
        analysis=analysed(dense, data),
    )
    small = finetuned(given, made.model, dense, seed) if given.epochs else made.model
    with tempfile.TemporaryDirectory() as folder:
        table = compare_quantized(
            dense,
            small,
            data[0][:1],
            folder=folder,
            data=torch.cat(data)[:INT8_IMAGES].split(64),
            test=scored(given, seed),
            schemes=SCHEMES,
            runtime=given.runtime,
            latency=given.latency,
        )
    for row in table.rows:
        assert row.accuracy is not None
        time = "" if row.latency_ms is None else f", {row.latency_ms:.2f} ms"
        console.print(f"seed {seed}, {row.name}: {row.bytes:,} bytes, {100 * row.accuracy.value:.2f} %{time}")
    return table


def finetuned(given: argparse.Namespace, small: nn.Module, teacher: nn.Module, seed: int) -> nn.Module:
    """A few epochs with the dense network's answers; the images are none of those for calibration or choice."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    chosen = order[10_000 : 10_000 + given.images]
    images = padded(cifar_inputs(load("cifar10", split="train").images[chosen]))

    def epoch(number: int) -> Augmented:
        return Augmented(images, draw=1000 * seed + number)

    return st.finetune(small, epoch, teacher=teacher, epochs=given.epochs, lr=given.lr, seed=seed).model


def scored(given: argparse.Namespace, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The images that accuracy is taken on."""
    images = load("cifar10", split="train" if given.held_out else "test")
    chosen = split(seed)[1] if given.held_out else torch.arange(len(images))
    return [(cifar_inputs(images.images[part]), images.labels[part]) for part in chosen.split(500)]


def report(console: Console, tables: Mapping[int, QuantizedTable]) -> bool:
    """The table, means over seeds, and whether a scheme holds the bar."""
    heads = ("network", "bytes", "smaller", "on int8", "correct", "sd", "points", "bar")
    shown = Table(*heads, box=None, pad_edge=False)
    rows = {one.name: one for one in next(iter(tables.values())).rows}
    size = {
        name: statistics.mean(one.row(row.network, row.scheme).bytes for one in tables.values())
        for name, row in rows.items()
    }
    scores = {name: [percent(one, name) for one in tables.values()] for name in rows}
    dense, held = statistics.mean(scores["dense"]), False
    for name, row in rows.items():
        mean = statistics.mean(scores[name])
        spread = f"{statistics.stdev(scores[name]):.2f}" if len(scores[name]) > 1 else ""
        smaller = said = ""
        if row.network == "low rank" and row.scheme is not None:
            ratio = size[f"dense + {row.scheme}"] / size[name]
            passed = ratio >= SMALLER and mean >= dense - POINTS
            smaller, said, held = f"{ratio:.2f}x", "PASS" if passed else "MISS", held or passed
        first = f"{size['dense'] / size[name]:.2f}x"
        shown.add_row(name, f"{size[name]:,.0f}", first, smaller, f"{mean:.2f}", spread, f"{mean - dense:+.2f}", said)
    console.print(shown)
    console.print(f"bar: {SMALLER}x smaller than dense + int8, at most {POINTS} points below dense; seeds {[*tables]}")
    for one in next(iter(tables.values())).verdicts:
        console.print(one)
    return held


def percent(table: QuantizedTable, name: str) -> float:
    """Accuracy of one row."""
    (row,) = [one for one in table.rows if one.name == name]
    assert row.accuracy is not None
    return 100 * row.accuracy.value


if __name__ == "__main__":
    main()
