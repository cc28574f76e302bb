"""Random states: seeded for an epoch, noted after a step, put back."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectrim.core.execution import device_of


@dataclass(frozen=True, eq=False)
class Chance:
    """The states of all generators that training draws from.

    Attributes:
        tensors: Torch's states, uint8: `cpu`, and `cuda` of the model's device if that is one.
        others: The states of Python's and numpy's global generators, as JSON can hold them.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def now(cls, model: nn.Module) -> "Chance":
        """The states as they are."""
        tensors = {"cpu": torch.get_rng_state()}
        device = device_of(model)
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        return cls(tensors, {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)})

    def put_back(self, model: nn.Module) -> None:
        """Make these the states again, after a way through JSON as well."""
        version, numbers, gauss = self.others["python"]
        random.setstate((version, tuple(numbers), gauss))
        arrays = dict(self.others["numpy"])
        arrays["state"] = arrays["state"] | {"key": np.asarray(arrays["state"]["key"], dtype=np.uint32)}
        np.random.set_state(arrays)
        torch.set_rng_state(self.tensors["cpu"])
        device = device_of(model)
        if device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], device)

    def as_json(self) -> dict[str, Any]:
        """`others`, with lists for arrays."""
        arrays = dict(self.others["numpy"])
        arrays["state"] = arrays["state"] | {"key": [int(one) for one in arrays["state"]["key"]]}
        return {"python": self.others["python"], "numpy": arrays}


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch (the CPU's and the model's device), Python and numpy, and put their states back afterwards."""
    before = Chance.now(model)
    try:
        torch.default_generator.manual_seed(seed)
        if "cuda" in before.tensors:
            with torch.cuda.device(device_of(model)):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        before.put_back(model)


def generators(batches: object) -> tuple[torch.Generator, ...]:
    """The generators of its own that a `DataLoader` and its samplers draw from, each once."""
    if not isinstance(batches, DataLoader):
        return ()
    inner = getattr(batches.batch_sampler, "sampler", None)
    holders = (batches, batches.sampler, batches.batch_sampler, inner)
    found = [getattr(holder, "generator", None) for holder in holders]
    return tuple({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def states(found: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
    """Their states, uint8."""
    return tuple(one.get_state() for one in found)


def put_back(found: Sequence[torch.Generator], before: Sequence[Tensor]) -> None:
    """Give each its state again."""
    for one, state in zip(found, before, strict=True):
        cast(Any, one).set_state(state)
