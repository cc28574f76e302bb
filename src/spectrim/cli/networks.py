"""`spectrim analyze`, `spectrim plan` and `spectrim compress`: the library's chain on a network of yours."""

import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import typer
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.spectra import Analysis, analyze_selected
from spectrim.benchmark.fidelity import Fidelity
from spectrim.benchmark.measurement import Measurement
from spectrim.cli import commands
from spectrim.cli.checkpoints import compress_folder, is_block_by_block
from spectrim.cli.commands import MEASURED, MODEL, PLAN, REPORT, SPECTRA
from spectrim.cli.loading import Loaded, load_source
from spectrim.cli.options import Goal, Layers, Source
from spectrim.cli.outputs import OutputFiles, Record, has_checksum, is_page, outputs
from spectrim.cli.pretrained import folder_files, require_dense, why_not_dense
from spectrim.cli.samples import StoredData
from spectrim.cli.signatures import Invocation
from spectrim.cli.stages import Stages, file_lines, show, stages
from spectrim.compression import Compressed, carry_out
from spectrim.core.files import sha256_of
from spectrim.core.plans import Budget, Plan
from spectrim.export.folders import save_folder
from spectrim.layers.replacement import compressed_layers
from spectrim.layers.saving import save
from spectrim.layers.unfusing import unfused
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.memory import estimate_memory
from spectrim.planning.pipeline import Decision, decide
from spectrim.planning.resources import RunOptions
from spectrim.reporting import Results, report, table, words
from spectrim.reporting.cards import write_model_card
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.rank_grid import Grid, probe
from spectrim.runtimes.sessions import require_runtime


class Measured(Record):
    """What `spectrim compress` writes as measurement.json: cost and accuracy of both networks."""

    dense: Measurement
    compressed: Measurement
    model_sha256: str
    fidelity: Fidelity | None = None


def analyze_network(command: commands.Analyze) -> None:
    """The table of every layer's singular values, and their figures."""
    source, out = command.source, command.out
    files: OutputFiles = {SPECTRA: (is_page, "open this in a browser")}
    with stages() as progress, outputs(out, files) if out else nullcontext() as folder:
        network = load_source(source, progress, command.machine)
        if reason := why_not_dense(network.model, source.folder):
            progress.say(f"{reason}; each stands here as its factors, such as LAYER.down and LAYER.up")
        analysis = _analysis(network, command.layers, progress=progress)
        listing = table(analysis)
        if folder is not None:
            title, dense = f"Singular values of {source.model}", Measurement(**analysis.whole.model_dump())
            results = Results.of_network(title, dense=dense, analysis=analysis, command=str(command.invocation))
            report(results, folder / SPECTRA)
    show(listing, *(file_lines(out, files) if out else ()), output=command.output)


def plan_network(command: commands.Plan) -> None:
    """The plan, as a table and as a file."""
    source, out = command.source, command.out
    _check(command.goal, source)
    out = out / PLAN if out.is_dir() else out
    files: OutputFiles = {out.name: (Plan.load, "the plan: edit a layer's form and rank if you like")}
    with stages() as progress, outputs(out.parent, files) as folder:
        plan = _decide(load_source(source, progress, command.machine), command, progress=progress).plan
        plan.save(folder / out.name)
    arguments = shlex.join([*command.invocation.arguments(Source), "--plan", str(out), "--out"])
    hints = ("Apply it:", f"  spectrim compress {arguments} DIR")
    show(table(plan), _times(plan), *file_lines(out.parent, files), *hints, output=command.output)


def compress_network(command: commands.Compress) -> None:
    """The compressed network, its plan and what was measured, as tables and as files."""
    source, method, out = command.source, command.method, command.out
    edited = None if method.plan is None else _load_plan(method.plan, command.invocation)
    if edited is None:
        _check(command.goal, source)
    _require_data(command, edited)
    if method.estimate:
        _show_memory(command, edited=edited)
        return
    if is_block_by_block(command):
        _compress_blocks(command)
        return
    own = _files(out)
    files = {**own, **(folder_files(source.folder, out) if source.folder else {}), **own}
    with stages() as progress, outputs(out, files) as folder:
        network = load_source(source, progress, command.machine)
        untested = network.why_untested(asked=command.test)
        decision = _decide(network, command, progress=progress, edited=edited, method=method)
        progress.begin("compress")
        small = carry_out(
            network.model,
            decision,
            example_inputs=network.example,
            reconstruct=method.fitted,
            distill=method.distillation,
            cache=source.cache_bytes,
            on_progress=progress.follow,
        )
        measured = partial(network.measured, progress=progress, tested=untested is None)
        dense = measured(network.model, "dense network")
        compressed = measured(small.model, "compressed network", dense=network.model)
        progress.begin("write")
        record = _write(folder, small, dense=dense, compressed=compressed, command=command)
        results = Results.of_network(
            f"{source.model}, compressed",
            dense=dense,
            compressed=compressed,
            plan=small.plan,
            analysis=decision.analysis,
            command=record.command,
        )
        report(results, folder / REPORT)
    findings = str(small.fidelity) if small.fidelity else None, _accuracy(record, network, untested=untested)
    loading = _how_to_load(source, network, out=out, small=small.model)
    hints = *file_lines(out, files), *loading, *_how_to_score(network, source, out=out)
    show(table(small.plan), _times(small.plan), table(compressed), *findings, *hints, output=command.output)


def _require_data(command: commands.Compress, edited: Plan | None) -> None:
    """Report options that need data where there are none."""
    for name in ("reconstruct", "distill"):
        lacks = command.source.data is None or (edited or command.goal).metric == "plain"
        if getattr(command.method, name) and lacks:
            raise typer.BadParameter(f"--{name} needs data: give --data, and another metric than plain")


def _compress_blocks(command: commands.Compress) -> None:
    """The same of a folder, block by block."""
    source, out = command.source, command.out
    with stages(state=lambda: f"the same command goes on with what is in {out}") as progress:
        small, network = compress_folder(command, progress)
    text = f"The last hidden states are {small.hidden_error:.1%} off the dense ones on the calibration data."
    text += " MACs are those of the blocks, without embeddings and head."
    hints = *_how_to_load(source, network, out=out), *_how_to_score(network, source, out=out)
    show(table(small.plan), table(small.measurement), text, *hints, output=command.output)


def _write(
    folder: Path, small: Compressed, *, dense: Measurement, compressed: Measurement, command: commands.Compress
) -> Measured:
    """Write the network, its plan and what was measured of it."""
    if source := command.source.folder:
        save_folder(small.model, folder, source=source)
        write_model_card(small.model, folder, fidelity=small.fidelity)
    else:
        save(small.model, folder / MODEL)
    small.plan.save(folder / PLAN)
    record = Measured(
        command=str(command.invocation),
        dense=dense,
        compressed=compressed,
        model_sha256=sha256_of(folder / MODEL),
        fidelity=small.fidelity,
    )
    record.save(folder / MEASURED)
    return record


def _decide(
    network: Loaded,
    command: commands.Plan | commands.Compress,
    *,
    progress: Stages,
    edited: Plan | None = None,
    method: commands.Method | None = None,
) -> Decision:
    """The analysis, and the plan that the rule gives, or the one that was edited."""
    goal, source = command.goal, command.source
    require_dense(network.model, source.folder)
    if reason := why_not_dense(network.model, source.weights):
        progress.say(f"{reason}; these stay, and all shares are of this network, not of the dense one")
    return decide(
        network.model,
        goal.rule if edited is None else edited,
        example_inputs=network.example,
        data=network.calibration,
        layers=command.layers.selection,
        options=PlanOptions(metric=goal.metric, forms=goal.forms, rank_multiple=_rank_multiple(goal, progress)),
        run=RunOptions(
            cache=source.cache_bytes,
            reconstruct=method.fitted if method else "auto",
            distill=bool(method and method.distill),
        ),
        on_progress=progress.follow,
    )


def _show_memory(command: commands.Compress, *, edited: Plan | None) -> None:
    """The memory that `compress` takes with these options."""
    source, goal, layers = command.source, command.goal, command.layers.selection
    with stages() as progress:
        network = load_source(source, progress, command.machine)
        progress.begin("estimate")
        estimate = estimate_memory(
            network.model,
            edited or goal.rule,
            example_inputs=network.example,
            data=network.calibration,
            metric=goal.metric,
            forms=goal.forms,
            include=layers.include,
            exclude=layers.exclude,
            keep_last=layers.keep_last,
            reconstruct=command.method.fitted,
            distill=bool(command.method.distill),
            cache=source.cache_bytes,
        )
    show(table(estimate), output=command.output)


def _rank_multiple(goal: Goal, progress: Stages) -> int | Grid | Literal["auto"] | None:
    """What ranks are to be multiples of; under a budget of latency the library probes it."""
    if goal.multiple != "auto" or goal.latency is not None:
        return goal.multiple
    progress.begin("probe")
    return probe(runtime=goal.runtime or "torch", threads=goal.latency_threads or 1, batch=goal.latency_batch or 1)


def _analysis(network: Loaded, layers: Layers, *, progress: Stages) -> Analysis:
    """The analysis, in the activation metric where there are data."""
    model = unfused(network.model, layers.selection.unfuses)
    selected = partial(analyze_selected, model, network.example, selection=layers.selection)
    if network.calibration is None:
        progress.begin("analyse")
        return selected()
    progress.begin("calibrate", total=len(network.calibration))
    calibration = calibrate(network.model, progress.each(network.calibration), layers=selected().call_sites)
    progress.begin("analyse")
    return selected(calibration=calibration)


def _check(goal: Goal, source: Source) -> None:
    """Report mistakes in the rule before anything is loaded."""
    _ = goal.forms, goal.multiple, goal.rule
    if goal.runtime is not None or goal.latency is not None:
        require_runtime(goal.runtime or "torch", threads=goal.latency_threads or 1)
    if goal.metric not in (None, "plain") and source.data is None:
        raise typer.BadParameter(f"--metric {goal.metric} needs data: give --data")


def _load_plan(path: Path, invocation: Invocation) -> Plan:
    if more := invocation.arguments(Layers, Goal):
        advice = f"leave out {' '.join(more)}, or give them to spectrim plan"
        raise typer.BadParameter(f"a plan has its own rule and layers; {advice}")
    return Plan.load(path)


def _times(plan: Plan) -> Listing | None:
    """Predicted and measured time of a pass, under a budget of latency."""
    note = plan.latency
    if note is None:
        return None

    def row(name: str, share: float | None, interval: str = "") -> tuple[str, ...]:
        return name, words.milliseconds(None if share is None else share * note.dense_ms), words.share(share), interval

    low_high = f"95 % interval {note.low:.3f} to {note.high:.3f}" if note.low and note.high else ""
    rows = [row("Dense", 1.0), row("Predicted", note.predicted), row("Measured", note.measured, low_high)]
    if isinstance(plan.rule, Budget):
        rows.insert(1, row("Target", plan.rule.share))
    columns = (Column("", number=False), Column("One pass"), Column("Kept /\ndense"), Column(" ", 0, False, 20))
    batch = f", batch {note.batch}" if note.batch else ""
    below = f"The target is missed: {note.missed}." if note.missed else ""
    below = f"The network is as it was: {note.refused}." if note.refused else below
    title = f"Latency in {note.runtime}, {words.threads(note.threads)}{batch}"
    return Listing(title, columns, tuple(rows), note=below)


def _accuracy(record: Measured, network: Loaded, *, untested: str | None) -> str:
    before, after = record.dense.accuracy, record.compressed.accuracy
    if before is None or after is None or network.data is None:
        return f"Accuracy not measured: {untested}."
    text = (
        f"Accuracy on the {after.total:,} test {network.data.noun} of {network.data.name}: dense "
        f"{words.percent(before.value)}, compressed {words.percent(after.value)} "
        f"({words.points(after.value - before.value)} points)."
    )
    if network.data.classes and before.interval.low <= 1 / network.data.classes:
        text += (
            "\nThe dense network only guesses: are --weights, --mean and --std those it was trained with, "
            "and the classes numbered as in training?"
        )
    return text


def _how_to_score(network: Loaded, source: Source, *, out: Path) -> tuple[str, ...]:
    """The command that compares language models on the end of a text, which nothing was calibrated on."""
    is_language_model = source.folder is not None and type(network.model).__name__.endswith("ForCausalLM")
    if not is_language_model or source.data is None or not source.data.startswith("text:"):
        return ()
    options = {"--model": f"hf:{out}", "--data": source.data, "--tokens": source.input, "--tokenizer": source.tokenizer}
    options |= {"--metric": "perplexity", "--against": source.model}
    arguments = (part for option, value in options.items() if value is not None for part in (option, value))
    return "Score it:", f"  spectrim evaluate {shlex.join(arguments)}"


def _how_to_load(source: Source, network: Loaded, *, out: Path, small: nn.Module | None = None) -> tuple[str, ...]:
    """How Python loads the network."""
    if source.folder is not None:
        name = type(network.model).__name__
        needed = ("  import spectrim",) if small is None or compressed_layers(small) else ()
        loading = f"  from transformers import {name}", f"  model = {name}.from_pretrained({str(out)!r})"
        return "In Python:", *needed, *loading
    options = f", options={source.options!r}" if source.options else ""
    data, takes = network.data, network.example.describe()
    if len(network.example.args) == 1 and isinstance(example := network.example.args[0], Tensor):
        shape = ", ".join(["batch", *map(str, example.shape[1:])])
        takes = f"{str(example.dtype).removeprefix('torch.')} ({shape})"
    preparation = f", {data.prepare.formula(pixels=data.is_pixels)}" if isinstance(data, StoredData) else ""
    return (
        "In Python:",
        "  import spectrim",
        "  from spectrim.models import resolve",
        f"  network = resolve({source.model!r}{options})",
        f"  network = spectrim.load({str(out / MODEL)!r}, network).eval()",
        f"  # takes {takes}{preparation}",
    )


def _files(out: Path) -> OutputFiles:
    """What `compress` writes; it replaces plans, measurements, and the network that the measurement describes."""
    return {
        MODEL: (has_checksum(lambda: Measured.load(out / MEASURED).model_sha256), "the network"),
        PLAN: (Plan.load, "what was done to each layer"),
        MEASURED: (Measured.load, "every number"),
        REPORT: (is_page, "open this in a browser"),
    }
