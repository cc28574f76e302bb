"""What a layer type is: how an ordinary layer holds a matrix."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from spectrim.core.plans import Cost

PIXELS, TOKENS = 64, 512
"""Places of a map and of a sequence that are looked at, if nothing else is said."""

_HELD = 2**14
"""Places of all sequences together whose rows are held."""


@dataclass(frozen=True)
class SampledPlaces:
    """How many places of a sample are looked at, at most; None for all of them.

    Attributes:
        of_map: Of what a convolution gives, and of other maps, where neighbours tell nearly the same.
        of_sequence: Of a sequence (batch, length, size), such as the tokens of a text.
    """

    of_map: int | None = PIXELS
    of_sequence: int | None = TOKENS

    @classmethod
    def held(cls, samples: int) -> "SampledPlaces":
        """Those whose rows are held in memory, of so many samples: of many sequences fewer of each, but 64."""
        return cls(of_sequence=min(max(_HELD // max(1, samples), 64), TOKENS))


@dataclass(frozen=True)
class Positions:
    """How many vectors a layer handles in one pass, all its calls together.

    Attributes:
        output: Places of the output.
        kernel: Places at which the kernel is applied: those of the output, or of the input if it is transposed.
        mixed: Places with the output's size in every dimension but the last, and the input's size in that: what lies
            between the factors of the spatial form.
        input: Places of the input.
    """

    output: int = 0
    kernel: int = 0
    mixed: int = 0
    input: int = 0

    def __add__(self, other: "Positions") -> "Positions":
        return Positions(
            self.output + other.output, self.kernel + other.kernel, self.mixed + other.mixed, self.input + other.input
        )


@dataclass(frozen=True)
class Geometry:
    """Sizes of a weight.

    Attributes:
        groups: Groups of a convolution, 1 for a linear layer.
        out: Outputs of a group.
        into: Inputs of a group.
        kernel: Sizes of the kernel, none for a linear layer.
        transposed: Whether the kernel is applied at every place of the input, as in a transposed convolution.
        identity: Rows that are those of the identity, which are neither stored nor multiplied.
    """

    groups: int
    out: int
    into: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    identity: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(groups, out, in, *kernel)."""
        return self.groups, self.out, self.into, *self.kernel

    @property
    def width(self) -> int:
        """Columns of a group's matrix: inputs times the kernel's places."""
        return self.into * prod(self.kernel)

    @property
    def full_rank(self) -> int:
        """The largest number of singular values a group's matrix can have."""
        return min(self.out, self.width)

    @property
    def outputs(self) -> int:
        """Outputs of all groups."""
        return self.groups * self.out

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer multiplies each input vector by one matrix, as a linear layer does."""
        return prod(self.kernel) == 1 and not self.transposed

    def dense_cost(self, positions: Positions) -> Cost:
        """Cost of the layer as it is, without its bias."""
        params = prod(self.shape) - self.identity * self.into
        return Cost(params=params, macs=params * positions.kernel)


class OnnxGraph(Protocol):
    """An ONNX graph that is being written."""

    def node(self, operator: str, names: Sequence[str], **options: Any) -> str:
        """Add an operator; gives the name of its output."""

    def constant(self, value: Any) -> str:
        """Add a tensor or an array; gives its name."""


class LayerType(ABC):
    """How one kind of ordinary layer holds a matrix. A new kind is a new file here and an entry in `LAYER_TYPES`.

    A weight is worked on as (groups, out, in, *kernel), whatever the layer stores; groups are the blocks on the
    diagonal of the whole matrix. Rows are what it multiplies, (groups, n, in * kernel places), and what it gives,
    (groups, n, out).

    Attributes:
        name: The class of the layers, for messages and tables.
        methods: Methods that a subclass must not override to count as one of these layers: the forward pass and what
            it calls.
        options: Attributes that say how the weight is used, besides its sizes and groups.
        is_lookup: Whether its inputs are indices, each of which stands for the vector that is 1 there; such a layer has
            no bias, and neither have its factors.
    """

    name: ClassVar[str]
    is_lookup: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ("forward",)

    @abstractmethod
    def base_of(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """The class of this type that `cls` is or inherits from; None if it is no such layer."""

    def overrides(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the `methods`, and of the call itself, that the layer's class has replaced."""
        own, base = type(layer), self.base_of(type(layer))
        return tuple(name for name in ("__call__", *self.methods) if getattr(own, name) is not getattr(base, name))

    @property
    def weight_dims(self) -> int:
        """Dimensions of the stored weight."""
        return 2

    def printed_options(self, layer: nn.Module) -> str:
        """What a layer prints in its brackets; only the sizes where its class cannot print one without values."""
        try:
            return layer.extra_repr()
        except Exception:  # the code of somebody's subclass
            return "{into}, {out}".format(**vars(self.geometry(layer)))

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry:
        """The sizes of a layer's weight."""

    def to_kernels(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """A stored weight as (groups, out, in, *kernel): flattened to matrices, and times `input_rows`, the output."""
        return weight.reshape(geometry.shape)

    def to_weight(self, kernels: Tensor, geometry: Geometry) -> Tensor:
        """The inverse of `to_kernels`."""
        return kernels.flatten(0, 1)

    def kernels(self, layer: nn.Module, weight: Tensor | None = None) -> Tensor:
        """The layer's own weight, or another in its place, see `to_kernels`."""
        return self.to_kernels(cast(Tensor, layer.weight) if weight is None else weight, self.geometry(layer))

    def skip_reason(self, layer: nn.Module) -> str | None:
        """Why a layer of this type has no factored form, or None."""
        geometry = self.geometry(layer)
        if geometry.groups > 1 and geometry.out == 1:
            return "a depthwise convolution: with one output channel a group, no rank is smaller than the weight"
        return None

    @abstractmethod
    def positions(self, layer: nn.Module, x: Tensor, output: Tensor) -> Positions:
        """How many vectors one call handles."""

    @abstractmethod
    def input_rows(self, layer: nn.Module, x: Tensor, *, output: Tensor, positions: SampledPlaces | None) -> Tensor:
        """The vectors of one call's input that the matrix multiplies (im2col): (groups, n, in * kernel places).

        Args:
            layer: The layer.
            x: Its input.
            output: Its output.
            positions: How many places are looked at in each sample, the same ones in every call; None for all of them.
        """

    @abstractmethod
    def output_rows(self, layer: nn.Module, output: Tensor, *, positions: SampledPlaces | None) -> Tensor:
        """The outputs at the places of `input_rows`, copied: (groups, n, out)."""

    @abstractmethod
    def feature_dim(self, layer: nn.Module) -> int:
        """The dimension of the output, counted from the end (-1, ..), along which the features lie."""

    @abstractmethod
    def resized(
        self, layer: nn.Module, *, into: int | None = None, out: int | None = None, bias: bool, axis: int | None = None
    ) -> nn.Module:
        """A layer of the same options with other sizes, on the meta device.

        Args:
            layer: What it is like.
            into: Inputs of all groups; the layer's own by default.
            out: Outputs of all groups; the layer's own by default.
            bias: Whether it has one.
            axis: The only dimension of the kernel that keeps its options; along the others the layer does nothing.
        """

    @abstractmethod
    def pointwise(self, layer: nn.Module, *, into: int | None = None, out: int | None = None, bias: bool) -> nn.Module:
        """A layer for the same kind of tensors that multiplies each vector by one matrix, on the meta device."""

    @abstractmethod
    def add_to_graph(self, graph: OnnxGraph, layer: nn.Module, name: str, *, dimensions: int) -> str:
        """Write what the layer does to the value `name`, a tensor of so many dimensions; gives the output's name."""


def sample(places: int, positions: SampledPlaces | None, *, sequence: bool = False) -> Tensor:
    """The places that are looked at: all of them, or a number at random, the same ones every time."""
    number = None if positions is None else positions.of_sequence if sequence else positions.of_map
    if number is None or number >= places:
        return torch.arange(places)
    return _drawn(places, number)


@lru_cache(maxsize=1024)
def _drawn(places: int, number: int) -> Tensor:
    return torch.randperm(places, generator=torch.Generator().manual_seed(0))[:number]
