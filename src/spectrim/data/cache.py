"""The cache: per data set one safetensors file a split, and a manifest that is written last.

The manifest names the tensor files, whose names carry their checksum. Every file is written under a temporary name
and moved into place, so two processes may fill the same cache at once, and a reader sees the old state or the new.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import platformdirs
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spectrim.core.errors import FileError
from spectrim.core.files import Frozen
from spectrim.data.formats import Splits

_MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 24 * 3600


class DamagedCacheError(Exception):
    """A cached file that is not what its manifest says; never leaves `spectrim.data`."""


class StoredSplit(Frozen):
    """One split in the manifest."""

    file: str
    checksum: str
    count: int


class Manifest(Frozen):
    """What the cache holds of one data set, and where it came from."""

    version: Literal[1] = 1
    name: str
    source: str
    splits: dict[Literal["train", "test"], StoredSplit]

    @property
    def checksums(self) -> Mapping[str, str]:
        """Of every split in it."""
        return {split: stored.checksum for split, stored in self.splits.items()}


def cache_root(cache: Path | str | None = None) -> Path:
    """The folder that holds all data sets: `cache`, else $SPECTRIM_DATA, else the platform's user cache."""
    named = cache if cache is not None else os.environ.get("SPECTRIM_DATA") or None
    return platformdirs.user_cache_path("spectrim") / "data" if named is None else Path(named).expanduser()


def checksum(images: torch.Tensor, labels: torch.Tensor) -> str:
    """The sha256, in hex, over the bytes of the images (uint8), then of the labels (int64, little-endian)."""
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, removed at the end in any case; FileError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{_TEMPORARY}*"):  # of killed processes; a younger one may still be at work
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)
        temporary = tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        advice = "name another folder with SPECTRIM_DATA, cache= or --cache"
        raise FileError(f"cannot write to the data cache {folder}: {error.strerror or error}; {advice}") from error
    with temporary as path:
        yield Path(path)


def store(folder: Path, splits: Splits, *, source: str) -> Manifest:
    """Writes both splits, then the manifest that makes them valid. FileError when they cannot be written."""
    with workspace(folder.parent) as temporary:
        try:
            folder.mkdir(exist_ok=True)
            stored: dict[Literal["train", "test"], StoredSplit] = {}
            for split in ("train", "test"):
                images, labels = splits[split]
                digest = checksum(images, labels)
                file = f"{split}-{digest[:16]}.safetensors"
                _write(folder / file, save({"images": images, "labels": labels}), temporary=temporary)
                stored[split] = StoredSplit(file=file, checksum=digest, count=len(labels))
            manifest = Manifest(name=folder.name, source=source, splits=stored)
            text = manifest.model_dump_json(indent=2) + "\n"
            _write(folder / _MANIFEST, text.encode(), temporary=temporary)
        except (OSError, SafetensorError) as error:
            raise FileError(f"cannot write to the data cache {folder}: {error}") from error
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """What `folder` holds, None when it holds nothing yet; DamagedCacheError for a damaged manifest."""
    path = folder / _MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise DamagedCacheError(f"{path} is damaged: {error.errors()[0]['msg']}") from error


def read_split(folder: Path, stored: StoredSplit) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 (N, C, H, W), and labels, int64 (N,), checked against their checksum; else DamagedCacheError."""
    path = folder / Path(stored.file).name
    try:
        tensors = load_file(path)
        images, labels = tensors["images"], tensors["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DamagedCacheError(f"{path} cannot be read: {error}") from error
    if (actual := checksum(images, labels)) != stored.checksum:
        raise DamagedCacheError(f"{path} has checksum {actual}, its manifest says {stored.checksum}")
    return images, labels


def _write(target: Path, data: bytes, *, temporary: Path) -> None:
    """Into place in one step, once the bytes are on the disk."""
    draft = temporary / target.name
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)
