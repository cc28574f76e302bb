"""Modules that multiply by several weights themselves, with a layer for each of these, and the way back."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from spectrim.layers.attention import UnfusedMultiheadAttention, match_fast_paths
from spectrim.layers.experts import UnfusedExperts

Selects = Callable[[str, str], bool]
"""From the names of a layer (`self_attn.q_proj`, ..) and of the module that would be taken apart for it to whether it
is wanted."""

_Unfused = UnfusedMultiheadAttention | UnfusedExperts
_KINDS: tuple[type[_Unfused], ...] = (UnfusedMultiheadAttention, UnfusedExperts)


def unfused(model: nn.Module, selects: Selects = lambda *_: True) -> nn.Module:
    """The model, or if it has attentions or experts to take apart a copy with the same tensors whose parts are layers.

    They are left as they are if their class or forward is another, if they have hooks, parametrisations or weights that
    others share, and in a model that cannot be copied.

    Args:
        model: Any module; it stays as it is.
        selects: Only modules of which a layer is wanted are taken apart.
    """
    if not _replaceable(model, selects):
        return model
    try:
        copied = _with_same_tensors(model)
    except Exception:  # the code of somebody's class
        return model
    unfuse_(copied, selects)
    return copied


def unfused_as(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """As `unfused`, with those modules taken apart of which these layers are parts.

    An attention that was left whole has a layer `out_proj` as well, and is among the layers itself.
    """
    known, own = set(names), {name for name, _ in model.named_modules()}
    return unfused(model, lambda part, whole: part in known and not (part in own and whole in known))


def unfuse_(model: nn.Module, selects: Selects) -> None:
    """As `unfused`, in the model itself."""
    _exchange(model, {module: kind(module) for module, kind in _replaceable(model, selects).items()})


def fused(model: nn.Module) -> nn.Module:
    """The model, or a copy with the same tensors in which modules of dense parts are those of their own class again."""
    if not _dense(model):
        return model
    copied = _with_same_tensors(model)
    _exchange(copied, {module: module.fused() for module in _dense(copied)})
    return copied


def places_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names of what has to be exchanged where these layers have changed: them, or what they are a part of here."""
    parts = ((name, part) for name, module in model.named_modules() for kind in _KINDS for part in kind.parts(module))
    wholes = {f"{name}.{part}": name for name, part in parts}
    return list(dict.fromkeys(wholes.get(name, name) for name in names))


def _dense(model: nn.Module) -> list[_Unfused]:
    return [module for module in model.modules() if isinstance(module, _KINDS) and module.is_dense]


def _with_same_tensors(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _replaceable(model: nn.Module, selects: Selects) -> dict[nn.Module, type[_Unfused]]:
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {
        module: kind
        for name, module in model.named_modules()
        if module is not model and (kind := next((own for own in _KINDS if own.parts(module)), None))
        if any(selects(f"{name}.{part}", name) for part in kind.parts(module))
        if all(uses[id(weight)] == 1 for weight in module.parameters()) and kind.replaces(module)
    }


def _exchange(model: nn.Module, others: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()) if others else ():
        for name, child in parent._modules.items():
            if child is not None and child in others:
                parent._modules[name] = others[child]
    match_fast_paths(model)
