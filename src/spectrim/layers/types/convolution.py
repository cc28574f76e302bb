"""What the types of convolutions share; each has a file of its own."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.layers.types.base import Geometry, LayerType, OnnxGraph, Positions, SampledPlaces, sample

_ONNX_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
_NEUTRAL = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
"""Along an axis in which a layer does nothing."""


class Convolution(LayerType):
    """A convolution over `dims` dimensions: weight (out, in / groups, *kernel).

    Attributes:
        base: The class.
        plain: The class of an ordinary convolution over the same tensors.
        dims: Dimensions of the kernel.
        options: Attributes that are arguments of the class, besides sizes and groups.
    """

    base: ClassVar[Callable[..., nn.Module]]
    plain: ClassVar[Callable[..., nn.Module]]
    dims: ClassVar[int]
    options: ClassVar[tuple[str, ...]] = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    methods = ("forward", "_conv_forward")

    @property
    def weight_dims(self) -> int:
        return self.dims + 2

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        base = cast(type[nn.Module], self.base)
        return base if issubclass(cls, base) else None

    def geometry(self, layer: Any) -> Geometry:
        out, into = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        return Geometry(layer.groups, out, into, tuple(layer.weight.shape[2:]))

    def positions(self, layer: Any, x: Tensor, output: Tensor) -> Positions:
        out, into = output.numel() // layer.out_channels, x.numel() // layer.in_channels
        mixed = out // max(output.shape[-1], 1) * x.shape[-1]
        return Positions(output=out, kernel=out, mixed=mixed, input=into)

    def input_rows(self, layer: Any, x: Tensor, *, output: Tensor, positions: SampledPlaces | None) -> Tensor:
        windows = self._windows(layer, self._batched(x), output).movedim(1, 1 + self.dims)
        images, *places = windows.shape[: 1 + self.dims]
        # picked from a view, so that only the sampled windows are ever copied
        chosen = sample(prod(places), positions)
        index: list[Any] = [indices.to(x.device) for indices in torch.unravel_index(chosen, places)]
        rows: Tensor = windows[(slice(None), *index)]
        return rows.reshape(images * len(chosen), layer.groups, -1).movedim(1, 0)

    def output_rows(self, layer: Any, output: Tensor, *, positions: SampledPlaces | None) -> Tensor:
        rows = self._batched(output).flatten(2).mT
        rows = rows[:, sample(rows.shape[1], positions).to(rows.device)]
        return rows.reshape(rows.shape[0] * rows.shape[1], layer.groups, -1).movedim(1, 0)

    def feature_dim(self, layer: Any) -> int:
        return -1 - self.dims

    def resized(
        self, layer: Any, *, into: int | None = None, out: int | None = None, bias: bool, axis: int | None = None
    ) -> nn.Module:
        options = {name: _along(name, getattr(layer, name), axis) for name in self.options}
        return self._convolution(self.base, layer, into, out, bias=bias, **options)

    def pointwise(self, layer: Any, *, into: int | None = None, out: int | None = None, bias: bool) -> nn.Module:
        return self._convolution(self.plain, layer, into, out, bias=bias, kernel_size=1)

    def add_to_graph(self, graph: OnnxGraph, layer: Any, name: str, *, dimensions: int) -> str:
        before, after = _pads(layer)
        if layer.padding_mode != "zeros":
            amounts = graph.constant(np.array([0, 0, *before, 0, 0, *after], dtype=np.int64))
            name = graph.node("Pad", [name, amounts], mode=_ONNX_MODES[layer.padding_mode])
            before, after = [0] * len(before), [0] * len(after)
        options = {
            "kernel_shape": layer.kernel_size,
            "strides": layer.stride,
            "dilations": layer.dilation,
            "group": layer.groups,
            "pads": [*before, *after],
        }
        constants = [graph.constant(layer.weight), *([] if layer.bias is None else [graph.constant(layer.bias)])]
        return self._node(graph, layer, [name, *constants], options)

    def _node(self, graph: OnnxGraph, layer: Any, names: Sequence[str], options: dict[str, Any]) -> str:
        return graph.node("Conv", names, **options)

    def _convolution(
        self, cls: Callable[..., nn.Module], layer: Any, into: int | None, out: int | None, **options: Any
    ) -> nn.Module:
        sizes = into or layer.in_channels, out or layer.out_channels
        return cls(*sizes, groups=layer.groups, device="meta", dtype=layer.weight.dtype, **options)

    def _windows(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """What the kernel sees at each place, as a view: (images, channels, *places, *kernel)."""
        # torch keeps the padding of every mode, `same` included, as pairs from the last dimension on
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        return self._unfolded(padded, layer.kernel_size, layer.stride, layer.dilation)

    def _unfolded(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        for axis in range(self.dims):
            x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        steps: list[Any] = [slice(None, None, step) for step in dilation]
        return x[(..., *steps)]

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == self.dims + 2 else tensor.unsqueeze(0)


def _along(name: str, option: Any, axis: int | None) -> Any:
    """An option as it is along one axis, and such that the layer does nothing along the others."""
    if axis is None or isinstance(option, str):
        return option
    return tuple(value if place == axis else _NEUTRAL[name] for place, value in enumerate(option))


def _pads(layer: Any) -> tuple[list[int], list[int]]:
    """Places added before and after, by dimension."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        whole = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [places // 2 for places in whole], [places - places // 2 for places in whole]
    sides = [int(places) for places in layer.padding]
    return sides, sides
