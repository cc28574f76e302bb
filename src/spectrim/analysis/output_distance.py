"""How far the outputs of a network are from those of another one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import ActivationCache
from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.layers.replacement import replace
from spectrim.layers.tokens import TokenMasks, TokenPlaces

_LONG = 32
"""Places of a sample from which on sequences are compared place by place."""


class NoDistanceError(Exception):
    """Outputs that cannot be compared with the dense network's; says why, with {} for the network."""


def squared_distances(first: Sequence[Tensor], second: Sequence[Tensor], batch: Inputs) -> Tensor:
    """Mean squares of differences, sample by sample if all tensors have as many; else of everything, (1,).

    Place by place where all tensors have the places of a batch that is taken apart.

    Entries that are not finite, such as masked scores, count as equal.
    """
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        raise NoDistanceError("the shapes of {}'s outputs depend on their values")
    if not sum(tensor.numel() for tensor in first):
        raise NoDistanceError("{}'s outputs hold no numbers with fractions")
    rows = {len(tensor) if tensor.ndim > 1 else 1 for tensor in first}
    number = rows.pop() if len(rows) == 1 else 1
    if batch.places > _LONG * batch.samples and all(t.ndim > 2 and t.shape[:2].numel() == batch.places for t in first):
        number = batch.places
    differences = [(a - b).nan_to_num(0.0, 0.0, 0.0).reshape(number, -1) for a, b in zip(first, second, strict=True)]
    return torch.cat(differences, dim=1).double().square().mean(dim=1).cpu()


def outputs_of(model: nn.Module, batch: Inputs, position: int, *, hint: str = "") -> list[Tensor]:
    """Copies of the outputs that are fractions, float32 at least; at padding they are zero."""
    with evaluating(model):
        result = call(model, batch, what=f"batch {position}", hint=hint)
    floats = [tensor.detach() for tensor in TokenMasks.of(model, batch).mapped(result, TokenPlaces.weigh)]
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for tensor in floats]


def outputs_with(
    cache: ActivationCache, layers: Mapping[str, nn.Module], *, batch: Inputs, position: int
) -> list[Tensor]:
    """The outputs of the cache's network with these layers in it; it is then as before. Earlier blocks are recalled."""
    before = {name: cache.model.get_submodule(name) for name in layers}
    replace(cache.model, layers)
    try:
        with cache.recalling(position, at_hand=layers) as stop:
            hooks = (layer.register_forward_pre_hook(lambda *_: stop()) for layer in layers.values())
            with temporary(hooks):
                return outputs_of(cache.model, batch, position)
    finally:
        replace(cache.model, before)
