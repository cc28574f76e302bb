"""What the commands work on: a network, one input, and the images of a data set as the network takes them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spectrim import data
from spectrim.cli.options import Source, numbers
from spectrim.cli.stages import Stages
from spectrim.core.errors import DataError
from spectrim.core.execution import as_inputs, call, evaluating
from spectrim.layers.replacement import duplicate
from spectrim.layers.saving import load
from spectrim.models import CIFAR_MEAN, CIFAR_STD, resolve
from spectrim.models.weights import fill_, read_state


@dataclass(frozen=True)
class Preparation:
    """From pixels, uint8 (batch, C, H, W), to what the network takes: (pixel / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flatten: bool

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 of the same shape, or (batch, C * H * W)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        ready = (pixels / 255 - mean) / std
        return ready.flatten(1) if self.flatten else ready

    def __str__(self) -> str:
        plain = self.mean == (0.0,) and self.std == (1.0,)
        return "pixel / 255" if plain else f"(pixel / 255 - {_listed(self.mean)}) / {_listed(self.std)}"


@dataclass(frozen=True, eq=False)
class Images:
    """A data set, obtained: calibration batches from its training split, and how to come by its test split."""

    info: data.DatasetInfo
    folder: Path | None
    prepare: Preparation
    calibration: tuple[Tensor, ...]
    size: int

    def tests(self) -> "Labelled":
        """The test split."""
        split = data.load(self.info.name, split="test", folder=self.folder)
        return Labelled(split, self.prepare, self.size)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled test batches, prepared as they are asked for."""

    split: data.Dataset
    prepare: Preparation
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = zip(self.split.images.split(self.size), self.split.labels.split(self.size), strict=True)
        return ((self.prepare(images), labels) for images, labels in parts)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in evaluation mode, one input, what it answers to that, and its images if there is data."""

    model: nn.Module
    example: Tensor
    answer: object
    images: Images | None

    @property
    def calibration(self) -> tuple[Tensor, ...] | None:
        """The calibration batches, if there is data."""
        return self.images.calibration if self.images else None

    def untestable(self) -> str | None:
        """Why there is no accuracy to be had, or None."""
        if self.images is None:
            return "there is no --data"
        classes = len(self.images.info.classes)
        shape = tuple(self.answer.shape) if isinstance(self.answer, Tensor) else None
        if shape == (1, classes):
            return None
        gives = f"outputs {list(shape)}" if shape else f"a {type(self.answer).__name__}"
        return f"{self.images.info.name} has {classes} classes, and for one image the network gives {gives}"


def subject(source: Source, shown: Stages, *, filled_later: bool = False) -> Subject:
    """Make the network and obtain the images; mistakes that need neither are found first.

    Args:
        source: What was asked for.
        shown: Told of both.
        filled_later: The network gets its weights from the caller; nothing is said of their absence.

    Raises:
        SpectrimError: the network or the images are not to be had, or do not fit together.
    """
    info = _dataset(source)
    shape = _shape(source, info)
    prepare = _preparation(source, info)
    options = source.options
    images = _images(source, info, prepare, shown) if info else None
    shown.begin(f"load {source.model}")
    if source.runs_code:
        shown.console.print(f"--model {source.model} runs the code of that module", markup=False, soft_wrap=True)
    elif source.weights is None and not filled_later:
        shown.console.print("without --weights this network is untrained", markup=False, soft_wrap=True)
    model = resolve(source.model, weights=source.weights, options=options).eval()
    example = images.calibration[0][:1] if images else torch.zeros(1, *shape)
    if source.flatten:
        example = example.flatten(1)
    hint = " Does the network want other images or shapes? See --data, --input, --flatten and --option."
    with evaluating(model):
        answer = call(model, as_inputs(example), what="one image" if images else "--input", hint=hint)
    return Subject(model, example, answer, images)


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
    if info is not None and source.input is not None:
        raise typer.BadParameter(
            f"--data and --input are one too many: images of {info.name} are {_listed(info.shape)}"
        )
    if info is not None:
        return info.shape
    if source.input is None:
        raise typer.BadParameter("give --data, or the shape of one input, such as --input 3,32,32")
    if source.mean is not None or source.std is not None or source.data_folder is not None:
        raise typer.BadParameter("--mean, --std and --data-folder go with --data")
    return tuple(int(size) for size in numbers(source.input, option="--input", whole=True))


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


def _images(source: Source, info: data.DatasetInfo, prepare: Preparation, shown: Stages) -> Images:
    """The images drawn by the seed; a data set that is not there yet is obtained."""
    shown.begin(f"load {info.name}")
    if data.locate(info.name) is None:
        data.obtain(
            info.name, folder=source.data_folder, on_event=lambda event: shown.say(f"{info.name}: {event.text}")
        )
    train = data.load(info.name, split="train", folder=source.data_folder)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(source.seed))
    drawn = train.images[order[: source.images]].split(source.batch)
    return Images(info, source.data_folder, prepare, tuple(prepare(part) for part in drawn), source.batch)


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def filled(blank: nn.Module, path: Path) -> nn.Module:
    """A copy of the network with the weights of a file that `spectrim.save` wrote, or of a plain one."""
    if path.is_dir() or _is_ours(path):
        return load(path, blank).eval()
    model = duplicate(blank)
    fill_(model, read_state(path), origin=path)
    return model.eval()


def _is_ours(path: Path) -> bool:
    if path.suffix.lower() != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            return "spectrim" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False  # and reading it will say why
