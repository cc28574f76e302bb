"""One network in one scheme: exported, quantised, checked, and written as an ONNX file."""

import difflib
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field
from torch import nn

from spectrim.benchmark.measurement import Accuracy
from spectrim.core.errors import DataError, FileError, ModelError, RuleError
from spectrim.core.execution import Inputs, as_inputs
from spectrim.core.files import Frozen
from spectrim.core.plans import Budget
from spectrim.quantization.engine import (
    Feeder,
    Feeds,
    batched,
    difference,
    engine,
    require_quantizer,
    scored,
    write,
)
from spectrim.quantization.graph import compact, large, store_bf16, store_int8, weights
from spectrim.runtimes.conversion import first_line, quiet, to_onnx

if TYPE_CHECKING:
    import onnx

Scheme = Literal["int8-weights", "int8-dynamic", "int8-static", "bf16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""int8-weights: stored as int8, computed in float32. int8-dynamic: linear layers computed in int8, with the range of
their inputs taken in every pass; all other weights stored as int8. int8-static: layers and what lies between computed
in int8, with ranges from calibration data. bf16: stored as bfloat16, computed in what the runtime has."""

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
        left: Names of the constants that are more than a vector and stay float32.
    """

    path: Path
    bytes: int = Field(ge=0)
    scheme: Scheme
    difference: float
    accuracy: Accuracy | None = None
    quantised: tuple[str, ...]
    left: tuple[str, ...] = ()


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
    target, chosen = require_path(path), require_scheme(scheme)
    if chosen == "int8-static" and data is None:
        raise DataError(
            "int8-static takes the ranges of activations from data; pass data= with some hundred inputs, or use "
            "scheme='int8-weights', which needs none"
        )
    require_quantizer()
    source = exported(model, example_inputs, data=data, max_batches=max_batches, dynamic_batch=dynamic_batch)
    made = convert(source, chosen, weight_range=weight_range)
    return finished(made, source, target, test=test)


@dataclass(frozen=True, eq=False)
class Source:
    """A float32 network as a graph, and the batches that its quantised self is made and judged on."""

    proto: "onnx.ModelProto"
    feeder: Feeder
    example: Feeds
    batches: tuple[Feeds, ...]


@dataclass(frozen=True, eq=False)
class Converted:
    """A quantised graph, not yet written."""

    proto: "onnx.ModelProto"
    scheme: Scheme
    quantised: tuple[str, ...]
    left: tuple[str, ...]


def require_scheme(scheme: str) -> Scheme:
    """Raises `RuleError` for a scheme that there is not."""
    for known in SCHEMES:
        if known == scheme:
            return known
    near = difflib.get_close_matches(str(scheme), SCHEMES, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    raise RuleError(f"scheme {scheme!r} is unknown; {hint} {', '.join(SCHEMES)}")


def require_path(path: str | Path) -> Path:
    """Raises `FileError` for a path that is not one of an ONNX file."""
    target = Path(path)
    if target.suffix.lower() != ".onnx" or target.is_dir():
        raise FileError(f"{target} is no name of an ONNX file; give a path that ends in .onnx")
    return target


def exported(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Iterable[Any] | None,
    max_batches: int | None = None,
    dynamic_batch: bool = True,
) -> Source:
    """The network's float32 graph with its example and its batches.

    Raises:
        DataError: no batches, or batches that do not fit the network.
        ModelError: it cannot be exported.
    """
    example = as_inputs(example_inputs)
    inputs = None if data is None else tuple(islice(batched(example, data), max_batches))
    if inputs is not None and not inputs:
        raise DataError("the calibration data is empty; give at least one batch")
    proto = to_onnx(model, example, dynamic_batch=dynamic_batch)
    feeder = Feeder(model, proto)
    return Source(proto, feeder, feeder(example), _fed(feeder, inputs or (example,)))


def _fed(feeder: Feeder, inputs: Sequence[Inputs]) -> tuple[Feeds, ...]:
    return tuple(feeder(one, what=f"batch {position}") for position, one in enumerate(inputs))


def convert(source: Source, scheme: Scheme, *, weight_range: Range = "auto") -> Converted:
    """The graph in a scheme. Raises `ModelError` where there is nothing to quantise."""
    before = set(weights(source.proto))
    if not before:
        raise ModelError("the network has no float32 weights of linear layers or convolutions to quantise")
    if scheme == "bf16":
        made = store_bf16(source.proto)
    elif scheme == "int8-weights":
        made = store_int8(source.proto)
    else:
        made = store_int8(_computing(source, scheme, reduced=_reduced(weight_range)))
    left = set(large(made))
    quantised = tuple(sorted(before - left))
    return Converted(compact(made), scheme, quantised, tuple(sorted(left)))


def finished(made: Converted, source: Source, path: Path, *, test: Iterable[Any] | None) -> Quantized:
    """Run the quantised graph beside the float32 one, and write it.

    Raises:
        DataError, ModelError, EngineError: it cannot be run, or gives NaN.
        FileError: the file cannot be written.
    """
    run = engine(made.proto)
    apart = difference(run, engine(source.proto), source.batches)
    accuracy = None if test is None else scored(run, source.feeder.names, test, feeder=source.feeder)
    written = write(made.proto, path)
    return Quantized(
        path=written,
        bytes=written.stat().st_size,
        scheme=made.scheme,
        difference=apart,
        accuracy=accuracy,
        quantised=made.quantised,
        left=made.left,
    )


def _computing(source: Source, scheme: Scheme, *, reduced: bool) -> "onnx.ModelProto":
    """By ONNX Runtime's quantiser."""
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic, quantize_static

    shared = {"per_channel": True, "reduce_range": reduced, "weight_type": QuantType.QInt8}
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder, quiet():
        given, ready, done = (Path(folder) / f"{name}.onnx" for name in ("given", "ready", "done"))
        onnx.save(source.proto, given)
        try:
            quant_pre_process(given, ready, skip_symbolic_shape=True)
            if scheme == "int8-dynamic":
                options = {"MatMulConstBOnly": True}
                ops = ["MatMul", "Gemm"]
                quantize_dynamic(ready, done, op_types_to_quantize=ops, extra_options=options, **shared)
            else:
                options = {"MatMulConstBOnly": True, "QuantizeBias": False}  # int32 biases take 12 bytes, float32 4
                ops = _static_ops(source.proto)
                quantize_static(
                    ready,
                    done,
                    _reader(source.batches),
                    activation_type=QuantType.QUInt8,  # x86 multiplies unsigned by signed
                    op_types_to_quantize=ops,
                    extra_options=options,
                    **shared,
                )
        except Exception as error:
            raise DataError(
                f"ONNX Runtime cannot quantise this network ({scheme}): {first_line(error)}; do the data fit it? "
                "scheme='int8-weights' asks least of a network"
            ) from error
        return onnx.load(done)


def _static_ops(proto: "onnx.ModelProto") -> list[str]:
    """Layers, and what lies between them; without the latter in networks of norms, whose sums have a wide range."""
    kinds = {node.op_type for node in proto.graph.node}
    return list(_STATIC if kinds & _NORMS else (*_STATIC, *_BETWEEN))


def _reader(batches: Iterable[Feeds]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Feeds | None:
            return next(self.rest, None)

    return Reader()


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
