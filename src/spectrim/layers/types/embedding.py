"""`nn.Embedding` and `nn.EmbeddingBag`: their matrix multiplies a vector that is 1 at the index that is looked up."""

from typing import Any, ClassVar

from torch import Tensor, nn

from spectrim.layers.types.base import OnnxGraph, Positions
from spectrim.layers.types.transposed_linear import TransposedLinear


class Embedding(TransposedLinear):
    """`nn.Embedding`: weight (entries, size), stored as (in, out)."""

    name = "Embedding"
    base: ClassVar[type[nn.Module]] = nn.Embedding
    options: ClassVar[tuple[str, ...]] = ("padding_idx", "scale_grad_by_freq", "sparse")
    is_lookup = True

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        return self.base if issubclass(cls, self.base) else None

    def printed_options(self, layer: nn.Module) -> str:
        return super(TransposedLinear, self).printed_options(layer)

    def skip_reason(self, layer: Any) -> str | None:
        if layer.max_norm is not None:
            return f"it renormalises its rows (max_norm={layer.max_norm}), which a product does not"
        return None

    def positions(self, layer: nn.Module, x: Tensor, output: Tensor) -> Positions:
        # a look-up multiplies nothing; the factor after it has as many vectors as are given back
        return Positions(output=output.numel() // max(output.shape[-1], 1))

    def resized(
        self, layer: Any, *, into: int | None = None, out: int | None = None, bias: bool, axis: int | None = None
    ) -> nn.Module:
        entries, size = layer.weight.shape
        options = {name: getattr(layer, name) for name in self.options}
        return self.base(into or entries, out or size, **options, device="meta", dtype=layer.weight.dtype)

    def pointwise(self, layer: Any, *, into: int | None = None, out: int | None = None, bias: bool) -> nn.Module:
        return super().resized(layer, into=into, out=out, bias=bias)

    def add_to_graph(self, graph: OnnxGraph, layer: nn.Module, name: str, *, dimensions: int) -> str:
        return graph.node("Gather", [graph.constant(layer.weight), name])


class EmbeddingBag(Embedding):
    """`nn.EmbeddingBag` that sums or averages; its weight as that of `nn.Embedding`."""

    name = "EmbeddingBag"
    base = nn.EmbeddingBag
    options = ("mode", "padding_idx", "include_last_offset", "scale_grad_by_freq", "sparse")

    def skip_reason(self, layer: Any) -> str | None:
        if layer.mode == "max":
            return "it takes the largest entries of its rows (mode='max'), which do not pass through a product"
        return super().skip_reason(layer)
