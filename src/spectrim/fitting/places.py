"""One weight of a plan: what it sees in both networks, what it should give, and its replacement."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.plans import LayerPlan
from spectrim.fitting.neurons import Neurons
from spectrim.fitting.regression import InputRows, RidgeFit, Rows
from spectrim.fitting.successors import Successor
from spectrim.layers.forms import find_form
from spectrim.layers.forms.base import JointForm
from spectrim.layers.replacement import factored_at, narrowed_at, product, refitted_at
from spectrim.layers.types import layer_type_of
from spectrim.linalg import Covariance, Factors
from spectrim.linalg.covariance import dense_of
from spectrim.linalg.products import matmul


@dataclass(eq=False)
class Seen:
    """What one call site saw, batch by batch: rows (groups, n, ..).

    Attributes:
        inputs: Its inputs in the compressed network, which other sites may share.
        outputs: Its outputs in the dense network.
        residuals: The residual branches that are added to its outputs in the compressed network.
        dense_residuals: The same in the dense network.
        calls: How many calls in the dense network there were, by batch.
    """

    inputs: InputRows = field(default_factory=InputRows)
    outputs: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    dense_residuals: list[Tensor] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)

    def to(self, device: torch.device) -> "Seen":
        """On another device."""
        outputs, residuals, dense_residuals = (
            [rows.to(device) for rows in own] for own in (self.outputs, self.residuals, self.dense_residuals)
        )
        return Seen(self.inputs.to(device), outputs, residuals, dense_residuals, self.calls)

    @property
    def is_paired(self) -> bool:
        """Whether the rows of both networks belong together, one to one."""
        rows = self.inputs.sizes
        outputs, *branches = (
            [own.shape for own in part] for part in (self.outputs, self.residuals, self.dense_residuals)
        )
        # of a branch that some batches only have, it is not known which
        return sum(rows) > 0 and rows == [shape[1] for shape in outputs] and branches in ([[], []], [outputs, outputs])


@dataclass(frozen=True)
class Place:
    """One weight of the plan, the distinct layers that use it, and what follows it if it is used only once.

    What it should give is what leaves the network, after what follows it, as it was.
    """

    plan: LayerPlan
    call_sites: tuple[str, ...]
    successor: Successor
    feeders: tuple[str, ...] = ()

    def targets(self, seen: Mapping[str, Seen]) -> Rows:
        """The dense outputs, and what the residual branch lacks against the dense network."""
        if not self.successor.residual:
            return {site: rows.outputs for site, rows in seen.items()}
        ((site, rows),) = seen.items()
        scale, _ = self._affine(rows.outputs[0])
        each = zip(rows.outputs, rows.dense_residuals, rows.residuals, strict=True)
        return {site: [y + (s - t) / scale for y, s, t in each]}

    def revised(self, seen: Mapping[str, Seen], targets: Rows, *, whole: Tensor, fit: RidgeFit) -> Rows:
        """The same, but as it comes out for `whole` where the ReLU gives zero both then and now (Zhang 2016)."""
        ((site, rows),) = seen.items()
        scale, shift = self._affine(rows.outputs[0])
        bias = fit.bias(site, whole, targets[site]).reshape(len(whole), 1, -1)
        revised = []
        for position, (y, x) in enumerate(zip(rows.outputs, rows.inputs.rows, strict=True)):
            fitted = matmul(x.to(y.dtype), whole.mT.to(y.dtype)) + bias.to(y.dtype)
            before = scale * y + shift + (rows.dense_residuals[position] if rows.dense_residuals else 0)
            offset = shift + (rows.residuals[position] if rows.residuals else 0)
            hidden = torch.minimum(scale * fitted + offset, torch.zeros_like(fitted))
            revised.append((torch.where(before > 0, before, hidden) - offset) / scale)
        return {site: revised}

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift as (groups, 1, out) of a group; a scale of nearly nothing is kept away from zero."""
        both = (self.successor.scale, self.successor.shift)
        scale, shift = (affine.to(like).reshape(len(like), 1, -1) for affine in both)
        least = 1e-3 * scale.abs().max().clamp(min=1e-30)
        return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale), shift


def has_neurons(plan: LayerPlan) -> bool:
    """Whether it is planned to be narrowed together with layers before an elementwise function."""
    form = find_form(plan.form) if plan.form and plan.unit == plan.name else None
    return isinstance(form, JointForm) and not form.by_head


def _approximated(
    weight: Tensor, *, plan: LayerPlan, known: LayerAnalysis, metric: Covariance, near: Factors
) -> Factors:
    """Factors of a weight (groups, out, in, *kernel) in the planned form, in this metric of the inputs."""
    problem = known.problems[plan.metric or "plain"].of_weight(weight, metric)
    return find_form(plan.form).decompose_unit(problem, known.unit, near=near).factors(plan.ranks)


def fitted(
    small: nn.Module, place: Place, seen: Mapping[str, Seen], *, analysis: Analysis, neurons: Neurons | None = None
) -> list[dict[str, nn.Module]]:
    """The replacement for a place, fitted to its rows in its metric, or the weight's own factors if these are no worse.

    With neurons also one in which the layers before them are fitted as well.
    """
    layer, plan, known = small.get_submodule(place.plan.name), place.plan, analysis[place.plan.name]
    # where the analysis decomposes, which may be on another device than the network
    device = known.problems["plain"].device
    seen = {site: rows.to(device) for site, rows in seen.items()}
    shape = layer_type_of(layer).geometry(layer).shape
    G = known.problems["loss"].output if plan.metric == "loss" else None
    # a layer that stays dense stays as it is built: without a bias, moments are taken around zero
    is_approximated = plan.is_factored and plan.unit in (None, plan.name)  # others are narrowed with the last one
    biased = is_approximated or layer._parameters.get("bias") is not None
    fit = RidgeFit.of(layer, {site: own.inputs for site, own in seen.items()}, biased=biased)
    targets = place.targets(seen)
    best = fit.weight(cross := fit.cross(targets))
    planned = known.decomposition(plan.form, plan.metric or "plain") if is_approximated else None
    start = planned.start if planned else ()
    metric = dense_of(fit.metric) if start else fit.metric
    approximated = partial(_approximated, plan=plan, known=known, metric=metric)
    if start and isinstance(metric, Tensor) and metric.dtype == torch.float32:
        before = approximated(fit.dense.reshape(shape), near=start)  # in less time and memory than the planned ones
    else:
        before = planned.factors(plan.ranks) if planned else ()
    factors = before  # where the search for those that are fitted begins; the same neurons are left
    for turn in reversed(range(1 + place.successor.relu)):
        if planned:
            factors = approximated(best.reshape(shape), near=factors)
            best = product(layer, form=plan.form, factors=factors)
        if turn:
            targets = place.revised(seen, targets, whole=best, fit=fit)
            best = fit.weight(cross := fit.cross(targets))
    unfitted = product(layer, form=plan.form, factors=before) if before else fit.dense
    if not fit.excess(best, unfitted, cross=cross, G=G) <= 0:  # also where it is not a number
        best, factors = unfitted, before

    def bias(name: str, _: nn.Module, whole: Tensor) -> Tensor | None:
        return fit.bias(name, whole, targets[name]) if biased else None

    if not is_approximated:
        return [refitted_at(small, plan.names, weight=best.reshape(shape), bias=bias)]
    del best, unfitted, cross  # each as large as the weight, which may be the largest of all
    if plan.unit:
        (rank,) = plan.ranks
        new = narrowed_at(small, plan.name, place.feeders, form=plan.form, rank=rank, factors=factors, bias=bias)
        samples, goal = seen[plan.name].inputs.samples, targets[plan.name]
        both = neurons.to(device).fitted(new, samples, targets=goal, G=G) if neurons else None
        return [new, both] if both else [new]
    return [factored_at(small, plan.names, form=plan.form, factors=factors, bias=bias)]
