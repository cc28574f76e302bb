"""Random states: seeded for an epoch, read after a step, restored."""

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
class RngState:
    """The states of all global generators that training draws from, or of none.

    Attributes:
        tensors: Of torch, uint8: `cpu`, and `cuda` for the model's device if that is one.
        others: Of Python and numpy, in types that JSON has.
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
    if not isinstance(batches, DataLoader):
        return ()
    inner = getattr(batches.batch_sampler, "sampler", None)
    holders = (batches, batches.sampler, batches.batch_sampler, inner)
    owned = [getattr(holder, "generator", None) for holder in holders]
    return tuple({id(generator): generator for generator in owned if isinstance(generator, torch.Generator)}.values())


def states(generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
    """The state of each, uint8."""
    return tuple(generator.get_state() for generator in generators)


def restore(generators: Sequence[torch.Generator], before: Sequence[Tensor]) -> None:
    """Give each generator its state from `states`."""
    for generator, state in zip(generators, before, strict=True):
        cast(Any, generator).set_state(state)
