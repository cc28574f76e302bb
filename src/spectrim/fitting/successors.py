"""What a network does with a layer's output: found by running it, not by knowing its class."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.core.nested import tensors
from spectrim.layers.tracing import CallHook, watching
from spectrim.layers.types import layer_type_of

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
    """A tensor on the way from a layer's output, and the steps that use it."""

    tensor: Tensor
    steps: list["_Step"] = field(default_factory=list)


@dataclass(eq=False)
class _Step:
    kind: str
    node: _Node
    other: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class _Follower(TorchFunctionMode):
    """Follows layers' outputs through every function that the model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, list[_Node]] = {}
        self.nodes: dict[int, dict[str, _Node]] = {}
        self.on_step: Callable[[str, _Step], None] = lambda _, __: None

    def begin(self, name: str, output: Tensor) -> None:
        """Follow a layer's output from here."""
        node = _Node(output)
        self.starts.setdefault(name, []).append(node)
        self.nodes.setdefault(id(output), {})[name] = node

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.nodes:
            return func(*args, **(kwargs or {}))
        operands = list(tensors((args, kwargs or {})))
        # before the call: one that works in place gives back the tensor that it was given
        used = {id(operand): self.nodes[id(operand)] for operand in operands if id(operand) in self.nodes}
        result = func(*args, **(kwargs or {}))
        if used and any(True for _ in tensors(result)):
            output = result if isinstance(result, Tensor) else None
            if output is not None and id(output) in used:
                del self.nodes[id(output)]
            for key, followed in used.items():
                self._add_steps(func, key, followed, operands, output)
        return result

    def _add_steps(
        self, func: Any, key: int, followed: Mapping[str, _Node], operands: Sequence[Tensor], output: Tensor | None
    ) -> None:
        kind, other = _kind(func, key, operands, output)
        for name, node in followed.items():
            step = _Step(kind, _Node(node.tensor if output is None else output), other)
            node.steps.append(step)
            if output is not None:
                self.nodes.setdefault(id(output), {})[name] = step.node
            self.on_step(name, step)

    def normalised(self, layer: nn.Module, output: Tensor) -> None:
        """Add to the last step to `output` what its BatchNorm did."""
        affine = _affine(layer)
        for start in self.starts.values():
            for node in start:
                for step in _path(node):
                    if step.node.tensor is output and step.kind == "batch_norm" and affine is not None:
                        step.scale, step.shift = affine


def _kind(func: Any, key: int, operands: Sequence[Tensor], output: Tensor | None) -> tuple[str, Tensor | None]:
    """The sort of a step, and what it adds."""
    name = getattr(func, "__name__", "")
    if output is None:
        return "other", None
    if name in _ADDITIONS and len(operands) == 2:
        others = [operand for operand in operands if id(operand) != key]
        if len(others) == 1 and others[0].shape == output.shape and operands[0].shape == operands[1].shape:
            return "add", others[0]
    if name in _RELUS or name == "batch_norm":
        return name.removesuffix("_"), None
    return "other", None


def _path(node: _Node) -> Iterator[_Step]:
    """The steps from a node on, as long as each tensor has a single use."""
    while len(node.steps) == 1:
        step = node.steps[0]
        yield step
        node = step.node


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a BatchNorm that uses its running statistics."""
    if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
        return None
    scale = 1 / (layer.running_var + layer.eps).sqrt()
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -scale * layer.running_mean
    return scale.detach(), (shift if layer.bias is None else shift + layer.bias).detach()


@contextmanager
def following(
    model: nn.Module,
    call_sites: Collection[str],
    *,
    on_call: CallHook | None = None,
    on_residual: Callable[[str, Tensor], None] | None = None,
) -> Iterator[_Follower]:
    """Run the model within this, without gradients; each pass needs its own.

    Args:
        model: The network.
        call_sites: Names of the layers to follow.
        on_call: Called with name, layer, input and output after each of their calls.
        on_residual: Called with the name and the residual branch when one is first added to a layer's output.
    """
    follower = _Follower()
    added: set[str] = set()

    def begin(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if name in call_sites:
            follower.begin(name, output)
            if on_call is not None:
                on_call(name, layer, x, output)

    def report_residual(name: str, step: _Step) -> None:
        if step.other is not None and on_residual is not None and name not in added:
            added.add(name)
            on_residual(name, step.other)

    follower.on_step = report_residual
    with evaluating(model), watching(model, begin), follower:
        yield follower


def find_successors(model: nn.Module, inputs: Inputs, call_sites: Collection[str]) -> dict[str, Successor]:
    """What follows every layer in `call_sites` that is called exactly once."""
    layers: dict[str, nn.Module] = {}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with following(model, call_sites, on_call=lambda name, layer, _, __: layers.update({name: layer})) as follower:
        hooks = (
            norm.register_forward_hook(lambda norm, _, output: follower.normalised(norm, output)) for norm in norms
        )
        with temporary(hooks):
            call(model, inputs)
    return {name: _successor(layers[name], nodes[0]) for name, nodes in follower.starts.items() if len(nodes) == 1}


def _successor(layer: nn.Module, start: _Node) -> Successor:
    dimension = layer_type_of(layer).feature_dim(layer)
    out = start.tensor.shape[dimension]
    scale, shift = start.tensor.new_ones(out), start.tensor.new_zeros(out)
    residual = relu = False
    for step in _path(start):
        if step.kind == "batch_norm" and step.scale is not None and step.shift is not None and not residual:
            # BatchNorm scales the second dimension: of a linear layer's outputs over time, the steps, not the features
            if start.tensor.ndim + dimension != 1:
                break
            scale, shift = scale * step.scale, shift * step.scale + step.shift
        elif step.kind == "add" and not residual:
            residual = True
        elif step.kind == "relu":
            relu = True
            break
        else:
            break
    return Successor(scale, shift, residual, relu)
