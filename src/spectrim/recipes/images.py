"""Images in memory, split and normalised once, and their minibatches in a repeatable order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectrim.data import Dataset, load
from spectrim.errors import DataError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """Normalised images (N, C, H, W) float32 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 1000) -> list[Batch]:
        """All of it in order, for calibration and accuracy."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as a study uses it: choices are made on `held_out` (from the training set), reports on `test`."""

    train: Part
    held_out: Part
    test: Part
    classes: int
    source: str
    checksum: str


def load_images(name: str, *, held_out: int, limit: int | None = None, folder: Path | None = None) -> Images:
    """Load a data set, set `held_out` training images aside, and normalise by the training images' mean and deviation.

    Args:
        name: As `spectrim.data` knows it.
        held_out: How many training images never to train on; the same ones every time.
        limit: Use at most so many of the rest, and of the test images, for a quick look.
        folder: Where the files lie, if the user has them.

    Raises:
        DataError: unknown or unobtainable data, or too few images.
    """
    train, test = load(name, split="train", folder=folder), load(name, split="test", folder=folder)
    if held_out >= len(train):
        raise DataError(f"{name} has {len(train)} training images; {held_out} cannot be held out of them")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    kept, aside = order[held_out:][:limit], order[:held_out]
    pixels = train.images[kept].float()
    mean, deviation = pixels.mean(), pixels.std()

    def part(dataset: Dataset, index: Tensor) -> Part:
        return Part((dataset.images[index].float() - mean) / deviation, dataset.labels[index])

    tested = torch.arange(len(test))[:limit]
    return Images(
        train=part(train, kept),
        held_out=part(train, aside),
        test=part(test, tested),
        classes=len(train.classes),
        source=train.source,
        checksum=f"train {train.checksum[:16]}, test {test.checksum[:16]}",
    )


@dataclass(frozen=True, eq=False)
class Minibatches:
    """One epoch of (inputs, targets) in an order that only the seed and the epoch decide; a short rest is left out."""

    inputs: Tensor
    targets: Tensor
    size: int
    seed: int
    epoch: int

    def __len__(self) -> int:
        return max(1, len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.inputs), generator=generator)
        for index in order.split(self.size)[: len(self)]:
            yield self.inputs[index], self.targets[index]
