"""The data of a command as the network takes them: a data set by name, files of one's own, or loaders of a function."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.benchmark.measurement import resized
from spectrim.cli.options import Source
from spectrim.core.batches import batches_of, split_labels
from spectrim.core.errors import DataError
from spectrim.core.execution import Inputs
from spectrim.data.samples import ImageFiles, Part, Samples

_TOKENS = 4096


@dataclass(frozen=True)
class Preparation:
    """From samples to inputs: uint8 pixels become (pixel / 255 - mean) / std, and floats (x - mean) / std.

    Other whole numbers, such as tokens, stay as they are.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flatten: bool = False

    def __call__(self, samples: Tensor) -> Tensor:
        """Float32 of the same shape, or (batch, C * H * W)."""
        if samples.dtype == torch.uint8 or samples.is_floating_point():
            mean, std = (torch.tensor(values) for values in (self.mean, self.std))
            if samples.ndim == 4:
                mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
            samples = ((samples / 255 if samples.dtype == torch.uint8 else samples) - mean) / std
        return samples.flatten(1) if self.flatten else samples

    def formula(self, *, pixels: bool) -> str:
        """From a pixel, or a number x, to the input."""
        if self.mean == (0.0,) and self.std == (1.0,):
            return "pixel / 255" if pixels else "as they are"
        return f"({'pixel / 255' if pixels else 'x'} - {listed(self.mean)}) / {listed(self.std)}"

    @property
    def options(self) -> str:
        """As options of the command line."""
        return f"--mean {listed(self.mean)} --std {listed(self.std)}"


@dataclass(frozen=True, eq=False)
class Batches:
    """Samples in batches, (batch, ..), prepared as they are asked for; pairs with their labels where there are some.

    With a `seed` they are shuffled, and a short last batch is left out.
    """

    samples: Samples
    indices: Tensor
    prepare: Preparation
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        batches = len(self.indices) / self.size
        return math.ceil(batches) if self.seed is None else max(1, math.floor(batches))

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        indices = self.indices
        if self.seed is not None:
            indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.seed))]
        for part in indices.split(self.size)[: len(self)]:
            inputs, labels = self.prepare(self.samples.inputs[part]), self.samples.labels
            yield inputs if labels is None else (inputs, labels[part])


@dataclass(frozen=True, eq=False)
class StoredData:
    """Samples that can be asked for by their number.

    `prepare` turns them into the network's inputs; `load` gives a split.
    """

    source: Source
    prepare: Preparation
    train: Samples
    load: Callable[[Part], Samples]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.train.name

    @property
    def classes(self) -> int | None:
        """How many classes there are; 0 where labels are no class indices."""
        return len(self.train.classes)

    @property
    def is_open(self) -> bool:
        """Whether there may be more classes than the labels show."""
        return self.name.endswith(".npz")

    @property
    def is_pixels(self) -> bool:
        """Whether samples are images of uint8."""
        inputs = self.train.inputs
        return isinstance(inputs, ImageFiles) or inputs.dtype == torch.uint8

    @property
    def noun(self) -> str:
        """What the samples are called."""
        return "images" if self.is_pixels else "samples"

    @property
    def channels(self) -> int:
        """Those of images (C, H, W); of other samples, the size of the last dimension."""
        inputs = self.train.inputs
        shape = inputs.shape if isinstance(inputs, ImageFiles) else tuple(inputs.shape[1:])
        return shape[0] if len(shape) == 3 else shape[-1]

    @property
    def checksum(self) -> str:
        """What tells these data from others."""
        return self.train.checksum

    @property
    def batch(self) -> int:
        """Samples at a time: of a text no more than 4096 tokens, since each has scores of all words."""
        inputs = self.train.inputs
        is_text = isinstance(inputs, Tensor) and self.name.startswith("text:")
        return min(self.source.batch, max(1, _TOKENS // inputs.shape[1])) if is_text else self.source.batch

    @cached_property
    def order(self) -> Tensor:
        """The training samples in the order that the seed draws."""
        return torch.randperm(len(self.train.inputs), generator=torch.Generator().manual_seed(self.source.seed))

    @cached_property
    def example(self) -> Inputs:
        """One input."""
        return Inputs((self.prepare(self.train.inputs[self.order[:1]]),), {})

    @cached_property
    def calibration(self) -> tuple[Inputs, ...]:
        """The calibration batches: the first samples of the order."""
        batches = Batches(self.train, self.order[: self.source.images], self.prepare, self.batch)
        return tuple(Inputs((batch if isinstance(batch, Tensor) else batch[0],), {}) for batch in batches)

    def first(self, samples: int, prepare: Preparation | None = None) -> Batches:
        """The first samples of the order, in another preparation if need be."""
        return Batches(self.train, self.order[:samples], prepare or self.prepare, self.source.batch)

    @cached_property
    def tests(self) -> Batches:
        """The test split."""
        return self.split("test")

    def split(self, part: Part) -> Batches:
        """All samples of a part, in order."""
        samples = self.load(part)
        return Batches(samples, torch.arange(len(samples.inputs)), self.prepare, self.batch)

    def held_out(self, samples: int | None) -> Batches:
        """So many training samples, by default a tenth and at most 5000, that `training` leaves out."""
        return Batches(self.train, self.order[: self._held_out(samples)], self.prepare, max(256, self.source.batch))

    def training(self, epoch: int, *, held_out: int | None) -> Batches:
        """The others, in the order of an epoch."""
        places, seed = self.order[self._held_out(held_out) :], self.source.seed * 1_000_003 + epoch
        return Batches(self.train, places, self.prepare, self.source.batch, seed)

    def _held_out(self, samples: int | None) -> int:
        total = len(self.order)
        samples = min(5000, math.ceil(total / 10)) if samples is None else samples
        if samples >= total:
            raise DataError(f"{self.name} has {total} training samples; --held-out {samples} leaves none to train on")
        return samples


@dataclass(frozen=True, eq=False)
class LoaderData:
    """Batches of a user's function, as the network takes them: `train`, and perhaps `valid` and `test`."""

    source: Source
    name: str
    loaders: Mapping[str, Iterable[Any]]
    model: nn.Module

    noun = "samples"
    classes = None

    @property
    def checksum(self) -> str:
        """The function's name; what it does may change."""
        return self.name

    @cached_property
    def example(self) -> Inputs:
        """The first sample of the first batch, or the whole batch where that cannot be cut."""
        batches = self.first(1)
        if not batches:
            raise DataError(f"{self.name}: the training data is empty; give at least one batch")
        first = split_labels(batches[0], position=0, model=self.model, required=False)[0]
        try:
            return resized(first, 1)
        except DataError:
            return first

    @cached_property
    def calibration(self) -> tuple[Inputs, ...]:
        """The first batches, of as many samples as `--images` says."""
        batches = enumerate(self.first(self.source.images))
        return tuple(split_labels(batch, position=at, model=self.model, required=False)[0] for at, batch in batches)

    def first(self, samples: int) -> list[Any]:
        """The first training batches, of at least so many samples."""
        batches = []
        for position, batch in enumerate(batches_of(self.loaders["train"], what="the training data")):
            batches.append(batch)
            samples -= split_labels(batch, position=position, model=self.model, required=False)[0].samples
            if samples <= 0:
                break
        return batches

    @property
    def tests(self) -> Iterable[Any] | None:
        """The test batches, if there are some."""
        return self.loaders.get("test")

    def held_out(self, samples: int | None) -> Iterable[Any]:
        """The batches for validation; `samples` cannot be chosen.

        Raises:
            DataError: there are none, or so many are asked for.
        """
        if samples is not None or "valid" not in self.loaders:
            raise DataError(
                f"{self.name}: fine-tuning looks at data that it does not train on, which your function chooses (leave "
                'out --held-out): return {"train": .., "valid": .., "test": ..}'
            )
        return self.loaders["valid"]

    def training(self, epoch: int, *, held_out: int | None) -> Iterable[Any]:
        """The training batches, iterated anew in each epoch."""
        _ = epoch, held_out
        return self.loaders["train"]


Data = StoredData | LoaderData


def listed(values: Iterable[float]) -> str:
    """With commas between them, as options take them."""
    return ",".join(f"{value:g}" for value in values)
