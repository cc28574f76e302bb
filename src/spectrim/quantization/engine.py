"""Running ONNX models on batch after batch, and what is needed for it: inputs by name, scores, accuracy."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.benchmark.measurement import Accuracy
from spectrim.core.errors import DataError, DependencyError, EngineError, FileError, ModelError
from spectrim.core.execution import Inputs, as_inputs, split_labels
from spectrim.core.files import write_atomically
from spectrim.runtimes.conversion import first_line, openvino_of, require_openvino
from spectrim.runtimes.sessions import require_runtime

if TYPE_CHECKING:
    import onnx

Feeds = dict[str, NDArray[Any]]
Run = Callable[[Feeds], list[NDArray[Any]]]


def require_quantizer() -> None:
    """Raises `DependencyError` where onnx, onnxscript or onnxruntime is not installed."""
    try:
        import onnx
        import onnxruntime.quantization  # noqa: F401

        _ = onnx.__version__
    except ImportError as error:
        name = (error.name or "onnxruntime").split(".")[0]
        raise DependencyError(
            f'{name} is needed to quantise and is not installed (or broken: {error}); pip install "spectrim[onnx]"'
        ) from error


class Feeder:
    """Gives the inputs of a model to its ONNX graph, which has them in the order of the model's own arguments."""

    def __init__(self, model: nn.Module, proto: "onnx.ModelProto") -> None:
        self.signature = inspect.signature(model.forward)
        self.names = input_names(proto)

    def __call__(self, inputs: Inputs, *, what: str = "the inputs") -> Feeds:
        """The arrays by name. Raises `DataError` for inputs that are not those the model was exported with."""
        try:
            given = self.signature.bind(*inputs.args, **inputs.kwargs)
        except TypeError as error:
            raise DataError(f"{what} ({inputs.describe()}) do not fit the model: {error}") from error
        return _named(self.names, given.tensors(), what=what)


def input_names(proto: "onnx.ModelProto") -> list[str]:
    """What must be given to the graph, in its order."""
    constants = {one.name for one in proto.graph.initializer}
    return [one.name for one in proto.graph.input if one.name not in constants]


def _named(names: Sequence[str], found: Sequence[Tensor], *, what: str) -> Feeds:
    if len(found) != len(names):
        raise DataError(f"{what}: {len(found)} tensors, and the network takes {', '.join(names) or 'none'}")
    return {name: one.detach().cpu().contiguous().numpy() for name, one in zip(names, found, strict=True)}


def engine(proto: "onnx.ModelProto", *, runtime: str = "onnxruntime", threads: int | None = None) -> Run:
    """A function that runs the model in a runtime, on batches of any size it allows.

    Args:
        proto: The model.
        runtime: `onnxruntime`, `openvino` or `openvino-bf16`.
        threads: As many as torch uses by default.

    Raises:
        DependencyError: the runtime is not installed.
        EngineError: it does not read ONNX; as `require_runtime`; it cannot load the model.
    """
    number = threads or torch.get_num_threads()
    name = require_engine(runtime, threads=number)
    try:
        return _MAKERS[name](proto, number)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"{name} cannot load the model: {first_line(error)}") from error


def require_engine(runtime: str, *, threads: int) -> str:
    """The runtime, if it can be had here and reads ONNX; raises as `engine`."""
    name = require_runtime(runtime, threads=threads)
    if name not in _MAKERS:
        raise EngineError(f"{name} does not read ONNX; {', '.join(_MAKERS)} do")
    return name


def _onnxruntime(proto: "onnx.ModelProto", threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what it logs is raised as well
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: [np.asarray(one) for one in session.run(None, feeds)]


def _openvino(precision: str) -> Callable[["onnx.ModelProto", int], Run]:
    def make(proto: "onnx.ModelProto", threads: int) -> Run:
        openvino = require_openvino()
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(openvino_of(proto, openvino), "CPU", settings)
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if got != precision:
            raise EngineError(f"OpenVINO computes in {got} on this processor, not in {precision}")

        def run(feeds: Feeds) -> list[NDArray[Any]]:
            found = compiled(feeds)
            return [np.array(found[place], dtype=np.float32) for place in compiled.outputs]

        return run

    return make


_MAKERS: Mapping[str, Callable[["onnx.ModelProto", int], Run]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino("f32"),
    "openvino-bf16": _openvino("bf16"),
}


def answers(run: Run, feeds: Feeds, *, what: str) -> list[NDArray[Any]]:
    """The outputs for one batch. Raises `DataError` where the runtime refuses the batch."""
    try:
        return run(feeds)
    except Exception as error:
        shapes = ", ".join(f"{name} {one.dtype} {list(one.shape)}" for name, one in feeds.items())
        raise DataError(f"{what} ({shapes}) cannot be run by the quantised network: {first_line(error)}") from error


def difference(quantised: Run, exact: Run, batches: Iterable[Feeds]) -> float:
    """Largest difference of any output to the exact one, as a share of that output's largest entry.

    Raises:
        ModelError: the quantised network gives NaN or infinity where the exact one does not.
        DataError: a batch that cannot be run.
    """
    furthest: dict[int, float] = {}
    largest: dict[int, float] = {}
    for position, feeds in enumerate(batches):
        what = f"batch {position}"
        pairs = zip(answers(quantised, feeds, what=what), answers(exact, feeds, what=what), strict=True)
        for place, (one, other) in enumerate(pairs):
            if not np.isfinite(one).all() and np.isfinite(other).all():
                raise ModelError(f"the quantised network gives NaN or infinity on batch {position}; use other data")
            if one.size:
                apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
                furthest[place] = max(furthest.get(place, 0.0), float(apart))
                largest[place] = max(largest.get(place, 0.0), float(np.abs(other).max()))
    return max((furthest[place] / (largest[place] or 1.0) for place in furthest), default=0.0)


def scored(run: Run, names: Sequence[str], data: Iterable[Any], *, feeder: Feeder | None = None) -> Accuracy:
    """Top-1 accuracy over batches (inputs.., labels); the first output is (batch, classes).

    Raises:
        DataError: no batches, or outputs and labels that do not fit together.
    """
    correct = total = 0
    for position, batch in enumerate(data):
        what = f"batch {position}"
        inputs, given = split_labels(batch, position=position)
        feeds = feeder(inputs, what=what) if feeder else _named(names, inputs.tensors(), what=what)
        scores, labels = answers(run, feeds, what=what)[0], torch.as_tensor(given).cpu().numpy()
        if scores.ndim != 2 or scores.shape[:1] != labels.shape:
            raise DataError(
                f"{what}: outputs {list(scores.shape)} and labels {list(labels.shape)} do not give an accuracy; it "
                "needs outputs (batch, classes) and labels (batch,)"
            )
        correct += int((scores.argmax(axis=1) == labels).sum())
        total += len(labels)
    if not total:
        raise DataError("the data for the accuracy is empty; give at least one batch")
    return Accuracy(correct=correct, total=total)


def _all(inputs: Inputs) -> tuple[Any, ...]:
    return (*inputs.args, *inputs.kwargs.values())


def onnx_accuracy(
    path: str | Path, data: Iterable[Any], *, runtime: str = "onnxruntime", threads: int | None = None
) -> Accuracy:
    """Top-1 accuracy of an ONNX file over batches (inputs.., labels).

    Args:
        path: The file; its first output is (batch, classes).
        data: Batches whose inputs stand in the order of the file's inputs; labels are (batch,) class indices.
        runtime: `onnxruntime`, `openvino` or `openvino-bf16`.
        threads: As many as torch uses by default.

    Raises:
        FileError: the file is missing or not an ONNX model.
        DataError: no batches, or outputs and labels that do not fit together.
        DependencyError, EngineError: the runtime is not installed, or cannot run the model.
    """
    require_quantizer()
    proto = read(Path(path))
    return scored(engine(proto, runtime=runtime, threads=threads), input_names(proto), data)


def read(path: Path) -> "onnx.ModelProto":
    """An ONNX file. Raises `FileError` for one that is missing or damaged."""
    import onnx

    try:
        return onnx.load(path)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise FileError(f"{path} is not an ONNX model: {first_line(error)}") from error


def write(proto: "onnx.ModelProto", path: Path) -> Path:
    """Write an ONNX file, wholly or not at all; see `spectrim.core.files.write_atomically`."""
    return write_atomically(path, lambda part: part.write_bytes(proto.SerializeToString()))


def batched(model_inputs: Inputs, data: Iterable[Any]) -> Iterator[Inputs]:
    """Calibration batches without their labels: what a batch has beyond the example's inputs."""
    wanted = len(model_inputs.args) or 1
    for batch in data:
        labelled = isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == wanted + 1
        yield as_inputs((batch[0] if wanted == 1 else batch[:-1]) if labelled else batch)
