"""Obtaining and loading: the cache first, then each source in its order, and one message when all of them fail."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spectrim.core.errors import DataError
from spectrim.data.cache import (
    DamagedCacheError,
    Manifest,
    cache_root,
    checksum,
    read_manifest,
    read_split,
    store,
    workspace,
)
from spectrim.data.catalogue import ENTRIES, DatasetInfo, Entry, check, find
from spectrim.data.formats import Layout, MissingFilesError, Splits, read_any
from spectrim.data.sources import Event, Folder, Official, Report, SourceError

Split = Literal["train", "test"]
_EMBEDDED_SOURCE = "scikit-learn"


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by; `checksum` has
class Dataset:
    """One split of a data set in memory.

    `images` is uint8 (N, C, H, W), `labels` is int64 (N,) with values that index `classes`. `source` says where the
    files came from, `checksum` is the sha256 in hex over the bytes of the images, then of the labels.
    """

    name: str
    split: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    checksum: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Obtained:
    """Where a data set lies and came from; `path` is None for an embedded one, `fresh` says that it was fetched now.

    `sizes` and `checksums` are those of the training and the test split.
    """

    name: str
    path: Path | None
    source: str
    fresh: bool
    sizes: tuple[int, int]
    checksums: tuple[str, str]


def available() -> tuple[DatasetInfo, ...]:
    """All data sets that Spectrim knows, obtained or not."""
    return tuple(entry.info for entry in ENTRIES)


def locate(name: str, *, cache: Path | str | None = None) -> Path | None:
    """The cache folder of a data set that has been obtained, else None. DataError for an unknown name."""
    folder = cache_root(cache) / find(name).info.name
    try:
        return folder if read_manifest(folder) is not None else None
    except DamagedCacheError:
        return None


def obtain(
    name: str,
    *,
    folder: Path | str | None = None,
    cache: Path | str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Obtained:
    """Makes sure that a data set is in the cache.

    Takes it from the cache, else from `folder`, else from the data set's own sources in their order. `cache` replaces
    the cache folder, `on_event` is told what is being tried. Raises DataError for an unknown name, for a damaged file
    in `folder`, and when every source fails (with each reason); FileError when the cache cannot be written.
    """
    return obtain_entry(find(name), folder=folder, cache=cache, on_event=on_event)


def load(
    name: str,
    *,
    split: Split = "train",
    folder: Path | str | None = None,
    cache: Path | str | None = None,
) -> Dataset:
    """One split of a data set, obtained first where it is not in the cache yet.

    Raises what `obtain` raises, and DataError for an unknown split.
    """
    return load_entry(find(name), split=split, folder=folder, cache=cache)


def obtain_entry(
    entry: Entry,
    *,
    folder: Path | str | None = None,
    cache: Path | str | None = None,
    on_event: Report | None = None,
) -> Obtained:
    """`obtain` for a catalogue entry."""
    name = entry.info.name
    if entry.embedded is not None:
        sums = {split: checksum(*tensors) for split, tensors in entry.embedded().items()}
        return Obtained(name, None, _EMBEDDED_SOURCE, False, entry.info.sizes, (sums["train"], sums["test"]))
    place = cache_root(cache) / name
    manifest, _, fresh = _ensure(entry, place, wanted=("train", "test"), folder=folder, report=on_event or _ignore)
    train, test = manifest.splits["train"], manifest.splits["test"]
    return Obtained(name, place, manifest.source, fresh, (train.count, test.count), (train.checksum, test.checksum))


def load_entry(
    entry: Entry,
    *,
    split: Split = "train",
    folder: Path | str | None = None,
    cache: Path | str | None = None,
) -> Dataset:
    """`load` for a catalogue entry."""
    info = entry.info
    if split not in ("train", "test"):
        raise DataError(f"there is no split {split!r} in {info.name!r}; use 'train' or 'test'")
    if entry.embedded is not None:
        images, labels = entry.embedded()[split]
        return Dataset(info.name, split, images, labels, info.classes, _EMBEDDED_SOURCE, checksum(images, labels))
    place = cache_root(cache) / info.name
    manifest, splits, _ = _ensure(entry, place, wanted=(split,), folder=folder, report=_ignore)
    images, labels = splits[split]
    digest = manifest.splits[split].checksum
    return Dataset(info.name, split, images, labels, info.classes, manifest.source, digest)


def _ensure(
    entry: Entry, place: Path, *, wanted: tuple[Split, ...], folder: Path | str | None, report: Report
) -> tuple[Manifest, Splits, bool]:
    """The manifest, at least the wanted splits, and whether they had to be fetched."""
    reasons = []
    try:
        manifest = read_manifest(place)
        if manifest is not None:
            cached: Splits = {split: _read_cached(entry, place, manifest=manifest, split=split) for split in wanted}
            return manifest, cached, False
    except DamagedCacheError as error:
        reasons.append(f"cache: {error}")
        report(Event("cache", f"passed over: {error}"))
    named = (Folder(Path(folder).expanduser()),) if folder is not None else ()
    with workspace(place.parent) as temporary:
        fetched, source = _fetch(entry, temporary, named=named, report=report, reasons=reasons)
    report(Event(source, "writing to the cache"))
    return store(place, fetched, source=source), fetched, True


def _read_cached(entry: Entry, place: Path, *, manifest: Manifest, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    stored = manifest.splits.get(split)
    if stored is None or (entry.checksums is not None and stored.checksum != entry.checksums[split]):
        raise DamagedCacheError(f"{place} holds another edition of {entry.info.name}")
    return read_split(place, stored)


def _fetch(
    entry: Entry, temporary: Path, *, named: tuple[Folder, ...], report: Report, reasons: list[str]
) -> tuple[Splits, str]:
    """The checked splits, and the label of the source that gave them; DataError with every reason when none does."""
    for number, source in enumerate((*named, *entry.sources)):
        report(Event(source.label, "trying"))
        try:
            into = temporary / str(number)
            into.mkdir()
            splits = read_any(entry.layouts, source.fetch(into, report=report))
            check(entry, splits)
        except (SourceError, DataError, OSError) as error:
            # a damaged file in the folder that the user named is news, not a reason to go elsewhere
            if source in named and not isinstance(error, MissingFilesError):
                raise DataError(f"{source.label} cannot be used for {entry.info.name!r}: {error}") from error
            reasons.append(f"{source.label}: {error}")
            report(Event(source.label, f"passed over: {error}"))
        else:
            return splits, source.label
    raise DataError(_all_failed(entry, reasons))


def _all_failed(entry: Entry, reasons: list[str]) -> str:
    name = entry.info.name
    tried = "".join(f"\n  - {reason}" for reason in reasons)
    files = "\n  or ".join(_by_hand(layout) for layout in entry.layouts)
    sites = " ".join(source.label for source in entry.sources if isinstance(source, Official))
    return (
        f"data set {name!r} could not be obtained. Tried, in this order:{tried}\n"
        f"To provide the files by hand, put into a folder DIR\n  {files}\n"
        f"({sites}) and run: spectrim data get {name} --folder DIR"
    )


def _by_hand(layout: Layout) -> str:
    archives = "".join(f", or {archive.name}" for archive in layout.archives if archive.offered)
    return f"{', '.join(layout.files)} (each may be a .gz){archives}"


def _ignore(event: Event) -> None:
    pass
