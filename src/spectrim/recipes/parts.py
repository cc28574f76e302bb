"""Finished and unfinished parts of a study on disk, reused only for exactly the same settings."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spectrim.benchmark.measurement import Epoch
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, parse, read_text, write_text
from spectrim.core.plans import Plan
from spectrim.layers.saving import load, save
from spectrim.training.checkpoint import Checkpoint

Trained = tuple[nn.Module, tuple[Epoch, ...]]
Made = tuple[nn.Module, Plan]


class _Note(Frozen):
    key: str
    curve: tuple[Epoch, ...] = ()
    plan: Plan | None = None


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
        found = self._found(name, key=key, blank=blank)
        if found is not None:
            return found[0], found[1].curve
        unfinished = Checkpoint(self.folder / f"{name}.unfinished.safetensors", run=key)
        model, curve = train(unfinished)
        self._keep(name, model, _Note(key=key, curve=curve))
        unfinished.path.unlink(missing_ok=True)
        return model, curve

    def compressed(self, name: str, *, key: str, blank: nn.Module, make: Callable[[], Made]) -> Made:
        """The network `name` and its plan: from disk if they are there with the same `key`, otherwise made and kept.

        Args:
            name: File name without ending.
            key: From `key_of`.
            blank: The dense network to load into.
            make: Compresses it.
        """
        found = self._found(name, key=key, blank=blank)
        if found is not None and found[1].plan is not None:
            return found[0], found[1].plan
        model, plan = make()
        self._keep(name, model, _Note(key=key, plan=plan))
        return model, plan

    def _found(self, name: str, *, key: str, blank: nn.Module) -> tuple[nn.Module, _Note] | None:
        note = self.folder / f"{name}.json"
        try:
            found = parse(_Note, read_text(note), origin=str(note))
            return (load(self.folder / f"{name}.safetensors", blank), found) if found.key == key else None
        except FileError:
            return None  # absent or damaged: to be made (again)

    def _keep(self, name: str, model: nn.Module, note: _Note) -> None:
        save(model, self.folder / f"{name}.safetensors")
        write_text(self.folder / f"{name}.json", note.model_dump_json(indent=1, exclude_none=True))
