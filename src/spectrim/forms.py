"""The one registry of forms: for a type of layer, its matrix view, its cost at a rank, and how it is rebuilt."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from spectrim.layers import LowRankLinear
from spectrim.plan import Cost, FormName


@dataclass(frozen=True)
class View:
    """How a layer type is looked at: as which matrices, and in which form it can be factored, if any.

    Attributes:
        matrices: The weight as (groups, out, in) matrices; a grouped convolution is block-diagonal.
        form: The factored form, or None where a layer of this type can be analysed only.
    """

    matrices: Callable[[nn.Module], Tensor]
    form: FormName | None


def _linear_matrices(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").unsqueeze(0)


def _conv2d_matrices(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


VIEWS: dict[type[nn.Module], View] = {
    nn.Linear: View(_linear_matrices, form="linear"),
    nn.Conv2d: View(_conv2d_matrices, form=None),
}


def full_rank(matrices: Tensor) -> int:
    """The largest number of singular values that (groups, out, in) matrices can have together."""
    groups, out, into = matrices.shape
    return int(groups * min(out, into))


def dense_cost(matrices: Tensor, *, bias: bool, positions: int) -> Cost:
    """Cost of the dense layer that makes `positions` output vectors in one forward pass."""
    groups, out, into = matrices.shape
    return Cost(params=groups * out * into + (groups * out if bias else 0), macs=groups * out * into * positions)


def linear_cost(shape: tuple[int, ...], *, rank: int, bias: bool, positions: int) -> Cost:
    """Cost of the linear form, in -> rank -> out, of a weight of `shape` (out, in)."""
    out, into = shape
    return Cost(params=rank * (out + into) + (out if bias else 0), macs=rank * (out + into) * positions)


def linear_break_even(shape: tuple[int, ...], *, new_bias: bool) -> int:
    """The largest rank at which the linear form stores fewer numbers than the dense weight (0: none does)."""
    out, into = shape
    allowance = out * into - (out if new_bias else 0)
    return max(0, (allowance - 1) // (out + into))


def build_linear(layer: nn.Linear, *, rank: int, bias: bool) -> LowRankLinear:
    """An unset linear form in the place of `layer`."""
    return LowRankLinear.empty_like(layer, rank=rank, bias=bias)
