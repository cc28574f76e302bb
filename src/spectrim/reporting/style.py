"""How every figure looks: colours, markers, and the template of axes and legends."""

import html
from dataclasses import dataclass

import plotly.graph_objects as go

from spectrim.core.plans import Metric

# Okabe & Ito's palette, told apart with every common kind of colour blindness, less black and yellow, which vanish on
# a dark or on a white page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
GREY = "#808790"
METRIC_STYLE: dict[Metric | None, tuple[str, str, str]] = {
    "plain": (COLOURS[0], "circle", "solid"),
    "activation": (COLOURS[1], "square", "dash"),
    "loss": (COLOURS[3], "triangle-up", "dot"),
    None: (COLOURS[2], "diamond", "solid"),
}
HEIGHT = 440

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
TEMPLATE = go.layout.Template(
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


@dataclass(frozen=True)
class Style:
    """How one group is drawn, so that colour is never alone."""

    colour: str
    symbol: str
    dash: str


def safe(name: str) -> str:
    """A name as plotly shows it literally: it reads labels as a small HTML."""
    return html.escape(name, quote=False)
