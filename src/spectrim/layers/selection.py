"""Finding the layers of a model, and exchanging them: all or none."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from spectrim.core.errors import ModelError, PatternError
from spectrim.core.execution import Trace
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.registry import LAYERS, refusal

Patterns = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Target:
    """One weight and every place that uses it.

    Attributes:
        name: The layer's first name.
        also: Its other names, and the names of other layers that share the weight.
        sites: The first name of each distinct layer that uses the weight, `name` first.
        module: The layer under `name`.
        refusal: Why the layer cannot be factored, or None.
    """

    name: str
    also: tuple[str, ...]
    sites: tuple[str, ...]
    module: nn.Module
    refusal: str | None


def find_targets(
    model: nn.Module, trace: Trace, *, include: Patterns, exclude: Patterns, keep_last: bool
) -> tuple[Target, ...]:
    """Every layer with a weight matrix, in order of execution, with the reason where it must stay as it is.

    Raises:
        ModelError: the model has no Linear or convolution layer, or a state that cannot be counted.
        PatternError: a pattern matches no layer.
    """
    unique_tensors(model)
    names = _names_by_module(model)
    layers = [module for module in names if _has_matrix(module)]
    if not any(isinstance(module, LAYERS) for module in layers):
        raise ModelError(f"{type(model).__name__} has no Linear or convolution layer, so there is nothing to factor")
    known = [name for module in layers for name in names[module]]
    chosen = _matching(known, include) - _matching(known, exclude)
    last = next(reversed(list(trace.calls)), None) if keep_last else None
    order = {name: place for place, name in enumerate(trace.calls)}
    inside = _already_handled(model)
    targets = []
    for group in _tied(layers):
        sites = sorted((names[module][0] for module in group), key=lambda name: order.get(name, len(order)))
        every = [name for module in group for name in names[module]]
        first = model.get_submodule(sites[0])
        refusal = (
            _kept_by_choice(every, chosen=chosen, last=last)
            or next((inside[module] for module in group if module in inside), None)
            or next((reason for module in group if (reason := _unfit(module))), None)
            or _shared_elsewhere(model, group)
            or next((f"{name} is not called by the model" for name in sites if name not in trace.calls), None)
        )
        also = tuple(name for name in every if name != sites[0])
        targets.append(Target(sites[0], also, tuple(sites), first, refusal))
    return tuple(sorted(targets, key=lambda target: order.get(target.name, len(order))))


def replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each module in the place its name gives, in `model` itself; if one step fails, none has happened."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, new in replacements.items():
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            done.append((parent, child, parent.get_submodule(child)))
            setattr(parent, child, new)
            _match_fast_path(parent)
    except BaseException:
        for parent, child, old in reversed(done):
            setattr(parent, child, old)
            _match_fast_path(parent)
        raise


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """Every dotted name under which `module` is reached, in registration order."""
    return tuple(name for name, other in model.named_modules(remove_duplicate=False) if other is module)


def near(name: str, known: Iterable[str]) -> str:
    """`; near names: ..` for a message, or the first few known ones when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near names: {', '.join(close)}" if close else f"; there are: {', '.join(known[:8])}"


def _names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    if isinstance(model, LAYERS):
        raise ModelError(
            "the model is a single layer, which has no place to be exchanged in; wrap it: nn.Sequential(layer)"
        )
    return names


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, LAYERS):
        return True
    return any(parameter is not None and parameter.ndim >= 2 for parameter in module._parameters.values())


def _matching(names: Sequence[str], patterns: Patterns) -> set[str]:
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise PatternError(f"the pattern {pattern!r} matches no layer{near(pattern, names)}")
        matched |= hits
    return matched


def _tied(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Layers in groups that share their weight; a layer without a plain weight is a group of its own."""
    groups: dict[int, list[nn.Module]] = {}
    for module in layers:
        weight = module._parameters.get("weight") if type(module) in LAYERS else None
        groups.setdefault(id(module if weight is None else weight), []).append(module)
    return list(groups.values())


def _kept_by_choice(every: Sequence[str], *, chosen: set[str], last: str | None) -> str | None:
    left_out = [name for name in every if name not in chosen]
    if len(left_out) == len(every):
        return "not selected by include and exclude"
    if left_out:
        return f"shares its weight with {left_out[0]}, which is not selected"
    if last in every:
        return "the last layer, kept dense as asked"
    return None


def _already_handled(model: nn.Module) -> dict[nn.Module, str]:
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for inner in module.modules():
                reasons[inner] = "nn.MultiheadAttention reads its weights itself, without calling a layer"
    for layer in low_rank_layers(model).values():
        reasons |= dict.fromkeys(layer.chain, "already a low-rank factor")
    return reasons


def _unfit(module: nn.Module) -> str | None:
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; remove the parametrisation first"
    if kind not in LAYERS:
        base = next((known.__name__ for known in LAYERS if isinstance(module, known)), None)
        return (
            f"{kind.__name__} is a subclass of nn.{base} whose own behaviour would be lost"
            if base
            else f"{kind.__name__} layers are not factored"
        )
    if "forward" in vars(module):
        return "its forward was replaced on this very layer, which an exchange would lose"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it carries hooks, which an exchange would lose"
    more = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    if more:
        return f"it holds more than a weight and a bias: {', '.join(more)}"
    return _unfit_tensors(module) or refusal(module)


def _unfit_tensors(module: nn.Module) -> str | None:
    if module._parameters.get("weight") is None:
        return "its weight is not a parameter"
    for name, value in module._parameters.items():
        # a tensor subclass (quantised, distributed) has a floating-point type, and values of its own kind
        if value is not None and (type(value) is not nn.Parameter or value.is_meta or not value.is_floating_point()):
            kind = f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} on {value.device}"
            return f"its {name} is not an ordinary floating-point parameter ({kind})"
    return None


def _shared_elsewhere(model: nn.Module, group: Sequence[nn.Module]) -> str | None:
    weight = group[0]._parameters.get("weight")
    for name, module in model.named_modules():
        if module not in group and any(
            parameter is weight for parameter in module._parameters.values() if weight is not None
        ):
            return f"shares its weight with {name} ({type(module).__name__}), which needs it whole"
    return None


def _match_fast_path(parent: nn.Module) -> None:
    """Torch's fused encoder layer multiplies by `linear1.weight` itself; let it do so only for dense layers."""
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return
    dense = isinstance(parent.linear1, nn.Linear) and isinstance(parent.linear2, nn.Linear)
    relu = parent.activation is functional.relu or isinstance(parent.activation, nn.ReLU)
    gelu = parent.activation is functional.gelu or isinstance(parent.activation, nn.GELU)
    parent.activation_relu_or_gelu = int(dense and (relu or gelu)) * (2 if gelu else 1)


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `model` with each shared tensor once, and for every other name the one that holds its tensor.

    Returns:
        tensors by name, and aliases from name to the name in the first mapping.
    """
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's state {name!r} is a {type(value).__name__}, not a tensor, and cannot be saved; "
                "if the layer is quantised, compress the model first and quantise it afterwards"
            )
        if id(value) in seen:
            aliases[name] = seen[id(value)]
        else:
            seen[id(value)] = name
            tensors[name] = value.detach()
    return tensors, aliases
