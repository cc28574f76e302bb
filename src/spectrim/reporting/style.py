"""How every figure looks: colours, markers, panels, error bars, and the template of axes and legends."""

import copy
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spectrim.core.plans import Metric
from spectrim.runtimes.timing import Interval

# Okabe & Ito's palette, told apart with every common kind of colour blindness, less black and yellow, which vanish on
# a dark or on a white page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
GREY = "#808790"
HEIGHT = 440


@dataclass(frozen=True)
class Style:
    """How one group is drawn; the symbol or the dash differs where the colour does."""

    colour: str
    symbol: str
    dash: str = "solid"

    @classmethod
    def at(cls, position: int, *, dash: str = "solid") -> "Style":
        """That of the group at this position; colours and symbols repeat after a while."""
        return cls(COLOURS[position % len(COLOURS)], SYMBOLS[position % len(SYMBOLS)], dash)


METRIC_STYLE: dict[Metric | None, Style] = {
    "plain": Style(COLOURS[0], "circle"),
    "activation": Style(COLOURS[1], "square", "dash"),
    "loss": Style(COLOURS[3], "triangle-up", "dot"),
    None: Style(COLOURS[2], "diamond"),
}

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
        "colorway": COLOURS,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 70, "r": 16, "t": 24, "b": 48},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        # Plotly's own default would offer to send the figure to a server.
        "modebar": {"remove": ["sendChartToCloud"]},
        "hoverlabel": {"bgcolor": "white", "font": {"color": "#1b1f24"}, "namelength": -1},
    }
)


Trace = dict[str, Any]
"""What is drawn, as plotly's JSON has it; a scatter plot unless it names another type."""

RIGHT: Trace = {"xaxis": "x2", "yaxis": "y2"}
"""The axes of a trace in the second panel."""


def build(
    traces: Iterable[Trace], *, x: dict[str, Any], y: Sequence[dict[str, Any]], layout: Mapping[str, Any] | None = None
) -> go.Figure:
    """A figure of as many panels side by side as there are y axes, all with the same x axis.

    Traces and layout are set at once: plotly takes much longer to change a figure afterwards.
    """
    figure = copy.deepcopy(_grid(len(y)))
    everything = figure.layout.to_plotly_json() | dict(layout or {})
    traces = list(traces)
    for number, axis in zip(("", "2"), y, strict=False):
        for side, options in (("x", x), ("y", axis)):
            values = [value for trace in traces if trace.get("yaxis", "y") == f"y{number}" for value in trace[side]]
            ticks = _log_ticks(values) if options.get("type") == "log" else {}
            everything[f"{side}axis{number}"] |= ticks | options
    figure.layout = everything
    return figure.add_traces(traces)


def _log_ticks(values: Iterable[float | None]) -> dict[str, Any]:
    """So few labels on a logarithmic axis that they do not touch; plotly itself would write every digit."""
    positive = [value for value in values if value and value > 0] or [1.0]
    decades = math.log10(max(positive) / min(positive))
    return {"dtick": 1} if decades > 4 else {"dtick": "D2"} if decades > 0.6 else {"nticks": 6}


@cache
def _grid(panels: int) -> go.Figure:
    figure = make_subplots(rows=1, cols=panels, horizontal_spacing=0.12)
    return figure.update_layout(template=_TEMPLATE, height=HEIGHT)


def error_bars(reaches: Sequence[tuple[float, float]], *, width: int = 5) -> dict[str, Any]:
    """Error bars from how far each reaches down and up."""
    down, up = zip(*reaches, strict=True)
    return {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1.4, "width": width}


def reach(interval: Interval) -> tuple[float, float]:
    """How far an interval of shares reaches down and up from its value, in percentage points."""
    return 100 * (interval.value - interval.low), 100 * (interval.high - interval.value)


def safe(name: str) -> str:
    """A name as plotly shows it literally: it reads labels as a small HTML."""
    return html.escape(name, quote=False)
