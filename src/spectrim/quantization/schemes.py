"""One network in one scheme: exported, quantised, checked, and written as an ONNX file."""

import platform
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field
from torch import nn

from spectrim.benchmark.measurement import Accuracy
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, without_labels
from spectrim.core.errors import DataError, FileError, ModelError, RuleError
from spectrim.core.execution import Inputs, as_inputs
from spectrim.core.files import Frozen, write_atomically
from spectrim.core.names import SCHEMES as SCHEMES, Scheme as Scheme
from spectrim.core.plans import Budget
from spectrim.quantization.evaluation import Feed, accuracy_of, difference, engine, feed_of, require_quantizer
from spectrim.quantization.graphs import compact, large, store_bf16, store_int8, weights
from spectrim.runtimes.conversion import graph_inputs, quiet, to_onnx
from spectrim.runtimes.engines import Arrays
from spectrim.runtimes.faults import raised_as, unknown

if TYPE_CHECKING:
    import onnx

Range = Literal["auto", "full", "reduced"]

_STATIC = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = (
    *("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Pad", "Slice"),
)
_NORMS = {"LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"}


class Quantized(Frozen):
    """A quantised network as a file, and how far it is from the float32 network.

    Attributes:
        path: The ONNX file.
        bytes: Its size.
        scheme: How it is quantised.
        difference: Largest difference of an output to the float32 network's, as a share of that output's largest entry,
            on the calibration data, or on the example inputs where there are none.
        accuracy: Top-1 on the test data, if they were given.
        quantised: Names of the weights that are stored in fewer bits.
        float32: Names of the constants that are more than a vector and stay float32. In the file: `left`.
    """

    path: Path
    bytes: int = Field(ge=0)
    scheme: Scheme
    difference: float
    accuracy: Accuracy | None = None
    quantised: tuple[str, ...]
    float32: tuple[str, ...] = Field(
        default=(), validation_alias=AliasChoices("float32", "left"), serialization_alias="left"
    )


@checked
def quantize(
    model: nn.Module,
    example_inputs: Any,
    *,
    path: str | Path,
    scheme: Scheme = "int8-weights",
    data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    test: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    weight_range: Range = "auto",
) -> Quantized:
    """Write a network, dense or compressed, as an ONNX file with quantised weights.

    Weights are int8 with one symmetric scale for each output channel (Krishnamoorthi, arXiv:1806.08342); batch norms
    are folded before that. Activations, where they are int8, have one range a tensor. The file holds nothing that a
    runtime does not need, so that its size is that of the weights. It is run in ONNX Runtime before it is written.

    Static and dynamic int8 are made by ONNX Runtime's own quantiser. Dynamic int8 is for linear layers; the weights of
    convolutions are then stored as int8 and computed in float32, because ONNX Runtime's dynamic convolutions are slower
    than those in float32.

    Args:
        model: Any module on the CPU; it stays as it is.
        example_inputs: One call's inputs: a tensor, a tuple of them, or a mapping of keyword arguments.
        path: The file to write, `.onnx`; replaced only when all has gone well.
        scheme: One of `SCHEMES`.
        data: Calibration batches, with or without labels, for `int8-static`; elsewhere only for `difference`. Some
            hundred inputs are enough.
        max_batches: Use at most so many of them.
        test: Batches (inputs.., labels) for the accuracy, run by ONNX Runtime.
        dynamic_batch: Leave the batch size open; else every batch has the size of the example's.
        weight_range: `reduced` uses 7 of the 8 bits of weights that are multiplied as integers, which x86 processors
            without VNNI need for exact sums; `auto` does so where this processor is one.

    Raises:
        RuleError: an unknown scheme.
        DataError: `int8-static` without data, or data that do not fit the network.
        ModelError: the network cannot be exported, or has no float32 weights to quantise.
        FileError: the file cannot be written.
        DependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    target, chosen = Path(path), require_scheme(scheme, has_data=data is not None)
    if target.suffix.lower() != ".onnx" or target.is_dir():
        raise FileError(f"{target} is no name of an ONNX file; give a path that ends in .onnx")
    require_quantizer()
    batches = None if data is None else batches_of(data, what="the calibration data", max_batches=max_batches)
    source = Source.of(model, example_inputs, data=batches, dynamic_batch=dynamic_batch)
    return quantized_file(source, chosen, path=target, test=test, weight_range=weight_range)


def require_scheme(scheme: str, *, has_data: bool) -> Scheme:
    """Raises `RuleError` for an unknown scheme, `DataError` for one that needs data where there are none."""
    known = next((known for known in SCHEMES if known == scheme), None)
    if known is None:
        raise RuleError(unknown("scheme", scheme, SCHEMES))
    if known == "int8-static" and not has_data:
        raise DataError(
            "int8-static takes the ranges of activations from data; pass data= with some hundred inputs, or use "
            "int8-weights, which needs none"
        )
    return known


@dataclass(frozen=True, eq=False)
class Source:
    """A float32 network as a graph, and the batches that its quantised graph is made from and compared on."""

    proto: "onnx.ModelProto"
    feed: Feed
    inputs: Inputs
    example: Arrays
    batches: tuple[Arrays, ...]

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Any, *, data: Iterable[Any] | None, dynamic_batch: bool = True
    ) -> "Source":
        """The network's graph with its example and its batches.

        Raises `DataError` for no batches or batches that do not fit the network, `ModelError` as `to_onnx`.
        """
        example = as_inputs(example_inputs)
        inputs = None if data is None else tuple(without_labels(data, like=example))
        if inputs is not None and not inputs:
            raise DataError("the calibration data is empty; give at least one batch")
        proto = to_onnx(model, example, dynamic_batch=dynamic_batch)
        feed = feed_of(proto, partial(graph_inputs, model))
        batches = tuple(feed(batch, f"batch {position}") for position, batch in enumerate(inputs or (example,)))
        return cls(proto, feed, example, feed(example, "the inputs"), batches)

    def converted(self, scheme: Scheme | None, *, weight_range: Range = "auto") -> "Graph":
        """The graph in a scheme; None is float32. Raises `ModelError` where there is nothing to quantise."""
        if scheme is None:
            return Graph(self, compact(self.proto))
        names = set(weights(self.proto))
        if not names:
            raise ModelError("the network has no float32 weights of linear layers or convolutions to quantise")
        if scheme == "bf16":
            proto = store_bf16(self.proto)
        elif scheme == "int8-weights":
            proto = store_int8(self.proto)
        else:
            proto = store_int8(_by_onnxruntime(self, scheme, reduced=_reduced(weight_range)))
        float32 = set(large(proto))
        return Graph(self, compact(proto), scheme, tuple(sorted(names - float32)), tuple(sorted(float32)))


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph that is not written yet, with the names of its quantised weights and of its large float32 constants."""

    source: Source
    proto: "onnx.ModelProto"
    scheme: Scheme | None = None
    quantised: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    def evaluated(
        self, test: Iterable[Any] | None, *, runtime: str, exact_runtime: str, threads: int | None = None
    ) -> tuple[float, Accuracy | None]:
        """The difference to the float32 graph, and the accuracy on test data, if there are some.

        Raises `DataError`, `ModelError` or `EngineError` for a graph that cannot be run, or gives NaN.
        """
        run = engine(self.proto, runtime=runtime, threads=threads)
        exact = engine(self.source.proto, runtime=exact_runtime, threads=threads)
        distance = difference(run, exact, self.source.batches) if self.scheme else 0.0
        return distance, None if test is None else accuracy_of(run, self.source.feed, test, like=self.source.inputs)

    def write(self, path: Path) -> Path:
        """Write the file, wholly or not at all. Raises `FileError` where that fails."""
        return write_atomically(path, lambda part: part.write_bytes(self.proto.SerializeToString()))


def quantized_file(
    source: Source, scheme: Scheme, *, path: Path, test: Iterable[Any] | None = None, weight_range: Range = "auto"
) -> Quantized:
    """Quantise, run and write one graph; raises as `Source.converted`, `Graph.evaluated` and `Graph.write`."""
    graph = source.converted(scheme, weight_range=weight_range)
    distance, accuracy = graph.evaluated(test, runtime="onnxruntime", exact_runtime="onnxruntime")
    return Quantized(
        path=graph.write(path),
        bytes=path.stat().st_size,
        scheme=scheme,
        difference=distance,
        accuracy=accuracy,
        quantised=graph.quantised,
        float32=graph.float32,
    )


def _by_onnxruntime(source: Source, scheme: Scheme, *, reduced: bool) -> "onnx.ModelProto":
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic, quantize_static

    # biases of int32 would take 12 bytes each, of float32 4
    options = {"MatMulConstBOnly": True} | ({} if scheme == "int8-dynamic" else {"QuantizeBias": False})
    shared = {"per_channel": True, "reduce_range": reduced, "weight_type": QuantType.QInt8, "extra_options": options}
    # without what lies between the layers in networks of norms, whose sums have a wide range
    norms = _NORMS & {node.op_type for node in source.proto.graph.node}
    batches = iter(source.batches)
    what = f"ONNX Runtime cannot quantise this network ({scheme})"
    advice = "; do the data fit it? scheme='int8-weights' works for most networks"
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder, raised_as(DataError, what, advice=advice), quiet():
        original, folded, quantised = (Path(folder, name) for name in ("float.onnx", "folded.onnx", "int8.onnx"))
        onnx.save(source.proto, original)
        quant_pre_process(original, folded, skip_symbolic_shape=True)
        if scheme == "int8-dynamic":
            quantize_dynamic(folded, quantised, op_types_to_quantize=["MatMul", "Gemm"], **shared)
        else:
            quantize_static(
                folded,
                quantised,
                SimpleNamespace(get_next=lambda: next(batches, None)),
                activation_type=QuantType.QUInt8,  # x86 multiplies unsigned by signed
                op_types_to_quantize=[*_STATIC, *(() if norms else _BETWEEN)],
                **shared,
            )
        return onnx.load(quantised)


def _reduced(weight_range: Range) -> bool:
    if weight_range != "auto":
        return weight_range == "reduced"
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return False  # others add 8-bit products without saturation
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def before(budget: Budget, *, bits: int = 8) -> Budget:
    """The budget for `st.compress` that meets a budget of bytes once the weights are stored in fewer bits.

    `before(Budget(bytes=0.15))` is `Budget(bytes=0.6)`: at a quarter of the bytes each, 60 % of the weights fit.
    Scales, biases and the graph come on top; they are some per cent in small networks, so leave a margin.

    Args:
        budget: Of bytes, as a share of the dense float32 file.
        bits: Of a weight in the file.

    Raises:
        RuleError: a budget of something else, other bits than 1 to 32, or one that quantisation alone meets.
    """
    if budget.bytes is None:
        raise RuleError(f"{budget} does not limit bytes; fewer bits change nothing else: give Budget(bytes=...)")
    if not 1 <= bits <= 32:
        raise RuleError(f"bits={bits}: a stored weight has 1 to 32 bits")
    share = budget.bytes * 32 / bits
    if share >= 1:
        raise RuleError(f"{budget} is met by the dense network in {bits} bits alone; quantise it, without low rank")
    return Budget(bytes=share)
