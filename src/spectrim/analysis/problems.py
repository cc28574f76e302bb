"""What the factors of a weight approximate, in every metric that there are statistics for."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from spectrim.analysis.calibration import Calibration
from spectrim.analysis.moments import output_grads, pooled
from spectrim.analysis.tied_embeddings import tied_problems
from spectrim.core.plans import Metric
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import PartnerMoments, Problem, to_float64


def problems_of(unit: Unit, kernels: Tensor, calibration: Calibration | None) -> dict[Metric, Problem]:
    """What there is to approximate in every metric."""
    assert isinstance(unit, SingleWeight)
    problems: dict[Metric, Problem] = {"plain": Problem(kernels)}
    if calibration and all(site in calibration.moments for site in unit.call_sites):
        moments = [calibration.moments[site] for site in unit.call_sites]
        if unit.weight.outputs:
            return problems | tied_problems(kernels, moments, outputs=len(unit.weight.outputs))
        inputs = pooled(moments, name=unit.name, width=unit.geometry.width)
        problems["activation"] = Problem(
            kernels, inputs.covariance, shrinkage=inputs.shrinkage, rounding_tolerance=inputs.rounding_tolerance
        )
        if (G := output_grads(moments)) is not None:
            problems["loss"] = replace(problems["activation"], output=G)
    return problems


def mean_output(problem: Problem, mean: Tensor, bias: Tensor | None) -> Tensor:
    """That of a layer with a bias (out,), from the mean (1, in) of its inputs."""
    (weight,) = to_float64(problem.weight.flatten(2)).to(problem.device)
    centre: Tensor = weight @ mean[0].to(weight.device)
    return centre if bias is None else centre + to_float64(bias).to(weight.device)


def partner_moments(problems: Mapping[Metric, Problem], query_mean: Tensor, *, gives_queries: bool) -> PartnerMoments:
    """Those of a layer of keys for the one that gives the queries, or the other way round."""
    problem = problems.get("loss", problems["activation"])
    (weight,) = to_float64(problem.weight.flatten(2)).to(problem.device)
    second, gradients = weight @ problem.full_metric @ weight.T, None if problem.output is None else problem.output[0]
    if gives_queries:
        return PartnerMoments(second, gradients, own_mean=query_mean)
    return PartnerMoments(second + query_mean.outer(query_mean), gradients)
