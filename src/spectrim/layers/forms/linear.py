"""The linear form: a matrix as the product of two thin ones, y = up(down(x)); of 1x1 convolutions too."""

from typing import cast, final

from torch import Tensor, nn

from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.channel import TwoFactorForm, TwoFactors, conv_chain
from spectrim.layers.types import Geometry, LayerType
from spectrim.linalg import Ranks


@final
class LowRankLinear(TwoFactors):
    """A linear layer as the product of two thin ones: y = up(down(x)).

    Attributes:
        down: `nn.Linear(in_features, rank, bias=False)`.
        up: `nn.Linear(rank, out_features)`, with the bias, if any.

    Shapes:
        input (..., in_features), output (..., out_features), as for `nn.Linear`.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    def __init__(self, down: nn.Linear, up: nn.Linear, *, dense: nn.Module | None = None) -> None:
        super().__init__((down, up), dense)
        self.down = down
        self.up = up

    @property
    def form(self) -> str:
        """`linear`."""
        return "linear"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply both factors."""
        y: Tensor = self.up(self.down(input))
        return y


class LinearForm(TwoFactorForm):
    """Layers that multiply each vector by one matrix."""

    name = "linear"

    def fits_shape(self, geometry: Geometry) -> bool:
        return geometry.is_pointwise

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        if layer_type.geometry(layer).kernel:
            return conv_chain(layer, layer_type, ranks, bias=bias)
        down = layer_type.resized(layer, out=ranks[0], bias=False)
        up = layer_type.pointwise(layer, into=ranks[0], bias=bias)
        return LowRankLinear(cast(nn.Linear, down), cast(nn.Linear, up), dense=layer)
