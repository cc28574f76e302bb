"""The one-call path: calibrate, analyse, plan, replace, count what was gained."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from torch import nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.sensitivities import cache_bytes_of, require_cache_bytes, sensitivity, with_output_grads
from spectrim.analysis.spectra import Analysis, analyze_selected
from spectrim.benchmark.latencies import LatencyTable
from spectrim.benchmark.measurement import Measurement, count
from spectrim.core.errors import DataError, PlanError
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs, require_repeatable
from spectrim.core.plans import Budget, LayerPlan, Metric, Plan, Rule
from spectrim.fitting.reconstruction import reconstruct as fit
from spectrim.layers.replacement import duplicate, factorize, replace
from spectrim.layers.selection import LayerSelection, Patterns, TreatAs
from spectrim.linalg import Factors
from spectrim.planning.latency_budget import plan_latency, refused
from spectrim.planning.rules import plan as plan_by_table
from spectrim.planning.rules import refresh, require_possible
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import require_runtime


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model, the plan it was made by, and what it costs against its dense self.

    Times are measured under a budget of latency only, and stand in `plan.latency`.
    """

    model: nn.Module
    plan: Plan
    measurement: Measurement

    @property
    def refused(self) -> str | None:
        """Why the model came back as it was, under a budget of latency; None if it was compressed."""
        return self.plan.latency.refused if self.plan.latency else None


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
    chosen by these times, and the network they give is timed against the dense one, in turn, in the runtime named. If
    its time is more than 5 % off the prediction, or misses the target, they are chosen once more. The target may still
    be missed: `plan.latency` says what was measured. Where nothing is surely faster, or the file would grow, the model
    comes back as it was, and `Compressed.refused` and the plan say why.

    Args:
        model: A trained module; left bit-identical unless `inplace`.
        rule_or_plan: `Budget(macs=0.5)`, `Budget(latency=0.6, runtime="onnxruntime")`, `Rank(20)`, `Ratio(0.25)`,
            `Energy(0.9)`, or a `Plan`, with its own selection.
        example_inputs: One call's inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        data: Calibration batches, with or without labels (one element more than `example_inputs` is a label). Their
            inputs are kept in memory.
        max_batches: Use at most so many calibration batches.
        metric: `plain`, `activation` or `loss`; with `data`, by default loss under a `Budget` and activation otherwise.
        forms: Which of `channel`, `spatial`, `tucker2` convolutions may take; see `st.plan`.
        rank_multiple: Use only ranks that are multiples of this number, and full ones. `auto` probes the step of this
            hardware (`st.probe`), in the budget's runtime or else in torch; for another runtime give what `st.probe`
            returns. By default 1, and `auto` under a budget of latency.
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
        inplace: Change `model` itself and return it.
        on_progress: Called with what is done next, how many steps of this stage are done, and of how many.

    Returns:
        The model (in the same training mode), the plan, and the counted costs.

    Raises:
        SpectrimError: one of its kinds, before anything has been changed.
    """
    require_cache_bytes(cache)
    selection = LayerSelection(include, exclude, keep_last, treat_as or {})
    planned = isinstance(rule_or_plan, Plan)
    if planned and (not selection.is_default or metric or forms or rank_multiple or allow_growth or latencies):
        raise PlanError("a plan already says which layers, forms and metric; give these options to st.plan instead")
    if analysis is not None and not selection.is_default:
        raise PlanError("an analysis already has its layers; give include, exclude, keep_last to st.analyze instead")
    if reconstruct is True and (data is None or metric == "plain"):
        raise DataError("reconstruction is done on calibration data in a data metric; pass data= and no metric='plain'")
    _require_runtime(rule_or_plan)
    example = as_inputs(example_inputs)
    work = _Compression(model, rule_or_plan, example, metric, cache, on_progress)
    known = analyze_selected(model, example, selection=selection) if analysis is None else analysis
    if analysis is None and not isinstance(rule_or_plan, Plan):
        grid = None if rank_multiple == "auto" else rank_multiple
        usual: Metric = "plain" if data is None else "activation"
        require_possible(known, rule_or_plan, metric=metric or usual, forms=forms, rank_multiple=grid)
    batches = work.batches(data, max_batches)
    if analysis is None and batches:
        known = work.informed(known, selection, batches)
    if isinstance(rule_or_plan, Plan):
        plan = refresh(rule_or_plan, known)
    else:
        plan = choose(
            model,
            known,
            rule_or_plan,
            example_inputs=example,
            metric=metric,
            forms=forms,
            rank_multiple=rank_multiple,
            allow_growth=allow_growth,
            latencies=latencies,
            on_progress=on_progress,
        )
    smaller = work.built(plan, known, batches if _is_fitted(plan, reconstruct=reconstruct) else [])
    return _counted(model, smaller, plan, example, inplace=inplace)


def choose(
    model: nn.Module,
    analysis: Analysis,
    rule: Rule,
    *,
    example_inputs: Any,
    metric: Metric | None = None,
    forms: Sequence[str] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    allow_growth: bool = False,
    latencies: LatencyTable | None = None,
    on_progress: ProgressCallback | None = None,
) -> Plan:
    """The plan of a rule, as `compress` makes it: `st.plan`, with what has to be timed on this machine.

    Arguments and errors are those of `compress`; the model stays as it is.
    """
    if isinstance(rule, Budget) and rule.latency is not None:
        return plan_latency(
            model,
            as_inputs(example_inputs),
            rule,
            analysis=analysis,
            metric=metric,
            forms=forms,
            rank_multiple=rank_multiple,
            latencies=latencies,
            on_progress=on_progress,
        )
    return plan_by_table(
        analysis,
        rule,
        metric=metric,
        forms=forms,
        rank_multiple=probe() if rank_multiple == "auto" else rank_multiple,
        allow_growth=allow_growth,
        latencies=latencies,
    )


@dataclass(frozen=True, eq=False)
class _Compression:
    """What one call of `compress` works with."""

    model: nn.Module
    rule_or_plan: Rule | Plan
    example: Inputs
    metric: Metric | None
    cache: int | None
    on_progress: ProgressCallback | None

    def batches(self, data: Iterable[Any] | None, max_batches: int | None) -> list[Inputs]:
        """The calibration batches, none where no data are needed; raises as `compress` does."""
        plan = self.rule_or_plan
        needed = not isinstance(plan, Plan) or any(layer.metric != "plain" for layer in plan.factored)
        if data is None or self.metric == "plain" or not needed:
            return []
        require_repeatable(self.model, self.example)
        batches = [as_inputs(batch) for batch in islice(_unlabelled(data, self.example), max_batches)]
        if not batches:
            raise DataError("the calibration data is empty; give at least one batch")
        return batches

    def informed(self, bare: Analysis, selection: LayerSelection, batches: Sequence[Inputs]) -> Analysis:
        """The analysis with statistics of the layers that need them, and under a budget with their sensitivities."""
        rule, model = self.rule_or_plan, self.model
        budgeted = isinstance(rule, Budget)
        metrics = {layer.metric for layer in rule} if isinstance(rule, Plan) else {self.metric}
        layers = _call_sites(bare, rule)
        statistics = calibrate(model, batches, layers=layers)
        if "loss" in metrics or (budgeted and self.metric is None):
            statistics = with_output_grads(model, statistics, batches, layers=layers, required="loss" in metrics)
        analysis = analyze_selected(model, self.example, selection=selection, calibration=statistics)
        if not budgeted:
            return analysis
        return sensitivity(model, analysis, batches, cache=self.cache, on_progress=self._progress("weigh"))

    def built(self, plan: Plan, analysis: Analysis, batches: Sequence[Inputs]) -> nn.Module:
        """A copy of the model with the plan carried out, fitted to `batches` if there are any."""

        def factors(layer: LayerPlan) -> Factors:
            assert layer.metric is not None
            return analysis[layer.name].decomposition(layer.form, layer.metric).factors(layer.ranks)

        means = analysis.calibration.means if analysis.calibration else {}
        if not batches:
            return factorize(duplicate(self.model), plan, factors=factors, means=means)
        metrics = {layer.name: layer.problems["loss"].output for layer in analysis if "loss" in layer.problems}
        return fit(
            self.model,
            duplicate(self.model),
            plan,
            batches=batches,
            factors=factors,
            means=means,
            output_metrics={name: metric for name, metric in metrics.items() if metric is not None},
            cache_bytes=cache_bytes_of(analysis, self.cache),
            on_progress=self._progress("fit"),
        )

    def _progress(self, verb: str) -> ProgressCallback | None:
        """Progress with the stage in front of the layer's name."""
        callback = self.on_progress
        return callback and (lambda name, done, of: callback(f"{verb} {name}".strip(), done, of))


def _require_runtime(rule_or_plan: Rule | Plan) -> None:
    """Check the runtime of a budget of latency before long work."""
    if isinstance(rule_or_plan, Budget) and rule_or_plan.runtime and rule_or_plan.threads:
        require_runtime(rule_or_plan.runtime, threads=rule_or_plan.threads)


def _is_fitted(plan: Plan, *, reconstruct: Literal["auto"] | bool) -> bool:
    """Whether the layers are to be fitted anew; in a model that comes back as it was, none is."""
    asked = isinstance(plan.rule, Budget) if reconstruct == "auto" else reconstruct
    return asked and not _is_refused(plan)


def _counted(model: nn.Module, smaller: nn.Module, plan: Plan, example: Inputs, *, inplace: bool) -> Compressed:
    """What `compress` returns; under a budget of latency the model as it was, if its file would have grown."""
    dense = count(model, example)
    measurement = count(smaller, example).against(dense)
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


def _is_refused(plan: Plan) -> bool:
    return plan.latency is not None and plan.latency.refused is not None


def _call_sites(analysis: Analysis, rule_or_plan: Rule | Plan) -> Collection[str]:
    """Names of the layers that need statistics."""
    if not isinstance(rule_or_plan, Plan) or isinstance(rule_or_plan.rule, Budget):
        return analysis.call_sites
    planned = {layer.name for layer in rule_or_plan.factored if layer.metric != "plain"}
    return {site for layer in analysis if layer.name in planned for site in layer.call_sites}


def _unlabelled(data: Iterable[Any], example: Inputs) -> Iterator[Any]:
    """The batches without what they have beyond the example's inputs: their labels."""
    number = len(example.args) or 1
    for batch in data:
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == number + 1:
            yield batch[0] if example.kwargs or number == 1 else batch[:-1]
        else:
            yield batch
