"""`spectrim quantize`: a network as an ONNX file with weights of fewer bits, compared with the dense network."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn

from spectrim.cli.loading import Loaded, load_network, load_source
from spectrim.cli.options import CPU, NETWORK, Group, Invocation, Machine, Source, Test, unfolded
from spectrim.cli.outputs import OutputFiles, Record, has_checksum, outputs
from spectrim.cli.stages import show, show_files, stages
from spectrim.core.files import sha256_of
from spectrim.quantization import SCHEMES, Quantized, QuantizedRow, QuantizedTable, Scheme, compare_quantized, quantize
from spectrim.reporting.tables import quantized_table
from spectrim.runtimes.sessions import require_runtime

_SOURCE = Group(without=("cache",), required=("weights",), defaults={"images": 512, "batch": 64})
_how = partial(typer.Option, rich_help_panel="How it is quantised")


class Bits(Record):
    """What `spectrim quantize` writes beside the network.

    Where the dense weights were given, the table has the file beside the float32 network and both dense ones. Paths are
    names only.
    """

    quantised: Quantized
    table: QuantizedTable | None = None
    file_sha256: str


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The scheme, and how the table is measured."""

    dense_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=NETWORK,
            help="The weights before compression: shows whether quantisation alone would do.",
        ),
    ] = None
    scheme: Annotated[
        Scheme,
        _how(
            metavar="|".join(SCHEMES),
            help="int8-weights: stored as int8, computed in float32. int8-dynamic: linear layers computed in int8. "
            "int8-static: all computed in int8, needs --data. bf16: stored as bfloat16.",
        ),
    ] = "int8-weights"
    runtime: Annotated[
        Literal["onnxruntime", "openvino", "openvino-bf16"],
        _how(metavar="onnxruntime|openvino|openvino-bf16", help="In which the table is measured."),
    ] = "onnxruntime"
    latency_threads: Annotated[int, _how(metavar="N", min=1, help="Threads of that runtime.")] = 1
    no_latency: Annotated[bool, _how("--no-latency", help="Do not time the rows of the table.")] = False


@unfolded
def quantize_network(
    *,
    source: Annotated[Source, _SOURCE],
    quantization: Quantization,
    machine: Annotated[Machine, CPU],
    test: Test = None,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.onnx", help="The file to write; every number goes into a .json file beside it."),
    ],
    invocation: Invocation,
) -> None:
    """Write a network as an ONNX file with int8 or bfloat16 weights, and show what that and low rank gain."""
    scheme, path = quantization.scheme, out.with_suffix(".json")
    if scheme == "int8-static" and source.data is None:
        raise typer.BadParameter("--scheme int8-static takes the ranges of activations from data: give --data")
    if out.suffix.lower() != ".onnx":
        raise typer.BadParameter(f"--out {out}: give a file that ends in .onnx")
    require_runtime(quantization.runtime, threads=quantization.latency_threads)
    recorded = has_checksum(lambda: Bits.load(path).file_sha256)
    files: OutputFiles = {
        out.name: (recorded, "the network, for ONNX Runtime and others"),
        path.name: (Bits.load, "every number"),
    }
    with stages() as progress, outputs(out.parent, files) as folder:
        network = load_source(source, progress, machine)
        dense = load_network(source, quantization.dense_weights) if quantization.dense_weights else None
        untested = network.why_untested(asked=test)
        tests = list(network.data.tests() or ()) if untested is None and network.data else None
        progress.begin(f"quantise to {scheme}")
        quantised = quantize(
            network.model, network.example, path=folder / out.name, scheme=scheme, data=network.calibration, test=tests
        )
        table = None
        if dense is not None:
            progress.begin("compare with the dense network")
            table = _compare(dense, network, quantization=quantization, tests=tests)
        record = Bits(
            command=str(invocation),
            quantised=quantised.model_copy(update={"path": Path(out.name)}),
            table=table,
            file_sha256=sha256_of(folder / out.name),
        )
        record.save(folder / path.name)
    _show(record, untested)
    show_files(out.parent, files)


def _compare(
    dense: nn.Module, network: Loaded, *, quantization: Quantization, tests: list[Any] | None
) -> QuantizedTable:
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder:
        table = compare_quantized(
            dense,
            network.model,
            network.example,
            folder=folder,
            data=network.calibration,
            test=tests,
            schemes=(quantization.scheme,),
            runtime=quantization.runtime,
            threads=quantization.latency_threads,
            latency=not quantization.no_latency,
        )
    rows = tuple(row.model_copy(update={"path": Path(row.path.name)}) for row in table.rows)
    return table.model_copy(update={"rows": rows})


def _show(record: Bits, untested: str | None) -> None:
    table, alone = record.table, record.quantised.model_dump(exclude={"quantised", "float32"})
    show(
        quantized_table(
            table.rows if table else [QuantizedRow(network="low rank", runtime="", **alone)], comparison=table
        ),
        None if table else "Give --dense-weights to see it beside the dense network.",
        f"Still float32: {', '.join(record.quantised.float32)}." if record.quantised.float32 else None,
        *(table.verdicts if table else ()),
        None if untested is None else f"Accuracy not measured: {untested}.",
    )
