"""Tensors inside nested values: tuples, lists, mappings, dataclasses and what other packages register with torch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence, unpack_sequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spectrim.core.errors import DataError

_SCALARS = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


def tensors(value: Any, *, floats: bool = False) -> Iterator[Tensor]:
    """Every tensor in `value`, in order; of a nested tensor those inside it. With `floats` a float counts as well."""
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            yield from leaf.unbind() if leaf.is_nested else (leaf,)
        elif isinstance(leaf, PackedSequence):
            yield from (part for part in leaf if part is not None)
        elif floats and isinstance(leaf, float):
            yield torch.tensor(leaf)


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor that a function of torch is called with; as `tensors`, but fast, since most have plain arguments."""
    for value in (*args, *kwargs.values()):
        if type(value) is Tensor or type(value) is nn.Parameter:
            yield value
        elif not isinstance(value, _SCALARS):
            yield from tensors(value)


def fractions(value: Any) -> list[Tensor]:
    """Every tensor in `value` that holds fractions, dense; a complex one as (.., 2) real and imaginary parts."""
    dense = (part if part.layout == torch.strided else part.to_dense() for part in tensors(value))
    parts = (torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in dense)
    return [part for part in parts if part.is_floating_point()]


def rows(value: Any) -> Iterator[Tensor]:
    """As `tensors`, but of nested tensors and packed sequences one row (flat, padded) for each part."""
    for leaf in _leaves(value):
        if _is_ragged(leaf):
            parts = unpack_sequence(leaf) if isinstance(leaf, PackedSequence) else leaf.unbind()
            yield pad_sequence([part.flatten() for part in parts], batch_first=True)
        elif isinstance(leaf, Tensor):
            yield leaf


def is_in_transform(value: Tensor) -> bool:
    """Whether a tensor hides its values, as inside of vmap, grad or jvp of `torch.func`."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def joined(value: Tensor) -> Tensor:
    """The parts of a nested tensor one after the other; any other tensor as it is."""
    return torch.cat(value.unbind()) if value.is_nested else value


def _leaves(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value, is_leaf=_is_packed):
        if isinstance(leaf, Mapping):  # of a type that torch does not know, such as a tokenizer's batch
            yield from _leaves(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, field.name, None) for field in fields(leaf)])
        else:
            yield leaf


def has_ragged(value: Any) -> bool:
    """Whether there is a nested tensor or a packed sequence in `value`."""
    return any(map(_is_ragged, _leaves(value)))


def _is_ragged(leaf: Any) -> bool:
    return leaf.is_nested if isinstance(leaf, Tensor) else _is_packed(leaf)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)  # a tuple, whose entries have no meaning of their own


def is_plain(tensor: Tensor) -> bool:
    """Whether it is of torch's own classes, and not of one with values of its own kind, such as quantised ones."""
    return not is_traceable_wrapper_subclass(tensor)


_SPARSE_PARTS = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), (Tensor.crow_indices, Tensor.col_indices, Tensor.values)),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), (Tensor.ccol_indices, Tensor.row_indices, Tensor.values)),
}


def stored_tensors(value: Any) -> Iterator[Tensor]:
    """The dense tensors that those in `value` consist of: sparse and nested ones, and other packages', of several."""
    for tensor in tensors(value):
        if not is_plain(tensor):
            yield from stored_tensors([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])  # type: ignore[attr-defined]
        else:
            parts = _SPARSE_PARTS.get(tensor.layout)
            yield from (tensor,) if parts is None else (part(tensor) for part in parts)


def size_of(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(value))


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """The memory that a tensor looks into; None for one without, as a sparse one."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def extent(value: Tensor) -> range:
    """The addresses between which the values of a matrix lie; none for vectors and for tensors that are no weights.

    These are nested and sparse ones, and those of other packages, whose values lie elsewhere.
    """
    dense = value.layout == torch.strided and not value.is_nested and is_plain(value)
    if not dense or value.ndim < 2 or not value.numel():
        return range(0)
    places = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = 0
    with suppress(RuntimeError):  # classes of other packages need not have values
        start = value.data_ptr()
    return range(start, start + places * value.element_size() if start else 0)


def extents(values: Any) -> list[range]:
    """Those of all tensors in `values`; nested ones are not looked into."""
    return [extent(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def overlap(first: range, second: range) -> bool:
    """Whether two extents have an address in common."""
    return max(first.start, second.start) < min(first.stop, second.stop)


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

    return pytree.tree_map(at, value, is_leaf=_is_packed)


def from_numpy(value: Any) -> Any:
    """`value` with a tensor, a copy, in place of every NumPy array.

    Raises:
        DataError: an array that holds no numbers.
    """

    def as_tensor(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        try:
            return torch.from_numpy(np.array(leaf, order="C"))
        except TypeError as error:
            raise DataError(f"an array of {leaf.dtype} {list(leaf.shape)} makes no tensor; give numbers") from error

    if not any(isinstance(leaf, np.ndarray | Mapping) for leaf in pytree.tree_leaves(value)):
        return value
    return map_tensors(value, lambda tensor: tensor, other=as_tensor)


def logits_of(outputs: Any) -> Any:
    """The entry "logits" of a mapping of outputs, or its only one; other outputs as they are."""
    entries = list(outputs.values()) if isinstance(outputs, Mapping) and len(outputs) == 1 else [outputs]
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else entries[0]


def tensor_of(labels: Any) -> Tensor | None:
    """The labels as a tensor, if they make one."""
    try:
        return None if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None


def describe(value: Any, *, most: int = 8) -> str:
    """Types and shapes, for messages; of long sequences and mappings the first entries."""
    if isinstance(value, Tensor) and value.is_nested:
        return f"nested {describe(list(value.unbind()), most=most)}"
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {list(value.shape)}" if isinstance(value, Tensor) else f"array of {kind} {list(value.shape)}"
    if isinstance(value, tuple | list):
        entries = [describe(entry) for entry in value[:most]]
    elif isinstance(value, Mapping):
        entries = [f"{name}={describe(entry)}" for name, entry in islice(value.items(), most)]
    else:
        return type(value).__name__
    return f"{type(value).__name__}({', '.join([*entries, '..'] if len(value) > most else entries)})"


def alike(first: Any, second: Any) -> bool:
    """Whether all tensors in two values agree to 1e-4 of their largest entry; NaN and infinity equal themselves."""
    pairs = [list(tensors(value, floats=True)) for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(map(_close, *pairs))


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    tolerance = max(1e-4, 2 * torch.finfo(first.dtype).eps) if first.is_floating_point() else 1e-4
    first, second = _ordinary(first), _ordinary(second)
    if not (first.is_floating_point() or first.is_complex()):
        return torch.equal(first, second)
    scale = float(first.abs().nan_to_num(0.0, 0.0, 0.0).max()) if first.numel() else 0.0
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


def _ordinary(tensor: Tensor) -> Tensor:
    """A dense tensor whose number type has all operations."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.detach()
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
