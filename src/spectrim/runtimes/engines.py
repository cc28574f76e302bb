"""ONNX Runtime and OpenVINO on the CPU, with a fixed number of threads and a stated precision."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from spectrim.core.errors import EngineError
from spectrim.runtimes.conversion import openvino_core, to_openvino

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, NDArray[Any]]
Engine = Callable[[Arrays], list[NDArray[Any]]]
"""One pass over inputs by name: every output, in the order of the model."""

_DISABLED = ["SkipLayerNormFusion"]
"""Of ONNX Runtime on CPUs. One kernel for an addition and a layer norm takes three times as long as two (1.32, MiniLM);
it is used where the batch size is fixed, as when a network is timed, and not in files with any batch size."""
_PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}


def input_names(proto: "onnx.ModelProto") -> list[str]:
    """The inputs that a graph takes, in its order, without its constants."""
    constants = {initializer.name for initializer in proto.graph.initializer}
    return [value.name for value in proto.graph.input if value.name not in constants]


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The values of a tensor on any device."""
    return tensor.detach().cpu().contiguous().numpy()


def load_engine(model: "onnx.ModelProto | Path", *, runtime: str, threads: int) -> Engine:
    """The model, or the file, in `onnxruntime`, `openvino` or `openvino-bf16`; raises what the runtime raises."""
    if runtime == "onnxruntime":
        session = onnxruntime_session(model, threads=threads)
        return lambda arrays: list(session.run(None, dict(arrays)))
    compiled = openvino_model(model, runtime=runtime, threads=threads)
    names = {name for port in compiled.inputs for name in port.names}  # without those that nothing depends on

    def run(arrays: Arrays) -> list[NDArray[Any]]:
        outputs = compiled({name: array for name, array in arrays.items() if name in names})
        return [outputs[port].copy() for port in compiled.outputs]

    return run


def onnxruntime_session(model: "onnx.ModelProto | Path", *, threads: int) -> Any:
    """An `InferenceSession` with all optimisations but those that make a network slower."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # threads that wait busily between two passes would take the core from what is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # what it logs is raised as well
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(source, options, providers=providers, disabled_optimizers=_DISABLED)


def openvino_model(model: "onnx.ModelProto | Path", *, runtime: str, threads: int) -> Any:
    """A `CompiledModel` for one pass after the other. Raises `EngineError` where the processor lacks the precision."""
    precision = _PRECISIONS[runtime]  # by default it takes bf16 where the CPU has it
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    source = model if isinstance(model, Path) else to_openvino(model)
    compiled = openvino_core().compile_model(source, "CPU", settings)
    actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if actual != precision:
        raise EngineError(f"OpenVINO computes in {actual} on this processor, not in {precision}")
    return compiled


def relative_difference(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Largest difference of an entry, as a share of its tensor's largest finite one; infinite for other shapes."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in outputs]:
        return math.inf
    return max(map(_difference, expected, outputs), default=0.0)


def _difference(expected: Tensor, output: Tensor) -> float:
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, output = expected.detach().cpu().to(wide), output.to(wide)
    same = (expected == output) | (expected.isnan() & output.isnan())
    distance = torch.where(same, 0.0, (expected - output).abs()).nan_to_num(math.inf, math.inf).max()
    scale = expected.abs().nan_to_num(0.0, 0.0).max()
    return float(distance / scale) if scale > 0 else math.inf if distance > 0 else 0.0
