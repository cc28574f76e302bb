"""Tensors inside nested values: tuples, lists, mappings, dataclasses and what other packages register with torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def tensors(value: Any, *, floats: bool = False) -> Iterator[Tensor]:
    """Every tensor in `value`, in order; of a nested tensor those inside it. With `floats` a float counts as well."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from leaf.unbind() if leaf.is_nested else (leaf,)
        elif floats and isinstance(leaf, float):
            yield torch.tensor(leaf)
        elif isinstance(leaf, Mapping):  # of a type that torch does not know, such as a tokenizer's batch
            yield from tensors(list(leaf.values()), floats=floats)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors([getattr(leaf, field.name, None) for field in fields(leaf)], floats=floats)


def addresses(values: Iterable[Tensor]) -> set[int]:
    """Where the values of matrices lie; views have the address of their base."""
    addresses: set[int] = set()
    for value in values:
        with suppress(RuntimeError, NotImplementedError):  # tensors without a storage of their own, such as sparse ones
            addresses |= {value.untyped_storage().data_ptr()} if value.ndim > 1 else set()
    return addresses - {0}


def map_tensors(value: Any, change: Callable[[Tensor], Any], *, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """`value` with `change` of every tensor and `other` of everything else.

    Mappings of types that torch does not know become dicts. A packed sequence counts as its data, which its orders
    follow to another device.
    """

    def at(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, PackedSequence):
            data = change(leaf.data)  # the sizes stay on the CPU
            orders = (order if order is None else order.to(data.device) for order in leaf[2:])
            return PackedSequence(data, leaf.batch_sizes, *orders)
        if isinstance(leaf, Mapping):
            return {key: map_tensors(item, change, other=other) for key, item in leaf.items()}
        return other(leaf)

    return pytree.tree_map(at, value, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def describe(value: Any) -> str:
    """Types and shapes, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    return type(value).__name__
