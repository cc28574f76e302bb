"""What a network does with a layer's output: found by running it, not by knowing its class."""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.nested import is_in_transform, operands, tensors
from spectrim.layers.tracing import CallHook, calling
from spectrim.layers.types import layer_type_of

OnResidual = Callable[[str, nn.Module, Tensor], None]
"""Called with a layer's name, the layer, and the residual branch that is added to its output."""

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_RELUS = {"relu", "relu_"}


@dataclass(frozen=True, eq=False)
class Successor:
    """A layer's output z goes on as p = scale * z + shift, plus a residual branch of the same shape, then max(p, 0).

    Only steps that are the sole use of their tensor belong to it, so that a change of z has no other effect.

    Attributes:
        scale: (out,), from a BatchNorm in evaluation mode; ones without.
        shift: (out,), zeros without.
        residual: Whether a residual branch is added.
        relu: Whether a ReLU follows.
    """

    scale: Tensor
    shift: Tensor
    residual: bool = False
    relu: bool = False


@dataclass(eq=False)
class _Node:
    """A tensor on the way from a layer's output, and the steps that use it.

    Attributes:
        kind: Of the step that gave it: `add`, `relu` or `other`.
        affine: Scale and shift of a BatchNorm; of a layer's output ones and zeros.
        dims: How many dimensions it has.
        uses: What came of it.
    """

    kind: str = "other"
    affine: tuple[Tensor, Tensor] | None = None
    dims: int = 0
    uses: list["_Node"] = field(default_factory=list)


class _Follower(TorchFunctionMode):
    """Follows layers' outputs through every function that the model calls, and keeps none of them."""

    def __init__(self, on_residual: OnResidual | None) -> None:
        super().__init__()
        self.on_residual = on_residual
        self.layers: dict[str, nn.Module] = {}
        self.starts: dict[str, list[_Node]] = {}
        self.nodes: MutableMapping[Tensor, dict[str, _Node]] = WeakTensorKeyDictionary()
        self.added: set[str] = set()

    def begin(self, name: str, layer: nn.Module, output: Tensor) -> None:
        """Follow a layer's output from here."""
        out = output.shape[layer_type_of(layer).feature_dim(layer)]
        ones = torch.ones(out, dtype=output.dtype, device=output.device)
        node = _Node(affine=(ones, torch.zeros_like(ones)), dims=output.ndim)
        self.layers[name] = layer
        self.starts.setdefault(name, []).append(node)
        self.nodes.setdefault(output, {})[name] = node

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.nodes:
            return func(*args, **kwargs)
        sources = list(operands(args, kwargs))
        # before the call: one that works in place gives back the tensor that it was given
        used = {id(operand): self.nodes[operand] for operand in sources if operand in self.nodes}
        result = func(*args, **kwargs)
        if not used or not any(True for _ in tensors(result)):
            return result
        output = result if isinstance(result, Tensor) else None
        if output is not None and id(output) in used:
            del self.nodes[output]
        affine = _affine(args, kwargs) if func is functional.batch_norm else None
        for key, followed in used.items():
            kind, other = _kind(func, key, sources, output)
            for name, node in followed.items():
                node.uses.append(_Node(kind, affine))
                if output is not None:
                    self.nodes.setdefault(output, {})[name] = node.uses[-1]
                if other is not None and self.on_residual is not None and name not in self.added:
                    self.added.add(name)
                    self.on_residual(name, self.layers[name], other)
        return result


def _kind(func: Any, key: int, operands: Sequence[Tensor], output: Tensor | None) -> tuple[str, Tensor | None]:
    """The sort of a step, and what it adds."""
    name = getattr(func, "__name__", "")
    if output is None:
        return "other", None
    if name in _ADDITIONS and len(operands) == 2:
        others = [operand for operand in operands if id(operand) != key]
        if len(others) == 1 and others[0].shape == output.shape and operands[0].shape == operands[1].shape:
            return "add", others[0]
    return "relu" if name in _RELUS else "other", None


def _affine(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a call of BatchNorm that uses its running statistics."""
    call = signature(functional.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    _, mean, variance, weight, bias, training, _, eps = call.arguments.values()
    if training or mean is None or variance is None:
        return None
    scale = 1 / (variance + eps).sqrt()
    scale = scale if weight is None else scale * weight
    shift = -scale * mean
    return scale.detach(), (shift if bias is None else shift + bias).detach()


@contextmanager
def following(
    model: nn.Module,
    call_sites: Collection[str],
    *,
    on_call: CallHook | None = None,
    on_residual: OnResidual | None = None,
) -> Iterator[_Follower]:
    """Run the model within this, without gradients; each pass needs its own.

    Args:
        model: The network.
        call_sites: Names of the layers to follow.
        on_call: Called with name, layer, input and output after each of their calls. Without `on_residual` beside it,
            what the model does with the outputs is not followed, which saves time.
        on_residual: Called when a residual branch is first added to a layer's output.
    """
    follower, only_calls = _Follower(on_residual), on_call is not None and on_residual is None

    def begin(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if name in call_sites and not is_in_transform(x):
            if not only_calls:
                follower.begin(name, layer, output)
            if on_call is not None:
                on_call(name, layer, x, output)

    with evaluating(model), calling(model, begin), nullcontext() if only_calls else follower:
        yield follower


def find_successors(model: nn.Module, inputs: Inputs, call_sites: Collection[str]) -> dict[str, Successor]:
    """What follows every layer in `call_sites` that is called exactly once."""
    with following(model, call_sites) as follower:
        call(model, inputs)
    once = {name: nodes[0] for name, nodes in follower.starts.items() if len(nodes) == 1}
    return {name: _successor(follower.layers[name], node) for name, node in once.items()}


def _successor(layer: nn.Module, start: _Node) -> Successor:
    assert start.affine is not None
    (scale, shift), residual, step = start.affine, False, start
    while len(step.uses) == 1:
        (step,) = step.uses
        if step.kind == "relu":
            return Successor(scale, shift, residual, relu=True)
        # BatchNorm scales the second dimension: of a linear layer's outputs over time, the steps, not the features
        if step.affine is not None and not residual and start.dims + layer_type_of(layer).feature_dim(layer) == 1:
            scale, shift = scale * step.affine[0], shift * step.affine[0] + step.affine[1]
        elif step.kind == "add" and not residual:
            residual = True
        else:
            break
    return Successor(scale, shift, residual)
