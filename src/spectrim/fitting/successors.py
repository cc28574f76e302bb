"""What a network does with a layer's output: found by running it, not by knowing its class."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from spectrim.core.execution import Inputs, call, evaluating, tensors, watching

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_RELUS = {"relu", "relu_"}


@dataclass(frozen=True, eq=False)
class Sequel:
    """A layer's output z goes on as p = scale * z + shift, plus another stream s of the same shape, then max(p, 0).

    Only steps that are the sole use of their tensor belong to it, so that nothing else feels a change of z.

    Attributes:
        scale: (out,), from a BatchNorm in evaluation mode; ones without.
        shift: (out,), zeros without.
        stream: Whether another stream is added.
        relu: Whether a ReLU follows.
    """

    scale: Tensor
    shift: Tensor
    stream: bool = False
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


class _Reader(TorchFunctionMode):
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
        used = {id(one): self.nodes[id(one)] for one in operands if id(one) in self.nodes}
        result = func(*args, **(kwargs or {}))
        if used and any(True for _ in tensors(result)):
            made = result if isinstance(result, Tensor) else None
            if made is not None and id(made) in used:
                del self.nodes[id(made)]
            for key, followed in used.items():
                self._note(func, key, followed, operands, made)
        return result

    def _note(
        self, func: Any, key: int, followed: Mapping[str, _Node], operands: Sequence[Tensor], made: Tensor | None
    ) -> None:
        kind, other = _kind(func, key, operands, made)
        for name, node in followed.items():
            step = _Step(kind, _Node(node.tensor if made is None else made), other)
            node.steps.append(step)
            if made is not None:
                self.nodes.setdefault(id(made), {})[name] = step.node
            self.on_step(name, step)

    def normalised(self, layer: nn.Module, output: Tensor) -> None:
        """Tell the last step to `output` what its BatchNorm did."""
        affine = _affine(layer)
        for start in self.starts.values():
            for node in start:
                for step in _path(node):
                    if step.node.tensor is output and step.kind == "batch_norm" and affine is not None:
                        step.scale, step.shift = affine


def _kind(func: Any, key: int, operands: Sequence[Tensor], made: Tensor | None) -> tuple[str, Tensor | None]:
    """The sort of a step, and what it adds."""
    name = getattr(func, "__name__", "")
    if made is None:
        return "other", None
    if name in _ADDITIONS and len(operands) == 2:
        others = [one for one in operands if id(one) != key]
        if len(others) == 1 and others[0].shape == made.shape and operands[0].shape == operands[1].shape:
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


OnCall = Callable[[str, nn.Module, Tensor, Tensor], None]
OnStream = Callable[[str, Tensor], None]


@contextmanager
def following(
    model: nn.Module, sites: Collection[str], *, on_call: OnCall | None = None, on_stream: OnStream | None = None
) -> Iterator[_Reader]:
    """Run the model within this, without gradients; each pass needs its own.

    Args:
        model: The network.
        sites: Names of the layers to follow.
        on_call: Called with name, layer, input and output after each of their calls.
        on_stream: Called with the name and the other stream when one is first added to a layer's output.
    """
    reader = _Reader()
    added: set[str] = set()

    def begin(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if name in sites:
            reader.begin(name, output)
            if on_call is not None:
                on_call(name, layer, given, output)

    def step(name: str, taken: _Step) -> None:
        if taken.other is not None and on_stream is not None and name not in added:
            added.add(name)
            on_stream(name, taken.other)

    reader.on_step = step
    with evaluating(model), watching(model, begin), reader:
        yield reader


def sequels(model: nn.Module, inputs: Inputs, sites: Collection[str]) -> dict[str, Sequel]:
    """The sequel of every layer in `sites` that is called exactly once."""
    layers: dict[str, nn.Module] = {}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with following(model, sites, on_call=lambda name, layer, _, __: layers.update({name: layer})) as reader:
        handles = [one.register_forward_hook(lambda norm, _, output: reader.normalised(norm, output)) for one in norms]
        try:
            call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return {name: _sequel(layers[name], nodes[0]) for name, nodes in reader.starts.items() if len(nodes) == 1}


def _sequel(layer: nn.Module, start: _Node) -> Sequel:
    linear = isinstance(layer, nn.Linear)
    out = start.tensor.shape[-1] if linear else int(getattr(layer, "out_channels", 0))
    scale, shift = start.tensor.new_ones(out), start.tensor.new_zeros(out)
    stream = relu = False
    for step in _path(start):
        if step.kind == "batch_norm" and step.scale is not None and step.shift is not None and not stream:
            # of a linear layer's outputs over time steps, BatchNorm scales the steps, not the features
            if linear and start.tensor.ndim != 2:
                break
            scale, shift = scale * step.scale, shift * step.scale + step.shift
        elif step.kind == "add" and not stream:
            stream = True
        elif step.kind == "relu":
            relu = True
            break
        else:
            break
    return Sequel(scale, shift, stream, relu)
