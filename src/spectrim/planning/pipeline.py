"""The first half of a compression: calibrate, analyse, weigh and plan; the model stays as it is."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.sampling import SampleCount, warn_of_few
from spectrim.analysis.sensitivities import require_cache_bytes, sensitivity, with_output_grads, without_blocked_loss
from spectrim.analysis.spectra import Analysis, analyze_selected, with_statistics
from spectrim.core.batches import ReservedBatches, batches_of, collected, without_labels
from spectrim.core.errors import DataError, PlanError, warn
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs, require_repeatable
from spectrim.core.layout import ImageLayout
from spectrim.core.memory import return_freed
from spectrim.core.plans import Budget, Metric, Plan, Rule
from spectrim.layers.selection import LayerSelection
from spectrim.layers.unfusing import unfused, unfused_as
from spectrim.planning.decisions import PlanOptions, limits_whole_size, takes_layers_together
from spectrim.planning.footprints import Work
from spectrim.planning.latency_budget import plan_latency
from spectrim.planning.memory import estimated
from spectrim.planning.resources import DataSize, RunOptions
from spectrim.planning.rules import plan_with, refresh, require_possible
from spectrim.runtimes.rank_grid import probe
from spectrim.runtimes.sessions import require_runtime


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
    model = _unfused(model, rule_or_plan, layers)
    stages = _Stages(model, as_inputs(example_inputs), rule_or_plan, options, run, on_progress)
    if isinstance(layers, Analysis):
        layers.require_model(model)
        return stages.decided(layers, stages.batches(data, aside=layers.calibration is None))
    together = takes_layers_together(rule_or_plan)
    analysis = stages.analysed(replace(layers, lookups=limits_whole_size(rule_or_plan), together=together))
    if not isinstance(rule_or_plan, Plan):
        metric = options.metric or ("plain" if data is None else "activation")
        require_possible(analysis, rule_or_plan, options, metric=metric)
    stages.require_memory(analysis, data)
    batches: Iterable[Inputs] = stages.batches(data)
    if batches:
        analysis, batches = stages.informed(analysis, batches)
    return stages.decided(analysis, batches)


def _unfused(model: nn.Module, rule_or_plan: Rule | Plan, layers: LayerSelection | Analysis) -> nn.Module:
    """The model with the layers that the analysis or the plan has, or that are selected."""
    if isinstance(layers, Analysis):
        return unfused_as(model, layers.names)
    if isinstance(rule_or_plan, Plan):
        return unfused_as(model, (name for layer in rule_or_plan for name in layer.names))
    return unfused(model, layers.unfuses)


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
        run = replace(self.run, cache=self.run.cache or 0)  # without a cache it works as well
        work = Work(self.rule_or_plan, self.options.metric, self.options.forms, size, run)
        estimated(self.model, self.example, [layer.unit for layer in bare], work).require()

    def batches(self, data: Iterable[Any] | None, *, aside: bool = True) -> Sequence[Inputs] | Iterator[Inputs]:
        """The calibration batches, none where no data are needed; raises as `compress` does.

        Data that are not in memory already are read once, batch by batch, if one pass is enough. Without `aside` none
        are reserved, since the statistics may be of these very ones.
        """
        plan = self.rule_or_plan
        if data is not None and isinstance(plan, Plan) and isinstance(plan.rule, Budget) and self.metrics == {"plain"}:
            warn(
                "this plan was made without data: data= changes nothing in it, no layer is fitted. Make it on data: "
                "st.plan(st.analyze(model, example, calibration=st.calibrate(model, data)), rule)"
            )
        if data is None or self.metrics <= {"plain"}:
            return []
        require_repeatable(self.model, self.example)
        limited = batches_of(data, what="the calibration data", max_batches=self.run.max_batches)
        batches = without_labels(limited, like=self.example)
        first = next(batches, None)
        if first is None:
            raise DataError("the calibration data is empty; give at least one batch")
        rule = self.rule_or_plan.rule if isinstance(self.rule_or_plan, Plan) else self.rule_or_plan
        repeated = (
            isinstance(rule, Budget) or "loss" in self.metrics or self.run.reconstruct is True or self.run.distill
        )
        batches = chain([first], batches)
        batches = map(ImageLayout((self.model,)).of, batches) if repeated else batches
        batches = self.reserved.taken_from(batches) if aside else batches
        return collected(batches) if repeated or isinstance(data, Sequence) else batches

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
            layers = set(layers) - bare.tied_outputs  # whose outputs are too many, and whose metric needs no gradients
            statistics = with_output_grads(
                model, statistics, _in_memory(batches), layers=layers, required="loss" in metrics, storage=storage
            )
        self._begin("analyse")
        analysis = with_statistics(bare, statistics)
        analysis = replace(analysis, calibration=statistics.without_output_grads())
        if not budgeted:
            return analysis, batches
        report = progress_of("weigh", self.on_progress)
        weigh = partial(sensitivity, metric=metric, cache=self.run.cache, on_progress=report)
        weighed = weigh(model, analysis, _in_memory(batches))
        usable = weighed if metric else without_blocked_loss(weighed)
        return usable if usable is weighed else weigh(model, usable, _in_memory(batches)), batches

    def planned(self, analysis: Analysis) -> Plan:
        """The plan, with what has to be timed on this machine."""
        rule, options = self.rule_or_plan, self.options
        if isinstance(rule, Plan):
            return refresh(rule, analysis)
        self._begin("plan")
        return_freed()
        if isinstance(rule, Budget) and rule.latency is not None:
            return plan_latency(
                self.model, self.example, rule, analysis=analysis, options=options, on_progress=self.on_progress
            )
        grid = probe() if options.rank_multiple == "auto" else options.rank_multiple
        return plan_with(analysis, rule, replace(options, rank_multiple=grid))

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


def progress_of(verb: str, callback: ProgressCallback | None) -> ProgressCallback | None:
    """Progress with the stage in front of the layer's name."""
    return callback and (lambda name, done, of: callback(f"{verb} {name}".strip(), done, of))


def _in_memory(batches: Iterable[Inputs]) -> Sequence[Inputs]:
    return batches if isinstance(batches, Sequence) else []


def _call_sites(analysis: Analysis, rule_or_plan: Rule | Plan) -> Collection[str]:
    """Names of the layers that need statistics."""
    if not isinstance(rule_or_plan, Plan) or isinstance(rule_or_plan.rule, Budget):
        return analysis.call_sites
    planned = {layer.name for layer in rule_or_plan.factored if layer.metric != "plain"}
    return {site for layer in analysis if layer.name in planned for site in layer.call_sites}
