"""The spatial form: a column of the kernel first, a row second (Jaderberg 2014)."""

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.base import SingleWeightForm
from spectrim.layers.forms.channel import TwoFactors
from spectrim.layers.types import Geometry, LayerType, Positions
from spectrim.linalg import Factors, Ranks, SpatialDecomposition


@final
class SpatialConv2d(TwoFactors):
    """An `nn.Conv2d` in the spatial form: a column of the kernel, then a row (Jaderberg 2014).

    Attributes:
        down: in -> rank a group, kernel (height, 1), with the vertical stride, padding and dilation; no bias.
        up: rank -> out, kernel (1, width), with the horizontal ones, and the bias, if any.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    def __init__(self, down: nn.Conv2d, up: nn.Conv2d, *, dense: nn.Module | None = None) -> None:
        super().__init__(down, up, dense=dense)
        if down.kernel_size[1] != 1 or up.kernel_size[0] != 1 or down.stride[1] != 1 or up.stride[0] != 1:
            raise ModelError(f"down ({down}) must be a column, and up ({up}) a row, each with its own stride only")

    @staticmethod
    def _assembled(*chain: nn.Module) -> nn.Module:
        down, up = cast(tuple[nn.Conv2d, nn.Conv2d], chain)
        options: dict[str, Any] = {
            key: (getattr(down, key)[0], getattr(up, key)[1]) for key in ("kernel_size", "stride", "dilation")
        }
        return nn.Conv2d(
            down.in_channels,
            up.out_channels,
            bias=up.bias is not None,
            padding=down.padding if isinstance(down.padding, str) else (down.padding[0], int(up.padding[1])),
            padding_mode=down.padding_mode,
            groups=down.groups,
            device="meta",
            dtype=down.weight.dtype,
            **options,
        )

    @property
    def form(self) -> str:
        """`spatial`."""
        return "spatial"

    @staticmethod
    def composed(factors: Factors) -> Tensor:
        down, up = factors
        return torch.einsum("grih,gorw->goihw", down.squeeze(-1), up.squeeze(-2))


class SpatialForm(SingleWeightForm):
    """Ordinary two-dimensional convolutions with a kernel that is wide both ways."""

    name = "spatial"
    decomposition = SpatialDecomposition

    def fits_shape(self, geometry: Geometry) -> bool:
        return len(geometry.kernel) == 2 and min(geometry.kernel) > 1 and not geometry.transposed

    def factor_shapes(self, geometry: Geometry, ranks: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        (rank,), (height, width) = ranks, geometry.kernel
        return (rank, geometry.into, height, 1), (geometry.out, rank, 1, width)

    def factor_positions(self, positions: Positions) -> tuple[int, ...]:
        return positions.mixed, positions.output

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        # every padding mode acts axis by axis
        down = layer_type.resized(layer, out=ranks[0], bias=False, axis=0)
        up = layer_type.resized(layer, into=ranks[0], bias=bias, axis=1)
        return SpatialConv2d(cast(nn.Conv2d, down), cast(nn.Conv2d, up), dense=layer)
