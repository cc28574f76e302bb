"""Obtaining and loading: the cache first, then each source in its order, and one message when all of them fail."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spectrim.core.errors import DataError
from spectrim.data.cache import DamagedCacheError, cache_root, checksum, read_manifest, read_split, store, workspace
from spectrim.data.catalogue import ENTRIES, DatasetInfo, Entry, check, find
from spectrim.data.formats import MissingFilesError, Splits, read_any
from spectrim.data.sources import Event, Folder, Official, Report, SourceError

Split = Literal["train", "test"]
_SPLITS: tuple[Split, ...] = ("train", "test")


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
    name: str | Entry,
    *,
    folder: Path | str | None = None,
    cache: Path | str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Obtained:
    """Makes sure that a data set is in the cache.

    Takes it from the cache, else from `folder`, else from the data set's own sources in their order. `name` is one of
    `available()`, or an entry that is not in the catalogue. `cache` replaces the cache folder, `on_event` gets what is
    being tried. Raises DataError for an unknown name, for a damaged file in `folder`, and when every source fails (with
    each reason); FileError when the cache cannot be written.
    """
    entry = find(name)
    stored = _ensure(entry, _SPLITS, folder=folder, cache=cache, report=on_event or (lambda event: None))
    train, test = (len(stored.splits[split][1]) for split in _SPLITS)
    checksums = (stored.checksums["train"], stored.checksums["test"])
    return Obtained(entry.info.name, stored.path, stored.source, stored.fresh, (train, test), checksums)


def load(
    name: str | Entry, *, split: Split = "train", folder: Path | str | None = None, cache: Path | str | None = None
) -> Dataset:
    """One split of a data set, obtained first where it is not in the cache yet.

    Raises what `obtain` raises, and DataError for an unknown split.
    """
    entry = find(name)
    info = entry.info
    if split not in _SPLITS:
        raise DataError(f"there is no split {split!r} in {info.name!r}; use 'train' or 'test'")
    stored = _ensure(entry, (split,), folder=folder, cache=cache, report=lambda event: None)
    images, labels = stored.splits[split]
    return Dataset(info.name, split, images, labels, info.classes, stored.source, stored.checksums[split])


@dataclass(frozen=True)
class _Stored:
    """At least the splits that were asked for, with their checksums, and where they lie and came from."""

    splits: Splits
    checksums: Mapping[str, str]
    source: str
    path: Path | None = None
    fresh: bool = False


def _ensure(
    entry: Entry, splits: tuple[Split, ...], *, folder: Path | str | None, cache: Path | str | None, report: Report
) -> _Stored:
    if entry.embedded is not None:
        embedded = entry.embedded()
        return _Stored(embedded, {split: checksum(*embedded[split]) for split in splits}, "scikit-learn")
    path = cache_root(cache) / entry.info.name
    reasons = []
    try:
        if (manifest := read_manifest(path)) is not None:
            for split in splits:
                expected = (entry.checksums or manifest.checksums).get(split)
                if expected is None or manifest.checksums.get(split) != expected:
                    raise DamagedCacheError(f"{path} holds another edition of {entry.info.name}")
            cached: Splits = {split: read_split(path, manifest.splits[split]) for split in splits}
            return _Stored(cached, manifest.checksums, manifest.source, path)
    except DamagedCacheError as error:
        reasons.append(f"cache: {error}")
        report(Event("cache", f"passed over: {error}"))
    named = (Folder(Path(folder).expanduser()),) if folder is not None else ()
    with workspace(path.parent) as temporary:
        fetched, source = _fetch(entry, temporary, named=named, report=report, reasons=reasons)
    report(Event(source, "writing to the cache"))
    manifest = store(path, fetched, source=source)
    return _Stored(fetched, manifest.checksums, source, path, fresh=True)


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
            # a damaged file in the folder that the user named is an error, not a reason to try the next source
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
    files = "\n  or ".join(
        ", or ".join([f"{', '.join(layout.files)} (each may be a .gz)", *layout.archives]) for layout in entry.layouts
    )
    official = " ".join(source.label for source in entry.sources if isinstance(source, Official))
    return (
        f"data set {name!r} could not be obtained. Tried, in this order:{tried}\n"
        f"To provide the files by hand, put into a folder DIR\n  {files}\n"
        f"({official}) and run: spectrim data get {name} --folder DIR"
    )
