"""Statistics of the experts of a mixture: each one's own, and what its tokens do not tell from the other experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectrim.analysis.calibration import Calibration
from spectrim.analysis.moments import Moments
from spectrim.layers.units import Unit
from spectrim.linalg import add_outer, matrix_of, mean_variance, square_of


def with_experts_of(calibration: Calibration | None, units: Sequence[Unit]) -> Calibration | None:
    """The statistics, as `with_experts`, of the stacks among the units."""
    stacks: dict[str, list[str]] = {}
    for weight in (weight for unit in units for weight in unit.weights if weight.stack):
        stacks.setdefault(weight.stack or "", []).extend(weight.call_sites)
    return with_experts(calibration, stacks) if calibration and stacks else calibration


def with_experts(calibration: Calibration, stacks: Mapping[str, Sequence[str]]) -> Calibration:
    """Statistics in which the experts of each stack know of one another.

    A second moment C of an expert becomes (1 - s) C + s M, with M that of the tokens of all experts of the stack and s
    the share with the least mean squared error: the variance of C as an estimate, over its squared distance to M
    (Ledoit & Wolf 2004, who draw C towards a multiple of the identity). s is near 0 for an expert that many tokens
    reached, and 1 for one that none did. The moments are taken around zero, since experts keep the biases they have:
    with new ones they could not be stacked again.

    Args:
        calibration: Of the model.
        stacks: The names of all layers by stack.
    """
    moments = dict(calibration.moments)
    for names in stacks.values():
        seen = {name: moments[name] for name in names if name in moments}
        if seen:
            moments |= _together(names, seen)
    return replace(calibration, moments=moments)


def _together(names: Sequence[str], seen: Mapping[str, Moments]) -> dict[str, Moments]:
    inputs = _shared({name: _of_inputs(own) for name, own in seen.items()}, names)
    gradients = {name: own.output_grad_covariance for name, own in seen.items()}
    outputs = _shared(
        {
            name: _Estimate.of(moment, seen[name].output_grad_shrinkage, count=seen[name].count)
            for name, moment in gradients.items()
            if moment is not None
        },
        names,
    )
    first = next(iter(seen.values()))
    return {
        name: replace(
            seen.get(name, replace(first, count=1, samples=0)),
            mean=torch.zeros_like(first.mean),
            compact=inputs[name].moment,
            shrinkage=inputs[name].unknown,
            rounding_tolerance=max(own.rounding_tolerance for own in seen.values()),
            output_grad_covariance=outputs[name].moment if outputs else None,
            output_grad_shrinkage=outputs[name].unknown if outputs else 0.0,
        )
        for name in names
    }


@dataclass(frozen=True, eq=False)
class _Estimate:
    """A second moment (1, n, n) from some vectors.

    Attributes:
        moment: The moment.
        unknown: Share of it that is not known, as in `Moments`.
        variance: Mean squared distance to what more vectors would give.
        count: How many vectors.
    """

    moment: Tensor
    unknown: float
    variance: float
    count: int

    @classmethod
    def of(cls, moment: Tensor, unknown: float, *, count: int) -> "_Estimate":
        """From how much of it is not known."""
        return cls(moment, unknown, unknown * _from_isotropic(moment), count)

    def drawn_to(self, other: "_Estimate") -> "_Estimate":
        """With what it does not know from the other."""
        distance = square_of(self.moment - other.moment)
        share = min(1.0, self.variance / distance) if self.unknown < 1 and distance > 0 else 1.0
        mixed = (1 - share) * self.moment + share * other.moment if share < 1 else other.moment
        return replace(self, moment=mixed, unknown=share * other.unknown)


def _of_inputs(own: Moments) -> _Estimate:
    centred = _Estimate.of(own.covariance, own.shrinkage, count=own.count)
    return replace(centred, moment=matrix_of(add_outer(centred.moment, own.mean)))


def _shared(estimates: Mapping[str, _Estimate], names: Sequence[str]) -> dict[str, _Estimate]:
    """Each drawn to the mean of all, which is that of those without one; nothing if there is none."""
    if not estimates:
        return {}
    total = sum(own.count for own in estimates.values())
    mean, variance = torch.zeros(()), 0.0
    for own in estimates.values():
        mean = mean + own.moment * (own.count / total)
        variance += own.variance * (own.count / total) ** 2
    away = _from_isotropic(mean)
    pool = _Estimate(mean, min(1.0, variance / away) if away > 0 else 1.0, variance, total)
    return {name: estimates[name].drawn_to(pool) if name in estimates else pool for name in names}


def _from_isotropic(moment: Tensor) -> float:
    """The squared distance to the nearest multiple of the identity."""
    return square_of(moment) - moment.shape[-1] * float(mean_variance(moment).square().sum())
