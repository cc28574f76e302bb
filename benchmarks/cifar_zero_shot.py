"""CIFAR-10 accuracy of compressed ResNets without any training, held against the bars and the best peer.

    python benchmarks/cifar_zero_shot.py --weights cifar_resnet20.safetensors                      # the table
    python benchmarks/cifar_zero_shot.py --weights cifar_resnet20.safetensors --train finetune     # 3 epochs afterwards
    python benchmarks/cifar_zero_shot.py --weights cifar_resnet20.safetensors --train distill      # no labels at all
    python benchmarks/cifar_zero_shot.py --network resnet32 --weights cifar_resnet32.safetensors   # the same, untouched
    .. --images 4096                                      # what more calibration data would do; bars are for 1024
    .. --images 256 --batch 1                             # whether the size of batches matters

Each figure is the mean over calibration seeds (which 1024 training images, without labels) of the accuracy on the whole
test set. Metric, allocation and the rate of the fine-tuning were chosen on training images that neither calibration nor
fine-tuning saw (`--held-out` shows those).
Seconds are those of one `st.compress`, memory is the peak of the process it has to itself, import and data included.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis.sensitivities import with_output_grads
from spectrim.core.execution import as_inputs
from spectrim.core.memory import peak_gb
from spectrim.data import load
from spectrim.models import cifar_inputs, resolve

PEER = {0.75: 89.1, 0.6: 81.6, 0.5: 71.8, 0.4: 47.2}
BAR = {
    "resnet20": {0.75: 91.4, 0.6: 90.9, 0.5: 90.4, 0.4: 89.2, 0.3: 86.4},
    "resnet32": {0.6: -0.5, 0.5: -0.9, 0.3: -2.5},
}
TRAINED = {"finetune": {0.5: 90.9, 0.3: 88.0}, "distill": {0.5: 90.9, 0.3: 88.6}}
IMAGES, BATCH, TUNING = 1024, 64, 10_000


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the calibration, the held-out and the fine-tuning images in the training set."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    return order[:IMAGES], order[IMAGES : IMAGES + 2048], order[10_000 : 10_000 + TUNING]


def network(arguments: argparse.Namespace) -> nn.Module:
    """The published network."""
    return resolve(f"spectrim:{arguments.network}", weights=arguments.weights).eval()


def calibration(seed: int, *, images: int = IMAGES, batch: int = BATCH) -> tuple[Tensor, ...]:
    """The images, as the networks take them, in batches; those beyond 1024 are none of the other two kinds."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    places = torch.cat([split(seed)[0], order[10_000 + TUNING :]])[:images]
    return cifar_inputs(load("cifar10", split="train").images[places]).split(batch)


def analysed(model: nn.Module, data: Sequence[Tensor]) -> st.Analysis:
    """What `st.compress` works out before it looks at the budget, so that all budgets share it."""
    batches = [as_inputs(batch) for batch in data]
    statistics = with_output_grads(model, st.calibrate(model, data), batches)
    return st.sensitivity(model, st.analyze(model, data[0][:1], calibration=statistics), batches)


def compressed(
    model: nn.Module, data: Sequence[Tensor], share: float, *, analysis: st.Analysis | None = None
) -> st.Compressed:
    """The compressed network, in one call."""
    return st.compress(model, st.Budget(macs=share), example_inputs=data[0][:1], data=data, analysis=analysis)


def cost(arguments: argparse.Namespace, share: float) -> tuple[float, float]:
    """Seconds of one compression, and peak memory of a process that does nothing else, in GB."""
    command = [sys.executable, __file__, "--network", arguments.network, "--weights", str(arguments.weights)]
    done = subprocess.run([*command, "--once", str(share)], check=True, capture_output=True, text=True)
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent."""
    batches = ((cifar_inputs(x), y) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * st.accuracy(model, batches).value


class Augmented:
    """Batches of one epoch, each image flipped and shifted by itself, made as they are asked for.

    Without `labels` all are of class 0, for training that looks at no labels.
    """

    def __init__(self, padded: Tensor, *, draw: int, labels: Tensor | None = None, batch: int = 128) -> None:
        self.padded, self.draw, self.batch = padded, draw, batch
        self.labels = torch.zeros(len(padded), dtype=torch.long) if labels is None else labels

    def __len__(self) -> int:
        return math.ceil(len(self.padded) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(self.draw)
        for places in torch.randperm(len(self.padded), generator=draw).split(self.batch):
            rows, columns = (torch.randint(9, (len(places), 2, 1), generator=draw) + torch.arange(32)).unbind(1)
            flipped = torch.rand(len(places), 1, generator=draw) < 0.5
            columns = torch.where(flipped, columns.flip(-1), columns)
            image, top, left = places[:, None, None], rows[:, :, None], columns[:, None, :]
            # with the channels last in memory, as convolutions on a CPU are fastest
            yield self.padded[image, :, top, left].movedim(-1, 1), self.labels[places]


def trained(small: nn.Module, teacher: nn.Module, how: str, *, share: float, seed: int) -> nn.Module:
    """Three epochs over 10 000 training images, with the dense network's answers or, to distil, its outputs alone.

    What is distilled is compressed with these images as well, but for those that are kept aside.
    """
    images = cifar_inputs(load("cifar10", split="train").images[split(seed)[2]])

    def epochs_of(known: Tensor, *, batch: int) -> Callable[[int], Augmented]:
        whole = padded(known)
        return lambda number: Augmented(whole, draw=1000 * seed + number, batch=batch)

    if how == "finetune":
        data = epochs_of(images, batch=128)
        return st.finetune(small, data, teacher=teacher, epochs=3, lr=3e-4, seed=seed).model
    aside, others = images.split([TUNING // 20, TUNING - TUNING // 20])
    data = epochs_of(others, batch=BATCH)
    small = compressed(teacher, [*calibration(seed), *others.split(BATCH)], share).model
    lr, few = 1e-3 if share < 0.4 else 5e-4, aside.split(BATCH)
    return st.distill(small, teacher, data=data, held_out=few, epochs=3, batch=BATCH, lr=lr, seed=seed).model


def padded(images: Tensor) -> Tensor:
    """With four pixels of the mean colour around, of which `Augmented` cuts 32 x 32."""
    return nn.functional.pad(images, (4, 4, 4, 4))


def main() -> None:
    """Run everything and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(BAR), default="resnet20")
    parser.add_argument("--weights", type=Path, required=True, help="the published network as safetensors")
    parser.add_argument("--shares", default="", help="MACs kept, such as 0.5,0.3; all of the table by default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=IMAGES, help="calibration images")
    parser.add_argument("--batch", type=int, default=BATCH, help="how many of them a batch has")
    parser.add_argument("--train", choices=tuple(TRAINED), help="also train 3 epochs afterwards")
    parser.add_argument("--held-out", action="store_true", help="accuracy on held-out training images instead")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--once", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        model, data = network(arguments), calibration(0)
        start = time.perf_counter()
        compressed(model, data, arguments.once)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, peak_gb()]))
        return
    shares = [float(share) for share in arguments.shares.split(",") if share] or list(BAR[arguments.network])
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    report(arguments, shares, seeds)


def report(arguments: argparse.Namespace, shares: list[float], seeds: list[int]) -> None:
    """Measure, print, and exit with 1 where a bar is missed."""
    console, model = Console(), network(arguments)
    test = load("cifar10", split="train" if arguments.held_out else "test")

    def score(model: nn.Module, seed: int) -> float:
        if arguments.held_out:
            return accuracy(model, test.images[split(seed)[1]], test.labels[split(seed)[1]])
        return accuracy(model, test.images, test.labels)

    dense = statistics.mean(score(model, seed) for seed in (seeds if arguments.held_out else seeds[:1]))
    results: dict[str, list[float]] = {"dense": [dense]}
    for seed in track(seeds, arguments.network, console=console, transient=True):
        data = calibration(seed, images=arguments.images, batch=arguments.batch)
        analysis = analysed(model, data)
        for share in shares:
            small = compressed(model, data, share, analysis=analysis)
            results.setdefault(f"{share:g}", []).append(score(small.model, seed))
            results.setdefault(f"{share:g} kept", []).append(small.measurement.macs_ratio or 1.0)
            if arguments.train:
                after = score(trained(small.model, model, arguments.train, share=share, seed=seed), seed)
                results.setdefault(f"{share:g} trained", []).append(after)
            said = (results[key][-1] for key in (f"{share:g}", f"{share:g} trained") if key in results)
            console.print(f"seed {seed}, {share:g}:", *(f"{figure:.2f}" for figure in said))
    table = Table("MACs kept", "accuracy", "sd", "best peer", "bar", "held", arguments.train or "", "sd", "bar", "held")
    held = True
    for share in shares:
        bar = BAR[arguments.network].get(share)
        bar = dense + bar if bar is not None and bar < 0 else bar
        after = results.get(f"{share:g} trained")
        cells = figures(results[f"{share:g}"], bar)
        cells += figures(after, TRAINED[arguments.train].get(share)) if after else [""] * 4
        peer = f"{PEER[share]:g}" if share in PEER and arguments.network == "resnet20" else ""
        table.add_row(f"{max(results[f'{share:g} kept']):.4f}", *cells[:2], peer, *cells[2:])
        held &= "no" not in cells
    console.print(f"{arguments.network}: dense {dense:.2f}, seeds {seeds}, {arguments.images} images, no labels")
    console.print(table)
    if arguments.images == IMAGES:
        seconds, memory = cost(arguments, 0.5)
        console.print(
            f"to half of the MACs: {seconds:.1f} s on {torch.get_num_threads()} threads, peak {memory:.2f} GB"
        )
        results |= {"seconds": [seconds], "memory": [memory]}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    sys.exit(not held)


def figures(values: list[float], bar: float | None) -> list[str]:
    """Mean, spread, bar, and whether it is held."""
    mean = statistics.mean(values)
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return [
        f"{mean:.2f}",
        spread,
        "" if bar is None else f"{bar:.2f}",
        "" if bar is None else ("yes", "no")[mean < bar],
    ]


if __name__ == "__main__":
    main()
