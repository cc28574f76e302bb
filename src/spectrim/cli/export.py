"""`spectrim export`: a network as a file that other programs run."""

from collections.abc import Callable, Mapping

import typer

from spectrim.benchmark.measurement import resized
from spectrim.cli.deployment import Export, Format
from spectrim.cli.loading import load_source
from spectrim.cli.outputs import OutputFiles, outputs
from spectrim.cli.stages import file_lines, show, stages
from spectrim.export import Exported, export_onnx, export_openvino, export_program, is_exported
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.runtimes.sessions import RuntimeName, require_runtime

_WRITERS: Mapping[Format, tuple[Callable[..., Exported], RuntimeName | None]] = {
    "onnx": (export_onnx, "onnxruntime"),
    "program": (export_program, None),
    "openvino": (export_openvino, "openvino"),
}
"""Writer, and the runtime that is timed by default; a torch program is timed in torch only."""


def export_network(command: Export) -> None:
    """The file, and what it is."""
    source, target, padding = command.source, command.target, command.padding
    name, pad, threads = target.format, padding.multiple, padding.latency_threads or 1
    write, runtime = _WRITERS[name]
    weights = [target.file.with_suffix(".bin").name] if name == "openvino" else []
    files: OutputFiles = dict.fromkeys([target.file.name, *weights], (is_exported, ""))
    if padding.runtime:
        require_runtime(padding.runtime, threads=threads)
        if runtime is None and padding.runtime != "torch":
            raise typer.BadParameter(f"--runtime {padding.runtime}: a torch program is timed in torch")
        runtime = runtime and padding.runtime
    with stages() as progress, outputs(target.file.parent, files) as folder:
        network = load_source(source, progress, command.machine)
        progress.begin(f"export to {name}" + (", and compare with torch" if target.check else ""))
        exported = write(
            network.model,
            folder / target.file.name,
            resized(network.example, target.batch),
            dynamic_batch=not target.fixed_batch,
            pad=pad,
            check=target.check,
            tolerance=target.tolerance,
            threads=threads,
            **({"runtime": runtime} if runtime else {}),
        )
    results = _table(exported), _padding_result(exported) if pad == "auto" else None
    show(*results, *file_lines(target.file.parent, files), output=command.output)


def _table(exported: Exported) -> Listing:
    check, compared = exported.check, "Not compared with torch (--no-check)."
    columns: dict[Column, Callable[[Exported], str]] = {
        Column("File", number=False): lambda exported: exported.path.name,
        Column("Size"): lambda exported: words.size(exported.bytes),
        Column("Opset", 3): lambda exported: str(exported.opset or words.NOTHING),
        Column("Ranks\npadded to", 2): lambda exported: str(exported.padded or words.NOTHING),
        Column("Largest\ndifference", 1): lambda exported: (
            words.Cell(f"{check.difference:.1e}", check.difference) if check else words.NOTHING
        ),
    }
    takes = "; ".join(f"{port.name} ({', '.join(map(str, port.shape))})" for port in exported.inputs)
    if check is not None:
        sizes = ", ".join(map(str, sorted(set(check.batches))))
        compared = (
            f"Compared in {check.runtime} with torch in {len(check.batches)} passes of batch size {sizes}; the "
            "difference is a share of the largest output."
        )
    return listing("Export", [exported], columns, note=f"It takes {takes}. {compared}")


def _padding_result(exported: Exported) -> str:
    """What `--pad auto` found."""
    timed = exported.padding_speedup
    if timed is None:
        return "Padding would change nothing: no rank lies between the steps of this processor."
    negation = "" if exported.padded else "not "
    return f"Padding is {negation}kept: with it the network is {words.speedup(timed)} as fast ({words.verdict(timed)})."
