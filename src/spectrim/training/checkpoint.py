"""The state of a training run between two steps, as one safetensors file; random states among it."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spectrim.benchmark.measurement import Epoch
from spectrim.core.batches import source_of
from spectrim.core.errors import FileError
from spectrim.core.execution import device_of
from spectrim.core.files import Frozen, require_writable_folder, write_atomically
from spectrim.core.state import unique_tensors
from spectrim.layers.replacement import duplicate
from spectrim.training.history import position_of_best


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of all global generators that training draws from, or of none.

    `tensors` are torch's, uint8: `cpu`, and `cuda` for the model's device if that is one. `others` are those of Python
    and numpy, in types that JSON has.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def now(cls, model: nn.Module) -> "RngState":
        """The present states."""
        tensors = {"cpu": torch.get_rng_state()}
        device = device_of(model)
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        arrays: Any = np.random.get_state(legacy=False)
        arrays["state"]["key"] = arrays["state"]["key"].tolist()
        return cls(tensors, {"python": random.getstate(), "numpy": arrays})

    def restore(self, model: nn.Module) -> None:
        """Make these the present states; they may have been through JSON."""
        version, numbers, gauss = self.others["python"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(self.others["numpy"])
        torch.set_rng_state(self.tensors["cpu"])
        device = device_of(model)
        if device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], device)


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch (the CPU and the model's device), Python and numpy; restore their states afterwards."""
    before = RngState.now(model)
    try:
        torch.default_generator.manual_seed(seed)
        if "cuda" in before.tensors:
            with torch.cuda.device(device_of(model)):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        before.restore(model)


def generators(batches: object) -> tuple[torch.Generator, ...]:
    """The generators of its own that a `DataLoader` and its samplers draw from, each once."""
    batches = source_of(batches)
    if not isinstance(batches, DataLoader):
        return ()
    holders = (batches, batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None))
    owned = [getattr(holder, "generator", None) for holder in holders]
    return tuple({id(generator): generator for generator in owned if isinstance(generator, torch.Generator)}.values())


def states(generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
    """The state of each, uint8."""
    return tuple(generator.get_state() for generator in generators)


def restore(generators: Sequence[torch.Generator], before: Sequence[Tensor]) -> None:
    """Give each generator its state from `states`."""
    for generator, state in zip(generators, before, strict=True):
        cast(Any, generator).set_state(state)


_KEY = "spectrim-training"
_START_ANEW = "give another path, or delete the file to start from the beginning"


class Progress(Frozen):
    """The epochs that have ended, with the learning rate of their last step, and the sums of the present epoch."""

    curve: tuple[Epoch, ...] = ()
    rates: tuple[float, ...] = ()
    step: int = 0
    steps: int = 0  # batches of the present epoch, 0 if its data has no length
    loss: float = 0.0
    correct: int = 0
    labelled: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> int:
        """Position in the curve of the best epoch on held-out data."""
        return position_of_best(self.curve)


class _Header(Frozen):
    version: Literal[2] = 2
    run: str
    progress: Progress
    random_states: Mapping[str, Any] = Field(alias="chance")
    digest: str


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds besides weights and optimiser.

    How far the run has come; weights and buffers of the best epoch so far, if it is kept; random states after the last
    step, none between epochs, each of which is seeded; those that the generators of a `DataLoader` had when the present
    epoch began.
    """

    progress: Progress = field(default_factory=Progress)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    rng: RngState = field(default_factory=RngState)
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
            raise FileError(f"the checkpoint {self.path} is a folder; name a file in it, such as run.safetensors")
        require_writable_folder(self.path.parent)

    def save(self, model: nn.Module, optimiser: Optimizer, saved: Saved) -> None:
        """Write the state, wholly or not at all."""
        states = optimiser.state_dict()["state"].items()
        parts: dict[str, Mapping[str, Any]] = {f"optimiser.{index}": state for index, state in states}
        parts |= {"model": unique_tensors(model)[0], "best": saved.best, "chance": saved.rng.tensors}
        parts["loader"] = {str(at): state for at, state in enumerate(saved.loaders)}
        named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        own = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
        header = _Header(run=self.run, progress=saved.progress, chance=saved.rng.others, digest=digest(tensors))
        metadata = {_KEY: header.model_dump_json(by_alias=True)}
        write_atomically(self.path, lambda part: save_file(tensors, part, metadata=metadata))

    def restore(self, model: nn.Module, optimiser: Optimizer) -> Saved | None:
        """Put the saved state into `model` and `optimiser`, and return the rest; None if there is nothing to resume.

        Raises `FileError` if the file is damaged or of another run, and `unfit` is `refuse`.
        """
        if not self.path.exists():
            return None
        state: dict[int, dict[str, Tensor]] = {}
        try:
            header, parts = _read(self.path)
            for name, tensor in parts["optimiser"].items():
                index, _, entry = name.partition(".")
                state.setdefault(int(index), {})[entry] = tensor
            if (before := _parsed(header.run)) != (now := _parsed(self.run)):
                raise FileError(f"{self.path} is of another run: {_difference(before, now)}; {_START_ANEW}")
            if max(state, default=-1) >= sum(len(group["params"]) for group in optimiser.param_groups):
                raise FileError(f"{self.path} is of a run that trained more parameters; {_START_ANEW}")
            _fill(model, parts["model"], path=self.path)
        except FileError:
            if self.unfit == "refuse":
                raise
            return None
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        loaders = tuple(parts["loader"][str(at)] for at in range(len(parts["loader"])))
        return Saved(header.progress, parts["best"], RngState(parts["chance"], header.random_states), loaders)


def resumed(path: str | Path, model: nn.Module, *, which: Literal["best", "last"] = "best") -> nn.Module:
    """A copy of `model`, the network as it was given to `finetune`, with the weights in the checkpoint of a stopped
    run.

    Such as one stopped by a NaN loss. `which` takes the weights of the best epoch so far, if the run keeps it, or the
    last ones that were saved. Raises `FileError` for a file that is missing, damaged, of another network, or without a
    best epoch.
    """
    path = Path(path)
    weights = _read(path)[1]["best" if which == "best" else "model"]
    if not weights:
        raise FileError(f'{path} holds no best epoch: none has ended, or keep="best" was not given; take which="last"')
    copied = duplicate(model)
    _fill(copied, weights, path=path)
    return copied


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What identifies a network: `network`, a hash of names, shapes and number types, and `weights`, of the values."""
    tensors, aliases = unique_tensors(model)
    text = json.dumps([_kinds(tensors), aliases], sort_keys=True)
    return {"network": hashlib.sha256(text.encode()).hexdigest(), "weights": digest(tensors)}


def identity(model: nn.Module, teacher: nn.Module | None, settings: Mapping[str, object]) -> str:
    """JSON of what the checkpoint of a training run belongs to: the networks, and what else decides the run.

    Settings that older files lack are left out where they are None.
    """
    taught = None if teacher is None else fingerprint(teacher)["weights"]
    known = {name: value for name, value in settings.items() if value is not None or name not in ("loss", "axis")}
    return json.dumps({**fingerprint(model), "teacher": taught, **known}, sort_keys=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        # a tensor subclass may have no view as bytes
        sha.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _read(path: Path) -> tuple[_Header, Mapping[str, dict[str, Tensor]]]:
    """The header, and the tensors by part of the state and name in it."""
    try:
        with safe_open(path, framework="pt") as opened:
            header = _Header.model_validate_json((opened.metadata() or {}).get(_KEY, ""))
            # copies, since a tensor of safetensors may be a view of the file that the next save replaces
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except ValidationError as error:
        raise FileError(f"{path} is not the checkpoint of a training run; {_START_ANEW}") from error
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read the checkpoint {path}: {error}; if it is cut short, {_START_ANEW}") from error
    if digest(tensors) != header.digest:
        raise FileError(f"the checkpoint {path} is damaged: its checksum differs; {_START_ANEW}")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor
    return header, parts


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


def _difference(old: object, new: object) -> str:
    """The entries that differ, for identities that are JSON objects; for others only that they do."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "the file was written with other settings"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if "network" in names or "teacher" in names:
        names = [name for name in names if name not in ("weights", "trained")]
    return ", ".join(
        _DIFFERENCES.get(name, f"{name} was {json.dumps(old.get(name))} and is {json.dumps(new.get(name))}")
        for name in names
    )


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, list[object]]:
    """Shapes and number types."""
    return {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}


def _fill(model: nn.Module, values: Mapping[str, Tensor], *, path: Path) -> None:
    """Write values into the model's own tensors, if they are of this network."""
    tensors = unique_tensors(model)[0]
    if _kinds(tensors) != _kinds(values):
        raise FileError(f"{path} is of another network than this {type(model).__name__}; give the one it was made with")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
