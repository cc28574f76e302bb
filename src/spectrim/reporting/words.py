"""Numbers and findings in words: the same in terminal tables, figures and pages."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from spectrim.benchmark.measurement import Interval, Measurement
from spectrim.core.plans import Budget, Energy, Metric, Plan, Rank, Ratio, Rule
from spectrim.linalg import Spectrum
from spectrim.reporting.results import (
    Agreement,
    Changes,
    Kind,
    LayerSpectrum,
    Published,
    PublishedPoint,
    Results,
    Tally,
    Variant,
)

TIMES = "\N{MULTIPLICATION SIGN}"
TO = "\N{EN DASH}"
NOTHING = TO


def count(number: float) -> str:
    """Up to three significant digits with an SI prefix: 2570 is `2.57 k`."""
    digits, prefix = _scaled(number)
    return f"{digits} {prefix}".strip()


def size(number: float) -> str:
    """Bytes in decimal units: 340448 is `340 kB`."""
    digits, prefix = _scaled(number)
    return f"{digits} {prefix}B"


def _scaled(number: float) -> tuple[str, str]:
    if number < 1000:
        return f"{number:g}", ""
    rounded = float(f"{number:.3g}")
    power = min(4, int(math.log10(rounded) // 3))
    return f"{rounded / 1000**power:#.3g}".rstrip("."), ["", "k", "M", "G", "T"][power]


def percent(share: float, *, places: int = 2) -> str:
    """A share of 0.9607 is `96.07 %`."""
    return f"{100 * share:.{places}f} %"


def share(ratio: float | None) -> str:
    """A ratio kept / dense as a percentage of about two digits."""
    return NOTHING if ratio is None else percent(ratio, places=0 if ratio >= 0.1 else 1 if ratio >= 0.01 else 2)


def points(difference: float) -> str:
    """A difference of two accuracies in percentage points, with its sign: −0.023 is `−2.30`; none is `0.00`."""
    signed = f"{100 * difference:+z.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if signed == "+0.00" else signed


def factor(value: float) -> str:
    """A multiple: two decimals while small, where they matter."""
    return f"{value:.{2 if value < 2 else 1 if value < 100 else 0}f}{TIMES}"


def smaller(ratio: float | None) -> str:
    """A ratio kept / dense in everyday words: 0.43 is `2.3× smaller`."""
    if ratio is None:
        return NOTHING
    if ratio <= 0:
        return "nothing left"
    return "unchanged" if ratio == 1 else f"{factor(1 / ratio)} smaller" if ratio < 1 else f"{factor(ratio)} larger"


def milliseconds(value: float | None) -> str:
    """Three significant digits: `0.0190 ms`, `123 ms`."""
    if value is None:
        return NOTHING
    text = f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
    return f"{text} ms"


def bounds(interval: Interval, *, scale: float = 1.0) -> str:
    """Both ends of an interval with two decimals."""
    return f"{scale * interval.low:.2f}{TO}{scale * interval.high:.2f}"


def speedup(interval: Interval) -> str:
    """A speed-up, to the digits that its bounds have."""
    return f"{interval.value:.2f}{TIMES}"


def verdict(speedup: Interval) -> str:
    """What the interval of a speed-up allows to say."""
    word = "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "no sure difference"
    return f"{word}, 95 % interval {bounds(speedup)}{TIMES}"


def judged(measurement: Measurement) -> str:
    """What the timing against dense allows to say, the calm of the machine considered."""
    said = {"no difference": "no sure difference", None: NOTHING}
    return said.get(measurement.verdict, str(measurement.verdict))


def timed_in(measurement: Measurement) -> str:
    """What a latency is of: `torch, 1 thread, batches of 32`."""
    return ", ".join(filter(None, (measurement.runtime, circumstances(measurement))))


def circumstances(measurement: Measurement) -> str:
    """How it was timed: `1 thread, batches of 32`; nothing where that is not known."""
    threads = f"{measurement.threads} thread{'s' if measurement.threads != 1 else ''}" if measurement.threads else ""
    batch = f"batches of {measurement.batch}" if measurement.batch and measurement.batch > 1 else ""
    return ", ".join(filter(None, (threads, batch)))


def in_common(names: Sequence[str]) -> str:
    """What several networks' names share, `rank 20` of `rank 20, zero-shot` and `rank 20, fine-tuned`; else all."""
    first, *others = [name.split(", ") for name in names]
    shared = [part for part in first if all(part in other for other in others)]
    return ", ".join(shared) or and_more(names, most=2)


def difference(variant: Variant, dense: Variant) -> str:
    """The accuracy against dense, in percentage points."""
    if variant.accuracy is None or dense.accuracy is None:
        return NOTHING
    return points(variant.accuracy - dense.accuracy)


def accuracy(variant: Variant) -> str:
    """Mean ± spread over the seeds, or the one seed's accuracy and its 95 % interval."""
    if variant.accuracy is None:
        return NOTHING
    around = uncertainty(variant)
    return f"{percent(variant.accuracy)} {around if variant.spread is not None else f'({around})'}"


def uncertainty(variant: Variant) -> str:
    """`± 0.07` over several seeds (in points), `95.67–96.44` from one."""
    if variant.spread is not None:
        return f"± {100 * variant.spread:.2f}"
    return bounds(variant.runs[0].test.interval, scale=100) if variant.runs else NOTHING


def agreement(one: Agreement) -> str:
    """How the factored network compares with the one that was trained."""
    alike = f"all {one.of:,}" if one.equal == one.of else f"{one.equal:,} of {one.of:,}"
    return (
        f"Against the network that was trained, its logits differ by at most {one.largest_difference:.1g} (the largest "
        f"is {one.largest_logit:.3g}), and {alike} test images are classified alike."
    )


def sentence(words: str) -> str:
    """With a capital at the beginning, and those within as they are."""
    return words[:1].upper() + words[1:]


def asked(rule: Rule | None) -> str:
    """A rule as words: `rank 20`."""
    match rule:
        case Rank():
            return f"rank {rule.rank}"
        case Ratio():
            return f"ratio {rule.ratio:g}"
        case Energy():
            return f"energy {percent(rule.energy, places=0)}"
        case Budget():
            kept = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "time"}[rule.limits]
            return f"{percent(rule.share, places=0)} of the {kept}"
    return NOTHING


def one_rank(variant: Variant) -> int | None:
    """The rank that all factored layers share, None where they differ."""
    if isinstance(variant.rule, Rank):
        return variant.rule.rank
    ranks = {layer.rank for layer in variant.plan.factored} if variant.plan else set()
    return ranks.pop() if len(ranks) == 1 else None


def ranks(variant: Variant) -> str:
    """The rank, or the smallest and largest rank, of the factored layers."""
    if (rank := one_rank(variant)) is not None:
        return str(rank)
    found = sorted(layer.rank for layer in variant.plan.factored if layer.rank) if variant.plan else []
    return f"{found[0]}{TO}{found[-1]}" if found else NOTHING


def shape(sides: Iterable[int]) -> str:
    """`256×64`, output first."""
    return TIMES.join(map(str, sides)) or NOTHING


def and_more(items: Sequence[str], *, most: int) -> str:
    """The first `most` items, and how many more there are."""
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest} more" if rest > 0 else "")


def costs(measurement: Measurement) -> str:
    """Parameters, bytes and MACs in one line."""
    return f"{count(measurement.params)} parameters, {size(measurement.bytes)}, {count(measurement.macs)} MACs"


def accuracy_finding(results: Results) -> str:
    """What the accuracy figure shows: each group's ends, and which network comes closest to dense."""
    measured = [one for one in results.variants if one.accuracy is not None]
    sentences = []
    if results.dense.accuracy is not None:
        sentences.append(f"The dense network reaches {accuracy(results.dense)}.")
    for label, group in grouped(measured).items():
        ordered = sorted(group, key=lambda one: one.measurement.params)
        ends = [percent(one.accuracy or 0) for one in (ordered[0], ordered[-1])]
        shown = ends[0] if len(ordered) == 1 else f"{ends[0]} with the smallest network to {ends[1]} with the largest"
        sentences.append(f"{sentence(label)}: {shown}.")
    if measured:
        best = max(measured, key=lambda one: one.accuracy or 0)
        against = (
            f", {difference(best, results.dense)} points against dense" if results.dense.accuracy is not None else ""
        )
        sentences.append(f"The most accurate compressed network is {best.name} with {accuracy(best)}{against}.")
    sentences += map(published_finding, results.published)
    return " ".join(sentences)


def grouped(variants: Iterable[Variant]) -> dict[str, list[Variant]]:
    """The variants by stage and family, such as `fine-tuned, plain metric`, in order of appearance."""
    shown = list(variants)
    titles = families(shown)
    groups: dict[str, list[Variant]] = {}
    for one in shown:
        title = titles[one.name]
        label = one.name if title == _untuned(one) else ", ".join(filter(None, (one.stage, title)))
        groups.setdefault(label, []).append(one)
    return groups


def families(variants: Iterable[Variant]) -> dict[str, str]:
    """What belongs together, by the networks' names: those made by one kind of rule in one metric.

    The kind of rule is said where there are several. A network that no rule describes, and one that is the only one of
    its kind, goes by its own name.
    """
    shown = list(variants)
    kinds = {type(one.rule) for one in shown if one.rule is not None and one.stage != "trained"}
    titles = {one.name: _family(one, several=len(kinds) > 1) for one in shown}
    members: dict[str, set[str]] = {}
    for one in shown:
        members.setdefault(titles[one.name], set()).add(_untuned(one))
    if len(members) == 1:
        return titles
    return {
        name: _only(members[title]) if len(members[title]) == 1 else title or "others" for name, title in titles.items()
    }


def _only(names: set[str]) -> str:
    (name,) = names
    return name


def _family(variant: Variant, *, several: bool) -> str:
    if variant.stage == "trained" or variant.rule is None:
        return _untuned(variant)
    kind = _KINDS[type(variant.rule)] if several else ""
    return ", ".join(filter(None, (kind, f"{variant.metric} metric" if variant.metric else "")))


_KINDS: dict[type, str] = {Rank: "rank", Ratio: "ratio", Energy: "energy", Budget: "budget"}


def _untuned(variant: Variant) -> str:
    """The name without the stage at its end."""
    title, comma, last = variant.name.rpartition(", ")
    return title if comma and (last == variant.stage or last.endswith(" tuned")) else variant.name


def published_place(point: PublishedPoint, against: str) -> float | None:
    """What a published network keeps of its own dense one's cost: kept / dense."""
    match against:
        case "params":
            return point.params_ratio
        case "macs":
            return point.macs_ratio
        case "latency":
            return None if point.speedup is None else 1 / point.speedup
    return None


def published_finding(published: Published) -> str:
    """Somebody else's figures in a sentence."""
    said = [f"{'dense' if rank is None else f'rank {rank}'} {percent(value)}" for rank, value in published.accuracy]
    for one in published.points:
        kept = {"parameters": one.params_ratio, "MACs": one.macs_ratio}
        costs = [f"{share(ratio)} of the {name}" for name, ratio in kept.items() if ratio is not None]
        costs += [f"{factor(one.speedup)} as fast"] if one.speedup is not None else []
        said.append(f"{one.name} {percent(one.accuracy)}{' with ' if costs else ''}{' and '.join(costs)}")
    return f"Published ({published.source}): {'; '.join(said)}."


def changes_finding(changes: Changes, *, most: int = 3) -> str:
    """How many answers changed, and for which classes that makes a sure difference."""
    whole = changes.whole
    seeds = f" (all {len(changes.seeds)} seeds together)" if len(changes.seeds) > 1 else ""
    sentences = [
        f"Of {whole.total:,} test images{seeds} {whole.broken:,} became wrong, {whole.mended:,} became right and "
        f"{whole.confused:,} are wrong in another way: {points_interval(whole)}."
    ]
    for word, sign in (("worse", -1), ("better", 1)):
        found = sorted((one for one in changes.classes if sure(one) == sign), key=abs_difference)
        if found:
            named = [f"{one.name} ({points(one.difference.value)})" for one in reversed(found)]
            sentences.append(f"Surely {word}, in points: {and_more(named, most=most)}.")
    if len(sentences) == 1:
        sentences.append("No class is surely better or worse than before.")
    return " ".join(sentences)


def abs_difference(one: Tally) -> float:
    """The size of the change in accuracy."""
    return abs(one.difference.value)


def sure(one: Tally) -> int:
    """-1: surely worse than before; 1: surely better; 0: the 95 % interval of the difference holds 0."""
    interval = one.difference
    return -1 if interval.high < 0 else 1 if interval.low > 0 else 0


def points_interval(one: Tally) -> str:
    """`−0.30 points, 95 % interval −0.52–−0.08`."""
    interval = one.difference
    return f"{points(interval.value)} points, 95 % interval {points(interval.low)} to {points(interval.high)}"


KIND: dict[Kind, str] = {
    "broken": "Right before, wrong now",
    "mended": "Wrong before, right now",
    "confused": "Wrong both times, with another answer",
}
"""The kinds of changed answers as headings."""


def spectrum_finding(spectra: Sequence[LayerSpectrum], plans: Sequence[Plan]) -> str:
    """How quickly the energy of one layer is gathered, and what the plans keep of it."""
    first = spectra[0]
    sentences = [f"Layer {first.layer} ({first.kind}, {shape(first.shape)}) has {len(first.values)} singular values."]
    for one in spectra:
        values = Spectrum(np.array(one.values))
        sentences.append(
            f"In the {one.metric} metric, {values.rank_for(0.5)} of them hold 50 % of the energy (explained variance), "
            f"{values.rank_for(0.9)} hold 90 % and {values.rank_for(0.99)} hold 99 %."
        )
    kept = []
    for one in spectra:
        held = explained(one)
        kept += [
            f"{percent(held[rank - 1], places=1)} at rank {rank} ({one.metric})"
            for rank in kept_ranks(plans, layer=one.layer, metric=one.metric)
            if rank <= len(held)
        ]
    if kept:
        sentences.append(f"Energy kept: {and_more(kept, most=6)}.")
    return " ".join(sentences)


def explained(spectrum: LayerSpectrum) -> NDArray[np.float64]:
    """The share of the energy that the first 1..k values hold: as the study noted it, else from the values."""
    return np.array(spectrum.cumulative or Spectrum(np.array(spectrum.values)).cumulative_energy, dtype=np.float64)


def kept_ranks(plans: Iterable[Plan], *, layer: str, metric: Metric) -> tuple[int, ...]:
    """The ranks at which plans keep a layer's matrix in a metric, smallest first; other forms have other spectra."""
    chosen = [one for plan in plans for one in plan if one.name == layer and one.metric == metric]
    decisions = [one for one in chosen if one.form in ("linear", "channel")]
    return tuple(sorted({one.rank for one in decisions if one.rank}))


def curves_finding(results: Results) -> str:
    """Where training began and ended, network by network (the first seed's)."""
    sentences = []
    for variant in (results.dense, *results.variants):
        curve = next((run.curve for run in variant.runs if run.curve), ())
        if not curve:
            continue
        first, last = curve[0], curve[-1]
        held = ""
        if first.held_out is not None and last.held_out is not None:
            held = f", held-out accuracy {percent(first.held_out)} to {percent(last.held_out)}"
        sentences.append(f"{variant.name}: loss {first.loss:.3g} to {last.loss:.3g}{held} in {len(curve)} epochs")
    return f"From the first epoch to the last of the first seed. {and_more(sentences, most=4)}." if sentences else ""
