"""The last factor of the interpolative form: a matrix some of whose rows are those of the identity."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.layers.types.base import Geometry, OnnxGraph, Positions
from spectrim.layers.types.linear import Linear


class Interpolation(nn.Module):
    """Outputs of which some are the inputs, and the others are made from them: [x, W x], in another order.

    Attributes:
        weight: W, (out - into, into).
        bias: (out,), or None.
        order: int64 (out,): where each output lies in [x, W x]; its own inverse.
        dims: Dimensions of a map, as convolutions have them behind the features; 0 where these come last.
        is_square: Whether there are no outputs besides the inputs.

    Shapes:
        input (..., into, *map), output (..., out, *map).
    """

    bias: Tensor | None
    order: Tensor

    def __init__(self, into: int, out: int, *, dims: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.dims, self.is_square = dims, into == out
        self.weight = nn.Parameter(torch.empty(out - into, into, device="meta", dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out, device="meta", dtype=dtype)) if bias else None)
        self.register_buffer("order", torch.arange(out, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, and put the outputs in order."""
        dim, last = x.dim() - 1 - self.dims, x.dim() - 1  # below zero, torch's older exporter writes them wrongly
        y = x
        if not self.is_square:
            y = torch.cat([x, functional.linear(x.movedim(dim, last), self.weight).movedim(last, dim)], dim)
        y, bias = y.index_select(dim, self.order), self.bias
        return y if bias is None else y + bias.to(y.dtype).reshape([-1] + [1] * self.dims)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.weight.shape[1]}, out_features={len(self.order)}"


class InterpolationType(Linear):
    """`Interpolation`: a weight without the rows of the identity, which depend on the layer's order."""

    name = "Interpolation"

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        return Interpolation if issubclass(cls, Interpolation) else None

    def geometry(self, layer: nn.Module) -> Geometry:
        own = cast(Interpolation, layer)
        into = own.weight.shape[1]
        return Geometry(1, len(own.order), into, (1,) * own.dims, identity=into)

    def kernels(self, layer: nn.Module, weight: Tensor | None = None) -> Tensor:
        own, geometry = cast(Interpolation, layer), self.geometry(layer)
        weight = own.weight if weight is None else weight
        identity = torch.eye(geometry.into, dtype=weight.dtype, device=weight.device)
        return torch.cat([identity, weight])[own.order.to(weight.device)].reshape(geometry.shape)

    def positions(self, layer: nn.Module, x: Tensor, output: Tensor) -> Positions:
        vectors = output.numel() // max(1, self.geometry(layer).out)
        return Positions(vectors, vectors, vectors, vectors)

    def feature_dim(self, layer: nn.Module) -> int:
        return -1 - cast(Interpolation, layer).dims

    def add_to_graph(self, graph: OnnxGraph, layer: nn.Module, name: str, *, dimensions: int) -> str:
        own = cast(Interpolation, layer)
        weight: Any = own.weight.detach()
        if own.dims:
            rest = graph.node("Conv", [name, graph.constant(weight.reshape(*weight.shape, *[1] * own.dims))])
        else:
            rest = graph.node("MatMul", [name, graph.constant(weight.T)])
        axis = dimensions - 1 - own.dims
        y = graph.node("Concat", [name, rest], axis=axis) if len(weight) else name
        y = graph.node("Gather", [y, graph.constant(own.order)], axis=axis)
        bias = None if own.bias is None else own.bias.detach().reshape(-1, *[1] * own.dims)
        return y if bias is None else graph.node("Add", [y, graph.constant(bias)])
