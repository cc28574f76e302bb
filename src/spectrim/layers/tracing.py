"""What the layers of a model do in one pass: in which order they are called, and on how much."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, alike, call, evaluating, require_unwrapped, require_values, temporary
from spectrim.layers.factored import attributes_of
from spectrim.layers.selection import TreatAs
from spectrim.layers.types import LayerType, Positions, find_layer_type, layer_type_of

_KEYWORDS = {"input", "output_size"}
"""Those that factored layers take as well."""

CallHook = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with name, layer, input and output."""


def typed_layers(model: nn.Module) -> dict[str, LayerType]:
    """The layers that hold a matrix, by their first name."""
    types = ((name, find_layer_type(module)) for name, module in model.named_modules())
    return {name: kind for name, kind in types if kind is not None}


@contextmanager
def watching(model: nn.Module, on_call: CallHook) -> Iterator[None]:
    """Call `on_call(name, layer, input, output)` after each call of a layer that holds a matrix, in execution order.

    Raises:
        ModelError: the model has weights without values.
    """
    require_unwrapped(model)
    require_values(model)

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim and output.ndim:
                on_call(name, layer, x, output)

        return hook

    layers = ((name, model.get_submodule(name)) for name in typed_layers(model))
    with temporary(layer.register_forward_hook(observe(name), with_kwargs=True) for name, layer in layers):
        yield


@dataclass(frozen=True)
class Trace:
    """What one forward pass did, by layer name in order of first call.

    Attributes:
        positions: How many vectors each layer handled in all its calls together.
        calls: How often each layer was called.
        differing: Layers whose outputs are not those of the class that they were to be treated as.
        special: Layers of subclasses in whose place an ordinary layer changes the network's outputs.
        keyworded: Layers that are called with keyword arguments that not every layer takes.
    """

    positions: Mapping[str, Positions]
    calls: Mapping[str, int]
    differing: frozenset[str] = field(default_factory=frozenset)
    special: frozenset[str] = field(default_factory=frozenset)
    keyworded: frozenset[str] = field(default_factory=frozenset)


def trace(model: nn.Module, inputs: Inputs, *, treat_as: TreatAs | None = None) -> Trace:
    """Run the model once and record which layers are called, in which order and how much.

    Args:
        model: The model.
        inputs: One call's inputs.
        treat_as: Classes of layers to compare with others in each call; see `TreatAs`.
    """
    positions: dict[str, Positions] = {}
    calls: dict[str, int] = {}
    differing: set[str] = set()
    keyworded: set[str] = set()
    treated = tuple(treat_as or ())

    def count(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        kind = layer_type_of(layer)
        positions[name] = positions.get(name, Positions()) + kind.positions(layer, x, output)
        calls[name] = calls.get(name, 0) + 1
        if isinstance(layer, treated) and not _same(_plain(layer, kind)(x), output):
            differing.add(name)

    def note_keywords(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, __, kwargs: keyworded.update({name} if kwargs.keys() - _KEYWORDS else ())

    layers = ((name, model.get_submodule(name)) for name in typed_layers(model))
    hooks = (layer.register_forward_pre_hook(note_keywords(name), with_kwargs=True) for name, layer in layers)
    with evaluating(model), watching(model, count), temporary(hooks):
        outputs = call(model, inputs)
    special = _special(model, inputs, outputs, calls, treated=treated)
    return Trace(positions, calls, frozenset(differing), special, frozenset(keyworded))


def _special(
    model: nn.Module, inputs: Inputs, outputs: Any, names: Iterable[str], *, treated: tuple[type[nn.Module], ...]
) -> frozenset[str]:
    """Layers of subclasses of which the network uses more than an ordinary layer has."""
    layers = {name: model.get_submodule(name) for name in names}
    inherited = {name: layer for name, layer in layers.items() if _inherits(layer, treated=treated)}
    if not inherited or _unchanged(model, inputs, outputs, inherited.values()):
        return frozenset()
    alone = {name for name, layer in inherited.items() if not _unchanged(model, inputs, outputs, [layer])}
    return frozenset(alone or inherited)


def _inherits(layer: nn.Module, *, treated: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of a subclass that counts as its base."""
    kind = layer_type_of(layer)
    weight = layer._parameters.get("weight")
    if type(layer) is kind.base_of(type(layer)) or weight is None or weight.ndim != kind.weight_dims:
        return False
    return isinstance(layer, treated) or not kind.overrides(layer)


def _unchanged(model: nn.Module, inputs: Inputs, outputs: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether the network gives the same outputs with ordinary layers in the place of these."""
    ordinary = {layer: _plain(layer, layer_type_of(layer)) for layer in layers}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in ordinary
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = ordinary[child]
        with evaluating(model):
            return alike(outputs, call(model, inputs))
    except ModelError:  # it uses a method or an attribute of the class
        return False
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _plain(layer: nn.Module, kind: LayerType) -> nn.Module:
    """An ordinary layer with the sizes, options and values of this one."""
    bias = layer._parameters.get("bias")
    plain = kind.resized(layer, bias=bias is not None)
    plain.__dict__.update({name: value for name, value in attributes_of(layer).items() if not hasattr(plain, name)})
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
