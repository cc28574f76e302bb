"""A plan applied to a model, and the way back to dense layers."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectrim.calibrate import Calibration
from spectrim.errors import ModelError
from spectrim.forms import build, matrices
from spectrim.layers import low_rank_layers
from spectrim.linalg import Decomposition, algebra, factors, is_finite
from spectrim.plan import LayerPlan, Metric, Plan
from spectrim.surgery import names_of, replace


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


Decompositions = Mapping[tuple[str, Metric], Decomposition]


def factorize(
    model: nn.Module, plan: Plan, *, decompositions: Decompositions, calibration: Calibration | None = None
) -> nn.Module:
    """Replace the planned layers of `model` by their factors, in `model` itself, all of them or none.

    Args:
        model: The model (or an exact copy of it) that was analysed.
        plan: Which layer, form, rank and metric.
        decompositions: From the analysis, by layer name and metric; the factors are cut from them.
        calibration: The statistics behind the activation metric; gives the mean correction.

    Raises:
        ModelError: factors that overflow the layer's number type.
    """
    replacements: dict[str, nn.Module] = {}
    for layer in plan.factored:
        replacements |= _factors_of(model, layer, decompositions, calibration)
    replace(model, replacements)
    return model


def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factored layer is one dense layer again, ties between layers included."""
    merged = duplicate(model)
    replacements: dict[str, nn.Module] = {}
    weights: dict[tuple[int, int], nn.Parameter] = {}
    for module in low_rank_layers(merged).values():
        key = (id(module.down.weight), id(module.up.weight))
        if key not in weights:
            down, up = algebra(module.down.weight), algebra(module.up.weight)
            groups = module.down.groups if isinstance(module.down, nn.Conv1d | nn.Conv2d) else 1
            product = up.reshape(groups, -1, module.rank) @ down.reshape(groups, module.rank, -1)
            shape = (len(up), *module.down.weight.shape[1:])
            weights[key] = _parameter_like(module.up.weight, product.reshape(shape))
        dense = module.empty_dense()
        dense.weight, dense.bias = weights[key], module.up.bias
        replacements |= dict.fromkeys(names_of(merged, module), dense.train(module.training))
    replace(merged, replacements)
    return merged


def _factors_of(
    model: nn.Module, layer: LayerPlan, decompositions: Decompositions, calibration: Calibration | None
) -> Mapping[str, nn.Module]:
    """The replacement for every name of one weight; layers that shared the weight share its factors."""
    assert layer.rank is not None
    assert layer.metric is not None
    first = model.get_submodule(layer.name)
    weight = matrices(first)
    down, up = factors(weight, decompositions[layer.name, layer.metric], rank=layer.rank)
    blank = build(first, rank=layer.rank, bias=False)
    shared = (
        _parameter_like(weight, down.reshape(blank.down.weight.shape)),
        _parameter_like(weight, up.reshape(blank.up.weight.shape)),
    )
    if not (is_finite(shared[0]) and is_finite(shared[1])):
        raise ModelError(f"the factors of {layer.name} overflow {weight.dtype}; convert the model to float32 first")
    # measured on the factors as stored, so that in half precision the correction covers their rounding as well
    lost = algebra(weight) - algebra(shared[1]).reshape(up.shape) @ algebra(shared[0]).reshape(down.shape)
    built: dict[nn.Module, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    for name in (layer.name, *layer.also):
        module = model.get_submodule(name)
        if module not in built:
            mean = calibration.moments[name].mean if calibration and layer.metric == "activation" else None
            old = module._parameters.get("bias")
            bias = old if mean is None else _corrected_bias(module, lost=lost, mean=mean)
            new = build(module, rank=layer.rank, bias=bias is not None)
            new.down.weight, new.up.weight = shared
            if bias is not None:
                new.up.bias = bias
            built[module] = new
        replacements[name] = built[module]
    return replacements


def _corrected_bias(module: nn.Module, *, lost: Tensor, mean: Tensor) -> nn.Parameter:
    """b + (W - A B) m, which makes the mean output exact.

    Args:
        module: Gives the bias b (out,), if it has one, and the number type.
        lost: W - A B, (groups, out, in).
        mean: m, the mean input, (groups, in).
    """
    correction = (lost @ mean.to(lost.device).unsqueeze(-1)).flatten()
    old = module._parameters.get("bias")
    base = torch.zeros_like(correction) if old is None else algebra(old).to(correction.device)
    return _parameter_like(module.get_parameter("weight") if old is None else old, base + correction)


def _parameter_like(reference: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with the type, device and gradient flag of `reference`."""
    return nn.Parameter(
        value.to(reference.dtype).to(reference.device).contiguous(), requires_grad=reference.requires_grad
    )
