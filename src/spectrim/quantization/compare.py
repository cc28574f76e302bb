"""Dense, dense + quantised, low rank, low rank + quantised, side by side."""

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import nn

from spectrim.benchmark.measurement import Accuracy
from spectrim.core.errors import DataError
from spectrim.core.files import Frozen
from spectrim.quantization.engine import difference, engine, require_engine, require_quantizer, scored, write
from spectrim.quantization.graph import compact
from spectrim.quantization.schemes import Converted, Scheme, Source, convert, exported, require_scheme
from spectrim.runtimes.sessions import from_onnx
from spectrim.runtimes.timing import Comparison, Interval, Lap, compare, interleaved

if TYPE_CHECKING:
    import onnx

Network = Literal["dense", "low rank"]
_ALIKE = 0.02
"""Sizes closer than this are the same."""


class QuantizedRow(Frozen):
    """One network in one number format.

    Attributes:
        network: Dense or low rank.
        scheme: How it is quantised; None for float32.
        path: The ONNX file.
        bytes: Its size.
        difference: To the same network in float32; see `Quantized`.
        accuracy: Top-1 on the test data, computed by the runtime of the row.
        runtime: In which it was run; bf16 runs in bfloat16 where the runtime has it.
        latency_ms: Median time of one pass of the example inputs.
        against_dense: How much faster than the dense float32 network it is, timed in the same rounds.
        against_quantised: How much faster than the dense network in the same scheme.
    """

    network: Network
    scheme: Scheme | None = None
    path: Path
    bytes: int = Field(ge=1)
    difference: float = 0.0
    accuracy: Accuracy | None = None
    runtime: str
    latency_ms: float | None = None
    against_dense: Comparison | None = None
    against_quantised: Comparison | None = None

    @property
    def name(self) -> str:
        """Such as `low rank + int8-static`."""
        return self.network if self.scheme is None else f"{self.network} + {self.scheme}"

    @property
    def speedup(self) -> Interval | None:
        """Time of dense float32 over time of this, if it was timed."""
        return self.against_dense.ratio if self.against_dense else None


class QuantizedTable(Frozen):
    """What quantisation does alone, what low rank does alone, and what they do together.

    Attributes:
        rows: Dense and low rank in float32 and in every scheme.
        runtime: That they were run in.
        threads: That they were run with.
    """

    rows: tuple[QuantizedRow, ...]
    runtime: str
    threads: int = Field(ge=1)

    def row(self, network: Network, scheme: Scheme | None = None) -> QuantizedRow:
        """One of them. Raises `DataError` if it is not there."""
        for one in self.rows:
            if (one.network, one.scheme) == (network, scheme):
                return one
        raise DataError(
            f"there is no row {network!r}, {scheme!r}; there are {', '.join(one.name for one in self.rows)}"
        )

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(one.scheme for one in self.rows if one.scheme is not None))

    @property
    def verdicts(self) -> tuple[str, ...]:
        """For each scheme one sentence: whether low rank gains anything on top of it."""
        return tuple(_verdict(self.row("dense", one), self.row("low rank", one)) for one in self.schemes)


def compare_quantized(
    dense: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    *,
    folder: str | Path,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    schemes: Sequence[Scheme] | None = None,
    runtime: str = "onnxruntime",
    threads: int = 1,
    latency: bool = True,
    rounds: int = 31,
) -> QuantizedTable:
    """Write a dense network and its compressed self in float32 and in every scheme, and measure all of them.

    All files are made in the same way, without anything that a runtime does not need, so that their sizes compare. All
    are timed in one process in interleaved rounds of alternating order.

    Args:
        dense: The dense network; it stays as it is, as `small` does.
        small: The compressed one.
        example_inputs: One call's inputs, as for `quantize`; timed are passes of these.
        folder: Where the files are written, such as `low-rank-int8-static.onnx`.
        data: Calibration batches, as for `quantize`.
        test: Batches (inputs.., labels) for the accuracy. They are gone through once for every row, so give a list or a
            loader, not an iterator.
        schemes: `int8-weights` and `int8-static` by default; without data, `int8-dynamic` instead of the latter.
        runtime: `onnxruntime`, `openvino` or `openvino-bf16`. bf16 in `openvino` is run by `openvino-bf16`; ONNX
            Runtime computes it in float32.
        threads: For every row.
        latency: Time the rows.
        rounds: Interleaved rounds, at least 5; fewer are done when they would take more than a minute.

    Raises:
        SpectrimError: as `quantize`; an unknown runtime, one that is not installed or does not read ONNX; too few
            rounds. Then no file is written.
    """
    require_quantizer()
    require_engine(runtime, threads=threads)
    if rounds < 5:
        raise DataError(f"rounds={rounds}: give at least 5")
    if test is not None and iter(test) is test:
        raise DataError("test is an iterator, which can be gone through only once; give a list or a loader")
    batches = None if data is None else list(data)
    chosen = _schemes(schemes, has_data=data is not None)
    made = [
        one
        for name, model in (("dense", dense), ("low rank", small))
        for one in _versions(name, exported(model, example_inputs, data=batches), chosen)  # type: ignore[arg-type]
    ]
    rows = [one.judged(test, folder=Path(folder), runtime=runtime, threads=threads) for one in made]
    if latency:
        rows = _timed(rows, made, threads=threads, rounds=rounds)
    for row, one in zip(rows, made, strict=True):
        write(one.proto, row.path)
    return QuantizedTable(rows=tuple(rows), runtime=runtime, threads=threads)


class _Version:
    """One row before it is measured."""

    def __init__(self, network: Network, source: Source, made: Converted | None) -> None:
        self.network, self.source, self.made = network, source, made
        self.proto: onnx.ModelProto = made.proto if made else compact(source.proto)

    def judged(self, test: Iterable[Any] | None, *, folder: Path, runtime: str, threads: int) -> QuantizedRow:
        """Everything but its time."""
        scheme = self.made.scheme if self.made else None
        own = "openvino-bf16" if scheme == "bf16" and runtime == "openvino" else runtime
        run = engine(self.proto, runtime=own, threads=threads)
        exact = engine(self.source.proto, runtime=runtime, threads=threads)
        name = re.sub(r"\W+", "-", f"{self.network} {scheme or 'float32'}")
        return QuantizedRow(
            network=self.network,
            scheme=scheme,
            path=folder / f"{name}.onnx",
            bytes=len(self.proto.SerializeToString()),
            difference=difference(run, exact, self.source.batches) if scheme else 0.0,
            accuracy=None if test is None else scored(run, self.source.feeder.names, test, feeder=self.source.feeder),
            runtime=own,
        )


def _versions(network: Network, source: Source, schemes: Iterable[Scheme]) -> list[_Version]:
    quantised = [_Version(network, source, convert(source, one)) for one in schemes]
    return [_Version(network, source, None), *quantised]


def _schemes(given: Sequence[Scheme] | None, *, has_data: bool) -> tuple[Scheme, ...]:
    usual: tuple[Scheme, ...] = ("int8-weights", "int8-static" if has_data else "int8-dynamic")
    chosen = tuple(dict.fromkeys(require_scheme(one) for one in (usual if given is None else given)))
    if not chosen:
        raise DataError("schemes is empty; name at least one, such as int8-weights")
    if "int8-static" in chosen and not has_data:
        raise DataError("int8-static takes the ranges of activations from data; pass data=, or leave this scheme out")
    return chosen


def _timed(
    rows: Sequence[QuantizedRow], versions: Sequence[_Version], *, threads: int, rounds: int
) -> list[QuantizedRow]:
    """The rows with their times."""
    with ExitStack() as stack:
        ready = [
            stack.enter_context(from_onnx(one.proto, one.source.example, runtime=row.runtime, threads=threads))
            for row, one in zip(rows, versions, strict=True)
        ]
        laps = interleaved([one.timer() for one in ready], rounds=rounds, patience=60.0)
    of = {(row.network, row.scheme): own for row, own in zip(rows, laps, strict=True)}
    return [row.model_copy(update=_times(row, own, of)) for row, own in zip(rows, laps, strict=True)]


def _times(row: QuantizedRow, own: Sequence[Lap], of: Any) -> dict[str, object]:
    walls = sorted(lap.wall for lap in own)
    found: dict[str, object] = {"latency_ms": 1e3 * walls[len(walls) // 2]}
    if (row.network, row.scheme) != ("dense", None):
        found["against_dense"] = compare(own, of["dense", None])
    if row.network == "low rank" and row.scheme is not None:
        found["against_quantised"] = compare(own, of["dense", row.scheme])
    return found


def _verdict(alone: QuantizedRow, both: QuantizedRow) -> str:
    """Whether low rank gains size or speed on top of one scheme, and what it costs."""
    smaller = alone.bytes / both.bytes
    size = f"{smaller:.2f}x smaller" if smaller >= 1 else f"{1 / smaller:.2f}x larger"
    size = "of the same size" if abs(smaller - 1) <= _ALIKE else size
    speed = _speed(both.against_quantised)
    gains = smaller > 1 + _ALIKE or (both.against_quantised is not None and both.against_quantised.verdict == "faster")
    said = ", ".join([size, *([speed] if speed else []), *_points(alone, both)])
    if gains:
        return f"{both.scheme}: low rank gains on top of quantisation; against dense + {both.scheme} it is {said}."
    return f"{both.scheme}: quantisation alone would do; against it, low rank + {both.scheme} is {said}."


def _speed(found: Comparison | None) -> str:
    if found is None:
        return ""
    ratio = found.ratio.value
    match found.verdict:
        case "faster":
            return f"{ratio:.2f}x faster"
        case "slower":
            return f"{1 / ratio:.2f}x slower"
        case "no difference":
            return "as fast"
    return "of a speed that this machine is too noisy to compare"


def _points(alone: QuantizedRow, both: QuantizedRow) -> list[str]:
    if alone.accuracy is None or both.accuracy is None:
        return []
    points = 100 * (both.accuracy.value - alone.accuracy.value)
    return [f"{abs(points):.2f} points {'more' if points > 0 else 'less'} accurate" if points else "as accurate"]
