"""Sequential reconstruction: every layer is fitted anew to what it receives in the compressed network."""

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from spectrim.analysis.activation_cache import (
    DEFAULT_BYTES,
    ActivationCache,
    blocks_after_feeders,
)
from spectrim.analysis.recalled_pass import ForgottenOutputError
from spectrim.analysis.spectra import Analysis
from spectrim.core.execution import Inputs, ProgressCallback, call, evaluating
from spectrim.core.memory import return_freed
from spectrim.core.plans import LayerPlan, Plan
from spectrim.fitting.held_out import HeldOut, Pairs, taken_apart
from spectrim.fitting.neurons import Neurons
from spectrim.fitting.places import Place, Seen, fitted, has_neurons
from spectrim.fitting.regression import InputRows
from spectrim.fitting.successors import Successor, find_successors, following
from spectrim.layers.elementwise import FunctionBetween, functions_between
from spectrim.layers.replacement import duplicate, factorize, replace
from spectrim.layers.tokens import TokenMasks, input_rows, output_rows
from spectrim.layers.tracing import ended_at
from spectrim.layers.types import layer_type_of
from spectrim.layers.types.base import SampledPlaces

_PLACES = 64


class _PassEnded(BaseException):
    """Ends a forward pass early, once all rows are collected. Not an Exception, so that no model catches it."""


def reconstruct(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    analysis: Analysis,
    batches: Sequence[Inputs],
    small_batches: Sequence[Inputs] | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    on_progress: ProgressCallback | None = None,
) -> nn.Module:
    """Replace the planned layers one after the other, each fitted to undo what the ones before it have changed.

    In execution order, layer by layer: y is the output of the dense network, x the input in the network as compressed
    so far. W* = (cov(y, x) + r W)(cov(x) + r I)^-1, r a hundredth of the typical variance or of tokens a tenth, is
    factored in the metric cov(x) + r I, and the bias makes the mean exact (asymmetric reconstruction; Zhang 2016).
    Layers that stay dense take W* as it is. Where the graph shows that a layer's output is only added to a residual
    branch, y also makes up for what that branch lacks; where only a ReLU follows, y does not count where the ReLU hides
    it. Where, on these data, the planned factors come nearer to y than the fitted ones, which are drawn towards W, they
    are kept; of kernels with more than 2048 inputs, factors of W in the metric of the fit stand for the planned ones.

    Time: a run of the compressed network up to each layer, less the blocks whose outputs are kept, and one of the dense
    network; layers that read one tensor share a run. Memory: one layer's sampled inputs and second moments, the
    batches, and `cache_bytes`.

    Args:
        model: The dense network.
        small: An exact copy of it, which is changed and, as a rule, given back.
        plan: Forms and ranks, layers in order of execution; those in the plain metric, embeddings and experts are
            exchanged as they are.
        analysis: Of the dense network. Its factors are used where fitting does not bring them nearer, and for layers
            that are not fitted: those in the plain metric, those that the data do not reach, and those that choose by
            value what they look at.
        batches: What the networks are run on.
        small_batches: What the compressed one is run on in their place, one for one: of a part of a network, what
            arrives from the compressed part before it.
        cache_bytes: Bytes that may be kept to save time: two fifths for sampled outputs of the dense network, which is
            run on each time they are full, a fifth for outputs of blocks that are finished there, and two fifths for
            those of the compressed network, which is run on for each layer.
        on_progress: Called with each layer's name before it is fitted, how many are done, and of how many.
    """
    pairs = list(zip(batches, batches if small_batches is None else small_batches, strict=True))
    run = partial(_reconstruct, model, plan=plan, analysis=analysis, pairs=pairs, cache_bytes=cache_bytes)
    try:
        return run(small, on_progress=on_progress)
    except ForgottenOutputError:  # a batch for which the network reads more than for the first one
        return run(duplicate(model), on_progress=on_progress, forgets=False)


def _reconstruct(
    model: nn.Module,
    small: nn.Module,
    *,
    plan: Plan,
    analysis: Analysis,
    pairs: Pairs,
    cache_bytes: int,
    on_progress: ProgressCallback | None,
    forgets: bool = True,
) -> nn.Module:
    # what embeddings look up does not depend on the layers before them, and which tokens reach an expert does
    exempt = {layer.name for layer in analysis if layer.is_lookup or layer.stack}
    unfitted = exempt | {layer.name for layer in plan if layer.metric == "plain"}
    chosen = [layer for layer in plan if not layer.frozen and layer.name not in unfitted]
    feeding = _FeederInputs.of(model, pairs, plan=plan, chosen=chosen)
    pairs = feeding.held_out.pairs
    return_freed()
    first = pairs[0][0]
    places = _places(model, first, plan=plan, chosen=chosen, analysis=analysis)
    as_planned = [layer for layer in plan.factored if layer.name in unfitted]
    factorize(small, plan.model_copy(update={"layers": tuple(as_planned)}), factors=analysis.factors)
    dense = ActivationCache(model, cache_bytes // 5, first, forgets)
    narrowed = ((feeder, place.plan.name) for place in places for feeder in place.feeders)
    never = blocks_after_feeders(model, first, narrowed)
    compressed = dense.of(small, never=never, free_bytes=2 * cache_bytes // 5)
    data, small_data = ([(batch, TokenMasks.of(model, batch)) for batch in own] for own in zip(*pairs, strict=True))
    readers, events = _readers(model, first, places), dict[int, Counter[str]]()
    end, inputs = 0, dict[str, InputRows]()
    for start, place in enumerate(places):
        name = place.plan.name
        if on_progress is not None:
            on_progress(name, start, len(places))
        if start == end:
            seen, end = _record(dense, places, start, data, free_bytes=2 * cache_bytes // 5, events=events)
        own = {site: seen.pop(site) for site in place.call_sites}
        if name in inputs:
            own[name].inputs = inputs[name]
        else:
            others = [later.plan.name for later in places[start + 1 :] if readers.get(later.plan.name) == name]
            inputs = dict.fromkeys(
                _collect(compressed, place, own, small_data, others=others), own[place.call_sites[0]].inputs
            )
            own[place.call_sites[0]].inputs.is_shared = bool(inputs)
        return_freed()
        neurons = feeding.neurons(small, place, own[place.call_sites[0]].inputs)
        if all(site.is_paired for site in own.values()):
            new = fitted(small, place, own, analysis=analysis, neurons=neurons)
            replace(small, feeding.held_out.nearest(compressed, new))
        else:
            unit = (place.plan.name, *place.feeders)
            alone = plan.model_copy(update={"layers": tuple(layer for layer in plan if layer.name in unit)})
            factorize(small, alone, factors=analysis.factors, means=analysis.means)
    if on_progress is not None:
        on_progress("", len(places), len(places))
    return small


def _places(
    model: nn.Module, first: Inputs, *, plan: Plan, chosen: Sequence[LayerPlan], analysis: Analysis
) -> list[Place]:
    """The weights that are fitted, in order of execution."""
    call_sites = {layer.name: analysis[layer.name].call_sites for layer in chosen}
    successors = find_successors(model, first, [name for name, own in call_sites.items() if len(own) == 1])
    nothing = Successor(torch.ones(()), torch.zeros(()))
    return [
        Place(layer, call_sites[layer.name], successors.get(layer.name, nothing), plan.feeders(layer.name))
        for layer in chosen
    ]


@dataclass(eq=False)
class _FeederInputs:
    """What the layers before elementwise functions receive, until those after them are fitted.

    Attributes:
        held_out: All batches, and those that neurons are not fitted to.
        between: The functions, by the layer after each.
        received: By layer before one.
    """

    held_out: HeldOut
    between: Mapping[str, FunctionBetween]
    received: dict[str, InputRows] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, pairs: Pairs, *, plan: Plan, chosen: Sequence[LayerPlan]) -> "_FeederInputs":
        """Of the narrowed MLPs of a plan; without any the batches are as they were.

        Of models that give logits for every token, none: the squared distance of all logits says too little of these.
        (SmolLM2 at 0.6 came 5 to 10 per cent nearer layer by layer, and its perplexity was 43.8, 43.2 without.)
        """
        feeders = {layer.name: plan.feeders(layer.name) for layer in chosen if has_neurons(layer)}
        if not any(feeders.values()) or _writes_text(model, pairs[0][0].parts(places=_PLACES)[0]):
            return cls(HeldOut(model, pairs), {})
        held_out = HeldOut(model, taken_apart(pairs))
        few = held_out.pairs[0][0].parts(places=_PLACES)[0]
        return cls(held_out, functions_between(model, few, feeders) if held_out.positions else {})

    def neurons(self, small: nn.Module, place: Place, inputs: InputRows) -> Neurons | None:
        """Those before a place, if they can be fitted; `inputs` are what it receives."""
        name = place.plan.name
        if not self.between:
            return None
        if place.plan.unit not in (None, name):
            self.received[name] = inputs
        feeding = {feeder: self.received.pop(feeder) for feeder in place.feeders if feeder in self.received}
        if name not in self.between or len(feeding) < len(place.feeders):
            return None
        neurons = Neurons(self.between[name], feeding, self.held_out.positions)
        return neurons if neurons.agree(small, inputs) else None


def _writes_text(model: nn.Module, few: Inputs) -> bool:
    """Whether it gives logits (batch, tokens, classes) as models of Hugging Face name them."""
    with evaluating(model):
        result = call(model, few)
    logits = result.get("logits") if isinstance(result, Mapping) else None
    return isinstance(logits, Tensor) and logits.ndim == 3


_Data = Sequence[tuple[Inputs, TokenMasks]]


def _sampled(data: _Data) -> SampledPlaces:
    return SampledPlaces.held(sum(batch.samples for batch, _ in data))


def _readers(model: nn.Module, batch: Inputs, places: Sequence[Place]) -> dict[str, str]:
    """By layer, the first one that reads the same vectors; of layers that are called once and add to no branch."""
    alone = {place.plan.name for place in places if len(place.call_sites) == 1 and not place.successor.residual}
    first: MutableMapping[Tensor, dict[tuple[Any, ...], str]] = WeakTensorKeyDictionary()
    readers: dict[str, list[str]] = {}

    def on_call(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        kind = layer_type_of(layer)
        windows = [getattr(layer, option) for option in kind.options]  # which parts of the tensor it multiplies
        key = (kind.name, kind.geometry(layer).groups, *windows)
        readers.setdefault(name, []).append(first.setdefault(x, {}).setdefault(key, name))

    with following(model, alone, on_call=on_call):
        call(model, batch)
    return {name: calls[0] for name, calls in readers.items() if len(calls) == 1}


def _record(
    cache: ActivationCache,
    places: Sequence[Place],
    start: int,
    data: _Data,
    *,
    free_bytes: int,
    events: dict[int, Counter[str]],
) -> tuple[dict[str, Seen], int]:
    """Outputs and residual branches of the dense network at as many places as memory allows, and where these end.

    `events` says by batch how many of both each call site has; the first time, when all passes go to the end, they are
    counted.
    """
    later = [(site, place) for place in places[start:] for site in place.call_sites]
    adding = {site for site, place in later if place.successor.residual}
    seen = {site: Seen(InputRows(site)) for site, _ in later}
    sampled, segment = _sampled(data), _Segment(places, start, len(places), free_bytes // len(data))

    def on_call(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
        if name not in seen or not position:  # the next places begin here, or no one knows yet where they do
            reached()
        add(name, layer, output, "outputs")

    def on_residual(name: str, layer: nn.Module, residual: Tensor) -> None:
        if name in adding:
            add(name, layer, residual, "dense_residuals")

    def add(name: str, layer: nn.Module, output: Tensor, part: str) -> None:
        if name in seen:
            rows = output_rows(layer, output, positions=sampled, masks=masks)
            seen[name].calls[position] += part == "outputs"
            if position or segment.takes(name, rows):
                getattr(seen[name], part).append(rows)
        counted[name] += 1
        if expected is not counted and all(counted[site] == expected[site] for site in segment.call_sites):
            reached()
            raise _PassEnded

    for position, entry in enumerate(data):
        batch, masks = entry
        counted = Counter[str]()
        expected = events.setdefault(position, counted)
        watched = following(cache.model, dict(later), on_call=on_call, on_residual=on_residual if adding else None)
        with suppress(_PassEnded), cache.recalling(position, at_hand=seen) as reached, watched:
            call(cache.model, batch, what=f"batch {position}")
        seen = {site: seen[site] for site in segment.call_sites}
        return_freed()
    return seen, segment.end


@dataclass(eq=False)
class _Segment:
    """Places of the plan from `start` to `end`, one at least, whose rows of a batch fit into `free_bytes`."""

    places: Sequence[Place]
    start: int
    end: int
    free_bytes: int
    without: set[str] = field(default_factory=set)

    def takes(self, site: str, rows: Tensor) -> bool:
        """Whether rows of a call site in the first batch are kept; if they are not, the segment ends before it."""
        self.free_bytes -= rows.numel() * rows.element_size()
        if self.free_bytes < 0 and site not in self.places[self.start].call_sites:
            self.without.add(site)
            self.end = next(n for n in range(self.start + 1, self.end + 1) if self._lacks(n))
        return site not in self.without

    @property
    def call_sites(self) -> list[str]:
        """Those of its places."""
        return [site for place in self.places[self.start : self.end] for site in place.call_sites]

    def _lacks(self, number: int) -> bool:
        return not self.without.isdisjoint(self.places[number].call_sites)


def _collect(
    cache: ActivationCache, place: Place, seen: Mapping[str, Seen], data: _Data, *, others: Sequence[str]
) -> set[str]:
    """Add the inputs and residual branches that the place sees in the network as it is now.

    Gives those of the `others`, which read the same tensor, that did so in each batch, with the same values.
    """
    same, shared, sampled = Counter[str](), torch.empty(0), _sampled(data)

    def on_call(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        nonlocal shared
        reached()
        if name in seen:
            shape = output.new_zeros(()).expand(output.shape)
            rows_of = partial(input_rows, layer, output=shape, positions=sampled, masks=masks, samples=batch.samples)
            seen[name].inputs.add(x, rows_of)
            shared = x.clone() if others else shared
        elif x.shape == shared.shape and torch.equal(x, shared):
            same[name] += 1
        pending[name] -= 1
        if not place.successor.residual and not any(pending.values()):
            raise _PassEnded

    def on_residual(name: str, layer: nn.Module, residual: Tensor) -> None:
        if name in seen:
            seen[name].residuals.append(output_rows(layer, residual, positions=sampled, masks=masks))
            raise _PassEnded

    for position, entry in enumerate(data):
        batch, masks = entry
        shared = torch.empty(0)
        pending = {site: rows.calls[position] for site, rows in seen.items()} | dict.fromkeys(others, 1)
        watched = following(
            cache.model, pending, on_call=on_call, on_residual=on_residual if place.successor.residual else None
        )
        only_inputs = list(pending.values()) == [1] and not place.successor.residual
        ending = ended_at(cache.model, *pending, on_call=on_call) if only_inputs else nullcontext()
        with suppress(_PassEnded), cache.recalling(position, at_hand=seen) as reached, watched, ending:
            call(cache.model, batch, what=f"batch {position}")
    return {name for name, number in same.items() if number == len(data)}
