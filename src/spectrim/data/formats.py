"""The raw file formats, read strictly and never by unpickling.

A `Layout` says which files make a data set, where they usually lie, and how their bytes become tensors.
Archives are read in memory, member by member, so nothing is ever extracted to disk.
"""

import gzip
import hashlib
import io
import itertools
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from spectrim.core.errors import DataError

Splits = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Per split ("train", "test") the images, uint8 (N, C, H, W), and the labels, int64 (N,)."""

_BROKEN_ARCHIVE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
_LABELS = TypeAdapter(list[Annotated[int, Field(ge=0, le=255)]])
_CIFAR_RECORD = 1 + 3 * 32 * 32


class MissingFilesError(DataError):
    """The files of a data set are not where they were looked for (which is no damage, unlike a bad file)."""


@dataclass(frozen=True)
class Raw:
    """One raw file: its bytes, and where they came from for the error messages."""

    where: str
    data: bytes


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk: its format, file names, usual subfolders, and archives.

    The order of `files` is that of the format: idx pairs are images and labels of the training, then of the test split;
    CIFAR-10 batches are those for training, then the one for testing, with PNG then the labels of both splits.
    `archives` are file names with the md5 that their makers publish, empty where they do not.
    """

    format: Literal["idx", "idx-transposed", "cifar-binary", "cifar-png"]
    files: tuple[str, ...]
    places: tuple[str, ...] = ("",)
    archives: Mapping[str, str] = field(default_factory=dict)

    def read(self, folder: Path) -> Splits:
        """Both splits of the data set below `folder`.

        Raises MissingFilesError when files are missing, DataError when one is damaged.
        """
        raw: dict[str, Raw] = {}
        for place in self.places:
            self._take(raw, _loose(folder / place))
        for archive, place in itertools.product(self.archives, self.places):
            path = folder / place / archive
            if len(raw) < len(self.files) and path.is_file():
                if md5 := self.archives[archive]:
                    require_md5(path, md5)
                try:
                    self._take(raw, _members(path))
                except _BROKEN_ARCHIVE as error:
                    message = f"{path}: cannot be read as an archive ({error}); truncated or damaged"
                    raise DataError(message) from error
        if absent := [name for name in self.files if name not in raw]:
            raise MissingFilesError(f"no {', '.join(absent)} in {folder}")
        return _DECODERS[self.format]([raw[name] for name in self.files])

    def _take(self, raw: dict[str, Raw], files: Iterable["_File"]) -> None:
        """Those that the layout has and `raw` lacks, unpacked."""
        for name, where, read in files:
            # one spelling for train-images.idx3-ubyte.gz, train-images-idx3-ubyte.gz and the unpacked ones
            plain = name.removesuffix(".gz").replace(".idx", "-idx")
            if plain in self.files and plain not in raw:
                raw[plain] = Raw(where, _unzipped(read(), where=where) if name.endswith(".gz") else read())


def read_any(layouts: tuple[Layout, ...], folder: Path) -> Splits:
    """Both splits by the first layout whose files are all below `folder`; MissingFilesError where none is complete."""
    reasons = []
    for layout in layouts:
        try:
            return layout.read(folder)
        except MissingFilesError as error:
            reasons.append(str(error))
    raise MissingFilesError("; nor ".join(reasons))


def parse_idx(raw: Raw, *, ndim: int) -> torch.Tensor:
    """The uint8 tensor in an idx file of `ndim` dimensions; DataError says what is wrong with any other file."""
    magic, header = 0x0800 + ndim, 4 * (1 + ndim)
    if len(raw.data) < header:
        raise DataError(f"{raw.where}: an idx file starts with {header} bytes of header, got {len(raw.data)} bytes")
    number, *sizes = np.frombuffer(raw.data, dtype=">u4", count=1 + ndim).tolist()
    if number != magic:
        raise DataError(f"{raw.where}: idx magic number {number}, expected {magic}; this is another kind of file")
    expected = header + int(np.prod(sizes, dtype=object))
    if len(raw.data) != expected:
        shape = " x ".join(map(str, sizes))
        fault = f"got {len(raw.data)} bytes, expected {expected} for {shape}"
        raise DataError(f"{raw.where}: {fault}; truncated or damaged")
    return torch.from_numpy(np.frombuffer(raw.data, dtype=np.uint8, offset=header).reshape(sizes).copy())


def _decode_idx(files: Sequence[Raw], *, transposed: bool = False) -> Splits:
    splits = {}
    for split, pair in (("train", files[:2]), ("test", files[2:])):
        images, labels = parse_idx(pair[0], ndim=3), parse_idx(pair[1], ndim=1)  # (N, H, W) and (N,)
        upright = images.transpose(1, 2).contiguous() if transposed else images
        splits[split] = (upright.unsqueeze(1), labels.long())
    return splits


def _decode_cifar_binary(files: Sequence[Raw]) -> Splits:
    """The official binary batches: records of one label byte and 3072 pixel bytes, planes R, G, B, rows first."""

    def batch(raw: Raw) -> torch.Tensor:
        if not raw.data or len(raw.data) % _CIFAR_RECORD:
            fault = f"got {len(raw.data)} bytes, expected a multiple of {_CIFAR_RECORD}"
            raise DataError(f"{raw.where}: {fault}; truncated or damaged")
        return torch.from_numpy(np.frombuffer(raw.data, dtype=np.uint8).reshape(-1, _CIFAR_RECORD).copy())

    *train, test = map(batch, files)
    splits = {"train": torch.cat(train), "test": test}
    return {name: (own[:, 1:].reshape(-1, 3, 32, 32).contiguous(), own[:, 0].long()) for name, own in splits.items()}


def _decode_cifar_png(files: Sequence[Raw]) -> Splits:
    """The PNG batches of the npm package: one row of 1024 RGB pixels an image, labels in two JSON lists."""
    *train, test = map(_png_rows, files[:-2])
    train_labels, test_labels = map(_json_labels, files[-2:])
    return {"train": (torch.cat(train), train_labels), "test": (test, test_labels)}


def _png_rows(raw: Raw) -> torch.Tensor:
    """The images, uint8 (N, 3, 32, 32), in a PNG of N rows of 1024 RGB pixels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{raw.where}: PNG files need Pillow: pip install 'spectrim[vision]'") from error
    try:
        with Image.open(io.BytesIO(raw.data), formats=["PNG"]) as image:
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{raw.where}: {error}; truncated or damaged") from error
    if pixels.ndim != 3 or pixels.shape[1:] != (1024, 3):
        raise DataError(f"{raw.where}: got pixels of shape {pixels.shape}, expected (images, 1024, 3)")
    return torch.from_numpy(pixels).reshape(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def _json_labels(raw: Raw) -> torch.Tensor:
    try:
        return torch.tensor(_LABELS.validate_json(raw.data), dtype=torch.int64)
    except ValidationError as error:
        raise DataError(f"{raw.where}: expected a JSON list of labels: {error.errors()[0]['msg']}") from error


_DECODERS: Mapping[str, Callable[[Sequence[Raw]], Splits]] = {
    "idx": _decode_idx,
    "idx-transposed": partial(_decode_idx, transposed=True),  # as EMNIST stores its images
    "cifar-binary": _decode_cifar_binary,
    "cifar-png": _decode_cifar_png,
}


def require_md5(path: Path, md5: str) -> None:
    """DataError unless the file has this md5."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual != md5:
        raise DataError(f"{path}: md5 {actual}, expected {md5}; truncated, damaged or another edition")


_File = tuple[str, str, Callable[[], bytes]]
"""A file's name without folders, where it lies for messages, and what reads it before the next one is asked for."""


def _loose(folder: Path) -> Iterator[_File]:
    """The files in `folder` itself, an unpacked one before its .gz."""
    if folder.is_dir():
        yield from ((path.name, str(path), path.read_bytes) for path in sorted(folder.iterdir()) if path.is_file())


def _members(path: Path) -> Iterator[_File]:
    """The files in a tar or zip archive, in whichever folder inside it."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield PurePosixPath(name).name, f"{path}:{name}", partial(archive.read, name)
        return
    with tarfile.open(path) as tar:
        for member in tar:  # one pass: going back in a compressed tar means to unpack it again
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield PurePosixPath(member.name).name, f"{path}:{member.name}", content.read


def _unzipped(data: bytes, *, where: str) -> bytes:
    try:
        return gzip.decompress(data)
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{where}: not a whole gzip file ({error}); truncated or damaged") from error
