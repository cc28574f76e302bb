"""Tables of every value: in a terminal, at any width, in scripts and on the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.fidelity import Fidelity
from spectrim.benchmark.measurement import Measurement
from spectrim.core.arguments import checked
from spectrim.core.display import Displayed
from spectrim.core.errors import DataError
from spectrim.core.plans import Cost, LayerPlan, Metric, Plan
from spectrim.linalg import Spectrum
from spectrim.planning.decisions import listed
from spectrim.planning.memory import MemoryEstimate
from spectrim.quantization.comparison import QuantizedRow, QuantizedTable
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.reporting.results import Changes, ClassChange, Published, PublishedPoint, Results, Tally, Variant


@runtime_checkable
class _Compressed(Protocol):
    """What `compress` returns: it has no name here, as its module is on the same level as this room."""

    plan: Plan
    measurement: Measurement
    fidelity: Fidelity | None


@checked
def table(value: Displayed) -> Listing:
    """A table of an `Analysis`, `Plan`, `Measurement`, `Results` or what else a cell of a notebook shows as one.

    A `rich.console.Console` prints it, and it fits itself to the console: columns that matter less are left out, and
    named below, before a number would break. Raises `DataError` for values that have none.
    """
    for kind, of_kind in _TABLES.items():
        if isinstance(value, kind):
            return of_kind(value)
    names = ", ".join(kind.__name__.strip("_") for kind in _TABLES)
    raise DataError(f"a table shows one of {names}, and this is a value of type {type(value).__name__}")


@checked
def text(value: Displayed, *, width: int = 100) -> str:
    """The table as plain text of at most `width` columns, without colours: `print(text(plan))`; raises as `table`."""
    return table(value).text(width=width)


def _of_memory(estimate: MemoryEstimate) -> Listing:
    parts = {name.capitalize(): getattr(estimate, name) for name in estimate.PARTS}
    margin = estimate.peak - estimate.tensors
    rows = {**parts, "At the highest": estimate.tensors, "With a margin": estimate.peak, "Free": estimate.available}
    columns = (Column("", number=False), Column("Memory"))
    note = (
        "Not all parts are held together, and the model is not counted. The margin is for what libraries and gaps "
        f"take ({words.size(margin)})."
    )
    widest = f" The layer that takes most is {estimate.widest}." if estimate.widest else ""
    cells = tuple((name, words.size(number)) for name, number in rows.items())
    return Listing("Memory that this takes", columns, cells, frozenset({len(parts)}), note + widest)


def _of_analysis(analysis: Analysis) -> Listing:
    macs = sum(layer.dense.macs for layer in analysis)
    metrics = set(filter(None, map(_metric, analysis)))
    mixed, levels = len(metrics) > 1, {50: 11, 75: 10, 90: 2, 99: 5}
    columns: dict[Column, Callable[[LayerAnalysis], str]] = {
        Column("Layer", number=False): _tied_names,
        Column("Kind", 8, number=False): lambda layer: layer.kind,
        Column("Shape", 6): lambda layer: words.shape(layer.shape),
        Column("Metric", number=False, optional=True): lambda layer: (mixed and _metric(layer)) or words.NOTHING,
        Column("Full\nrank", 1): lambda layer: str(layer.full_rank or words.NOTHING),
        Column("Effective\nrank", 4): partial(_of_spectrum, rank=attrgetter("effective_rank")),
        Column("Stable\nrank", 9): partial(_of_spectrum, rank=attrgetter("stable_rank"), form=".1f"),
        **{
            Column(f"Rank for\n{energy} %", level): partial(_of_spectrum, rank=methodcaller("rank_for", energy / 100))
            for energy, level in levels.items()
        },
        Column("Params", 3): lambda layer: words.count(layer.dense.params),
        Column("Share of\nMACs", 3): lambda layer: words.percent(layer.dense.macs / (macs or 1), places=1),
        Column("Cannot be factored", number=False, narrow=24, optional=True): lambda layer: layer.skip_reason or "",
    }
    able = sum(layer.form is not None and layer.skip_reason is None for layer in analysis)
    where = f"the {metrics.pop()} metric" if len(metrics) == 1 else "the metric named"
    note = f"Rank for 90 %: the smallest rank that holds 90 % of the energy, in {where}."
    return listing(f"{len(analysis)} weights, {able} of them can be factored", list(analysis), columns, note=note)


def _metric(layer: LayerAnalysis) -> Metric | None:
    """Whose singular values the table shows."""
    return "activation" if "activation" in layer.spectra else "plain" if "plain" in layer.spectra else None


def _of_spectrum(layer: LayerAnalysis, rank: Callable[[Spectrum], float], *, form: str = ".0f") -> str:
    value = rank(layer.spectra[metric]) if (metric := _metric(layer)) else None
    return words.NOTHING if value is None else words.Cell(format(value, form), value)


def _tied_names(layer: LayerAnalysis | LayerPlan) -> str:
    names = f"{layer.name}\n(also {', '.join(layer.tied_names)})" if layer.tied_names else layer.name
    return words.Cell(names, layer.name)


def _of_plan(plan: Plan) -> Listing:
    before, after = plan.dense_cost, plan.kept_cost
    columns: dict[Column, Callable[[LayerPlan], str]] = {
        Column("Layer", number=False): _tied_names,
        Column("Shape", 7): lambda layer: words.shape(layer.shape),
        Column("Form", 5, number=False): lambda layer: layer.form,
        Column("Rank"): _plan_ranks,
        Column("Break\neven", 6): lambda layer: words.NOTHING if layer.break_even is None else str(layer.break_even),
        Column("Predicted\nerror", 2): lambda layer: words.percent(
            None if layer.unit not in (None, layer.name) else layer.predicted_error, places=1
        ),
        Column("Params", 1): lambda layer: words.change(layer.dense.params, layer.kept.params),
        Column("Share of\nparams", 9): lambda layer: _shares(layer, (before, after), "params"),
        Column("MACs", 3): lambda layer: words.change(layer.dense.macs, layer.kept.macs),
        Column("Share of\nMACs", 8): lambda layer: _shares(layer, (before, after), "macs"),
        Column("Reason", 4, number=False, narrow=24): lambda layer: layer.reason,
    }
    note = (
        f"All layers: {words.count(before.params)} → {words.count(after.params)} parameters, "
        f"{words.count(before.macs)} → {words.count(after.macs)} MACs. Shares are of these sums, before and after."
    )
    return listing(_plan_title(plan), _with_stacks(plan), columns, note=note)


def _with_stacks(plan: Plan) -> list[LayerPlan]:
    """The layers, with one in the place of all experts of a stack, of which there may be hundreds."""
    groups = words.group_by(plan, lambda layer: layer.stack or layer.name)
    return [layers[0] if len(layers) == 1 else _of_stack(name, layers) for name, layers in groups.items()]


def _of_stack(name: str, layers: Sequence[LayerPlan]) -> LayerPlan:
    ranks, nothing = [rank for layer in layers for rank in layer.ranks], Cost(params=0, macs=0)
    dense = len(layers) - len(ranks)
    each = f"ranks {min(ranks)} to {max(ranks)} of {layers[0].full_rank}" if ranks else layers[0].reason
    errors = [layer.predicted_error**2 for layer in layers if layer.predicted_error is not None]
    whole = {
        "name": f"{name}.*",
        "form": max(layers, key=attrgetter("is_factored")).form,
        "rank": None,
        "predicted_error": (sum(errors) / len(errors)) ** 0.5 if errors else None,
        "dense": sum((layer.dense for layer in layers), nothing),
        "kept": sum((layer.kept for layer in layers), nothing),
        "reason": f"{len(layers)} experts: {each}{f', {dense} dense' if ranks and dense else ''}",
    }
    return layers[0].model_copy(update=whole)


def _plan_title(plan: Plan) -> str:
    rule = words.sentence(words.rule_text(plan.rule))
    narrowed = sum(layer.unit is not None for layer in plan.factored)
    text = f"{rule}, {plan.metric} metric: {len(plan.factored) - narrowed} of {len(plan)} factored"
    return f"{text}, {narrowed} narrowed" if narrowed else text


def _plan_ranks(layer: LayerPlan) -> str:
    full = f" of {layer.full_rank}" if layer.full_rank and len(layer.ranks) < 2 else ""
    text = f"{listed(layer.ranks)}{full}" if layer.ranks else words.NOTHING
    return words.Cell(text, **{"": layer.rank, "in": layer.rank_in, "full": layer.full_rank})


def _shares(layer: LayerPlan, wholes: tuple[Cost, Cost], name: Literal["params", "macs"]) -> str:
    """The layer's share of the cost of all layers, before and after."""
    costs = zip((layer.dense, layer.kept), wholes, strict=True)
    shares = [getattr(part, name) / (getattr(whole, name) or 1) for part, whole in costs]
    text = "\n→ ".join(dict.fromkeys(words.percent(share, places=1) for share in shares))
    return words.Cell(text, before=shares[0], after=shares[1])


def _of_measurement(measurement: Measurement) -> Listing:
    costs = ("params", "bytes", "macs", "cache_bytes")
    ratios = {name: ratio for name in costs if (ratio := getattr(measurement, f"{name}_ratio"))}
    whole = {name: round(getattr(measurement, name) / ratio) for name, ratio in ratios.items()}
    dense, rows = words.costs(measurement.model_copy(update=whole)), list[tuple[str, ...]]()
    for name, (value, ratio) in words.costs(measurement).items():
        before = dense[name][0]
        change = words.Cell(f"{before} → {value}", **{"": value.values[""]}, before=before.values[""])
        saving = "" if ratio is None else words.smaller(ratio)
        rows.append((name, value if before == value else change, words.share(ratio), saving))
    if measurement.uncounted:
        rows.append(("Not in the MACs", ", ".join(measurement.uncounted), "", ""))
    if measurement.latency_ms is not None:
        rows.append(("Latency", words.milliseconds(measurement.latency_ms), "", words.threads(measurement.threads)))
    if (speedup := measurement.speedup) is not None:
        rows.append(("Speed-up", words.speedup(speedup), "", words.verdict(speedup)))
    if (accuracy := measurement.accuracy) is not None:
        interval = f"95 % interval {words.bounds(accuracy.interval, scale=100)} %"
        rows.append(("Accuracy", words.percent(accuracy.value), "", interval))
    columns = (Column("", number=False), Column("Value"), Column("Kept /\ndense"), Column("", number=False, narrow=20))
    return Listing("Measurement", columns, tuple(rows))


def _of_compressed(small: _Compressed) -> Listing:
    latency = small.plan.latency
    refused = f"It is as it was: {latency.refused}." if latency and latency.refused else ""
    notes = (refused, str(small.fidelity or ""), 'Keep it with st.save(small.model, "small.safetensors").')
    note = "\n".join(filter(None, notes))
    return replace(_of_measurement(small.measurement), title=_plan_title(small.plan), note=note)


def quantized_table(rows: Sequence[QuantizedRow], *, comparison: QuantizedTable | None = None) -> Listing:
    """Networks in few bits, or, in a comparison, each of them against the dense one in float32, the last one strong."""
    columns: dict[Column, Callable[[QuantizedRow], str]] = {
        Column("Network", number=False): lambda row: row.name if comparison else str(row.scheme),
        Column("Bytes"): lambda row: f"{row.bytes:,}",
        Column("Smaller", 1, optional=True): lambda row: f"{rows[0].bytes / row.bytes:.2f}x" if comparison else "",
        Column("ms", 2, optional=True): lambda row: f"{row.latency_ms:.3g}" if row.latency_ms else words.NOTHING,
        Column("Faster", 2, optional=True): lambda row: f"{row.speedup.value:.2f}x" if row.speedup else words.NOTHING,
        Column("Accuracy"): lambda row: words.percent(row.accuracy.value if row.accuracy else None),
        Column("Largest\ndifference", 1): lambda row: words.percent(row.difference if row.scheme else None),
    }
    note = "Difference of outputs to the same network in float32, as a share of the largest output. "
    if comparison:
        threads = words.threads(comparison.threads)
        note += f"Smaller and faster than dense; {comparison.runtime}, one input, {threads}."
    strong = rows[-1] if comparison else None
    return listing("Quantised", rows, columns, strong=lambda row: row is strong, note=note)


def _of_results(results: Results) -> Listing:
    dense, networks = results.dense, (results.dense, *results.variants)
    paired = any(network.measurement.reference_ms for network in networks)
    columns: dict[Column, Callable[[Variant], str]] = {
        Column("Network", number=False, narrow=12): lambda network: network.name,
        Column("Rank", 9, optional=True): words.ranks,
        Column("Metric", 11, number=False, optional=True): lambda network: network.metric or words.NOTHING,
        Column("Stage", 10, number=False): lambda network: network.stage,
        Column("Accuracy", optional=True): _accuracy_lines,
        Column("Points vs\ndense", 8, optional=True): lambda network: (
            words.NOTHING if network is dense else words.difference(network, dense)
        ),
        Column("Params", 1): lambda network: _cost_lines(network, "Parameters"),
        Column("Bytes", 6): lambda network: _cost_lines(network, "File size"),
        Column("MACs", 3): lambda network: _cost_lines(network, "MACs"),
        Column("Latency", 7, optional=True): lambda network: (
            words.NOTHING if network is dense and paired else words.latency(network.measurement)
        ),
        Column("Speed-up", 2, optional=True): lambda network: words.interval_lines(network.measurement.speedup),
    }
    by_seeds = any(network.spread is not None for network in networks)
    note = "Accuracy: mean ± standard deviation over the seeds." if by_seeds else "Accuracy: with its 95 % interval."
    note = note if any(network.runs for network in networks) else ""
    return listing(results.title, networks, columns, strong=lambda network: network.name == results.chosen, note=note)


def _accuracy_lines(network: Variant) -> str:
    accuracy = network.accuracy
    return words.NOTHING if accuracy is None else words.lines(words.percent(accuracy), words.uncertainty(network))


def _cost_lines(network: Variant, cost: str) -> str:
    value, ratio = words.costs(network.measurement)[cost]
    return value if ratio is None else words.lines(value, words.smaller(ratio))


class _PublishedRow(NamedTuple):
    published: Published
    point: PublishedPoint


class _TimedRow(NamedTuple):
    name: str
    measurement: Measurement
    chosen: bool


def published_table(results: Results) -> Listing | None:
    """What others reached in the same study, each against its own dense network; None where nothing is known."""
    rows = [_PublishedRow(published, point) for published in results.published for point in published.networks]
    columns: dict[Column, Callable[[_PublishedRow], str]] = {
        Column("Published network", number=False, narrow=12): lambda row: row.point.name,
        Column("Source", 4, number=False, narrow=12): lambda row: row.published.source,
        Column("Accuracy"): lambda row: words.percent(row.point.accuracy),
        Column("Points vs\nits dense", 1, optional=True): lambda row: _published_difference(*row),
        Column("Params", 2, optional=True): lambda row: words.smaller(row.point.params_ratio),
        Column("MACs", 3, optional=True): lambda row: words.smaller(row.point.macs_ratio),
        Column("Speed-up", 3, optional=True): lambda row: words.factor(row.point.speedup),
    }
    note = "As published, each against its own dense network; we have not measured them again."
    return listing("Published figures", rows, columns, note=note) if rows else None


def _published_difference(published: Published, point: PublishedPoint) -> str:
    if published.dense is None or point.name == "dense":
        return words.NOTHING
    return words.points(point.accuracy - published.dense)


def runtimes_table(results: Results) -> Listing | None:
    """Latency and speed-up in every runtime, networks of the same shapes in one row; None where nothing was timed.

    Each speed-up is over the dense network in the same runtime.
    """
    networks = (results.dense, *results.variants)
    rows: list[_TimedRow] = []
    groups = words.group_by(networks, lambda network: (network.measurement, *network.in_runtimes))
    for measurements, group in groups.items():
        names = [network.name for network in group]
        timed = [measurement for measurement in measurements if measurement.latency_ms is not None]
        rows += [_TimedRow(words.common_name(names), measurement, results.chosen in names) for measurement in timed]
    columns: dict[Column, Callable[[_TimedRow], str]] = {
        Column("Network", number=False, narrow=12): lambda row: row.name,
        Column("Runtime", number=False): lambda row: row.measurement.runtime or words.NOTHING,
        Column("Speed-up"): lambda row: words.interval_lines(row.measurement.speedup),
        Column("Verdict", 3, number=False): lambda row: words.timing_verdict(row.measurement),
        Column("Latency", 1): lambda row: words.latency(row.measurement),
        Column("Speed-up\nfrom MACs", 2): lambda row: words.factor(row.measurement.macs_speedup),
        Column("Share of it\nreached", 4): lambda row: words.interval_lines(row.measurement.efficiency, share=True),
    }
    circumstances = dict.fromkeys(filter(None, (words.circumstances(row.measurement) for row in rows)))
    note = (f"Timed with {' or '.join(circumstances)}. " if circumstances else "") + (
        "Speed-up: over the dense network in the same runtime, with its 95 % interval. The share reached is the "
        "measured speed-up over the one that the MACs promise. Networks with layers of the same shapes are timed once."
    )
    return listing("Time in every runtime", rows, columns, strong=lambda row: row.chosen, note=note) if rows else None


def changes_table(changes: Changes) -> Listing:
    """The accuracy of all classes together and of each one, before and after, with the interval of the difference."""
    tallies = [changes.whole, *(tally for tally in changes.classes if tally.total)]
    columns: dict[Column, Callable[[Tally], str]] = {
        Column("Class", number=False): lambda tally: tally.name if isinstance(tally, ClassChange) else "all classes",
        Column("Test\nimages", 5): lambda tally: f"{tally.total:,}",
        Column("Dense", 1): lambda tally: words.percent(tally.before / tally.total),
        Column("Now"): lambda tally: words.percent(tally.after / tally.total),
        Column("Points"): lambda tally: words.points(tally.difference.value),
        Column("95 %\ninterval", 2): lambda tally: words.points_bounds(tally.difference),
        Column("Became\nwrong", 3): lambda tally: f"{tally.broken:,}",
        Column("Became\nright", 3): lambda tally: f"{tally.corrected:,}",
        Column("Wrong in\nanother way", 4): lambda tally: f"{tally.confused:,}",
    }
    seeds = f", summed over {len(changes.seeds)} seeds" if len(changes.seeds) > 1 else ""
    note = f"Both networks on the same test images{seeds}; the interval is that of the difference."
    title = f"Accuracy of every class, {changes.variant}"
    return listing(title, tallies, columns, strong=lambda tally: not isinstance(tally, ClassChange), note=note)


_TABLES: Mapping[type, Callable[[Any], Listing]] = {
    Analysis: _of_analysis,
    Plan: _of_plan,
    _Compressed: _of_compressed,
    Measurement: _of_measurement,
    Fidelity: lambda fidelity: Listing("Fidelity", (), (), note=str(fidelity)),
    Results: _of_results,
    MemoryEstimate: _of_memory,
    QuantizedTable: lambda table: quantized_table(table.rows, comparison=table),
    Listing: lambda listing: listing,
}
