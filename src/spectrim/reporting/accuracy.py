"""Accuracies as figures: every network against its costs, and every class against what it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from spectrim.core.arguments import checked
from spectrim.core.errors import DataError
from spectrim.reporting import words
from spectrim.reporting.results import Changes, ClassChange, Published, PublishedPoint, Results, Variant
from spectrim.reporting.style import COLOURS, GREY, HEIGHT, METRIC_STYLE, Style, Trace, build, error_bars, reach, safe

Against = Literal["rank", "params", "macs", "latency"]


class Axis(NamedTuple):
    """What accuracies are plotted against: where a network stands, and what a published one keeps, kept / dense."""

    label: str
    title: str
    place: Callable[[Variant], float | None]
    ratio: Callable[[PublishedPoint], float | None]


AXES: dict[Against, Axis] = {
    "rank": Axis("Rank", "Rank kept in each factored layer", words.shared_rank, lambda point: None),
    "params": Axis("Parameters", "Parameters", attrgetter("measurement.params"), attrgetter("params_ratio")),
    "macs": Axis("MACs", "MACs of one forward pass", attrgetter("measurement.macs"), attrgetter("macs_ratio")),
    "latency": Axis(
        "Latency",
        "Latency of one forward pass (ms)",
        attrgetter("measurement.latency_ms"),
        lambda point: point.speedup and 1 / point.speedup,
    ),
}

_CLASSES = 60


@checked
def plot_accuracy(results: Results, *, against: Against = "rank") -> go.Figure:
    """Test accuracy of every network against its rank or a cost, dense and published ones beside it.

    Networks made in the same way share a colour and a marker; before any fine-tuning the marker is open and the line
    dotted. Error bars are ± the standard deviation over the seeds, or the 95 % interval where there is one seed. The
    cost of a published network is its own kept / dense ratio times the cost of our dense network.

    Raises:
        DataError: no network has both an accuracy and the cost asked for.
    """
    if against not in AXES:
        raise DataError(f"against={against!r}: give one of {', '.join(AXES)}")
    axis = AXES[against]
    measured = [variant for variant in results.variants if variant.accuracy is not None]
    places = {variant.name: x for variant in measured if (x := axis.place(variant))}
    if not places:
        raise DataError(f"no network of {results.title!r} has both an accuracy and a {against}; nothing to plot")
    variants = [variant for variant in measured if variant.name in places]
    whole = axis.place(results.dense)
    ends = min(places.values()), max(*places.values(), whole or 0)
    traces = [
        *_variant_traces(variants, places),
        *_dense_traces(results.dense, place=whole, ends=ends),
        *_published_traces(results.published, against, whole=whole, ends=ends),
    ]
    if against == "rank":
        ticks = sorted({int(x) for x in places.values()})
        scale: dict[str, Any] = {"tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}
    else:
        scale = {"tickformat": "~g" if against == "latency" else "~s"}
    scale |= {"type": "log", "title": axis.title}
    return build(traces, x=scale, y=[{"title": "Test accuracy (%)"}], layout={"meta": _zoom(results, variants)})


def available(results: Results) -> tuple[Against, ...]:
    """What the accuracies can be plotted against.

    The rank comes first where every network has one, last where only some have, and not at all where those share it.
    """
    measured = [variant for variant in results.variants if variant.accuracy is not None]
    places = {against: [axis.place(variant) for variant in measured] for against, axis in AXES.items()}
    ranks = places.pop("rank")
    costs = [against for against in places if any(places[against])]
    if all(ranks):
        return ("rank", *costs) if ranks else ()
    return (*costs, "rank") if len(set(ranks) - {None}) > 1 else tuple(costs)


def _accuracy_reach(variant: Variant) -> tuple[float, float]:
    """How far the error bar reaches down and up, in percentage points; no accuracy is below 0 or above 100 %."""
    if variant.spread is not None and variant.accuracy is not None:
        return 100 * min(variant.spread, variant.accuracy), 100 * min(variant.spread, 1 - variant.accuracy)
    return reach(variant.runs[0].test.interval)


def _variant_traces(variants: Sequence[Variant], places: Mapping[str, float]) -> Iterator[Trace]:
    """One line per group, one legend entry per family, and a key of the markers where some are open."""
    titles = words.families(variants)
    styles = _family_styles(variants, titles)
    stages = {variant.stage for variant in variants}
    both = {"zero-shot"} < stages
    listed: set[str] = set()
    # zero-shot last, so that the legend shows the filled markers
    for label, group in sorted(words.grouped(variants).items(), key=lambda item: item[1][0].stage == "zero-shot"):
        family = titles[group[0].name]
        group.sort(key=lambda variant: places[variant.name])
        yield {
            "x": [places[variant.name] for variant in group],
            "y": [100 * (variant.accuracy or 0) for variant in group],
            "name": safe((family if both else label) or label),
            "legendgroup": family,
            "showlegend": family not in listed,
            "error_y": error_bars([_accuracy_reach(variant) for variant in group]),
            "customdata": [[safe(variant.name), words.accuracy(variant)] for variant in group],
            "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
            **_line_and_marker(styles[family], group[0].stage),
        }
        listed.add(family)
    for stage in sorted(stages, key=lambda stage: (stage != "zero-shot", stage)) if both else ():
        name = f"{stage} ({'open, dotted' if stage == 'zero-shot' else 'filled'})"
        yield {"x": [None], "y": [None], "name": name, **_line_and_marker(Style(GREY, "circle"), stage)}


def _line_and_marker(style: Style, stage: str) -> Trace:
    """Open and dotted before any fine-tuning."""
    zero_shot = stage == "zero-shot"
    symbol = f"{style.symbol}-open" if zero_shot else style.symbol
    return {
        "mode": "lines+markers",
        "line": {"color": style.colour, "width": 2.2, "dash": "dot" if zero_shot else "solid"},
        "marker": {"symbol": symbol, "size": 10, "line": {"width": 2}},
    }


def _family_styles(variants: Sequence[Variant], titles: Mapping[str, str]) -> dict[str, Style]:
    """The styles of the metrics where the families differ in nothing else."""
    metrics = {titles[variant.name]: variant.metric for variant in variants}
    if len(set(metrics.values())) == len(metrics):
        return {family: METRIC_STYLE[metric] for family, metric in metrics.items()}
    return {family: Style.at(position) for position, family in enumerate(metrics)}


def _dense_traces(dense: Variant, *, place: float | None, ends: tuple[float, float]) -> Iterator[Trace]:
    """A dashed line at the dense accuracy, and a star where the dense network's cost is."""
    if dense.accuracy is None:
        return
    line = {"color": GREY, "dash": "dash"}
    yield _level(f"dense {words.percent(dense.accuracy)}", dense.accuracy, ends=ends, line=line)
    if place:
        yield {
            "x": [place],
            "y": [100 * dense.accuracy],
            "mode": "markers",
            "marker": {"symbol": "star", "size": 13, "color": GREY},
            "error_y": error_bars([_accuracy_reach(dense)]),
            "hovertemplate": f"dense<br>{words.accuracy(dense)}<extra></extra>",
            "showlegend": False,
        }


def _level(label: str, accuracy: float, *, ends: tuple[float, float], line: dict[str, Any]) -> Trace:
    """A horizontal line a little beyond both ends."""
    x = [ends[0] / 1.12, ends[1] * 1.12]
    return {"x": x, "y": [100 * accuracy] * 2, "name": label, "mode": "lines", "line": line, "hovertemplate": label}


def _published_traces(
    published: Sequence[Published], against: Against, *, whole: float | None, ends: tuple[float, float]
) -> Iterator[Trace]:
    """Crosses, and a line at the accuracy of their dense network; `whole` is the cost of our dense network."""
    for number, study in enumerate(published):
        colour = COLOURS[-1 - number % len(COLOURS)]
        points = _published_points(study, against, whole=whole)
        source, where = safe(study.source), "" if against == "rank" else ", placed by kept / dense"
        if points:
            yield {
                "x": [place for place, _, _ in points],
                "y": [100 * accuracy for _, accuracy, _ in points],
                "name": f"published: {source}{where}",
                "mode": "markers",
                "marker": {"symbol": "x-thin", "size": 11, "line": {"width": 3, "color": colour}},
                "customdata": [safe(name) for _, _, name in points],
                "hovertemplate": f"{source}<br>%{{customdata}}: %{{y:.2f}} %<extra></extra>",
            }
        if study.dense is not None and (points or against == "rank"):
            line = {"color": colour, "width": 1.5, "dash": "longdashdot"}
            yield _level(f"published dense {words.percent(study.dense)}", study.dense, ends=ends, line=line)


def _published_points(study: Published, against: Against, *, whole: float | None) -> list[tuple[float, float, str]]:
    """Place, accuracy and name of what can be placed."""
    if against == "rank":
        ranks = sorted((rank, accuracy) for rank, accuracy in study.accuracy if rank is not None)
        return [(rank, accuracy, f"rank {rank}") for rank, accuracy in ranks]
    ratios = ((point, AXES[against].ratio(point)) for point in study.points)
    return [(ratio * whole, point.accuracy, point.name) for point, ratio in ratios if ratio and whole]


def _zoom(results: Results, variants: Sequence[Variant]) -> dict[str, Any]:
    """The range (%) near the dense accuracy, where the rest of the scale would hide what happens there."""
    accuracies = [(100 * (variant.accuracy or 0), variant.stage) for variant in (results.dense, *variants)]
    bottom, top = min(accuracies[1:])[0], max(accuracies)[0]
    trained = min((accuracy for accuracy, stage in accuracies if stage in ("fine-tuned", "trained")), default=None)
    if trained is None or top - bottom < 3 * (top - trained):
        return {}
    margin = 0.15 * max(top - trained, 0.5)
    return {"zoom": [trained - margin, top + margin]}


@checked
def plot_classes(changes: Changes) -> go.Figure:
    """Change of every class's accuracy in percentage points, with its 95 % interval, the worst at the bottom.

    Of more than 60 classes those with the largest changes are shown. Raises `DataError` where no class has a test
    example.
    """
    tested = [tally for tally in changes.classes if tally.total]
    if not tested:
        raise DataError(f"no class of the changes of {changes.variant!r} has a test example; nothing to plot")
    classes = sorted(tested, key=lambda tally: abs(tally.difference.value), reverse=True)[:_CLASSES]
    classes.sort(key=lambda tally: tally.difference.value)
    traces: list[Trace] = []
    for sign, name, style in _SIGNS:
        group = [tally for tally in classes if words.sure_sign(tally) == sign]
        traces += _class_traces(group, name=name, style=style) if group else []
    x = {"title": "Change of accuracy against dense (points)", "zeroline": True, "zerolinecolor": GREY}
    order = {"categoryorder": "array", "categoryarray": [safe(tally.name) for tally in classes]}
    y = {"type": "category", "showgrid": False, "dtick": 1, **order}
    height = max(HEIGHT * 3 // 4, 110 + 24 * len(classes))
    return build(traces, x=x, y=[y], layout={"height": height, "bargap": 0.55})


_SIGNS = (
    (-1, "surely worse", Style(COLOURS[1], "triangle-left")),
    (0, "no sure difference", Style(GREY, "circle")),
    (1, "surely better", Style(COLOURS[0], "triangle-right")),
)


def _class_traces(group: Sequence[ClassChange], *, name: str, style: Style) -> Iterator[Trace]:
    """A bar from zero and a marker with its interval, by class."""
    common = {"x": [100 * tally.difference.value for tally in group], "y": [safe(tally.name) for tally in group]}
    bar = {"color": style.colour, "opacity": 0.35}
    yield {"type": "bar", "orientation": "h", "marker": bar, "showlegend": False, "hoverinfo": "skip", **common}
    shares = [[words.percent(right / tally.total) for right in (tally.before, tally.after)] for tally in group]
    yield {
        "name": name,
        "mode": "markers",
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 10},
        "error_x": error_bars([reach(tally.difference) for tally in group], width=4),
        "customdata": [[*pair, words.points_interval(tally)] for pair, tally in zip(shares, group, strict=True)],
        "hovertemplate": "%{y}: %{customdata[0]} to %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
        **common,
    }
