"""Spectra and training curves as figures. Colour never speaks alone: markers and dashes differ too."""

import difflib
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Epoch
from spectrim.core.errors import DataError, PatternError
from spectrim.core.plans import Plan
from spectrim.linalg import Spectrum
from spectrim.reporting import words
from spectrim.reporting.results import LayerSpectrum, Results, Run, Variant, spectra_of
from spectrim.reporting.style import COLOURS, GREY, HEIGHT, METRIC_STYLE, SYMBOLS, TEMPLATE, Style, safe

_POINTS = 200


def plot_spectra(
    source: Analysis | Results, *, layers: Sequence[str] | None = None, plan: Plan | None = None
) -> go.Figure:
    """Singular values over the largest one, and the explained variance (cumulative energy), by layer and metric.

    Ranks are on a logarithmic axis. Curves of more than 200 values are thinned evenly in log(rank); both ends and the
    marked ranks are exact.

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
    figure.update_layout(template=TEMPLATE, height=HEIGHT)
    figure.update_xaxes(type="log", title_text="Rank", dtick=1, minor_ticks="outside")
    figure.update_yaxes(type="log", title_text="Singular value / largest one", tickformat="~g", row=1, col=1)
    figure.update_yaxes(title_text="Explained variance (%)", range=[0, 104], row=1, col=2)
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
    figure.update_layout(template=TEMPLATE, height=HEIGHT)
    epochs = 1 + max(epoch.epoch for one in trained for run in one.runs for epoch in run.curve)
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
        star = {"symbol": "star", "size": 14, "color": COLOURS[1], "line": {"color": "white", "width": 1}}
        mark = go.Scatter(x=[best[0]], y=[best[1]], name="best", mode="markers", marker=star, hovertemplate=hover)
        figure.add_trace(mark.update(right))
    figure.update_layout(template=TEMPLATE, height=HEIGHT)
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
        line = {"shape": "hv", "width": 2.2, "color": COLOURS[at % len(COLOURS)]}
        marker = {"symbol": SYMBOLS[at % len(SYMBOLS)], "size": 5}
        hover = f"step %{{x}}: {html.escape(name)} at rank %{{y}}<extra></extra>"
        figure.add_trace(
            go.Scatter(x=steps, y=values, name=html.escape(name), line=line, marker=marker, hovertemplate=hover)
        )
    kept = [100 * record.kept for record in history]
    line = {"shape": "hv", "width": 2.2, "color": GREY}
    cost = go.Scatter(x=steps, y=kept, name="cost", line=line, hovertemplate="step %{x}: %{y:.1f} %<extra></extra>")
    figure.add_trace(cost, row=1, col=2)
    figure.update_layout(template=TEMPLATE, height=HEIGHT)
    figure.update_traces(mode="lines+markers")
    figure.update_xaxes(title_text="Optimiser step")
    figure.update_yaxes(title_text="Rank", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="Cost, kept / dense (%)", rangemode="tozero", row=1, col=2)
    return figure


def _line(x: list[int], y: list[float], *, name: str, at: int, hover: str) -> go.Scatter:
    colour = COLOURS[at]
    marker = {"symbol": SYMBOLS[at], "size": 7, "color": colour}
    line = {"color": colour, "width": 2.2, "dash": ("solid", "dash")[at]}
    return go.Scatter(x=x, y=y, name=name, mode="lines+markers", line=line, marker=marker, hovertemplate=hover)


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
        spectra = spectra_of(source)
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


def _add_spectrum(figure: go.Figure, one: LayerSpectrum, plans: Sequence[Plan], *, position: int | None) -> None:
    """Both panels of one layer in one metric; `position` among several layers decides the colour."""
    colour, symbol, dash = METRIC_STYLE[one.metric]
    if position is not None:
        colour, symbol = COLOURS[position % len(COLOURS)], SYMBOLS[position % len(SYMBOLS)]
    spectrum = Spectrum(np.array(one.values))
    largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
    at = _thinned(len(spectrum))
    marked = [rank for rank in words.kept_ranks(plans, layer=one.layer, metric=one.metric) if rank <= len(spectrum)]
    name = f"{one.metric} metric" if position is None else f"{safe(one.layer)}, {one.metric}"
    # Rounding noise of a weight that lacks full rank would stretch the axis down to 1e-17.
    values = np.where(spectrum.values > 1e-9 * largest, spectrum.values / largest, np.nan)
    panels = ((values, "%{y:.3g} of the largest"), (100 * words.explained(one), "%{y:.2f} % of the energy"))
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


def _thinned(length: int) -> Any:
    """The positions 1..length to draw, int array: all, or about 200 of them, evenly in their logarithm."""
    if length <= _POINTS:
        return np.arange(1, length + 1)
    return np.unique(np.rint(np.geomspace(1, length, _POINTS)).astype(int))


def _rule_label(variant: Variant) -> str:
    """What colours a curve: the rank, or the name of what was trained at one."""
    return words.asked(variant.rule) if variant.rule is not None and variant.stage != "trained" else variant.name


def _curve_style(variant: Variant, rules: list[str]) -> Style:
    if variant.stage == "dense":
        return Style(GREY, "star", "longdash")
    position = rules.index(_rule_label(variant))
    dash = METRIC_STYLE[variant.metric][2]
    return Style(COLOURS[position % len(COLOURS)], SYMBOLS[position % len(SYMBOLS)], dash)


def _curve_traces(variant: Variant, run: Run, style: Style) -> Iterator[go.Scatter]:
    """The loss, and the held-out accuracy where it was taken, of one seed."""
    name = safe(variant.name)
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
        x, loss = [epoch.epoch + 1 for epoch in run.curve], [epoch.loss for epoch in run.curve]
        yield go.Scatter(x=x, y=loss, hovertemplate=f"{where}: loss %{{y:.4g}}", **common)
    held = [(epoch.epoch + 1, 100 * epoch.held_out) for epoch in run.curve if epoch.held_out is not None]
    if held:
        x, accuracy = [epoch for epoch, _ in held], [value for _, value in held]
        axes = {"xaxis": "x2", "yaxis": "y2"}
        yield go.Scatter(x=x, y=accuracy, hovertemplate=f"{where}: %{{y:.2f}} %", **axes, **common)
