"""A plan applied to a model, and the way back to dense layers."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.plans import FormName, LayerPlan, Plan
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.registry import as_kernels, as_stored, build, geometry, kernels, stored
from spectrim.layers.selection import names_of, replace
from spectrim.linalg import Factors, Ranks, algebra, balanced, is_finite


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy of the model.

    Raises:
        ModelError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); work on it directly with inplace=True"
        ) from error


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
        names = (layer.name, *layer.also)
        biases = mean_corrections(means or {}) if layer.metric != "plain" else own_bias
        replacements |= factored_at(model, names, form=layer.form, factors=factors(layer), bias=biases)
    replace(model, replacements)
    return model


BiasOf = Callable[[str, nn.Module, Tensor], Tensor | None]
"""From a place's name, its dense layer and the product of the stored factors, (groups, out, n): the new bias (out,)."""


def factored_at(
    model: nn.Module, names: Sequence[str], *, form: FormName, factors: Factors, bias: BiasOf
) -> dict[str, nn.Module]:
    """The replacement for every name of one weight; layers that shared the weight share its factors.

    Raises:
        ModelError: factors that overflow the layer's number type.
    """
    first = model.get_submodule(names[0])
    ranks = _ranks(factors)
    reference = first.get_parameter("weight")
    blank = build(first, form=form, ranks=ranks, bias=False)
    shared = [_parameter_like(reference, tensor) for tensor in stored(blank, balanced(factors))]
    if not all(is_finite(weight) for weight in shared):
        raise ModelError(f"the factors of {names[0]} overflow {reference.dtype}; convert the model to float32 first")
    # of the factors as stored, so that in half precision the mean correction covers their rounding as well
    whole = as_kernels(blank.product([algebra(weight) for weight in shared]), geometry(first)).flatten(2)
    built: dict[nn.Module, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if module not in built:
            value = bias(name, module, whole)
            new = build(module, form=form, ranks=ranks, bias=value is not None)
            for part, weight in zip(new.chain, shared, strict=True):
                part.weight = weight
            if value is not None:
                new.chain[-1].bias = _bias_like(module, value)
            built[module] = new
        replacements[name] = built[module]
    return replacements


def product(layer: nn.Module, *, form: FormName, factors: Factors) -> Tensor:
    """The matrices (groups, out, n), float64, that factors for `layer` stand for."""
    blank = build(layer, form=form, ranks=_ranks(factors), bias=False)
    return as_kernels(blank.product(stored(blank, factors)), geometry(layer)).flatten(2)


def _ranks(factors: Factors) -> Ranks:
    return tuple(int(part.shape[1]) for part in factors[:-1])


def refitted_at(model: nn.Module, names: Sequence[str], *, weight: Tensor, bias: BiasOf) -> dict[str, nn.Module]:
    """Dense layers with another weight, (groups, out, in, *kernel), and another bias, for every name of one weight."""
    first = model.get_submodule(names[0])
    shared = _parameter_like(first.get_parameter("weight"), as_stored(weight, geometry(first)))
    whole = as_kernels(algebra(shared), geometry(first)).flatten(2)
    built: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if module not in built:
            value = bias(name, module, whole)
            new = copy.copy(module)
            new._parameters = dict(module._parameters)
            new.weight = shared
            if value is not None:
                new.bias = _bias_like(module, value)
            built[module] = new
    return {name: built[model.get_submodule(name)] for name in names}


def own_bias(_: str, module: nn.Module, __: Tensor) -> Tensor | None:
    """The bias that the layer has."""
    return module._parameters.get("bias")


def mean_corrections(means: Mapping[str, Tensor]) -> BiasOf:
    """b + (W - Q) m, which makes the mean output exact."""

    def corrected(name: str, module: nn.Module, whole: Tensor) -> Tensor | None:
        if name not in means:
            return own_bias(name, module, whole)
        lost = algebra(kernels(module)).flatten(2) - whole
        correction = (lost @ means[name].to(lost.device).unsqueeze(-1)).flatten()
        old = module._parameters.get("bias")
        return correction if old is None else algebra(old).to(correction.device) + correction

    return corrected


def _bias_like(module: nn.Module, value: Tensor) -> nn.Parameter:
    """A bias as it is where it is the layer's own, so that it stays shared; else a new one of the layer's type."""
    old = module._parameters.get("bias")
    if old is not None and value is old:
        return old
    return _parameter_like(module.get_parameter("weight") if old is None else old, value)


def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factored layer is one dense layer again, ties between layers included."""
    merged = duplicate(model)
    replacements: dict[str, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for module in low_rank_layers(merged).values():
        parts = [part.get_parameter("weight") for part in module.chain]
        key = tuple(id(weight) for weight in parts)
        if key not in weights:
            weights[key] = _parameter_like(parts[-1], module.product([algebra(weight) for weight in parts]))
        dense = module.empty_dense()
        dense.weight, dense.bias = weights[key], module.chain[-1]._parameters.get("bias")
        replacements |= dict.fromkeys(names_of(merged, module), dense.train(module.training))
    replace(merged, replacements)
    return merged


def _parameter_like(reference: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with the type, device and gradient flag of `reference`."""
    return nn.Parameter(
        value.to(reference.dtype).to(reference.device).contiguous(), requires_grad=reference.requires_grad
    )
