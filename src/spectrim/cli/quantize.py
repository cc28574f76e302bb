"""`spectrim quantize`: a network as an ONNX file with weights of fewer bits, compared with the dense network."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import typer
from torch import Tensor, nn

from spectrim.cli.commands import Quantization, Quantize
from spectrim.cli.loading import Loaded, load_network, load_source
from spectrim.cli.outputs import OutputFiles, Record, has_checksum, outputs
from spectrim.cli.stages import file_lines, show, stages
from spectrim.core.files import sha256_of
from spectrim.quantization import Quantized, QuantizedRow, QuantizedTable, compare_quantized, quantize
from spectrim.reporting import words
from spectrim.reporting.tables import Column, Listing, listing
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
        raise typer.BadParameter("--scheme int8-static takes the ranges of activations from images: give --data")
    if out.suffix.lower() != ".onnx":
        raise typer.BadParameter(f"--out {out}: give a file that ends in .onnx")
    require_runtime(quantization.runtime, threads=quantization.threads)
    recorded = has_checksum(lambda: Bits.load(path).file_sha256)
    files: OutputFiles = {
        out.name: (recorded, "the network, for ONNX Runtime and others"),
        path.name: (Bits.load, "every number"),
    }
    with stages() as progress, outputs(out.parent, files) as folder:
        dense = load_network(source, quantization.dense_weights) if quantization.dense_weights else None
        network = load_source(source, progress)
        untested = network.why_untested(asked=command.test)
        tests = list(network.images.tests()) if untested is None and network.images else None
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
    dense: nn.Module, network: Loaded, *, quantization: Quantization, tests: list[tuple[Tensor, Tensor]] | None
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
            threads=quantization.threads,
            latency=not quantization.no_latency,
        )
    rows = tuple(row.model_copy(update={"path": Path(row.path.name)}) for row in table.rows)
    return table.model_copy(update={"rows": rows})


def _results(record: Bits, untested: str | None) -> tuple[Listing | str | None, ...]:
    return (
        _listing(record),
        f"Still float32: {', '.join(record.quantised.float32)}." if record.quantised.float32 else None,
        *(record.table.verdicts if record.table else ()),
        None if untested is None else f"Accuracy not measured: {untested}.",
    )


def _listing(record: Bits) -> Listing:
    table, alone = record.table, record.quantised.model_dump(exclude={"quantised", "float32"})
    rows = table.rows if table else (QuantizedRow(network="low rank", runtime="", **alone),)
    columns: dict[Column, Callable[[QuantizedRow], str]] = {
        Column("Network", number=False): lambda row: row.name if table else str(row.scheme),
        Column("Bytes"): lambda row: f"{row.bytes:,}",
        Column("Smaller", 1, optional=True): lambda row: words.factor(table.rows[0].bytes / row.bytes) if table else "",
        Column("Latency", 2, optional=True): lambda row: words.milliseconds(row.latency_ms),
        Column("Faster", 2, optional=True): lambda row: words.factor(row.speedup.value if row.speedup else None),
        Column("Accuracy"): lambda row: words.percent(row.accuracy.value if row.accuracy else None),
        Column("Largest\ndifference", 1): lambda row: words.percent(row.difference if row.scheme else None),
    }
    note = "Difference of outputs to the same network in float32, as a share of the largest output. " + (
        f"Smaller and faster than dense; {table.runtime}, one input, {words.threads(table.threads)}."
        if table
        else "Give --dense-weights to see it beside the dense network."
    )
    return listing("Quantised", rows, columns, strong=lambda row: table is not None and row is rows[-1], note=note)
