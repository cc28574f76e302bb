"""`spectrim analyze`, `spectrim plan` and `spectrim compress`: the library's chain on a network of yours."""

import shlex
from collections.abc import Callable, Container
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.sensitivities import felt, sensitivity
from spectrim.analysis.spectra import Analysis, analyze
from spectrim.benchmark.measurement import Measurement, accuracy, measure
from spectrim.cli.options import Choice, Layers, Source, arguments, unfolded
from spectrim.cli.outputs import Ours, outputs
from spectrim.cli.stages import Stages, stages
from spectrim.cli.subject import Subject, subject
from spectrim.compression import Compressed, choose, compress
from spectrim.core.errors import FileError
from spectrim.core.execution import as_inputs
from spectrim.core.files import Frozen, parse, read_text, sha256_of, write_text
from spectrim.core.plans import Budget, LatencyNote, Metric, Plan, Rule
from spectrim.layers.saving import save
from spectrim.planning.rules import require_possible
from spectrim.reporting import Results, report, table, words
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import require_runtime

_MODEL, _PLAN, _MEASURED, _REPORT = "model.safetensors", "plan.json", "measurement.json", "report.html"
_PAGE = "spectra.html"


class Measured(Frozen):
    """What `spectrim compress` writes as measurement.json: both networks, measured, and how to do it again."""

    version: Literal[1] = 1
    command: str
    dense: Measurement
    compressed: Measurement
    model_sha256: str

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """Read one. Raises `FileError` for a missing, cut or invalid file."""
        return parse(cls, read_text(path), origin=str(path))


@unfolded
def analyze_network(
    *,
    source: Source,
    layers: Layers,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"Folder for {_PAGE}: every layer's singular values, as figures.")
    ] = None,
) -> None:
    """Show how many dimensions each layer of a network really uses."""
    with stages() as shown, outputs(out, {_PAGE: _require_page}) if out else nullcontext() as folder:
        analysis = _analysis(subject(source, shown), layers, shown, {"activation"})
        listing = table(analysis)
        if folder is not None:
            command = shlex.join(["spectrim", "analyze", *arguments(source, layers), "--out", str(out)])
            title = f"Singular values of {source.model}"
            whole = Results.of_network(title, dense=analysis.whole, analysis=analysis, command=command)
            report(whole, folder / _PAGE)
    console = Console(highlight=False)
    console.print(listing)
    if out is not None:
        console.print(f"  {out / _PAGE}  (open this in a browser)", markup=False, soft_wrap=True)


@unfolded
def plan_network(
    *,
    source: Source,
    layers: Layers,
    choice: Choice,
    out: Annotated[Path, typer.Option(metavar="FILE", help=f"The file to write, such as {_PLAN}.")],
) -> None:
    """Decide the form and rank of every layer, and write that as a file to look at, edit, and apply."""
    _check(choice, source)
    out = out / _PLAN if out.is_dir() else out
    with stages() as shown, outputs(out.parent, {out.name: Plan.load}) as folder:
        _, made = _planned(subject(source, shown), layers, choice, shown, cache=source.cache_bytes)
        made.save(folder / out.name)
    console = Console(highlight=False)
    console.print(table(made))
    if made.latency:
        console.print(_times(made.latency, made.rule))
    command = shlex.join(["spectrim", "compress", *arguments(source), "--plan", str(out), "--out"])
    console.print(f"  {out}  (the plan: edit a layer's form and rank if you like)", markup=False, soft_wrap=True)
    console.print(f"Apply it:\n  {command} DIR", markup=False, soft_wrap=True)


@unfolded
def compress_network(
    *,
    source: Source,
    layers: Layers,
    choice: Choice,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Do what this plan says, instead of a rule; `spectrim plan` writes one."),
    ] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Fit each layer to what it receives in the compressed network (default for --macs, --params, --bytes "
            "and --latency, where there is --data).",
        ),
    ] = None,
    test: Annotated[
        bool | None,
        typer.Option("--test/--no-test", help="Accuracy on the test images (default where the network has one)."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help=f"Folder for {_MODEL}, {_PLAN}, {_MEASURED} and {_REPORT}. Those of an earlier run are replaced, and "
            "no other.",
        ),
    ],
) -> None:
    """Make a network smaller: factor its layers, measure what came of it, and write it as files."""
    edited = None if plan is None else _given_plan(plan, layers, choice)
    if edited is None:
        _check(choice, source)
    metric = edited.metric if edited else choice.named_metric
    if reconstruct and (source.data is None or metric == "plain"):
        raise typer.BadParameter("--reconstruct needs images: give --data, and another metric than plain")
    with stages() as shown, outputs(out, _ours(out)) as folder:
        given = subject(source, shown)
        why_not = _why_not_tested(given, asked=test)
        analysis, made = _planned(given, layers, choice, shown, cache=source.cache_bytes, edited=edited)
        shown.begin("compress")
        small = compress(
            given.model,
            made,
            example_inputs=given.example,
            data=given.calibration if analysis.calibration else None,
            analysis=analysis,
            reconstruct="auto" if reconstruct is None else reconstruct,
            cache=source.cache_bytes,
            on_progress=shown.layers("reconstruct"),
        )
        dense, kept = _measured(given, small, shown) if why_not is None else (_counted(given), small.measurement)
        shown.begin("write")
        save(small.model, folder / _MODEL)
        small.plan.save(folder / _PLAN)
        command = _command(source, layers, choice, plan=plan, reconstruct=reconstruct, test=test, out=out)
        found = Measured(command=command, dense=dense, compressed=kept, model_sha256=sha256_of(folder / _MODEL))
        write_text(folder / _MEASURED, found.model_dump_json(indent=1, exclude_none=True) + "\n")
        title = f"{source.model}, compressed"
        both = Results.of_network(title, dense=dense, kept=kept, plan=small.plan, analysis=analysis, command=command)
        report(both, folder / _REPORT)
    _show(small.plan, found, source, given, why_not, out)


def _planned(
    given: Subject, layers: Layers, choice: Choice, shown: Stages, *, cache: int | None, edited: Plan | None = None
) -> tuple[Analysis, Plan]:
    """The analysis, and the plan that the rule gives, or the one that was edited."""
    if edited is not None:
        return _analysis(given, layers, shown, {layer.metric for layer in edited}), edited
    rule, metric = choice.rule, choice.named_metric
    usual: Metric = "loss" if isinstance(rule, Budget) else "activation"
    analysis = _analysis(given, layers, shown, {metric or usual}, choice=choice)
    if isinstance(rule, Budget) and analysis.calibration and given.calibration:
        batches = [as_inputs(batch) for batch in given.calibration]
        analysis = sensitivity(given.model, analysis, batches, cache=cache, on_progress=shown.layers("weigh"))
    shown.begin("plan")
    made = choose(
        given.model,
        analysis,
        rule,
        example_inputs=given.example,
        metric=metric,
        forms=choice.forms,
        rank_multiple=_probed(choice, rule, shown),
        on_progress=_timing(shown),
    )
    return analysis, made


def _probed(choice: Choice, rule: Rule, shown: Stages) -> int | Grid | Literal["auto"] | None:
    """What ranks are to be multiples of; under a budget of latency that is probed with its table."""
    if choice.multiple != "auto" or (isinstance(rule, Budget) and rule.limits == "latency"):
        return choice.multiple
    shown.begin("probe")
    return probe(runtime=choice.runtime or "torch", threads=choice.threads or 1, batch=choice.latency_batch or 1)


def _timing(shown: Stages) -> Callable[[str, int, int], None]:
    """Shows which layer is timed, and when a whole network is."""

    def told(what: str, done: int, of: int) -> None:
        if what.startswith("time "):
            if done == 0:
                shown.begin(f"time {of} shapes of layers", of=of)
            shown.say(what)
            shown.reach(done)
        else:
            shown.begin(what)

    return told


def _analysis(
    given: Subject, layers: Layers, shown: Stages, metrics: Container[Metric | None], *, choice: Choice | None = None
) -> Analysis:
    """The analysis in these metrics as far as there are images, and gradients where no metric was asked for.

    What cannot be done by `choice` whatever the images is told before they are run.
    """
    selected = partial(
        analyze,
        given.model,
        given.example,
        include=layers.included,
        exclude=layers.excluded,
        keep_last=layers.keep_last,
    )
    images = given.calibration if "activation" in metrics or "loss" in metrics else None
    if not images:
        shown.begin("analyse")
    bare = selected()
    if choice is not None:
        usual: Metric = choice.named_metric or ("activation" if images else "plain")
        multiple = None if choice.multiple == "auto" else choice.multiple
        require_possible(bare, choice.rule, metric=usual, forms=choice.forms, rank_multiple=multiple)
    if not images:
        return bare
    shown.begin("calibrate", of=len(images))
    calibration = calibrate(given.model, shown.each(images), layers=bare.sites)
    if "loss" in metrics:
        inputs = [as_inputs(batch) for batch in images]
        required = choice is None or choice.named_metric is not None
        calibration = felt(given.model, calibration, inputs, layers=bare.sites, required=required)
    shown.begin("analyse")
    return selected(calibration=calibration)


def _check(choice: Choice, source: Source) -> None:
    """Mistakes in the rule that can be seen before anything is loaded."""
    _ = choice.forms, choice.multiple
    rule = choice.rule
    if choice.runtime is not None or (isinstance(rule, Budget) and rule.limits == "latency"):
        require_runtime(choice.runtime or "torch", threads=choice.threads or 1)
    if choice.named_metric not in (None, "plain") and source.data is None:
        raise typer.BadParameter(f"--metric {choice.metric} needs images: give --data")


def _given_plan(path: Path, layers: Layers, choice: Choice) -> Plan:
    more = arguments(layers, choice)
    if more:
        raise typer.BadParameter(
            f"a plan says it all already; leave out {' '.join(more)}, or give them to spectrim plan"
        )
    return Plan.load(path)


def _why_not_tested(given: Subject, *, asked: bool | None) -> str | None:
    """Why the accuracy is not measured, or None when it is."""
    if asked is False:
        return "--no-test"
    why_not = given.untestable()
    if asked and why_not is not None:
        raise typer.BadParameter(f"--test: {why_not}")
    return why_not


def _measured(given: Subject, small: Compressed, shown: Stages) -> tuple[Measurement, Measurement]:
    """Both networks with their accuracy."""
    assert given.images is not None
    tests = given.images.tests()
    shown.begin("test the dense network", of=len(tests))
    dense = accuracy(given.model, shown.each(tests))
    shown.begin("test the compressed network", of=len(tests))
    kept = accuracy(small.model, shown.each(tests))
    before = _counted(given).model_copy(update={"accuracy": dense})
    return before, small.measurement.model_copy(update={"accuracy": kept})


def _counted(given: Subject) -> Measurement:
    return measure(given.model, given.example, latency=False)


def _show(made: Plan, found: Measured, source: Source, given: Subject, why_not: str | None, out: Path) -> None:
    console = Console(highlight=False)
    console.print(table(made))
    if made.latency:
        console.print(_times(made.latency, made.rule))
    console.print(table(found.compressed))
    console.print(_accuracy(found, given, why_not), markup=False, soft_wrap=True)
    files = {
        _MODEL: "the network",
        _PLAN: "what was done to each layer",
        _MEASURED: "every number",
        _REPORT: "open this in a browser",
    }
    for name, what in files.items():
        console.print(f"  {out / name}  ({what})", markup=False, soft_wrap=True)
    options = f", options={source.options!r}" if source.options else ""
    shape = ", ".join(["batch", *map(str, given.example.shape[1:])])
    prepared = f", {given.images.prepare}" if given.images else ""
    for line in (
        "In Python:",
        "  import spectrim",
        "  from spectrim.models import resolve",
        f"  network = resolve({source.model!r}{options})",
        f"  network = spectrim.load({str(out / _MODEL)!r}, network).eval()",
        f"  # takes float32 ({shape}){prepared}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _times(note: LatencyNote, rule: Rule) -> Listing:
    """What a pass was expected to take, and what it took."""

    def row(name: str, share: float | None, interval: str = "") -> tuple[str, ...]:
        if share is None:
            return (name, words.NOTHING, words.NOTHING, "")
        return (name, words.milliseconds(share * note.dense_ms), words.share(share), interval)

    low_high = f"95 % interval {note.low:.3f} to {note.high:.3f}" if note.low and note.high else ""
    rows = [row("Dense", 1.0), row("Predicted", note.predicted), row("Measured", note.measured, low_high)]
    if isinstance(rule, Budget):
        rows.insert(1, row("Target", rule.share))
    columns = (
        Column("", number=False),
        Column("One pass"),
        Column("Kept /\ndense"),
        Column("", number=False, narrow=20),
    )
    threads = f"{note.threads} thread{'s' if note.threads != 1 else ''}"
    batch = f", batch {note.batch}" if note.batch else ""
    said = note.refused and f"The network is as it was: {note.refused}."
    said = said or (note.missed and f"The target is missed: {note.missed}.")
    return Listing(f"Latency in {note.runtime}, {threads}{batch}", columns, tuple(rows), note=said or "")


def _accuracy(found: Measured, given: Subject, why_not: str | None) -> str:
    dense, kept = found.dense.accuracy, found.compressed.accuracy
    if dense is None or kept is None or given.images is None:
        return f"Accuracy not measured: {why_not}."
    info = given.images.info
    said = (
        f"Accuracy on the {kept.total:,} test images of {info.name}: dense {words.percent(dense.value)}, compressed "
        f"{words.percent(kept.value)} ({words.points(kept.value - dense.value)} points)."
    )
    if dense.interval.low <= 1 / len(info.classes):
        said += "\nThe dense network only guesses: are --weights, --mean and --std those it was trained with?"
    return said


def _command(source: Source, layers: Layers, choice: Choice, **more: Path | bool | None) -> str:
    parts = ["spectrim", "compress", *arguments(source, layers, choice)]
    for name, value in more.items():
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            parts += [f"--{name}", str(value)]
    return shlex.join(parts)


def _ours(out: Path) -> dict[str, Ours]:
    """What `compress` may replace: plans, measurements, and the very network that the measurement there describes."""

    def require_recorded(model: Path) -> None:
        if Measured.load(out / _MEASURED).model_sha256 != sha256_of(model):
            raise FileError(f"{model} was changed after it was written")

    return {_MODEL: require_recorded, _PLAN: Plan.load, _MEASURED: Measured.load, _REPORT: _require_page}


def _require_page(path: Path) -> None:
    if "Made by Spectrim." not in read_text(path):
        raise FileError(f"{path} is another page")
