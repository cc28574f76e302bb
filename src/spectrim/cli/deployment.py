"""What `spectrim export` and `bench` take; what they do is imported when they are called."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from spectrim.cli.options import CPU, NO_DATA, Machine, Output, Source, known_names, numbers, whole_or_auto
from spectrim.cli.signatures import Group, Invocation
from spectrim.core.names import RUNTIMES, RuntimeName

Format = Literal["onnx", "program", "openvino"]
_ENDINGS: Mapping[Format, str] = {"onnx": ".onnx", "program": ".pt2", "openvino": ".xml"}
_file, _padding, _timing = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("The file", "Padding", "How it is timed")
)


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
        for name, ending in _ENDINGS.items():
            if self.out.suffix == ending:
                return name
        known = " ".join(_ENDINGS.values())
        raise typer.BadParameter(f"--out {self.out} does not say the format by its ending ({known}); give --to")

    @property
    def file(self) -> Path:
        """The file itself; in an existing folder, `model` with the format's ending."""
        return self.out / f"model{_ENDINGS[self.format]}" if self.out.is_dir() else self.out


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


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a network, dense or compressed, as a file for ONNX Runtime, OpenVINO or torch, and check it."""

    source: Annotated[Source, Group(without=NO_DATA, required=("input",))]
    target: Target
    padding: Padding
    machine: Annotated[Machine, CPU]
    output: Output


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where and how it is timed."""

    runtime: Annotated[
        str,
        _timing(
            metavar="NAME,NAME",
            help=f"Runtimes with commas between them, of {', '.join(RUNTIMES)}; or all that are installed.",
        ),
    ] = "all"
    batch: Annotated[str, _timing(metavar="1,8,64", help="Inputs of one pass, with commas between them.")] = "1"
    threads: Annotated[int, _timing(metavar="N", help="Threads of one pass.")] = 1
    rounds: Annotated[
        int, _timing(metavar="N", min=5, help="How often both networks are timed; fewer where it takes half a minute.")
    ] = 31

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """Those that were asked for, each once."""
        return RUNTIMES if self.runtime == "all" else known_names(self.runtime.split(","), RUNTIMES, option="--runtime")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(int(size) for size in numbers(self.batch, option="--batch", whole=True)))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a compressed network against its dense version in each runtime, and compare that with its MACs."""

    source: Annotated[Source, Group(without=NO_DATA, required=("weights", "input"))]
    timing: Timing
    output: Output
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there.")] = None
    invocation: Invocation
