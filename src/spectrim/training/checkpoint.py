"""The state of a training run between two steps, as one safetensors file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.benchmark.measurement import Epoch
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, require_writable_folder, write_atomically
from spectrim.layers.replacement import duplicate
from spectrim.layers.selection import unique_tensors
from spectrim.training.chance import Chance

_KEY = "spectrim-training"


class Progress(Frozen):
    """How far a run has come.

    Attributes:
        curve: The epochs that have ended.
        rates: The learning rate of the last step of each of them.
        step: Steps done of the epoch after them.
        steps: Batches of that epoch, 0 where its data does not tell.
        loss: Sum of its losses so far.
        correct: Right answers so far, and `labelled` is of how many.
        seconds: Spent in it so far.
    """

    curve: tuple[Epoch, ...] = ()
    rates: tuple[float, ...] = ()
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    labelled: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> int:
        """Position in the curve of the best held-out accuracy, the first of equals."""
        return max(range(len(self.curve)), key=lambda at: self.curve[at].held_out or 0.0)


class _Header(Frozen):
    version: Literal[2] = 2
    run: str
    progress: Progress
    chance: dict[str, Any]
    digest: str


@dataclass(frozen=True, eq=False)
class Saved:
    """A state besides weights and optimiser.

    Attributes:
        progress: How far the run has come.
        best: Weights and buffers of the best epoch so far; empty when none is kept.
        chance: Random states after the last step; None between epochs, each of which is seeded.
        loaders: States that the generators of a `DataLoader` had when the present epoch began.
    """

    progress: Progress = field(default_factory=Progress)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    chance: Chance | None = None
    loaders: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state.

    Attributes:
        path: The file.
        run: What identifies the run: any text, or a JSON object, of which a message names the entries that differ.
        unfit: What becomes of a damaged file, or one of another run: with `replace` the run starts from the beginning
            and writes over it; with `refuse` it is an error, and the file stays.
    """

    path: Path
    run: str
    unfit: Literal["replace", "refuse"] = field(default="replace", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def require_writable(self) -> None:
        """Raises `FileError` where the file could not be written later."""
        if self.path.is_dir():
            raise FileError(
                f"the checkpoint {self.path} is a folder; name a file in it, such as unfinished.safetensors"
            )
        require_writable_folder(self.path.parent)

    def save(self, model: nn.Module, optimiser: Optimizer, saved: Saved) -> None:
        """Write the state, wholly or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in unique_tensors(model)[0].items()}
        for index, state in optimiser.state_dict()["state"].items():
            own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"optimiser.{index}.{name}": value for name, value in own.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in saved.best.items()}
        tensors |= {f"loader.{at}": state for at, state in enumerate(saved.loaders)}
        if saved.chance is not None:
            tensors |= {f"chance.{name}": state for name, state in saved.chance.tensors.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = _Header(
            run=self.run,
            progress=saved.progress,
            chance=saved.chance.as_json() if saved.chance else {},
            digest=digest(tensors),
        )
        metadata = {_KEY: header.model_dump_json()}
        write_atomically(self.path, lambda part: save_file(tensors, part, metadata=metadata))

    def restore(self, model: nn.Module, optimiser: Optimizer) -> Saved | None:
        """Put the saved state into `model` and `optimiser`, and give the rest; None when there is nothing to take up.

        Raises:
            FileError: the file is damaged or of another run, and `unfit` says to refuse it.
        """
        if not self.path.exists():
            return None
        try:
            header, tensors = _read(self.path)
            self._require_own(header, model, optimiser, tensors)
        except FileError:
            if self.unfit == "refuse":
                raise
            return None
        parts = {name: tensor for name, tensor in tensors.items() if name.startswith("optimiser.")}
        _fill(model, _under("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.items():
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        chance = Chance(_under("chance.", tensors), header.chance) if header.chance else None
        loaders = _under("loader.", tensors)
        in_order = tuple(loaders[str(at)] for at in range(len(loaders)))
        return Saved(header.progress, _under("best.", tensors), chance, in_order)

    def _require_own(
        self, header: _Header, model: nn.Module, optimiser: Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        advice = "give another path, or delete the file to start from the beginning"
        if header.run != self.run:
            raise FileError(f"{self.path} is of another run: {_difference(header.run, self.run)}; {advice}")
        wanted = _kinds(unique_tensors(model)[0])
        trained = sum(len(group["params"]) for group in optimiser.param_groups)
        indices = {int(name.split(".")[1]) for name in tensors if name.startswith("optimiser.")}
        if _kinds(_under("model.", tensors)) != wanted or any(index >= trained for index in indices):
            raise FileError(f"{self.path} is of another network; {advice}")


def resumed(path: str | Path, model: nn.Module, *, which: Literal["best", "last"] = "best") -> nn.Module:
    """A copy of `model` with the weights in the checkpoint of a run that was stopped, such as by a NaN loss.

    Args:
        path: The file.
        model: The network as it was given to `finetune`.
        which: Those of the best epoch so far, where the run keeps it, or the last ones that were saved.

    Raises:
        FileError: the file is missing, damaged, of another network, or without a best epoch.
    """
    path = Path(path)
    _, tensors = _read(path)
    found = _under("best." if which == "best" else "model.", tensors)
    if not found:
        raise FileError(f'{path} holds no best epoch: none has ended, or keep="best" was not given; take which="last"')
    copied = duplicate(model)
    if _kinds(found) != _kinds(unique_tensors(copied)[0]):
        raise FileError(f"{path} is of another network than this {type(model).__name__}; give the one it was made with")
    _fill(copied, found)
    return copied


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What tells networks apart: `network`, of names, shapes and number types, and `weights`, of the values."""
    tensors, aliases = unique_tensors(model)
    kinds = {name: [list(shape), str(dtype)] for name, (shape, dtype) in _kinds(tensors).items()}
    text = json.dumps([kinds, aliases], sort_keys=True)
    return {"network": hashlib.sha256(text.encode()).hexdigest(), "weights": digest(tensors)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        # a tensor subclass may not know how to be viewed as bytes
        plain = tensors[name].detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    advice = "delete it to start from the beginning, or give another path"
    try:
        with safe_open(path, framework="pt") as opened:
            header = _Header.model_validate_json((opened.metadata() or {}).get(_KEY, ""))
            # copies, since what safetensors gives may look into the file that the next save replaces
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except ValidationError as error:
        raise FileError(f"{path} is not the checkpoint of a training run; {advice}") from error
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read the checkpoint {path}: {error}; if it is cut short, {advice}") from error
    if digest(tensors) != header.digest:
        raise FileError(f"the checkpoint {path} is damaged: its checksum differs; {advice}")
    return header, tensors


def _difference(there: str, here: str) -> str:
    """In words, for identities that are JSON objects; for others only that they differ."""
    try:
        one, other = json.loads(there), json.loads(here)
    except ValueError:
        one, other = None, None
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "the file was written with other settings"
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if "network" in names or "teacher" in names:
        names = [name for name in names if name not in ("weights", "trained")]
    return ", ".join(_said(name, one.get(name), other.get(name)) for name in names)


def _said(name: str, there: object, here: object) -> str:
    match name:
        case "network":
            return "another network (names, shapes or number types of its weights differ)"
        case "weights":
            return "the same network with other starting weights"
        case "teacher":
            return "another teacher"
        case _:
            return f"{name} was {json.dumps(there)} and is {json.dumps(here)}"


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write into the model's own tensors."""
    with torch.no_grad():
        for name, tensor in unique_tensors(model)[0].items():
            tensor.copy_(values[name])
