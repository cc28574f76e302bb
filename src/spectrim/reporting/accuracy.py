"""Accuracies as figures: every network against its costs, and every class against what it was."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from spectrim.core.errors import DataError
from spectrim.reporting import words
from spectrim.reporting.results import Changes, ClassChange, Published, Results, Variant
from spectrim.reporting.style import COLOURS, GREY, HEIGHT, METRIC_STYLE, SYMBOLS, TEMPLATE, Style, safe

Against = Literal["rank", "params", "macs", "latency"]

AGAINST: dict[Against, str] = {
    "rank": "Rank kept in each factored layer",
    "params": "Parameters",
    "macs": "MACs of one forward pass",
    "latency": "Latency of one forward pass (ms)",
}

_CLASSES = 60


def plot_accuracy(results: Results, *, against: Against = "rank") -> go.Figure:
    """Test accuracy of every network against its rank or a cost, dense and published ones beside it.

    What was made in the same way has one colour and marker, open with a dotted line before any fine-tuning. Error bars
    are ± the standard deviation over the seeds, or the 95 % interval where there is one seed. Published networks stand
    where their own kept / dense ratio puts them, as a share of our dense network's cost.

    Raises:
        DataError: no network has both an accuracy and the cost asked for.
    """
    if against not in AGAINST:
        raise DataError(f"against={against!r}: give one of {', '.join(AGAINST)}")
    placed = {one.name: x for one in results.variants if one.accuracy is not None and (x := _position(one, against))}
    if not placed:
        raise DataError(f"no network of {results.title!r} has both an accuracy and a {against}; nothing to plot")
    shown = [one for one in results.variants if one.name in placed]
    figure = go.Figure(list(_accuracy_traces(shown, placed)))
    ends = min(placed.values()), max(placed.values())
    _add_dense(figure, results.dense, against, ends=ends)
    _add_published(figure, results, against, ends=ends)
    if against == "rank":
        ticks = sorted({int(x) for x in placed.values()})
        figure.update_xaxes(tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    else:
        everywhere = [x for trace in figure.data for x in trace.x if x]
        digits_1_2_5 = {"dtick": "D2"} if max(everywhere) > 4 * min(everywhere) else {}
        figure.update_xaxes(tickformat="~g" if against == "latency" else "~s", **digits_1_2_5)
    figure.update_xaxes(type="log", title_text=AGAINST[against])
    figure.update_yaxes(title_text="Test accuracy (%)")
    figure.update_layout(template=TEMPLATE, height=HEIGHT, meta=_zoom(results, shown))
    return figure


def available(results: Results) -> tuple[Against, ...]:
    """What the accuracies can be plotted against.

    The rank comes first where every network has one, last where only some have, and not at all where those share it.
    """
    measured = [one for one in results.variants if one.accuracy is not None]
    costs = [against for against in AGAINST if against != "rank" and any(_position(one, against) for one in measured)]
    ranks = [_position(one, "rank") for one in measured]
    if all(ranks):
        return ("rank", *costs) if ranks else ()
    return (*costs, "rank") if len(set(ranks) - {None}) > 1 else tuple(costs)


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
    """How far the error bar reaches down and up, in percentage points; no accuracy is below 0 or above 100 %."""
    if variant.spread is not None and variant.accuracy is not None:
        return 100 * min(variant.spread, variant.accuracy), 100 * min(variant.spread, 1 - variant.accuracy)
    interval = variant.runs[0].test.interval
    return 100 * (interval.value - interval.low), 100 * (interval.high - interval.value)


def _accuracy_traces(shown: Sequence[Variant], placed: Mapping[str, float]) -> Iterator[go.Scatter]:
    """A line a group, one legend entry a family, and what open markers mean where some are open."""
    titles = words.families(shown)
    styles = _family_styles(shown, titles)
    groups = words.grouped(shown)
    stages = {one.stage for one in shown}
    listed: set[str] = set()
    # the tuned ones first, so that the legend shows what is filled
    for label, group in sorted(groups.items(), key=lambda item: item[1][0].stage == "zero-shot"):
        family = titles[group[0].name]
        several = {"zero-shot"} < stages
        named = {"name": safe((family if several else label) or label), "showlegend": family not in listed}
        listed.add(family)
        points = sorted(((placed[one.name], one) for one in group), key=lambda point: point[0])
        yield _accuracy_trace(points, styles[family]).update(named | {"legendgroup": family})
    if {"zero-shot"} < stages:
        for stage in ("zero-shot", *sorted(stages - {"zero-shot"})):
            yield _stage_key(stage)


def _family_styles(shown: Sequence[Variant], titles: Mapping[str, str]) -> dict[str, Style]:
    """Those of the metrics where nothing else tells the families apart."""
    metrics = {titles[one.name]: one.metric for one in shown}
    if len(set(metrics.values())) == len(metrics):
        return {family: Style(*METRIC_STYLE[metric]) for family, metric in metrics.items()}
    return {
        family: Style(COLOURS[at % len(COLOURS)], SYMBOLS[at % len(SYMBOLS)], "solid")
        for at, family in enumerate(metrics)
    }


def _stage_key(stage: str) -> go.Scatter:
    """A legend entry without points."""
    fresh = stage == "zero-shot"
    return go.Scatter(
        x=[None],
        y=[None],
        name=f"{stage} ({'open, dotted' if fresh else 'filled'})",
        mode="lines+markers",
        line={"color": GREY, "width": 2.2, "dash": "dot" if fresh else "solid"},
        marker={"symbol": "circle-open" if fresh else "circle", "size": 10, "line": {"width": 2}},
    )


def _accuracy_trace(points: Sequence[tuple[float, Variant]], style: Style) -> go.Scatter:
    """One group of networks."""
    fresh = points[0][1].stage == "zero-shot"
    down, up = zip(*(_bars(one) for _, one in points), strict=True)
    return go.Scatter(
        x=[x for x, _ in points],
        y=[100 * (one.accuracy or 0) for _, one in points],
        mode="lines+markers",
        line={"color": style.colour, "width": 2.2, "dash": "dot" if fresh else "solid"},
        marker={"symbol": f"{style.symbol}-open" if fresh else style.symbol, "size": 10, "line": {"width": 2}},
        error_y={"type": "data", "array": up, "arrayminus": down, "symmetric": False, "thickness": 1.4, "width": 5},
        customdata=[[safe(one.name), words.accuracy(one)] for _, one in points],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )


def _add_dense(figure: go.Figure, dense: Variant, against: Against, *, ends: tuple[float, float]) -> None:
    if dense.accuracy is None:
        return
    place = _position(dense, against) if against != "rank" else None
    line = {"color": GREY, "width": 2, "dash": "dash"}
    label = f"dense {words.percent(dense.accuracy)}"
    figure.add_trace(_level(label, dense.accuracy, _stretched(ends, place), line))
    if place:
        down, up = _bars(dense)
        star = go.Scatter(
            x=[place],
            y=[100 * dense.accuracy],
            mode="markers",
            marker={"symbol": "star", "size": 13, "color": GREY},
            error_y={"array": [up], "arrayminus": [down], "symmetric": False, "thickness": 1.4, "width": 5},
            hovertemplate=f"dense<br>{words.accuracy(dense)}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(star)


def _level(label: str, accuracy: float, ends: tuple[float, float], line: dict[str, Any]) -> go.Scatter:
    """A horizontal line a little beyond both ends."""
    x = [ends[0] / 1.12, ends[1] * 1.12]
    return go.Scatter(x=x, y=[100 * accuracy] * 2, name=label, mode="lines", line=line, hovertemplate=label)


def _add_published(figure: go.Figure, results: Results, against: Against, *, ends: tuple[float, float]) -> None:
    whole = _position(results.dense, against) if against != "rank" else None
    for number, published in enumerate(results.published):
        colour = COLOURS[-1 - number % len(COLOURS)]
        points = _published_points(published, against, whole)
        source, where = safe(published.source), "" if against == "rank" else ", placed by kept / dense"
        if points:
            trace = go.Scatter(
                x=[place for place, _, _ in points],
                y=[100 * value for _, value, _ in points],
                name=f"published: {source}{where}",
                mode="markers",
                marker={"symbol": "x-thin", "size": 11, "line": {"width": 3, "color": colour}},
                customdata=[safe(name) for _, _, name in points],
                hovertemplate=f"{source}<br>%{{customdata}}: %{{y:.2f}} %<extra></extra>",
            )
            figure.add_trace(trace)
        for value in (value for rank, value in published.accuracy if rank is None and (points or against == "rank")):
            line = {"color": colour, "width": 1.5, "dash": "longdashdot"}
            figure.add_trace(_level(f"published dense {words.percent(value)}", value, _stretched(ends, whole), line))


def _published_points(published: Published, against: Against, whole: float | None) -> list[tuple[float, float, str]]:
    """Place, accuracy and name of what can be placed; `whole` is the cost of our dense network."""
    if against == "rank":
        ranks = sorted((rank, value) for rank, value in published.accuracy if rank is not None)
        return [(rank, value, f"rank {rank}") for rank, value in ranks]
    shares = [(words.published_place(one, against), one) for one in published.points]
    return [(share * whole, one.accuracy, one.name) for share, one in shares if share is not None and whole]


def _stretched(ends: tuple[float, float], place: float | None) -> tuple[float, float]:
    """Both ends of what is shown, up to the dense network's place."""
    return ends[0], max(ends[1], place or 0)


def _zoom(results: Results, placed: Sequence[Variant]) -> dict[str, Any]:
    """The range (%) near the dense accuracy, where the rest of the scale would hide what happens there."""
    tuned = [100 * (one.accuracy or 0) for one in placed if one.stage in ("fine-tuned", "trained")]
    everything = [100 * (one.accuracy or 0) for one in placed]
    top = max(100 * (results.dense.accuracy or 0), *everything)
    if not tuned or top - min(everything) < 3 * (top - min(tuned)):
        return {}
    margin = 0.15 * max(top - min(tuned), 0.5)
    return {"zoom": [min(tuned) - margin, top + margin]}


def plot_classes(changes: Changes) -> go.Figure:
    """Change of every class's accuracy in percentage points, with its 95 % interval, the worst at the bottom.

    Of more than 60 classes those with the largest changes are shown.

    Raises:
        DataError: no class has a test example.
    """
    tested = [one for one in changes.classes if one.total]
    if not tested:
        raise DataError(f"no class of the changes of {changes.variant!r} has a test example; nothing to plot")
    shown = sorted(tested, key=words.abs_difference, reverse=True)[:_CLASSES]
    shown.sort(key=lambda one: one.difference.value)
    order = [safe(one.name) for one in shown]
    figure = go.Figure()
    for sign, (name, colour, symbol) in _JUDGED.items():
        group = [one for one in shown if words.sure(one) == sign]
        if group:
            figure.add_traces(list(_class_traces(group, name=name, colour=colour, symbol=symbol)))
    figure.update_layout(template=TEMPLATE, height=max(HEIGHT * 3 // 4, 110 + 24 * len(shown)), bargap=0.55)
    figure.update_xaxes(title_text="Change of accuracy against dense (points)", zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(categoryorder="array", categoryarray=order, type="category", showgrid=False, tickmode="linear")
    return figure


_JUDGED = {
    -1: ("surely worse", COLOURS[1], "triangle-left"),
    0: ("no sure difference", GREY, "circle"),
    1: ("surely better", COLOURS[0], "triangle-right"),
}


def _class_traces(
    group: Sequence[ClassChange], *, name: str, colour: str, symbol: str
) -> Iterator[go.Bar | go.Scatter]:
    """A bar from zero and a marker with its interval, by class."""
    found = [one.difference for one in group]
    y, x = [safe(one.name) for one in group], [100 * one.value for one in found]
    yield go.Bar(
        x=x, y=y, orientation="h", marker={"color": colour, "opacity": 0.35}, showlegend=False, hoverinfo="skip"
    )
    yield go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 10},
        error_x={
            "array": [100 * (one.high - one.value) for one in found],
            "arrayminus": [100 * (one.value - one.low) for one in found],
            "symmetric": False,
            "thickness": 1.4,
            "width": 4,
        },
        customdata=[
            [words.percent(one.before / one.total), words.percent(one.after / one.total), words.points_interval(one)]
            for one in group
        ],
        hovertemplate="%{y}: %{customdata[0]} to %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
    )
