"""Layers exchanged for others in a model, all or none: factors in the place of dense layers, and the way back."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.errors import ModelError
from spectrim.core.nested import is_plain
from spectrim.core.plans import LayerPlan, Plan
from spectrim.layers.attention import match_fast_paths
from spectrim.layers.caches import match_caches
from spectrim.layers.factored import FactoredLayer, geometry_of, low_rank_layers, shallow_copy
from spectrim.layers.forms import find_form, form_named, joint_form_named
from spectrim.layers.forms.linear import tied_output
from spectrim.layers.heads import AroundHeads, HeadOutput, HeadScores, HeadValues
from spectrim.layers.types import layer_type_of
from spectrim.layers.unfusing import fused
from spectrim.linalg import Factors, Ranks, balanced, to_float64
from spectrim.linalg.problem import working_type

NARROWED_FROM = "narrowed_from"
"""The attribute of a narrowed layer that holds the shape of the weight that it had."""

_BLOCK = 1024
_PROBED, _MOST_ROUNDED = 16, 0.05
"""So many outputs of a weight are looked at for what rounding to its number type has lost, and so much may be."""


def replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each module in the place its name gives, in `model` itself; if one step fails, none has happened."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, new in replacements.items():
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            done.append((parent, child, parent.get_submodule(child)))
            setattr(parent, child, new)
        _match_surroundings(model, done, replacements.values())
    except BaseException:
        for parent, child, old in reversed(done):
            setattr(parent, child, old)
        _match_surroundings(model, done, replacements.values())
        raise


def _match_surroundings(
    model: nn.Module, done: Sequence[tuple[nn.Module, str, nn.Module]], new: Iterable[nn.Module]
) -> None:
    match_fast_paths(model, [parent for parent, _, _ in done])
    if any(isinstance(layer, AroundHeads) for layer in (*new, *(old for _, _, old in done))):
        match_caches(model)


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """Every dotted name under which `module` is reached, in registration order."""
    return tuple(name for name, other in model.named_modules(remove_duplicate=False) if other is module)


def duplicate(model: nn.Module, *, hint: str = "work on it directly with inplace=True") -> nn.Module:
    """A deep copy of the model; `hint` says in the message what else can be done.

    Raises:
        ModelError: the model cannot be copied.
    """
    for name, parameter in model.named_parameters():
        if parameter.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
            kind = str(parameter.layout).removeprefix("torch.")
            raise ModelError(
                f"{name} is {kind}, which torch cannot copy in a module; make it dense first (weight.to_dense()), and "
                f"{kind} again afterwards"
            )
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}); {hint}") from error


def factorize(
    model: nn.Module, plan: Plan, *, factors: Callable[[LayerPlan], Factors], means: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Replace the planned layers of `model` by their factors, in `model` itself, all of them or none.

    Args:
        model: The model (or an exact copy of it) that was analysed.
        plan: Which layer and form.
        factors: Gives the factors of a planned layer, from its input to its output.
        means: By the name of every layer, its mean input (groups, in); gives the mean correction.

    Raises:
        ModelError: factors that overflow the layer's number type.
    """
    replacements: dict[str, nn.Module] = {}
    for layer in plan.factored:
        biases = mean_corrections(means or {}) if layer.metric != "plain" else own_bias
        if layer.unit is None:
            replacements |= factored_at(model, layer.names, form=layer.form, factors=factors(layer), bias=biases)
        elif layer.unit == layer.name:
            feeders = plan.feeders(layer.name)
            replacements |= narrowed_at(
                model, layer.name, feeders, form=layer.form, rank=layer.ranks[0], factors=factors(layer), bias=biases
            )
    replace(model, replacements)
    return model


BiasOf = Callable[[str, nn.Module, Tensor], Tensor | None]
"""From a place's name, its dense layer and the product of the stored factors, (groups, out, n): the new bias (out,)."""


def factored_at(
    model: nn.Module, names: Sequence[str], *, form: str, factors: Factors, bias: BiasOf
) -> dict[str, nn.Module]:
    """The replacement for every name of one weight; layers that shared the weight share its factors.

    Raises:
        ModelError: factors that overflow the layer's number type.
    """
    first, build = model.get_submodule(names[0]), form_named(form).build
    ranks, reference, factors = _ranks(factors), first.get_parameter("weight"), _beside(first, factors)
    blank = build(first, layer_type=layer_type_of(first), ranks=ranks, bias=False)
    shared = [parameter_like(reference, tensor) for tensor in blank.stored(balanced(factors))]
    if not all(torch.isfinite(weight).all() for weight in shared):
        raise ModelError(f"the factors of {names[0]} overflow {reference.dtype}; convert the model to float32 first")
    # of the factors as stored, so that in half precision the mean correction covers their rounding as well
    kind = working_type(geometry_of(first).shape, reference.dtype)
    whole = blank.kernels([to_float64(weight).to(kind) for weight in shared]).flatten(2)
    largest = torch.linalg.vector_norm(whole, dim=(0, 2)).topk(min(_PROBED, whole.shape[1])).indices
    few = [to_float64(part) for part in (*factors[:-1], factors[-1][:, largest])]
    exact = blank.composed(tuple(few)).flatten(2)
    _require_rounded(to_float64(whole[:, largest]), exact, name=names[0], dtype=reference.dtype)

    def factored(name: str, module: nn.Module) -> nn.Module:
        value = bias(name, module, whole)
        new, own = build(module, layer_type=layer_type_of(module), ranks=ranks, bias=value is not None), shared
        if layer_type_of(module).is_lookup != layer_type_of(first).is_lookup:
            new, own = tied_output(new, module), shared[::-1]
        for part, weight, like in zip(new.chain, own, blank.chain, strict=True):
            part.weight = weight
            part._buffers.update(like._buffers)
        if value is not None:
            new.chain[-1].bias = _bias_like(module, value)
        return new

    return _once_each(model, names, factored)


def narrowed_at(
    model: nn.Module, name: str, feeders: Sequence[str], *, form: str, rank: int, factors: Factors, bias: BiasOf
) -> dict[str, nn.Module]:
    """The narrowed layers by name: those that feed `name`, and itself, from the factors of a joint form.

    Raises:
        ModelError: weights that overflow the layers' number type.
    """
    joint, last = joint_form_named(form), model.get_submodule(name)
    feeding, other, weight, *of_bias = _beside(last, factors)
    scores = joint.narrows_outputs
    narrowed = {}
    for feeder in feeders:
        layer = model.get_submodule(feeder)
        own = own_bias(feeder, layer, feeding)
        kernels = layer_type_of(layer).kernels(layer).detach().to(feeding.device)
        shifted = None if own is None else feeding[0] @ to_float64(own).to(feeding.device)
        ranks = _head_ranks(feeding, rank) if joint.by_head else ()
        moved = joint.fed(feeding, kernels)
        narrowed[feeder] = _resized(layer, moved, shifted, name=feeder, head_ranks=ranks, scores=scores)
    ranks = _head_ranks(other.mT if scores else other, rank) if joint.by_head else ()
    # scores lose a key that all have in common, so that no bias is needed where there was none
    value = bias(name, last, joint.product(factors)) if not scores or own_bias(name, last, weight) is not None else None
    if scores and value is not None:
        value = of_bias[0][0] @ to_float64(value).to(weight.device)
    return narrowed | {name: _resized(last, weight, value, name=name, head_ranks=ranks, scores=scores)}


def _beside(layer: nn.Module, factors: Factors) -> Factors:
    """The factors where the layer's numbers are in float64; they may come from where the analysis decomposes."""
    device = to_float64(layer.get_parameter("weight")[:0]).device
    return tuple(part.to(device) for part in factors)


def _head_ranks(blocks: Tensor, mean: int) -> tuple[int, ...]:
    """How many rows each head has in (1, mean * heads, size * heads), a block for each."""
    heads = blocks.shape[1] // mean
    return tuple(blocks[0].unflatten(1, (heads, -1)).any(dim=2).sum(dim=0).tolist())


def _resized(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, *, name: str, head_ranks: tuple[int, ...], scores: bool
) -> nn.Module:
    """A layer like this one with a weight (1, out, in) and a bias (out,)."""
    _, out, into = weight.shape
    new = narrowed_like(layer, out=out, into=into, bias=bias is not None, head_ranks=head_ranks, scores=scores)
    inner, reference = new.linear if isinstance(new, AroundHeads) else new, layer.get_parameter("weight")
    set_weight(inner, weight, bias, like=reference, name=name)
    return new


def set_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None, *, like: Tensor, name: str) -> None:
    """Give a layer that no one else has yet a weight (groups, out, n), and a bias (out,) if it is to have one.

    Raises:
        ModelError: a weight that overflows the number type of `like`.
    """
    kind = layer_type_of(layer)
    layer.weight = parameter_like(like, kind.to_weight(weight, kind.geometry(layer)))
    if not torch.isfinite(layer.get_parameter("weight")).all():
        raise ModelError(f"the narrowed {name} overflows {like.dtype}; convert the model to float32 first")
    if bias is not None:
        layer.bias = parameter_like(like, bias)


def narrowed_like(
    layer: nn.Module, *, out: int, into: int, bias: bool, head_ranks: tuple[int, ...] = (), scores: bool = False
) -> nn.Module:
    """A layer like this one with other sizes on the meta device, which says what shape the weight had.

    With `head_ranks` it gives or reads the heads of an attention, each of which then holds so many numbers; with
    `scores` it gives their queries or keys.
    """
    kind, reference = layer_type_of(layer), layer.get_parameter("weight")
    sizes, new = kind.geometry(layer), kind.resized(layer, out=out, into=into, bias=bias)
    shape = tuple(getattr(layer, NARROWED_FROM, reference.shape))
    if not head_ranks:
        setattr(new, NARROWED_FROM, shape)
    elif into == sizes.into and out == sum(head_ranks):
        new = (HeadScores if scores else HeadValues)(
            new, size=sizes.outputs // len(head_ranks), ranks=head_ranks, narrowed_from=shape
        )
    else:
        new = HeadOutput(new, size=sizes.into // len(head_ranks), ranks=head_ranks, narrowed_from=shape)
    return new.train(layer.training).requires_grad_(reference.requires_grad)


def narrowed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every narrowed layer of `model`, factored ones among them, by its first name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, NARROWED_FROM)}


def compressed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every factored or narrowed layer of `model` by its first name."""
    return {**low_rank_layers(model), **narrowed_layers(model)}


def product(layer: nn.Module, *, form: str, factors: Factors) -> Tensor:
    """The matrices (groups, out, n) that factors for `layer` stand for, float64, of wide ones in their own type."""
    if find_form(form).is_joint:
        return joint_form_named(form).product(factors)
    blank = form_named(form).build(layer, layer_type=layer_type_of(layer), ranks=_ranks(factors), bias=False)
    kind = working_type(geometry_of(layer).shape, layer.get_parameter("weight").dtype)
    with torch.autocast(factors[0].device.type, enabled=False):
        return blank.composed(tuple(part.to(kind) for part in factors)).flatten(2)


def _ranks(factors: Factors) -> Ranks:
    return tuple(int(part.shape[1]) for part in factors[:-1])


def refitted_at(model: nn.Module, names: Sequence[str], *, weight: Tensor, bias: BiasOf) -> dict[str, nn.Module]:
    """Dense layers with another weight, (groups, out, in, *kernel), and another bias, for every name of one weight."""
    first = model.get_submodule(names[0])
    layer_type, geometry = layer_type_of(first), geometry_of(first)
    shared = parameter_like(first.get_parameter("weight"), layer_type.to_weight(weight, geometry))
    whole = layer_type.to_kernels(to_float64(shared), geometry).flatten(2)

    def refitted(name: str, module: nn.Module) -> nn.Module:
        value, new = bias(name, module, whole), shallow_copy(module)
        new.weight = shared
        if value is not None:
            new.bias = _bias_like(module, value)
        return new

    return _once_each(model, names, refitted)


def _once_each(
    model: nn.Module, names: Sequence[str], build: Callable[[str, nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """A replacement by name; a layer of several names has one, built for the first of them."""
    first: dict[nn.Module, str] = {}
    for name in names:
        first.setdefault(model.get_submodule(name), name)
    built = {module: build(name, module) for module, name in first.items()}
    return {name: built[model.get_submodule(name)] for name in names}


def own_bias(_: str, module: nn.Module, __: Tensor) -> Tensor | None:
    """The bias that the layer has."""
    return module._parameters.get("bias")


def mean_corrections(means: Mapping[str, Tensor]) -> BiasOf:
    """b + (W - Q) m, which makes the mean output exact."""

    def corrected(name: str, module: nn.Module, whole: Tensor) -> Tensor | None:
        if name not in means or layer_type_of(module).is_lookup:
            return own_bias(name, module, whole)
        mean, kernels = means[name].to(whole.device).unsqueeze(-1), layer_type_of(module).kernels(module).flatten(2)
        # by blocks of outputs, since the difference of the whole weights may be the largest array of all
        blocks = zip(kernels.split(_BLOCK, dim=1), whole.split(_BLOCK, dim=1), strict=True)
        correction = torch.cat([(to_float64(dense) - low) @ mean for dense, low in blocks], dim=1).flatten()
        old = module._parameters.get("bias")
        return correction if old is None else to_float64(old).to(correction.device) + correction

    return corrected


def _bias_like(module: nn.Module, value: Tensor) -> nn.Parameter:
    """A bias as it is where it is the layer's own, so that it stays shared; else a new one of the layer's type."""
    old = module._parameters.get("bias")
    if old is not None and value is old:
        return old
    return parameter_like(module.get_parameter("weight") if old is None else old, value)


@checked
def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factored layer is one dense layer again, ties between layers included.

    Raises:
        ModelError: a product that the factors' number type cannot hold.
    """
    merged = duplicate(model)
    replacements: dict[str, nn.Module] = {}
    weights: dict[frozenset[int], nn.Parameter] = {}
    for module in low_rank_layers(merged).values():
        parts = [part.get_parameter("weight") for part in _plain_chain(merged, module)]
        key = frozenset(id(weight) for weight in parts)
        if key not in weights:
            whole = module.product([to_float64(weight) for weight in parts])
            weights[key] = parameter_like(parts[-1], whole)
            name = names_of(merged, module)[0]
            _require_rounded(to_float64(weights[key]), whole, name=name, dtype=weights[key].dtype)
        dense = module.empty_dense()
        dense._parameters.update(weight=weights[key], bias=module.chain[-1]._parameters.get("bias"))
        if module.adds_bias:  # which files have to say
            setattr(dense, NARROWED_FROM, tuple(weights[key].shape))
        replacements |= dict.fromkeys(names_of(merged, module), dense.train(module.training))
    replace(merged, replacements)
    return fused(merged)


def _plain_chain(model: nn.Module, module: FactoredLayer) -> tuple[nn.Module, ...]:
    """The layers of the chain; raises `ModelError` where their weights cannot be multiplied here."""
    for part in module.chain:
        weight = part._parameters.get("weight")
        if weight is None or not is_plain(weight):
            kind = type(part).__name__ if weight is None else type(weight).__name__
            raise ModelError(
                f"the factors of {names_of(model, module)[0]} are quantised or distributed ({kind}); merge the model "
                "before that is done to it"
            )
    return module.chain


def _require_rounded(stored: Tensor, exact: Tensor, *, name: str, dtype: torch.dtype) -> None:
    """Raise `ModelError` where the number type has lost more than rounding of a weight."""
    size = float(exact.norm())
    if math.isfinite(size) and not float((stored - exact).norm()) <= _MOST_ROUNDED * size:
        raise ModelError(
            f"the weight of {name} does not survive {dtype}: it overflows, vanishes, or its factors cancel each other; "
            "convert the model to float32 first"
        )


def parameter_like(reference: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with the type, device and gradient flag of `reference`."""
    own = value.to(reference.dtype).to(reference.device).contiguous()
    # what is made in inference mode takes no gradients
    return nn.Parameter(own.clone() if own.is_inference() else own, requires_grad=reference.requires_grad)
