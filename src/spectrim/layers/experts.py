"""Experts of a mixture whose weights are stacked, with a layer for each of them, so that each can be factored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.core.nested import alike
from spectrim.layers.factored import attributes_of, shallow_copy

Rerouting = Callable[[Tensor, int], Tensor]
"""From indices of experts (tokens, places) and how many experts there are to other indices; -1 is none of them."""

_OPTIONS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts"}
"""Attributes of every class that has transformers' `use_experts_implementation`."""

_TRIED = 8


class UnfusedExperts(nn.Module):
    """Experts that hold a layer for each projection of each of them; the results are the same to rounding.

    In the place of a class of transformers that holds three-dimensional weights, (experts, out, in) or
    (experts, in, out), and says by `use_experts_implementation` what it does with them. Its own gate is used.

    Attributes:
        gate_up: By expert, size -> 2 * inner size, an `nn.Linear` or a factored one; `up` where there is no gate.
        down: By expert, inner size -> size.

    Shapes:
        hidden_states (tokens, size), top_k_index and top_k_weights (tokens, places), output (tokens, size).
    """

    num_experts: int
    _outline: Any
    _reroute: Rerouting | None

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        outline = shallow_copy(fused)
        outline._parameters = {
            name: nn.Parameter(stack.detach().to("meta"), requires_grad=stack.requires_grad)
            for name, stack in fused.named_parameters(recurse=False)
        }
        # past nn.Module's own bookkeeping: the outline is no part of the model
        self.__dict__.update(attributes_of(fused) | {"_outline": outline, "_reroute": None})
        for name in _projections(fused):
            self.add_module(name.removesuffix("_proj"), nn.ModuleList(_layers(fused, name)))
        self.training = fused.training

    @classmethod
    def parts(cls, fused: nn.Module) -> tuple[str, ...]:
        """Names of the layers that experts would hold; none for another module, or if outputs would not be the same."""
        if not _is_ordinary(fused):
            return ()
        number = len(cast(Tensor, fused.down_proj))
        return tuple(f"{name.removesuffix('_proj')}.{i}" for name in _projections(fused) for i in range(number))

    @classmethod
    def replaces(cls, fused: nn.Module) -> bool:
        """Whether it gives what these experts give, for some random tokens; not tried where weights have no values."""
        down: Any = fused.down_proj
        if down.is_meta:
            return True
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_TRIED, down.shape[-1 if fused.is_transposed else 1], generator=generator).to(down)
        weights, index = torch.rand(_TRIED, len(down), generator=generator).topk(min(2, len(down)))
        inputs = (x, index.to(down.device), weights.to(down))
        try:
            with torch.no_grad():
                return alike(fused(*inputs), cls(fused)(*inputs))
        except Exception:  # the code of somebody's class
            return False

    @property
    def stacks(self) -> dict[str, list[nn.Module]]:
        """The layers of all experts, by projection."""
        return {name: list(layers.children()) for name, layers in self.named_children()}

    @property
    def is_dense(self) -> bool:
        """Whether all layers are as they were made, so that they can be put together."""
        layers = (layer for stack in self.stacks.values() for layer in stack)
        return all(type(layer) is nn.Linear and (layer.bias is not None) is self._outline.has_bias for layer in layers)

    def fused(self) -> nn.Module:
        """The class that this stands for, with these weights."""
        fused = shallow_copy(self._outline)
        for name, layers in self.stacks.items():
            tensors = {f"{name}_proj": [cast(Tensor, layer.weight) for layer in layers]}
            if self._outline.is_transposed:
                tensors = {stack: [weight.T for weight in weights] for stack, weights in tensors.items()}
            if self._outline.has_bias:
                tensors[f"{name}_proj_bias"] = [cast(Tensor, layer.bias) for layer in layers]
            for stack, parts in tensors.items():
                whole = torch.stack([part.detach() for part in parts])
                fused._parameters[stack] = nn.Parameter(whole, requires_grad=parts[0].requires_grad)
        return fused.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of what each token's experts give, by its weights."""
        index, (into, out) = top_k_index, self.stacks.values()
        if self._reroute is None:
            reached = index.unique().tolist()
        else:
            index, reached = self._reroute(index, len(out)), range(len(out))
        places = {expert: torch.where(index == expert) for expert in reached if 0 <= expert < len(out)}
        gate = self._outline._apply_gate if self._outline.has_gate else self._outline.act_fn
        inner = {expert: gate(into[expert](hidden_states[token])) for expert, (token, _) in places.items()}
        kind = torch.result_type(hidden_states, top_k_weights)
        outputs = torch.zeros(*index.shape, hidden_states.shape[-1], dtype=kind, device=hidden_states.device)
        for expert, (token, place) in places.items():
            y = out[expert](inner.pop(expert)) * top_k_weights[token, place, None]
            outputs[token, place] = y.to(kind)
        return outputs.sum(dim=1).to(hidden_states.dtype)


@contextmanager
def rerouted(model: nn.Module, reroute: Rerouting) -> Iterator[None]:
    """Send tokens to other experts; those that no token reaches are called as well, with none."""
    experts = [module for module in model.modules() if isinstance(module, UnfusedExperts)]
    try:
        for module in experts:
            module.__dict__["_reroute"] = reroute
        yield
    finally:
        for module in experts:
            module.__dict__["_reroute"] = None


def evenly(index: Tensor, experts: int) -> Tensor:
    """As many tokens to each expert as to any other, or one more.

    Which expert a token goes to depends on data, and on what was compressed before it; what a pass costs should not.
    """
    return torch.arange(index.numel(), device=index.device).reshape(index.shape) % experts


def stacks_of(model: nn.Module) -> dict[str, str]:
    """By the name of an expert's layer, the name of the stack that has this projection of all experts."""
    experts = ((name, module) for name, module in model.named_modules() if isinstance(module, UnfusedExperts))
    stacks = ((f"{name}.{own}", layers) for name, module in experts for own, layers in module.stacks.items())
    return {f"{stack}.{number}": stack for stack, layers in stacks for number in range(len(layers))}


def routers_of(model: nn.Module) -> set[nn.Module]:
    """The modules that choose experts: beside these, with as many outputs."""
    return {
        part
        for parent in model.modules()
        for experts in parent.children()
        if isinstance(experts, UnfusedExperts)
        for child in parent.children()
        if child is not experts
        for part in child.modules()
        if getattr(part, "out_features", None) == experts.num_experts
    }


def _projections(fused: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if fused.has_gate else "up_proj", "down_proj"


def _is_ordinary(module: nn.Module) -> bool:
    options = vars(module)
    if not options.keys() >= _OPTIONS or "forward" in options or getattr(module, "_is_expert_parallel", False):
        return False
    hooks = any(hooks for name, hooks in options.items() if name.endswith("_hooks"))
    if hooks or module.has_post_expert_norm or any(True for child in module.children() for _ in child.parameters()):
        return False
    biases = [f"{name}_bias" for name in _projections(module)] if module.has_bias else []
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    plain = all(type(parameter) is nn.Parameter and parameter.is_floating_point() for parameter in module.parameters())
    return plain and shapes == dict.fromkeys(_projections(module), 3) | dict.fromkeys(biases, 2)


def _layers(fused: nn.Module, name: str) -> Iterator[nn.Linear]:
    """A linear layer for each expert, of views of the stack."""
    stack, biases = fused.get_parameter(name), fused._parameters.get(f"{name}_bias")
    like = {"device": "meta", "dtype": stack.dtype}
    for expert, own in enumerate(stack.detach()):
        weight = own.T if fused.is_transposed else own
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, **cast(Any, like))
        layer.weight = nn.Parameter(weight, requires_grad=stack.requires_grad)
        if biases is not None:
            layer.bias = nn.Parameter(biases.detach()[expert], requires_grad=biases.requires_grad)
        yield layer
