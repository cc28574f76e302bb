"""`spectrim quantize`: a network as an ONNX file with weights of fewer bits, beside its dense self."""

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from torch import Tensor, nn

from spectrim.cli.options import DataFolder, Flatten, Mean, Model, Option, Std, WithSource, arguments, one_of, unfolded
from spectrim.cli.outputs import Ours, outputs
from spectrim.cli.stages import Stages, stages
from spectrim.cli.subject import Subject, filled, subject
from spectrim.core.errors import FileError
from spectrim.core.files import Frozen, parse, read_text, sha256_of, write_text
from spectrim.quantization import SCHEMES, Quantized, QuantizedTable, Scheme, compare_quantized, quantize
from spectrim.reporting import words
from spectrim.reporting.listings import Column, Listing
from spectrim.runtimes.sessions import require_runtime

_NETWORK, _DATA, _HOW = "The network", "The data", "How it is quantised"
_RUNTIMES = ("onnxruntime", "openvino", "openvino-bf16")


class Bits(Frozen):
    """What `spectrim quantize` writes beside the network: every number, and how to do it again.

    Attributes:
        quantised: The file. Its path and those in the table are names only.
        table: It beside the float32 network and both dense ones, where the dense weights were given.
    """

    version: Literal[1] = 1
    command: str
    quantised: Quantized
    table: QuantizedTable | None = None
    file_sha256: str

    @classmethod
    def load(cls, path: Path) -> "Bits":
        """Read one. Raises `FileError` for a missing, cut or invalid file."""
        return parse(cls, read_text(path), origin=str(path))


@dataclass(frozen=True, kw_only=True)
class Networks(WithSource):
    """The network to quantise, its dense self, and the images."""

    model: Model
    weights: Annotated[
        Path,
        typer.Option(
            metavar="FILE|DIR",
            rich_help_panel=_NETWORK,
            help="The network: the folder that `spectrim compress` or `spectrim finetune` wrote, or a .safetensors "
            "file.",
        ),
    ]
    dense_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_NETWORK,
            help="The weights before compression: shows whether quantisation alone would do.",
        ),
    ] = None
    option: Option = None
    input: Annotated[
        str | None,
        typer.Option(metavar="3,32,32", rich_help_panel=_NETWORK, help="Shape of one input, where there is no --data."),
    ] = None
    flatten: Flatten = False
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_DATA,
            help="A data set of `spectrim data list`, obtained first if need be. int8-static takes the ranges of "
            "activations from its training split.",
        ),
    ] = None
    data_folder: DataFolder = None
    images: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Calibration images.")] = 512
    batch: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Images at a time.")] = 64
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, rich_help_panel=_DATA, help="Decides which images are drawn.")
    ] = 0
    mean: Mean = None
    std: Std = None


@dataclass(frozen=True, kw_only=True)
class Scheming:
    """In which scheme, and where the table is measured."""

    scheme: Annotated[
        str,
        typer.Option(
            metavar="|".join(SCHEMES),
            rich_help_panel=_HOW,
            help="int8-weights: stored as int8, computed in float32. int8-dynamic: linear layers computed in int8. "
            "int8-static: all computed in int8, needs --data. bf16: stored as bfloat16.",
        ),
    ] = "int8-weights"
    runtime: Annotated[
        str, typer.Option(metavar="|".join(_RUNTIMES), rich_help_panel=_HOW, help="In which the table is measured.")
    ] = "onnxruntime"
    threads: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_HOW, help="Of that runtime.")] = 1
    no_latency: Annotated[
        bool, typer.Option("--no-latency", rich_help_panel=_HOW, help="Do not time the rows of the table.")
    ] = False

    @property
    def named(self) -> Scheme:
        """The scheme that was named."""
        return one_of(SCHEMES, self.scheme, option="--scheme")


@unfolded
def quantize_network(
    *,
    networks: Networks,
    scheming: Scheming,
    test: Annotated[
        bool | None,
        typer.Option("--test/--no-test", help="Accuracy on the test images (default where the network has one)."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.onnx", help="The file to write; every number goes into a .json file beside it."),
    ],
) -> None:
    """Write a network as an ONNX file with int8 or bfloat16 weights, and show what that and low rank gain."""
    scheme = _checked(networks, scheming, out)
    record = out.with_suffix(".json")
    with stages() as shown, outputs(out.parent, _ours(out, record)) as folder:
        given, small, dense = _loaded(networks, shown)
        why_not = _why_not_tested(given, asked=test)
        tests = list(given.images.tests()) if why_not is None and given.images else None
        shown.begin(f"quantise to {scheme}")
        data = given.calibration
        made = quantize(small, given.example, path=folder / out.name, scheme=scheme, data=data, test=tests)
        table = None
        if dense is not None:
            shown.begin("compare with the dense network")
            table = _compared(dense, small, given, scheming, tests)
        command = ["spectrim", "quantize", *arguments(networks, scheming), *_flags(test), "--out", str(out)]
        found = Bits(
            command=shlex.join(command),
            quantised=made.model_copy(update={"path": Path(out.name)}),
            table=table,
            file_sha256=sha256_of(folder / out.name),
        )
        write_text(folder / record.name, found.model_dump_json(indent=1, exclude_none=True) + "\n")
    _show(found, out, record, why_not)


def _checked(networks: Networks, scheming: Scheming, out: Path) -> Scheme:
    """Mistakes that can be seen before anything is loaded."""
    scheme = scheming.named
    if scheme == "int8-static" and networks.data is None:
        raise typer.BadParameter("--scheme int8-static takes the ranges of activations from images: give --data")
    if out.suffix.lower() != ".onnx":
        raise typer.BadParameter(f"--out {out}: give a file that ends in .onnx")
    require_runtime(one_of(_RUNTIMES, scheming.runtime, option="--runtime"), threads=scheming.threads)
    return scheme


def _loaded(networks: Networks, shown: Stages) -> tuple[Subject, nn.Module, nn.Module | None]:
    given = subject(networks.source, shown, filled_later=True)
    small = filled(given.model, networks.weights)
    dense = None if networks.dense_weights is None else filled(given.model, networks.dense_weights)
    return given, small, dense


def _why_not_tested(given: Subject, *, asked: bool | None) -> str | None:
    """Why the accuracy is not measured, or None when it is."""
    if asked is False:
        return "--no-test"
    why_not = given.untestable()
    if asked and why_not is not None:
        raise typer.BadParameter(f"--test: {why_not}")
    return why_not


def _compared(
    dense: nn.Module,
    small: nn.Module,
    given: Subject,
    scheming: Scheming,
    tests: list[tuple[Tensor, Tensor]] | None,
) -> QuantizedTable:
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder:
        found = compare_quantized(
            dense,
            small,
            given.example,
            folder=folder,
            data=given.calibration,
            test=tests,
            schemes=(scheming.named,),
            runtime=scheming.runtime,
            threads=scheming.threads,
            latency=not scheming.no_latency,
        )
    rows = tuple(one.model_copy(update={"path": Path(one.path.name)}) for one in found.rows)
    return found.model_copy(update={"rows": rows})


def _flags(test: bool | None) -> list[str]:  # noqa: FBT001  # one of three
    return [] if test is None else ["--test" if test else "--no-test"]


def _show(found: Bits, out: Path, record: Path, why_not: str | None) -> None:
    console = Console(highlight=False)
    console.print(_listing(found))
    if found.quantised.left:
        console.print(f"Still float32: {', '.join(found.quantised.left)}.", markup=False, soft_wrap=True)
    for sentence in found.table.verdicts if found.table else ():
        console.print(sentence, markup=False, soft_wrap=True)
    if why_not is not None:
        console.print(f"Accuracy not measured: {why_not}.", markup=False, soft_wrap=True)
    for path, what in ((out, "the network, for ONNX Runtime and others"), (record, "every number")):
        console.print(f"  {path}  ({what})", markup=False, soft_wrap=True)


def _listing(found: Bits) -> Listing:
    columns = (
        Column("Network", number=False),
        Column("Bytes"),
        Column("Smaller", 1),
        Column("ms", 2),
        Column("Faster", 2),
        Column("Accuracy"),
        Column("Largest\ndifference", 1),
    )
    note = "Difference of outputs to the same network in float32, as a share of the largest output."
    if found.table is None:
        made = found.quantised
        accuracy = words.NOTHING if made.accuracy is None else words.percent(made.accuracy.value)
        none = words.NOTHING
        row = (made.scheme, f"{made.bytes:,}", none, none, none, accuracy, words.percent(made.difference))
        note += " Give --dense-weights to see it beside the dense network."
        return Listing("Quantised", columns, (row,), note=note)
    rows = tuple(_row(found.table, position) for position in range(len(found.table.rows)))
    note += f" Smaller and faster than dense; {found.table.runtime}, one input, {found.table.threads} thread(s)."
    return Listing("Quantised", columns, rows, strong=frozenset({len(rows) - 1}), note=note)


def _row(table: QuantizedTable, position: int) -> tuple[str, ...]:
    row = table.rows[position]
    return (
        row.name,
        f"{row.bytes:,}",
        f"{table.row('dense').bytes / row.bytes:.2f}x",
        words.NOTHING if row.latency_ms is None else f"{row.latency_ms:.3g}",
        words.NOTHING if row.speedup is None else f"{row.speedup.value:.2f}x",
        words.NOTHING if row.accuracy is None else words.percent(row.accuracy.value),
        words.NOTHING if row.scheme is None else words.percent(row.difference),
    )


def _ours(out: Path, record: Path) -> dict[str, Ours]:
    """What may be replaced: the very file that the record beside it describes, and that record."""

    def require_recorded(path: Path) -> None:
        if Bits.load(record).file_sha256 != sha256_of(path):
            raise FileError(f"{path} was changed after it was written")

    return {out.name: require_recorded, record.name: Bits.load}
