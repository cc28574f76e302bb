"""What is looked at before a compressed network is given back: its outputs and its cost against what they should be."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.sensitivities import subset
from spectrim.analysis.spectra import Analysis
from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.files import Frozen
from spectrim.core.nested import describe, logits_of, tensors
from spectrim.core.plans import Budget, Plan
from spectrim.layers.cost import NetworkCost
from spectrim.layers.replacement import duplicate, factorize

_WORSE, _NEAR, _FAR = 1.2, 0.02, 0.9
_CLEARLY_OFF, _OVER_BUDGET = 1e-3, 5e-3
SAMPLES = 256


class Fidelity(Frozen):
    """How near a compressed network's outputs are to those of the dense one, on the same inputs.

    Attributes:
        relative_error: Norm of the differences over the norm of the dense outputs around their mean over the samples;
            1 is as far off as that mean.
        agreement: Of scores (batch, classes) the share of samples with the same largest one; None for other outputs.
        samples: How many samples were looked at.
        plain: The same of a network with the same forms and ranks, whose weights are approximated by themselves;
            None if no other metric was used, or where a weight is so wide that this would take as long again.
    """

    relative_error: float = Field(ge=0)
    agreement: float | None = None
    samples: int
    plain: "Fidelity | None" = None


def measured_fidelity(
    model: nn.Module, small: nn.Module, batches: Sequence[Inputs], *, plan: Plan, analysis: Analysis
) -> Fidelity | None:
    """Compare a compressed network on up to 256 samples, in an order of their own; see `fidelity`.

    Warns if weights approximated by themselves, without the data, come nearer to the dense network.
    """
    layers = tuple(layer.model_copy(update={"metric": "plain"}) if layer.is_factored else layer for layer in plan)
    plain = None
    wide = any(analysis[layer.name].problems["plain"].is_wide for layer in plan.factored)
    if not wide and any(layer.metric != "plain" for layer in plan.factored):
        plain = factorize(duplicate(model), plan.model_copy(update={"layers": layers}), factors=analysis.factors)
    measured = fidelity(model, small, subset(batches, samples=SAMPLES), plain=plain)
    if measured is not None:
        _warn_if_worse_with_data(measured)
    return measured


def fidelity(
    model: nn.Module, small: nn.Module, batches: Iterable[Inputs], *, plain: nn.Module | None = None
) -> Fidelity | None:
    """Compare two networks with the dense one, in evaluation mode.

    None where shapes of outputs depend on values, or where the dense outputs do not vary.

    Args:
        model: The dense network.
        small: The compressed one.
        batches: What they are run on.
        plain: Another one, for `Fidelity.plain`.

    Raises:
        ModelError: outputs of `small` that are not finite where those of `model` are, or of another type.
    """
    dense, samples = [], 0
    others: list[list[Any]] = [[] for network in (small, plain) if network is not None]
    for position, batch in enumerate(batches):
        samples += batch.samples
        dense.append(_outputs(model, batch, position))
        for network, outputs in zip((small, plain), others, strict=False):
            assert network is not None
            outputs.append(_outputs(network, batch, position))
        require_sound(dense[-1], others[0][-1])
    measured = [_compared(dense, outputs, samples) for outputs in others]
    if measured[0] is None or len(measured) == 1:
        return measured[0]
    return measured[0].model_copy(update={"plain": measured[1]})


def require_sound(dense: Any, small: Any) -> None:
    """Raise `ModelError` for outputs of another type than the dense network's, or not finite where those are."""
    first, second = _floats(dense), _floats(small)
    if type(dense) is not type(small) or {tensor.dtype for tensor in first} != {tensor.dtype for tensor in second}:
        raise ModelError(
            f"the compressed network gives {describe(small)} where the dense one gives {describe(dense)}; it looks at "
            "more of its layers than their outputs. Leave them out (exclude=..)"
        )
    finite = [bool(torch.isfinite(tensor).all()) for tensor in first]
    broken = [bool(torch.isfinite(tensor).all()) for tensor in second]
    if all(finite) and not all(broken):
        raise ModelError(
            "the compressed network's outputs are NaN or infinite, and the dense one's are not; in half precision "
            "convert the model to float32 first"
        )


def require_planned_cost(plan: Plan, dense: NetworkCost, measured: NetworkCost) -> None:
    """Hold the counted cost against the plan's.

    Warns if more is multiplied than the plan says.

    Raises:
        ModelError: so much that a budget of MACs is missed.
    """
    planned = dense.macs - sum(layer.dense.macs - layer.kept.macs for layer in plan)
    if measured.macs <= planned * (1 + _CLEARLY_OFF):
        return
    deviation = (
        f"the compressed network multiplies {measured.macs:,} times, and {planned:,} were planned: it does something "
        "with its layers besides calling them, or how much it works depends on values"
    )
    share = plan.rule.macs if isinstance(plan.rule, Budget) else None
    if share is not None and measured.macs > dense.macs * (share + _OVER_BUDGET):
        raise ModelError(f"{deviation}. Limit params=, bytes= or latency= instead, or leave layers out (exclude=..)")
    warnings.warn(deviation, stacklevel=5)


def _warn_if_worse_with_data(measured: Fidelity) -> None:
    """Warn if weights approximated by themselves, without the data, come nearer to the dense network on these data."""
    plain = measured.plain
    if plain is None or plain.relative_error > _FAR:  # nothing is left of the network either way
        return
    if measured.relative_error <= max(_NEAR, _WORSE * plain.relative_error):
        return
    warnings.warn(
        f"on the calibration data the compressed network is {measured.relative_error:.3g} off (relative error), and "
        f"{plain.relative_error:.3g} without these data. Likely reasons: they are few or unlike each other, layers "
        "pass more than their outputs on, or some work outside of what gradients reach. Compare metric='activation', "
        "reconstruct=False, or no data",
        stacklevel=5,
    )


def _outputs(model: nn.Module, batch: Inputs, position: int) -> Any:
    with evaluating(model):
        return call(model, batch, what=f"batch {position}")


def _floats(outputs: Any) -> list[Tensor]:
    return [torch.atleast_1d(tensor.detach()) for tensor in tensors(outputs) if tensor.is_floating_point()]


def _compared(dense: Sequence[Any], small: Sequence[Any], samples: int) -> Fidelity | None:
    pairs = [(_floats(first), _floats(second)) for first, second in zip(dense, small, strict=True)]
    shapes = [[tensor.shape[1:] for tensor in tensors_] for both in pairs for tensors_ in both]
    if any(shape != shapes[0] for shape in shapes) or not shapes[0]:
        return None
    lost = varying = 0.0
    for place in range(len(shapes[0])):
        first, second = (torch.cat([both[side][place].double() for both in pairs]) for side in (0, 1))
        if first.shape != second.shape:
            return None
        lost += float((first - second).square().nan_to_num(0.0).sum())
        varying += float((first - first.mean(dim=0)).square().nan_to_num(0.0).sum())
    if not 0 < varying < float("inf"):
        return None
    return Fidelity(relative_error=(lost / varying) ** 0.5, agreement=_agreement(dense, small), samples=samples)


def _agreement(dense: Sequence[Any], small: Sequence[Any]) -> float | None:
    first, second = ([logits_of(outputs) for outputs in each] for each in (dense, small))
    if not all(isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > 1 for scores in first):
        return None
    same = torch.cat([a.argmax(dim=1) == b.argmax(dim=1) for a, b in zip(first, second, strict=True)])
    return float(same.double().mean())
