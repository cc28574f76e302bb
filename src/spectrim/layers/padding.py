"""Inner channels of factored layers filled up with zeros, so that the hardware's vectors are full."""

from torch import Tensor, nn

from spectrim.core.errors import ModelError, RuleError
from spectrim.layers.factored import FactoredLayer, attributes_of, geometry_of, low_rank_layers
from spectrim.layers.forms import find_form, form_named
from spectrim.layers.replacement import duplicate
from spectrim.layers.types import layer_type_of


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """A copy of the model in which the ranks of all factored layers are rounded up to a multiple, with zero weights.

    The outputs stay what they are, up to the order of summation. Where a runtime computes a number of channels at
    once, a rank between two multiples costs as much time as the upper one, or more; then this is free in time. It
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
    wide = duplicate(model, hint="without a copy it cannot be padded")
    weights: dict[tuple[int, ...], tuple[Tensor, nn.Parameter]] = {}
    for layer in low_rank_layers(wide).values():
        if find_form(layer.form).saves_time:
            _widen(layer, multiple, weights)
    return wide


def _widen(layer: FactoredLayer, multiple: int, weights: dict[tuple[int, ...], tuple[Tensor, nn.Parameter]]) -> None:
    """Make the ranks of the layer itself multiples.

    `weights` holds those that were padded before, since layers may share them, by the identity of the old one, which
    is held as well so that no new tensor gets it.
    """
    outline = layer.empty_dense()
    ranks = tuple(-(-rank // multiple) * multiple for rank in layer.ranks)
    build = form_named(layer.form).build
    sizes = build(outline, layer_type=layer_type_of(outline), ranks=ranks, bias=layer.bias is not None)
    for part, wide in zip(layer.chain, sizes.chain, strict=True):
        weight = part.get_parameter("weight")
        key = id(weight), *geometry_of(wide).shape
        if key not in weights:
            weights[key] = weight, nn.Parameter(_filled(part, wide), requires_grad=weight.requires_grad)
        part.weight = weights[key][1]
        part.__dict__.update(attributes_of(wide))


def _filled(part: nn.Module, wide: nn.Module) -> Tensor:
    """The weight of a factor in the sizes of `wide`, zero where there was none."""
    layer_type, sizes = layer_type_of(part), geometry_of(wide)
    kernels = layer_type.kernels(part).detach()
    whole = kernels.new_zeros(sizes.shape)
    whole[:, : kernels.shape[1], : kernels.shape[2]] = kernels
    return layer_type.to_weight(whole, sizes).contiguous()
