"""Spectra and training curves as figures. Groups differ in marker or dash as well as in colour."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import plotly.graph_objects as go

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Epoch
from spectrim.core.errors import DataError, PatternError
from spectrim.core.plans import Plan
from spectrim.layers.selection import near
from spectrim.linalg import Spectrum
from spectrim.reporting import words
from spectrim.reporting.results import LayerSpectrum, Results, Variant, spectra_of
from spectrim.reporting.style import COLOURS, GREY, METRIC_STYLE, Style, panels, safe

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
    if not isinstance(source, Analysis | Results):
        raise DataError(f"spectra come from an Analysis or from Results, and this is a {type(source).__name__}")
    spectra = source.spectra if isinstance(source, Results) else spectra_of(source)
    if not spectra:
        raise DataError("there are no singular values to plot: the results hold no spectra, or no layer is a matrix")
    names = list(dict.fromkeys(spectrum.layer for spectrum in spectra if spectrum.values))
    selected = names if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for name in selected:
        if name not in names:
            raise PatternError(f"no layer {name!r} among the spectra{near(name, names)}")
    plans = (plan,) if plan is not None else relevant_plans(source) if isinstance(source, Results) else ()
    figure = panels(2)
    for spectrum in spectra:
        if spectrum.layer in selected and spectrum.values:
            position = selected.index(spectrum.layer) if len(selected) > 1 else None
            _add_spectrum(figure, spectrum, plans, position=position)
    figure.update_xaxes(type="log", title_text="Rank", dtick=1, minor_ticks="outside")
    figure.update_yaxes(type="log", title_text="Singular value / largest one", tickformat="~g", row=1, col=1)
    return figure.update_yaxes(title_text="Explained variance (%)", range=[0, 104], row=1, col=2)


def plot_curves(results: Results) -> go.Figure:
    """Training loss, and accuracy on held-out data, by epoch: one line a seed, in the colour of its network.

    Raises:
        DataError: no network has a training curve.
    """
    trained = [variant for variant in (results.dense, *results.variants) if any(run.curve for run in variant.runs)]
    if not trained:
        raise DataError(f"no network of {results.title!r} has a training curve; nothing to plot")
    labels = list(dict.fromkeys(_curve_label(variant) for variant in trained if variant.stage != "dense"))
    figure = _training_figure([run.curve for variant in trained for run in variant.runs])
    for variant in trained:
        style = _curve_style(variant, labels)
        common = {
            "name": safe(variant.name),
            "legendgroup": safe(variant.name),
            "line": {"color": style.colour, "dash": style.dash, "width": 1.8},
            "marker": {"symbol": style.symbol, "size": 6, "color": style.colour, "maxdisplayed": 12},
            "opacity": 0.85,
        }
        for number, run in enumerate(run for run in variant.runs if run.curve):
            for trace in _curve_traces(run.curve, seed=f"seed {run.seed}, "):
                figure.add_trace(trace.update(common, showlegend=number == 0 and trace.xaxis is None))
    return figure


def plot_history(history: Sequence[Epoch]) -> go.Figure:
    """Training loss on a logarithmic axis, and accuracy on held-out data where it was taken, by epoch; the best marked.

    Raises:
        DataError: there is no epoch to show.
    """
    if not history:
        raise DataError("there is no epoch to plot: the history is empty")
    figure = _training_figure([history])
    names = ("training loss", "held-out accuracy")
    for trace, name, style in zip(_curve_traces(history), names, (Style.at(0), Style.at(1, dash="dash")), strict=False):
        line = {"color": style.colour, "width": 2.2, "dash": style.dash}
        marker = {"symbol": style.symbol, "size": 7, "color": style.colour}
        figure.add_trace(trace.update(name=name, line=line, marker=marker))
    if len(figure.data) > 1:
        held_out = figure.data[1]
        epoch, accuracy = max(zip(held_out.x, held_out.y, strict=True), key=lambda point: point[1])
        star = {"symbol": "star", "size": 14, "color": COLOURS[1], "line": {"color": "white", "width": 1}}
        best = go.Scatter(x=[epoch], y=[accuracy], name="best", mode="markers", marker=star)
        figure.add_trace(best.update(hovertemplate=held_out.hovertemplate, xaxis="x2", yaxis="y2"))
    return figure


def _training_figure(curves: Sequence[Sequence[Epoch]]) -> go.Figure:
    """Axes for the loss, and for held-out accuracies where some were taken."""
    epochs = [epoch for curve in curves for epoch in curve]
    held_out = any(epoch.held_out is not None for epoch in epochs)
    figure = panels(2 if held_out else 1)
    figure.update_xaxes(title_text="Epoch", dtick=max(1, -(-(1 + max(epoch.epoch for epoch in epochs)) // 10)))
    figure.update_yaxes(tickformat="~g").update_layout(yaxis_type="log", yaxis_title_text="Training loss")
    return figure.update_layout(yaxis2_title_text="Held-out accuracy (%)") if held_out else figure


def _curve_traces(curve: Sequence[Epoch], *, seed: str = "") -> Iterator[go.Scatter]:
    """The loss, and the held-out accuracy where it was taken; epochs count from 1."""
    hover = f"{seed}epoch %{{x}}: "
    x, loss = [epoch.epoch + 1 for epoch in curve], [epoch.loss for epoch in curve]
    yield go.Scatter(x=x, y=loss, mode="lines+markers", hovertemplate=f"{hover}loss %{{y:.4g}}")
    points = [(epoch.epoch + 1, 100 * epoch.held_out) for epoch in curve if epoch.held_out is not None]
    if points:
        x, accuracy = [epoch for epoch, _ in points], [share for _, share in points]
        axes = {"xaxis": "x2", "yaxis": "y2"}
        yield go.Scatter(x=x, y=accuracy, mode="lines+markers", hovertemplate=f"{hover}%{{y:.2f}} %", **axes)


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
    figure = panels(2)
    steps = [record.step for record in history]
    for position, layer in enumerate(history[-1].ranks):
        style, name = Style.at(position), safe(layer)
        figure.add_scatter(
            x=steps,
            y=[record.ranks[layer] for record in history],
            name=name,
            line={"shape": "hv", "width": 2.2, "color": style.colour},
            marker={"symbol": style.symbol, "size": 5},
            hovertemplate=f"step %{{x}}: {name} at rank %{{y}}<extra></extra>",
        )
    costs = [100 * record.kept for record in history]
    line = {"shape": "hv", "width": 2.2, "color": GREY}
    hover = "step %{x}: %{y:.1f} %<extra></extra>"
    figure.add_scatter(x=steps, y=costs, name="cost", line=line, hovertemplate=hover, row=1, col=2)
    figure.update_traces(mode="lines+markers")
    figure.update_xaxes(title_text="Optimiser step")
    figure.update_yaxes(title_text="Rank", rangemode="tozero", row=1, col=1)
    return figure.update_yaxes(title_text="Cost, kept / dense (%)", rangemode="tozero", row=1, col=2)


def relevant_plans(results: Results) -> tuple[Plan, ...]:
    """The plan of the chosen network, or those of all networks when none is chosen."""
    chosen = [variant for variant in results.variants if variant.name == results.chosen and variant.plan is not None]
    return tuple(variant.plan for variant in chosen or results.variants if variant.plan is not None)


def _add_spectrum(figure: go.Figure, layer: LayerSpectrum, plans: Sequence[Plan], *, position: int | None) -> None:
    """Both panels of one layer in one metric; `position` among several layers decides the colour."""
    style = METRIC_STYLE[layer.metric]
    name = f"{layer.metric} metric"
    if position is not None:
        style, name = Style.at(position, dash=style.dash), f"{safe(layer.layer)}, {layer.metric}"
    spectrum = Spectrum(np.array(layer.values))
    largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
    # all ranks, or about 200 of them, evenly in their logarithm
    at = np.unique(np.rint(np.geomspace(1, len(spectrum), _POINTS)).astype(int))
    at = at if len(spectrum) > _POINTS else np.arange(1, len(spectrum) + 1)
    marked = [rank for rank in words.kept_ranks(plans, layer=layer.layer, metric=layer.metric) if rank <= len(spectrum)]
    # Rounding noise of a weight that lacks full rank would stretch the axis down to 1e-17.
    values = np.where(spectrum.values > 1e-9 * largest, spectrum.values / largest, np.nan)
    curves = ((values, "%{y:.3g} of the largest"), (100 * words.explained(layer), "%{y:.2f} % of the energy"))
    line = {"color": style.colour, "dash": style.dash, "width": 2.2}
    marker = {"symbol": style.symbol, "size": 11, "color": style.colour, "line": {"color": "white", "width": 1.5}}
    for column, (curve, hover) in enumerate(curves, start=1):
        common = {"legendgroup": name, "showlegend": column == 1, "row": 1, "col": column}
        lines = {"name": name, "mode": "lines", "line": line, "hovertemplate": f"%{{x}}: {hover}"}
        figure.add_scatter(x=at, y=curve[at - 1], **lines, **common)
        if marked:
            marks = {"name": f"{name}: kept rank", "mode": "markers", "marker": marker}
            y = [float(curve[rank - 1]) for rank in marked]
            figure.add_scatter(x=marked, y=y, hovertemplate=f"kept rank %{{x}}: {hover}", **marks, **common)


def _curve_label(variant: Variant) -> str:
    """What decides the colour of a curve: the rule, or the name of what was trained at low rank."""
    return words.rule_text(variant.rule) if variant.rule is not None and variant.stage != "trained" else variant.name


def _curve_style(variant: Variant, labels: list[str]) -> Style:
    if variant.stage == "dense":
        return Style(GREY, "star", "longdash")
    return Style.at(labels.index(_curve_label(variant)), dash=METRIC_STYLE[variant.metric].dash)
