"""Inner channels of factored layers filled up with zeros, so that the hardware's vectors are full."""

import copy
from itertools import pairwise

from torch import Tensor, nn

from spectrim.core.errors import ModelError, RuleError
from spectrim.layers.factored import low_rank_layers


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """A copy of the model in which the ranks of all factored layers are rounded up to a multiple, with zero weights.

    The outputs stay what they are, up to the order of summation. Where a runtime computes a number of channels at
    once, a rank between two multiples costs as much time as the upper one, or more; then this is for free in time. It
    is never free in numbers: the factors' parameters, bytes and MACs grow by the padded rank over the rank, and in
    runtimes without such steps (often torch itself) so does the time. Do it last, on what is exported.

    Args:
        model: Any model; it stays as it is, and without factored layers the copy is just that.
        multiple: Ranks become multiples of this, in a grouped convolution those of each group, in the tucker2 form
            both.

    Returns:
        A model of the same layers, which saves and loads as any other. Weights that were shared still are.

    Raises:
        RuleError: a multiple below 1.
        ModelError: a model that cannot be copied, or factors that are not ordinary parameters, such as quantised ones.
    """
    if multiple < 1:
        raise RuleError(f"multiple={multiple}: ranks can only be padded to a multiple of 1 or more")
    for name, layer in low_rank_layers(model).items():
        if not all(type(part._parameters.get("weight")) is nn.Parameter for part in layer.chain):
            raise ModelError(f"the factors of {name!r} are not ordinary parameters; pad first, then quantise")
    try:
        wide = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}), so it cannot be padded") from error
    done: dict[tuple[int, int | None, int | None], nn.Parameter] = {}
    old: list[Tensor] = []  # kept, so that no new tensor gets the identity of one of them
    for layer in low_rank_layers(wide).values():
        ranks = (None, *(-(-rank // multiple) * multiple for rank in layer.ranks), None)
        for part, (into, out) in zip(layer.chain, pairwise(ranks), strict=True):
            weight = part.get_parameter("weight")
            key = id(weight), into, out
            if key not in done:
                old.append(weight)
                done[key] = _wider(part, into, out)
            part.weight = done[key]
            _resize(part, into, out)
    return wide


def _wider(part: nn.Module, into: int | None, out: int | None) -> nn.Parameter:
    """The weight of a factor with so many inputs and outputs a group, the new ones zero; None for as many as it has."""
    weight = part.get_parameter("weight")
    groups = int(getattr(part, "groups", 1))
    blocks = weight.detach().unflatten(0, (groups, -1))
    first, second = (into, out) if isinstance(part, nn.ConvTranspose2d) else (out, into)
    whole = blocks.new_zeros(groups, first or blocks.shape[1], second or blocks.shape[2], *blocks.shape[3:])
    whole[:, : blocks.shape[1], : blocks.shape[2]] = blocks
    return nn.Parameter(whole.flatten(0, 1), requires_grad=weight.requires_grad)


def _resize(part: nn.Module, into: int | None, out: int | None) -> None:
    """Let a factor say of itself what its weight has become."""
    for size, names in ((into, ("in_features", "in_channels")), (out, ("out_features", "out_channels"))):
        if size is not None:
            linear = isinstance(part, nn.Linear)
            setattr(part, names[0] if linear else names[1], size * int(getattr(part, "groups", 1)))
