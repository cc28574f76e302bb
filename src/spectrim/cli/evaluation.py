"""`spectrim evaluate`: a network's score, and its difference to another network's."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import typer
from torch import nn

from spectrim.benchmark.scores import Score, evaluate
from spectrim.cli.commands import Evaluate, Scoring
from spectrim.cli.data_reference import data_reference, preparation
from spectrim.cli.loading import load_batches, load_model
from spectrim.cli.machine import SMALL_BATCH, find_device, set_threads
from spectrim.cli.options import Source
from spectrim.cli.outputs import OutputFiles, Record, outputs
from spectrim.cli.samples import StoredData
from spectrim.cli.stages import Stages, file_lines, show, stages
from spectrim.core.batches import length_of
from spectrim.core.errors import DataError
from spectrim.models.references import load_function
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.timing import Interval

_METRICS = ("accuracy", "perplexity", "spearman")
_Metric = Any
"""One of these, or a function."""


class Evaluated(Record):
    """What `spectrim evaluate --out` writes: the scores, and the network's less the other one's."""

    score: Score
    against: Score | None = None
    difference: Interval | None = None


def evaluate_network(command: Evaluate) -> None:
    """The table of the scores, and a file of every number."""
    source, scoring, out = command.source, command.scoring, command.out
    _ = source.options, preparation(source, None)
    device = find_device(command.machine)
    files: OutputFiles = {out.name: (Evaluated.load, "every number")} if out else {}
    with stages() as progress, outputs(out.parent, files) if out else nullcontext() as folder:
        metric = _metric(scoring, progress)
        model = load_model(source, progress, device=device)
        other = _other(command)
        # which may fail, before all is scored
        compared = None if other is None else load_model(other, progress, device=device)
        batches = _batches(command, model, progress)
        score = _score(source, model, batches, metric, progress=progress)
        record = Evaluated(command=str(command.invocation), score=score)
        if other is not None and compared is not None:
            dense = _score(other, compared, batches, metric, progress=progress)
            record = record.model_copy(update={"against": dense, "difference": score.against(dense)})
        if out is not None and folder is not None:
            record.save(folder / out.name)
    show(_table(record, command), *(file_lines(out.parent, files) if out else ()), output=command.output)


def _other(command: Evaluate) -> Source | None:
    """The network to compare with, if there is one."""
    source, scoring = command.source, command.scoring
    if scoring.against is None and scoring.against_weights is None:
        return None
    if scoring.against is None:
        return replace(source, weights=scoring.against_weights)
    return replace(source, model=scoring.against, option=None, weights=scoring.against_weights)


def _metric(scoring: Scoring, progress: Stages) -> _Metric:
    if scoring.metric in _METRICS:
        return scoring.metric
    if ":" not in scoring.metric:
        raise typer.BadParameter(f"--metric {scoring.metric}: give {', '.join(_METRICS)}, or pkg.module:function")
    progress.say(f"--metric {scoring.metric} runs the code of that module")
    return load_function(scoring.metric, what="scores")


def _batches(command: Evaluate, model: nn.Module, progress: Stages) -> Iterable[Any]:
    """The test data, or a whole text; both networks get the same."""
    source, whole = command.source, command.scoring.whole
    reference = data_reference(source)
    assert reference is not None  # the option is required
    if whole and reference.kind != "text":
        raise typer.BadParameter("--whole goes with --data text:FILE")
    if reference.kind == "text" and command.scoring.metric == "accuracy":
        raise typer.BadParameter("--metric accuracy is of class indices; of a text give --metric perplexity")
    data = load_batches(reference, source, progress, model)
    set_threads(command.machine, SMALL_BATCH, closing=progress.closing, say=progress.say)
    batches = data.split("whole") if whole and isinstance(data, StoredData) else data.tests
    if batches is None:
        raise DataError(f'{data.name} returns no test data; return {{"train": .., "test": ..}}')
    return batches


def _score(source: Source, model: nn.Module, batches: Iterable[Any], metric: _Metric, *, progress: Stages) -> Score:
    progress.begin(f"score {_name(source)}", total=length_of(batches) or None)
    return evaluate(model, progress.each(batches), metric)


def _name(source: Source) -> str:
    return source.model if source.weights is None else str(source.weights)


def _table(record: Evaluated, command: Evaluate) -> Listing:
    columns = (Column("Network", number=False), Column("Score"), Column("Low"), Column("High"), Column("Examples", 1))
    places = ".2%" if record.score.metric == "accuracy" else ".4f"

    def row(name: str, interval: Interval, examples: int) -> tuple[str, ...]:
        figures = (words.Cell(format(value, places), value) for value in (interval.value, interval.low, interval.high))
        return name, *figures, str(examples)

    rows, other = [row(_name(command.source), record.score.interval, record.score.examples)], _other(command)
    if other is not None and record.against is not None and record.difference is not None:
        rows.append(row(_name(other), record.against.interval, record.against.examples))
        rows.append(row("Difference", record.difference, record.score.examples))
    note = "Low and High: 95 % interval over the choice of examples"
    note += " (Wilson)" if record.score.metric == "accuracy" else " (bootstrap)"
    note += "; of the difference, on the same examples." if record.difference else "."
    return Listing(record.score.metric.capitalize(), columns, tuple(rows), note=note)
