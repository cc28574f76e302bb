"""What `--data` names, checked before anything is read or run, and then loaded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from spectrim import data
from spectrim.cli.options import Source, numbers
from spectrim.cli.samples import LoaderData, Preparation, StoredData, listed
from spectrim.cli.signatures import flag
from spectrim.cli.stages import Stages
from spectrim.core.batches import require_batches
from spectrim.core.errors import DataError
from spectrim.data.samples import Part, Samples, load_arrays, load_folder, load_text
from spectrim.models import CIFAR_MEAN, CIFAR_STD
from spectrim.models.references import call_factory

_PREPARATION = ("mean", "std", "flatten", "resize")
"""Options that say how images become inputs."""

_OWN = "folder:PATH, FILE.npz, text:FILE, or pkg.module:factory"
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataReference:
    """What `--data` names, checked without reading it.

    `kind` is "name", "folder", "arrays", "text" or "loaders", and `name` the rest.
    """

    kind: str
    name: str
    info: data.DatasetInfo | None = None


def data_reference(source: Source) -> DataReference | None:
    """What `--data` names, with the options that belong to it.

    Raises `DataError` or `BadParameter` for what is not there, and for options that do not go together.
    """
    text = source.data
    if text is None:
        for option in ("mean", "std", "data_folder", "resize", "tokenizer", "expect"):
            if getattr(source, option) is not None:
                raise typer.BadParameter(f"{flag(option)} goes with --data")
        return None
    reference = _parsed(text)
    allowed = {"name": ("data_folder",), "folder": ("input", "resize"), "text": ("input", "tokenizer")}
    for option in ("data_folder", "input", "resize", "tokenizer"):
        if getattr(source, option) is not None and option not in allowed.get(reference.kind, ()):
            raise typer.BadParameter(f"{flag(option)} does not go with --data {text}{_why_not(option, reference)}")
    named = [option for option in _PREPARATION if getattr(source, option)]
    if reference.kind in ("loaders", "text") and named:
        raise typer.BadParameter(f"--{named[0]} does not go with --data {text}, whose inputs are taken as they are")
    if reference.kind == "text" and source.tokenizer is None and source.folder is None:
        raise typer.BadParameter(
            "--data text:FILE needs --tokenizer: the network's folder, its tokenizer.json, or bytes for a network that "
            "reads bytes"
        )
    return reference


def has_values(source: Source) -> bool:
    """Whether the labels may be values instead of classes."""
    reference = data_reference(source)
    return reference is not None and reference.kind in ("arrays", "loaders")


def preparation(source: Source, channels: int | None) -> Preparation:
    """As the options ask for it; CIFAR-10 has its own by default. `channels` are those of the images, if known."""
    if (source.mean is None) != (source.std is None):
        raise typer.BadParameter("give both --mean and --std, or neither")
    if source.mean is None or source.std is None:
        if source.data == "cifar10":
            return Preparation(CIFAR_MEAN, CIFAR_STD, source.flatten)
        return Preparation(flatten=source.flatten)
    mean, std = numbers(source.mean, option="--mean"), numbers(source.std, option="--std")
    if len({len(mean), len(std)} - {1, channels or max(len(mean), len(std))}) or min(std) <= 0:
        count = "one value" if channels == 1 else f"one value or {channels or 'one for each channel'}"
        raise typer.BadParameter(f"--mean and --std take {count}, and no deviation is 0 or below")
    return Preparation(mean, std, source.flatten)


def load_data(reference: DataReference, source: Source, progress: Stages) -> StoredData:
    """The data set, or the user's files; a data set that is not there yet is obtained."""
    progress.begin(f"load {reference.name}")
    load = partial(_split, reference, source, progress)
    train = load("train")
    stored = StoredData(source, Preparation(), train, load)
    inputs = train.inputs
    if source.mean is not None and isinstance(inputs, Tensor) and inputs.dtype == torch.int64:
        text = f"{train.name} has samples of int64, which are taken as they are, without --mean and --std"
        raise DataError(f"{text}; save pixels as uint8: x.astype('uint8')")
    return replace(stored, prepare=preparation(source, stored.channels))


def load_loaders(reference: DataReference, source: Source, model: nn.Module) -> LoaderData:
    """What the user's function returns: a mapping of loaders, (train, test), or one for training.

    Raises `DataError` for anything else.
    """
    value = call_factory(reference.name, {}, what="the data")
    if isinstance(value, tuple) and len(value) in (2, 3):
        value = dict(zip(_SPLITS if len(value) == 3 else ("train", "test"), value, strict=True))
    loaders: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"train": value}
    if "train" not in loaders or loaders.keys() - set(_SPLITS):
        names = ", ".join(map(str, loaders))
        raise DataError(
            f'{reference.name} returned {names}; return {{"train": .., "valid": .., "test": ..}}, of which the last '
            "two may be missing, each a DataLoader or a list of batches (inputs, labels)"
        )
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            kind = f"the {name} data of {reference.name} is a {type(loader).__name__}"
            raise DataError(f"{kind}, which can be read only once; return list(..) of it")
        require_batches(loader, what=f"the {name} data of {reference.name}")
    return LoaderData(source, reference.name, loaders, model)


def _parsed(text: str) -> DataReference:
    names = {info.name: info for info in data.available()}
    if text in names:
        return DataReference("name", text, names[text])
    kind, colon, rest = text.partition(":")
    if colon and rest and kind in ("folder", "text"):
        exists = Path(rest).expanduser().is_dir() if kind == "folder" else Path(rest).expanduser().is_file()
        if not exists:
            raise DataError(f"--data {text}: there is no {'folder' if kind == 'folder' else 'file'} {rest}")
        return DataReference(kind, rest)
    if Path(text).suffix.lower() == ".npz":
        if not Path(text).expanduser().is_file():
            raise DataError(f"--data {text}: there is no such file")
        return DataReference("arrays", text)
    if colon and all(part.isidentifier() for part in (*kind.split("."), *rest.split("."))):
        return DataReference("loaders", text)
    raise _not_understood(text, list(names))


def _not_understood(text: str, names: list[str]) -> DataError:
    """What else it might have been meant as."""
    path = Path(text).expanduser()
    if path.is_dir():
        return DataError(
            f"--data {text} is a folder; write --data folder:{text} for images in class folders. For the raw files of "
            f"a data set name it ({', '.join(names)}) and give --data-folder {text}"
        )
    if path.is_file():
        advice = f"write --data text:{text} for a text, or give an .npz file of arrays"
        return DataError(f"--data {text} is a file; {advice}")
    if any(mark in text for mark in "/\\.:~"):
        return DataError(f"--data {text}: there is no such file or folder; give a name of `spectrim data list`, {_OWN}")
    try:
        data.locate(text)  # knows near names
    except DataError as error:
        return DataError(f"{error}. For data of your own give {_OWN}")
    return DataError(f"--data {text} is no data set")


def _why_not(option: str, reference: DataReference) -> str:
    if option == "input" and reference.info is not None:
        return f", whose images are {listed(reference.info.shape)}"
    return {
        "data_folder": ", which says itself where it lies",
        "input": ", which has samples of one size",
        "resize": ", only with images in folders",
        "tokenizer": ", only with text:FILE",
    }[option]


def _split(reference: DataReference, source: Source, progress: Stages, part: Part) -> Samples:
    shape = source.shape if source.input is not None else None
    if reference.kind == "text":
        length, tokenizer = shape[0] if shape else 128, source.tokenizer or source.folder or ""
        return load_text(reference.name, tokenizer=tokenizer, split=part, length=length)
    split: data.access.Split = "train" if part == "train" else "test"
    if reference.kind == "folder":
        return load_folder(reference.name, split=split, shape=shape, shorter=source.resize)
    if reference.kind == "arrays":
        return load_arrays(reference.name, split=split)
    if data.locate(reference.name) is None:
        data.obtain(
            reference.name,
            folder=source.data_folder,
            on_event=lambda event: progress.update(detail=f"{reference.name}: {event.text}"),
        )
    stored = data.load(reference.name, split=split, folder=source.data_folder)
    return Samples(stored.name, stored.images, stored.labels, stored.classes, stored.checksum)
