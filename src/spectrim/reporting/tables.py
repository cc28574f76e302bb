"""Tables from values, for terminals, scripts and the page: they show fewer columns rather than broken numbers."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.benchmark.measurement import Measurement
from spectrim.core.errors import DataError
from spectrim.core.plans import Cost, LayerPlan, Metric, Plan
from spectrim.planning.decisions import listed
from spectrim.reporting import words
from spectrim.reporting.results import Results, Variant

Showable = Analysis | Plan | Measurement | Results

_GAP = 2
_FOLD = 20


@dataclass(frozen=True)
class Column:
    """A column; where the width is short, the one with the highest `level` goes first, and level 0 always stays."""

    head: str
    level: int = 0
    number: bool = True
    narrow: int = 0


@dataclass(frozen=True)
class Listing:
    """A table as a value. `rich` prints it at any width; lines within a cell are separated by newlines.

    Attributes:
        title: What the table shows.
        columns: The heads.
        rows: One cell a column; the first one names the row.
        strong: Positions of the rows that stand out.
        note: A line below.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, hidden = self, []
        while sum(shown._needs()) + _GAP * (len(shown.columns) - 1) > options.max_width:
            last = max(range(len(shown.columns)), key=lambda at: shown.columns[at].level)
            if shown.columns[last].level == 0:
                break
            hidden.append(shown.columns[last].head.replace("\n", " "))
            shown = shown._without(last)
        left_out = f"Not shown at this width: {', '.join(hidden)}." if hidden else ""
        yield replace(shown, note=" ".join(filter(None, (self.note, left_out))))._drawn(options.max_width)

    def _without(self, at: int) -> "Listing":
        rows = tuple(row[:at] + row[at + 1 :] for row in self.rows)
        return replace(self, columns=self.columns[:at] + self.columns[at + 1 :], rows=rows)

    def _lines(self, at: int) -> list[str]:
        cells = (self.columns[at].head, *(row[at] for row in self.rows))
        return [line for cell in cells for line in _clean(cell).split("\n")]

    def _needs(self) -> list[int]:
        """The least width of each column: numbers stay whole, words wrap, and a long name folds."""
        needs = []
        for at, column in enumerate(self.columns):
            lines = self._lines(at)
            parts = lines if column.number else [word for line in lines for word in line.split()]
            longest = max(map(cell_len, parts), default=0)
            whole = max(map(cell_len, lines), default=0)
            needs.append(longest if column.number else min(whole, max(column.narrow, min(longest, _FOLD))))
        return needs

    def _widths(self, width: int) -> list[int]:
        """The needs, and the spare width given to the columns of words from left to right."""
        widths = self._needs()
        spare = max(0, width - sum(widths) - _GAP * (len(widths) - 1))
        for at in range(len(widths)):
            more = min(spare, max(map(cell_len, self._lines(at)), default=0) - widths[at])
            widths[at], spare = widths[at] + more, spare - more
        return widths

    def _drawn(self, width: int) -> Table:
        table = Table(
            title=_plain(self.title),
            caption=_plain(self.note) if self.note else None,
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
        )
        for column, own in zip(self.columns, self._widths(width), strict=True):
            justify: Literal["left", "right"] = "right" if column.number else "left"
            table.add_column(_plain(column.head), justify=justify, no_wrap=column.number, overflow="fold", width=own)
        for number, row in enumerate(self.rows):
            table.add_row(*map(_plain, row), style="bold" if number in self.strong else None)
        return table


def table(value: Showable) -> Listing:
    """A table of an `Analysis`, `Plan`, `Measurement` or `Results`, to be printed by a `rich.console.Console`.

    It fits itself to the console: columns that matter less are left out, and named below, before a number would break.

    Raises:
        DataError: any other value.
    """
    match value:
        case Analysis():
            return _of_analysis(value)
        case Plan():
            return _of_plan(value)
        case Measurement():
            return _of_measurement(value)
        case Results():
            return _of_results(value)
    raise DataError(f"a table shows an Analysis, a Plan, a Measurement or Results, and got {type(value).__name__}")


def text(value: Showable, *, width: int = 100) -> str:
    """The table as plain text of at most `width` columns, without colours: `print(text(plan))`.

    Raises:
        DataError: a value that has no table.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table(value))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _plain(cell: str) -> Text:
    """Text without markup: a name may hold brackets."""
    return Text(_clean(cell))


def _clean(cell: str) -> str:
    """No control characters: they have no business in a terminal."""
    return "".join(one if one.isprintable() or one == "\n" else "�" for one in cell)


_LAYER = Column("Layer", number=False)


def _of_analysis(analysis: Analysis) -> Listing:
    columns = (
        _LAYER,
        Column("Kind", 8, number=False),
        Column("Shape", 6),
        Column("Metric", number=False),
        Column("Full\nrank", 1),
        Column("Effective\nrank", 4),
        Column("Stable\nrank", 9),
        *(Column(f"Rank for\n{energy} %", level) for energy, level in zip(_ENERGIES, (11, 10, 2, 5), strict=True)),
        Column("Params", 3),
        Column("Share of\nMACs", 3),
        Column("Cannot be factored", number=False, narrow=24),
    )
    macs = sum(layer.dense.macs for layer in analysis)
    rows = tuple(_analysis_row(layer, macs=macs) for layer in analysis)
    able = sum(layer.form is not None and layer.refusal is None for layer in analysis)
    title = f"{len(analysis)} weights, {able} of them can be factored"
    metrics = {row[_METRIC] for row in rows} - {words.NOTHING}
    where = f"the {metrics.pop()} metric" if len(metrics) == 1 else "the metric named"
    note = f"Rank for 90 %: the smallest rank that holds 90 % of the energy, in {where}."
    listing = Listing(title, columns, rows, note=note)
    if not any(layer.refusal for layer in analysis):
        listing = listing._without(len(columns) - 1)
    return listing if metrics else listing._without(_METRIC)


_ENERGIES = (50, 75, 90, 99)
_METRIC = 3


def _analysis_row(layer: LayerAnalysis, *, macs: int) -> tuple[str, ...]:
    metric: Metric = "activation" if "activation" in layer.spectra else "plain"
    spectrum = layer.spectra.get(metric)
    numbers = [words.NOTHING] * (2 + len(_ENERGIES))
    if spectrum is not None:
        numbers = [f"{spectrum.effective_rank:.0f}", f"{spectrum.stable_rank:.1f}"]
        numbers += [str(spectrum.rank_for(energy / 100)) for energy in _ENERGIES]
    return (
        _with_others(layer),
        layer.kind,
        words.shape(layer.shape),
        metric if spectrum is not None else words.NOTHING,
        str(layer.full_rank) if layer.full_rank else words.NOTHING,
        *numbers,
        words.count(layer.dense.params),
        words.percent(layer.dense.macs / macs, places=1) if macs else words.NOTHING,
        layer.refusal or "",
    )


def _with_others(layer: LayerAnalysis | LayerPlan) -> str:
    return f"{layer.name}\n(also {', '.join(layer.also)})" if layer.also else layer.name


def _of_plan(plan: Plan) -> Listing:
    columns = (
        _LAYER,
        Column("Shape", 7),
        Column("Form", 5, number=False),
        Column("Rank"),
        Column("Break\neven", 6),
        Column("Predicted\nerror", 2),
        Column("Params", 1),
        Column("Share of\nparams", 9),
        Column("MACs", 3),
        Column("Share of\nMACs", 8),
        Column("Reason", 4, number=False, narrow=24),
    )
    before, after = plan.dense_cost, plan.kept_cost
    title = (
        f"{words.sentence(words.asked(plan.rule))}, {plan.metric} metric: {len(plan.factored)} of {len(plan)} factored"
    )
    note = (
        f"All layers: {words.count(before.params)} → {words.count(after.params)} parameters, "
        f"{words.count(before.macs)} → {words.count(after.macs)} MACs. Shares are of these sums, before and after."
    )
    return Listing(title, columns, tuple(_plan_row(layer, before, after) for layer in plan), note=note)


def _plan_row(layer: LayerPlan, before: Cost, after: Cost) -> tuple[str, ...]:
    full = f" of {layer.full_rank}" if layer.full_rank and len(layer.ranks) < 2 else ""
    return (
        _with_others(layer),
        words.shape(layer.shape),
        layer.form,
        f"{listed(layer.ranks)}{full}" if layer.ranks else words.NOTHING,
        words.NOTHING if layer.break_even is None else str(layer.break_even),
        words.NOTHING if layer.predicted_error is None else words.percent(layer.predicted_error, places=1),
        _change(layer.dense.params, layer.kept.params),
        _shares((layer.dense.params, before.params), (layer.kept.params, after.params)),
        _change(layer.dense.macs, layer.kept.macs),
        _shares((layer.dense.macs, before.macs), (layer.kept.macs, after.macs)),
        layer.reason,
    )


def _shares(*parts: tuple[int, int]) -> str:
    """Part of whole before and after, as percentages."""
    said = [words.percent(part / whole, places=1) if whole else words.NOTHING for part, whole in parts]
    return said[0] if said[0] == said[1] else "\n→ ".join(said)


def _change(before: int, after: int) -> str:
    return words.count(before) if before == after else f"{words.count(before)} →\n{words.count(after)}"


def _of_measurement(one: Measurement) -> Listing:
    def cost(name: str, show: Callable[[float], str], value: int, ratio: float | None) -> tuple[str, ...]:
        return (name, show(value), words.share(ratio), "" if ratio is None else words.smaller(ratio))

    rows = [
        cost("Parameters", words.count, one.params, one.params_ratio),
        cost("File size", words.size, one.bytes, one.bytes_ratio),
        cost("MACs", words.count, one.macs, one.macs_ratio),
    ]
    if one.latency_ms is not None:
        threads = f"{one.threads} thread{'s' if one.threads != 1 else ''}" if one.threads else ""
        rows.append(("Latency", words.milliseconds(one.latency_ms), "", threads))
    if one.speedup is not None:
        rows.append(("Speed-up", words.speedup(one.speedup), "", words.verdict(one.speedup)))
    if one.accuracy is not None:
        interval = f"95 % interval {words.bounds(one.accuracy.interval, scale=100)} %"
        rows.append(("Accuracy", words.percent(one.accuracy.value), "", interval))
    columns = (Column("", number=False), Column("Value"), Column("Kept /\ndense"), Column("", number=False, narrow=20))
    return Listing("Measurement", columns, tuple(rows))


def _of_results(results: Results) -> Listing:
    columns: Sequence[Column] = (
        Column("Network", number=False, narrow=12),
        Column("Rank", 9),
        Column("Metric", 11, number=False),
        Column("Stage", 10, number=False),
        Column("Accuracy"),
        Column("Points vs\ndense", 8),
        Column("Params", 1),
        Column("Bytes", 6),
        Column("MACs", 3),
        Column("Latency", 7),
        Column("Speed-up", 2),
    )
    networks = (results.dense, *results.variants)
    cells = tuple(_results_row(one, results.dense) for one in networks)
    # A column that no network has anything to say in is no column.
    used = [at for at in range(len(columns)) if at == 0 or any(row[at] != words.NOTHING for row in cells)]
    chosen = frozenset(at for at, one in enumerate(networks) if one.name == results.chosen)
    several = any(one.spread is not None for one in networks)
    note = "Accuracy: mean ± standard deviation over the seeds." if several else "Accuracy: with its 95 % interval."
    return Listing(
        results.title,
        tuple(columns[at] for at in used),
        tuple(tuple(row[at] for at in used) for row in cells),
        strong=chosen,
        note=note if any(one.runs for one in networks) else "",
    )


def _results_row(variant: Variant, dense: Variant) -> tuple[str, ...]:
    one = variant.measurement

    def cost(value: str, ratio: float | None) -> str:
        return value if ratio is None else f"{value}\n{words.smaller(ratio)}"

    accuracy, speedup = variant.accuracy, one.speedup
    return (
        variant.name,
        words.ranks(variant),
        variant.metric or words.NOTHING,
        variant.stage,
        words.NOTHING if accuracy is None else f"{words.percent(accuracy)}\n{words.uncertainty(variant)}",
        words.NOTHING if variant is dense else words.difference(variant, dense),
        cost(words.count(one.params), one.params_ratio),
        cost(words.size(one.bytes), one.bytes_ratio),
        cost(words.count(one.macs), one.macs_ratio),
        words.milliseconds(one.latency_ms),
        words.NOTHING if speedup is None else f"{words.speedup(speedup)}\n{words.bounds(speedup)}",
    )
