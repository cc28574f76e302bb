"""Dense, dense + quantised, low rank, low rank + quantised, side by side."""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from spectrim.benchmark.measurement import Accuracy
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, require_batches
from spectrim.core.display import Displayed
from spectrim.core.errors import DataError
from spectrim.core.files import Frozen
from spectrim.quantization.evaluation import require_quantizer
from spectrim.quantization.schemes import Graph, Scheme, Source, require_scheme
from spectrim.runtimes.sessions import require_runtime, timed_together
from spectrim.runtimes.timing import Comparison, Interval, Timing, compare

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


class QuantizedTable(Displayed, Frozen):
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
        for row in self.rows:
            if (row.network, row.scheme) == (network, scheme):
                return row
        names = ", ".join(row.name for row in self.rows)
        raise DataError(f"there is no row {network!r}, {scheme!r}; there are {names}")

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.scheme for row in self.rows if row.scheme is not None))

    @property
    def verdicts(self) -> tuple[str, ...]:
        """For each scheme one sentence: whether low rank gains anything on top of it."""
        return tuple(_verdict(self.row("dense", scheme), self.row("low rank", scheme)) for scheme in self.schemes)


@checked
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
    require_runtime(runtime, threads=threads, reads_onnx=True)
    if rounds < 5:
        raise DataError(f"rounds={rounds}: give at least 5")
    if test is not None:
        require_batches(test, what="test")
    if isinstance(test, Iterator):
        raise DataError("test is an iterator, which can be gone through only once; give a list or a loader")
    batches = None if data is None else list(batches_of(data, what="the calibration data"))
    chosen = _schemes(schemes, has_data=data is not None)
    sources: dict[Network, Source] = {
        "dense": Source.of(dense, example_inputs, data=batches),
        "low rank": Source.of(small, example_inputs, data=batches),
    }
    graphs = [(name, source.converted(scheme)) for name, source in sources.items() for scheme in (None, *chosen)]
    rows = [_row(name, graph, test, folder=Path(folder), runtime=runtime, threads=threads) for name, graph in graphs]
    if latency:
        rows = _timed(rows, [graph for _, graph in graphs], threads=threads, rounds=rounds)
    for row, (_, graph) in zip(rows, graphs, strict=True):
        graph.write(row.path)
    return QuantizedTable(rows=tuple(rows), runtime=runtime, threads=threads)


def _schemes(schemes: Sequence[Scheme] | None, *, has_data: bool) -> tuple[Scheme, ...]:
    if schemes is None:
        return "int8-weights", "int8-static" if has_data else "int8-dynamic"
    if not schemes:
        raise DataError("schemes is empty; name at least one, such as int8-weights")
    return tuple(dict.fromkeys(require_scheme(scheme, has_data=has_data) for scheme in schemes))


def _row(
    network: Network, graph: Graph, test: Iterable[Any] | None, *, folder: Path, runtime: str, threads: int
) -> QuantizedRow:
    """All but its times; in OpenVINO a bf16 graph is run in bfloat16."""
    own = "openvino-bf16" if graph.scheme == "bf16" and runtime == "openvino" else runtime
    distance, accuracy = graph.evaluated(test, runtime=own, exact_runtime=runtime, threads=threads)
    name = re.sub(r"\W+", "-", f"{network} {graph.scheme or 'float32'}")
    return QuantizedRow(
        network=network,
        scheme=graph.scheme,
        path=folder / f"{name}.onnx",
        bytes=len(graph.proto.SerializeToString()),
        difference=distance,
        accuracy=accuracy,
        runtime=own,
    )


def _timed(rows: Sequence[QuantizedRow], graphs: Sequence[Graph], *, threads: int, rounds: int) -> list[QuantizedRow]:
    sessions = (
        require_runtime(row.runtime, threads=threads).from_onnx(graph.proto, graph.source.example)
        for row, graph in zip(rows, graphs, strict=True)
    )
    series = timed_together(sessions, rounds=rounds, patience=60.0)
    timings = {(row.network, row.scheme): own for row, own in zip(rows, series, strict=True)}
    return [row.model_copy(update=_times(row, timings)) for row in rows]


def _times(row: QuantizedRow, timings: Mapping[tuple[Network, Scheme | None], Sequence[Timing]]) -> dict[str, object]:
    own = timings[row.network, row.scheme]
    times: dict[str, object] = {"latency_ms": 1e3 * statistics.median(timing.wall for timing in own)}
    if (row.network, row.scheme) != ("dense", None):
        times["against_dense"] = compare(own, timings["dense", None])
    if row.network == "low rank" and row.scheme is not None:
        times["against_quantised"] = compare(own, timings["dense", row.scheme])
    return times


def _verdict(alone: QuantizedRow, both: QuantizedRow) -> str:
    """Whether low rank gains size or speed on top of one scheme, and what it costs."""
    smaller = alone.bytes / both.bytes
    size = f"{smaller:.2f}x smaller" if smaller >= 1 else f"{1 / smaller:.2f}x larger"
    size = "of the same size" if abs(smaller - 1) <= _ALIKE else size
    speed = _speed(both.against_quantised)
    gains = smaller > 1 + _ALIKE or (both.against_quantised is not None and both.against_quantised.verdict == "faster")
    effect = ", ".join(filter(None, (size, speed, _points(alone, both))))
    if gains:
        return f"{both.scheme}: low rank gains on top of quantisation; against dense + {both.scheme} it is {effect}."
    return f"{both.scheme}: quantisation alone would do; against it, low rank + {both.scheme} is {effect}."


def _speed(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    ratio = comparison.ratio.value
    texts = {"faster": f"{ratio:.2f}x faster", "slower": f"{1 / ratio:.2f}x slower", "no difference": "as fast"}
    return texts.get(comparison.verdict, "of a speed that this machine is too noisy to compare")


def _points(alone: QuantizedRow, both: QuantizedRow) -> str:
    if alone.accuracy is None or both.accuracy is None:
        return ""
    points = 100 * (both.accuracy.value - alone.accuracy.value)
    return f"{abs(points):.2f} points {'more' if points > 0 else 'less'} accurate" if points else "as accurate"
