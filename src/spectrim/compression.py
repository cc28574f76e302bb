"""The one-call path: calibrate, analyse, plan, replace, count what was gained."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.sampling import SampleCount, warn_of_few
from spectrim.analysis.sensitivities import (
    cache_bytes_of,
    require_cache_bytes,
    sensitivity,
    with_output_grads,
    without_blocked_loss,
)
from spectrim.analysis.spectra import Analysis, analyze_selected, with_statistics
from spectrim.benchmark.fidelity import Fidelity, measured_fidelity, require_planned_cost
from spectrim.benchmark.latencies import LatencyTable
from spectrim.benchmark.measurement import Measurement, count
from spectrim.core.arguments import checked
from spectrim.core.batches import ReservedBatches, batches_of, collected, without_labels
from spectrim.core.errors import DataError, PlanError, RuleError
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs, require_repeatable
from spectrim.core.memory import Storage
from spectrim.core.plans import Budget, Metric, Plan, Rule
from spectrim.fitting.reconstruction import reconstruct as fit
from spectrim.layers.replacement import duplicate, factorize, replace
from spectrim.layers.selection import LayerSelection, Patterns, TreatAs
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.footprints import Work
from spectrim.planning.latency_budget import plan_latency, refused
from spectrim.planning.memory import estimated
from spectrim.planning.resources import DataSize, RunOptions
from spectrim.planning.rules import plan_with, refresh, require_possible
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import require_runtime


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model, the plan it was made by, and what it costs against its dense self.

    Attributes:
        model: An ordinary module.
        plan: Form and ranks of every layer; under a budget of latency with the times that were measured.
        measurement: Counted costs, with their ratios to the dense network's.
        fidelity: How near its outputs are to the dense network's on up to 256 calibration samples, kept aside where
            there are 16 batches or more; None without data, where the shapes of the outputs depend on values, or where
            the dense outputs do not vary.
    """

    model: nn.Module
    plan: Plan
    measurement: Measurement
    fidelity: Fidelity | None = None

    @property
    def refused(self) -> str | None:
        """Why the model came back as it was, under a budget of latency; None if it was compressed."""
        return self.plan.latency.refused if self.plan.latency else None


@dataclass(frozen=True, eq=False)
class Decision:
    """What is to be done to a model, and what that was decided on.

    Attributes:
        analysis: With the statistics and sensitivities that are needed.
        plan: Form and ranks of every layer.
        batches: The calibration batches that are in memory; none of those that are read one by one.
        reserved: Those to look at the result with.
    """

    analysis: Analysis
    plan: Plan
    batches: Sequence[Inputs]
    reserved: ReservedBatches

    @property
    def seen(self) -> tuple[Sequence[Inputs], bool]:
        """Batches to look at the result with, and whether they were kept aside."""
        return self.reserved.aside or self.batches or self.reserved.first, bool(self.reserved.aside)


@checked
def compress(
    model: nn.Module,
    rule_or_plan: Rule | Plan,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    metric: Metric | None = None,
    forms: Sequence[str] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    treat_as: TreatAs | None = None,
    allow_growth: bool = False,
    analysis: Analysis | None = None,
    latencies: LatencyTable | None = None,
    reconstruct: Literal["auto"] | bool = "auto",
    cache: int | None = None,
    device: str | torch.device | None = None,
    offload: str | Path | None = None,
    inplace: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Compressed:
    """Replace the layers of a trained network by low-rank factors.

    Without `data` each weight is approximated by itself (plain metric: truncated SVD, Eckart & Young 1936). With
    `data`, what counts is each layer's output on them (activation metric), and biases are corrected so that the mean
    output is exact. A layer that would not become smaller stays dense, and the plan says why.

    Under a `Budget` with `data`, forms and ranks of all layers are chosen together by how much the network's outputs
    change with an error in each layer (`st.sensitivity`), and every layer, the dense ones too, is then fitted anew to
    what it receives in the compressed network (`reconstruct`). No labels are used.

    Under a budget of latency every layer is timed by itself in every form (`st.latency_table`), forms and ranks are
    chosen by these times, and the network they give is timed against the dense one, in turn, in the runtime named; if
    that is more than 5 % off the prediction, or misses the target, they are chosen once more (`plan.latency`). Where
    nothing is surely faster, or the file would grow, the model comes back as it was, and `Compressed.refused` says why.

    Args:
        model: A trained module; left bit-identical unless `inplace`.
        rule_or_plan: `Budget(macs=0.5)`, `Budget(latency=0.6, runtime="onnxruntime")`, `Rank(20)`, `Ratio(0.25)`,
            `Energy(0.9)`, or a `Plan`, with its own selection.
        example_inputs: One call's inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        data: Calibration batches like the example, with or without labels: what a batch has beyond the example's inputs
            is dropped. They are run through once; only a `Budget`, the loss metric and `reconstruct=True` keep their
            inputs in memory.
        max_batches: Use at most so many calibration batches.
        metric: `plain`, `activation` or `loss`; with `data`, by default loss under a `Budget` and activation otherwise.
        forms: Which of `channel`, `spatial`, `tucker2` convolutions may take; see `st.plan`.
        rank_multiple: Use only ranks that are multiples of this number, and full ones. `auto`, the default under a
            budget of latency, probes the step of this hardware in the budget's runtime or torch (see `st.probe`).
        include: Patterns of layer names to factor, as in a shell.
        exclude: Patterns of layer names to leave dense, and as they are.
        keep_last: Leave the last layer that the model calls dense, and as it is.
        treat_as: By a class of layers that overrides `forward`, the class of torch that it is to be taken for; see
            `st.analyze`.
        allow_growth: Factor a layer even if it grows.
        analysis: From `st.analyze` on this very model; saves calibrating and decomposing again for every rank.
        latencies: From `st.latency_table` on this very model, for a budget of latency; by default it is made here.
        reconstruct: Fit the layers one after the other to undo what those before have changed; `auto` does it under a
            `Budget` with `data`.
        cache: Bytes of activations that weighing and fitting may keep, so that not every pass has to begin at the first
            layer; saves time only. By default what the statistics take, at least 160 MiB.
        device: Where statistics are added up and weights decomposed, such as `"cpu"`; by default where the model is.
        offload: A folder on a fast disk, in which statistics of 16 MiB or more are kept until the end; saves memory.
        inplace: Change `model` itself, and return it.
        on_progress: Called with what is done next, how many steps of this stage are done, and of how many.

    Returns:
        The model (in the same training mode), the plan, and the counted costs.

    Raises:
        SpectrimError: one of its kinds, before anything has been changed.
    """
    run = RunOptions(cache, Storage.of(device, offload), max_batches, reconstruct)
    if reconstruct not in ("auto", True, False):
        raise RuleError(f"reconstruct={reconstruct!r}: give 'auto', True or False")
    if reconstruct is True and (data is None or metric == "plain"):
        raise DataError("reconstruction is done on calibration data in a data metric; pass data= and no metric='plain'")
    selection = LayerSelection(include, exclude, keep_last, {} if treat_as is None else treat_as)
    if analysis is not None and (selection.treat_as or not selection.takes_all):
        raise PlanError(
            "an analysis already has its layers; give include, exclude, keep_last, treat_as to st.analyze instead"
        )
    decision = decide(
        model,
        rule_or_plan,
        example_inputs=example_inputs,
        data=data,
        options=PlanOptions(metric, forms, rank_multiple, allow_growth, latencies),
        layers=selection if analysis is None else analysis,
        run=run,
        on_progress=on_progress,
    )
    fitted, example = _is_fitted(decision.plan, reconstruct=reconstruct), as_inputs(example_inputs)
    smaller = _built(model, decision, fitted=fitted, cache=cache, on_progress=on_progress)
    seen, held_out = decision.seen
    plan, analysis = decision.plan, decision.analysis
    measured = measured_fidelity(model, smaller, seen or [example], plan=plan, analysis=analysis, held_out=held_out)
    compressed = _counted(model, smaller, plan, example, inplace=inplace)
    return with_changes(compressed, fidelity=measured if seen else None)


def decide(
    model: nn.Module,
    rule_or_plan: Rule | Plan,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    layers: LayerSelection | Analysis = LayerSelection(),  # noqa: B008  # frozen
    options: PlanOptions = PlanOptions(),  # noqa: B008  # frozen
    run: RunOptions = RunOptions(),  # noqa: B008  # frozen
    on_progress: ProgressCallback | None = None,
) -> Decision:
    """The first half of `compress`: calibrate, analyse and plan; the model stays as it is.

    Arguments and errors are those of `compress`; an analysis has its layers already. `on_progress` is called for
    `calibrate`, `analyse`, `weigh LAYER`, `plan`, `time LAYER` and `verify in RUNTIME`.
    """
    require_cache_bytes(run.cache)
    selected = isinstance(layers, LayerSelection) and not layers.takes_all
    if isinstance(rule_or_plan, Plan) and (selected or not options.is_default):
        raise PlanError("a plan already says which layers, forms and metric; give these options to st.plan instead")
    if isinstance(rule_or_plan, Budget) and rule_or_plan.runtime and rule_or_plan.threads:
        require_runtime(rule_or_plan.runtime, threads=rule_or_plan.threads)
    stages = _Stages(model, as_inputs(example_inputs), rule_or_plan, options, run, on_progress)
    if isinstance(layers, Analysis):
        layers.require_model(model)
        return stages.decided(layers, stages.batches(data))
    analysis = stages.analysed(layers)
    if not isinstance(rule_or_plan, Plan):
        metric = options.metric or ("plain" if data is None else "activation")
        require_possible(analysis, rule_or_plan, options, metric=metric)
    stages.require_memory(analysis, data)
    batches: Iterable[Inputs] = stages.batches(data)
    if batches:
        analysis, batches = stages.informed(analysis, batches)
    return stages.decided(analysis, batches)


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of one decision, and what they share."""

    model: nn.Module
    example: Inputs
    rule_or_plan: Rule | Plan
    options: PlanOptions
    run: RunOptions
    on_progress: ProgressCallback | None
    reserved: ReservedBatches = field(default_factory=ReservedBatches)

    def analysed(self, selection: LayerSelection) -> Analysis:
        """The analysis, without statistics."""
        self._begin("analyse")
        return analyze_selected(self.model, self.example, selection=selection, device=self.run.storage.device)

    def require_memory(self, bare: Analysis, data: Iterable[Any] | None) -> None:
        """Raise `ResourceError` if all that follows needs more than is free."""
        size = DataSize.least(data, self.example, self.run.max_batches)
        run = with_changes(self.run, cache=self.run.cache or 0)  # without a cache it works as well
        work = Work(self.rule_or_plan, self.options.metric, self.options.forms, size, run)
        estimated(self.model, self.example, [layer.unit for layer in bare], work).require()

    def batches(self, data: Iterable[Any] | None) -> Sequence[Inputs] | Iterator[Inputs]:
        """The calibration batches, none where no data are needed; raises as `compress` does.

        Data that are not in memory already are read once, batch by batch, if one pass is enough.
        """
        if data is None or self.metrics <= {"plain"}:
            return []
        require_repeatable(self.model, self.example)
        limited = batches_of(data, what="the calibration data", max_batches=self.run.max_batches)
        batches = without_labels(limited, like=self.example)
        first = next(batches, None)
        if first is None:
            raise DataError("the calibration data is empty; give at least one batch")
        rule = self.rule_or_plan.rule if isinstance(self.rule_or_plan, Plan) else self.rule_or_plan
        several_passes = isinstance(rule, Budget) or "loss" in self.metrics or self.run.reconstruct is True
        batches = self.reserved.taken_from(chain([first], batches))
        return collected(batches) if several_passes or isinstance(data, Sequence) else batches

    @property
    def metrics(self) -> set[Metric | None]:
        """The metrics in which layers are to be factored; None for the usual one."""
        plan = self.rule_or_plan
        return {layer.metric for layer in plan.factored} if isinstance(plan, Plan) else {self.options.metric}

    def informed(self, bare: Analysis, batches: Iterable[Inputs]) -> tuple[Analysis, Iterable[Inputs]]:
        """The analysis with statistics of the layers that need them, and under a budget with their sensitivities.

        And the batches, or none where nothing can be learnt from them.
        """
        rule, model, metric = self.rule_or_plan, self.model, self.options.metric
        budgeted, metrics, storage = isinstance(rule, Budget), self.metrics, self.run.storage
        layers, samples = _call_sites(bare, rule), SampleCount()
        reported = self._reported(batches, samples)
        statistics = calibrate(model, reported, layers=layers, device=storage.device, offload=storage.folder)
        warn_of_few(samples, metric)
        if not samples.differ and not isinstance(rule, Plan):
            return bare, []
        if "loss" in metrics or (budgeted and metric is None):
            statistics = with_output_grads(
                model, statistics, _in_memory(batches), layers=layers, required="loss" in metrics, storage=storage
            )
        self._begin("analyse")
        analysis = with_statistics(bare, statistics)
        if not budgeted:
            return analysis, batches
        weighing = _progress_of("weigh", self.on_progress)
        weighed = sensitivity(model, analysis, _in_memory(batches), cache=self.run.cache, on_progress=weighing)
        return weighed if metric else without_blocked_loss(weighed), batches

    def planned(self, analysis: Analysis) -> Plan:
        """The plan, with what has to be timed on this machine."""
        rule, options = self.rule_or_plan, self.options
        if isinstance(rule, Plan):
            return refresh(rule, analysis)
        self._begin("plan")
        if isinstance(rule, Budget) and rule.latency is not None:
            return plan_latency(
                self.model, self.example, rule, analysis=analysis, options=options, on_progress=self.on_progress
            )
        grid = probe() if options.rank_multiple == "auto" else options.rank_multiple
        return plan_with(analysis, rule, with_changes(options, rank_multiple=grid))

    def decided(self, analysis: Analysis, batches: Iterable[Inputs]) -> Decision:
        """The plan, and what it was made on."""
        return Decision(analysis, self.planned(analysis), _in_memory(batches), self.reserved)

    def _reported(self, batches: Iterable[Inputs], samples: SampleCount) -> Iterator[Inputs]:
        number = len(_in_memory(batches))  # of batches that come one by one it is not known
        for done, batch in enumerate(batches):
            if self.on_progress is not None:
                self.on_progress("calibrate", done, max(number, done + 1))
            yield batch
            samples.add(batch)

    def _begin(self, stage: str) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, 0, 1)


def _built(
    model: nn.Module,
    decision: Decision,
    *,
    fitted: bool,
    cache: int | None,
    on_progress: ProgressCallback | None,
) -> nn.Module:
    """A copy of the model with the plan carried out, and its layers fitted to the batches, if there are any."""
    analysis, plan = decision.analysis, decision.plan
    if not (fitted and decision.batches):
        return factorize(duplicate(model), plan, factors=analysis.factors, means=analysis.means)
    return fit(
        model,
        duplicate(model),
        plan,
        analysis=analysis,
        batches=decision.batches,
        cache_bytes=cache_bytes_of(analysis, cache),
        on_progress=_progress_of("fit", on_progress),
    )


def _progress_of(verb: str, callback: ProgressCallback | None) -> ProgressCallback | None:
    """Progress with the stage in front of the layer's name."""
    return callback and (lambda name, done, of: callback(f"{verb} {name}".strip(), done, of))


def _is_fitted(plan: Plan, *, reconstruct: Literal["auto"] | bool) -> bool:
    """Whether the layers are to be fitted anew; in a model that comes back as it was, none is."""
    asked = isinstance(plan.rule, Budget) if reconstruct == "auto" else reconstruct
    return asked and not _is_refused(plan)


def _counted(model: nn.Module, smaller: nn.Module, plan: Plan, example: Inputs, *, inplace: bool) -> Compressed:
    """What `compress` returns; under a budget of latency the model as it was, if its file would have grown."""
    dense = count(model, example)
    measurement = count(smaller, example).against(dense)
    require_planned_cost(plan, dense, measurement)
    grown = max(measurement.params_ratio or 0, measurement.bytes_ratio or 0) > 1
    if plan.latency and not _is_refused(plan) and grown:
        plan = refused(plan, reason=f"the file would grow from {dense.bytes:,} to {measurement.bytes:,} bytes")
        smaller, measurement = duplicate(model), dense.against(dense)
    if not inplace:
        return Compressed(smaller, plan, measurement)
    if not _is_refused(plan):
        names = [name for layer in plan if not layer.frozen for name in layer.names]
        replace(model, {name: smaller.get_submodule(name) for name in names})
    return Compressed(model, plan, measurement)


def _in_memory(batches: Iterable[Inputs]) -> Sequence[Inputs]:
    return batches if isinstance(batches, Sequence) else []


def _is_refused(plan: Plan) -> bool:
    return plan.latency is not None and plan.latency.refused is not None


def _call_sites(analysis: Analysis, rule_or_plan: Rule | Plan) -> Collection[str]:
    """Names of the layers that need statistics."""
    if not isinstance(rule_or_plan, Plan) or isinstance(rule_or_plan.rule, Budget):
        return analysis.call_sites
    planned = {layer.name for layer in rule_or_plan.factored if layer.metric != "plain"}
    return {site for layer in analysis if layer.name in planned for site in layer.call_sites}
