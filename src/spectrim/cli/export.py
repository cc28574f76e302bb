"""`spectrim export`: a network as a file that other programs run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, get_args

import typer
from rich.console import Console
from torch import nn

from spectrim.cli.options import Flatten, Model, Option, WithSource, one_of, unfolded
from spectrim.cli.outputs import outputs
from spectrim.cli.stages import Stages, stages
from spectrim.cli.subject import Subject, filled, subject
from spectrim.core.errors import FileError
from spectrim.export import Exported, export_onnx, export_openvino, export_program, is_exported
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.sessions import RUNTIMES, RuntimeName, require_runtime

Format = Literal["onnx", "program", "openvino"]
_FORMATS: tuple[Format, ...] = get_args(Format)
_ENDINGS: Mapping[Format, str] = MappingProxyType({"onnx": ".onnx", "program": ".pt2", "openvino": ".xml"})
_WRITERS: Mapping[Format, Callable[..., Exported]] = MappingProxyType(
    {"onnx": export_onnx, "program": export_program, "openvino": export_openvino}
)
_RUNTIMES: Mapping[Format, RuntimeName] = MappingProxyType(
    {"onnx": "onnxruntime", "program": "torch", "openvino": "openvino"}
)
_NETWORK, _FILE, _PADDING = "The network", "The file", "Padding"


@dataclass(frozen=True, kw_only=True)
class Network(WithSource):
    """The network, its weights, and one input."""

    model: Model
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            rich_help_panel=_NETWORK,
            help="Its trained weights, a .safetensors file; for a compressed network the folder that `spectrim "
            "compress` or `spectrim finetune` wrote, or the file in it.",
        ),
    ] = None
    option: Option = None
    input: Annotated[str, typer.Option(metavar="3,32,32", rich_help_panel=_NETWORK, help="Shape of one input.")]
    flatten: Flatten = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """The file, and how it is checked."""

    to: Annotated[
        str | None,
        typer.Option(
            metavar="onnx|program|openvino",
            rich_help_panel=_FILE,
            help="ONNX, a torch program, or OpenVINO IR; by default what the ending of --out says: .onnx, .pt2, .xml.",
        ),
    ] = None
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_FILE,
            help="The file to write. One of an earlier export is replaced, and no other.",
        ),
    ]
    fixed_batch: Annotated[
        bool,
        typer.Option("--fixed-batch", rich_help_panel=_FILE, help="For --batch inputs at a time only; else for any."),
    ] = False
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_FILE, help="Inputs of the pass that is captured.")
    ] = 1
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            rich_help_panel=_FILE,
            help="Compare with torch on random inputs, and write nothing where they differ.",
        ),
    ] = True
    tolerance: Annotated[
        float,
        typer.Option(metavar="SHARE", rich_help_panel=_FILE, help="Largest difference allowed, of the largest output."),
    ] = 1e-4

    @property
    def format(self) -> Format:
        """What was asked for, or what the file's ending says."""
        if self.to is not None:
            return one_of(_FORMATS, self.to, option="--to")
        for name, ending in _ENDINGS.items():
            if self.out.suffix == ending:
                return name
        raise typer.BadParameter(f"--out {self.out} does not say the format by its ending; give --to")

    @property
    def file(self) -> Path:
        """The file itself; in an existing folder, `model` with the format's ending."""
        return self.out / f"model{_ENDINGS[self.format]}" if self.out.is_dir() else self.out


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Whether ranks are padded."""

    pad: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            rich_help_panel=_PADDING,
            help="Fill up the ranks of factored layers with zeros to a multiple of N, or of what this processor "
            "computes at once where that is faster (auto). Outputs stay the same; the file grows.",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_PADDING,
            help=f"Where --pad auto takes its times, of {', '.join(RUNTIMES)}; by default the one for the format.",
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=_PADDING, help="Threads of these passes; by default 1.")
    ] = None

    def multiple(self) -> int | Literal["auto"] | None:
        """What was asked for."""
        if self.pad == "auto":
            return "auto"
        if (self.runtime, self.threads) != (None, None):
            raise typer.BadParameter("--runtime and --threads go with --pad auto")
        if self.pad is None:
            return None
        if not (self.pad.isdecimal() and int(self.pad)):
            raise typer.BadParameter(f"--pad {self.pad}: give a number of at least 1, or auto")
        return int(self.pad)

    def timed_in(self, format: Format) -> RuntimeName:  # noqa: A002
        """The runtime, if it can be had; where nothing is timed, any will do."""
        if self.runtime is None or self.pad != "auto":
            return _RUNTIMES[format]
        return require_runtime(one_of(RUNTIMES, self.runtime, option="--runtime"), threads=self.threads or 1)


@unfolded
def export_network(*, network: Network, target: Target, padding: Padding) -> None:
    """Write a network, dense or compressed, as a file for ONNX Runtime, OpenVINO or torch, and check it."""
    name, pad = target.format, padding.multiple()
    runtime = padding.timed_in(name)
    with stages() as shown, outputs(target.file.parent, _files(target)) as folder:
        model, given = _network(network, shown)
        shown.begin(f"export to {name}" + (", and compare with torch" if target.check else ""))
        made = _WRITERS[name](
            model,
            folder / target.file.name,
            given.example.repeat(target.batch, *[1] * (given.example.ndim - 1)),
            dynamic_batch=not target.fixed_batch,
            pad=pad,
            check=target.check,
            tolerance=target.tolerance,
            runtime=runtime,
            threads=padding.threads or 1,
        )
    _show(made, target, pad)


def _files(target: Target) -> dict[str, Callable[[Path], object]]:
    names = [target.file.name]
    if target.format == "openvino":
        names.append(target.file.with_suffix(".bin").name)
    return dict.fromkeys(names, _require_ours)


def _require_ours(path: Path) -> None:
    if not is_exported(path):
        raise FileError(f"{path} is another file")


def _network(network: Network, shown: Stages) -> tuple[nn.Module, Subject]:
    """The network with its weights, and one input."""
    given = subject(network.source, shown, filled_later=network.weights is not None)
    return given.model if network.weights is None else filled(given.model, network.weights), given


def _show(made: Exported, target: Target, pad: object) -> None:
    console = Console(highlight=False)
    console.print(_table(made, target))
    if pad == "auto":
        console.print(_padding(made), markup=False, soft_wrap=True)
    for path in (target.file, target.file.with_suffix(".bin"))[: len(_files(target))]:
        console.print(f"  {path}", markup=False, soft_wrap=True)


def _table(made: Exported, target: Target) -> Listing:
    check = made.check
    columns = (
        Column("File", number=False),
        Column("Size"),
        Column("Opset", 3),
        Column("Ranks\npadded to", 2),
        Column("Largest\ndifference", 1),
    )
    cells = (
        target.file.name,
        words.size(made.bytes),
        str(made.opset or words.NOTHING),
        str(made.padded or words.NOTHING),
        words.NOTHING if check is None else f"{check.difference:.1e}",
    )
    takes = "; ".join(f"{port.name} ({', '.join(map(str, port.shape))})" for port in made.inputs)
    note = f"It takes {takes}. "
    if check is None:
        note += "Not compared with torch (--no-check)."
    else:
        sizes = ", ".join(map(str, sorted(set(check.batches))))
        note += (
            f"Compared in {check.runtime} with torch in {len(check.batches)} passes of batch size {sizes}; the "
            "difference is a share of the largest output."
        )
    return Listing("Export", columns, (cells,), note=note)


def _padding(made: Exported) -> str:
    """What `--pad auto` found."""
    timed = made.padding_speedup
    if timed is None:
        return "Padding would change nothing: no rank lies between the steps of this processor."
    kept = "kept" if made.padded else "not kept"
    return f"Padding is {kept}: with it the network is {words.speedup(timed)} as fast ({words.verdict(timed)})."
