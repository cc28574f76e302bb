"""Linear layers that store their weight as (in, out), such as Hugging Face's `Conv1D` in GPT-2."""

from typing import cast

import torch
from torch import Tensor, nn

from spectrim.layers.types.base import Geometry
from spectrim.layers.types.linear import Linear


class TransposedWeight(nn.Module):
    """y = x W with a weight W (in, out), which may be the weight (out, in) of another layer as well.

    Shapes:
        input (..., in), output (..., out).
    """

    bias: None = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return torch.matmul(x, self.weight)

    def extra_repr(self) -> str:
        """The sizes."""
        return "in_features={}, out_features={}".format(*self.weight.shape)


class TransposedLinear(Linear):
    """`transformers.pytorch_utils.Conv1D`, known by its name, so that transformers need not be imported.

    And `TransposedWeight`.
    """

    name = "Conv1D"

    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        if issubclass(cls, TransposedWeight):
            return TransposedWeight
        named = (base for base in cls.__mro__ if base.__name__ == "Conv1D")
        return next((base for base in named if base.__module__ == "transformers.pytorch_utils"), None)

    def geometry(self, layer: nn.Module) -> Geometry:
        into, out = cast(Tensor, layer.weight).shape
        return Geometry(1, out, into)

    def printed_options(self, layer: nn.Module) -> str:
        geometry = self.geometry(layer)
        return f"nf={geometry.out}, nx={geometry.into}"

    def to_kernels(self, weight: Tensor, geometry: Geometry) -> Tensor:
        return weight.T.unsqueeze(0)

    def to_weight(self, kernels: Tensor, geometry: Geometry) -> Tensor:
        return kernels[0].T
