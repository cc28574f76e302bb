"""One self-contained page from the results of a study. It shows values and computes nothing about networks."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from spectrim.benchmark.measurement import Measurement
from spectrim.core.errors import DataError
from spectrim.core.files import write_text
from spectrim.core.plans import Plan
from spectrim.reporting import words
from spectrim.reporting.accuracy import AGAINST, available, plot_accuracy, plot_classes
from spectrim.reporting.figures import plot_curves, plot_spectra, relevant_plans
from spectrim.reporting.results import Changes, Flipped, LayerSpectrum, Results, Variant
from spectrim.reporting.study_tables import changes_table, published_table, runtimes_table
from spectrim.reporting.tables import Listing, table


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
    page = _template().render(
        results=results,
        glances=_glances(results),
        accuracy=_accuracy_gallery(results),
        spectra=_spectra_gallery(results),
        curves=_curves_gallery(results),
        study=study,
        published=published_table(results),
        runtimes=runtimes_table(results),
        changes=_changed(results.changes) if results.changes is not None else None,
        said=_said_by_the_name(study),
        plans=_plans(results),
        plotly=Markup(get_plotlyjs()),  # plotly's own script, meant for inlining
    )
    return write_text(Path(path), page.lstrip())


@dataclass(frozen=True)
class _Card:
    """A big figure: what changed, from what to what, and the share kept where it is a cost."""

    label: str
    big: str
    unit: str
    small: str
    more: str = ""
    kept: float | None = None


@dataclass(frozen=True)
class _Glance:
    name: str
    because: str
    cards: tuple[_Card, ...]


@dataclass(frozen=True)
class _Gallery:
    """Figures that take turns in one frame: their labels, and each figure with its finding as JSON safe for HTML."""

    key: str
    choose: str
    labels: tuple[str, ...]
    findings: tuple[str, ...]
    items: Markup


@dataclass(frozen=True)
class _Image:
    """A test image that is answered differently: what it shows, and what was and is said, each with its certainty."""

    source: str
    alt: str
    truth: str
    before: str
    after: str
    sure_before: str
    sure_after: str


@dataclass(frozen=True)
class _Group:
    """Images of one kind, out of `total`."""

    key: str
    title: str
    total: int
    images: tuple[_Image, ...]


@dataclass(frozen=True)
class _Changed:
    variant: str
    finding: str
    gallery: _Gallery
    listing: Listing
    groups: tuple[_Group, ...]
    seeds: tuple[int, ...]


@cache
def _template() -> Template:
    source = Path(__file__).with_name("template.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )


def _glances(results: Results) -> tuple[_Glance, ...]:
    if results.chosen is not None:
        chosen = results.variant(results.chosen)
        return (_Glance(chosen.name, results.chosen_because, _cards(chosen, results.dense)),)
    best = sorted(results.variants, key=lambda one: (-(one.accuracy or 0), one.measurement.params))[:3]
    return tuple(_Glance(one.name, "", _cards(one, results.dense)) for one in best)


def _cards(kept: Variant, dense: Variant) -> tuple[_Card, ...]:
    one, whole = kept.measurement, dense.measurement
    cards = []
    if kept.accuracy is not None:
        small = words.uncertainty(kept) + (" over the seeds" if kept.spread is not None else " (95 % interval)")
        more = ""
        if dense.accuracy is not None:
            more = f"dense {words.percent(dense.accuracy)}: {words.difference(kept, dense)} points"
        cards.append(_Card("Test accuracy", *_with_unit(words.percent(kept.accuracy)), small, more))
    costs = (
        ("Parameters", words.count, whole.params, one.params, one.params_ratio),
        ("File size", words.size, whole.bytes, one.bytes, one.bytes_ratio),
        ("MACs", words.count, whole.macs, one.macs, one.macs_ratio),
    )
    for label, show, before, after, ratio in costs:
        change = f"{show(before)} → {show(after)}"
        big = words.smaller(ratio) if ratio is not None else show(after)
        cards.append(
            _Card(label, *_with_unit(big), change, f"{words.share(ratio)} kept" if ratio is not None else "", ratio)
        )
    timed = [each for each in (one, *kept.in_runtimes) if each.speedup is not None]
    return (*cards, _speed_card(timed[0], timed[1:])) if timed else tuple(cards)


def _speed_card(first: Measurement, others: Sequence[Measurement]) -> _Card:
    """The first runtime large, named, and the others below it."""
    assert first.speedup is not None
    verdict = f"{words.judged(first)}, 95 % interval {words.bounds(first.speedup)}{words.TIMES}"
    where = words.timed_in(first)
    latency = words.milliseconds(first.latency_ms) if first.latency_ms is not None else ""
    more = [", ".join(filter(None, (where, latency)))]
    more += [f"{each.runtime}: {words.speedup(each.speedup)}, {words.judged(each)}" for each in others if each.speedup]
    return _Card("Measured speed-up", words.speedup(first.speedup), "", verdict, "; ".join(filter(None, more)))


def _with_unit(figure: str) -> tuple[str, str]:
    number, _, unit = figure.partition(" ")
    return number, unit


def _accuracy_gallery(results: Results) -> _Gallery | None:
    finding = words.accuracy_finding(results)
    shown = [(_SHORT[one], plot_accuracy(results, against=one), finding) for one in available(results)]
    return _gallery("accuracy", "Against", shown)


_SHORT = dict(zip(AGAINST, ("Rank", "Parameters", "MACs", "Latency"), strict=True))


def _spectra_gallery(results: Results) -> _Gallery | None:
    layers: dict[str, list[LayerSpectrum]] = {}
    for one in results.spectra:
        if one.values:
            layers.setdefault(one.layer, []).append(one)
    plans = relevant_plans(results)
    shown = [
        (name, plot_spectra(results, layers=[name]), words.spectrum_finding(spectra, plans))
        for name, spectra in layers.items()
    ]
    return _gallery("spectra", "Layer", shown)


def _curves_gallery(results: Results) -> _Gallery | None:
    finding = words.curves_finding(results)
    return _gallery("curves", "Figure", [("Training", plot_curves(results), finding)] if finding else [])


def _changed(changes: Changes) -> _Changed | None:
    if not any(one.total for one in changes.classes):
        return None
    finding = words.changes_finding(changes)
    gallery = _gallery("classes", "Figure", [("Classes", plot_classes(changes), finding)])
    assert gallery is not None
    whole = changes.whole
    groups = tuple(
        _Group(
            kind,
            title,
            getattr(whole, kind),
            tuple(_image(one, changes) for one in changes.flipped if one.kind == kind),
        )
        for kind, title in words.KIND.items()
    )
    return _Changed(changes.variant, finding, gallery, changes_table(changes), groups, changes.seeds)


def _image(one: Flipped, changes: Changes) -> _Image:
    truth, before, after = (changes.classes[at].name for at in (one.truth, one.before, one.after))
    sure_before, sure_after = (words.percent(share, places=0) for share in (one.sure_before, one.sure_after))
    alt = f"Test image {one.index}, {truth}: {before} ({sure_before} sure) became {after} ({sure_after} sure)"
    return _Image(f"data:image/png;base64,{one.image}", alt, truth, before, after, sure_before, sure_after)


def _gallery(key: str, choose: str, shown: Sequence[tuple[str, go.Figure, str]]) -> _Gallery | None:
    if not shown:
        return None
    items = [{"figure": _as_json(figure), "finding": finding} for _, figure, finding in shown]
    labels, findings = tuple(label for label, _, _ in shown), tuple(finding for _, _, finding in shown)
    return _Gallery(key, choose, labels, findings, _for_script(items))


def _as_json(figure: go.Figure) -> Any:
    return json.loads(figure.to_json(engine="json"))


def _for_script(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, nor start anything else."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # escaped above


def _plans(results: Results) -> tuple[tuple[str, Listing], ...]:
    """Every distinct plan under the names of the networks made by it, the chosen one first."""
    groups: list[tuple[Plan, list[str]]] = []
    for variant in sorted(results.variants, key=lambda one: one.name != results.chosen):
        if variant.plan is None:
            continue
        names = next((names for plan, names in groups if plan == variant.plan), None)
        if names is None:
            groups.append((variant.plan, [variant.name]))
        else:
            names.append(variant.name)
    return tuple((_joined(names), table(plan)) for plan, names in groups)


def _said_by_the_name(listing: Listing) -> frozenset[int]:
    """The columns that mostly repeat what the names of the rows say; a phone has no room for them."""
    says = {
        at: all(row[at] in row[0] for row in listing.rows if row[at] != words.NOTHING)
        for at in range(1, len(listing.columns))
    }
    spare = {at for at, column in enumerate(listing.columns) if column.head in ("Metric", "Stage")}
    return frozenset(at for at, repeats in says.items() if repeats) | spare


def _joined(names: Iterable[str]) -> str:
    return words.and_more(list(names), most=4)
