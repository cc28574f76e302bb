"""Times of layers on disk: one small JSON file for each layer shape, machine, runtime and choice of ranks."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    variants: tuple[Variant, ...]
    ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TimingCache:
    """A folder of entries, for one machine and runtime, and so many numbers read between two passes.

    A folder that was named must be writable; without the default one times are only not kept.
    """

    folder: Path | str | None
    fingerprint: str
    rest: int

    def times(
        self, signature: LayerSignature, variants: Sequence[Variant], measure: Callable[[], tuple[float, ...]]
    ) -> tuple[float, ...]:
        """The times on disk; where there are none, or the file is not what it should be, they are measured and written.

        Raises:
            FileError: a folder that was named cannot be written.
        """
        blank = Entry(fingerprint=self.fingerprint, rest=self.rest, shape=signature, variants=tuple(variants))
        key = hashlib.sha256(blank.model_dump_json().encode()).hexdigest()[:32]
        path = cache_folder(self.folder) / f"{key}.json"
        with suppress(FileError):
            entry = parse(Entry, read_text(path), origin=str(path))
            whole = len(entry.ms) == len(variants) + 1 and min(entry.ms) > 0
            if whole and entry.model_copy(update={"ms": ()}) == blank:
                return entry.ms
        ms = measure()
        try:
            write_text(path, blank.model_copy(update={"ms": ms}).model_dump_json(indent=1) + "\n")
        except FileError:
            if self.folder is not None:
                raise
        return ms


def cache_folder(folder: Path | str | None = None) -> Path:
    """Where the times of layers lie: `folder`, else $SPECTRIM_LATENCY, else the platform's user cache."""
    named = folder or os.environ.get("SPECTRIM_LATENCY")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("spectrim") / "latency"
