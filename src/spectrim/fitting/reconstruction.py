"""Sequential reconstruction: every layer is fitted anew to what it receives in the compressed network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import DEFAULT_BYTES, ActivationCache
from spectrim.analysis.calibration import POSITIONS
from spectrim.analysis.moments import RunningCovariance, pooled
from spectrim.analysis.sampling import Samples
from spectrim.analysis.spectra import Analysis
from spectrim.core.execution import Inputs, ProgressCallback, call
from spectrim.core.plans import LayerPlan, Plan
from spectrim.fitting.successors import Successor, find_successors, following
from spectrim.layers.forms import form_named
from spectrim.layers.replacement import factored_at, factorize, product, refitted_at, replace
from spectrim.layers.tokens import TokenMasks, input_rows, output_rows
from spectrim.layers.types import layer_type_of
from spectrim.linalg import Covariance, Factors, Problem, to_float64
from spectrim.linalg.covariance import add_outer, solver, times
from spectrim.linalg.problem import ridged

_RIDGE, _MOST_RIDGE = 1e-2, 1e4


class _PassEnded(BaseException):
    """Ends a forward pass early, once all rows are collected. Not an Exception, so that no model catches it."""


_Rows = dict[str, list[Tensor]]
"""By call site and batch: (groups, n, ..)."""


@dataclass(eq=False)
class _Seen:
    """What one call site saw, batch by batch: rows (groups, n, ..).

    Attributes:
        inputs: Its inputs in the compressed network.
        samples: How many samples each entry of `inputs` is of, or how many vectors each of them has.
        outputs: Its outputs in the dense network.
        residuals: The residual branches that are added to its outputs in the compressed network.
        dense_residuals: The same in the dense network.
    """

    inputs: list[Tensor] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    dense_residuals: list[Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> "_Seen":
        """On another device."""
        inputs, outputs, *branches = (
            [rows.to(device) for rows in own]
            for own in (self.inputs, self.outputs, self.residuals, self.dense_residuals)
        )
        return _Seen(inputs, self.samples, outputs, *branches)

    @property
    def is_paired(self) -> bool:
        """Whether the rows of both networks belong together, one to one."""
        rows = [inputs.shape[1] for inputs in self.inputs]
        return (
            sum(rows) > 0
            and rows == [outputs.shape[1] for outputs in self.outputs]
            and [branch.shape for branch in self.residuals] == [branch.shape for branch in self.dense_residuals]
        )


@dataclass(frozen=True)
class _Place:
    """One weight of the plan, the distinct layers that use it, and what follows it if it is used only once.

    What it should give is what leaves the network, after what follows it, as it was.
    """

    plan: LayerPlan
    call_sites: tuple[str, ...]
    successor: Successor

    def targets(self, seen: Mapping[str, _Seen]) -> _Rows:
        """The dense outputs, and what the residual branch lacks against the dense network."""
        if not self.successor.residual:
            return {site: rows.outputs for site, rows in seen.items()}
        ((site, rows),) = seen.items()
        scale, _ = self._affine(rows.outputs[0])
        each = zip(rows.outputs, rows.dense_residuals, rows.residuals, strict=True)
        return {site: [y + (s - t) / scale for y, s, t in each]}

    def revised(self, seen: Mapping[str, _Seen], targets: _Rows, *, whole: Tensor, fit: "_Fit") -> _Rows:
        """The same, but as it comes out for `whole` where the ReLU gives zero both then and now (Zhang 2016)."""
        ((site, rows),) = seen.items()
        scale, shift = self._affine(rows.outputs[0])
        bias = fit.bias(site, whole, targets[site]).reshape(len(whole), 1, -1)
        revised = []
        for position, (y, x) in enumerate(zip(rows.outputs, rows.inputs, strict=True)):
            got = x.to(y.dtype) @ whole.mT.to(y.dtype) + bias.to(y.dtype)
            before = scale * y + shift + (rows.dense_residuals[position] if rows.dense_residuals else 0)
            offset = shift + (rows.residuals[position] if rows.residuals else 0)
            hidden = torch.minimum(scale * got + offset, torch.zeros_like(got))
            revised.append((torch.where(before > 0, before, hidden) - offset) / scale)
        return {site: revised}

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift as (groups, 1, out) of a group; a scale of nearly nothing is kept away from zero."""
        both = (self.successor.scale, self.successor.shift)
        scale, shift = (affine.to(like).reshape(len(like), 1, -1) for affine in both)
        least = 1e-3 * scale.abs().max().clamp(min=1e-30)
        return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale), shift


def reconstruct(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    analysis: Analysis,
    batches: Sequence[Inputs],
    cache_bytes: int = DEFAULT_BYTES,
    on_progress: ProgressCallback | None = None,
) -> nn.Module:
    """Replace the planned layers one after the other, each fitted to undo what the ones before it have changed.

    In execution order, layer by layer: y is the output of the dense network, x the input in the network as compressed
    so far. W* = (cov(y, x) + r W)(cov(x) + r I)^-1, r a hundredth of the mean variance, is factored in the metric
    cov(x) + r I, and the bias makes the mean exact (asymmetric reconstruction; Zhang 2016). Layers that stay dense take
    W* as it is. Where the graph shows that a layer's output is only added to a residual branch, y also makes up for
    what that branch lacks; where only a ReLU follows, y does not count where the ReLU hides it. Where, on these data,
    the planned factors come nearer to y than the fitted ones, which are drawn towards W, they are kept.

    Time: a run of the compressed network up to each layer, less the blocks whose outputs are kept, and one of the dense
    network. Memory: one layer's sampled inputs and second moments, the batches, and `cache_bytes`.

    Args:
        model: The dense network.
        small: An exact copy of it, which is changed.
        plan: Forms and ranks, layers in order of execution; those in the plain metric and
            embeddings are exchanged as they are.
        analysis: Of the dense network. Its factors are used where fitting does not bring them nearer, and for layers
            that are not fitted: those in the plain metric, those that the data do not reach, and those that choose by
            value what they look at.
        batches: What the networks are run on.
        cache_bytes: Bytes that may be kept to save time: two fifths for sampled outputs of the dense network, which is
            run again each time they are full, and three fifths for outputs of blocks that are finished.
        on_progress: Called with each layer's name before it is fitted, how many are done, and of how many.
    """
    # what embeddings look up does not depend on the layers before them
    unfitted = {layer.name for layer in plan if layer.metric == "plain" or analysis[layer.name].is_lookup}
    chosen = [layer for layer in plan if not layer.frozen and layer.name not in unfitted]
    call_sites = {layer.name: analysis[layer.name].call_sites for layer in chosen}
    successors = find_successors(model, batches[0], [name for name, own in call_sites.items() if len(own) == 1])
    nothing = Successor(torch.ones(()), torch.zeros(()))
    places = [_Place(layer, call_sites[layer.name], successors.get(layer.name, nothing)) for layer in chosen]
    as_planned = [layer for layer in plan.factored if layer.name in unfitted]
    factorize(small, plan.model_copy(update={"layers": tuple(as_planned)}), factors=analysis.factors)
    cache = ActivationCache(small, 3 * cache_bytes // 5, batches[0])
    start = 0
    while start < len(places):
        seen, end = _record(model, places, start, batches, free_bytes=2 * cache_bytes // 5)
        for place in places[start:end]:
            if on_progress is not None:
                on_progress(place.plan.name, start, len(places))
            own = {site: seen.pop(site) for site in place.call_sites}
            _collect(cache, place, own, batches)
            if all(site.is_paired for site in own.values()):
                replace(small, _fitted(small, place, own, analysis=analysis))
            else:
                alone = plan.model_copy(update={"layers": (place.plan,)})
                factorize(small, alone, factors=analysis.factors, means=analysis.means)
            start += 1
    if on_progress is not None:
        on_progress("", len(places), len(places))
    return small


def _record(
    model: nn.Module, places: Sequence[_Place], start: int, batches: Sequence[Inputs], *, free_bytes: int
) -> tuple[dict[str, _Seen], int]:
    """Outputs and residual branches of the dense network at as many places as memory allows, and where these end."""
    order = {site: number for number, place in enumerate(places) for site in place.call_sites if number >= start}
    adding = {place.plan.name for place in places if place.successor.residual}
    seen = {site: _Seen() for site in order}
    end = len(places)

    def on_call(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
        if order[name] < end:
            seen[name].outputs.append(output_rows(layer, output, positions=POSITIONS, masks=masks))

    def on_residual(name: str, layer: nn.Module, residual: Tensor) -> None:
        if order[name] < end and name in adding:
            seen[name].dense_residuals.append(output_rows(layer, residual, positions=POSITIONS, masks=masks))

    for position, batch in enumerate(batches):
        masks = TokenMasks.of(model, batch)
        with following(model, order, on_call=on_call, on_residual=on_residual):
            call(model, batch, what=f"batch {position}")
        if not position:
            end = _affordable(places, start, seen, free_bytes=free_bytes // len(batches))
            seen = {site: rows for site, rows in seen.items() if order[site] < end}
    return seen, end


def _affordable(places: Sequence[_Place], start: int, first: Mapping[str, _Seen], *, free_bytes: int) -> int:
    """Where the places end, one at least, whose rows of one batch fit into so many bytes."""
    for number in range(start, len(places)):
        for site in places[number].call_sites:
            rows = (*first[site].outputs, *first[site].dense_residuals)
            free_bytes -= sum(row.numel() * row.element_size() for row in rows)
        if free_bytes < 0:
            return max(start + 1, number)
    return len(places)


def _collect(cache: ActivationCache, place: _Place, seen: Mapping[str, _Seen], batches: Sequence[Inputs]) -> None:
    """Add the inputs and residual branches that the place sees in the network as it is now."""
    calls = {site: len(rows.outputs) // len(batches) for site, rows in seen.items()}
    pending: dict[str, int] = {}

    def on_call(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        reached()
        rows, samples = input_rows(
            layer, x, output=output, positions=POSITIONS, masks=masks, samples=batches[position].samples
        )
        seen[name].inputs.append(rows.clone() if rows.data_ptr() == x.data_ptr() else rows)
        seen[name].samples.append(samples)
        pending[name] -= 1
        if not place.successor.residual and not any(pending.values()):
            raise _PassEnded

    def on_residual(name: str, layer: nn.Module, residual: Tensor) -> None:
        seen[name].residuals.append(output_rows(layer, residual, positions=POSITIONS, masks=masks))
        raise _PassEnded

    for position, batch in enumerate(batches):
        pending, masks = dict(calls), TokenMasks.of(cache.model, batch)
        watched = following(
            cache.model, seen, on_call=on_call, on_residual=on_residual if place.successor.residual else None
        )
        with suppress(_PassEnded), cache.recalling(position) as reached, watched:
            call(cache.model, batch, what=f"batch {position}")


def _fitted(small: nn.Module, place: _Place, seen: Mapping[str, _Seen], *, analysis: Analysis) -> dict[str, nn.Module]:
    """The replacement for a place, fitted to its rows in its metric, or as planned if that is no worse."""
    layer, plan = small.get_submodule(place.plan.name), place.plan
    # where the analysis decomposes, which may be on another device than the network
    seen = {site: rows.to(analysis[plan.name].problems["plain"].device) for site, rows in seen.items()}
    shape = layer_type_of(layer).geometry(layer).shape
    G = analysis[plan.name].problems["loss"].output if plan.metric == "loss" else None
    # a layer that stays dense stays as it is built: without a bias, moments are taken around zero
    biased = plan.is_factored or layer._parameters.get("bias") is not None
    fit = _Fit.of(layer, seen, biased=biased)
    targets = place.targets(seen)
    factors: Factors = ()
    for turn in reversed(range(1 + place.successor.relu)):
        cross = fit.cross(targets)
        best = fit.weight(cross)
        if plan.is_factored:
            problem = Problem(best.reshape(shape), fit.metric, output=G)
            factors = form_named(plan.form).decompose(problem, near=factors).factors(plan.ranks)
            best = product(layer, form=plan.form, factors=factors)
        if turn:
            targets = place.revised(seen, targets, whole=best, fit=fit)
    before = analysis.factors(plan) if plan.is_factored else ()
    unfitted = product(layer, form=plan.form, factors=before) if before else fit.dense
    if not fit.error(best, cross, G) <= fit.error(unfitted, cross, G):  # also where it is not a number
        best, factors = unfitted, before

    def bias(name: str, _: nn.Module, whole: Tensor) -> Tensor | None:
        return fit.bias(name, whole, targets[name]) if biased else None

    if not plan.is_factored:
        return refitted_at(small, plan.names, weight=best.reshape(shape), bias=bias)
    return factored_at(small, plan.names, form=plan.form, factors=factors, bias=bias)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Ridge regression from what a weight's call sites receive to what they should give, drawn towards the weight.

    Attributes:
        dense: The weight W, (groups, out, n), float64.
        inputs: The rows that the call sites receive.
        means: Their means by call site, (groups, n).
        covariance: Around each call site's own mean, since each has a bias of its own, (groups, n, n).
        metric: The covariance with the ridge.
        solve: Gives its argument (groups, out, n) times the inverse of that.
        biased: Whether the call sites may have a bias; if not, moments are taken around zero.
    """

    dense: Tensor
    inputs: _Rows
    means: dict[str, Tensor]
    covariance: Covariance
    metric: Covariance
    solve: Callable[[Tensor], Tensor]
    biased: bool

    @classmethod
    def of(cls, layer: nn.Module, seen: Mapping[str, _Seen], *, biased: bool) -> "_Fit":
        inputs, moments = {site: rows.inputs for site, rows in seen.items()}, {}
        for site, own in seen.items():
            statistics = RunningCovariance(centre=_mean(own.inputs))
            for rows, samples in zip(own.inputs, own.samples, strict=True):
                statistics.add(rows, samples=samples)
            moments[site] = statistics.finish(site)
        device = next(rows.device for own in seen.values() for rows in own.inputs)
        W = to_float64(layer_type_of(layer).kernels(layer)).flatten(2).to(device)
        together = pooled(list(moments.values()), name=next(iter(inputs)), width=W.shape[2])
        C = together.covariance.to(W.device)
        C = to_float64(C) if isinstance(C, Tensor) else C
        means = {site: of_site.mean.to(W.device) for site, of_site in moments.items()}
        if not biased:
            total = sum(of_site.count for of_site in moments.values())
            for site, of_site in moments.items():
                C = add_outer(C, means[site] * (of_site.count / total) ** 0.5)
            means = {site: torch.zeros_like(mean) for site, mean in means.items()}
        # (1 - s) C + s I but for a factor, where s is what so few samples do not know
        unknown = min(together.shrinkage / max(1 - together.shrinkage, 1e-9), _MOST_RIDGE)
        metric = ridged(C, share=max(_RIDGE, unknown))
        return cls(W, inputs, means, C, metric, solver(metric), biased)

    def cross(self, targets: _Rows) -> Tensor:
        """cov(y, x), (groups, out, n)."""
        total = sum(rows.shape[1] for batches in self.inputs.values() for rows in batches)
        cross = torch.zeros_like(self.dense)
        for site, batches in self.inputs.items():
            middle, mean = self.means[site].unsqueeze(1), _mean(targets[site]).unsqueeze(1) * self.biased
            for x, y in zip(batches, targets[site], strict=True):
                kind = torch.promote_types(y.dtype, torch.float32)  # sums of products overflow in half precision
                cross += to_float64((y.to(kind) - mean.to(kind)).mT @ (x.to(kind) - middle.to(kind))) / total
        return cross

    def weight(self, cross: Tensor) -> Tensor:
        """(cov(y, x) + r W)(cov(x) + r I)^-1, written as a correction of W."""
        return self.dense + self.solve(cross - times(self.dense, self.covariance))

    def error(self, whole: Tensor, cross: Tensor, G: Tensor | None) -> float:
        """The mean of (y - Q x)^T G (y - Q x) for a weight Q, less what no Q changes, if the mean is exact."""
        product = (times(whole, self.covariance) - 2 * cross) @ whole.mT
        return float(product.diagonal(dim1=1, dim2=2).sum() if G is None else (product * G.to(product)).sum())

    def bias(self, site: str, whole: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """(out,): what makes the mean output exact for the weight `whole`, (groups, out, n); zero without a bias."""
        if not self.biased:
            return torch.zeros_like(whole[..., 0]).flatten()
        return (_mean(targets) - (whole.to(self.dense.device) @ self.means[site].unsqueeze(-1)).squeeze(-1)).flatten()


def _mean(batches: Sequence[Tensor]) -> Tensor:
    """The mean of rows (groups, n, ..) over all batches, float64."""
    total = sum(rows.shape[1] for rows in batches)
    means = [to_float64(rows.mean(dim=1)) * (rows.shape[1] / total) for rows in batches if rows.shape[1]]
    return torch.stack(means).sum(dim=0)
