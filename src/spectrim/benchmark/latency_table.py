"""The latency table of a network: every distinct layer timed by itself, in every form, at some ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latencies import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.layer_calls import (
    FormAxes,
    LayerCalls,
    LayerSignature,
    Variant,
    axes_of,
    joint_axis,
    layer_calls,
    narrowed_variants,
)
from spectrim.benchmark.layer_timing import LayerBench, rest_of
from spectrim.benchmark.measurement import resized
from spectrim.benchmark.timing_cache import TimingCache
from spectrim.core.arguments import checked
from spectrim.core.errors import PlanError
from spectrim.core.execution import ProgressCallback, as_inputs, device_of, require_repeatable
from spectrim.layers.forms import allowed_forms, form_named, selected_forms
from spectrim.layers.unfusing import fused, unfused_as
from spectrim.runtimes.rank_grid import Grid, multiple_of, probe
from spectrim.runtimes.sessions import Runtime, Session, fingerprint, require_runtime, timed_together
from spectrim.runtimes.timing import medians_ms

_ROUNDS = 9
_POINTS = (7, 4)
_FEW: Mapping[str, tuple[int, int]] = MappingProxyType({"compile": (3, 2)})
"""Ranks along the axis of a form with one rank, and along each of two; fewer where a layer takes seconds to prepare."""


@checked
def latency_table(
    model: nn.Module,
    example_inputs: Any,
    *,
    analysis: Analysis,
    runtime: str = "torch",
    threads: int = 1,
    batch: int | None = None,
    forms: Sequence[str] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    on_progress: ProgressCallback | None = None,
    folder: Path | str | None = None,
) -> LatencyTable:
    """Time every layer that can be factored by itself, as it is, in factors, and narrowed, on this machine.

    Layers of the same shape are timed once, at some ranks of the hardware's grid, in interleaved rounds; what was timed
    is kept on disk, so that the next table with the same layers takes no time. The times of layers only predict: see
    `st.compress`, which measures.

    Args:
        model: The model; it stays as it is.
        example_inputs: One call's inputs; times are for them.
        analysis: From `st.analyze` on this model: its layers.
        runtime: One of `spectrim.runtimes.RUNTIMES`; `compile` takes seconds for each layer, form and rank, and is
            timed at fewer ranks.
        threads: How many a pass may use.
        batch: Repeat or cut the example to so many samples.
        forms: Which forms to time, as for `st.plan`; by default all that save time.
        rank_multiple: Time only multiples of this number, and full ranks; by default (`auto`) the step of this hardware
            and runtime, as `st.probe` finds it (1 on a GPU). Then layers of at most four steps are also timed at half
            and a quarter of it, below which they may have no other rank.
        on_progress: Called with the layer that is timed next, how many shapes are done, and of how many.
        folder: Where times are kept; by default $SPECTRIM_LATENCY or the user's cache folder.

    Raises:
        EngineError: an unknown runtime, more threads than cores, or a runtime that refuses the model.
        DependencyError: the runtime is not installed.
        ModelError: the model cannot run the inputs, changes its output between runs, or cannot be exported.
        RuleError: a rank_multiple that is no whole number of at least 1.
        PlanError: an unknown form, or an analysis of another model.
        FileError: `folder` cannot be written.
    """
    chosen = require_runtime(runtime, threads=threads)
    allowed, step = selected_forms(forms, for_size=False), multiple_of(rank_multiple)
    example = as_inputs(example_inputs)
    model = unfused_as(model, analysis.names)
    analysis.require_model(model)
    require_repeatable(model, example)
    inputs = resized(example, batch)
    calls, layers = layer_calls(model, inputs, analysis)
    if not calls:
        raise PlanError("the model calls no layer of the analysis that can be factored; is it an analysis of it?")
    bench, machine = LayerBench(layers, chosen, rest_of(model)), fingerprint(runtime, threads=threads)
    with chosen.prepare(fused(model), inputs, checked=True) as network:
        below: tuple[int, ...] = ()
        if step is None:
            on_cpu = device_of(model).type == "cpu"  # the probe knows no GPU
            step = probe(runtime=runtime, threads=threads, batch=max(1, inputs.samples)).multiple if on_cpu else 1
            below = tuple(rank for rank in (step // 4, step // 2) if rank)
        units = _units(calls, allowed, step, below)
        axes = (_axes(each.layer, allowed, step, below, chosen) for each in calls)
        timed = [_TimedLayer(each, own, _narrowed(each, units)) for each, own in zip(calls, axes, strict=True)]
        times = _measured(bench, TimingCache(folder, machine, len(bench.rest)), timed, on_progress)
        network_ms, times = _aligned(bench, network, times)
        single = {layer.calls.layer.name: layer.times(times) for layer in timed}
        narrowed = {layer.calls.layer.name: layer.narrowed_ms(times) for layer in timed}
        for unit in units:
            last = single[unit.last]
            single[unit.last] = last.model_copy(update={"forms": (*last.forms, unit.times(narrowed))})
    return LatencyTable(
        runtime=runtime,
        threads=threads,
        batch=batch,
        fingerprint=machine,
        rank_multiple=step,
        network_ms=network_ms,
        layers=tuple(single.values()),
    )


_Key = tuple[LayerSignature, tuple[Variant, ...]]
_Times = Mapping[_Key, tuple[float, ...]]
"""Milliseconds for every signature: as it is, then in each variant."""


@dataclass(frozen=True, eq=False)
class _Unit:
    """Layers that are narrowed together in a form: at each rank of an axis, what becomes of each by name."""

    last: str
    form: str
    axis: tuple[int, ...]
    variants: tuple[Mapping[str, Variant], ...]

    def times(self, narrowed: Mapping[str, Mapping[Variant, float]]) -> FormTimes:
        """Those of all of them together, from each layer's own."""
        ms = (math.fsum(narrowed[name][variant] for name, variant in own.items()) for own in self.variants)
        return FormTimes(form=self.form, axes=(self.axis,), ms=tuple(ms))


@dataclass(frozen=True, eq=False)
class _TimedLayer:
    """A layer's calls, the ranks to time, and what becomes of it together with others."""

    calls: LayerCalls
    axes: FormAxes
    narrowed: tuple[Variant, ...]

    @property
    def variants(self) -> tuple[tuple[Variant, ...], ...]:
        """What is timed: in its own forms, and together with others."""
        own = [Variant(form, ranks) for form, its_axes in self.axes for ranks in product(*its_axes)]
        return (tuple(own), self.narrowed) if self.narrowed else (tuple(own),)

    def narrowed_ms(self, times: _Times) -> dict[Variant, float]:
        """Milliseconds of all its calls together with others."""
        return dict(zip(self.narrowed, self._sums(times, self.narrowed)[1:], strict=True)) if self.narrowed else {}

    def _sums(self, times: _Times, variants: tuple[Variant, ...]) -> list[float]:
        """Milliseconds of all its calls, as it is and in each variant."""
        called = [(times[signature, variants], number) for signature, number in self.calls.signatures.items()]
        return [math.fsum(number * each[place] for each, number in called) for place in range(len(variants) + 1)]

    def times(self, times: _Times) -> LayerTimes:
        """Those of all its calls together."""
        dense, *ms = self._sums(times, self.variants[0])
        rest = iter(ms)
        forms = (
            FormTimes(form=form, axes=axes, ms=tuple(islice(rest, math.prod(map(len, axes)))))
            for form, axes in self.axes
        )
        return LayerTimes(name=self.calls.layer.name, dense_ms=dense, forms=tuple(forms))


def _measured(
    bench: LayerBench, cache: TimingCache, timed: Sequence[_TimedLayer], on_progress: ProgressCallback | None
) -> _Times:
    """The times of every signature, from the cache where they are known."""
    first: dict[_Key, str] = {}
    for layer in timed:
        for key in product(layer.calls.signatures, layer.variants):
            first.setdefault(key, layer.calls.layer.name)
    times = {}
    for done, ((signature, variants), name) in enumerate(first.items()):
        if on_progress:
            on_progress(name, done, len(first))
        times[signature, variants] = cache.times(signature, variants, partial(bench.measure, signature, variants))
    return times


def _aligned(bench: LayerBench, network: Session, times: _Times) -> tuple[float, _Times]:
    """Milliseconds of the whole network, and the times as if all had been taken at the same moment as that.

    What is on disk is of another day, and a busy machine is another one every second. So the network and its layers are
    timed once more in the same rounds, and every layer's factors keep their proportion to the layer.
    """
    signatures = list(dict.fromkeys(signature for signature, _ in times))
    sessions = (bench.session(signature, bench.layers[signature]) for signature in signatures)
    network_ms, *dense = medians_ms(*timed_together(chain([network], sessions), rounds=_ROUNDS))
    now = dict(zip(signatures, dense, strict=True))
    return network_ms, {key: tuple(time * now[key[0]] / ms[0] for time in ms) for key, ms in times.items()}


def _units(calls: Sequence[LayerCalls], allowed: Sequence[str], step: int, below: Sequence[int]) -> list[_Unit]:
    """The layers that can be narrowed together, in each form and at the ranks to time."""
    units, called = [], {each.layer.name for each in calls}
    for last in (each.layer for each in calls if len(each.layer.problems) > 1):  # only data say how to narrow
        for form in last.joint_forms if called.issuperset(feeder.name for feeder in last.feeders) else ():
            axis = joint_axis(last, form, multiple=step, points=_POINTS[0], below=below) if form in allowed else []
            if axis:
                variants = tuple(narrowed_variants(last, form, rank) for rank in axis)
                units.append(_Unit(last.name, form, tuple(axis), variants))
    return units


def _narrowed(calls: LayerCalls, units: Sequence[_Unit]) -> tuple[Variant, ...]:
    each = (own for unit in units for own in unit.variants)
    return tuple(own[calls.layer.name] for own in each if calls.layer.name in own)


def _axes(layer: LayerAnalysis, allowed: Sequence[str], step: int, below: Sequence[int], runtime: Runtime) -> FormAxes:
    """By form of a layer, the ranks to time."""
    axes = {}
    for form in sorted(allowed_forms(layer.forms, allowed), key=layer.forms.index):
        points = _FEW.get(runtime.name, _POINTS)[form_named(form).rank_count - 1]
        lower = below if form_named(form).rank_count == 1 else below[-1:]  # of two ranks there are many pairs
        axes[form] = axes_of(layer, form, multiple=step, points=points, below=lower)
    return tuple((form, its_axes) for form, its_axes in axes.items() if its_axes)
