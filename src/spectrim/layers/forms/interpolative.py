"""The interpolative form: a low rank of which r outputs are computed directly, and the others from these.

The same product as in the linear form, to rounding, with r^2 numbers less: r in + r (out - r). Putting the outputs in
order takes time, so that it is for budgets of params and bytes.
"""

from dataclasses import replace
from typing import cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spectrim.layers.factored import FactoredLayer, geometry_of
from spectrim.layers.forms.base import RankCosts, unit_geometry
from spectrim.layers.forms.channel import TwoFactorForm
from spectrim.layers.forms.linear import LinearFactors
from spectrim.layers.types import Geometry, LayerType, layer_type_of
from spectrim.layers.types.interpolation import Interpolation
from spectrim.layers.units import Unit
from spectrim.linalg import Factors, Ranks, interpolated, to_float64


@final
class InterpolativeLayer(LinearFactors):
    """A linear layer, or a convolution of one place, that computes some outputs directly and the others from these.

    Attributes:
        down: in -> rank, with the options of the layer it stands for; no bias.
        up: rank -> out, an `Interpolation`, with the bias, if any.

    Shapes:
        as for the layer it stands for.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    @property
    def form(self) -> str:
        """`interpolative`."""
        return "interpolative"

    def stored(self, factors: Factors) -> list[Tensor]:
        """The weights of the chain for a product of any factors; the order of the outputs is set to theirs."""
        down, up = (to_float64(part).flatten(2)[0] for part in factors)
        order, first, rest = interpolated(down, up)
        own = cast(Interpolation, self.up)
        own.order = order.to(own.order.device)
        kind, size = layer_type_of(self.down), geometry_of(self.down)
        return [kind.to_weight(first.reshape(size.shape), size), rest]


class InterpolativeForm(TwoFactorForm):
    """Linear layers and convolutions of one place without groups."""

    name = "interpolative"
    closed_form = False
    saves_time = False
    solved_as = "linear"

    def fits(self, unit: Unit) -> bool:
        # torch puts no features of nested tensors in order
        return super().fits(unit) and not any(weight.is_lookup or weight.is_nested for weight in unit.weights)

    def fits_shape(self, geometry: Geometry) -> bool:
        return geometry.is_pointwise and geometry.groups == 1

    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        costs, (weight,) = super().costs(unit, ranks, biases=biases), unit.weights
        squares = ranks[:, 0] ** 2
        return replace(costs, params=costs.params - squares, macs=costs.macs - squares * weight.positions.output)

    def index_bytes(self, unit: Unit) -> int:
        return torch.int64.itemsize * unit_geometry(unit).out

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        geometry, dtype = layer_type.geometry(layer), layer.get_parameter("weight").dtype
        down = layer_type.resized(layer, out=ranks[0], bias=False)
        up = Interpolation(ranks[0], geometry.out, dims=len(geometry.kernel), bias=bias, dtype=dtype)
        return InterpolativeLayer(down, up, dense=layer)

    def build(self, layer: nn.Module, *, layer_type: LayerType, ranks: Ranks, bias: bool) -> FactoredLayer:
        replacement = super().build(layer, layer_type=layer_type, ranks=ranks, bias=bias)
        order = cast(Interpolation, replacement.chain[-1]).order
        order.copy_(torch.arange(len(order)))  # until there are factors: so it can be run, as for timing
        return replacement
