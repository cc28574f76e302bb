"""The latency table of a network: every distinct layer timed by itself, in every form, at some ranks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latencies import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.layer_calls import FormAxes, LayerCalls, LayerSignature, Variant, axes_of, layer_calls
from spectrim.benchmark.layer_timing import rest_of, timed, timer
from spectrim.benchmark.measurement import batched
from spectrim.benchmark.timing_cache import TimingCache
from spectrim.core.errors import PlanError
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs, device_of, require_repeatable
from spectrim.layers.forms import form_named, selected_forms
from spectrim.runtimes.rank_grid import Grid, multiple_of, probe
from spectrim.runtimes.sessions import Session, fingerprint, prepare, require_runtime
from spectrim.runtimes.timing import interleaved, steady

_ROUNDS = 9
_POINTS = (7, 4)
_FEW: Mapping[str, tuple[int, int]] = MappingProxyType({"compile": (3, 2)})
"""Ranks along the axis of a form with one rank, and along each of two; fewer where a layer takes seconds to prepare."""


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
    require_runtime(runtime, threads=threads)
    allowed, step = selected_forms(forms), multiple_of(rank_multiple)
    example = as_inputs(example_inputs)
    require_repeatable(model, example)
    inputs = example if batch is None else batched(example, batch)
    calls, examples = layer_calls(model, inputs, analysis)
    if not calls:
        raise PlanError("the model calls no layer of the analysis that can be factored; is it an analysis of it?")
    rest, machine = rest_of(model), fingerprint(runtime, threads=threads)
    bench = _Bench(examples, runtime, threads, rest, TimingCache(folder, machine, len(rest)))
    with prepare(model, inputs, runtime=runtime, threads=threads, checked=True) as network:
        below: tuple[int, ...] = ()
        if step is None:
            step = _probed(model, inputs, runtime=runtime, threads=threads)
            below = tuple(rank for rank in (step // 4, step // 2) if rank)
        axes = [_axes(each.layer, allowed, step, below, runtime) for each in calls]
        times = bench.times(calls, axes, on_progress)
        network_ms, times = bench.aligned(network, times)
    return LatencyTable(
        runtime=runtime,
        threads=threads,
        batch=batch,
        fingerprint=machine,
        rank_multiple=step,
        network_ms=network_ms,
        layers=tuple(_layer_times(each, its_axes, times) for each, its_axes in zip(calls, axes, strict=True)),
    )


_Key = tuple[LayerSignature, FormAxes]


@dataclass(frozen=True, eq=False)
class _Bench:
    """Where layers are timed.

    Attributes:
        examples: A layer of each signature.
        runtime: What runs them.
        threads: With so many threads.
        rest: What passes through the caches between two calls of a layer.
        cache: Times that are known already.
    """

    examples: Mapping[LayerSignature, nn.Module]
    runtime: str
    threads: int
    rest: Tensor
    cache: TimingCache

    def times(
        self, calls: Sequence[LayerCalls], axes: Sequence[FormAxes], on_progress: ProgressCallback | None
    ) -> dict[_Key, tuple[float, ...]]:
        """Milliseconds for every signature: as it is, then at each combination of the axes, form by form."""
        first: dict[_Key, str] = {}
        for each, its_axes in zip(calls, axes, strict=True):
            for signature in each.signatures:
                first.setdefault((signature, its_axes), each.layer.name)
        times: dict[_Key, tuple[float, ...]] = {}
        for done, ((signature, its_axes), name) in enumerate(first.items()):
            if on_progress:
                on_progress(name, done, len(first))
            times[signature, its_axes] = self._time(signature, its_axes)
        return times

    def _time(self, signature: LayerSignature, axes: FormAxes) -> tuple[float, ...]:
        variants = [Variant(form, ranks) for form, each in axes for ranks in product(*each)]
        known = self.cache.find(signature, variants)
        if known is not None:
            return known
        layer = self.examples[signature]
        times = timed(layer, signature, variants, runtime=self.runtime, threads=self.threads, rest=self.rest)
        self.cache.keep(signature, variants, times)
        return times

    def aligned(
        self, network: Session, times: Mapping[_Key, tuple[float, ...]]
    ) -> tuple[float, dict[_Key, tuple[float, ...]]]:
        """Milliseconds of the whole network, and the times as if all had been taken at the same moment as that.

        What was kept is of another day, and a busy machine is another one every second. So the network and its layers
        are timed once more in the same rounds, and every layer's factors keep their proportion to the layer.
        """
        signatures = list(dict.fromkeys(signature for signature, _ in times))
        options: dict[str, Any] = {"runtime": self.runtime, "threads": self.threads, "rest": self.rest}
        with ExitStack() as stack:
            layers = [
                stack.enter_context(timer(self.examples[signature], signature, **options)) for signature in signatures
            ]
            timings = interleaved([network.timer(), *layers], rounds=_ROUNDS)
        network_ms, *dense = (statistics.median(seconds) * 1e3 for seconds in steady(*timings))
        now = dict(zip(signatures, dense, strict=True))
        return network_ms, {key: tuple(time * now[key[0]] / ms[0] for time in ms) for key, ms in times.items()}


def _layer_times(calls: LayerCalls, axes: FormAxes, times: Mapping[_Key, Sequence[float]]) -> LayerTimes:
    """The times of a weight: those of all its calls."""
    called = [(times[signature, axes], number) for signature, number in calls.signatures.items()]
    dense, *rest = (math.fsum(number * ms[place] for ms, number in called) for place in range(len(called[0][0])))
    forms = []
    for form, each in axes:
        size = math.prod(map(len, each))
        forms.append(FormTimes(form=form, axes=each, ms=tuple(rest[:size])))
        rest = rest[size:]
    return LayerTimes(name=calls.layer.name, dense_ms=dense, forms=tuple(forms))


def _axes(layer: LayerAnalysis, allowed: Sequence[str], step: int, below: Sequence[int], runtime: str) -> FormAxes:
    """By form of a layer, the ranks to time; a layer of one form only is not asked for it."""
    points = _FEW.get(runtime, _POINTS)
    axes = []
    for form in layer.forms if len(layer.forms) == 1 else [form for form in layer.forms if form in allowed]:
        ranks = form_named(form).rank_count  # of two ranks there are many pairs
        its_axes = axes_of(
            layer, form, multiple=step, points=points[ranks - 1], below=below[-1:] if ranks > 1 else below
        )
        if its_axes is not None:
            axes.append((form, its_axes))
    return tuple(axes)


def _probed(model: nn.Module, inputs: Inputs, *, runtime: str, threads: int) -> int:
    """The step of this hardware; the probe knows no GPU."""
    if device_of(model).type != "cpu":
        return 1
    return probe(runtime=runtime, threads=threads, batch=max(1, inputs.samples)).multiple
