"""What the types of transposed convolutions share; each has a file of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from spectrim.layers.types.base import Geometry, OnnxGraph, Positions
from spectrim.layers.types.convolution import Convolution


class TransposedConvolution(Convolution):
    """A transposed convolution over `dims` dimensions: weight (in, out / groups, *kernel).

    It is an ordinary convolution of the stretched input with the kernel turned round.
    """

    options = (*Convolution.options, "output_padding")
    methods = ("forward", "_output_padding")

    def geometry(self, layer: Any) -> Geometry:
        return replace(super().geometry(layer), transposed=True)

    def to_kernels(self, weight: Tensor, geometry: Geometry) -> Tensor:
        stored = weight.reshape(geometry.groups, geometry.into, geometry.out, *geometry.kernel)
        return stored.transpose(1, 2).flip(*range(3, stored.ndim))

    def to_weight(self, kernels: Tensor, geometry: Geometry) -> Tensor:
        return kernels.flip(*range(3, kernels.ndim)).transpose(1, 2).flatten(0, 1)

    def positions(self, layer: Any, x: Tensor, output: Tensor) -> Positions:
        positions = super().positions(layer, x, output)
        return replace(positions, kernel=positions.input)

    def _node(self, graph: OnnxGraph, layer: Any, names: Sequence[str], options: dict[str, Any]) -> str:
        return graph.node("ConvTranspose", names, output_padding=layer.output_padding, **options)

    def _windows(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        stretched = self._stretched(layer, x, output.shape[-self.dims :])
        return self._unfolded(stretched, layer.kernel_size, (1,) * self.dims, layer.dilation)

    def _stretched(self, layer: Any, x: Tensor, size: Sequence[int]) -> Tensor:
        """The input of the ordinary convolution: zeros between and around the entries of `x`."""
        sizes = ((n - 1) * step + 1 for n, step in zip(x.shape[2:], layer.stride, strict=True))
        wide = x.new_zeros(*x.shape[:2], *sizes)
        places = (slice(None, None, step) for step in layer.stride)
        wide[(slice(None), slice(None), *places)] = x
        pads: list[int] = []
        for axis in reversed(range(self.dims)):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            before = reach - int(layer.padding[axis])
            pads += [before, size[axis] - (wide.shape[2 + axis] + before - reach)]
        return functional.pad(wide, pads)
