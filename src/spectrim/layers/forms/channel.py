"""The channel form: the same kernel into fewer channels, then a layer of one place out of them."""

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.layers.factored import FactoredLayer, geometry_of
from spectrim.layers.forms.base import SingleWeightForm
from spectrim.layers.types import Geometry, LayerType, Positions, layer_type_of
from spectrim.linalg import ChannelDecomposition, Factors, Ranks
from spectrim.linalg.products import matmul


class TwoFactors(FactoredLayer):
    """Two layers, of which the second one multiplies each vector by a matrix."""

    def __init__(self, down: nn.Module, up: nn.Module, *, dense: nn.Module | None = None) -> None:
        super().__init__((down, up), dense)
        self.down, self.up = down, up

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply both factors."""
        y: Tensor = self.up(self.down(input))
        return y

    @staticmethod
    def _assembled(*chain: nn.Module) -> nn.Module:
        down, up = chain
        has_bias = up._parameters.get("bias") is not None
        return layer_type_of(down).resized(down, out=geometry_of(up).outputs, bias=has_bias)

    @staticmethod
    def composed(factors: Factors) -> Tensor:
        down, up = factors
        # under autocast in its type, as any product
        multiply = matmul if up.device.type == "cpu" and not torch.is_autocast_enabled("cpu") else torch.matmul
        return multiply(up.flatten(2), down.flatten(2)).reshape(*up.shape[:2], *down.shape[2:])


class LowRankConv(TwoFactors):
    """A convolution in the channel form.

    Attributes:
        down: in -> rank a group, with the kernel, stride, padding, padding mode, dilation and groups; no bias.
        up: rank -> out, a kernel of 1, the same groups, with the bias, if any.

    Shapes:
        as for the convolution it stands for.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    def __init__(self, down: nn.Module, up: nn.Module, *, dense: nn.Module | None = None) -> None:
        super().__init__(down, up, dense=dense)
        if set(cast(Any, up).kernel_size) != {1} or set(cast(Any, up).stride) != {1}:
            raise ModelError(f"up ({up}) must have a kernel and a stride of 1")

    @property
    def form(self) -> str:
        """`channel`, or `linear` where an ordinary convolution's kernel is 1 wide."""
        return "linear" if self.geometry.is_pointwise else "channel"


@final
class LowRankConv1d(LowRankConv):
    """An `nn.Conv1d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""


@final
class LowRankConv2d(LowRankConv):
    """An `nn.Conv2d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""


class LowRankConvTranspose(LowRankConv):
    """A transposed convolution in the channel form: `down` is transposed and has its kernel, `up` a kernel of 1."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Apply both factors; `output_size` as for `nn.ConvTranspose2d`."""
        y: Tensor = self.up(self.down(input, output_size))
        return y


@final
class LowRankConvTranspose2d(LowRankConvTranspose):
    """An `nn.ConvTranspose2d` in the channel form: `down` is transposed and has its kernel, `up` a kernel of 1."""


_CLASSES: dict[str, type[LowRankConv]] = {
    "Conv1d": LowRankConv1d,
    "Conv2d": LowRankConv2d,
    "ConvTranspose2d": LowRankConvTranspose2d,
}
"""By the name of the layer type; others become a `LowRankConv` or a `LowRankConvTranspose`."""


class TwoFactorForm(SingleWeightForm):
    """Down with the layer's own options, up at each place of the output; solved by one decomposition."""

    closed_form = True
    decomposition = ChannelDecomposition

    def factor_shapes(self, geometry: Geometry, ranks: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        (rank,) = ranks
        return (rank, geometry.into, *geometry.kernel), (geometry.out, rank)

    def factor_positions(self, positions: Positions) -> tuple[int, ...]:
        return positions.kernel, positions.output


class ChannelForm(TwoFactorForm):
    """Convolutions with a kernel, and transposed ones."""

    name = "channel"

    def fits_shape(self, geometry: Geometry) -> bool:
        return not geometry.is_pointwise

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        return conv_chain(layer, layer_type, ranks, bias=bias)


def conv_chain(layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> LowRankConv:
    """A convolution's replacement in the channel form."""
    down = layer_type.resized(layer, out=ranks[0], bias=False)
    up = layer_type.pointwise(layer, into=ranks[0], bias=bias)
    usual = LowRankConvTranspose if layer_type.geometry(layer).transposed else LowRankConv
    return _CLASSES.get(layer_type.name, usual)(down, up, dense=layer)
