"""`nn.Linear`, and layers that do the same with their weight stored in another way."""

from typing import cast

from torch import Tensor, nn

from spectrim.layers.types.base import Geometry, LayerType, OnnxGraph, Positions, SampledPlaces, sample


class Linear(LayerType):
    """`nn.Linear`: weight (out, in), applied along the last dimension."""

    name = "Linear"

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        return nn.Linear if issubclass(cls, nn.Linear) else None

    def geometry(self, layer: nn.Module) -> Geometry:
        out, into = cast(Tensor, layer.weight).shape
        return Geometry(1, out, into)

    def positions(self, layer: nn.Module, x: Tensor, output: Tensor) -> Positions:
        vectors = output.numel() // max(output.shape[-1], 1)
        return Positions(vectors, vectors, vectors, vectors)

    def input_rows(self, layer: nn.Module, x: Tensor, *, output: Tensor, positions: SampledPlaces | None) -> Tensor:
        return _vectors(x, positions)

    def output_rows(self, layer: nn.Module, output: Tensor, *, positions: SampledPlaces | None) -> Tensor:
        return _vectors(output, positions).clone()

    def feature_dim(self, layer: nn.Module) -> int:
        return -1

    def resized(
        self, layer: nn.Module, *, into: int | None = None, out: int | None = None, bias: bool, axis: int | None = None
    ) -> nn.Module:
        geometry, weight = self.geometry(layer), cast(Tensor, layer.weight)
        return nn.Linear(into or geometry.into, out or geometry.out, bias=bias, device="meta", dtype=weight.dtype)

    def pointwise(self, layer: nn.Module, *, into: int | None = None, out: int | None = None, bias: bool) -> nn.Module:
        return self.resized(layer, into=into, out=out, bias=bias)

    def add_to_graph(self, graph: OnnxGraph, layer: nn.Module, name: str, *, dimensions: int) -> str:
        weight, bias = self.kernels(layer)[0], layer._parameters.get("bias")
        if dimensions == 2:  # as exporters write it
            constants = [graph.constant(weight), *([] if bias is None else [graph.constant(bias)])]
            return graph.node("Gemm", [name, *constants], transB=1)
        product = graph.node("MatMul", [name, graph.constant(weight.T)])
        return product if bias is None else graph.node("Add", [product, graph.constant(bias)])


def _vectors(tensor: Tensor, positions: SampledPlaces | None) -> Tensor:
    """Vectors (batch, .., size), sampled over what lies between, as (1, n, size)."""
    if tensor.ndim < 3:
        return tensor.reshape(1, -1, tensor.shape[-1])
    between = tensor.flatten(1, -2)
    chosen = sample(between.shape[1], positions, sequence=tensor.ndim == 3)
    return between[:, chosen.to(tensor.device)].flatten(0, 1).unsqueeze(0)
