"""Multiply-accumulates of the operators that torch's counter has no formula for, and which are not counted at all."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop

from spectrim.core.dispatch import OperatorMode
from spectrim.core.nested import extent, extents, overlap

Sizes = Sequence[int]

_LISTS = {"aten", "prim", "prims", "profiler", "_c10d_functional", "c10d"}
"""Lists of operators whose own products are counted; what others compute is not known."""

_UNCOUNTED_PREFIXES = ("_fft_", "fft_", "linalg_", "_linalg_", "_cdist", "grid_sampler", "stft", "histc")
_COUNTED = {"linalg_vector_norm", "_linalg_check_errors"}
_COUNTED_OF_OTHERS = {"torchvision::deform_conv2d", "transformers::grouped_mm_fallback"}


def formulas() -> Mapping[Any, Callable[..., int]]:
    """FLOPs (2 for each multiply-accumulate) from the shapes of an operator's arguments."""
    aten = torch.ops.aten
    known: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_fused_attention_overrideable: _attention,
        aten.mkldnn_rnn_layer: _recurrent_layer,
        aten._cudnn_rnn: _recurrent_layers,
        aten._trilinear: _trilinear,
        aten.mv: lambda matrix, _, **__: 2 * math.prod(matrix),
        aten.addmv: lambda _, matrix, vector, **__: 2 * math.prod(matrix),
        aten.dot: lambda first, _, **__: 2 * math.prod(first),
        aten.vdot: lambda first, _, **__: 2 * math.prod(first),
        aten.addbmm: lambda _, first, second, **__: 2 * math.prod(first) * second[-1],
        aten._int_mm: lambda first, second, **__: 2 * math.prod(first) * second[-1],
    }
    if hasattr(aten, "_grouped_mm"):
        known[aten._grouped_mm] = _grouped
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known[torch.ops.transformers.grouped_mm_fallback] = _grouped
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        known[torch.ops.torchvision.deform_conv2d] = _deformable
    return known


def _attention(query: Sizes, key: Sizes, value: Sizes, *_: Any, **__: Any) -> int:
    return int(sdpa_flop(query, key, value))


def _recurrent_layer(rows: Sizes, into: Sizes, back: Sizes, *_: Any, **__: Any) -> int:
    """One direction of one layer: `rows` are (time, batch, features), or those of packed sequences (rows, features)."""
    return 2 * math.prod(rows[:-1]) * (math.prod(into) + math.prod(back))


def _recurrent_layers(rows: Sizes, weights: Sequence[Sizes], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


def _trilinear(first: Sizes, second: Sizes, third: Sizes, *expanded: Any, **_: Any) -> int:
    """Of a sum over products of three tensors, each with further dimensions at the places in `expanded`."""
    shapes = [_expanded(shape, places) for shape, places in zip((first, second, third), expanded, strict=False)]
    sizes: list[int] = [max(each) for each in zip(*shapes, strict=True)]
    return 2 * math.prod(sizes)


def _expanded(shape: Sizes, places: Iterable[int]) -> list[int]:
    sizes = list(shape)
    for place in sorted(places):
        sizes.insert(place, 1)
    return sizes


def _grouped(rows: Sizes, matrices: Sizes, *_: Any, **__: Any) -> int:
    """Each row times one of the matrices, or each group of rows times its own."""
    return 2 * math.prod(rows) * matrices[-1]


def _deformable(_: Sizes, weight: Sizes, *__: Any, out_shape: Sizes, **___: Any) -> int:
    """A convolution of samples; the samples themselves are interpolated, which is not counted."""
    batch, channels, *places = out_shape
    return 2 * batch * channels * math.prod(places) * math.prod(weight[1:])


class UncountedOperators(OperatorMode):
    """Collects what is run but not counted, although it may multiply.

    Attributes:
        names: Such as `aten::_fft_r2c`, in order.
        weighted: Those of them that were given a weight.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.names: dict[str, None] = {}
        self.weighted: dict[str, None] = {}
        self._weights = tuple(weights)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, and note its name if it is not counted."""
        name = operator.name().partition(".")[0]
        nested = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_nested]
        if any(leaf.layout == torch.jagged for leaf in nested):
            return NotImplemented  # it comes again with the values inside, whose sizes torch's counter can read
        if nested or _is_uncounted(name):
            self.names[name] = None
            operands = extents((args, kwargs))
            if any(overlap(extent(weight), operand) for weight in self._weights for operand in operands):
                self.weighted[name] = None
        with _disable_current_modes() if nested else nullcontext():
            return operator(*args, **(kwargs or {}))


def _is_uncounted(name: str) -> bool:
    library, _, operator = name.partition("::")
    if library not in _LISTS:
        return name not in _COUNTED_OF_OTHERS
    return operator.startswith(_UNCOUNTED_PREFIXES) and operator not in _COUNTED
