"""What a pass through a network allocates."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.core.dispatch import OperatorMode
from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.nested import size_of, storage_of, stored_tensors


@dataclass(frozen=True)
class Allocations:
    """Bytes of the tensors of one pass over the example, without gradients.

    Attributes:
        alive: The most that are alive together.
        total: All of them.
        operator: The most that one operator reads and writes, which it may copy into a layout of its own.
        outputs: Those that the network returns.
    """

    alive: int
    total: int
    operator: int
    outputs: int

    @classmethod
    def of(cls, model: nn.Module, example: Inputs) -> "Allocations":
        """Run the model once."""
        counter = _AllocationCounter(model)
        with evaluating(model), counter:
            outputs = call(model, example)
        return cls(counter.most, counter.total, counter.operator, size_of(outputs))


class _AllocationCounter(OperatorMode):
    """Counts the memory of new tensors, and takes it off again where it is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive = self.most = self.total = self.operator = 0
        self._weights = {_key(tensor) for tensor in _stored([*model.parameters(), *model.buffers()])}
        self._known = set(self._weights)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.layout == torch.jagged for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # it comes again with the values inside
        result = operator(*args, **(kwargs or {}))
        used = [tensor for tensor in _stored((args, kwargs, result)) if _key(tensor) not in self._weights]
        self.operator = max(self.operator, size_of(used))
        for tensor in _stored(result):
            key, storage = _key(tensor), storage_of(tensor)
            if storage is not None and key not in self._known:
                self._known.add(key)
                size = storage.nbytes()
                self.alive, self.total = self.alive + size, self.total + size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int | None, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _stored(value: Any) -> list[Tensor]:
    """The dense tensors in what an operator is given or gives; none of nested ones."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_nested)
    return list(stored_tensors(list(leaves)))


def _key(tensor: Tensor) -> int | None:
    """What tells a tensor's memory from that of others."""
    storage = storage_of(tensor)
    return None if storage is None else int(storage._cdata)
