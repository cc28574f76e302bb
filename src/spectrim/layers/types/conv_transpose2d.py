"""`nn.ConvTranspose2d`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from spectrim.layers.types.base import Geometry, OnnxGraph, Positions
from spectrim.layers.types.convolution import Convolution


class ConvTranspose2d(Convolution):
    """`nn.ConvTranspose2d`: weight (in, out / groups, height, width).

    It is an ordinary convolution of the stretched input with the kernel turned round.
    """

    name = "ConvTranspose2d"
    base = nn.ConvTranspose2d
    plain = nn.Conv2d
    dims = 2
    options = (*Convolution.options, "output_padding")
    methods = ("forward", "_output_padding")

    def geometry(self, layer: Any) -> Geometry:
        return replace(super().geometry(layer), transposed=True)

    def to_kernels(self, weight: Tensor, geometry: Geometry) -> Tensor:
        stored = weight.reshape(geometry.groups, geometry.into, geometry.out, *geometry.kernel)
        return stored.transpose(1, 2).flip(-1, -2)

    def to_weight(self, kernels: Tensor, geometry: Geometry) -> Tensor:
        return kernels.flip(-1, -2).transpose(1, 2).flatten(0, 1)

    def positions(self, layer: Any, x: Tensor, output: Tensor) -> Positions:
        positions = super().positions(layer, x, output)
        return replace(positions, kernel=positions.input)

    def _node(self, graph: OnnxGraph, layer: Any, names: Sequence[str], options: dict[str, Any]) -> str:
        return graph.node("ConvTranspose", names, output_padding=layer.output_padding, **options)

    def _windows(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        stretched = _stretched(layer, x, output.shape[-2:])
        return self._unfolded(stretched, layer.kernel_size, (1, 1), layer.dilation)


def _stretched(layer: Any, x: Tensor, size: Sequence[int]) -> Tensor:
    """The input of the ordinary convolution that a transposed one amounts to: zeros between and around its entries."""
    height, width = ((n - 1) * step + 1 for n, step in zip(x.shape[-2:], layer.stride, strict=True))
    wide = x.new_zeros(*x.shape[:2], height, width)
    wide[:, :, :: layer.stride[0], :: layer.stride[1]] = x
    pads: list[int] = []
    for axis in (1, 0):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        before = reach - int(layer.padding[axis])
        pads += [before, size[axis] - (wide.shape[2 + axis] + before - reach)]
    return functional.pad(wide, pads)
