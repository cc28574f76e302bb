"""What a classifier of low rank can give on a frozen backbone, and what bounds it.

    python benchmarks/head_limit.py runs/resnet18-cifar10              # the folder of a run of the recipe
    python benchmarks/head_limit.py runs/resnet18-cifar10 --ranks 5,6,7,8,9

The recipe tunes the factors of the classifier on 10 000 training images. Here nothing is saved: the divergence of their
answers from those of the dense classifier is minimised over *every* training image, by 600 steps of L-BFGS, from the
directions in which the logits vary most and from random ones; the best on the training images is kept. That all starts
end alike says that what remains is due to the rank. Most of the time goes into the features of all images, some minutes
of one core. The last column is the standard deviation of the difference to dense, from the images on which
the two answer differently.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.recipes import ClassifierStudy, read_recipe
from spectrim.recipes.heads import Features
from spectrim.recipes.images import Part
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


def main() -> None:
    """Every rank, on held-out training images and on the test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of a recipe of the kind classifier")
    parser.add_argument("--ranks", default="5", help="such as 2,5,9")
    given = parser.parse_args()
    console, study = Console(width=120, highlight=False), read_recipe(given.run / "recipe.toml")
    if not isinstance(study, ClassifierStudy):
        parser.error(f"{given.run} holds a run of the kind {study.kind}, not classifier")
    images = images_of(study)
    file = given.run / "models" / f"seed{study.seeds[0]}" / "dense.safetensors"
    model = st.load(file, study.network(images)).eval()
    layer = model.get_submodule(study.classifier)
    assert isinstance(layer, nn.Linear)
    console.print(f"features of {len(images.train):,} training images, {len(images.held_out):,} held out, the test set")
    x, _ = features_of(model, study.classifier, images.train)
    asked = {
        name: features_of(model, study.classifier, part)
        for name, part in (("held-out", images.held_out), ("test", images.test))
    }
    taught = layer(x).detach()
    table = Table("rank", "KL, training", "images", "KL", "agree (%)", "accuracy", "dense", "points lost", "sd")
    for rank in (int(one) for one in given.ranks.split(",")):
        starts = bases(layer, x, rank)
        tried = [
            fitted(begun(layer, x, one), x, taught)
            for one in track(starts, f"rank {rank}", console=console, transient=True)
        ]
        left, head = min(tried, key=lambda one: one[0])
        for name, (features, labels) in asked.items():
            answer, dense = head(features), layer(features).detach()
            right, dense_right = ((one.argmax(1) == labels).double() for one in (answer, dense))
            lost = dense_right - right
            table.add_row(
                str(rank),
                f"{left:.4f} ({max(one for one, _ in tried):.4f} at worst)",
                name,
                f"{float(divergence(answer, dense)):.4f}",
                f"{100 * float((answer.argmax(1) == dense.argmax(1)).double().mean()):.2f}",
                *(f"{100 * float(one.mean()):.2f}" for one in (right, dense_right)),
                f"{100 * float(lost.mean()):.2f}",
                f"{100 * float(lost.std()) / math.sqrt(len(lost)):.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
