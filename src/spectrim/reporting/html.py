"""One self-contained page from the results of a study. It shows values and computes nothing about networks."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from spectrim.core.arguments import checked
from spectrim.core.errors import DataError
from spectrim.core.files import write_text
from spectrim.reporting import words
from spectrim.reporting.accuracy import AXES, available, plot_accuracy, plot_classes
from spectrim.reporting.figures import plot_curves, plot_spectra, relevant_plans
from spectrim.reporting.listings import Listing, template
from spectrim.reporting.results import Results, Variant
from spectrim.reporting.tables import changes_table, published_table, runtimes_table, table


@checked
def report(results: Results, path: str | Path) -> Path:
    """Write `results` as one HTML file that needs no network: figures, tables and words, for screen and paper.

    Parts that the results hold nothing for are left out.

    Returns:
        The path written to.

    Raises:
        DataError: `results` is not a `Results`.
        FileError: the file cannot be written.
    """
    if not isinstance(results, Results):
        raise DataError(
            f"a report shows Results, and got {type(results).__name__}; read them with Results.load('results.json')"
        )
    study = table(results)
    changes = results.changes if results.changes is not None and results.changes.whole.total else None
    finding, curves = words.accuracy_finding(results), words.curves_finding(results)
    page = template("template.html.j2").render(
        results=results,
        words=words,
        glances=_glances(results),
        accuracy=[_figure(AXES[x].label, plot_accuracy(results, against=x), finding) for x in available(results)],
        spectra=_spectra_figures(results),
        curves=[_figure("Training", plot_curves(results), curves)] if curves else [],
        classes=[_figure("Classes", plot_classes(changes), words.changes_finding(changes))] if changes else [],
        study=study,
        published=published_table(results),
        runtimes=runtimes_table(results),
        changes=changes,
        class_table=changes and changes_table(changes),
        repeated=_repeated_columns(study),
        plans=_plans(results),
        plotly=Markup(get_plotlyjs()),  # plotly's own script, meant for inlining
    )
    return write_text(Path(path), page.lstrip())


class _Card(NamedTuple):
    """One value of the summary, the words below it, and the ratio kept / dense where it is a cost."""

    label: str
    big: str
    small: str
    more: str = ""
    ratio: float | None = None


def _glances(results: Results) -> list[tuple[Variant, list[_Card]]]:
    """The chosen network, or without a choice the three most accurate ones, with their cards."""
    ranked = sorted(results.variants, key=lambda variant: (-(variant.accuracy or 0), variant.measurement.params))
    best = ranked[:3] if results.chosen is None else [results.variant(results.chosen)]
    return [(variant, _cards(variant, results.dense)) for variant in best]


def _cards(variant: Variant, dense: Variant) -> list[_Card]:
    cards = []
    if variant.accuracy is not None:
        small = words.uncertainty(variant) + (" over the seeds" if variant.spread is not None else " (95 % interval)")
        against = f"dense {words.percent(dense.accuracy)}: {words.difference(variant, dense)} points"
        more = against if dense.accuracy is not None else ""
        cards.append(_Card("Test accuracy", words.percent(variant.accuracy), small, more))
    before = words.costs(dense.measurement)
    for label, (value, ratio) in words.costs(variant.measurement).items():
        big = value if ratio is None else words.smaller(ratio)
        more = "" if ratio is None else f"{words.share(ratio)} kept"
        cards.append(_Card(label, big, f"{before[label][0]} → {value}", more, ratio))
    return [*cards, *_speed_card(variant)]


def _speed_card(variant: Variant) -> list[_Card]:
    """The speed-up in the first runtime that was timed, and below it in the others; empty where none was timed."""
    measurements = (variant.measurement, *variant.in_runtimes)
    timed = [(measurement, measurement.speedup) for measurement in measurements if measurement.speedup]
    if not timed:
        return []
    (first, speedup), *others = timed
    latency = words.milliseconds(first.latency_ms) if first.latency_ms is not None else ""
    more = [", ".join(filter(None, (first.runtime, words.circumstances(first), latency)))]
    more += [f"{other.runtime}: {words.speedup(gain)}, {words.timing_verdict(other)}" for other, gain in others]
    verdict = words.verdict(speedup, word=words.timing_verdict(first))
    return [_Card("Measured speed-up", words.speedup(speedup), verdict, "; ".join(filter(None, more)))]


def _spectra_figures(results: Results) -> list[dict[str, Any]]:
    spectra = (spectrum for spectrum in results.spectra if spectrum.values)
    layers = words.group_by(spectra, lambda spectrum: spectrum.layer)
    plans = relevant_plans(results)
    findings = {name: words.spectrum_finding(layer, plans) for name, layer in layers.items()}
    return [_figure(name, plot_spectra(results, layers=[name]), finding) for name, finding in findings.items()]


def _figure(label: str, figure: go.Figure, finding: str) -> dict[str, Any]:
    """One of the figures that take turns in a frame, for JSON."""
    return {"label": label, "figure": json.loads(figure.to_json(engine="json")), "finding": finding}


def _plans(results: Results) -> list[tuple[str, Listing]]:
    """Every distinct plan under the names of the networks made by it, the chosen one first."""
    variants = sorted(results.variants, key=lambda variant: variant.name != results.chosen)
    planned = [(variant.plan, variant.name) for variant in variants if variant.plan is not None]
    groups = words.group_by(planned, lambda pair: pair[0])
    return [(words.and_more([name for _, name in pairs], most=4), table(plan)) for plan, pairs in groups.items()]


def _repeated_columns(listing: Listing) -> frozenset[int]:
    """The columns that mostly repeat what the names of the rows say; a phone has no room for them."""
    return frozenset(
        at
        for at, column in enumerate(listing.columns)
        if column.head in ("Metric", "Stage")
        or (at and all(row[at] in row[0] for row in listing.rows if row[at] != words.NOTHING))
    )
