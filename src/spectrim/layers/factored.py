"""What stands in a dense layer's place: an ordinary module made of ordinary layers."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.nested import describe
from spectrim.layers.product import ProductTensor
from spectrim.layers.types import Geometry, find_layer_type, layer_type_of
from spectrim.linalg import Factors, Ranks


class FactoredLayer(nn.Module, ABC):
    """A chain of layers whose product is one layer's weight; only the last one has a bias.

    It answers what the dense layer answered (`stride`, `in_features`, `groups`, ..): these attributes are copied from
    it, except those that it needs itself (`rank`, `chain`, ..).

    A class has the parts of its chain as attributes, in the order in which they are applied.

    Attributes:
        adds_bias: Whether it has a bias, and the layer it stands for had none.

    Args:
        chain: The parts.
        dense: The layer it stands for; by default one of torch that has the sizes and options of the parts.

    Raises:
        ModelError: the parts do not fit together, or one but the last has a bias.
    """

    is_tied_output: ClassVar[bool] = False
    """Whether it shares its parts with those of an embedding, in the opposite order."""

    if TYPE_CHECKING:
        _outline: nn.Module
        _geometry: Geometry
        adds_bias: bool

    # torch.jit.script compiles properties, and reads annotations of the class
    __jit_unused_properties__: ClassVar[list[str]] = ["form", "chain", "rank", "ranks", "geometry", "weight", "bias"]

    def __init__(self, chain: Sequence[nn.Module], dense: nn.Module | None) -> None:
        super().__init__()
        unknown = [part for part in (*chain, *([] if dense is None else [dense])) if find_layer_type(part) is None]
        if unknown:
            raise ModelError(f"{describe(unknown[0])} has no weight to factor; give Linear or convolution layers")
        for first, second in pairwise(chain):
            sizes, following = geometry_of(first), geometry_of(second)
            if (sizes.out, sizes.groups) != (following.into, following.groups) or _has_bias(first):
                raise ModelError(
                    f"{first} must have no bias, the groups of {second}, and as many outputs as that has inputs"
                )
        outline = outline_of(self._assembled(*chain) if dense is None else dense, bias=_has_bias(chain[-1]))
        # past nn.Module's own bookkeeping: the outline is no part of the model
        self.__dict__ |= {"_outline": outline, "_geometry": geometry_of(outline)}
        self.__dict__["adds_bias"] = dense is not None and _has_bias(chain[-1]) and not _has_bias(dense)
        own = {name: value for name, value in attributes_of(outline).items() if not hasattr(type(self), name)}
        self.__dict__.update(own)

    @staticmethod
    @abstractmethod
    def _assembled(*chain: nn.Module) -> nn.Module:
        """The dense layer that the parts amount to, on the meta device."""

    @property
    @abstractmethod
    def form(self) -> str:
        """The form's name."""

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        """The layers in the order in which they are applied."""
        return tuple(self.children())

    @property
    def ranks(self) -> Ranks:
        """Singular values kept (in each group): (rank,), or (rank_in, rank) in the tucker2 form."""
        return tuple(geometry_of(part).out for part in self.chain[:-1])

    @property
    def rank(self) -> int:
        """Singular values kept, in each group of a grouped convolution."""
        return self.ranks[-1]

    @property
    def geometry(self) -> Geometry:
        """The sizes of the dense weight."""
        return self._geometry  # kept, since a trace cannot read the sizes of an outline

    @property
    def weight(self) -> Tensor:
        """The product, shaped as the dense layer's weight: multiplied where its values are used, never written to."""
        weights = [cast(Tensor, part.weight) for part in self.chain]
        traced = torch.compiler.is_dynamo_compiling() or torch._C._get_tracing_state() is not None
        if traced or not all(isinstance(weight, Tensor) for weight in weights):  # as under symbolic tracing
            return self.product(weights)
        like = next((weight for weight in weights if weight.requires_grad), weights[-1])
        shape = self._outline.get_parameter("weight").shape
        return ProductTensor(lambda: self.product(weights), like=like, shape=shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return cast(Tensor | None, self.chain[-1].bias)

    def __setattr__(self, name: str, value: Any) -> None:
        _require_other_than_weight(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _require_other_than_weight(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`; raises `ModelError` for a `weight_orig` and the like, as pruning makes it."""
        _require_other_than_weight(name.partition("_")[0])
        super().register_parameter(name, param)

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """The dense weight that these weights of the chain (of any number type) stand for."""
        return layer_type_of(self._outline).to_weight(self.kernels(weights), self.geometry)

    def kernels(self, weights: Sequence[Tensor]) -> Tensor:
        """The same as (groups, out, in, *kernel)."""
        return self.composed(self.factors(weights))

    def factors(self, weights: Sequence[Tensor]) -> Factors:
        """The weights of the chain as factors, each (groups, its outputs, its inputs, *its kernel)."""
        parts = zip(self.chain, weights, strict=True)
        return tuple(layer_type_of(part).kernels(part, weight) for part, weight in parts)

    @staticmethod
    @abstractmethod
    def composed(factors: Factors) -> Tensor:
        """The product (groups, out, in, *kernel) of factors, each (groups, its outputs, its inputs, *its kernel)."""

    def stored(self, factors: Factors) -> list[Tensor]:
        """Factors as the weights of the chain, in order."""
        parts = ((layer_type_of(part), geometry_of(part)) for part in self.chain)
        pairs = zip(parts, factors, strict=True)
        return [kind.to_weight(factor.reshape(size.shape), size) for (kind, size), factor in pairs]

    def empty_dense(self) -> nn.Module:
        """An unset dense layer with the same class, sizes and options, without storage."""
        return outline_of(self._outline, bias=self.bias is not None)

    def extra_repr(self) -> str:
        """What the dense layer shows, and the ranks."""
        ranks = f"rank={self.rank}" if len(self.ranks) == 1 else f"rank_in={self.ranks[0]}, rank={self.rank}"
        return f"{layer_type_of(self._outline).printed_options(self._outline)}, {ranks}".removeprefix(", ")


def outline_of(layer: nn.Module, *, bias: bool) -> nn.Module:
    """A copy of a layer without storage: its class, its options, and parameters on the meta device."""
    outline, weight = shallow_copy(layer), layer.get_parameter("weight")
    empty = torch.empty(geometry_of(layer).outputs, device="meta", dtype=weight.dtype)
    outline._parameters = {
        "weight": nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad),
        "bias": nn.Parameter(empty, requires_grad=weight.requires_grad) if bias else None,
    }
    return outline


def attributes_of(layer: nn.Module) -> dict[str, Any]:
    """What code outside may read of a layer besides its tensors: `stride`, `in_features`, .."""
    return {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "training"}


def shallow_copy(layer: nn.Module) -> nn.Module:
    """Another layer with the same tensors and options, and dictionaries (of parameters, hooks, ..) of its own."""
    twin = copy.copy(layer)
    twin.__dict__.update({name: value.copy() for name, value in vars(layer).items() if isinstance(value, dict)})
    return twin


def geometry_of(layer: nn.Module) -> Geometry:
    """The sizes of an ordinary layer's weight."""
    return layer_type_of(layer).geometry(layer)


def low_rank_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """Every factored layer of `model` by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}


def is_low_rank(module: nn.Module) -> bool:
    """Whether `module` is one of the factored layers."""
    return isinstance(module, FactoredLayer)


def _require_other_than_weight(name: str) -> None:
    if name in ("weight", "bias"):
        raise ModelError(
            f"a factored layer has no {name} to exchange; set or prune those of its factors, layer.chain, or make it "
            "dense again with st.merge(model)"
        )


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None
