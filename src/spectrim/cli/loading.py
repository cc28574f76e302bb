"""What the commands work on: a network, one input, and the images of a data set as the network takes them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

from spectrim import data
from spectrim.benchmark.measurement import Measurement, measure
from spectrim.cli.commands import MODEL
from spectrim.cli.options import Source, numbers
from spectrim.cli.stages import Stages
from spectrim.core.errors import DataError
from spectrim.core.execution import as_inputs, call, evaluating
from spectrim.layers.saving import load
from spectrim.models import CIFAR_MEAN, CIFAR_STD, resolve
from spectrim.models.weights import is_saved


@dataclass(frozen=True)
class Preparation:
    """From pixels, uint8 (batch, C, H, W), to what the network takes: (pixel / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flatten: bool

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 of the same shape, or (batch, C * H * W)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        normalised = (pixels / 255 - mean) / std
        return normalised.flatten(1) if self.flatten else normalised

    def __str__(self) -> str:
        plain = self.mean == (0.0,) and self.std == (1.0,)
        return "pixel / 255" if plain else f"(pixel / 255 - {_listed(self.mean)}) / {_listed(self.std)}"


@dataclass(frozen=True, eq=False)
class Batches:
    """Labelled images in batches of float32 (batch, ..) and int64 (batch,), prepared as they are asked for.

    With a `seed` they are shuffled, and a short last batch is left out.
    """

    split: data.Dataset
    indices: Tensor
    prepare: Preparation
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(len(self.indices) / self.size)
        return max(1, len(self.indices) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        indices = self.indices
        if self.seed is not None:
            indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.seed))]
        for part in indices.split(self.size)[: len(self)]:
            yield self.prepare(self.split.images[part]), self.split.labels[part]


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as the options ask for it, obtained.

    `prepare` turns its pixels into the network's inputs; `order` has the indices of all training images, drawn by the
    seed.
    """

    info: data.DatasetInfo
    source: Source
    prepare: Preparation
    train: data.Dataset
    order: Tensor

    @cached_property
    def calibration(self) -> tuple[Tensor, ...]:
        """The calibration batches: the first images of the order."""
        batches = Batches(self.train, self.order[: self.source.images], self.prepare, self.source.batch)
        return tuple(images for images, _ in batches)

    def tests(self) -> Batches:
        """The test split."""
        split = data.load(self.info.name, split="test", folder=self.source.data_folder)
        return Batches(split, torch.arange(len(split)), self.prepare, self.source.batch)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network in evaluation mode, one input, the network's output for that, and its images if there is data."""

    model: nn.Module
    example: Tensor
    output: object
    images: Images | None

    @property
    def calibration(self) -> tuple[Tensor, ...] | None:
        """The calibration batches, if there is data."""
        return self.images.calibration if self.images else None

    def why_untested(self, *, asked: bool | None = None) -> str | None:
        """Why no accuracy is measured, or None if it is. Raises `BadParameter` if one is asked for all the same."""
        if asked is False:
            return "--no-test"
        reason: str | None = "there is no --data"
        if self.images:
            info, shape = self.images.info, list(getattr(self.output, "shape", ()))
            gives = f"outputs {shape}" if shape else f"a {type(self.output).__name__}"
            reason = f"{info.name} has {len(info.classes)} classes, and for one image the network gives {gives}"
            reason = None if shape == [1, len(info.classes)] else reason
        if asked and reason is not None:
            raise typer.BadParameter(f"--test: {reason}")
        return reason

    def measured(
        self, network: nn.Module, name: str, *, progress: Stages, tested: bool, dense: nn.Module | None = None
    ) -> Measurement:
        """What a network costs, in relation to `dense` if given, with its accuracy on the test images if `tested`."""
        tests = self.images.tests() if tested and self.images else None
        if tests is not None:
            progress.begin(f"test the {name}", total=len(tests))
        batches = None if tests is None else progress.each(tests)
        return measure(network, self.example, reference=dense, data=batches, latency=False)


def load_source(source: Source, progress: Stages) -> Loaded:
    """Make the network and obtain the images; mistakes that need neither are reported first.

    Raises a `SpectrimError` where they cannot be had or do not fit together.
    """
    info = _dataset(source)
    shape = _shape(source, info)
    prepare = _preparation(source, info)
    _ = source.options
    progress.begin(f"load {source.model}")
    if source.model.partition(":")[0] not in ("spectrim", "torchvision", "timm"):
        progress.say(f"--model {source.model} runs the code of that module")
    elif source.weights is None:
        progress.say("without --weights this network is untrained")
    model = load_network(source, source.weights)  # before the images, since weights of another kind are refused at once
    images = _images(source, info, prepare=prepare, progress=progress) if info else None
    example = images.prepare(images.train.images[images.order[:1]]) if images else torch.zeros(1, *shape)
    if source.flatten:
        example = example.flatten(1)
    hint = " Does the network want other images or shapes? See --data, --input, --flatten and --option."
    with evaluating(model):
        output = call(model, as_inputs(example), what="one image" if images else "--input", hint=hint)
    return Loaded(model, example, output, images)


def load_network(source: Source, weights: Path | None) -> nn.Module:
    """The network with the weights of a file that `spectrim.save` wrote, or of a plain one; in evaluation mode."""
    if weights is not None and weights.is_dir():
        weights = weights / MODEL
    if weights is not None and is_saved(weights):
        return load(weights, resolve(source.model, options=source.options)).eval()
    return resolve(source.model, weights=weights, options=source.options).eval()


def _dataset(source: Source) -> data.DatasetInfo | None:
    if source.data is None:
        return None
    names = {info.name: info for info in data.available()}
    if source.data not in names and Path(source.data).is_dir():
        raise DataError(
            f"--data {source.data} is a folder; name the data set ({', '.join(names)}) and give --data-folder"
        )
    data.locate(source.data)  # knows near names of an unknown one
    return names[source.data]


def _shape(source: Source, info: data.DatasetInfo | None) -> tuple[int, ...]:
    if info is None:
        if source.mean is not None or source.std is not None or source.data_folder is not None:
            raise typer.BadParameter("--mean, --std and --data-folder go with --data")
        return source.shape
    if source.input is not None:
        raise typer.BadParameter(f"give --data or --input, not both: images of {info.name} are {_listed(info.shape)}")
    return info.shape


def _preparation(source: Source, info: data.DatasetInfo | None) -> Preparation:
    if (source.mean is None) != (source.std is None):
        raise typer.BadParameter("give both --mean and --std, or neither")
    if source.mean is None or source.std is None:
        if info is not None and info.name == "cifar10":
            return Preparation(CIFAR_MEAN, CIFAR_STD, flatten=source.flatten)
        return Preparation((0.0,), (1.0,), flatten=source.flatten)
    mean, std = numbers(source.mean, option="--mean"), numbers(source.std, option="--std")
    channels = info.shape[0] if info else 1
    if {len(mean), len(std)} - {1, channels} or min(std) <= 0:
        count = "one value" if channels == 1 else f"one value or {channels}"
        raise typer.BadParameter(f"--mean and --std take {count}, and no deviation is 0 or below")
    return Preparation(mean, std, flatten=source.flatten)


def _images(source: Source, info: data.DatasetInfo, *, prepare: Preparation, progress: Stages) -> Images:
    """The images in the order drawn by the seed; a data set that is not there yet is obtained."""
    progress.begin(f"load {info.name}")
    if data.locate(info.name) is None:
        data.obtain(
            info.name,
            folder=source.data_folder,
            on_event=lambda event: progress.update(detail=f"{info.name}: {event.text}"),
        )
    train = data.load(info.name, split="train", folder=source.data_folder)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(source.seed))
    return Images(info, source, prepare, train, order)


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
