"""The one-call path: calibrate, analyse, plan, replace, count what was gained."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.sensitivities import felt, require_room, room, sensitivity
from spectrim.analysis.spectra import Analysis, LayerAnalysis, analyze
from spectrim.benchmark.latency import LatencyTable, latency_table, random_factors
from spectrim.benchmark.measurement import Measurement, batched, count
from spectrim.core.errors import DataError, PlanError
from spectrim.core.execution import Inputs, as_inputs, require_repeatable
from spectrim.core.plans import Budget, FormName, LayerPlan, Metric, Plan, Rule
from spectrim.fitting.reconstruction import Told
from spectrim.fitting.reconstruction import reconstruct as rebuild
from spectrim.layers.replacement import duplicate, factorize
from spectrim.layers.selection import Patterns, replace
from spectrim.linalg import Factors
from spectrim.planning.latency_budget import refused, settled
from spectrim.planning.rules import options_of, refresh, require_possible
from spectrim.planning.rules import plan as make_plan
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import Session, prepare, require_runtime
from spectrim.runtimes.timing import Interval, compare, interleaved

_ROUNDS = 31


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
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    allow_growth: bool = False,
    analysis: Analysis | None = None,
    latencies: LatencyTable | None = None,
    reconstruct: Literal["auto"] | bool = "auto",
    cache: int | None = None,
    inplace: bool = False,
    on_progress: Told | None = None,
) -> Compressed:
    """Replace the layers of a trained network by low-rank factors.

    Without `data` each weight is approximated by itself (plain metric: truncated SVD, Eckart & Young 1936). With
    `data`, what counts is each layer's output on them (activation metric), and biases are corrected so that the mean
    output is exact. A layer that would not become smaller stays dense, and the plan says why.

    Under a `Budget` with `data`, forms and ranks of all layers are chosen together by how much the network's answer
    feels each layer (`st.sensitivity`), and every layer, the dense ones too, is then fitted anew to what it receives
    in the compressed network (`reconstruct`). No labels are used.

    Under a budget of latency every layer is timed by itself in every form (`st.latency_table`), forms and ranks are
    chosen by these times, and the network they give is timed against the dense one, in turn, in the runtime named. Is
    it more than 5 % off what was predicted, or misses the target, they are chosen once more. The target may still be
    missed: `plan.latency` says what was measured. Where nothing is surely faster, or the file would grow, the model
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
    require_room(cache)
    narrowed = include != ("*",) or bool(exclude) or keep_last
    chosen = metric or forms or rank_multiple or allow_growth or latencies
    if isinstance(rule_or_plan, Plan) and (narrowed or chosen):
        raise PlanError("a plan already says which layers, forms and metric; give these options to st.plan instead")
    if analysis is not None and narrowed:
        raise PlanError("an analysis already has its layers; give include, exclude, keep_last to st.analyze instead")
    if reconstruct is True and (data is None or metric == "plain"):
        raise DataError("reconstruction is done on calibration data in a data metric; pass data= and no metric='plain'")
    _require_runtime(rule_or_plan)
    example = as_inputs(example_inputs)
    analyzed = partial(analyze, model, example, include=include, exclude=exclude, keep_last=keep_last)
    known = analyzed() if analysis is None else analysis
    if analysis is None and not isinstance(rule_or_plan, Plan):
        grid = None if rank_multiple == "auto" else rank_multiple
        usual: Metric = "plain" if data is None else "activation"
        require_possible(known, rule_or_plan, metric=metric or usual, forms=forms, rank_multiple=grid)
    batches: list[Inputs] = []
    if data is not None and metric != "plain" and _uses_data(rule_or_plan):
        require_repeatable(model, example)
        batches = [as_inputs(one) for one in islice(_unlabelled(data, example), max_batches)]
        if not batches:
            raise DataError("the calibration data is empty; give at least one batch")
    if analysis is None and batches:
        known = _informed(
            model,
            known,
            rule_or_plan,
            batches,
            analyzed=analyzed,
            metric=metric,
            cache=cache,
            on_progress=on_progress,
        )
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
    fitted_to = batches if _is_fitted(plan, reconstruct=reconstruct) else []
    smaller = _built(model, plan, known, fitted_to, cache=cache, on_progress=_telling(on_progress, "fit"))
    return _finished(model, smaller, plan, example, inplace=inplace)


def choose(
    model: nn.Module,
    analysis: Analysis,
    rule: Rule,
    *,
    example_inputs: Any,
    metric: Metric | None = None,
    forms: Sequence[FormName] | None = None,
    rank_multiple: int | Grid | Literal["auto"] | None = None,
    allow_growth: bool = False,
    latencies: LatencyTable | None = None,
    on_progress: Told | None = None,
) -> Plan:
    """The plan of a rule, as `compress` makes it: `st.plan`, with what has to be timed on this machine.

    Arguments and errors are those of `compress`; the model stays as it is.
    """
    example = as_inputs(example_inputs)
    if not isinstance(rule, Budget) or rule.runtime is None or rule.threads is None:
        grid = probe() if rank_multiple == "auto" else rank_multiple
        return make_plan(
            analysis,
            rule,
            metric=metric,
            forms=forms,
            rank_multiple=grid,
            allow_growth=allow_growth,
            latencies=latencies,
        )
    timed_at = None if rank_multiple == "auto" else rank_multiple
    if latencies is None:
        latencies = latency_table(
            model,
            example,
            analysis=analysis,
            runtime=rule.runtime,
            threads=rule.threads,
            batch=rule.batch,
            forms=forms,
            rank_multiple=timed_at,
            on_progress=_telling(on_progress, "time"),
        )
    options = options_of(analysis, rule, metric=metric, forms=forms, rank_multiple=timed_at, latencies=latencies)
    inputs = example if rule.batch is None else batched(example, rule.batch)
    with prepare(model, inputs, runtime=rule.runtime, threads=rule.threads) as dense:
        race = _Race(model, analysis, inputs, rule, dense, on_progress)
        return settled(options, rule, verify=race.run)


@dataclass
class _Race:
    """Times the network of a plan against the dense one, in turn, in the runtime of the budget."""

    model: nn.Module
    analysis: Analysis
    inputs: Inputs
    rule: Budget
    dense: Session
    on_progress: Told | None
    tried: int = 0

    def run(self, plan: Plan) -> Interval:
        """The share of the dense network's time, with its interval."""
        rule = self.rule
        assert rule.runtime is not None
        assert rule.threads is not None
        if self.on_progress is not None:
            self.on_progress(f"verify in {rule.runtime}", self.tried, self.tried + 1)
        self.tried += 1
        means = {name: zeros for layer in plan.factored for name, zeros in _no_means(self.analysis[layer.name]).items()}
        small = factorize(duplicate(self.model), plan, factors=self._factors, means=means)
        with prepare(small, self.inputs, runtime=rule.runtime, threads=rule.threads, checked=True) as made:
            laps = interleaved([made.timer(), self.dense.timer()], rounds=_ROUNDS)
        speedup = compare(*laps).ratio
        return Interval(value=1 / speedup.value, low=1 / speedup.high, high=1 / speedup.low)

    def _factors(self, layer: LayerPlan) -> Factors:
        """Random numbers: they take as long as the best ones, and need not be found."""
        sizes = self.analysis[layer.name].sizes
        assert sizes is not None
        return random_factors(sizes, form=layer.form, ranks=layer.ranks, seed=0)


def _no_means(layer: LayerAnalysis) -> dict[str, Tensor]:
    """Means of 0, so that every layer gets the bias that correcting its mean gives it."""
    assert layer.sizes is not None
    zeros = torch.zeros(layer.sizes.groups, layer.sizes.width, dtype=torch.float64)
    return dict.fromkeys((layer.name, *layer.also), zeros)


def _require_runtime(rule_or_plan: Rule | Plan) -> None:
    """Check the runtime of a budget of latency before long work."""
    if isinstance(rule_or_plan, Budget) and rule_or_plan.runtime and rule_or_plan.threads:
        require_runtime(rule_or_plan.runtime, threads=rule_or_plan.threads)


def _is_fitted(plan: Plan, *, reconstruct: Literal["auto"] | bool) -> bool:
    """Whether the layers are to be fitted anew; in a model that comes back as it was, none is."""
    wanted = isinstance(plan.rule, Budget) if reconstruct == "auto" else reconstruct
    return wanted and not _is_refused(plan)


def _finished(model: nn.Module, smaller: nn.Module, plan: Plan, example: Inputs, *, inplace: bool) -> Compressed:
    """What `compress` returns; under a budget of latency the model as it was, if its file would have grown."""
    dense = count(model, example)
    kept = count(smaller, example).against(dense)
    if plan.latency and not _is_refused(plan) and max(kept.params_ratio or 0, kept.bytes_ratio or 0) > 1:
        plan = refused(plan, reason=f"the file would grow from {dense.bytes:,} to {kept.bytes:,} bytes")
        smaller, kept = duplicate(model), dense.against(dense)
    if not inplace:
        return Compressed(smaller, plan, kept)
    if not _is_refused(plan):
        changed = [one for one in plan if not one.fixed]
        replace(model, {name: smaller.get_submodule(name) for one in changed for name in (one.name, *one.also)})
    return Compressed(model, plan, kept)


def _is_refused(plan: Plan) -> bool:
    return plan.latency is not None and plan.latency.refused is not None


def _informed(
    model: nn.Module,
    bare: Analysis,
    rule_or_plan: Rule | Plan,
    batches: Sequence[Inputs],
    *,
    analyzed: Callable[..., Analysis],
    metric: Metric | None,
    cache: int | None,
    on_progress: Told | None,
) -> Analysis:
    """The analysis with statistics of the layers that need them, and under a budget with their sensitivities."""
    budgeted = isinstance(rule_or_plan, Budget)
    wanted = {layer.metric for layer in rule_or_plan} if isinstance(rule_or_plan, Plan) else {metric}
    sites = _sites(bare, rule_or_plan)
    statistics = calibrate(model, batches, layers=sites)
    if "loss" in wanted or (budgeted and metric is None):
        statistics = felt(model, statistics, batches, layers=sites, required="loss" in wanted)
    analysis = analyzed(calibration=statistics)
    if not budgeted:
        return analysis
    return sensitivity(model, analysis, batches, cache=cache, on_progress=_telling(on_progress, "weigh"))


def _sites(analysis: Analysis, rule_or_plan: Rule | Plan) -> set[str]:
    """Names of the layers that need statistics."""
    if not isinstance(rule_or_plan, Plan) or isinstance(rule_or_plan.rule, Budget):
        return analysis.sites
    planned = {layer.name for layer in rule_or_plan.factored if layer.metric != "plain"}
    return {site for layer in analysis if layer.name in planned for site in layer.sites}


def _uses_data(rule_or_plan: Rule | Plan) -> bool:
    plan = rule_or_plan
    return not isinstance(plan, Plan) or any(layer.metric != "plain" for layer in plan.factored)


def _unlabelled(data: Iterable[Any], example: Inputs) -> Iterator[Any]:
    """The batches without what they have beyond the example's inputs: their labels."""
    wanted = len(example.args) or 1
    for batch in data:
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == wanted + 1:
            yield batch[0] if example.kwargs or wanted == 1 else batch[:-1]
        else:
            yield batch


def _built(
    model: nn.Module,
    plan: Plan,
    analysis: Analysis,
    batches: Sequence[Inputs],
    *,
    cache: int | None,
    on_progress: Told | None,
) -> nn.Module:
    """A copy of the model with the plan carried out, fitted to `batches` if there are any."""

    def factors(layer: LayerPlan) -> Factors:
        assert layer.metric is not None
        return analysis[layer.name].decomposition(layer.form, layer.metric).factors(layer.ranks)

    moments = analysis.calibration.moments if analysis.calibration else {}
    means = {name: one.mean for name, one in moments.items()}
    if not batches:
        return factorize(duplicate(model), plan, factors=factors, means=means)
    outputs = {layer.name: layer.problems["loss"].output for layer in analysis if "loss" in layer.problems}
    return rebuild(
        model,
        duplicate(model),
        plan,
        batches=batches,
        factors=factors,
        means=means,
        felt={name: one for name, one in outputs.items() if one is not None},
        cache=room(analysis, cache),
        on_progress=on_progress,
    )


def _telling(on_progress: Told | None, verb: str) -> Told | None:
    """Progress with the stage in front of the layer's name."""
    if on_progress is None:
        return None
    told = on_progress
    return lambda name, done, of: told(f"{verb} {name}".strip(), done, of)
