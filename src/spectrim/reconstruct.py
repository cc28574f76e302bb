"""Sequential reconstruction: every layer is fitted anew to what it receives in the compressed network."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.calibrate import Moments, Running, answers, patches
from spectrim.execution import Inputs, call, evaluating, watching
from spectrim.factorize import factored_at, refitted_at
from spectrim.forms import decompose, kernels
from spectrim.linalg import Factors, Problem, algebra
from spectrim.plan import LayerPlan, Plan
from spectrim.surgery import replace

Told = Callable[[str, int, int], None]
"""Called with a layer's name before it is fitted, how many layers are done, and how many there are."""

_MEMORY = 2**29
_RIDGE = 1e-2


class _Enough(BaseException):
    """Ends a forward pass once it has shown what was wanted. Not an Exception, so that no model catches it."""


@dataclass(frozen=True)
class _Place:
    """One weight of the plan and the distinct layers that use it."""

    plan: LayerPlan
    names: tuple[str, ...]
    sites: tuple[str, ...]


def reconstruct(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    batches: Sequence[Inputs],
    factors: dict[str, Factors],
    refit: Collection[str],
    positions: int | None = 64,
    on_progress: Told | None = None,
) -> nn.Module:
    """Replace the planned layers one after the other, each fitted to undo what the ones before it have changed.

    In execution order, layer by layer: y is the output of the dense network, x the input in the network as compressed
    so far. W* = (cov(y, x) + r W)(cov(x) + r I)^-1, r a hundredth of the mean variance, is factored in the metric
    cov(x) + r I, and the bias makes the mean exact (asymmetric reconstruction; Zhang 2016). Layers that stay dense take
    W* as it is. Where a layer's error on the data would not fall, its factors stay as they were.

    Time: a run of the compressed network up to each layer, and one of the dense network. Memory: one layer's second
    moments, the batches, and the sampled outputs of as many dense layers as fit into half a gigabyte (more layers take
    another run of the dense network each time it is full).

    Args:
        model: The dense network.
        small: An exact copy of it, which is changed.
        plan: Forms and ranks, layers in order of execution.
        batches: What the networks are run on.
        factors: By layer name, the factors fitted to the dense network.
        refit: Names of the layers that may be fitted; the others are exchanged as they are, or stay.
        positions: Output positions looked at in each image, None for all.
        on_progress: Told about every layer.
    """
    places = [_place(small, layer) for layer in plan.layers if layer.name in refit]
    done = 0
    for chunk, wanted in _recorded(model, places, batches, positions):
        for place in chunk:
            if on_progress is not None:
                on_progress(place.plan.name, done, len(places))
            seen = _joint_moments(small, place, wanted, batches, positions)
            replace(small, _fitted(small, place, seen, factors.get(place.plan.name)))
            done += 1
    if on_progress is not None:
        on_progress("", done, len(places))
    return small


def _place(model: nn.Module, layer: LayerPlan) -> _Place:
    names = (layer.name, *layer.also)
    first = {id(model.get_submodule(name)): name for name in reversed(names)}
    return _Place(layer, names, tuple(name for name in names if name in first.values()))


_Wanted = dict[str, list[list[Tensor]]]
"""The dense network's sampled outputs, by place, batch and call: (groups, n, out)."""


def _recorded(
    model: nn.Module, places: Sequence[_Place], batches: Sequence[Inputs], positions: int | None
) -> Iterator[tuple[list[_Place], _Wanted]]:
    """Runs of consecutive places with their dense outputs, as many at a time as memory allows."""
    start = 0
    while start < len(places):
        sites = {site: order for order, place in enumerate(places) for site in place.sites if order >= start}
        room, end = _MEMORY, len(places)
        wanted: _Wanted = {site: [] for site in sites}

        def watch(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
            nonlocal room, end
            order = sites.get(name, end)  # noqa: B023  # used within this turn of the loop only
            if order < end:
                taken = answers(layer, output, positions=positions)
                wanted[name][-1].append(taken)  # noqa: B023
                room -= taken.numel() * taken.element_size()
                if room < 0 and order > start:
                    end = order

        with evaluating(model), watching(model, watch):
            for position, batch in enumerate(batches):
                for calls in wanted.values():
                    calls.append([])
                call(model, batch, what=f"batch {position}")
        yield list(places[start:end]), wanted
        start = end


def _joint_moments(
    small: nn.Module, place: _Place, wanted: _Wanted, batches: Sequence[Inputs], positions: int | None
) -> dict[str, Moments]:
    """Moments of (inputs now, outputs in the dense network) side by side, by place."""
    running = {site: Running() for site in place.sites}
    left: dict[str, list[Tensor]] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if not left.get(name):
            return
        y = left[name].pop(0)
        x = patches(layer, given, positions=positions, size=output.shape[-2:])
        running[name].add(torch.cat([x.to(y.dtype), y], dim=2))
        if not any(left.values()):
            raise _Enough

    with evaluating(small), watching(small, watch):
        for position, batch in enumerate(batches):
            left = {site: list(wanted[site][position]) for site in place.sites}
            try:
                call(small, batch, what=f"batch {position}")
            except _Enough:
                continue
    return {site: one.finish(site) for site, one in running.items() if one.count}


def _fitted(small: nn.Module, place: _Place, seen: dict[str, Moments], factors: Factors | None) -> dict[str, nn.Module]:
    layer = small.get_submodule(place.plan.name)
    dense = kernels(layer)
    W = algebra(dense).flatten(2)
    n = W.shape[2]
    total = sum(one.count for one in seen.values())
    joint = torch.stack([one.covariance * (one.count / total) for one in seen.values()]).sum(dim=0).to(W.device)
    C, D = joint[:, :n, :n], joint[:, n:, :n]
    mean = C.diagonal(dim1=1, dim2=2).mean(dim=1)
    ridge = _RIDGE * torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
    metric = C + ridge * torch.eye(n, dtype=C.dtype, device=C.device)
    best = W + torch.linalg.solve(metric, (D - W @ C).mT).mT

    def bias(name: str, _: nn.Module, whole: Tensor) -> Tensor:
        mean = seen[name].mean.to(whole.device)
        return (mean[:, n:] - (whole @ mean[:, :n].unsqueeze(-1)).squeeze(-1)).flatten()

    def error(whole: Tensor) -> float:
        return float((whole * (whole @ C - 2 * D)).sum())

    if place.plan.form == "dense":
        return refitted_at(small, place.names, weight=best.reshape(dense.shape), bias=bias)
    problem = Problem(best.reshape(dense.shape), metric)
    fresh = decompose(place.plan.form, problem).factors(place.plan.ranks)
    return factored_at(small, place.names, form=place.plan.form, factors=fresh, bias=bias)
