"""The state of a training run between two steps, as one safetensors file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.benchmark.measurement import Epoch
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, require_writable_folder, write_atomically
from spectrim.layers.replacement import duplicate
from spectrim.layers.selection import unique_tensors
from spectrim.training.rng_state import RngState

_KEY = "spectrim-training"


class Progress(Frozen):
    """How far a run has come.

    Attributes:
        curve: The epochs that have ended.
        rates: The learning rate of the last step of each of them.
        step: Steps taken in the present epoch.
        steps: Batches of that epoch, 0 if its data has no length.
        loss: Sum of its losses so far.
        correct: Right answers in it so far.
        labelled: Answers in it so far that have a class index to compare with.
        seconds: Time spent in it so far.
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
    random_states: dict[str, Any] = Field(alias="chance")
    digest: str


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds besides weights and optimiser.

    Attributes:
        progress: How far the run has come.
        best: Weights and buffers of the best epoch so far; empty if none is kept.
        rng: Random states after the last step; None between epochs, each of which is seeded.
        loaders: States that the generators of a `DataLoader` had when the present epoch began.
    """

    progress: Progress = field(default_factory=Progress)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    rng: RngState | None = None
    loaders: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state.

    Attributes:
        path: The file.
        run: What identifies the run: any text, or a JSON object; messages name the entries of an object that differ.
        unfit: What to do with a file that is damaged or of another run: `replace` starts from the beginning and
            overwrites it; `refuse` raises an error and leaves it.
    """

    path: Path
    run: str
    unfit: Literal["replace", "refuse"] = field(default="replace", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def require_writable(self) -> None:
        """Raise `FileError` if the file cannot be written later."""
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
        if saved.rng is not None:
            tensors |= {f"chance.{name}": state for name, state in saved.rng.tensors.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        others = dict(saved.rng.others) if saved.rng else {}
        header = _Header(run=self.run, progress=saved.progress, chance=others, digest=digest(tensors))
        metadata = {_KEY: header.model_dump_json(by_alias=True)}
        write_atomically(self.path, lambda part: save_file(tensors, part, metadata=metadata))

    def restore(self, model: nn.Module, optimiser: Optimizer) -> Saved | None:
        """Put the saved state into `model` and `optimiser`, and return the rest; None if there is nothing to resume.

        Raises:
            FileError: the file is damaged or of another run, and `unfit` is `refuse`.
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
        _fill(model, _under("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimiser.", tensors).items():
            index, _, entry = name.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        rng = RngState(_under("chance.", tensors), header.random_states) if header.random_states else None
        loaders = _under("loader.", tensors)
        in_order = tuple(loaders[str(at)] for at in range(len(loaders)))
        return Saved(header.progress, _under("best.", tensors), rng, in_order)

    def _require_own(
        self, header: _Header, model: nn.Module, optimiser: Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        advice = "give another path, or delete the file to start from the beginning"
        if _parsed(header.run) != _parsed(self.run):
            raise FileError(f"{self.path} is of another run: {_difference(header.run, self.run)}; {advice}")
        trained = sum(len(group["params"]) for group in optimiser.param_groups)
        indices = {int(name.partition(".")[0]) for name in _under("optimiser.", tensors)}
        same = _kinds(_under("model.", tensors)) == _kinds(unique_tensors(model)[0])
        if not same or any(index >= trained for index in indices):
            raise FileError(f"{self.path} is of another network; {advice}")


def resumed(path: str | Path, model: nn.Module, *, which: Literal["best", "last"] = "best") -> nn.Module:
    """A copy of `model` with the weights in the checkpoint of a run that was stopped, such as by a NaN loss.

    Args:
        path: The file.
        model: The network as it was given to `finetune`.
        which: The weights of the best epoch so far, if the run keeps it, or the last ones that were saved.

    Raises:
        FileError: the file is missing, damaged, of another network, or without a best epoch.
    """
    path = Path(path)
    _, tensors = _read(path)
    weights = _under("best." if which == "best" else "model.", tensors)
    if not weights:
        raise FileError(f'{path} holds no best epoch: none has ended, or keep="best" was not given; take which="last"')
    copied = duplicate(model)
    if _kinds(weights) != _kinds(unique_tensors(copied)[0]):
        raise FileError(f"{path} is of another network than this {type(model).__name__}; give the one it was made with")
    _fill(copied, weights)
    return copied


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What identifies a network: `network`, a hash of names, shapes and number types, and `weights`, of the values."""
    tensors, aliases = unique_tensors(model)
    kinds = {name: [list(shape), str(dtype)] for name, (shape, dtype) in _kinds(tensors).items()}
    text = json.dumps([kinds, aliases], sort_keys=True)
    return {"network": hashlib.sha256(text.encode()).hexdigest(), "weights": digest(tensors)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        # a tensor subclass may have no view as bytes
        plain = tensors[name].detach().cpu().contiguous().flatten()
        sha.update(plain.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    advice = "delete it to start from the beginning, or give another path"
    try:
        with safe_open(path, framework="pt") as opened:
            header = _Header.model_validate_json((opened.metadata() or {}).get(_KEY, ""))
            # copies, since a tensor of safetensors may be a view of the file that the next save replaces
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except ValidationError as error:
        raise FileError(f"{path} is not the checkpoint of a training run; {advice}") from error
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read the checkpoint {path}: {error}; if it is cut short, {advice}") from error
    if digest(tensors) != header.digest:
        raise FileError(f"the checkpoint {path} is damaged: its checksum differs; {advice}")
    return header, tensors


def _parsed(run: str) -> object:
    """What identifies a run, compared as values: 1 is 1.0."""
    try:
        return json.loads(run)
    except ValueError:
        return run


_DIFFERENCES = {
    "network": "another network (names, shapes or number types of its weights differ)",
    "weights": "the same network with other starting weights",
    "teacher": "another teacher",
}


def _difference(before: str, now: str) -> str:
    """The entries that differ, for identities that are JSON objects; for others only that they do."""
    old, new = _parsed(before), _parsed(now)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "the file was written with other settings"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if "network" in names or "teacher" in names:
        names = [name for name in names if name not in ("weights", "trained")]
    return ", ".join(
        _DIFFERENCES.get(name, f"{name} was {json.dumps(old.get(name))} and is {json.dumps(new.get(name))}")
        for name in names
    )


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the model's own tensors."""
    with torch.no_grad():
        for name, tensor in unique_tensors(model)[0].items():
            tensor.copy_(values[name])
