"""The tucker2 form: fewer channels, the kernel between few channels, then out (Kim 2016)."""

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.base import SingleWeightForm
from spectrim.layers.types import Geometry, LayerType, Positions, layer_type_of
from spectrim.linalg import Factors, Ranks, Tucker2Decomposition


@final
class Tucker2Conv2d(FactoredLayer):
    """An `nn.Conv2d` in the tucker2 form: fewer channels, the kernel between few channels, then out (Kim 2016).

    Attributes:
        down: in -> rank_in a group, a kernel of 1; no bias.
        core: rank_in -> rank a group, with the kernel, stride, padding, padding mode and dilation; no bias.
        up: rank -> out, a kernel of 1, with the bias, if any.

    Raises:
        ModelError: the layers do not fit together, or one but the last has a bias.
    """

    def __init__(self, down: nn.Conv2d, core: nn.Conv2d, up: nn.Conv2d, *, dense: nn.Module | None = None) -> None:
        super().__init__((down, core, up), dense)
        if {*down.kernel_size, *up.kernel_size, *down.stride, *up.stride} != {1}:
            raise ModelError(f"down ({down}) and up ({up}) must have a kernel and a stride of 1")
        self.down, self.core, self.up = down, core, up

    @staticmethod
    def _assembled(*chain: nn.Module) -> nn.Module:
        down, core, up = cast(tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d], chain)
        sizes = {"into": down.in_channels, "out": up.out_channels}
        return layer_type_of(core).resized(core, **sizes, bias=up.bias is not None)

    @property
    def form(self) -> str:
        """`tucker2`."""
        return "tucker2"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply the three factors."""
        y: Tensor = self.up(self.core(self.down(input)))
        return y

    @staticmethod
    def composed(factors: Factors) -> Tensor:
        down, core, up = factors
        return torch.einsum("gos,gsrhw,gri->goihw", up.flatten(2), core, down.flatten(2))


class Tucker2Form(SingleWeightForm):
    """Ordinary two-dimensional convolutions with a kernel."""

    name = "tucker2"
    rank_count = 2
    decomposition = Tucker2Decomposition

    def fits_shape(self, geometry: Geometry) -> bool:
        return len(geometry.kernel) == 2 and not (geometry.is_pointwise or geometry.transposed)

    def factor_shapes(self, geometry: Geometry, ranks: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        first, second = ranks
        return (first, geometry.into), (second, first, *geometry.kernel), (geometry.out, second)

    def factor_positions(self, positions: Positions) -> tuple[int, ...]:
        return positions.input, positions.output, positions.output

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        first, second = ranks
        down = layer_type.pointwise(layer, out=first, bias=False)
        core = layer_type.resized(layer, into=first, out=second, bias=False)
        up = layer_type.pointwise(layer, into=second, bias=bias)
        return Tucker2Conv2d(*cast(tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d], (down, core, up)), dense=layer)
