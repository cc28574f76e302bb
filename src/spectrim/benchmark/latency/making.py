"""The latency table of a network: every distinct layer timed by itself, in every form, at some ranks."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.latency.cache import Cache
from spectrim.benchmark.latency.shapes import FormAxes, Shape, Use, Variant, axes_of, uses
from spectrim.benchmark.latency.table import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.latency.trial import rest_of, timed, timer
from spectrim.benchmark.measurement import batched
from spectrim.core.errors import PlanError, RuleError
from spectrim.core.execution import Inputs, as_inputs, device_of, require_repeatable, tensors
from spectrim.core.plans import CONVOLUTION_FORMS, FormName
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import Session, fingerprint, prepare, require_runtime
from spectrim.runtimes.timing import interleaved, steady

Told = Callable[[str, int, int], None]

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
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    on_progress: Told | None = None,
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
    allowed, step = _forms(forms), _multiple(rank_multiple)
    given = as_inputs(example_inputs)
    require_repeatable(model, given)
    inputs = given if batch is None else batched(given, batch)
    found, examples = uses(model, inputs, analysis)
    if not found:
        raise PlanError("the model calls no layer of the analysis that can be factored; is it an analysis of it?")
    rest = rest_of(model)
    bench = _Bench(examples, runtime, threads, rest, Cache(folder, fingerprint(runtime, threads=threads), len(rest)))
    with prepare(model, inputs, runtime=runtime, threads=threads, checked=True) as network:
        below: tuple[int, ...] = ()
        if step is None:
            step = _probed(model, inputs, runtime=runtime, threads=threads)
            below = tuple(rank for rank in (step // 4, step // 2) if rank)
        wanted = [_axes(use.layer, allowed, step, below, runtime) for use in found]
        times = bench.times(found, wanted, on_progress)
        whole, times = bench.aligned(network, times)
    return LatencyTable(
        runtime=runtime,
        threads=threads,
        batch=batch,
        fingerprint=fingerprint(runtime, threads=threads),
        rank_multiple=step,
        network_ms=whole,
        layers=tuple(_summed(use, axes, times) for use, axes in zip(found, wanted, strict=True)),
    )


_Key = tuple[Shape, FormAxes]


@dataclass(frozen=True, eq=False)
class _Bench:
    """Where layers are timed.

    Attributes:
        examples: A layer of each shape.
        runtime: What runs them.
        threads: With so many threads.
        rest: What passes through the caches between two calls of a layer.
        cache: Times that are known already.
    """

    examples: Mapping[Shape, nn.Module]
    runtime: str
    threads: int
    rest: Tensor
    cache: Cache

    def times(
        self, found: Sequence[Use], wanted: Sequence[FormAxes], on_progress: Told | None
    ) -> dict[_Key, tuple[float, ...]]:
        """Milliseconds of every distinct shape: as it is, then at each combination of the axes, form by form."""
        first: dict[_Key, str] = {}
        for use, axes in zip(found, wanted, strict=True):
            for shape in use.shapes:
                first.setdefault((shape, axes), use.layer.name)
        times: dict[_Key, tuple[float, ...]] = {}
        for done, ((shape, axes), name) in enumerate(first.items()):
            if on_progress:
                on_progress(name, done, len(first))
            times[shape, axes] = self._time(shape, axes)
        return times

    def _time(self, shape: Shape, axes: FormAxes) -> tuple[float, ...]:
        variants = [Variant(form, ranks) for form, each in axes for ranks in product(*each)]
        kept = self.cache.find(shape, variants)
        if kept is None:
            kept = timed(
                self.examples[shape], shape, variants, runtime=self.runtime, threads=self.threads, rest=self.rest
            )
            self.cache.keep(shape, variants, kept)
        return kept

    def aligned(
        self, network: Session, times: Mapping[_Key, tuple[float, ...]]
    ) -> tuple[float, dict[_Key, tuple[float, ...]]]:
        """Milliseconds of the whole network, and the times as if all had been taken at the same moment as that.

        What was kept is of another day, and a busy machine is another one every second. So the network and its layers
        are timed once more in the same rounds, and every layer's factors keep their proportion to the layer.
        """
        with ExitStack() as opened:
            shapes = list(dict.fromkeys(shape for shape, _ in times))
            layers = [
                opened.enter_context(
                    timer(self.examples[shape], shape, runtime=self.runtime, threads=self.threads, rest=self.rest)
                )
                for shape in shapes
            ]
            laps = interleaved([network.timer(), *layers], rounds=_ROUNDS)
        whole, *dense = (statistics.median(seconds) * 1e3 for seconds in steady(*laps))
        now = dict(zip(shapes, dense, strict=True))
        return whole, {key: tuple(one * now[key[0]] / ms[0] for one in ms) for key, ms in times.items()}


def _summed(use: Use, axes: FormAxes, times: Mapping[_Key, Sequence[float]]) -> LayerTimes:
    """The times of a weight: those of all its calls."""
    called = [(times[shape, axes], number) for shape, number in use.shapes.items()]
    dense, *rest = (math.fsum(number * ms[place] for ms, number in called) for place in range(len(called[0][0])))
    forms = []
    for form, each in axes:
        size = math.prod(map(len, each))
        forms.append(FormTimes(form=form, axes=each, ms=tuple(rest[:size])))
        rest = rest[size:]
    return LayerTimes(name=use.layer.name, dense_ms=dense, forms=tuple(forms))


def _axes(layer: LayerAnalysis, allowed: Sequence[FormName], step: int, below: Sequence[int], runtime: str) -> FormAxes:
    """By form of a layer, the ranks to time; a layer of one form only is not asked for it."""
    one, two = _FEW.get(runtime, _POINTS)
    found = []
    for form in layer.forms if len(layer.forms) == 1 else [form for form in layer.forms if form in allowed]:
        pairs = form == "tucker2"  # of which there are many
        axes = axes_of(layer, form, multiple=step, points=two if pairs else one, below=below[-1:] if pairs else below)
        if axes is not None:
            found.append((form, axes))
    return tuple(found)


def _probed(model: nn.Module, inputs: Inputs, *, runtime: str, threads: int) -> int:
    """The step of this hardware; the probe knows no GPU."""
    if device_of(model).type != "cpu":
        return 1
    samples = next((len(one) for one in tensors((inputs.args, inputs.kwargs)) if one.ndim), 1)
    return probe(runtime=runtime, threads=threads, batch=max(1, samples)).multiple


def _forms(forms: Sequence[FormName] | None) -> tuple[FormName, ...]:
    named = CONVOLUTION_FORMS if forms is None else [forms] if isinstance(forms, str) else list(forms)
    if not named or any(form not in ("linear", *CONVOLUTION_FORMS) for form in named):
        raise PlanError(f"forms={forms!r}: give some of {', '.join(CONVOLUTION_FORMS)}")
    return tuple(form for form in CONVOLUTION_FORMS if form in named)


def _multiple(rank_multiple: int | Grid | str | None) -> int | None:
    """The number, or None where it is to be probed."""
    number = rank_multiple.multiple if isinstance(rank_multiple, Grid) else rank_multiple
    if number is None or number == "auto":
        return None
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RuleError(f"rank_multiple={rank_multiple!r}: give a whole number of at least 1, such as 8, or 'auto'")
    return number
