"""What the layers of a model do in one pass: in which order they are called, and on how much."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.execution import Inputs, call, evaluating, require_unwrapped, require_values, temporary
from spectrim.layers.selection import TreatAs
from spectrim.layers.types import LayerType, Positions, find_layer_type, layer_type_of

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
            if isinstance(x, Tensor) and isinstance(output, Tensor):
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
    """

    positions: Mapping[str, Positions]
    calls: Mapping[str, int]
    differing: frozenset[str] = field(default_factory=frozenset)


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
    treated = tuple(treat_as or ())

    def count(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        kind = layer_type_of(layer)
        positions[name] = positions.get(name, Positions()) + kind.positions(layer, x, output)
        calls[name] = calls.get(name, 0) + 1
        if isinstance(layer, treated) and not _same(_plain(layer, kind)(x), output):
            differing.add(name)

    with evaluating(model), watching(model, count):
        call(model, inputs)
    return Trace(positions, calls, frozenset(differing))


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
    return bool(torch.isclose(expected, output, rtol=0, atol=1e-5 * scale, equal_nan=True).all())
