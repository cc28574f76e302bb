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
from spectrim.benchmark.layer_calls import FormAxes, LayerCalls, LayerSignature, Variant, axes_of, layer_calls
from spectrim.benchmark.layer_timing import LayerBench, rest_of
from spectrim.benchmark.measurement import resized
from spectrim.benchmark.timing_cache import TimingCache
from spectrim.core.arguments import checked
from spectrim.core.errors import PlanError
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs, device_of, require_repeatable
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
    """Time every layer that can be factored by itself, as it is and in factors, on this machine.

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
        forms: Which of `channel`, `spatial`, `tucker2` to time; all by default.
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
    cache = TimingCache(folder, machine, len(bench.rest))
    with chosen.prepare(fused(model), inputs, checked=True) as network:
        below: tuple[int, ...] = ()
        if step is None:
            step = _probed(model, inputs, chosen)
            below = tuple(rank for rank in (step // 4, step // 2) if rank)
        timed = [_TimedLayer(each, _axes(each.layer, allowed, step, below, chosen)) for each in calls]
        times = _measured(bench, cache, timed, on_progress)
        network_ms, times = _aligned(bench, network, times)
    return LatencyTable(
        runtime=runtime,
        threads=threads,
        batch=batch,
        fingerprint=machine,
        rank_multiple=step,
        network_ms=network_ms,
        layers=tuple(layer.times(times) for layer in timed),
    )


_Key = tuple[LayerSignature, FormAxes]
_Times = Mapping[_Key, tuple[float, ...]]
"""Milliseconds for every signature: as it is, then at each combination of the axes, form by form."""


@dataclass(frozen=True, eq=False)
class _TimedLayer:
    """A layer's calls, and the ranks to time."""

    calls: LayerCalls
    axes: FormAxes

    def times(self, times: _Times) -> LayerTimes:
        """Those of all its calls together."""
        called = [(times[signature, self.axes], number) for signature, number in self.calls.signatures.items()]
        dense, *ms = (math.fsum(number * each[place] for each, number in called) for place in range(len(called[0][0])))
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
        for signature in layer.calls.signatures:
            first.setdefault((signature, layer.axes), layer.calls.layer.name)
    times = {}
    for done, ((signature, axes), name) in enumerate(first.items()):
        if on_progress:
            on_progress(name, done, len(first))
        variants = [Variant(form, ranks) for form, its_axes in axes for ranks in product(*its_axes)]
        times[signature, axes] = cache.times(signature, variants, partial(bench.measure, signature, variants))
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


def _axes(layer: LayerAnalysis, allowed: Sequence[str], step: int, below: Sequence[int], runtime: Runtime) -> FormAxes:
    """By form of a layer, the ranks to time."""
    axes = {}
    for form in sorted(allowed_forms(layer.forms, allowed), key=layer.forms.index):
        points = _FEW.get(runtime.name, _POINTS)[form_named(form).rank_count - 1]
        lower = below if form_named(form).rank_count == 1 else below[-1:]  # of two ranks there are many pairs
        axes[form] = axes_of(layer, form, multiple=step, points=points, below=lower)
    return tuple((form, its_axes) for form, its_axes in axes.items() if its_axes)


def _probed(model: nn.Module, inputs: Inputs, runtime: Runtime) -> int:
    """The step of this hardware; the probe knows no GPU."""
    if device_of(model).type != "cpu":
        return 1
    return probe(runtime=runtime.name, threads=runtime.threads, batch=max(1, inputs.samples)).multiple
