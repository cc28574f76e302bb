"""A plan applied to a model, and the way back to dense layers."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectrim.calibrate import Calibration
from spectrim.errors import ModelError
from spectrim.forms import build_linear
from spectrim.layers import LowRankLinear, blank_linear
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
    """A copy of `model` in which every `LowRankLinear` is one dense `nn.Linear` again, ties between layers included."""
    merged = duplicate(model)
    replacements: dict[str, nn.Module] = {}
    weights: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(merged.modules()):
        if isinstance(module, LowRankLinear):
            key = (id(module.down.weight), id(module.up.weight))
            if key not in weights:
                product = algebra(module.up.weight) @ algebra(module.down.weight)
                weights[key] = _parameter_like(module.up.weight, product)
            weight = weights[key]
            dense = blank_linear(
                module.in_features, module.out_features, bias=False, device=weight.device, dtype=weight.dtype
            )
            dense.weight, dense.bias = weight, module.up.bias
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
    weight = first.get_parameter("weight")
    down, up = factors(weight, decompositions[layer.name, layer.metric], rank=layer.rank)
    shared = _parameter_like(weight, down), _parameter_like(weight, up)
    if not (is_finite(shared[0]) and is_finite(shared[1])):
        raise ModelError(f"the factors of {layer.name} overflow {weight.dtype}; convert the model to float32 first")
    # measured on the factors as stored, so that in half precision the correction covers their rounding as well
    lost = algebra(weight) - algebra(shared[1]) @ algebra(shared[0])
    built: dict[nn.Module, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    for name in (layer.name, *layer.also):
        module = model.get_submodule(name)
        if module not in built:
            assert isinstance(module, nn.Linear)
            mean = calibration.moments[name].mean if calibration and layer.metric == "activation" else None
            bias = module.bias if mean is None else _corrected_bias(module, lost=lost, mean=mean)
            new = build_linear(module, rank=layer.rank, bias=bias is not None)
            new.down.weight, new.up.weight = shared
            if bias is not None:
                new.up.bias = bias
            built[module] = new
        replacements[name] = built[module]
    return replacements


def _corrected_bias(module: nn.Linear, *, lost: Tensor, mean: Tensor) -> nn.Parameter:
    """b + (W - A B) m, which makes the mean output exact; m is the mean input (in,), `lost` is W - A B (out, in)."""
    correction = lost @ mean.to(lost.device)
    base = torch.zeros_like(correction) if module.bias is None else algebra(module.bias).to(correction.device)
    return _parameter_like(module.weight if module.bias is None else module.bias, base + correction)


def _parameter_like(reference: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with the type, device and gradient flag of `reference`."""
    return nn.Parameter(
        value.to(reference.dtype).to(reference.device).contiguous(), requires_grad=reference.requires_grad
    )
