"""A weight by itself, and every layer that uses it."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.core.errors import ModelError
from spectrim.core.nested import is_plain
from spectrim.core.state import unique_tensors
from spectrim.layers.experts import routers_of, stacks_of
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.selection import LOOKUP, LayerSelection
from spectrim.layers.tracing import Trace
from spectrim.layers.types import Geometry, Positions, find_layer_type
from spectrim.layers.units.base import Unit, Weight
from spectrim.linalg import HeadLayout

_DIFFERS = "it was to be treated as another class of layer, and its outputs are not those of that class"
_SPECIAL = "the network would not run another layer in its place, or uses more of it than its outputs, say its class"
_READ = "its weight is used outside of its own call as well, where a product of factors would be multiplied out anew"
_ATTENTION = (
    "nn.MultiheadAttention reads its weights itself, without calling a layer; its projections become layers (q_proj, "
    "k_proj, v_proj, out_proj) where st.compress or st.analyze select one, the class and its forward are torch's own, "
    "and it has no hooks and no weights that others share"
)
_EXPERTS = (
    "; they become layers where st.compress or st.analyze select one, the class has transformers' "
    "use_experts_implementation and no norm inside, gives the same without the stack, and has no hooks"
)
_ROUTER = "it chooses the experts, of which there are few, and a small error in it sends tokens to others"
_ADAPTER = "it has an adapter that is not merged; merge it first, model = model.merge_and_unload(), and compress that"
_KEYWORDS = "it is called with keyword arguments that an exchange would lose"


@dataclass(frozen=True)
class SingleWeight(Unit):
    """One weight; its inner space is the one between its factors.

    Attributes:
        feeders: The layers whose outputs it reads number by number, through elementwise functions, and nothing else
            does: the first ones of an MLP that it is the last one of; or the layer that gives the values of an
            attention, whose heads it reads. What lies between them and it can be narrowed.
        heads: How the heads lie, in an attention.
        scores: The same where it gives the keys that an attention multiplies the queries of its feeder with.
        gives_queries: Whether it is the feeder that gives the keys, and it the queries.
    """

    kind = "weight"
    feeders: tuple[Weight, ...] = ()
    heads: HeadLayout | None = None
    scores: HeadLayout | None = None
    gives_queries: bool = False

    @property
    def weight(self) -> Weight:
        """The weight."""
        return self.weights[0]

    @property
    def geometry(self) -> Geometry:
        """Its sizes; only of a weight that holds a matrix."""
        assert self.weight.geometry is not None
        return self.weight.geometry

    def layer(self, model: nn.Module) -> nn.Module:
        """The layer under its name in a model."""
        return model.get_submodule(self.name)

    def matrices(self, weight: Tensor) -> Tensor:
        """A tensor that is shaped as the stored weight as (groups, out, in * kernel places)."""
        assert self.weight.layer_type is not None
        return self.weight.layer_type.to_kernels(weight, self.geometry).flatten(2)

    def to_weight(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        assert self.weight.layer_type is not None
        return self.weight.layer_type.to_weight(matrices.reshape(self.geometry.shape), self.geometry)

    def at(self, positions: Positions) -> "SingleWeight":
        """The same where a pass handles so many vectors."""
        return replace(self, weights=(replace(self.weight, positions=positions),))


def find_single_weights(model: nn.Module, trace: Trace, selection: LayerSelection) -> tuple[SingleWeight, ...]:
    """Every weight matrix of the model, in order of execution, with the reason where it must stay as it is.

    Raises:
        ModelError: the model has no layer of a known type, or a state that cannot be counted.
        PatternError: a pattern matches no layer.
    """
    unique_tensors(model)
    names = _names_by_module(model)
    layers = [module for module in names if _has_matrix(module)]
    if not any(find_layer_type(module) for module in layers):
        raise ModelError(
            f"{type(model).__name__} has no Linear or convolution layer, nor an Embedding: there is nothing to factor"
        )
    selected = selection.matching([name for module in layers for name in names[module]])
    last = next(reversed(list(trace.calls)), None) if selection.keep_last else None
    order = {name: place for place, name in enumerate(trace.calls)}
    inside, stacks = _already_handled(model), stacks_of(model)
    users = _users(model)
    units, counted = [], set[int]()
    for group in _tied(layers, lookups=selection.lookups):
        outputs = _outputs(group)
        # an embedding of which the weight is used elsewhere alone, as T5 has one, is no call site
        called = [module for module in group if not outputs or names[module][0] in order or module in outputs] or group
        call_sites = sorted(
            (names[module][0] for module in called),
            key=lambda name: (model.get_submodule(name) in outputs, order.get(name, len(order))),
        )
        tied = [name for module in group for name in names[module]]
        reason = (
            _not_selected(tied, selected=selected, last=last)
            or next((inside[module] for module in group if module in inside), None)
            or next((reason for module in group if (reason := _unfit(module, selection))), None)
            or _shared_elsewhere(users, group)
            or next((_KEYWORDS for name in call_sites if name in trace.keyworded), None)
            or next((f"{name} is not called by the model" for name in call_sites if name not in trace.calls), None)
            or next((_READ for name in call_sites if name in trace.read_elsewhere), None)
            or next((_DIFFERS for name in call_sites if name in trace.differing), None)
            or next((_SPECIAL for name in call_sites if name in trace.special), None)
        )
        own = group if not outputs else []  # of another size than the outputs of an embedding
        biases = {id(bias) for module in own if (bias := getattr(module, "bias", None)) is not None} - counted
        counted |= biases
        weight = _weight(model.get_submodule(call_sites[0]), tied, call_sites, trace.positions, biases=len(biases))
        tied_outputs = tuple(name for name in call_sites if model.get_submodule(name) in outputs)
        is_nested = not trace.nested.isdisjoint(call_sites)
        weight = replace(weight, stack=stacks.get(weight.name), outputs=tied_outputs, is_nested=is_nested)
        units.append(SingleWeight((weight,), reason))
    return tuple(sorted(units, key=lambda unit: order.get(unit.name, len(order))))


def _weight(
    layer: nn.Module, tied: Sequence[str], call_sites: Sequence[str], positions: Mapping[str, Positions], *, biases: int
) -> Weight:
    layer_type, own = find_layer_type(layer), list(layer.parameters(recurse=False))
    # a subclass or a parametrised layer cannot be exchanged, but its weight has a spectrum all the same
    weight: Any = getattr(layer, "weight", None) if layer_type else None
    whole = isinstance(weight, Tensor) and layer_type is not None and weight.ndim == layer_type.weight_dims
    shape = weight.shape if isinstance(weight, Tensor) else next((value.shape for value in own if value.ndim >= 2), ())
    return Weight(
        name=call_sites[0],
        tied_names=tuple(name for name in tied if name != call_sites[0]),
        call_sites=tuple(call_sites),
        kind=type(layer).__name__,
        shape=tuple(shape),
        layer_type=layer_type,
        geometry=layer_type.geometry(layer) if layer_type and whole and _is_ordinary(weight) else None,
        positions=sum((positions.get(site, Positions()) for site in call_sites), Positions()),
        biases=biases,
        params=sum(parameter.numel() for parameter in own),
        itemsize=next((parameter.element_size() for parameter in own), 4),
    )


def _names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    if find_layer_type(model):
        raise ModelError(
            "the model is a single layer, which has no place to be exchanged in; wrap it: nn.Sequential(layer)"
        )
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _has_matrix(module: nn.Module) -> bool:
    own = module._parameters.values()
    return bool(find_layer_type(module)) or any(parameter is not None and parameter.ndim >= 2 for parameter in own)


def _tied(layers: Sequence[nn.Module], *, lookups: bool) -> list[list[nn.Module]]:
    """Layers of one type in groups that share their weight; any other layer is a group of its own.

    Where embeddings may be factored, linear layers that share the weight of one are in its group.
    """
    groups: dict[Hashable, list[nn.Module]] = {}
    for module in layers:
        layer_type = find_layer_type(module)
        weight = module._parameters.get("weight") if layer_type and not layer_type.overrides(module) else None
        if layer_type is None or weight is None or weight.ndim != layer_type.weight_dims:
            groups[id(module)] = [module]
        else:
            groups.setdefault((id(weight), layer_type.name, layer_type.geometry(module)), []).append(module)
    if lookups:
        by_weight = {group[0]._parameters.get("weight"): group for group in groups.values() if _is_lookup(group[0])}
        for key, group in list(groups.items()):
            owner = by_weight.get(group[0]._parameters.get("weight"))
            if owner is not None and isinstance(key, tuple) and key[1] == "Linear":
                owner.extend(groups.pop(key))
    return list(groups.values())


def _outputs(group: Sequence[nn.Module]) -> set[nn.Module]:
    """Those that multiply by the weight that others look up."""
    outputs = {module for module in group if not _is_lookup(module)}
    return outputs if len(outputs) < len(group) else set()


def _is_lookup(module: nn.Module) -> bool:
    layer_type = find_layer_type(module)
    return layer_type is not None and layer_type.is_lookup


def _not_selected(tied: Sequence[str], *, selected: set[str], last: str | None) -> str | None:
    unselected = [name for name in tied if name not in selected]
    if len(unselected) == len(tied):
        return "not selected by include and exclude"
    if unselected:
        return f"shares its weight with {unselected[0]}, which is not selected"
    return "the last layer, kept dense as asked" if last in tied else None


def _already_handled(model: nn.Module) -> dict[nn.Module, str]:
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for inner in module.modules():
                reasons[inner] = _ATTENTION
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            reasons |= dict.fromkeys(module.modules(), _ADAPTER)
    reasons |= dict.fromkeys(routers_of(model), _ROUTER)
    for layer in low_rank_layers(model).values():
        reasons |= dict.fromkeys(layer.chain, "already a low-rank factor; st.merge(model) undoes it")
    return reasons


def _unfit(module: nn.Module, selection: LayerSelection) -> str | None:
    name, layer_type = type(module).__name__, find_layer_type(module)
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; remove the parametrisation first"
    if layer_type is None:
        own = {name: weight.shape for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
        stacks = [f"{name} {list(shape)}" for name, shape in own.items() if min(shape) > 1]
        why = f": {' and '.join(stacks)} hold one matrix for each expert, head or part{_EXPERTS}" if stacks else ""
        return f"{name} layers are not factored{why}"
    overridden = layer_type.overrides(module)
    if overridden and (overridden[0] == "__call__" or not isinstance(module, tuple(selection.treat_as))):
        base = f"nn.{layer_type.name}" if hasattr(nn, layer_type.name) else layer_type.name
        plain_call = overridden[0] != "__call__"
        advice = f"; if it gives what {base} gives, pass treat_as={{{name}: {base}}}" if plain_call else ""
        return f"{name} is a subclass of {base} with a {overridden[0]} of its own, which would be lost{advice}"
    if "forward" in vars(module):
        return "its forward was replaced on this very layer, which an exchange would lose"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it carries hooks, which an exchange would lose"
    more = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    if more:
        return f"it holds more than a weight and a bias: {', '.join(more)}"
    if layer_type.is_lookup and not selection.lookups:
        return LOOKUP
    return _unfit_tensors(module) or layer_type.skip_reason(module)


def _unfit_tensors(module: nn.Module) -> str | None:
    if module._parameters.get("weight") is None:
        return "its weight is not a parameter"
    for name, value in module._parameters.items():
        if value is not None and (type(value) is not nn.Parameter or not _is_ordinary(value)):
            layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
            kind = f"{type(value).__name__} {layout}{str(value.dtype).removeprefix('torch.')} on {value.device}"
            return f"its {name} is not an ordinary floating-point parameter ({kind})"
    return None


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether it has values that can be computed with.

    Not so if it is sparse, on meta, of less than two bytes each, or of a class with values of its own kind, such as
    quantised or distributed ones.
    """
    is_strided = is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return is_strided and tensor.is_floating_point() and tensor.element_size() > 1


def _users(model: nn.Module) -> dict[int, dict[nn.Module, str]]:
    """The modules that hold a parameter, by its number, with their names."""
    users: dict[int, dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {}).setdefault(module, name)
    return users


def _shared_elsewhere(users: Mapping[int, Mapping[nn.Module, str]], group: Sequence[nn.Module]) -> str | None:
    for module, name in users.get(id(group[0]._parameters.get("weight")), {}).items():
        if module not in group:
            return f"shares its weight with {name} ({type(module).__name__}), which needs it whole"
    return None
