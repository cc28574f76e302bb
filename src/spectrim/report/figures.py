"""Plotly figures of a study. Colour never speaks alone: markers and dashes differ too."""

import difflib
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spectrim.analyze import Analysis
from spectrim.errors import DataError, PatternError
from spectrim.linalg import Spectrum
from spectrim.measure import Epoch
from spectrim.plan import Metric, Plan
from spectrim.report import words
from spectrim.report.results import LayerSpectrum, Results, Run, Variant

Against = Literal["rank", "params", "macs", "latency"]

AGAINST: dict[Against, str] = {
    "rank": "Rank kept in each factored layer",
    "params": "Parameters",
    "macs": "MACs of one forward pass",
    "latency": "Latency of one forward pass (ms)",
}

# Okabe & Ito's palette, told apart with every common kind of colour blindness, less black and yellow, which vanish on
# a dark or on a white page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
_GREY = "#808790"
_METRIC_STYLE: dict[Metric | None, tuple[str, str, str]] = {
    "plain": (_COLOURS[0], "circle", "solid"),
    "activation": (_COLOURS[1], "square", "dash"),
    "loss": (_COLOURS[3], "triangle-up", "dot"),
    None: (_COLOURS[2], "diamond", "solid"),
}
_POINTS = 200
_HEIGHT = 440

_AXIS = {
    "gridcolor": "#e2e6ea",
    "linecolor": "#9aa3ad",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#9aa3ad",
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8},
}
_TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", "size": 13},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": _COLOURS,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 70, "r": 16, "t": 24, "b": 48},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        # Plotly's own default would offer to send the figure to a server.
        "modebar": {"remove": ["sendChartToCloud"]},
        "hoverlabel": {"bgcolor": "white", "font": {"color": "#1b1f24"}, "namelength": -1},
    }
)


def plot_spectra(
    source: Analysis | Results, *, layers: Sequence[str] | None = None, plan: Plan | None = None
) -> go.Figure:
    """Singular values over the largest one, and the cumulative energy, by layer and metric, on logarithmic axes.

    Curves of more than 200 values are thinned evenly in log(rank); both ends and the marked ranks are exact.

    Args:
        source: Where the singular values come from.
        layers: Names of the layers to show; by default all.
        plan: Its ranks are marked; by default those of the chosen network, or of all networks when none is chosen.

    Raises:
        DataError: there are no singular values to show.
        PatternError: a name that is no layer's.
    """
    spectra = _spectra(source)
    names = list(dict.fromkeys(one.layer for one in spectra))
    shown = _require_known(layers, names) if layers is not None else names
    plans = (plan,) if plan is not None else relevant_plans(source) if isinstance(source, Results) else ()
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for spectrum in spectra:
        if spectrum.layer in shown:
            position = shown.index(spectrum.layer) if len(shown) > 1 else None
            _add_spectrum(figure, spectrum, plans, position=position)
    figure.update_layout(template=_TEMPLATE, height=_HEIGHT)
    figure.update_xaxes(type="log", title_text="Rank", dtick=1, minor_ticks="outside")
    figure.update_yaxes(type="log", title_text="Singular value / largest one", tickformat="~g", row=1, col=1)
    figure.update_yaxes(title_text="Cumulative energy (%)", range=[0, 104], row=1, col=2)
    return figure


def plot_accuracy(results: Results, *, against: Against = "rank") -> go.Figure:
    """Test accuracy of every network against its rank or a cost, by stage and metric, dense and published beside it.

    Error bars are ± the standard deviation over the seeds, or the 95 % interval where there is one seed.

    Raises:
        DataError: no network has both an accuracy and the cost asked for.
    """
    if against not in AGAINST:
        raise DataError(f"against={against!r}: give one of {', '.join(AGAINST)}")
    placed = {one.name: x for one in results.variants if one.accuracy is not None and (x := _position(one, against))}
    if not placed:
        raise DataError(f"no network of {results.title!r} has both an accuracy and a {against}; nothing to plot")
    shown = [one for one in results.variants if one.name in placed]
    figure = go.Figure()
    groups = words.grouped(shown)
    unmeasured = [label for label, group in groups.items() if group[0].metric is None]
    for label, group in groups.items():
        points = sorted(((placed[one.name], one) for one in group), key=lambda point: point[0])
        position = unmeasured.index(label) if label in unmeasured else 0
        figure.add_trace(_accuracy_trace(label, points, position=position))
    ends = sorted(placed.values())
    _add_dense(figure, results.dense, against, ends=(ends[0], ends[-1]))
    if against == "rank":
        _add_published(figure, results, ends=(ends[0], ends[-1]))
        ticks = sorted({int(x) for x in ends})
        figure.update_xaxes(tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    else:
        widest = max(ends[-1], _position(results.dense, against) or 0) / ends[0]
        digits_1_2_5 = {"dtick": "D2"} if widest > 4 else {}
        figure.update_xaxes(tickformat="~g" if against == "latency" else "~s", **digits_1_2_5)
    figure.update_xaxes(type="log", title_text=AGAINST[against])
    figure.update_yaxes(title_text="Test accuracy (%)")
    figure.update_layout(template=_TEMPLATE, height=_HEIGHT, meta=_zoom(results, shown))
    return figure


def plot_curves(results: Results) -> go.Figure:
    """Training loss, and accuracy on held-out data, by epoch: one line a seed, in the colour of its network.

    Raises:
        DataError: no network has a training curve.
    """
    trained = [one for one in (results.dense, *results.variants) if any(run.curve for run in one.runs)]
    if not trained:
        raise DataError(f"no network of {results.title!r} has a training curve; nothing to plot")
    held_out = any(epoch.held_out is not None for one in trained for run in one.runs for epoch in run.curve)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12) if held_out else go.Figure()
    rules = list(dict.fromkeys(_rule_label(one) for one in trained if one.stage != "dense"))
    for variant in trained:
        style = _curve_style(variant, rules)
        first = True
        for run in variant.runs:
            for trace in _curve_traces(variant, run, style):
                figure.add_trace(trace.update(showlegend=first and trace.yaxis is None))
            first = first and not run.curve
    figure.update_layout(template=_TEMPLATE, height=_HEIGHT)
    epochs = max(epoch.epoch for one in trained for run in one.runs for epoch in run.curve)
    figure.update_xaxes(title_text="Epoch", dtick=max(1, -(-epochs // 10)))
    figure.update_yaxes(type="log", title_text="Training loss", tickformat="~g")
    if held_out:
        figure.update_yaxes(type="linear", title_text="Held-out accuracy (%)", row=1, col=2)
    return figure


def plot_history(history: Sequence[Epoch]) -> go.Figure:
    """Training loss on a logarithmic axis, and accuracy on held-out data where it was taken, by epoch; the best marked.

    Raises:
        DataError: there is no epoch to show.
    """
    if not history:
        raise DataError("there is no epoch to plot: the history is empty")
    held = [(epoch.epoch + 1, 100 * epoch.held_out) for epoch in history if epoch.held_out is not None]
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12) if held else go.Figure()
    x, loss = [epoch.epoch + 1 for epoch in history], [epoch.loss for epoch in history]
    figure.add_trace(_line(x, loss, name="training loss", at=0, hover="epoch %{x}: loss %{y:.4g}"))
    if held:
        x, accuracy = [at for at, _ in held], [value for _, value in held]
        right = {"xaxis": "x2", "yaxis": "y2"}
        hover = "epoch %{x}: %{y:.2f} %"
        figure.add_trace(_line(x, accuracy, name="held-out accuracy", at=1, hover=hover).update(right))
        best = max(held, key=lambda point: point[1])
        star = {"symbol": "star", "size": 14, "color": _COLOURS[1], "line": {"color": "white", "width": 1}}
        mark = go.Scatter(x=[best[0]], y=[best[1]], name="best", mode="markers", marker=star, hovertemplate=hover)
        figure.add_trace(mark.update(right))
    figure.update_layout(template=_TEMPLATE, height=_HEIGHT)
    figure.update_xaxes(title_text="Epoch", dtick=max(1, -(-len(history) // 10)))
    figure.update_yaxes(type="log", title_text="Training loss", tickformat="~g")
    if held:
        figure.update_yaxes(type="linear", title_text="Held-out accuracy (%)", row=1, col=2)
    return figure


class Ranks(Protocol):
    """Ranks at one moment of training, such as an entry of `RankSchedule.history`."""

    @property
    def step(self) -> int:
        """Optimiser steps taken."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """By the layers' names."""

    @property
    def kept(self) -> float:
        """What the network costs, kept / dense."""


def plot_ranks(history: Sequence[Ranks]) -> go.Figure:
    """Each layer's rank, and the share of the cost that is kept, by optimiser step.

    Args:
        history: `RankSchedule.history`.

    Raises:
        DataError: there is nothing to show.
    """
    if not history:
        raise DataError("there are no ranks to plot: the history is empty; call step() of the schedule while training")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    steps = [record.step for record in history]
    for at, name in enumerate(history[-1].ranks):
        values = [record.ranks[name] for record in history]
        line = {"shape": "hv", "width": 2.2, "color": _COLOURS[at % len(_COLOURS)]}
        marker = {"symbol": _SYMBOLS[at % len(_SYMBOLS)], "size": 5}
        hover = f"step %{{x}}: {html.escape(name)} at rank %{{y}}<extra></extra>"
        figure.add_trace(
            go.Scatter(x=steps, y=values, name=html.escape(name), line=line, marker=marker, hovertemplate=hover)
        )
    kept = [100 * record.kept for record in history]
    line = {"shape": "hv", "width": 2.2, "color": _GREY}
    cost = go.Scatter(x=steps, y=kept, name="cost", line=line, hovertemplate="step %{x}: %{y:.1f} %<extra></extra>")
    figure.add_trace(cost, row=1, col=2)
    figure.update_layout(template=_TEMPLATE, height=_HEIGHT)
    figure.update_traces(mode="lines+markers")
    figure.update_xaxes(title_text="Optimiser step")
    figure.update_yaxes(title_text="Rank", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="Cost, kept / dense (%)", rangemode="tozero", row=1, col=2)
    return figure


def _line(x: list[int], y: list[float], *, name: str, at: int, hover: str) -> go.Scatter:
    colour = _COLOURS[at]
    marker = {"symbol": _SYMBOLS[at], "size": 7, "color": colour}
    line = {"color": colour, "width": 2.2, "dash": ("solid", "dash")[at]}
    return go.Scatter(x=x, y=y, name=name, mode="lines+markers", line=line, marker=marker, hovertemplate=hover)


def available(results: Results) -> tuple[Against, ...]:
    """What the accuracies can be plotted against."""
    measured = [one for one in results.variants if one.accuracy is not None]
    return tuple(against for against in AGAINST if any(_position(one, against) for one in measured))


def relevant_plans(results: Results) -> tuple[Plan, ...]:
    """The plan of the chosen network, or those of all networks when none is chosen."""
    chosen = results.variant(results.chosen).plan if results.chosen is not None else None
    if chosen is not None:
        return (chosen,)
    return tuple(one.plan for one in results.variants if one.plan is not None)


def _spectra(source: Analysis | Results) -> tuple[LayerSpectrum, ...]:
    if isinstance(source, Results):
        spectra = source.spectra
    elif isinstance(source, Analysis):
        spectra = tuple(
            LayerSpectrum(layer=one.name, kind=one.kind, shape=one.shape, metric=metric, values=tuple(values.values))
            for one in source
            for metric, values in one.spectra.items()
        )
    else:
        raise DataError(f"spectra come from an Analysis or from Results, and this is a {type(source).__name__}")
    if not spectra:
        raise DataError("there are no singular values to plot: the results hold no spectra, or no layer is a matrix")
    return tuple(one for one in spectra if one.values)


def _require_known(asked: Sequence[str], names: list[str]) -> list[str]:
    asked = [asked] if isinstance(asked, str) else list(asked)
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
            raise PatternError(f"no layer {name!r} among the spectra; near it: {', '.join(near)}")
    return asked


@dataclass(frozen=True)
class _Style:
    colour: str
    symbol: str
    dash: str


def _add_spectrum(figure: go.Figure, one: LayerSpectrum, plans: Sequence[Plan], *, position: int | None) -> None:
    """Both panels of one layer in one metric; `position` among several layers decides the colour."""
    colour, symbol, dash = _METRIC_STYLE[one.metric]
    if position is not None:
        colour, symbol = _COLOURS[position % len(_COLOURS)], _SYMBOLS[position % len(_SYMBOLS)]
    spectrum = Spectrum(np.array(one.values))
    largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
    at = _thinned(len(spectrum))
    marked = [rank for rank in words.kept_ranks(plans, layer=one.layer, metric=one.metric) if rank <= len(spectrum)]
    name = f"{one.metric} metric" if position is None else f"{_safe(one.layer)}, {one.metric}"
    # Rounding noise of a weight that lacks full rank would stretch the axis down to 1e-17.
    values = np.where(spectrum.values > 1e-9 * largest, spectrum.values / largest, np.nan)
    panels = ((values, "%{y:.3g} of the largest"), (100 * spectrum.cumulative_energy, "%{y:.2f} % of the energy"))
    for column, (curve, hover) in enumerate(panels, start=1):
        legend = {"name": name, "legendgroup": name, "showlegend": column == 1}
        line = {"color": colour, "dash": dash, "width": 2.2}
        figure.add_trace(
            go.Scatter(x=at, y=curve[at - 1], mode="lines", line=line, hovertemplate=f"%{{x}}: {hover}", **legend),
            row=1,
            col=column,
        )
        if marked:
            mark = go.Scatter(
                x=marked,
                y=[float(curve[rank - 1]) for rank in marked],
                mode="markers",
                marker={"symbol": symbol, "size": 11, "color": colour, "line": {"color": "white", "width": 1.5}},
                hovertemplate=f"kept rank %{{x}}: {hover}",
                **legend | {"name": f"{name}: kept rank"},
            )
            figure.add_trace(mark, row=1, col=column)


def _safe(name: str) -> str:
    """A name as plotly shows it literally: it reads labels as a small HTML."""
    return html.escape(name, quote=False)


def _thinned(length: int) -> Any:
    """The positions 1..length to draw, int array: all, or about 200 of them, evenly in their logarithm."""
    if length <= _POINTS:
        return np.arange(1, length + 1)
    return np.unique(np.rint(np.geomspace(1, length, _POINTS)).astype(int))


def _position(variant: Variant, against: Against) -> float | None:
    measurement = variant.measurement
    match against:
        case "rank":
            return words.one_rank(variant)
        case "params":
            return measurement.params
        case "macs":
            return measurement.macs
        case "latency":
            return measurement.latency_ms


def _bars(variant: Variant) -> tuple[float, float]:
    """How far the error bar reaches down and up, in percentage points."""
    if variant.spread is not None:
        return 100 * variant.spread, 100 * variant.spread
    interval = variant.runs[0].test.interval
    return 100 * (interval.value - interval.low), 100 * (interval.high - interval.value)


def _accuracy_trace(label: str, points: Sequence[tuple[float, Variant]], *, position: int) -> go.Scatter:
    """One group of networks; `position` tells those apart that have no metric."""
    colour, symbol, _ = _METRIC_STYLE[points[0][1].metric]
    if position:
        colour, symbol = _COLOURS[(2 + position) % len(_COLOURS)], _SYMBOLS[(2 + position) % len(_SYMBOLS)]
    fresh = points[0][1].stage == "zero-shot"
    down, up = zip(*(_bars(one) for _, one in points), strict=True)
    return go.Scatter(
        x=[x for x, _ in points],
        y=[100 * (one.accuracy or 0) for _, one in points],
        name=label,
        mode="lines+markers",
        line={"color": colour, "width": 2.2, "dash": "dot" if fresh else "solid"},
        marker={"symbol": f"{symbol}-open" if fresh else symbol, "size": 10, "line": {"width": 2}},
        error_y={"type": "data", "array": up, "arrayminus": down, "symmetric": False, "thickness": 1.4, "width": 5},
        customdata=[[_safe(one.name), words.accuracy(one)] for _, one in points],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )


def _add_dense(figure: go.Figure, dense: Variant, against: Against, *, ends: tuple[float, float]) -> None:
    if dense.accuracy is None:
        return
    place = _position(dense, against) if against != "rank" else None
    line = {"color": _GREY, "width": 2, "dash": "dash"}
    right = max(ends[1], place or 0)
    label = f"dense {words.percent(dense.accuracy)}"
    figure.add_trace(_level(label, dense.accuracy, (ends[0], right), line))
    if place:
        star = {"symbol": "star", "size": 13, "color": _GREY}
        hover = f"{label}<extra></extra>"
        y = [100 * dense.accuracy]
        figure.add_trace(go.Scatter(x=[place], y=y, mode="markers", marker=star, hovertemplate=hover, showlegend=False))


def _level(label: str, accuracy: float, ends: tuple[float, float], line: dict[str, Any]) -> go.Scatter:
    """A horizontal line a little beyond both ends."""
    x = [ends[0] / 1.12, ends[1] * 1.12]
    return go.Scatter(x=x, y=[100 * accuracy] * 2, name=label, mode="lines", line=line, hovertemplate=label)


def _add_published(figure: go.Figure, results: Results, *, ends: tuple[float, float]) -> None:
    for number, published in enumerate(results.published):
        colour = _COLOURS[(3 + number) % len(_COLOURS)]
        points = sorted((rank, value) for rank, value in published.accuracy if rank is not None)
        source = _safe(published.source)
        marker = {"symbol": "x-thin", "size": 11, "line": {"width": 3, "color": colour}}
        trace = go.Scatter(
            x=[rank for rank, _ in points],
            y=[100 * value for _, value in points],
            name=f"published: {source}",
            mode="markers",
            marker=marker,
            hovertemplate=f"{source}<br>rank %{{x}}: %{{y:.2f}} %<extra></extra>",
        )
        figure.add_trace(trace)
        for value in (value for rank, value in published.accuracy if rank is None):
            line = {"color": colour, "width": 1.5, "dash": "longdashdot"}
            figure.add_trace(_level(f"published dense {words.percent(value)}", value, ends, line))


def _zoom(results: Results, placed: Sequence[Variant]) -> dict[str, Any]:
    """The range (%) near the dense accuracy, where the rest of the scale would hide what happens there."""
    tuned = [100 * (one.accuracy or 0) for one in placed if one.stage in ("fine-tuned", "trained")]
    everything = [100 * (one.accuracy or 0) for one in placed]
    top = max(100 * (results.dense.accuracy or 0), *everything)
    if not tuned or top - min(everything) < 3 * (top - min(tuned)):
        return {}
    margin = 0.15 * max(top - min(tuned), 0.5)
    return {"zoom": [min(tuned) - margin, top + margin]}


def _rule_label(variant: Variant) -> str:
    """What colours a curve: the rank, or the name of what was trained at one."""
    return words.asked(variant.rule) if variant.rule is not None and variant.stage != "trained" else variant.name


def _curve_style(variant: Variant, rules: list[str]) -> _Style:
    if variant.stage == "dense":
        return _Style(_GREY, "star", "longdash")
    position = rules.index(_rule_label(variant))
    dash = _METRIC_STYLE[variant.metric][2]
    return _Style(_COLOURS[position % len(_COLOURS)], _SYMBOLS[position % len(_SYMBOLS)], dash)


def _curve_traces(variant: Variant, run: Run, style: _Style) -> Iterator[go.Scatter]:
    """The loss, and the held-out accuracy where it was taken, of one seed."""
    name = _safe(variant.name)
    common: dict[str, Any] = {
        "mode": "lines+markers",
        "name": name,
        "legendgroup": name,
        "line": {"color": style.colour, "dash": style.dash, "width": 1.8},
        "marker": {"symbol": style.symbol, "size": 6, "color": style.colour, "maxdisplayed": 12},
        "opacity": 0.85,
    }
    where = f"seed {run.seed}, epoch %{{x}}"
    if run.curve:
        x, loss = [epoch.epoch for epoch in run.curve], [epoch.loss for epoch in run.curve]
        yield go.Scatter(x=x, y=loss, hovertemplate=f"{where}: loss %{{y:.4g}}", **common)
    held = [(epoch.epoch, 100 * epoch.held_out) for epoch in run.curve if epoch.held_out is not None]
    if held:
        x, accuracy = [epoch for epoch, _ in held], [value for _, value in held]
        axes = {"xaxis": "x2", "yaxis": "y2"}
        yield go.Scatter(x=x, y=accuracy, hovertemplate=f"{where}: %{{y:.2f}} %", **axes, **common)
