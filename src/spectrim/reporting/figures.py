"""Spectra and training curves as figures. Groups differ in marker or dash as well as in colour."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import plotly.graph_objects as go

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Epoch
from spectrim.core.arguments import checked
from spectrim.core.errors import DataError, DependencyError, EngineError, PatternError, near
from spectrim.core.files import write_atomically
from spectrim.core.plans import Plan
from spectrim.linalg import Spectrum
from spectrim.reporting import words
from spectrim.reporting.results import LayerSpectrum, Results, spectra_of
from spectrim.reporting.style import COLOURS, GREY, METRIC_STYLE, RIGHT, Style, Trace, build, safe

FORMATS = ("png", "svg", "pdf")
_POINTS = 200


@checked
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
    traces: list[Trace] = []
    for spectrum in spectra:
        if spectrum.layer in selected and spectrum.values:
            position = selected.index(spectrum.layer) if len(selected) > 1 else None
            traces += _spectrum_traces(spectrum, plans, position=position)
    values = {"type": "log", "title": "Singular value / largest one", "tickformat": "~g"}
    explained = {"title": "Explained variance (%)", "range": [0, 104]}
    ranks = {"type": "log", "title": "Rank", "dtick": 1, "minor": {"ticks": "outside"}}
    return build(traces, x=ranks, y=[values, explained])


@checked
def plot_curves(results: Results) -> go.Figure:
    """Training loss, and accuracy on held-out data, by epoch: one line per seed, in the colour of its network.

    Raises `DataError` where no network has a training curve.
    """
    trained = [variant for variant in (results.dense, *results.variants) if any(run.curve for run in variant.runs)]
    if not trained:
        raise DataError(f"no network of {results.title!r} has a training curve; nothing to plot")
    traces: list[Trace] = []
    positions: dict[str, int] = {}
    for variant in trained:
        # a colour for each rule, and for each network that was trained at low rank
        by_rule = variant.rule is not None and variant.stage != "trained"
        label = words.rule_text(variant.rule) if by_rule else variant.name
        if variant.stage == "dense":
            style = Style(GREY, "star", "longdash")
        else:
            style = Style.at(positions.setdefault(label, len(positions)), dash=METRIC_STYLE[variant.metric].dash)
        common = {
            "name": safe(variant.name),
            "legendgroup": safe(variant.name),
            "line": {"color": style.colour, "dash": style.dash, "width": 1.8},
            "marker": {"symbol": style.symbol, "size": 6, "color": style.colour, "maxdisplayed": 12},
            "opacity": 0.85,
        }
        for number, run in enumerate(run for run in variant.runs if run.curve):
            for trace in _curve_traces(run.curve, seed=f"seed {run.seed}, "):
                traces.append(trace | common | {"showlegend": number == 0 and "xaxis" not in trace})
    return _training_figure(traces, [run.curve for variant in trained for run in variant.runs])


@checked
def plot_history(history: Sequence[Epoch]) -> go.Figure:
    """Training loss on a logarithmic axis, and accuracy or loss on held-out data if taken, by epoch; the best marked.

    Raises `DataError` where there is no epoch to show.
    """
    if not history:
        raise DataError("there is no epoch to plot: the history is empty")
    loss, *held_out = _curve_traces(history)
    traces = [loss | {"name": "training loss"} | _line_and_marker(Style.at(0))]
    for trace in held_out:
        is_accuracy = "xaxis" in trace
        best_of = max if is_accuracy else min
        epoch, value = best_of(zip(trace["x"], trace["y"], strict=True), key=lambda point: point[1])
        star = {"symbol": "star", "size": 14, "color": COLOURS[1], "line": {"color": "white", "width": 1}}
        best = {"x": [epoch], "y": [value], "name": "best", "mode": "markers", "marker": star}
        name = "held-out accuracy" if is_accuracy else "held-out loss"
        traces += [trace | {"name": name} | _line_and_marker(Style.at(1, dash="dash")), trace | best]
    return _training_figure(traces, [history])


def _line_and_marker(style: Style) -> Trace:
    line = {"color": style.colour, "width": 2.2, "dash": style.dash}
    return {"line": line, "marker": {"symbol": style.symbol, "size": 7, "color": style.colour}}


def _training_figure(traces: Sequence[Trace], curves: Sequence[Sequence[Epoch]]) -> go.Figure:
    """With axes for the loss, and for held-out accuracies where some were taken."""
    epochs = 1 + max(epoch.epoch for curve in curves for epoch in curve)
    loss = {"type": "log", "title": "Training loss", "tickformat": "~g"}
    held_out = {"title": "Held-out accuracy (%)", "tickformat": "~g"}
    right = any("xaxis" in trace for trace in traces)
    x = {"title": "Epoch", "dtick": max(1, -(-epochs // 10))}
    return build(traces, x=x, y=[loss, held_out] if right else [loss])


def _curve_traces(curve: Sequence[Epoch], *, seed: str = "") -> Iterator[Trace]:
    """The loss, and the held-out accuracy or loss where it was taken; epochs count from 1."""
    hover = f"{seed}epoch %{{x}}: "
    x, loss = [epoch.epoch + 1 for epoch in curve], [epoch.loss for epoch in curve]
    yield {"x": x, "y": loss, "mode": "lines+markers", "hovertemplate": f"{hover}loss %{{y:.4g}}"}
    points = [(epoch.epoch + 1, 100 * epoch.held_out) for epoch in curve if epoch.held_out is not None]
    if points:
        epochs, accuracies = zip(*points, strict=True)
        yield {"x": epochs, "y": accuracies, "mode": "lines+markers", "hovertemplate": f"{hover}%{{y:.2f}} %", **RIGHT}
    losses = [(epoch.epoch + 1, epoch.held_out_loss) for epoch in curve if epoch.held_out_loss is not None]
    if losses:
        x, y = map(list, zip(*losses, strict=True))
        yield {"x": x, "y": y, "mode": "lines+markers", "hovertemplate": f"{hover}held-out loss %{{y:.4g}}"}


class Ranks(Protocol):
    """The ranks of all layers by name after a number of optimiser steps, and what the network costs, kept / dense."""

    step: int
    ranks: Mapping[str, int]
    kept: float


@checked
def plot_ranks(history: Sequence[Ranks]) -> go.Figure:
    """Each layer's rank, and the share of the cost that is kept, by optimiser step, from `RankSchedule.history`.

    Raises `DataError` where there is nothing to show.
    """
    if not history:
        raise DataError("there are no ranks to plot: the history is empty; call step() of the schedule while training")
    step = {"x": [record.step for record in history], "mode": "lines+markers"}
    traces: list[Trace] = []
    for position, layer in enumerate(history[-1].ranks):
        style, name = Style.at(position), safe(layer)
        trace = {
            "y": [record.ranks[layer] for record in history],
            "name": name,
            "line": {"shape": "hv", "width": 2.2, "color": style.colour},
            "marker": {"symbol": style.symbol, "size": 5},
            "hovertemplate": f"step %{{x}}: {name} at rank %{{y}}<extra></extra>",
        }
        traces.append(step | trace)
    cost = {
        "y": [100 * record.kept for record in history],
        "name": "cost",
        "line": {"shape": "hv", "width": 2.2, "color": GREY},
        "hovertemplate": "step %{x}: %{y:.1f} %<extra></extra>",
    }
    y = [{"title": text, "rangemode": "tozero"} for text in ("Rank", "Cost, kept / dense (%)")]
    return build([*traces, step | cost | RIGHT], x={"title": "Optimiser step"}, y=y)


def relevant_plans(results: Results) -> tuple[Plan, ...]:
    """The plan of the chosen network, or those of all networks when none is chosen."""
    chosen = [variant for variant in results.variants if variant.name == results.chosen and variant.plan is not None]
    return tuple(variant.plan for variant in chosen or results.variants if variant.plan is not None)


def _spectrum_traces(layer: LayerSpectrum, plans: Sequence[Plan], *, position: int | None) -> Iterator[Trace]:
    """Both panels of one layer in one metric; `position` among several layers decides the colour."""
    style, name = METRIC_STYLE[layer.metric], f"{layer.metric} metric"
    if position is not None:
        style, name = Style.at(position, dash=style.dash), f"{safe(layer.layer)}, {layer.metric}"
    spectrum = Spectrum(np.array(layer.values))
    largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
    # all ranks, or about 200 of them, evenly in their logarithm
    at = np.unique(np.rint(np.geomspace(1, len(spectrum), _POINTS)).astype(int))
    at = at if len(spectrum) > _POINTS else np.arange(1, len(spectrum) + 1)
    planned = words.planned_ranks(plans, layer=layer.layer, metric=layer.metric)
    marked = [rank for rank in planned if rank <= len(spectrum)]
    # Rounding noise of a weight that lacks full rank would stretch the axis down to 1e-17.
    values = np.where(spectrum.values > 1e-9 * largest, spectrum.values / largest, np.nan)
    explained = 100 * words.explained(layer)
    panels = ((values, "%{y:.3g} of the largest", False), (explained, "%{y:.2f} % of the energy", True))
    line = {"color": style.colour, "dash": style.dash, "width": 2.2}
    marker = {"symbol": style.symbol, "size": 11, "color": style.colour, "line": {"color": "white", "width": 1.5}}
    for curve, hover, right in panels:
        common = {"name": name, "legendgroup": name, "showlegend": not right, **(RIGHT if right else {})}
        lines = {"mode": "lines", "line": line, "hovertemplate": f"%{{x}}: {hover}"}
        yield common | lines | {"x": at, "y": curve[at - 1]}
        if marked:
            marks = {"name": f"{name}: kept rank", "mode": "markers", "marker": marker}
            y = [float(curve[rank - 1]) for rank in marked]
            yield common | marks | {"x": marked, "y": y, "hovertemplate": f"kept rank %{{x}}: {hover}"}


@checked
def save_figure(
    figure: go.Figure, path: str | Path, *, width: int = 700, height: int = 420, scale: float = 3.0
) -> Path:
    """Write a figure as `.png`, `.svg` or `.pdf`, whichever the path ends in.

    Args:
        figure: From one of the `plot_` functions, or any other of plotly.
        path: The file to write.
        width: In pixels; in a `.pdf`, 1/96 inch each.
        height: Likewise.
        scale: Pixels of a `.png` for each of these.

    Raises:
        DataError: another ending, or a value that is not a figure.
        DependencyError: kaleido, which draws plotly's figures into files, is not installed.
        EngineError: kaleido finds no Chrome or Chromium to draw with, or that fails.
        FileError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(figure, go.Figure):
        raise DataError(f"save_figure takes a plotly figure, and this is a {type(figure).__name__}")
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise DataError(f"{path} does not end in a format of figures; let it end in {', '.join(FORMATS)}")
    if find_spec("kaleido") is None:
        raise DependencyError(
            "figures are drawn into files by the package kaleido, which is not installed; "
            'pip install "spectrim[figures]"'
        )
    try:
        drawn = figure.to_image(format=kind, width=width, height=height, scale=scale if kind == "png" else 1)
    except RuntimeError as error:  # how plotly and kaleido say that there is no browser, or that it failed
        raise EngineError(
            f"kaleido could not draw the figure: {str(error).strip()}; install Chrome or Chromium, or name one in the "
            "environment variable BROWSER_PATH"
        ) from error
    return write_atomically(path, lambda part: part.write_bytes(drawn))
