"""Images in memory, split and normalised once, and their minibatches in a repeatable order."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.errors import DataError
from spectrim.core.execution import evaluating
from spectrim.core.files import Frozen
from spectrim.data import Dataset, load

Batch = tuple[Tensor, Tensor]


class Augment(Frozen):
    """How training images are varied, anew in every epoch.

    With `flips` half of them are mirrored, left to right. Each is moved by up to `shift` pixels in both directions; its
    edge is repeated.
    """

    flips: bool = False
    shift: int = Field(default=0, ge=0)

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Varied copies of images (N, C, H, W); what is drawn comes from `generator` alone."""
        if self.flips:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if not self.shift:
            return images
        number, _, height, width = images.shape
        padded = functional.pad(images, [self.shift] * 4, mode="replicate")
        down, right = torch.randint(0, 2 * self.shift + 1, (2, number, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        index = torch.arange(number)[:, None, None]
        # the indexed dimensions come first: (N, H, W, C)
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class Split:
    """Normalised images (N, C, H, W) float32 and labels (N,) int64; networks see them at `size` pixels, if given."""

    images: Tensor
    labels: Tensor
    size: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 1000) -> list[Batch]:
        """All of it in order, for calibration and accuracy."""
        pairs = zip(self.images.split(size), self.labels.split(size), strict=True)
        return [(resized(images, self.size), labels) for images, labels in pairs]

    def example(self, number: int = 1) -> Tensor:
        """The first few images, as a network sees them."""
        return resized(self.images[:number], self.size)

    def logits(self, model: nn.Module) -> Tensor:
        """The model's outputs (N, classes) for all of them."""
        with evaluating(model):
            return torch.cat([model(images) for images, _ in self.batches()])

    def sample(self, number: int, *, seed: int) -> "Split":
        """At most so many of them, chosen by the seed."""
        index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:number]
        return Split(self.images[index], self.labels[index], self.size)


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as a study uses it: choices are made on `held_out` (from the training set), reports on `test`.

    `held_out` are training images set aside; `test` is looked at once, at the end. `names` are those of the classes,
    `source` is where the data came from, `checksums` are those of the training and the test split. Images were
    normalised by `mean` and `deviation`, in [0, 255]; a scalar, or (C, 1, 1).
    """

    train: Split
    held_out: Split
    test: Split
    names: tuple[str, ...]
    source: str
    checksums: tuple[str, str]
    mean: Tensor
    deviation: Tensor

    @property
    def checksum(self) -> str:
        """Those of the training and the test split, sha256 of all their bytes."""
        return f"train {self.checksums[0]}, test {self.checksums[1]}"


def load_images(
    name: str, *, held_out: int, limit: int | None = None, size: int | None = None, folder: Path | None = None
) -> Images:
    """Load a data set, set `held_out` training images aside, and normalise by the training images' mean and deviation.

    The images held out are the same every time. At most `limit` of the others, and of the test images, are taken.
    Networks see them at `size` pixels; None leaves them. In `folder` lie the files, if the user has them.

    Raises `DataError` for unknown or unobtainable data, or too few images.
    """
    train, test = load(name, split="train", folder=folder), load(name, split="test", folder=folder)
    if held_out >= len(train):
        raise DataError(f"{name} has {len(train)} training images; {held_out} cannot be held out of them")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    training = order[held_out:][:limit]
    pixels = train.images[training].float()
    if pixels.shape[1] == 1:
        mean, deviation = pixels.mean(), pixels.std()
    else:  # of each colour
        mean, deviation = (moment(dim=(0, 2, 3))[:, None, None] for moment in (pixels.mean, pixels.std))

    def normalised(dataset: Dataset, index: Tensor) -> Split:
        return Split((dataset.images[index].float() - mean) / deviation, dataset.labels[index], size)

    return Images(
        train=normalised(train, training),
        held_out=normalised(train, order[:held_out]),
        test=normalised(test, torch.arange(len(test))[:limit]),
        names=tuple(train.classes),
        source=train.source,
        checksums=(train.checksum, test.checksum),
        mean=mean,
        deviation=deviation,
    )


def resized(images: Tensor, size: int | None) -> Tensor:
    """Images (N, C, H, W) at `size` x `size` pixels, by bilinear interpolation; as they are for None."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


@dataclass(frozen=True, eq=False)
class Minibatches:
    """One epoch of (inputs, targets) in an order that only the seed and the epoch decide; a short rest is left out.

    Inputs are images (N, C, H, W), or features of them (N, F), which no augmentation fits.
    """

    inputs: Tensor
    targets: Tensor
    size: int
    seed: int
    epoch: int
    augment: Augment = field(default_factory=Augment)
    pixels: int | None = None

    def __len__(self) -> int:
        return max(1, len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for index in torch.randperm(len(self.inputs), generator=generator).split(self.size)[: len(self)]:
            varied = resized(self.augment.apply(self.inputs[index], generator), self.pixels)
            if varied.ndim == 4:  # convolutions on a CPU train a fifth faster where colours lie side by side
                varied = varied.contiguous(memory_format=torch.channels_last)
            yield varied, self.targets[index]
