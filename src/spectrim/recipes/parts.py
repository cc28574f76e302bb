"""Finished and unfinished parts of a study on disk, reused only for exactly the same settings."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spectrim.errors import FileError
from spectrim.files import Frozen, parse, read_text, write_text
from spectrim.io import load, save
from spectrim.measure import Epoch
from spectrim.training.checkpoint import Checkpoint

Trained = tuple[nn.Module, tuple[Epoch, ...]]


class _Note(Frozen):
    key: str
    curve: tuple[Epoch, ...]


def key_of(**inputs: object) -> str:
    """A hash of everything that decides a part's outcome."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Parts:
    """A folder of trained networks, each with a note of what it was trained from."""

    folder: Path

    def trained(self, name: str, *, key: str, blank: nn.Module, train: Callable[[Checkpoint], Trained]) -> Trained:
        """The network `name`: from disk if it is there with the same `key`, otherwise trained now and kept.

        Args:
            name: File name without ending.
            key: From `key_of`.
            blank: The dense network to load into.
            train: Trains it; the checkpoint it is given holds the epochs of an interrupted run.
        """
        weights, note = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        try:
            found = parse(_Note, read_text(note), origin=str(note))
            if found.key == key:
                return load(weights, blank), found.curve
        except FileError:
            pass  # absent or damaged: train it (again)
        unfinished = Checkpoint(self.folder / f"{name}.unfinished.safetensors", run=key)
        model, curve = train(unfinished)
        save(model, weights)
        write_text(note, _Note(key=key, curve=curve).model_dump_json(indent=1))
        unfinished.path.unlink(missing_ok=True)
        return model, curve
