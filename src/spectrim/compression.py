"""The one-call path: decide, replace, fit, look at what came out and count what was gained."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from spectrim.analysis.sensitivities import cache_bytes_of
from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.fidelity import Fidelity, measured_fidelity, require_planned_cost
from spectrim.benchmark.latencies import LatencyTable
from spectrim.benchmark.measurement import Measurement, count
from spectrim.core.arguments import checked
from spectrim.core.display import Displayed
from spectrim.core.errors import DataError, PlanError, RuleError
from spectrim.core.execution import Inputs, ProgressCallback, as_inputs
from spectrim.core.memory import Storage
from spectrim.core.plans import Budget, Metric, Plan, Rule
from spectrim.core.progress import progress_callback
from spectrim.fitting.reconstruction import reconstruct as fit
from spectrim.layers.replacement import duplicate, factorize, replace as replace_layers
from spectrim.layers.selection import LayerSelection, Patterns, TreatAs
from spectrim.layers.tokens import TokenMasks
from spectrim.layers.unfusing import fused, places_of, unfused_as
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.latency_budget import refused
from spectrim.planning.pipeline import Decision, decide, progress_of
from spectrim.planning.resources import RunOptions
from spectrim.runtimes.rank_grid import Grid


class Distillation(Protocol):
    """What `distill=` takes; `st.Distillation` is one."""

    def batches(self, calibration: Sequence[Inputs], *, like: Inputs) -> Sequence[Inputs]:
        """What is learnt from."""

    def distilled(
        self, model: nn.Module, teacher: nn.Module, batches: Sequence[Inputs], *, on_progress: ProgressCallback | None
    ) -> nn.Module:
        """The compressed network after learning from the dense one."""


@dataclass(frozen=True, eq=False)
class Compressed(Displayed):
    """A compressed model, the plan it was made by, and what it costs against its dense self.

    Attributes:
        model: An ordinary module.
        plan: Form and ranks of every layer; under a budget of latency with the times that were measured.
        measurement: Counted costs, with their ratios to the dense network's.
        fidelity: How near its outputs are to the dense network's on about 128 calibration samples, kept aside where
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


@checked
def compress(
    model: nn.Module,
    rule_or_plan: Rule | Plan,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    mask: str | None = None,
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
    distill: Distillation | None = None,
    cache: int | None = None,
    device: str | torch.device | None = None,
    offload: str | Path | None = None,
    inplace: bool = False,
    on_progress: ProgressCallback | None = None,
    progress: bool = False,
) -> Compressed:
    """Replace the layers of a trained network by low-rank factors.

    Without `data` each weight is approximated by itself (plain metric: truncated SVD, Eckart & Young 1936). With
    `data`, what counts is each layer's output on them (activation metric), and biases are corrected so that the mean
    output is exact. A layer that would not become smaller stays dense, and the plan says why.

    Under a `Budget` with `data`, forms and ranks of all layers are chosen together by how much the network's outputs
    change with an error in each layer (`st.sensitivity`), and every layer, the dense ones too, is then fitted anew to
    what it receives in the compressed network (`reconstruct`). No labels are used.

    Under a budget of latency every layer is timed by itself in every form, narrowed too (`st.latency_table`). Forms and
    ranks are chosen by these times, and the network they give is timed against the dense one, in turn, in the runtime
    named; if that is more than 5 % off the prediction, or misses the target, they are chosen once more
    (`plan.latency`). Where nothing is surely faster, or the file would grow, the model comes back as it was, and
    `Compressed.refused` says why.

    Args:
        model: A trained module; left bit-identical unless `inplace`.
        rule_or_plan: `Budget(macs=0.5)`, `Budget(latency=0.6, runtime="onnxruntime")`, `Rank(20)`, `Ratio(0.25)`,
            `Energy(0.9)`, or a `Plan`, with its own selection.
        example_inputs: One call's inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        data: Calibration batches like the example, with or without labels: what a batch has beyond the example's inputs
            is dropped. They are run through once; only a `Budget`, the loss metric and `reconstruct=True` keep their
            inputs in memory.
        max_batches: Use at most so many calibration batches.
        mask: Name of the input (batch, length) that is nonzero at tokens and zero at padding, which is kept out of
            everything; by default `attention_mask` and the like, and `src_key_padding_mask` and the like, as in torch.
        metric: `plain`, `activation` or `loss`; with `data`, by default loss under a `Budget` and activation otherwise.
        forms: Which of `channel`, `spatial`, `tucker2` convolutions may take, of `linear`, `interpolative` linear
            layers, and of `width`, `head_vo`, `head_qk` several layers together; see `st.plan`.
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
        distill: `st.Distillation(epochs=3)`: let the compressed network learn from the dense one afterwards, without
            labels, on the calibration batches or on others (`Distillation(data=..)`); see `st.distill`.
        cache: Bytes of activations that weighing and fitting may keep, so that not every pass has to begin at the first
            layer; saves time only. By default what the statistics take, or 512 to 768 MiB by the memory that is free.
        device: Where statistics are added up and weights decomposed, such as `"cpu"`; by default where the model is.
        offload: A folder on a fast disk, in which statistics of 16 MiB or more are kept until the end; saves memory.
        inplace: Change `model` itself, and return it.
        on_progress: Called with what is done next, how many steps of this stage are done, and of how many.
        progress: Show the same on standard error: a bar in a terminal, a line in a notebook, lines in a log.

    Returns:
        The model (in the same training mode), the plan, and the counted costs.

    Raises:
        SpectrimError: one of its kinds, before anything has been changed.
    """
    run = RunOptions(cache, Storage.of(device, offload), max_batches, reconstruct, distill is not None)
    if reconstruct not in ("auto", True, False):
        raise RuleError(f"reconstruct={reconstruct!r}: give 'auto', True or False")
    if reconstruct is True and (data is None or metric == "plain"):
        raise DataError("reconstruction is done on calibration data in a data metric; pass data= and no metric='plain'")
    example = replace(as_inputs(example_inputs), mask=mask)
    _ = TokenMasks.of(model, example)
    selection = LayerSelection(include, exclude, keep_last, {} if treat_as is None else treat_as)
    if analysis is not None and (selection.treat_as or not selection.takes_all):
        raise PlanError(
            "an analysis already has its layers; give include, exclude, keep_last, treat_as to st.analyze instead"
        )
    with progress_callback(on_progress, progress=progress) as report:
        decision = decide(
            model,
            rule_or_plan,
            example_inputs=example,
            data=data,
            options=PlanOptions(metric, forms, rank_multiple, allow_growth, latencies),
            layers=selection if analysis is None else analysis,
            run=run,
            on_progress=report,
        )
        for layer in decision.plan if analysis is None else ():  # nobody asks it for another plan
            decision.analysis[layer.name].keep(layer)
        return carry_out(
            model,
            decision,
            example_inputs=example,
            reconstruct=reconstruct,
            distill=distill,
            cache=cache,
            inplace=inplace,
            on_progress=report,
        )


def carry_out(
    model: nn.Module,
    decision: Decision,
    *,
    example_inputs: Any,
    reconstruct: Literal["auto"] | bool = "auto",
    distill: Distillation | None = None,
    cache: int | None = None,
    inplace: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Compressed:
    """The second half of `compress`: replace, fit, distil, look at the result.

    Arguments and errors are those of `compress`; `on_progress` is called for `fit LAYER` and `distil EPOCH`.
    """
    plan, analysis, example = decision.plan, decision.analysis, as_inputs(example_inputs)
    fitted = _is_fitted(plan, reconstruct=reconstruct)
    learnt = distill.batches(decision.batches, like=example) if distill and not _is_refused(plan) else []
    dense = unfused_as(model, analysis.names)
    smaller = fused(_built(dense, decision, fitted=fitted, cache=cache, on_progress=on_progress))
    if distill and learnt:
        smaller = distill.distilled(smaller, model, learnt, on_progress=progress_of("distil", on_progress))
    seen, held_out = decision.seen
    measured = measured_fidelity(dense, smaller, seen or [example], plan=plan, analysis=analysis, held_out=held_out)
    compressed = _counted(model, smaller, plan, example, inplace=inplace)
    return replace(compressed, fidelity=measured if seen else None)


def _built(
    model: nn.Module, decision: Decision, *, fitted: bool, cache: int | None, on_progress: ProgressCallback | None
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
        on_progress=progress_of("fit", on_progress),
    )


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
        names = places_of(model, (name for layer in plan if not layer.frozen for name in layer.names))
        replace_layers(model, {name: smaller.get_submodule(name) for name in names})
        changed = dict(smaller.named_parameters())  # by distillation also those of other layers
        with torch.no_grad():
            for name, own in model.named_parameters():
                if not torch.equal(own, changed[name]):
                    own.copy_(changed[name])
    return Compressed(model, plan, measurement)


def _is_refused(plan: Plan) -> bool:
    return plan.latency is not None and plan.latency.refused is not None
