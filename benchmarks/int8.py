"""ResNet-20 on CIFAR-10: dense, dense + int8, low rank, low rank + int8, as files, compared with the bar.

    python benchmarks/int8.py --weights cifar_resnet20.safetensors                            # three seeds, test images
    python benchmarks/int8.py --weights cifar_resnet20.safetensors --seeds 0 --held-out       # to choose share and rate
    python benchmarks/int8.py --weights cifar_resnet20.safetensors --epochs 0                 # without fine-tuning

The bar: low rank + int8 at least 1.8x smaller on disk than dense + int8, and at most 1.2 points below the dense float32
network. It is met if one int8 scheme meets both, on average over the seeds. A seed chooses the 1024 training images,
without labels, of the calibration. Afterwards the network is distilled for a few epochs from the dense network, without
labels too. The rate was chosen on training images that neither calibration nor fine-tuning saw (`--held-out`), where it
hardly matters; the share was chosen for the size of the files alone.
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
    options = parser.parse_args()
    options.network = "resnet20"
    console, dense = Console(), network(options)
    tables = {int(seed): compared(options, dense, int(seed), console) for seed in options.seeds.split(",")}
    met = report(console, tables)
    if options.json:
        figures = {seed: table.model_dump(mode="json") for seed, table in tables.items()}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    sys.exit(not met)


def compared(options: argparse.Namespace, dense: nn.Module, seed: int, console: Console) -> QuantizedTable:
    """Everything for one seed."""
    data = calibration(seed)
    compressed = st.compress(
        dense, st.Budget(params=options.share), example_inputs=data[0][:1], data=data, analysis=analysed(dense, data)
    )
    small = finetuned(options, compressed.model, dense, seed) if options.epochs else compressed.model
    with tempfile.TemporaryDirectory() as folder:
        table = compare_quantized(
            dense,
            small,
            data[0][:1],
            folder=folder,
            data=torch.cat(data)[:INT8_IMAGES].split(64),
            test=test_batches(options, seed),
            schemes=SCHEMES,
            runtime=options.runtime,
            latency=options.latency,
        )
    for row in table.rows:
        assert row.accuracy is not None
        time = "" if row.latency_ms is None else f", {row.latency_ms:.2f} ms"
        console.print(f"seed {seed}, {row.name}: {row.bytes:,} bytes, {100 * row.accuracy.value:.2f} %{time}")
    return table


def finetuned(options: argparse.Namespace, small: nn.Module, teacher: nn.Module, seed: int) -> nn.Module:
    """A few epochs of distillation from the dense network, on images that calibration and choice do not use."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    chosen = order[10_000 : 10_000 + options.images]
    images = padded(cifar_inputs(load("cifar10", split="train").images[chosen]))

    def epoch(number: int) -> Augmented:
        return Augmented(images, draw=1000 * seed + number)

    return st.finetune(small, epoch, teacher=teacher, epochs=options.epochs, lr=options.lr, seed=seed).model


def test_batches(options: argparse.Namespace, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The images and labels for the accuracy."""
    images = load("cifar10", split="train" if options.held_out else "test")
    chosen = split(seed)[1] if options.held_out else torch.arange(len(images))
    return [(cifar_inputs(images.images[part]), images.labels[part]) for part in chosen.split(500)]


def report(console: Console, tables: Mapping[int, QuantizedTable]) -> bool:
    """Print means over seeds. Returns whether a scheme meets the bar."""
    heads = ("network", "bytes", "smaller", "on int8", "correct", "sd", "points", "bar")
    printed = Table(*heads, box=None, pad_edge=False)
    first = next(iter(tables.values()))
    rows = {row.name: row for row in first.rows}
    size = {
        name: statistics.mean(table.row(row.network, row.scheme).bytes for table in tables.values())
        for name, row in rows.items()
    }
    scores = {name: [percent(table, name) for table in tables.values()] for name in rows}
    dense, met = statistics.mean(scores["dense"]), False
    for name, row in rows.items():
        mean = statistics.mean(scores[name])
        spread = f"{statistics.stdev(scores[name]):.2f}" if len(scores[name]) > 1 else ""
        on_int8 = mark = ""
        if row.network == "low rank" and row.scheme is not None:
            ratio = size[f"dense + {row.scheme}"] / size[name]
            passed = ratio >= SMALLER and mean >= dense - POINTS
            on_int8, mark, met = f"{ratio:.2f}x", "PASS" if passed else "MISS", met or passed
        smaller, points = f"{size['dense'] / size[name]:.2f}x", f"{mean - dense:+.2f}"
        printed.add_row(name, f"{size[name]:,.0f}", smaller, on_int8, f"{mean:.2f}", spread, points, mark)
    console.print(printed)
    console.print(f"bar: {SMALLER}x smaller than dense + int8, at most {POINTS} points below dense; seeds {[*tables]}")
    for verdict in first.verdicts:
        console.print(verdict)
    return met


def percent(table: QuantizedTable, name: str) -> float:
    """Accuracy of one row."""
    (row,) = [row for row in table.rows if row.name == name]
    assert row.accuracy is not None
    return 100 * row.accuracy.value


if __name__ == "__main__":
    main()
