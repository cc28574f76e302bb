"""Times of layers on disk: one small JSON file for each layer shape, machine, runtime and choice of ranks."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import platformdirs

from spectrim.benchmark.layer_calls import LayerSignature, Variant
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, parse, read_text, write_text


class Entry(Frozen):
    """What one file holds.

    Attributes:
        fingerprint: Machine, runtime and versions.
        rest: Numbers that were read between two passes.
        shape: The layer's signature.
        variants: Form and ranks of the factors that were timed.
        ms: Milliseconds of the layer as it is, then of each variant.
    """

    version: Literal[1] = 1
    fingerprint: str
    rest: int
    shape: LayerSignature
    variants: tuple[tuple[str, tuple[int, ...]], ...]
    ms: tuple[float, ...]


class TimingCache:
    """A folder of entries. One that was named must be writable; without the default one times are only not kept."""

    def __init__(self, folder: Path | str | None, fingerprint: str, rest: int) -> None:
        self._named = folder is not None
        self._folder = cache_folder(folder)
        self._fingerprint, self._rest = fingerprint, rest

    def find(self, signature: LayerSignature, variants: Sequence[Variant]) -> tuple[float, ...] | None:
        """The times that were kept; None where there are none, or the file is not what it should be."""
        blank = self._entry(signature, variants, ())
        try:
            path = self._path(blank)
            entry = parse(Entry, read_text(path), origin=str(path))
        except FileError:
            return None
        whole = len(entry.ms) == len(variants) + 1 and min(entry.ms) > 0
        return entry.ms if whole and entry.model_copy(update={"ms": ()}) == blank else None

    def keep(self, signature: LayerSignature, variants: Sequence[Variant], ms: tuple[float, ...]) -> None:
        """Write an entry, wholly or not at all.

        Raises:
            FileError: a folder that was named cannot be written.
        """
        entry = self._entry(signature, variants, ms)
        try:
            write_text(self._path(entry), entry.model_dump_json(indent=1) + "\n")
        except FileError:
            if self._named:
                raise

    def _entry(self, signature: LayerSignature, variants: Sequence[Variant], ms: tuple[float, ...]) -> Entry:
        named = tuple((variant.form, variant.ranks) for variant in variants)
        return Entry(fingerprint=self._fingerprint, rest=self._rest, shape=signature, variants=named, ms=ms)

    def _path(self, entry: Entry) -> Path:
        key = entry.model_copy(update={"ms": ()}).model_dump_json()
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def cache_folder(folder: Path | str | None = None) -> Path:
    """Where the times of layers lie: `folder`, else $SPECTRIM_LATENCY, else the platform's user cache."""
    if folder is not None:
        return Path(folder).expanduser()
    if named := os.environ.get("SPECTRIM_LATENCY"):
        return Path(named).expanduser()
    return platformdirs.user_cache_path("spectrim") / "latency"
