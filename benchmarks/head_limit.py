"""What a classifier of low rank can give on a frozen backbone, and what bounds it.

    python benchmarks/head_limit.py runs/resnet18-cifar10              # the folder of a run of the recipe
    python benchmarks/head_limit.py runs/resnet18-cifar10 --ranks 5,6,7,8,9

The recipe tunes the factors of the classifier on 10 000 training images. Here nothing is saved: the divergence of their
answers from those of the dense classifier is minimised over *every* training image, by 600 steps of L-BFGS, from the
directions in which the logits vary most and from random ones; the best on the training images is kept. That all starts
end alike says that what remains is due to the rank. Every seed of the run is asked. The last column is the standard
deviation of the points lost: of one network from the images on which the two answer differently, of their mean from
network to network.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.recipes import ClassifierStudy, read_recipe
from spectrim.recipes.heads import Features
from spectrim.recipes.images import Images, Part
from spectrim.recipes.run import images_of

STARTS, STEPS = 4, 600


@dataclass(frozen=True, eq=False)
class Head:
    """A classifier of low rank on features (N, F): z = (x down^T) up^T + bias, logits (N, C)."""

    up: Tensor
    down: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, C)."""
        return features @ self.down.T @ self.up.T + self.bias


def begun(layer: nn.Linear, features: Tensor, basis: Tensor) -> Head:
    """The dense classifier on the span of `basis` (C, r) alone; exact for the mean of the features."""
    weight, mean = layer.weight.detach(), features.mean(0)
    # a number added to every logit changes no probability: no rank is spent on it
    down = basis.T @ (weight - weight.mean(0))
    return Head(basis.contiguous(), down.contiguous(), layer(mean).detach() - basis @ (down @ mean))


def bases(layer: nn.Linear, features: Tensor, rank: int) -> list[Tensor]:
    """The directions (C, r) in which the logits vary most, and random ones."""
    logits = layer(features).detach()
    _, _, right = torch.linalg.svd(logits - logits.mean(1, keepdim=True), full_matrices=False)
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randn(logits.shape[1], rank, generator=draw) for _ in range(STARTS - 1))
    return [right[:rank].T, *(torch.linalg.qr(one).Q for one in drawn)]


def divergence(answer: Tensor, taught: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the dense classifier's probabilities, in nats an image."""
    log = functional.log_softmax
    return functional.kl_div(log(answer, 1), log(taught, 1), reduction="batchmean", log_target=True)


def fitted(head: Head, features: Tensor, taught: Tensor) -> tuple[float, Head]:
    """The divergence that is left, and the factors."""
    parts = [nn.Parameter(one.clone()) for one in (head.up, head.down, head.bias)]
    search = torch.optim.LBFGS(parts, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        left = divergence(Head(*parts)(features), taught)
        left.backward()
        return left

    search.step(loss)
    best = Head(*(one.detach() for one in parts))
    return float(divergence(best(features), taught)), best


def features_of(model: nn.Module, layer: str, part: Part) -> tuple[Tensor, Tensor]:
    """What the classifier receives (N, F), and the labels (N,)."""
    seen = Features.of(model, layer, train=part, held_out=part.some(1, seed=0))
    return seen.train, seen.labels


@dataclass(frozen=True)
class Limit:
    """The best classifier of one rank on one network, on one part of the images; accuracies in [0, 1]."""

    rank: int
    part: str
    seed: int
    left: float
    worst: float
    agreement: float
    dense: float
    lost: float
    sd: float


def limits(study: ClassifierStudy, images: Images, file: Path, seed: int, ranks: list[int]) -> Iterator[Limit]:
    """Every rank on the dense network of one seed."""
    model = st.load(file, study.network(images)).eval()
    layer = model.get_submodule(study.classifier)
    assert isinstance(layer, nn.Linear)
    x, _ = features_of(model, study.classifier, images.train)
    parts = {"held-out": images.held_out, "test": images.test}
    asked = {name: features_of(model, study.classifier, part) for name, part in parts.items()}
    taught = layer(x).detach()
    for rank in ranks:
        tried = [fitted(begun(layer, x, one), x, taught) for one in bases(layer, x, rank)]
        left, head = min(tried, key=lambda one: one[0])
        for name, (features, labels) in asked.items():
            answer, dense = head(features).argmax(1), layer(features).detach().argmax(1)
            right, dense_right = ((one == labels).double() for one in (answer, dense))
            lost = dense_right - right
            yield Limit(
                rank,
                name,
                seed,
                left,
                max(one for one, _ in tried),
                float((answer == dense).double().mean()),
                float(dense_right.mean()),
                float(lost.mean()),
                float(lost.std()) / math.sqrt(len(lost)),
            )


def shown(found: list[Limit]) -> Table:
    """A row a network, and where there are several the mean of what they lose, with the deviation between them."""
    table = Table("rank", "images", "seed", "KL, training", "at worst", "agree (%)", "dense", "points lost", "sd")
    for (rank, part), some in groupby(sorted(found, key=attrgetter("rank", "part")), key=attrgetter("rank", "part")):
        same = list(some)
        for one in same:
            points = (f"{100 * value:.2f}" for value in (one.agreement, one.dense, one.lost, one.sd))
            table.add_row(str(rank), part, str(one.seed), f"{one.left:.4f}", f"{one.worst:.4f}", *points)
        if len(same) > 1:
            lost = [100 * one.lost for one in same]
            table.add_row(str(rank), part, "mean", *[""] * 4, f"{mean(lost):.2f}", f"{stdev(lost):.2f}")
    return table


def main() -> None:
    """Every rank on the dense network of every seed, on held-out training images and on the test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of a recipe of the kind classifier")
    parser.add_argument("--ranks", default="5", help="such as 2,5,9")
    given = parser.parse_args()
    console, study = Console(width=120, highlight=False), read_recipe(given.run / "recipe.toml")
    if not isinstance(study, ClassifierStudy):
        parser.error(f"{given.run} holds a run of the kind {study.kind}, not classifier")
    images, ranks = images_of(study), [int(one) for one in given.ranks.split(",")]
    found: list[Limit] = []
    for seed in track(study.seeds, "networks", console=console, transient=True):
        file = given.run / "models" / f"seed{seed}" / "dense.safetensors"
        found += limits(study, images, file, seed, ranks)
    console.print(shown(found))


if __name__ == "__main__":
    main()
