"""Further tables of a study: what others published, the time in every runtime, and what became of every class."""

import math
from collections.abc import Sequence

from spectrim.benchmark.measurement import Measurement
from spectrim.reporting import words
from spectrim.reporting.results import Changes, Published, PublishedPoint, Results, Tally, Variant
from spectrim.reporting.tables import Column, Listing


def published_table(results: Results) -> Listing | None:
    """What others reached in the same study, each against its own dense network; None where nothing is known."""
    rows = tuple(row for one in results.published for row in _published_rows(one))
    if not rows:
        return None
    columns = (
        Column("Published network", number=False, narrow=12),
        Column("Source", 4, number=False, narrow=12),
        Column("Accuracy"),
        Column("Points vs\nits dense", 1),
        Column("Params", 2),
        Column("MACs", 3),
        Column("Speed-up", 3),
    )
    used = [at for at in range(len(columns)) if at < 3 or any(row[at] != words.NOTHING for row in rows)]
    return Listing(
        "Published figures",
        tuple(columns[at] for at in used),
        tuple(tuple(row[at] for at in used) for row in rows),
        note="As published, each against its own dense network; we have not measured them again.",
    )


def _published_rows(one: Published) -> list[tuple[str, ...]]:
    dense = next((value for rank, value in one.accuracy if rank is None), None)
    ranks = [
        PublishedPoint(name="dense" if rank is None else f"rank {rank}", accuracy=value)
        for rank, value in sorted(one.accuracy, key=lambda pair: -math.inf if pair[0] is None else -pair[0])
    ]
    return [
        (
            point.name,
            one.source,
            words.percent(point.accuracy),
            words.NOTHING if dense is None or point.name == "dense" else words.points(point.accuracy - dense),
            words.smaller(point.params_ratio),
            words.smaller(point.macs_ratio),
            words.NOTHING if point.speedup is None else words.factor(point.speedup),
        )
        for point in (*ranks, *one.points)
    ]


def runtimes_table(results: Results) -> Listing | None:
    """Latency and speed-up in every runtime, networks of the same shapes in one row; None where nothing was timed.

    Each speed-up is over the dense network in the same runtime.
    """
    rows: list[tuple[str, ...]] = []
    strong = set()
    circumstances: dict[str, None] = {}
    for members in _same_costs((results.dense, *results.variants)):
        name = words.in_common([one.name for one in members])
        for one in (members[0].measurement, *members[0].in_runtimes):
            if one.latency_ms is None:
                continue
            if any(member.name == results.chosen for member in members):
                strong.add(len(rows))
            circumstances[words.circumstances(one)] = None
            rows.append((name, *_runtime_cells(one)))
    if not rows:
        return None
    columns = (
        Column("Network", number=False, narrow=12),
        Column("Runtime", number=False),
        Column("Speed-up"),
        Column("Verdict", 3, number=False),
        Column("Latency", 1),
        Column("Speed-up\nfrom MACs", 2),
        Column("Share of it\nreached", 4),
    )
    note = (f"Timed with {' or '.join(filter(None, circumstances))}. " if any(circumstances) else "") + (
        "Speed-up: over the dense network in the same runtime, with its 95 % interval. The share reached is the "
        "measured speed-up over the one that the MACs promise. Networks with layers of the same shapes are timed once."
    )
    return Listing("Time in every runtime", columns, tuple(rows), strong=frozenset(strong), note=note)


def _same_costs(networks: Sequence[Variant]) -> list[list[Variant]]:
    """Networks that share one measurement, in order of appearance."""
    groups: list[list[Variant]] = []
    for one in networks:
        for group in groups:
            if (group[0].measurement, group[0].in_runtimes) == (one.measurement, one.in_runtimes):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _runtime_cells(one: Measurement) -> tuple[str, ...]:
    reached = one.efficiency
    return (
        one.runtime or words.NOTHING,
        words.NOTHING if one.speedup is None else f"{words.speedup(one.speedup)}\n{words.bounds(one.speedup)}",
        words.judged(one),
        words.milliseconds(one.latency_ms),
        words.NOTHING if one.macs_speedup is None else words.factor(one.macs_speedup),
        words.NOTHING
        if reached is None
        else f"{words.percent(reached.value, places=0)}\n{words.bounds(reached, scale=100)}",
    )


def changes_table(changes: Changes) -> Listing:
    """The accuracy of all classes together and of each one, before and after, with the interval of the difference."""
    columns = (
        Column("Class", number=False),
        Column("Test\nimages", 5),
        Column("Dense", 1),
        Column("Now"),
        Column("Points"),
        Column("95 %\ninterval", 2),
        Column("Became\nwrong", 3),
        Column("Became\nright", 3),
        Column("Wrong in\nanother way", 4),
    )
    seeds = f", summed over {len(changes.seeds)} seeds" if len(changes.seeds) > 1 else ""
    tallies = (("all classes", changes.whole), *((one.name, one) for one in changes.classes if one.total))
    return Listing(
        f"Accuracy of every class, {changes.variant}",
        columns,
        tuple(_changes_row(name, one) for name, one in tallies),
        strong=frozenset({0}),
        note=f"Both networks on the same test images{seeds}; the interval is that of the difference.",
    )


def _changes_row(name: str, one: Tally) -> tuple[str, ...]:
    interval = one.difference
    shares = [words.percent(right / one.total) for right in (one.before, one.after)]
    between = f"{words.points(interval.low)} to {words.points(interval.high)}"
    counts = (one.broken, one.mended, one.confused)
    return (name, f"{one.total:,}", *shares, words.points(interval.value), between, *(f"{n:,}" for n in counts))
