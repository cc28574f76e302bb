"""The one registry of forms: which a layer can take, its weight as matrices, its cost at a rank, how it is rebuilt."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.plans import Cost, FormName
from spectrim.layers.factored import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConvTranspose2d,
    LowRankLayer,
    LowRankLinear,
    SpatialConv2d,
    Tucker2Conv2d,
)
from spectrim.linalg import (
    ChannelDecomposition,
    Decomposition,
    Factors,
    Problem,
    Ranks,
    SpatialDecomposition,
    Tucker2Decomposition,
    rank_grid,
)

_BUILD: Mapping[tuple[type[nn.Module], FormName], Any] = MappingProxyType(
    {
        (nn.Linear, "linear"): LowRankLinear,
        (nn.Conv1d, "linear"): LowRankConv1d,
        (nn.Conv1d, "channel"): LowRankConv1d,
        (nn.Conv2d, "linear"): LowRankConv2d,
        (nn.Conv2d, "channel"): LowRankConv2d,
        (nn.Conv2d, "spatial"): SpatialConv2d,
        (nn.Conv2d, "tucker2"): Tucker2Conv2d,
        (nn.ConvTranspose2d, "channel"): LowRankConvTranspose2d,
    }
)

_DECOMPOSE: Mapping[FormName, type[Decomposition]] = MappingProxyType(
    {
        "linear": ChannelDecomposition,
        "channel": ChannelDecomposition,
        "spatial": SpatialDecomposition,
        "tucker2": Tucker2Decomposition,
    }
)

LAYERS: tuple[type[nn.Module], ...] = tuple(dict.fromkeys(kind for kind, _ in _BUILD))
"""The types of layers that have factored forms; a subclass is another type, since it may do other things."""


@dataclass(frozen=True)
class Positions:
    """How many vectors a layer handles in one pass, all its calls together.

    Attributes:
        output: Places of the output.
        mixed: Places with the output's height and the input's width, where the spatial form is between its factors.
        input: Places of the input.
    """

    output: int = 0
    mixed: int = 0
    input: int = 0

    def __add__(self, other: "Positions") -> "Positions":
        return Positions(self.output + other.output, self.mixed + other.mixed, self.input + other.input)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer.

    Attributes:
        groups: Groups of a convolution, 1 for a linear layer.
        out: Outputs of a group.
        into: Inputs of a group.
        kernel: Height and width, one number for one dimension, none for a linear layer.
        transposed: Whether it is a transposed convolution, which applies its kernel at every place of the input.
    """

    groups: int
    out: int
    into: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def width(self) -> int:
        """Columns of a group's matrix: inputs times the kernel's places."""
        return self.into * prod(self.kernel)

    @property
    def full_rank(self) -> int:
        """The largest number of singular values a group's matrix can have."""
        return min(self.out, self.width)

    def dense_cost(self, positions: Positions) -> Cost:
        """Cost of the layer as it is, without its bias."""
        params = self.groups * self.out * self.width
        return Cost(params=params, macs=params * (positions.input if self.transposed else positions.output))

    def full_ranks(self, form: FormName) -> Ranks:
        """The largest ranks that change anything, each group by itself."""
        places = prod(self.kernel)
        if form == "spatial":
            return (min(self.into * self.kernel[0], self.out * self.kernel[1]),)
        if form == "tucker2":
            return min(self.into, self.out * places), min(self.out, self.into * places)
        return (self.full_rank,)

    def ranks(self, form: FormName) -> npt.NDArray[np.int64]:
        """Every rank that is looked at, (n, 1); in the tucker2 form the pairs of a grid, (n, 2)."""
        if form == "tucker2":
            return np.array(list(product(rank_grid(self.into), rank_grid(self.out))), dtype=np.int64)
        return np.arange(1, self.full_ranks(form)[0] + 1, dtype=np.int64)[:, None]

    def cost(self, form: FormName, ranks: Ranks, positions: Positions) -> Cost:
        """Cost of the factors at `ranks`, without a bias."""
        if form == "spatial":
            column, row = self.into * self.kernel[0], self.out * self.kernel[1]
            parts = [(ranks[0] * column, positions.mixed), (ranks[0] * row, positions.output)]
        elif form == "tucker2":
            first, second = ranks
            core = first * second * prod(self.kernel)
            parts = [(self.into * first, positions.input), (core, positions.output)]
            parts += [(second * self.out, positions.output)]
        else:
            down = positions.input if self.transposed else positions.output
            parts = [(self.width * ranks[0], down), (ranks[0] * self.out, positions.output)]
        params = self.groups * sum(params for params, _ in parts)
        return Cost(params=params, macs=self.groups * sum(params * places for params, places in parts))


def geometry(layer: nn.Module) -> Geometry:
    """The sizes of a layer of one of the types of `LAYERS`, or of a subclass."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Linear):
        return Geometry(1, *weight.shape)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    groups, transposed = layer.groups, isinstance(layer, nn.ConvTranspose2d)
    out, into = layer.out_channels // groups, layer.in_channels // groups
    return Geometry(groups, out, into, tuple(weight.shape[2:]), transposed)


def forms_of(layer: nn.Module) -> tuple[FormName, ...]:
    """The forms that a layer can take, the closed-form one first; none for types that have no factored form."""
    if type(layer) is nn.Linear:
        return ("linear",)
    if type(layer) is nn.ConvTranspose2d:
        return ("channel",)
    if type(layer) not in LAYERS:
        return ()
    kernel = geometry(layer).kernel
    if prod(kernel) == 1:
        return ("linear",)
    if type(layer) is nn.Conv1d:
        return ("channel",)
    return ("channel", "spatial", "tucker2") if min(kernel) > 1 else ("channel", "tucker2")


def refusal(layer: nn.Module) -> str | None:
    """Why a layer of a known type has no factored form, or None."""
    sizes = geometry(layer)
    if sizes.groups > 1 and sizes.out == 1:
        return "a depthwise convolution: with one output channel a group, no rank is smaller than the weight"
    return None


def kernels(layer: nn.Module) -> Tensor:
    """The weight as (groups, out, in, *kernel): with `calibrate.patches` flattened to x, the output is W x + b.

    A transposed convolution is an ordinary one of the stretched input with the kernel turned round.
    """
    return as_kernels(cast(Tensor, layer.weight), geometry(layer))


def as_kernels(weight: Tensor, sizes: Geometry) -> Tensor:
    """A stored weight as `kernels` gives it."""
    if sizes.transposed:
        return weight.reshape(sizes.groups, sizes.into, sizes.out, *sizes.kernel).transpose(1, 2).flip(-1, -2)
    return weight.reshape(sizes.groups, sizes.out, sizes.into, *sizes.kernel)


def as_stored(kernel: Tensor, sizes: Geometry) -> Tensor:
    """The inverse of `as_kernels`."""
    if sizes.transposed:
        return kernel.reshape(-1, sizes.out, sizes.into, *sizes.kernel).flip(-1, -2).transpose(1, 2).flatten(0, 1)
    return kernel.reshape(-1, sizes.into, *sizes.kernel)


def matrices(layer: nn.Module) -> Tensor:
    """The weight as (groups, out, in) matrices, `in` running over the kernel too; groups are the diagonal blocks."""
    return kernels(layer).flatten(2)


def decompose(form: FormName, problem: Problem, *, near: Factors = ()) -> Decomposition:
    """The bases from which factors of any rank are made in this form.

    Where factors are found by iteration, those of a problem that is nearly the same are a better start, up to their own
    rank, and save finding one: `near`.
    """
    kind = _DECOMPOSE[form]
    if near and issubclass(kind, SpatialDecomposition | Tucker2Decomposition):
        return kind(problem, near[0].flatten(2))
    return kind.of(problem)


def build(layer: nn.Module, *, form: FormName, ranks: Ranks, bias: bool) -> LowRankLayer:
    """An unset factored layer to stand in the place of `layer`."""
    made = _BUILD.get((type(layer), form))
    if made is None or form not in forms_of(layer):
        raise ModelError(f"{type(layer).__name__} has no {form} form")
    return cast(LowRankLayer, made.empty_like(layer, ranks=ranks, bias=bias))


def stored(layer: LowRankLayer, factors: Factors) -> list[Tensor]:
    """Factors as the weights of the layer's chain, in order."""
    first, *rest = factors
    if isinstance(layer, LowRankConvTranspose2d):
        first = first.flip(-1, -2).transpose(1, 2)
    weights = [cast(Tensor, part.weight) for part in layer.chain]
    return [tensor.reshape(weight.shape) for tensor, weight in zip([first, *rest], weights, strict=True)]
