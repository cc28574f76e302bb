"""The layers that take a dense layer's place: ordinary modules made of ordinary modules."""

from typing import final

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError


def blank_linear(into: int, out: int, *, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` with unset values, made without drawing random numbers."""
    layer = nn.Linear(into, out, bias=bias, device="meta", dtype=dtype)
    return layer if device.type == "meta" else layer.to_empty(device=device)


@final
class LowRankLinear(nn.Module):
    """A linear layer as the product of two thin ones: y = up(down(x)).

    Attributes:
        down: `nn.Linear(in_features, rank, bias=False)`.
        up: `nn.Linear(rank, out_features)`, with the bias, if any.

    Shapes:
        input (..., in_features), output (..., out_features), as for `nn.Linear`.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        if down.out_features != up.in_features or "bias" in dict(down.named_parameters()):
            raise ModelError(
                f"down ({down}) must have no bias and as many outputs as up ({up}) has inputs; "
                "build them as nn.Linear(in, rank, bias=False) and nn.Linear(rank, out)"
            )
        self.down = down
        self.up = up

    @classmethod
    def empty_like(cls, layer: nn.Linear, *, rank: int, bias: bool) -> "LowRankLinear":
        """Unset factors with the device, type, training and gradient flags of `layer`. Draws no random numbers."""
        kind, place = layer.weight.dtype, layer.weight.device
        down = blank_linear(layer.in_features, rank, bias=False, device=place, dtype=kind)
        up = blank_linear(rank, layer.out_features, bias=bias, device=place, dtype=kind)
        made = cls(down, up).train(layer.training)
        return made.requires_grad_(layer.weight.requires_grad)

    @property
    def in_features(self) -> int:
        """Size of the last input dimension."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of the last output dimension."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Number of singular values kept."""
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """The product (out, in), made anew at each access, for code that looks at a linear layer's weight."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors: (..., in_features) -> (..., out_features)."""
        y: Tensor = self.up(self.down(x))
        return y

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them, and the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
