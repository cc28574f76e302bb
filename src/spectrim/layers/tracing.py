"""What the layers of a model do in one pass: in which order they are called, and on how much."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectrim.core.dispatch import OperatorMode
from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating, require_unwrapped, require_values, temporary
from spectrim.core.nested import alike, extent, extents, is_in_transform, joined, overlap
from spectrim.layers.experts import evenly, rerouted
from spectrim.layers.factored import attributes_of
from spectrim.layers.selection import TreatAs
from spectrim.layers.types import LayerType, Positions, find_layer_type, layer_type_of

_KEYWORDS = {"input", "output_size", "offsets", "per_sample_weights"}
"""Those that factored layers take as well."""

_ASKS_FOR_SIZES = re.compile(r"aten::(detach|new_\w+|\w+_like)(\.|$)")
"""Operators that look at a tensor's type and shape alone, or only give it another name."""

CallHook = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with name, layer, input and output."""


def typed_layers(model: nn.Module) -> dict[str, LayerType]:
    """The layers that hold a matrix, by their first name."""
    types = ((name, find_layer_type(module)) for name, module in model.named_modules())
    return {name: kind for name, kind in types if kind is not None}


@contextmanager
def watching(model: nn.Module, on_call: CallHook) -> Iterator[None]:
    """Call `on_call(name, layer, input, output)` after each call of a layer that holds a matrix, in execution order.

    Of nested tensors it gets the parts one after the other.

    Raises:
        ModelError: the model has weights without values.
    """
    require_unwrapped(model)
    require_values(model)
    with calling(model, on_call):
        yield


@contextmanager
def calling(model: nn.Module, on_call: CallHook) -> Iterator[None]:
    """As `watching`, of a model that has been checked."""

    def observe(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim and output.ndim:
            on_call(name, layer, joined(x), joined(output))

    layers = ((name, model.get_submodule(name)) for name in typed_layers(model))
    with temporary(layer.register_forward_hook(partial(observe, name), with_kwargs=True) for name, layer in layers):
        yield


@contextmanager
def ended_at(model: nn.Module, name: str, *, on_call: CallHook) -> Iterator[None]:
    """Call `on_call` before the layer `name` computes anything, with an output of which only the shape is right.

    `on_call` has to end the pass. A call that is not with one plain tensor alone runs as usual.
    """
    layer = model.get_submodule(name)
    own, forward = layer.__dict__.get("forward"), layer.forward
    shaped = layer_type_of(layer).resized(layer, bias=False)

    def ended(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if type(x) is Tensor and x.ndim and x.layout == torch.strided and not (x.is_nested or is_in_transform(x)):
            on_call(name, layer, x, x.new_zeros(()).expand(shaped(x.to("meta")).shape))
        return forward(*args, **kwargs)

    layer.__dict__["forward"] = ended
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if own is not None:
            layer.__dict__["forward"] = own


@dataclass(frozen=True)
class Trace:
    """What one forward pass did, by layer name in order of first call.

    Attributes:
        positions: How many vectors each layer handled in all its calls together.
        calls: How often each layer was called.
        differing: Layers whose outputs are not those of the class that they were to be treated as.
        special: Layers in whose place another one changes the network's outputs, as where it asks for their class.
        keyworded: Layers that are called with keyword arguments that not every layer takes.
        read_elsewhere: Layers whose weight is used outside of their own calls.
        nested: Layers that are called with nested tensors.
    """

    positions: Mapping[str, Positions]
    calls: Mapping[str, int]
    differing: frozenset[str] = field(default_factory=frozenset)
    special: frozenset[str] = field(default_factory=frozenset)
    keyworded: frozenset[str] = field(default_factory=frozenset)
    read_elsewhere: frozenset[str] = field(default_factory=frozenset)
    nested: frozenset[str] = field(default_factory=frozenset)


def trace(model: nn.Module, inputs: Inputs, *, treat_as: TreatAs | None = None) -> Trace:
    """Run the model once and record which layers are called, in which order and how much.

    Experts all get as many tokens, so that each is called.

    Args:
        model: The model.
        inputs: One call's inputs.
        treat_as: Classes of layers to compare with others in each call; see `TreatAs`.
    """
    positions: dict[str, Positions] = {}
    calls: dict[str, int] = {}
    differing: set[str] = set()
    keyworded, nested = set[str](), set[str]()
    treated = tuple(treat_as or ())

    def count(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        kind = layer_type_of(layer)
        positions[name] = positions.get(name, Positions()) + kind.positions(layer, x, output)
        calls[name] = calls.get(name, 0) + 1
        if isinstance(layer, treated) and not _same(_plain(layer, kind)(x), output):
            differing.add(name)

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyworded.update({name} if kwargs.keys() - _KEYWORDS else ())
        nested.update({name} if any(getattr(x, "is_nested", False) for x in (*args, *kwargs.values())) else ())

    layers = {name: model.get_submodule(name) for name in typed_layers(model)}
    keywords = (each.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, each in layers.items())
    reads = _WeightReads(layers)
    with rerouted(model, evenly):
        with evaluating(model), watching(model, count), temporary(keywords), temporary(reads.hooks()), reads:
            outputs = call(model, inputs)
        special = _special(model, inputs, outputs, calls, treated=treated)
    return Trace(positions, calls, *map(frozenset, (differing, special, keyworded, reads.names, nested)))


class _WeightReads(OperatorMode):
    """Notes the layers whose weight is given to an operator while no layer with this weight is being called."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._layers = layers
        weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
        self._extents = {name: extent(weight) for name, weight in weights.items() if weight is not None}
        self._under_way: list[str] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        """Those that note which calls are under way."""
        for name, layer in self._layers.items():
            yield layer.register_forward_pre_hook(lambda *_, name=name: self._under_way.append(name), prepend=True)
            yield layer.register_forward_hook(lambda *_: self._under_way.pop() and None, always_call=True)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for operand in [] if _ASKS_FOR_SIZES.match(operator.name()) else extents((args, kwargs)):
            owners = {name for name, weight in self._extents.items() if overlap(weight, operand)}
            if owners.isdisjoint(self._under_way):
                self.names |= owners
        return operator(*args, **(kwargs or {}))


def _special(
    model: nn.Module, inputs: Inputs, outputs: Any, names: Iterable[str], *, treated: tuple[type[nn.Module], ...]
) -> frozenset[str]:
    """Layers of which the network uses more than another layer in their place has, such as their class."""
    layers = {name: model.get_submodule(name) for name in names}
    replaceable = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, treated) or not layer_type_of(layer).overrides(layer)
    }
    if _unchanged(model, inputs, outputs, replaceable.values()) or not _unchanged(model, inputs, outputs, ()):
        return frozenset()
    alone = {name for name, layer in replaceable.items() if not _unchanged(model, inputs, outputs, [layer])}
    return frozenset(alone or replaceable)


class _StandIn(nn.Module):
    """Runs a layer in its place, and answers what a factored layer answers, without being of its class."""

    _layer: nn.Module
    _was_run: bool

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {"_layer": layer, "_was_run": False} | attributes_of(layer)
        self._parameters.update(layer._parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_was_run"] = True
        return self._layer(*args, **kwargs)


def _unchanged(model: nn.Module, inputs: Inputs, outputs: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether the network runs others in the place of these layers, and gives the same outputs."""
    others = {layer: _StandIn(layer) for layer in layers}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in others
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = others[child]
        with evaluating(model):
            return alike(outputs, call(model, inputs)) and all(other._was_run for other in others.values())
    except ModelError:  # it uses a method or an attribute of the class
        return False
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _plain(layer: nn.Module, kind: LayerType) -> nn.Module:
    """An ordinary layer with the sizes, options and values of this one."""
    bias = layer._parameters.get("bias")
    plain = kind.resized(layer, bias=bias is not None)
    own = layer_type_of(plain)
    weight = own.to_weight(kind.kernels(layer), own.geometry(plain))
    plain._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
    return plain


def _same(expected: Tensor, output: Tensor) -> bool:
    if expected.shape != output.shape or expected.dtype != output.dtype:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = max(1e-5, 2 * torch.finfo(output.dtype).eps)
    return bool(torch.isclose(expected, output, rtol=0, atol=tolerance * scale, equal_nan=True).all())


def leaves_of(x: Tensor) -> set[Tensor]:
    """The tensors with gradients that one is made of."""
    leaves, seen, pending = set[Tensor](), set[Any](), list[Any]([x.grad_fn])
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::AccumulateGrad":
                leaves.add(node.variable)
            pending += [before for before, _ in node.next_functions]
    return leaves
