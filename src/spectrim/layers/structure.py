"""Which layers of a model are factored, and how: a value that goes into files, and is carried out on a dense model."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import nn

from spectrim.core.errors import FileError, ModelError, PlanError
from spectrim.core.files import Frozen
from spectrim.layers.factored import FactoredLayer, low_rank_layers
from spectrim.layers.forms import form_named
from spectrim.layers.forms.linear import tied_output
from spectrim.layers.heads import AroundHeads, HeadScores
from spectrim.layers.replacement import NARROWED_FROM, names_of, narrowed_layers, narrowed_like, replace
from spectrim.layers.types import find_layer_type, layer_type_of
from spectrim.layers.unfusing import unfuse_


class LowRank(Frozen):
    """One factored layer, and what the dense layer it stands for must be like.

    Attributes:
        shape: Shape of the dense weight.
        form: Name of the form.
        ranks: Singular values kept (in each group).
        bias: Whether it adds one.
        layer_type: Name of the dense layer's type; None in files that were written before it was noted.
        overrides: Methods that the dense layer's class has replaced.
        options: Attributes of the dense layer that say how its weight is used.
        tied_output: Whether it is an output layer that shares its factors with an embedding.
    """

    shape: tuple[int, ...]
    form: str
    ranks: tuple[Annotated[int, Field(ge=1)], ...]
    bias: bool
    layer_type: str | None = None
    overrides: tuple[str, ...] = ()
    options: dict[str, str] = Field(default_factory=dict)
    tied_output: bool = False

    @field_validator("form")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return form_named(name).name
        except PlanError as error:
            raise ValueError(str(error)) from error


class Narrowed(Frozen):
    """One narrowed layer, and what the layer it stands for must be like.

    Attributes:
        shape: Shape of the weight before.
        into: Inputs that it has now.
        out: Outputs that it has now.
        bias: Whether it adds one.
        heads: Of how many heads of an attention it gives or reads what they hold; 0 for other layers.
        head_ranks: How many numbers each of them holds; none where all hold as many.
        scores: Whether it gives the queries or the keys of these heads.
    """

    shape: tuple[int, ...]
    into: Annotated[int, Field(ge=1)]
    out: Annotated[int, Field(ge=1)]
    bias: bool
    heads: int = Field(default=0, ge=0)
    head_ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    scores: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = self.head_ranks
        if own and (len(own) != self.heads or sum(own) not in (self.into, self.out)):
            raise ValueError(f"{self.heads} heads of a layer {self.into} -> {self.out} cannot hold {own}")
        return self


class Structure(Frozen):
    """All factored and narrowed layers of a model.

    Attributes:
        version: Of this description.
        low_rank: Each layer by its first name.
        same_layer: By each further name of a layer, its first one.
        narrowed: Each narrowed layer by its first name; those that are factored as well are in both.
    """

    version: Literal[1] = 1
    low_rank: dict[str, LowRank]
    same_layer: dict[str, str]
    narrowed: dict[str, Narrowed] = Field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The first names of all layers that it changes."""
        return tuple(dict.fromkeys((*self.narrowed, *self.low_rank)))


def structure_of(model: nn.Module) -> Structure:
    """Describe the factored layers of `model`.

    Raises:
        ModelError: a factor that is no ordinary layer, as one with an adapter, or a piece of one.
    """
    low_rank: dict[str, LowRank] = {}
    same_layer: dict[str, str] = {}
    for name, module in low_rank_layers(model).items():
        _require_ordinary_factors(name, module)
        dense = module.empty_dense()
        layer_type = layer_type_of(dense)
        low_rank[name] = LowRank(
            shape=tuple(dense.get_parameter("weight").shape),
            form=module.form,
            ranks=module.ranks,
            bias=module.bias is not None,
            layer_type=layer_type.name,
            overrides=layer_type.overrides(dense),
            options=_options_of(dense),
            tied_output=module.is_tied_output,
        )
        same_layer |= dict.fromkeys(names_of(model, module)[1:], name)
    narrowed = {name: _narrowed(module) for name, module in narrowed_layers(model).items()}
    return Structure(low_rank=low_rank, same_layer=same_layer, narrowed=narrowed)


def rebuild(model: nn.Module, structure: Structure, *, origin: str) -> None:
    """Put unset factored layers in the places of dense ones, in `model` itself, all of them or none.

    Args:
        model: The dense network.
        structure: The layers.
        origin: Where that was read, for messages.

    Raises:
        FileError: the structure is that of another network.
    """
    changed = {*structure.names, *structure.same_layer}
    unfuse_(model, lambda part, _: part in changed)
    before = {name: _module_at(model, name, layer.shape, origin) for name, layer in structure.narrowed.items()}
    replace(model, {name: _unset(before[name], layer) for name, layer in structure.narrowed.items()})
    replacements: dict[str, nn.Module] = {}
    try:
        for name, layer in structure.low_rank.items():
            dense, form = _dense_at(model, name, layer, origin), form_named(layer.form)
            built = form.build(dense, layer_type=layer_type_of(dense), ranks=layer.ranks, bias=layer.bias)
            replacements[name] = tied_output(built, dense) if layer.tied_output else built
        for name, first in structure.same_layer.items():
            replacements[name] = replacements[first]
        replace(model, replacements)
    except BaseException:
        replace(model, before)
        raise


def _require_ordinary_factors(name: str, layer: FactoredLayer) -> None:
    for part in layer.chain:
        layer_type = find_layer_type(part)
        if layer_type is None:
            raise ModelError(
                f"{name} has a {type(part).__name__} of {type(part).__module__} among its factors, which cannot be "
                "saved in a factored layer; merge adapters first (merge_and_unload() of PEFT), or save them alone"
            )
        if (weight := part.get_parameter("weight")).ndim != layer_type.weight_dims:
            raise ModelError(
                f"{name} has a factor with a weight {list(weight.shape)}, as FSDP and DeepSpeed ZeRO-3 keep a piece of "
                "it in each process; save a model that has its whole weights"
            )


def _options_of(dense: nn.Module) -> dict[str, str]:
    values = {name: getattr(dense, name) for name in layer_type_of(dense).options}
    # numbers of other types are equal ones
    return {name: str(tuple(map(int, own)) if isinstance(own, list | tuple) else own) for name, own in values.items()}


def _narrowed(layer: nn.Module) -> Narrowed:
    ranks, scores = layer.ranks if isinstance(layer, AroundHeads) else [], isinstance(layer, HeadScores)
    shape: tuple[int, ...] = getattr(layer, NARROWED_FROM)
    layer = layer.linear if isinstance(layer, AroundHeads) else layer
    kind = layer_type_of(layer.empty_dense() if isinstance(layer, FactoredLayer) else layer)
    sizes = layer.geometry if isinstance(layer, FactoredLayer) else kind.geometry(layer)
    own = tuple(ranks) if len(set(ranks)) > 1 else ()
    bias = layer.bias is not None
    heads, into, out = len(ranks), sizes.into, sizes.out
    return Narrowed(shape=shape, into=into, out=out, bias=bias, heads=heads, head_ranks=own, scores=scores)


def _unset(dense: nn.Module, layer: Narrowed) -> nn.Module:
    """A narrowed layer without values in the place of a dense one."""
    weight, ranks = dense.get_parameter("weight"), layer.head_ranks
    if layer.heads and not ranks:
        width = layer.out if layer.into == layer_type_of(dense).geometry(dense).into else layer.into
        ranks = (width // layer.heads,) * layer.heads
    new = narrowed_like(dense, out=layer.out, into=layer.into, bias=layer.bias, head_ranks=ranks, scores=layer.scores)
    return new if weight.is_meta else new.to_empty(device=weight.device)


def _module_at(
    model: nn.Module, name: str, shape: tuple[int, ...], origin: str, *, kind: str | None = None
) -> nn.Module:
    """The layer of this name; raises `FileError` where there is none with a weight of this shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = nn.Identity()
    layer_type, weight = find_layer_type(module), module._parameters.get("weight")
    fits = layer_type is not None and weight is not None and tuple(weight.shape) == shape
    if not fits or layer_type is None or kind not in (None, layer_type.name):
        raise FileError(
            f"{origin} is for another network: it wants a layer with a weight {list(shape)} at {name!r}, "
            f"and {type(model).__name__} has {module if not isinstance(module, nn.Identity) else 'none'}"
        )
    return module


def _dense_at(model: nn.Module, name: str, layer: LowRank, origin: str) -> nn.Module:
    module = _module_at(model, name, layer.shape, origin, kind=layer.layer_type)
    if own := set(layer_type_of(module).overrides(module)) - set(layer.overrides):
        raise FileError(
            f"{origin} is for another network: {name!r} of {type(model).__name__} has a {min(own)} of its own "
            f"({type(module).__name__}), which the layer that was saved did not have"
        )
    own_options = _options_of(module)
    for option, value in layer.options.items():
        if own_options.get(option) != value:
            raise FileError(
                f"{origin} is for another network: the layer {name!r} was saved with {option}={value}, and that of "
                f"{type(model).__name__} has {option}={own_options.get(option)}"
            )
    return module
