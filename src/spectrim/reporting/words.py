"""Numbers and findings in words: the same in terminal tables, figures and pages."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from spectrim.benchmark.measurement import Measurement
from spectrim.core.plans import Budget, Energy, Metric, Plan, Rank, Ratio, Rule
from spectrim.layers.forms import selected_forms
from spectrim.linalg import Spectrum
from spectrim.reporting.results import Agreement, Changes, LayerSpectrum, Published, Results, Tally, Variant
from spectrim.runtimes.timing import Interval

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)

TIMES = "\N{MULTIPLICATION SIGN}"
TO = "\N{EN DASH}"
NOTHING = TO


class Cell(str):
    """Words that keep their number, for programs: `2.57 k` that is 2570, `96.07 %` that is 0.9607.

    `values` are by what each of them is, such as before and after, and by "" where there is one.
    """

    values: Mapping[str, object]

    def __new__(cls, text: str, value: object = None, /, **values: object) -> Self:  # noqa: D102
        cell = super().__new__(cls, text)
        cell.values = values or {"": value}
        return cell


def lines(*cells: str) -> Cell:
    """The cells below each other, with the numbers of all."""
    return Cell("\n".join(cells), **dict(item for cell in cells for item in getattr(cell, "values", {}).items()))


def count(number: float, *, unit: str = "") -> Cell:
    """Up to three significant digits with an SI prefix: 2570 is `2.57 k`."""
    if number < 1000:
        return Cell(f"{number:g} {unit}".strip(), number)
    digits = float(f"{number:.3g}")
    power = min(4, int(math.log10(digits) // 3))
    return Cell(f"{f'{digits / 1000**power:#.3g}'.rstrip('.')} {['', 'k', 'M', 'G', 'T'][power]}{unit}", number)


def change(before: int, after: int) -> str:
    """Both numbers, or the one that stays."""
    text = count(before) if before == after else f"{count(before)} →\n{count(after)}"
    return Cell(text, before=before, after=after)


def size(number: float) -> Cell:
    """Bytes in decimal units: 340448 is `340 kB`."""
    return count(number, unit="B")


def percent(share: float | None, *, places: int = 2) -> str:
    """A share of 0.9607 is `96.07 %`."""
    return NOTHING if share is None else Cell(f"{100 * share:.{places}f} %", share)


def share(ratio: float | None) -> str:
    """A ratio kept / dense as a percentage of about two digits."""
    return percent(ratio, places=0 if ratio is None or ratio >= 0.1 else 1 if ratio >= 0.01 else 2)


def points(difference: float | None) -> str:
    """A difference of two accuracies in percentage points, with its sign: −0.023 is `−2.30`; none is `0.00`."""
    if difference is None:
        return NOTHING
    signed = f"{100 * difference:+z.2f}".replace("-", "\N{MINUS SIGN}")
    return Cell("0.00" if signed == "+0.00" else signed, 100 * difference)


def factor(value: float | None) -> str:
    """A multiple: two decimals below 2, one below 100."""
    return NOTHING if value is None else Cell(f"{value:.{2 if value < 2 else 1 if value < 100 else 0}f}{TIMES}", value)


def smaller(ratio: float | None) -> str:
    """A ratio kept / dense in everyday words: 0.43 is `2.3× smaller`."""
    if ratio is None:
        return NOTHING
    text = "nothing left" if ratio <= 0 else "unchanged" if ratio == 1 else ""
    text = text or (f"{factor(1 / ratio)} smaller" if ratio < 1 else f"{factor(ratio)} larger")
    return Cell(text, **{"kept / dense": ratio})


def milliseconds(value: float | None) -> str:
    """Three significant digits: `0.0190 ms`, `123 ms`."""
    if value is None:
        return NOTHING
    return Cell(f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms", value)


def latency(measurement: Measurement) -> str:
    """Of one pass; with that of the dense network before it, where both were timed in turn."""
    before, after = milliseconds(measurement.reference_ms), milliseconds(measurement.latency_ms)
    if None in (measurement.reference_ms, measurement.latency_ms):
        return after
    return Cell(f"{before} →\n{after}", **{"": measurement.latency_ms, "dense": measurement.reference_ms})


def bounds(interval: Interval, *, scale: float = 1.0) -> str:
    """Both ends of an interval with two decimals."""
    return Cell(f"{scale * interval.low:.2f}{TO}{scale * interval.high:.2f}", low=interval.low, high=interval.high)


def speedup(interval: Interval) -> str:
    """A speed-up with two decimals: `1.50×`."""
    return Cell(f"{interval.value:.2f}{TIMES}", interval.value)


def interval_lines(interval: Interval | None, *, share: bool = False) -> str:
    """A speed-up (or a share), and its interval in a second line."""
    if interval is None:
        return NOTHING
    value = percent(interval.value, places=0) if share else speedup(interval)
    return lines(value, bounds(interval, scale=100 if share else 1))


def verdict(speedup: Interval, *, word: str | None = None) -> str:
    """Faster, slower or no sure difference (or `word`, where more is known), with the interval of the speed-up."""
    word = word or ("faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "no sure difference")
    return f"{word}, 95 % interval {bounds(speedup)}{TIMES}"


def timing_verdict(measurement: Measurement) -> str:
    """`Measurement.verdict` in words; unlike `verdict` it takes into account how steady the machine was."""
    return (measurement.verdict or NOTHING).replace("no difference", "no sure difference")


def threads(number: int | None) -> str:
    """`1 thread`; nothing where the number is not known."""
    return f"{number} thread{'s' if number != 1 else ''}" if number else ""


def circumstances(measurement: Measurement) -> str:
    """How it was timed: `1 thread, batches of 32`; nothing where that is not known."""
    batch = f"batches of {measurement.batch}" if measurement.batch and measurement.batch > 1 else ""
    return ", ".join(filter(None, (threads(measurement.threads), batch)))


def costs(measurement: Measurement) -> dict[str, tuple[Cell, float | None]]:
    """The value of each cost, and its ratio kept / dense."""
    cache = measurement.cache_bytes
    return {
        "Parameters": (count(measurement.params), measurement.params_ratio),
        "File size": (size(measurement.bytes), measurement.bytes_ratio),
        "MACs": (count(measurement.macs), measurement.macs_ratio),
    } | ({"Cache of a token": (size(cache), measurement.cache_bytes_ratio)} if cache else {})


def common_name(names: Sequence[str]) -> str:
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
    around = uncertainty(variant)
    return f"{percent(variant.accuracy)} {around if variant.spread is not None else f'({around})'}"


def uncertainty(variant: Variant) -> str:
    """`± 0.07` over several seeds (in points), `95.67–96.44` from one."""
    if variant.spread is not None:
        return Cell(f"± {100 * variant.spread:.2f}", spread=variant.spread)
    return bounds(variant.runs[0].test.interval, scale=100) if variant.runs else NOTHING


def agreement(value: Agreement) -> str:
    """How the factored network compares with the one that was trained."""
    alike = f"all {value.of:,}" if value.equal == value.of else f"{value.equal:,} of {value.of:,}"
    return (
        f"Against the network that was trained, its logits differ by at most {value.largest_difference:.1g} (the "
        f"largest is {value.largest_logit:.3g}), and {alike} test images are classified alike."
    )


def sentence(text: str) -> str:
    """With a capital at the beginning, and those within as they are."""
    return text[:1].upper() + text[1:]


def rule_text(rule: Rule | None) -> str:
    """A rule as words: `rank 20`."""
    match rule:
        case Rank():
            return f"rank {rule.rank}"
        case Ratio():
            return f"ratio {rule.ratio:g}"
        case Energy():
            return f"energy {percent(rule.energy, places=0)}"
        case Budget():
            cost = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "time"}[rule.limits]
            return f"{percent(rule.share, places=0)} of the {cost}{' of what can shrink' if rule.of else ''}"
    return NOTHING


def shared_rank(variant: Variant) -> int | None:
    """The rank that all factored layers share, None where they differ."""
    if isinstance(variant.rule, Rank):
        return variant.rule.rank
    ranks = {layer.rank for layer in variant.plan.factored} if variant.plan else set()
    return ranks.pop() if len(ranks) == 1 else None


def ranks(variant: Variant) -> str:
    """The rank, or the smallest and largest rank, of the factored layers."""
    if (rank := shared_rank(variant)) is not None:
        return str(rank)
    ordered = sorted(layer.rank for layer in variant.plan.factored if layer.rank) if variant.plan else []
    return f"{ordered[0]}{TO}{ordered[-1]}" if ordered else NOTHING


def shape(sides: Iterable[int]) -> str:
    """`256×64`, output first."""
    return TIMES.join(map(str, sides)) or NOTHING


def and_more(items: Sequence[str], *, most: int) -> str:
    """The first `most` items, and how many more there are."""
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest} more" if rest > 0 else "")


def group_by(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """The items by their keys, in order of appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def accuracy_finding(results: Results) -> str:
    """What the accuracy figure shows: each group's ends, and which network comes closest to dense."""
    measured = [variant for variant in results.variants if variant.accuracy is not None]
    known = results.dense.accuracy is not None
    sentences = [f"The dense network reaches {accuracy(results.dense)}."] if known else []
    for label, group in grouped(measured).items():
        ordered = sorted(group, key=lambda variant: variant.measurement.params)
        smallest, largest = percent(ordered[0].accuracy), percent(ordered[-1].accuracy)
        ends = f"{smallest} with the smallest network to {largest} with the largest"
        sentences.append(f"{sentence(label)}: {ends if len(group) > 1 else smallest}.")
    if measured:
        best = max(measured, key=lambda variant: variant.accuracy or 0)
        against = f", {difference(best, results.dense)} points against dense" if known else ""
        sentences.append(f"The most accurate compressed network is {best.name} with {accuracy(best)}{against}.")
    return " ".join([*sentences, *map(published_finding, results.published)])


def grouped(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    """The variants by stage and family, such as `fine-tuned, plain metric`, in order of appearance."""
    titles = families(variants)

    def label(variant: Variant) -> str:
        title = titles[variant.name]
        return variant.name if title == _base_name(variant) else ", ".join(filter(None, (variant.stage, title)))

    return group_by(variants, label)


def families(variants: Sequence[Variant]) -> dict[str, str]:
    """What belongs together, by the networks' names: those made by one kind of rule in one metric.

    The kind of rule is named where there are several. A network without a rule, and one that is the only one of its
    kind, has its own name as title.
    """
    rules = {variant.name: variant.rule for variant in variants if variant.rule and variant.stage != "trained"}
    mixed = len({rule.rule for rule in rules.values()}) > 1
    titles = {variant.name: _base_name(variant) for variant in variants}
    for variant in variants:
        if variant.name in rules:
            kind = rules[variant.name].rule if mixed else ""
            metric = f"{variant.metric} metric" if variant.metric else ""
            titles[variant.name] = ", ".join(filter(None, (kind, metric)))
    members = group_by(variants, lambda variant: titles[variant.name])
    if len(members) == 1:
        return titles
    names = {title: {_base_name(variant) for variant in group} for title, group in members.items()}
    single = {title: next(iter(own)) if len(own) == 1 else title or "others" for title, own in names.items()}
    return {name: single[title] for name, title in titles.items()}


def _base_name(variant: Variant) -> str:
    """The name without the stage at its end."""
    title, comma, last = variant.name.rpartition(", ")
    return title if comma and (last == variant.stage or last.endswith(" tuned")) else variant.name


def published_finding(published: Published) -> str:
    """Somebody else's figures in a sentence."""
    networks = []
    for point in published.networks:
        ratios = {"parameters": point.params_ratio, "MACs": point.macs_ratio}
        costs = [f"{share(ratio)} of the {name}" for name, ratio in ratios.items() if ratio is not None]
        costs += [f"{factor(point.speedup)} as fast"] if point.speedup is not None else []
        networks.append(f"{point.name} {percent(point.accuracy)}{' with ' if costs else ''}{' and '.join(costs)}")
    return f"Published ({published.source}): {'; '.join(networks)}."


def changes_finding(changes: Changes, *, most: int = 3) -> str:
    """How many answers changed, and for which classes that makes a sure difference."""
    whole = changes.whole
    seeds = f" (all {len(changes.seeds)} seeds together)" if len(changes.seeds) > 1 else ""
    sentences = [
        f"Of {whole.total:,} test images{seeds} {whole.broken:,} became wrong, {whole.corrected:,} became right and "
        f"{whole.confused:,} are wrong in another way: {points_interval(whole)}."
    ]
    for word, sign in (("worse", -1), ("better", 1)):
        classes = [tally for tally in changes.classes if sure_sign(tally) == sign]
        if classes:
            classes.sort(key=lambda tally: abs(tally.difference.value))
            names = [f"{tally.name} ({points(tally.difference.value)})" for tally in reversed(classes)]
            sentences.append(f"Surely {word}, in points: {and_more(names, most=most)}.")
    if len(sentences) == 1:
        sentences.append("No class is surely better or worse than before.")
    return " ".join(sentences)


def sure_sign(tally: Tally) -> int:
    """-1: surely worse than before; 1: surely better; 0: the 95 % interval of the difference holds 0."""
    interval = tally.difference
    return -1 if interval.high < 0 else 1 if interval.low > 0 else 0


def points_bounds(interval: Interval) -> str:
    """Both ends of an interval in points: `−0.52 to −0.08`."""
    return Cell(f"{points(interval.low)} to {points(interval.high)}", low=100 * interval.low, high=100 * interval.high)


def points_interval(tally: Tally) -> str:
    """`−0.30 points, 95 % interval −0.52 to −0.08`."""
    return f"{points(tally.difference.value)} points, 95 % interval {points_bounds(tally.difference)}"


def spectrum_finding(spectra: Sequence[LayerSpectrum], plans: Sequence[Plan]) -> str:
    """How many singular values of one layer hold how much energy, and what share the plans keep."""
    first = spectra[0]
    sentences = [f"Layer {first.layer} ({first.kind}, {shape(first.shape)}) has {len(first.values)} singular values."]
    energies = []
    for spectrum in spectra:
        values, shares = Spectrum(np.array(spectrum.values)), explained(spectrum)
        sentences.append(
            f"In the {spectrum.metric} metric, {values.rank_for(0.5)} of them hold 50 % of the energy (explained "
            f"variance), {values.rank_for(0.9)} hold 90 % and {values.rank_for(0.99)} hold 99 %."
        )
        energies += [
            f"{percent(shares[rank - 1], places=1)} at rank {rank} ({spectrum.metric})"
            for rank in planned_ranks(plans, layer=spectrum.layer, metric=spectrum.metric)
            if rank <= len(shares)
        ]
    if energies:
        sentences.append(f"Energy kept: {and_more(energies, most=6)}.")
    return " ".join(sentences)


def explained(spectrum: LayerSpectrum) -> NDArray[np.float64]:
    """The share of the energy that the first 1..k values hold: as the study recorded it, else from the values."""
    return np.array(spectrum.cumulative or Spectrum(np.array(spectrum.values)).cumulative_energy, dtype=np.float64)


def planned_ranks(plans: Iterable[Plan], *, layer: str, metric: Metric) -> tuple[int, ...]:
    """The ranks at which plans keep a layer's matrix in a metric, smallest first; other forms have other spectra."""
    forms = selected_forms(None, closed_form=True)
    decisions = (decided for plan in plans for decided in plan if decided.name == layer and decided.metric == metric)
    return tuple(sorted({decided.rank for decided in decisions if decided.rank and decided.form in forms}))


def curves_finding(results: Results) -> str:
    """Where training began and ended, network by network (the first seed's)."""
    sentences = []
    for variant in (results.dense, *results.variants):
        curve = next((run.curve for run in variant.runs if run.curve), ())
        if not curve:
            continue
        first, last = curve[0], curve[-1]
        known = first.held_out is not None and last.held_out is not None
        accuracy = f", held-out accuracy {percent(first.held_out)} to {percent(last.held_out)}" if known else ""
        sentences.append(f"{variant.name}: loss {first.loss:.3g} to {last.loss:.3g}{accuracy} in {len(curve)} epochs")
    return f"From the first epoch to the last of the first seed. {and_more(sentences, most=4)}." if sentences else ""
