"""The one registry of forms: for a type of layer, its matrix view, its cost at a rank, and how it is rebuilt."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.layers import LowRankConv1d, LowRankConv2d, LowRankLayer, LowRankLinear
from spectrim.plan import Cost, FormName

FORMS: Mapping[type[nn.Module], FormName] = MappingProxyType(
    {nn.Linear: "linear", nn.Conv1d: "channel", nn.Conv2d: "channel"}
)
"""The form that each type of layer can take; a subclass is another type, since it may do other things."""


def matrices(layer: nn.Module) -> Tensor:
    """The weight as (groups, out, in) matrices, `in` running over the kernel too; groups are the diagonal blocks."""
    weight = cast(Tensor, layer.weight)
    groups = layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1
    return weight.reshape(groups, len(weight) // groups, -1)


def sizes_of(layer: nn.Module) -> tuple[int, int, int]:
    """(groups, out, in) of `matrices`."""
    groups, out, into = matrices(layer).shape
    return groups, out, into


def refusal(layer: nn.Module) -> str | None:
    """Why a layer of a known type has no factored form, or None."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.out_channels > 1:
        return "a depthwise convolution: with one output channel a group, no rank is smaller than the weight"
    return None


def full_rank(shape: tuple[int, int, int]) -> int:
    """The largest rank of (groups, out, in) matrices, each group by itself."""
    return min(shape[1:])


def dense_cost(shape: tuple[int, int, int], *, positions: int) -> Cost:
    """Cost of a dense weight (groups, out, in), without bias, that makes `positions` output vectors in a pass."""
    groups, out, into = shape
    return Cost(params=groups * out * into, macs=groups * out * into * positions)


def rank_cost(shape: tuple[int, int, int], *, positions: int) -> Cost:
    """What each unit of rank costs in the linear and the channel form: one row and one column a group."""
    groups, out, into = shape
    return Cost(params=groups * (out + into), macs=groups * (out + into) * positions)


def build(layer: nn.Module, *, rank: int, bias: bool) -> LowRankLayer:
    """An unset factored layer to stand in the place of `layer`."""
    if isinstance(layer, nn.Linear):
        return LowRankLinear.empty_like(layer, rank=rank, bias=bias)
    if isinstance(layer, nn.Conv2d):
        return LowRankConv2d.empty_like(layer, rank=rank, bias=bias)
    if isinstance(layer, nn.Conv1d):
        return LowRankConv1d.empty_like(layer, rank=rank, bias=bias)
    raise ModelError(f"{type(layer).__name__} has no factored form")
