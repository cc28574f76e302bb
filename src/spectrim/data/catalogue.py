"""The data sets that Spectrim knows: what each is, where it comes from, how its files are read, what they hash to.

`catalogue.toml` has a table for each, with the fields of `Entry`; the images of `digits` come from scikit-learn.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from spectrim.core.errors import DataError, did_you_mean
from spectrim.data.cache import checksum
from spectrim.data.formats import Layout, Splits
from spectrim.data.sources import Source


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set is, known without obtaining it.

    `sizes` are the numbers of training and test images, `shape` is (C, H, W) of one image; `licence` is None where its
    makers state none; `embedded` says that it comes with Spectrim's dependencies and is never downloaded.
    """

    name: str
    title: str
    sizes: tuple[int, int]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    credit: str
    licence: str | None = None
    embedded: bool = False


@dataclass(frozen=True)
class Entry:
    """A data set with its ordered sources, its layouts on disk and the checksums of its splits where they are known."""

    info: DatasetInfo
    sources: tuple[Source, ...] = ()
    layouts: tuple[Layout, ...] = ()
    checksums: Mapping[str, str] | None = None
    embedded: Callable[[], Splits] | None = None


def find(name: str | Entry) -> Entry:
    """The entry of that name, or the entry itself; DataError with near names otherwise."""
    if isinstance(name, Entry):
        return name
    names = [entry.info.name for entry in ENTRIES]
    if name in names:
        return ENTRIES[names.index(name)]
    hint = did_you_mean(str(name).lower().replace("_", "-"), names)
    raise DataError(f"there is no data set named {name!r}; {hint}Available: {', '.join(names)}")


def check(entry: Entry, splits: Splits) -> None:
    """DataError unless the splits are exactly the data set of the entry: sizes, shapes, labels and checksums."""
    for split, size in zip(("train", "test"), entry.info.sizes, strict=True):
        images, labels = splits[split]
        expected = (size, *entry.info.shape)
        if tuple(images.shape) != expected or len(labels) != size:
            contents = f"images {tuple(images.shape)} and {len(labels)} labels"
            raise DataError(f"its {split} split has {contents}, expected {expected} and {size} labels")
        if size and not 0 <= int(labels.min()) <= int(labels.max()) < len(entry.info.classes):
            extent = f"{int(labels.min())} to {int(labels.max())}"
            raise DataError(f"its {split} labels run from {extent}, expected 0 to {len(entry.info.classes) - 1}")
        if entry.checksums is not None and (digest := checksum(images, labels)) != entry.checksums[split]:
            why = "damaged, or another data set with the same file names"
            raise DataError(f"its {split} split has sha256 {digest}, expected {entry.checksums[split]}: {why}")


def _digits() -> Splits:
    """scikit-learn's digits, 0..16 stretched to 0..255; every fifth image of a class-sorted shuffle is for testing.

    The numbers of a legacy RandomState never change, so the split is the same everywhere and for good.
    """
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    by_class = order[np.argsort(bunch.target[order], kind="stable")]
    tests = np.zeros(len(order), dtype=bool)
    tests[by_class[::5]] = True
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return {"train": (images[~tests], labels[~tests]), "test": (images[tests], labels[tests])}


def _entries() -> tuple[Entry, ...]:
    tables: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    named = [{**table, "info": {"name": name, **table["info"]}} for name, table in tables.items()]
    digits, *others = TypeAdapter(list[Entry]).validate_python(named)
    return (replace(digits, embedded=_digits), *others)


ENTRIES = _entries()
