"""`spectrim finetune`: train a compressed network so that it regains what compression lost."""

import json
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from spectrim import data
from spectrim.benchmark.measurement import Accuracy, Measurement, accuracy, measure
from spectrim.cli.options import arguments, unfolded
from spectrim.cli.outputs import Ours, outputs
from spectrim.cli.stages import Stages, stages
from spectrim.cli.subject import Images, Preparation, filled, subject
from spectrim.cli.tuning import Subjects, Tuning
from spectrim.core.errors import DataError, FileError
from spectrim.core.files import Frozen, parse, read_text, sha256_of, write_text
from spectrim.layers.saving import save
from spectrim.reporting import plot_history, words
from spectrim.reporting.listings import Column, Listing
from spectrim.training import Checkpoint, Finetuned, History, Step, finetune
from spectrim.training.checkpoint import fingerprint
from spectrim.training.settings import Settings

_MODEL, _HISTORY, _PAGE, _MEASURED = "model.safetensors", "history.json", "history.html", "measurement.json"
_UNFINISHED = "unfinished.safetensors"
_MARK = "<!-- Made by Spectrim. -->"


class Tuned(Frozen):
    """What `spectrim finetune` writes as measurement.json: the network before and after, and how to do it again.

    Attributes:
        before: As it was given, with its accuracy on the test images, as `after` and `teacher`.
        held_out: Accuracy on the held-out training images before and after.
    """

    version: Literal[1] = 1
    command: str
    before: Measurement
    after: Measurement
    teacher: Measurement | None = None
    held_out: tuple[Accuracy, Accuracy]
    model_sha256: str

    @classmethod
    def load(cls, path: Path) -> "Tuned":
        """Read one. Raises `FileError` for a missing, cut or invalid file."""
        return parse(cls, read_text(path), origin=str(path))


@unfolded
def finetune_network(
    *,
    subjects: Subjects,
    tuning: Tuning,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Accuracy on the test images, before and after.")
    ] = True,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help=f"Folder for {_MODEL}, {_HISTORY}, {_PAGE} and {_MEASURED}. The same command goes on with a run that "
            "was stopped.",
        ),
    ],
) -> None:
    """Train a compressed network a little more, so that it regains the accuracy that compression cost."""
    settings, unfinished = tuning.settings(seed=subjects.seed), out / _UNFINISHED
    _ = tuning.trained, subjects.source.options
    if settings.label_weight > 0 and subjects.teacher_weights is None:
        raise typer.BadParameter("--label-weight is a share beside a teacher: give --teacher-weights")
    with stages(left=lambda: _left(unfinished)) as shown, outputs(out, _ours(out)) as folder:
        ready = _ready(subjects, shown)
        first = accuracy(ready.network, ready.held_out)
        made = _tuned(ready, subjects, tuning, settings, shown, unfinished)
        held_out = first, accuracy(made.model, ready.held_out)
        measured = _measured(ready, made.model, shown) if test else _counted(ready, made.model)
        shown.begin("write")
        save(made.model, folder / _MODEL)
        made.history.save(folder / _HISTORY)
        write_text(folder / _PAGE, f"{_MARK}\n{plot_history(made.history).to_html(include_plotlyjs=True)}")
        command = shlex.join(
            ["spectrim", "finetune", *arguments(subjects, tuning), *([] if test else ["--no-test"]), "--out", str(out)]
        )
        before, after, teacher = measured
        found = Tuned(
            command=command,
            before=before,
            after=after,
            teacher=teacher,
            held_out=held_out,
            model_sha256=sha256_of(folder / _MODEL),
        )
        write_text(folder / _MEASURED, found.model_dump_json(indent=1, exclude_none=True) + "\n")
    unfinished.unlink(missing_ok=True)
    _show(found, made.history, ready, out)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images of a data set in batches, prepared as they are asked for; shuffled by a generator if there is one."""

    split: data.Dataset
    chosen: Tensor
    prepare: Preparation
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(len(self.chosen) / self.size)
        return max(1, len(self.chosen) // self.size)  # a short rest is left out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = self.chosen
        if self.seed is not None:
            chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(self.seed))]
        for part in chosen.split(self.size)[: len(self)]:
            yield self.prepare(self.split.images[part]), self.split.labels[part]


@dataclass(frozen=True, eq=False)
class _Ready:
    """Everything that is needed, loaded; what it was made from is known by `checksum`."""

    network: nn.Module
    teacher: nn.Module | None
    example: Tensor
    images: Images
    train: Callable[[int], _Part]
    held_out: _Part
    checksum: str


def _ready(subjects: Subjects, shown: Stages) -> _Ready:
    given = subject(subjects.source, shown, filled_later=True)
    network = filled(given.model, subjects.weights)
    teacher = None if subjects.teacher_weights is None else filled(given.model, subjects.teacher_weights)
    why_not = given.untestable()
    if why_not is not None or given.images is None:
        raise DataError(f"the labels cannot be learnt: {why_not}; do --option and --data fit the network?")
    split = data.load(subjects.data, split="train", folder=subjects.data_folder)
    aside = min(5000, math.ceil(len(split) / 10)) if subjects.held_out is None else subjects.held_out
    if aside >= len(split):
        raise DataError(f"{subjects.data} has {len(split)} training images; --held-out {aside} leaves none to train on")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(subjects.seed))
    prepare = given.images.prepare

    def epoch(number: int) -> _Part:
        seed = subjects.seed * 1_000_003 + number
        return _Part(split, order[aside:], prepare, subjects.batch, seed=seed)

    held_out = _Part(split, order[:aside], prepare, max(256, subjects.batch))
    return _Ready(network, teacher, given.example, given.images, epoch, held_out, split.checksum)


def _tuned(
    ready: _Ready, subjects: Subjects, tuning: Tuning, settings: Settings, shown: Stages, unfinished: Path
) -> Finetuned:
    """The training itself, from where an earlier one of the same options was stopped."""
    own = asdict(subjects) | asdict(tuning)
    # where files lie does not matter, what is in them does
    given = {name: own[name] for name in own.keys() - {"weights", "teacher_weights", "data_folder", "save_every"}}
    teacher = None if ready.teacher is None else fingerprint(ready.teacher)["weights"]
    identity = {**fingerprint(ready.network), "teacher": teacher, "images": ready.checksum, **given}
    checkpoint = Checkpoint(unfinished, run=json.dumps(identity, sort_keys=True), unfit="refuse")
    steps = len(ready.train(0))
    shown.begin("train", of=settings.epochs * steps)
    return finetune(
        ready.network,
        ready.train,
        teacher=ready.teacher,
        train=tuning.trained,
        **settings.model_dump(),
        frozen_norms=not tuning.unfreeze_norms,
        held_out=ready.held_out,
        checkpoint=checkpoint,
        save_every=tuning.save_every,
        on_step=_Teller(shown),
    )


@dataclass
class _Teller:
    """Shows each step in a terminal, and the last one of each epoch elsewhere."""

    shown: Stages
    begun: bool = False

    def __call__(self, step: Step) -> None:
        if not self.begun and (step.epoch or step.step):
            where = f"going on from epoch {step.epoch + 1}, step {step.step + 1}"
            self.shown.console.print(where, markup=False, soft_wrap=True)
        self.begun = True
        self.shown.reach(step.epoch * step.steps + step.step + 1)
        right = "" if step.accuracy is None else f", accuracy {words.percent(step.accuracy)}"
        said = f"epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}{right}"
        left = "" if step.seconds_left is None else f", {_time(step.seconds_left)} left"
        self.shown.say(f"{said}{left}")
        if not self.shown.console.is_terminal and step.step + 1 == step.steps:
            self.shown.console.print(said, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _measured(ready: _Ready, made: nn.Module, shown: Stages) -> tuple[Measurement, Measurement, Measurement | None]:
    """Before, after, and the teacher, with their accuracies on the test images."""
    tests = ready.images.tests()
    counted = _counted(ready, made)
    networks = {"network before": ready.network, "network after": made, "teacher": ready.teacher}
    found: list[Measurement | None] = []
    for (name, network), own in zip(networks.items(), counted, strict=True):
        if network is None or own is None:
            found.append(None)
            continue
        shown.begin(f"test the {name}", of=len(tests))
        found.append(own.model_copy(update={"accuracy": accuracy(network, shown.each(tests))}))
    before, after, teacher = found
    assert before is not None
    assert after is not None
    return before, after, teacher


def _counted(ready: _Ready, made: nn.Module) -> tuple[Measurement, Measurement, Measurement | None]:
    def one(network: nn.Module) -> Measurement:
        return measure(network, ready.example, latency=False)

    return one(ready.network), one(made), None if ready.teacher is None else one(ready.teacher)


def _show(found: Tuned, history: History, ready: _Ready, out: Path) -> None:
    console = Console(highlight=False)
    console.print(_table(found, ready))
    if history.stopped_early:
        console.print(f"Stopped after {len(history)} epochs: the held-out accuracy no longer rose.", soft_wrap=True)
    if history.kept is not None and history.kept + 1 < len(history):
        console.print(f"Saved is epoch {history.kept + 1}, the best on the held-out images.", soft_wrap=True)
    for name, what in (
        (_MODEL, "the network: spectrim.load(path, network)"),
        (_HISTORY, "every epoch"),
        (_PAGE, "open this in a browser"),
        (_MEASURED, "every number"),
    ):
        console.print(f"  {out / name}  ({what})", markup=False, soft_wrap=True)


def _table(found: Tuned, ready: _Ready) -> Listing:
    before, after = found.held_out
    rows = [("before", found.before, before), ("after", found.after, after)]
    cells = [_row(name, measured, held_out) for name, measured, held_out in rows]
    if found.teacher is not None:
        cells.append(_row("teacher", found.teacher, None))
    columns = (
        Column("Network", number=False),
        Column("Params", 1),
        Column("MACs", 2),
        Column("Held-out\naccuracy"),
        Column("Test\naccuracy"),
    )
    note = f"{before.total:,} held-out training images of {ready.images.info.name}"
    tested = found.after.accuracy
    note += f"; {tested.total:,} test images." if tested else "; not tested (--no-test)."
    return Listing("Fine-tuning", columns, tuple(cells), strong=frozenset({1}), note=note)


def _row(name: str, measured: Measurement, held_out: Accuracy | None) -> tuple[str, ...]:
    shares = (held_out, measured.accuracy)
    shown = [words.NOTHING if one is None else words.percent(one.value) for one in shares]
    return (name, words.count(measured.params), words.count(measured.macs), *shown)


def _left(unfinished: Path) -> str:
    if not unfinished.exists():
        return "nothing was written"
    return f"{unfinished} holds what is done, and the same command goes on from there"


def _ours(out: Path) -> dict[str, Ours]:
    """What may be replaced: histories, their pages, measurements, and the network that the measurement describes."""

    def require_recorded(model: Path) -> None:
        if Tuned.load(out / _MEASURED).model_sha256 != sha256_of(model):
            raise FileError(f"{model} was changed after it was written")

    return {_MODEL: require_recorded, _HISTORY: History.load, _PAGE: _require_page, _MEASURED: Tuned.load}


def _require_page(path: Path) -> None:
    if not read_text(path).startswith(_MARK):
        raise FileError(f"{path} is another page")
