"""`spectrim quantize`: a network as an ONNX file with weights of fewer bits, compared with the dense network."""

import tempfile
from pathlib import Path
from typing import Any

import typer
from torch import nn

from spectrim.cli.commands import Quantization, Quantize
from spectrim.cli.loading import Loaded, load_network, load_source
from spectrim.cli.outputs import OutputFiles, Record, has_checksum, outputs
from spectrim.cli.stages import file_lines, show, stages
from spectrim.core.files import sha256_of
from spectrim.quantization import Quantized, QuantizedRow, QuantizedTable, compare_quantized, quantize
from spectrim.reporting.listings import Listing
from spectrim.reporting.tables import quantized_table
from spectrim.runtimes.sessions import require_runtime


class Bits(Record):
    """What `spectrim quantize` writes beside the network.

    Where the dense weights were given, the table has the file beside the float32 network and both dense ones. Paths are
    names only.
    """

    quantised: Quantized
    table: QuantizedTable | None = None
    file_sha256: str


def quantize_network(command: Quantize) -> None:
    """The file, and the table of what it gains."""
    source, quantization, out = command.source, command.quantization, command.out
    scheme, path = quantization.scheme, out.with_suffix(".json")
    if scheme == "int8-static" and source.data is None:
        raise typer.BadParameter("--scheme int8-static takes the ranges of activations from data: give --data")
    if out.suffix.lower() != ".onnx":
        raise typer.BadParameter(f"--out {out}: give a file that ends in .onnx")
    require_runtime(quantization.runtime, threads=quantization.latency_threads)
    files: OutputFiles = {
        out.name: (has_checksum(lambda: Bits.load(path).file_sha256), "the network, for ONNX Runtime and others"),
        path.name: (Bits.load, "every number"),
    }
    with stages() as progress, outputs(out.parent, files) as folder:
        dense = load_network(source, quantization.dense_weights) if quantization.dense_weights else None
        network = load_source(source, progress, command.machine)
        untested = network.why_untested(asked=command.test)
        tests = list(network.data.tests or ()) if untested is None and network.data else None
        progress.begin(f"quantise to {scheme}")
        quantised = quantize(
            network.model, network.example, path=folder / out.name, scheme=scheme, data=network.calibration, test=tests
        )
        table = None
        if dense is not None:
            progress.begin("compare with the dense network")
            table = _compare(dense, network, quantization=quantization, tests=tests)
        record = Bits(
            command=str(command.invocation),
            quantised=quantised.model_copy(update={"path": Path(out.name)}),
            table=table,
            file_sha256=sha256_of(folder / out.name),
        )
        record.save(folder / path.name)
    show(*_results(record, untested), *file_lines(out.parent, files), output=command.output)


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


def _results(record: Bits, untested: str | None) -> tuple[Listing | str | None, ...]:
    table, alone = record.table, record.quantised.model_dump(exclude={"quantised", "float32"})
    rows = table.rows if table else [QuantizedRow(network="low rank", runtime="", **alone)]
    return (
        quantized_table(rows, comparison=table),
        None if table else "Give --dense-weights to see it beside the dense network.",
        f"Still float32: {', '.join(record.quantised.float32)}." if record.quantised.float32 else None,
        *(table.verdicts if table else ()),
        None if untested is None else f"Accuracy not measured: {untested}.",
    )
