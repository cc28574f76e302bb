"""Sequential reconstruction: every layer is fitted anew to what it receives in the compressed network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import CACHE, Prefix
from spectrim.analysis.calibration import Running, answers, patches, pooled
from spectrim.core.execution import Inputs, call, evaluating, watching
from spectrim.core.plans import LayerPlan, Plan
from spectrim.fitting.successors import Sequel, following, sequels
from spectrim.layers.registry import decompose, kernels
from spectrim.layers.replacement import factored_at, factorize, product, refitted_at
from spectrim.layers.selection import replace
from spectrim.linalg import Factors, Problem, algebra

Told = Callable[[str, int, int], None]
"""Called with a layer's name before it is fitted, how many layers are done, and how many there are."""

_RIDGE = 1e-2


class _Enough(BaseException):
    """Ends a forward pass once it has shown what was wanted. Not an Exception, so that no model catches it."""


@dataclass(frozen=True)
class _Place:
    """One weight of the plan, the distinct layers that use it, and what follows it if it is used only once."""

    plan: LayerPlan
    names: tuple[str, ...]
    sites: tuple[str, ...]
    sequel: Sequel | None


@dataclass(eq=False)
class _Seen:
    """What one site saw, batch by batch: rows (groups, n, ..) of inputs, outputs and the stream added to these."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)


def reconstruct(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    batches: Sequence[Inputs],
    factors: Callable[[LayerPlan], Factors],
    means: Mapping[str, Tensor],
    felt: Mapping[str, Tensor] | None = None,
    positions: int | None = 64,
    cache: int = CACHE,
    on_progress: Told | None = None,
) -> nn.Module:
    """Replace the planned layers one after the other, each fitted to undo what the ones before it have changed.

    In execution order, layer by layer: y is the output of the dense network, x the input in the network as compressed
    so far. W* = (cov(y, x) + r W)(cov(x) + r I)^-1, r a hundredth of the mean variance, is factored in the metric
    cov(x) + r I, and the bias makes the mean exact (asymmetric reconstruction; Zhang 2016). Layers that stay dense take
    W* as it is. Where the graph shows that a layer's output is only added to another stream, y also makes up for what
    that stream lacks; where only a ReLU follows, y is not asked for where the ReLU hides it anyway. Where, on these
    data, the planned factors come nearer to y than the fitted ones, which are drawn towards W, they are kept.

    Time: a run of the compressed network up to each layer, less the blocks whose outputs are kept, and one of the dense
    network. Memory: one layer's sampled inputs and second moments, the batches, and `cache`.

    Args:
        model: The dense network.
        small: An exact copy of it, which is changed.
        plan: Forms and ranks, layers in order of execution; those in the plain metric are exchanged as they are.
        batches: What the networks are run on.
        factors: Gives the planned factors of layers; used where fitting does not bring them nearer, and for layers that
            are not fitted: those in the plain metric, those that the data do not reach, and those that choose what they
            look at by value.
        means: Mean inputs of these, by layer name.
        felt: By layer name, the output-side metric G (groups, out, out) of layers planned in the loss metric.
        positions: Places looked at in each sample, None for all.
        cache: Bytes that may be kept to save time: two fifths for sampled outputs of the dense network, which is run
            again each time they are full, and three fifths for outputs of blocks that are finished.
        on_progress: Told about every layer.
    """
    chosen = [layer for layer in plan.layers if not layer.fixed and layer.metric != "plain"]
    known = sequels(model, batches[0], {layer.name for layer in chosen})
    places = [_place(small, layer, known) for layer in chosen]
    as_planned = [layer for layer in plan.factored if layer.metric == "plain"]
    factorize(small, plan.model_copy(update={"layers": tuple(as_planned)}), factors=factors)
    prefix = Prefix(small, room=3 * cache // 5)
    start = 0
    while start < len(places):
        dense, end = _record(model, places, start, batches, positions=positions, room=2 * cache // 5)
        for place in places[start:end]:
            if on_progress is not None:
                on_progress(place.plan.name, start, len(places))
            now = _collect(prefix, place, dense, batches, positions)
            then = {site: dense.pop(site) for site in place.sites}
            G = felt.get(place.plan.name) if felt and place.plan.metric == "loss" else None
            if _comparable(now, then):
                replace(small, _fitted(small, place, now, then, G=G, planned=factors))
            else:
                factorize(small, plan.model_copy(update={"layers": (place.plan,)}), factors=factors, means=means)
            start += 1
    if on_progress is not None:
        on_progress("", len(places), len(places))
    return small


def _place(model: nn.Module, layer: LayerPlan, known: Mapping[str, Sequel]) -> _Place:
    names = (layer.name, *layer.also)
    first = {id(model.get_submodule(name)): name for name in reversed(names)}
    sites = tuple(name for name in names if name in first.values())
    return _Place(layer, names, sites, known.get(layer.name) if len(sites) == 1 else None)


def _record(
    model: nn.Module,
    places: Sequence[_Place],
    start: int,
    batches: Sequence[Inputs],
    *,
    positions: int | None,
    room: int,
) -> tuple[dict[str, _Seen], int]:
    """Outputs and streams of the dense network, of as many places from `start` on as memory allows, and their end."""
    order = {site: number for number, place in enumerate(places) for site in place.sites if number >= start}
    adding = {place.plan.name for place in places if place.sequel and place.sequel.stream}
    seen = {site: _Seen() for site in order}
    layers: dict[str, nn.Module] = {}
    end = len(places)

    def on_call(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
        layers[name] = layer
        if order[name] < end:
            seen[name].outputs.append(answers(layer, output, positions=positions))

    def on_stream(name: str, stream: Tensor) -> None:
        if order[name] < end and name in adding:
            seen[name].streams.append(answers(layers[name], stream, positions=positions))

    for position, batch in enumerate(batches):
        with following(model, order, on_call=on_call, on_stream=on_stream):
            call(model, batch, what=f"batch {position}")
        if not position:
            end = _affordable(places, start, seen, room=room // len(batches))
            seen = {site: one for site, one in seen.items() if order[site] < end}
    return seen, end


def _affordable(places: Sequence[_Place], start: int, first: Mapping[str, _Seen], *, room: int) -> int:
    """Where the places end, one at least, whose rows of one batch fit into the room."""
    for number in range(start, len(places)):
        rows = [row for site in places[number].sites for row in (*first[site].outputs, *first[site].streams)]
        room -= sum(row.numel() * row.element_size() for row in rows)
        if room < 0:
            return max(start + 1, number)
    return len(places)


def _collect(
    prefix: Prefix, place: _Place, dense: Mapping[str, _Seen], batches: Sequence[Inputs], positions: int | None
) -> dict[str, _Seen]:
    """Inputs and streams that the place sees in the network as it is now."""
    seen = {site: _Seen() for site in place.sites}
    streaming = place.sequel is not None and place.sequel.stream
    layers: dict[str, nn.Module] = {}
    calls = {site: len(dense[site].outputs) // len(batches) for site in place.sites}
    left: dict[str, int] = {}

    def on_call(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if name not in seen:
            return
        reached()
        layers[name] = layer
        rows = patches(layer, given, positions=positions, size=output.shape[-2:])
        seen[name].inputs.append(rows.clone() if rows.data_ptr() == given.data_ptr() else rows)
        left[name] -= 1
        if not streaming and not any(left.values()):
            raise _Enough

    def on_stream(name: str, stream: Tensor) -> None:
        seen[name].streams.append(answers(layers[name], stream, positions=positions))
        raise _Enough

    small = prefix.model
    for position, batch in enumerate(batches):
        left = dict(calls)
        with suppress(_Enough), prefix.passing(position) as reached:
            if streaming:
                with following(small, place.sites, on_call=on_call, on_stream=on_stream):
                    call(small, batch, what=f"batch {position}")
            else:
                with evaluating(small), watching(small, on_call):
                    call(small, batch, what=f"batch {position}")
    return seen


def _comparable(now: Mapping[str, _Seen], then: Mapping[str, _Seen]) -> bool:
    """Whether the rows of both networks belong together, one to one."""
    return all(
        bool(one.inputs)
        and sum(rows.shape[1] for rows in one.inputs) > 0
        and [rows.shape[1] for rows in one.inputs] == [rows.shape[1] for rows in then[site].outputs]
        and [rows.shape for rows in one.streams] == [rows.shape for rows in then[site].streams]
        for site, one in now.items()
    )


def _fitted(
    small: nn.Module,
    place: _Place,
    now: Mapping[str, _Seen],
    dense: Mapping[str, _Seen],
    *,
    G: Tensor | None,
    planned: Callable[[LayerPlan], Factors],
) -> dict[str, nn.Module]:
    """The replacement for a place, fitted to its rows in the output metric G, or as planned if that is no worse."""
    layer, form, ranks = small.get_submodule(place.plan.name), place.plan.form, place.plan.ranks
    shape = kernels(layer).shape
    # a layer that stays dense stays as it is built: without a bias, moments are taken around zero
    biased = form != "dense" or layer._parameters.get("bias") is not None
    fit = _Fit.of(layer, {site: one.inputs for site, one in now.items()}, biased=biased)
    wanted = _Wanted(place, now, dense)
    targets = wanted.first()
    factors: Factors = ()
    for turn in reversed(range(1 + wanted.hides)):
        cross = fit.cross(targets)
        best = fit.weight(cross)
        if form != "dense":
            problem = Problem(best.reshape(shape), fit.metric, output=G)
            factors = decompose(form, problem, near=factors).factors(ranks)
            best = product(layer, form=form, factors=factors)
        if turn:
            targets = wanted.revised(targets, best, fit)
    before = () if form == "dense" else planned(place.plan)
    unfitted = product(layer, form=form, factors=before) if before else fit.dense
    if fit.error(unfitted, cross, G) < fit.error(best, cross, G):
        best, factors = unfitted, before

    def bias(name: str, _: nn.Module, whole: Tensor) -> Tensor | None:
        return fit.bias(name, whole, targets[name]) if biased else None

    if form == "dense":
        return refitted_at(small, place.names, weight=best.reshape(shape), bias=bias)
    return factored_at(small, place.names, form=form, factors=factors, bias=bias)


_Rows = dict[str, list[Tensor]]
"""By site and batch: (groups, n, ..)."""


@dataclass(frozen=True, eq=False)
class _Fit:
    """Ridge regression from what a weight's sites receive to what they should give, drawn towards the weight.

    Attributes:
        dense: The weight W, (groups, out, n), float64.
        inputs: The rows that the sites receive.
        means: Their means by site, (groups, n).
        covariance: Around each site's own mean, since each has a bias of its own, (groups, n, n).
        metric: The covariance with the ridge.
    """

    dense: Tensor
    inputs: _Rows
    means: dict[str, Tensor]
    covariance: Tensor
    metric: Tensor
    biased: bool

    @classmethod
    def of(cls, layer: nn.Module, inputs: _Rows, *, biased: bool) -> "_Fit":
        moments = {}
        for site, batches in inputs.items():
            running = Running()
            for rows in batches:
                running.add(rows)
            moments[site] = running.finish(site)
        W = algebra(kernels(layer)).flatten(2)
        C, _ = pooled(list(moments.values()), name=next(iter(inputs)), width=W.shape[2])
        C = C.to(W.device)
        means = {site: one.mean.to(W.device) for site, one in moments.items()}
        if not biased:
            total = sum(one.count for one in moments.values())
            for site, one in moments.items():
                C = C + (one.count / total) * means[site].unsqueeze(2) * means[site].unsqueeze(1)
            means = {site: torch.zeros_like(mean) for site, mean in means.items()}
        mean = C.diagonal(dim1=1, dim2=2).mean(dim=1)
        ridge = _RIDGE * torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
        eye = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
        return cls(W, inputs, means, C, C + ridge * eye, biased)

    def cross(self, targets: _Rows) -> Tensor:
        """cov(y, x), (groups, out, n)."""
        total = sum(rows.shape[1] for batches in self.inputs.values() for rows in batches)
        cross = torch.zeros_like(self.dense)
        for site, batches in self.inputs.items():
            middle, mean = self.means[site].unsqueeze(1), _mean(targets[site]).unsqueeze(1) * self.biased
            for x, y in zip(batches, targets[site], strict=True):
                cross += algebra((y - mean.to(y.dtype)).mT @ (x.to(y.dtype) - middle.to(y.dtype))) / total
        return cross

    def weight(self, cross: Tensor) -> Tensor:
        """(cov(y, x) + r W)(cov(x) + r I)^-1, written as a correction of W."""
        change = torch.cholesky_solve((cross - self.dense @ self.covariance).mT, self._root)
        return self.dense + change.mT

    def error(self, whole: Tensor, cross: Tensor, G: Tensor | None) -> float:
        """The mean of (y - Q x)^T G (y - Q x) for a weight Q, less what no Q changes, if the mean is exact."""
        product = (whole @ self.covariance - 2 * cross) @ whole.mT
        return float(product.diagonal(dim1=1, dim2=2).sum() if G is None else (product * G.to(product)).sum())

    @cached_property
    def _root(self) -> Tensor:
        return cast(Tensor, torch.linalg.cholesky(self.metric))

    def bias(self, site: str, whole: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """(out,): what makes the mean output exact for the weight `whole`, (groups, out, n); zero without a bias."""
        if not self.biased:
            return torch.zeros_like(whole[..., 0]).flatten()
        return (_mean(targets) - (whole @ self.means[site].unsqueeze(-1)).squeeze(-1)).flatten()


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What a place should give so that, after what follows it, the network is as it was."""

    place: _Place
    now: Mapping[str, _Seen]
    dense: Mapping[str, _Seen]

    @property
    def hides(self) -> bool:
        """Whether a ReLU hides a part of what the place gives."""
        return self.place.sequel is not None and self.place.sequel.relu

    def first(self) -> _Rows:
        """The dense outputs, and what the other stream lacks against the dense network."""
        if self.place.sequel is None or not self.place.sequel.stream:
            return {site: one.outputs for site, one in self.dense.items()}
        (site,) = self.place.sites
        dense, now = self.dense[site], self.now[site]
        scale, _ = self._affine(dense.outputs[0])
        each = zip(dense.outputs, dense.streams, now.streams, strict=True)
        return {site: [y + (s - t) / scale for y, s, t in each]}

    def revised(self, targets: _Rows, whole: Tensor, fit: _Fit) -> _Rows:
        """The same, but as it comes out for `whole` where the ReLU gives zero both then and now (Zhang 2016)."""
        (site,) = self.place.sites
        dense, now = self.dense[site], self.now[site]
        scale, shift = self._affine(dense.outputs[0])
        bias = fit.bias(site, whole, targets[site]).reshape(len(whole), 1, -1)
        made = []
        for position, (y, x) in enumerate(zip(dense.outputs, fit.inputs[site], strict=True)):
            got = x.to(y.dtype) @ whole.mT.to(y.dtype) + bias.to(y.dtype)
            before = scale * y + shift + (dense.streams[position] if dense.streams else 0)
            offset = shift + (now.streams[position] if now.streams else 0)
            hidden = torch.minimum(scale * got + offset, torch.zeros_like(got))
            made.append((torch.where(before > 0, before, hidden) - offset) / scale)
        return {site: made}

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift as (groups, 1, out) of a group; a scale of nearly nothing is kept away from zero."""
        assert self.place.sequel is not None
        groups = like.shape[0]
        scale, shift = (
            one.to(like).reshape(groups, 1, -1) for one in (self.place.sequel.scale, self.place.sequel.shift)
        )
        least = 1e-3 * scale.abs().max().clamp(min=1e-30)
        return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale), shift


def _mean(batches: Sequence[Tensor]) -> Tensor:
    """The mean of rows (groups, n, ..) over all batches, float64."""
    total = sum(rows.shape[1] for rows in batches)
    return torch.stack([algebra(rows.mean(dim=1)) * (rows.shape[1] / total) for rows in batches]).sum(dim=0)
