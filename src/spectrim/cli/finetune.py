"""`spectrim finetune`: train a compressed network so that it regains what compression lost."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import typer
from torch import nn

from spectrim.benchmark.measurement import Accuracy, Measurement, accuracy
from spectrim.cli.commands import HISTORY, HISTORY_PAGE, MEASURED, MODEL, Finetune, Tuning
from spectrim.cli.data_reference import has_values
from spectrim.cli.loading import Loaded, load_network, load_source
from spectrim.cli.outputs import OutputFiles, Record, has_checksum, is_page, outputs
from spectrim.cli.samples import Data
from spectrim.cli.stages import Stages, file_lines, show, stages
from spectrim.core.batches import length_of
from spectrim.core.errors import DataError
from spectrim.core.execution import device_of
from spectrim.core.files import sha256_of, write_text
from spectrim.layers.saving import save
from spectrim.reporting import plot_history, words
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.training import Checkpoint, Finetuned, History, Step, finetune
from spectrim.training.checkpoint import identity
from spectrim.training.losses import Objective
from spectrim.training.settings import Settings

_UNFINISHED = "unfinished.safetensors"
_MARK = "<!-- Made by Spectrim. -->"
_Row = tuple[str, Measurement, Accuracy | float | None]


class Tuned(Record):
    """What `spectrim finetune` writes as measurement.json: the network before and after, and the teacher.

    Their accuracies are on the test data; those of `held_out`, before and after, on the held-out training data, of
    which there is only a loss where labels are no class indices.
    """

    before: Measurement
    after: Measurement
    teacher: Measurement | None = None
    held_out: tuple[Accuracy, Accuracy] | None = None
    held_out_loss: tuple[float, float] | None = None
    model_sha256: str


def finetune_network(command: Finetune) -> None:
    """The network after training, its history and what was measured, as tables and as files."""
    source, tuning, out = command.source, command.tuning, command.out
    settings = Settings(**vars(command.training), clip=tuning.clip or None, seed=source.seed)
    _ = tuning.trained, source.options
    if settings.label_weight > 0 and tuning.teacher_weights is None:
        raise typer.BadParameter("--label-weight needs a teacher: give --teacher-weights")
    if settings.loss not in (None, "cross_entropy") and tuning.teacher_weights is None and not has_values(source):
        raise typer.BadParameter(f"--loss {settings.loss} compares with a teacher: give --teacher-weights")
    if settings.loss in ("mse", "bce") and settings.label_weight > 0:
        raise typer.BadParameter(f"--loss {settings.loss} takes no class indices: leave --label-weight out")
    unfinished, files = out / _UNFINISHED, _files(out)
    with stages(state=lambda: _state(unfinished)) as progress, outputs(out, files) as folder:
        task = _load(command, progress=progress)
        first = task.held_out_figure(task.network.model, settings)
        checkpoint = _checkpoint(task, unfinished, options=command.invocation.values)
        result = _finetune(task, tuning, settings=settings, progress=progress, checkpoint=checkpoint)
        last = task.held_out_figure(result.model, settings)
        tested = command.test and task.network.why_untested() is None
        measured = partial(task.network.measured, progress=progress, tested=tested)
        before = measured(task.network.model, "network before")
        after = measured(result.model, "network after")
        teacher = measured(task.teacher, "teacher") if task.teacher else None
        progress.begin("write")
        save(result.model, folder / MODEL)
        result.history.save(folder / HISTORY)
        write_text(folder / HISTORY_PAGE, f"{_MARK}\n{plot_history(result.history).to_html(include_plotlyjs=True)}")
        record = Tuned(
            command=str(command.invocation),
            before=before,
            after=after,
            teacher=teacher,
            held_out=(first, last) if isinstance(first, Accuracy) and isinstance(last, Accuracy) else None,
            held_out_loss=(first, last) if isinstance(first, float) and isinstance(last, float) else None,
            model_sha256=sha256_of(folder / MODEL),
        )
        record.save(folder / MEASURED)
    unfinished.unlink(missing_ok=True)
    show(*_results(record, result.history, data=task.data), *file_lines(out, files), output=command.output)


@dataclass(frozen=True, eq=False)
class _Task:
    """Everything that training needs, loaded."""

    network: Loaded
    teacher: nn.Module | None
    data: Data
    train: Callable[[int], Iterable[Any]]
    held_out: Iterable[Any]

    def held_out_figure(self, model: nn.Module, settings: Settings) -> Accuracy | float | None:
        """On what is held out the accuracy, or the loss where labels are no class indices."""
        if self.network.why_unscored is None:
            return accuracy(model, self.held_out)
        return Objective(settings, teacher=self.teacher).held_out(model, self.held_out)[1]


def _load(command: Finetune, *, progress: Stages) -> _Task:
    source, tuning = command.source, command.tuning
    teacher = load_network(source, tuning.teacher_weights) if tuning.teacher_weights else None
    network = load_source(source, progress, command.machine)
    teacher = teacher and teacher.to(device_of(network.model))
    data, reason = network.data, network.why_unscored
    if data is None or (reason is not None and data.classes):
        raise DataError(f"the labels cannot be learnt: {reason}; do --option and --data fit the network?")
    train = partial(data.training, held_out=tuning.held_out)
    return _Task(network, teacher, data, train, data.held_out(tuning.held_out))


def _checkpoint(task: _Task, path: Path, *, options: Mapping[str, object]) -> Checkpoint:
    """The state of a run with these networks, images and options, wherever the files are."""
    paths = {"weights", "teacher_weights", "data_folder", "save_every", "test", "out", "threads", "device", "expect"}
    settings = {name: value for name, value in options.items() if name not in paths}
    run = identity(task.network.model, task.teacher, {"images": task.data.checksum, **settings})
    return Checkpoint(path, run=run, unfit="refuse")


def _finetune(
    task: _Task, tuning: Tuning, *, settings: Settings, progress: Stages, checkpoint: Checkpoint
) -> Finetuned:
    """Train, or go on with a run of the same options that was stopped."""
    progress.begin("train", total=settings.epochs * length_of(task.train(0)) or None)
    return finetune(
        task.network.model,
        task.train,
        teacher=task.teacher,
        train=tuning.trained,
        **settings.model_dump(),
        frozen_norms=not tuning.unfreeze_norms,
        held_out=task.held_out,
        checkpoint=checkpoint,
        save_every=tuning.save_every,
        on_step=_StepReport(progress),
    )


@dataclass
class _StepReport:
    """Shows each step in a terminal, and the last one of each epoch elsewhere."""

    progress: Stages
    begun: bool = False

    def __call__(self, step: Step) -> None:
        if not self.begun and (step.epoch or step.step):
            self.progress.say(f"going on from epoch {step.epoch + 1}, step {step.step + 1}")
        self.begun = True
        correct = "" if step.accuracy is None else f", training accuracy {words.percent(step.accuracy)}"
        text = f"epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}{correct}"
        remaining = "" if step.seconds_left is None else f", {timedelta(seconds=round(step.seconds_left))} left"
        self.progress.update(step.epoch * step.steps + step.step + 1, detail=f"{text}{remaining}")
        if not self.progress.console.is_terminal and step.step + 1 == step.steps:
            self.progress.say(text)


def _state(unfinished: Path) -> str:
    if not unfinished.exists():
        return "nothing was written"
    return f"{unfinished} holds what is done, and the same command goes on from there"


def _results(record: Tuned, history: History, *, data: Data) -> tuple[Listing | str | None, ...]:
    why = "loss no longer fell" if history.measured_by == "loss" else "accuracy no longer rose"
    stopped = f"Stopped after {len(history)} epochs: the held-out {why}."
    epoch = history.weights_of
    best = epoch if epoch is not None and epoch + 1 < len(history) else None
    return (
        _table(record, data),
        stopped if history.stopped_early else None,
        None if best is None else f"Saved is epoch {best + 1}, the best on the held-out {data.noun}.",
    )


def _table(record: Tuned, data: Data) -> Listing:
    before, after = record.held_out or record.held_out_loss or (None, None)
    rows: list[_Row] = [("before", record.before, before), ("after", record.after, after)]
    kind = "accuracy" if record.held_out else "loss"
    columns: dict[Column, Callable[[_Row], str]] = {
        Column("Network", number=False): lambda row: row[0],
        Column("Params", 1): lambda row: words.count(row[1].params),
        Column("MACs", 2): lambda row: words.count(row[1].macs),
        Column(f"Held-out\n{kind}"): lambda row: _held_out(row[2]),
        Column("Test\naccuracy"): lambda row: words.percent(row[1].accuracy.value if row[1].accuracy else None),
    }
    tested = f"{record.after.accuracy.total:,} test {data.noun}" if record.after.accuracy else "not tested"
    total = f"{record.held_out[0].total:,} held-out" if record.held_out else "Held-out"
    rows += [("teacher", record.teacher, None)] if record.teacher else []
    note = f"{total} training {data.noun} of {data.name}; {tested}."
    return listing("Fine-tuning", rows, columns, strong=lambda row: row[0] == "after", note=note)


def _held_out(value: Accuracy | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else words.percent(value.value if value else None)


def _files(out: Path) -> OutputFiles:
    """What is written; it replaces histories, their pages, measurements, and the network that these describe."""
    recorded = has_checksum(lambda: Tuned.load(out / MEASURED).model_sha256)
    return {
        MODEL: (recorded, "the network: spectrim.load(path, network)"),
        HISTORY: (History.load, "every epoch"),
        HISTORY_PAGE: (is_page, "open this in a browser"),
        MEASURED: (Tuned.load, "every number"),
    }
