"""`spectrim export`: a network as a file that other programs run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from spectrim.benchmark.measurement import resized
from spectrim.cli.loading import load_source
from spectrim.cli.options import CPU, NO_DATA, Group, Machine, Source, unfolded, whole_or_auto
from spectrim.cli.outputs import OutputFiles, outputs
from spectrim.cli.stages import show, show_files, stages
from spectrim.export import Exported, export_onnx, export_openvino, export_program, is_exported
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.runtimes.sessions import RUNTIMES, RuntimeName, require_runtime

Format = Literal["onnx", "program", "openvino"]
_FORMATS: Mapping[Format, tuple[str, Callable[..., Exported], RuntimeName | None]] = {
    "onnx": (".onnx", export_onnx, "onnxruntime"),
    "program": (".pt2", export_program, None),
    "openvino": (".xml", export_openvino, "openvino"),
}
"""Ending, writer, and the runtime that is timed by default; a torch program is timed in torch only."""
_file, _padding = (partial(typer.Option, rich_help_panel=panel) for panel in ("The file", "Padding"))


@dataclass(frozen=True, kw_only=True)
class Target:
    """The file, and how it is checked."""

    to: Annotated[
        Format | None,
        _file(
            metavar="onnx|program|openvino",
            help="ONNX, a torch program, or OpenVINO IR; by default what the ending of --out says: .onnx, .pt2, .xml.",
        ),
    ] = None
    out: Annotated[
        Path, _file(metavar="FILE", help="The file to write. One of an earlier export is replaced, and no other.")
    ]
    fixed_batch: Annotated[
        bool, _file("--fixed-batch", help="For --batch inputs at a time only; else for any number.")
    ] = False
    batch: Annotated[int, _file(metavar="N", min=1, help="Inputs of the pass that is captured.")] = 1
    check: Annotated[
        bool,
        _file("--check/--no-check", help="Compare with torch on random inputs, and write nothing where they differ."),
    ] = True
    tolerance: Annotated[float, _file(metavar="SHARE", help="Allowed difference, of the largest output.")] = 1e-4

    @property
    def format(self) -> Format:
        """What was asked for, or what the file's ending says."""
        if self.to is not None:
            return self.to
        for name, (ending, *_) in _FORMATS.items():
            if self.out.suffix == ending:
                return name
        raise typer.BadParameter(f"--out {self.out} does not say the format by its ending; give --to")

    @property
    def file(self) -> Path:
        """The file itself; in an existing folder, `model` with the format's ending."""
        return self.out / f"model{_FORMATS[self.format][0]}" if self.out.is_dir() else self.out


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Whether ranks are padded."""

    pad: Annotated[
        str | None,
        _padding(
            metavar="N|auto",
            help="Fill up the ranks of factored layers with zeros to a multiple of N, or of what this processor "
            "computes at once where that is faster (auto). Outputs stay the same; the file grows.",
        ),
    ] = None
    runtime: Annotated[
        RuntimeName | None,
        _padding(
            metavar="NAME",
            help=f"Where --pad auto takes its times, of {', '.join(RUNTIMES)}; by default the one for the format.",
        ),
    ] = None
    latency_threads: Annotated[int | None, _padding(metavar="N", help="Threads of these passes; by default 1.")] = None

    @property
    def multiple(self) -> int | Literal["auto"] | None:
        """What was asked for."""
        if self.pad != "auto" and (self.runtime, self.latency_threads) != (None, None):
            raise typer.BadParameter("--runtime and --latency-threads go with --pad auto")
        return whole_or_auto(self.pad, option="--pad")


@unfolded
def export_network(
    *,
    source: Annotated[Source, Group(without=NO_DATA, required=("input",))],
    target: Target,
    padding: Padding,
    machine: Annotated[Machine, CPU],
) -> None:
    """Write a network, dense or compressed, as a file for ONNX Runtime, OpenVINO or torch, and check it."""
    name, pad, threads = target.format, padding.multiple, padding.latency_threads or 1
    _, write, runtime = _FORMATS[name]
    weights = [target.file.with_suffix(".bin").name] if name == "openvino" else []
    files: OutputFiles = dict.fromkeys([target.file.name, *weights], (is_exported, ""))
    if padding.runtime:
        require_runtime(padding.runtime, threads=threads)
        if runtime is None and padding.runtime != "torch":
            raise typer.BadParameter(f"--runtime {padding.runtime}: a torch program is timed in torch")
        runtime = runtime and padding.runtime
    with stages() as progress, outputs(target.file.parent, files) as folder:
        network = load_source(source, progress, machine)
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
    show(_table(exported), _padding_result(exported) if pad == "auto" else None)
    show_files(target.file.parent, files)


def _table(exported: Exported) -> Listing:
    check, compared = exported.check, "Not compared with torch (--no-check)."
    columns: dict[Column, Callable[[Exported], str]] = {
        Column("File", number=False): lambda exported: exported.path.name,
        Column("Size"): lambda exported: words.size(exported.bytes),
        Column("Opset", 3): lambda exported: str(exported.opset or words.NOTHING),
        Column("Ranks\npadded to", 2): lambda exported: str(exported.padded or words.NOTHING),
        Column("Largest\ndifference", 1): lambda exported: f"{check.difference:.1e}" if check else words.NOTHING,
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
