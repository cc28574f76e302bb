"""Hugging Face's `Conv1D`, which GPT-2 and its like are made of: a linear layer that stores its weight as (in, out)."""

from typing import cast

from torch import Tensor, nn

from spectrim.layers.types.base import Geometry
from spectrim.layers.types.linear import Linear


class TransposedLinear(Linear):
    """`transformers.pytorch_utils.Conv1D`, known by its name, so that transformers need not be imported."""

    name = "Conv1D"

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        named = (base for base in cls.__mro__ if base.__name__ == "Conv1D")
        return next((base for base in named if base.__module__ == "transformers.pytorch_utils"), None)

    def geometry(self, layer: nn.Module) -> Geometry:
        into, out = cast(Tensor, layer.weight).shape
        return Geometry(1, out, into)

    def shown_options(self, layer: nn.Module) -> str:
        geometry = self.geometry(layer)
        return f"nf={geometry.out}, nx={geometry.into}"

    def to_kernels(self, weight: Tensor, geometry: Geometry) -> Tensor:
        return weight.T.unsqueeze(0)

    def to_weight(self, kernels: Tensor, geometry: Geometry) -> Tensor:
        return kernels[0].T
