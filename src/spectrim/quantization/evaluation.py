"""ONNX models on batch after batch: inputs by name, the difference to the exact outputs, accuracy."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectrim.benchmark.measurement import Accuracy, top1
from spectrim.core.arguments import checked
from spectrim.core.errors import DataError, EngineError, FileError, ModelError
from spectrim.core.execution import Inputs
from spectrim.runtimes.conversion import optional, require_onnx
from spectrim.runtimes.engines import Arrays, Engine, array_of, input_names, load_engine
from spectrim.runtimes.faults import raised_as, root_reason
from spectrim.runtimes.sessions import require_runtime

if TYPE_CHECKING:
    import onnx

Feed = Callable[[Inputs, str], Arrays]
"""From one call's inputs, and how a message names them, to the arrays that the graph takes."""


def require_quantizer() -> None:
    """Raises `DependencyError` where onnx, onnxscript or onnxruntime is not installed."""
    require_onnx()
    for package in ("onnxruntime", "onnxruntime.quantization"):
        optional(package, extra="onnx")


def feed_of(proto: "onnx.ModelProto", flatten: Callable[[Inputs], Iterable[Tensor]]) -> Feed:
    """The tensors of one call's inputs for an ONNX graph, which takes them in this order.

    The function raises `DataError` for inputs that are not those of the graph.
    """
    names = input_names(proto)

    def feed(inputs: Inputs, what: str) -> Arrays:
        try:
            flat = list(flatten(inputs))
        except ModelError as error:
            raise DataError(f"{what} ({inputs.describe()}) do not fit the model: {error}") from error
        if len(flat) != len(names):
            raise DataError(f"{what}: {len(flat)} tensors, and the network takes {', '.join(names) or 'none'}")
        return {name: array_of(tensor) for name, tensor in zip(names, flat, strict=True)}

    return feed


def engine(proto: "onnx.ModelProto", *, runtime: str = "onnxruntime", threads: int | None = None) -> Engine:
    """A function that runs the model in a runtime that reads ONNX, by default with as many threads as torch.

    Raises as `require_runtime`, and `EngineError` or `ModelError` where the runtime cannot load the model.
    """
    number = threads or torch.get_num_threads()
    require_runtime(runtime, threads=number, reads_onnx=True)
    with raised_as(EngineError, f"{runtime} cannot load the model"):
        return load_engine(proto, runtime=runtime, threads=number)


def outputs_of(run: Engine, arrays: Arrays, *, what: str) -> list[NDArray[Any]]:
    """The outputs for one batch. Raises `DataError` where the runtime cannot run the batch."""
    shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
    with raised_as(DataError, f"{what} ({shapes}) cannot be run by the quantised network"):
        return run(arrays)


def difference(quantised: Engine, exact: Engine, batches: Iterable[Arrays]) -> float:
    """Largest difference of any output to the exact one, as a share of that output's largest entry.

    Raises `ModelError` for NaN or infinity where the exact one has none, `DataError` for a batch that cannot be run.
    """
    differences: dict[int, float] = {}
    largest: dict[int, float] = {}
    for position, arrays in enumerate(batches):
        what = f"batch {position}"
        pairs = zip(outputs_of(quantised, arrays, what=what), outputs_of(exact, arrays, what=what), strict=True)
        for place, (output, reference) in enumerate(pairs):
            if not np.isfinite(output).all() and np.isfinite(reference).all():
                raise ModelError(f"the quantised network gives NaN or infinity on batch {position}; use other data")
            if output.size:
                distance = np.abs(output.astype(np.float64) - reference.astype(np.float64)).max()
                differences[place] = max(differences.get(place, 0.0), float(distance))
                largest[place] = max(largest.get(place, 0.0), float(np.abs(reference).max()))
    return max((differences[place] / (largest[place] or 1.0) for place in differences), default=0.0)


def accuracy_of(run: Engine, feed: Feed, data: Iterable[Any], *, like: Inputs | None = None) -> Accuracy:
    """Top-1 accuracy over batches (inputs.., labels), inputs as in an example; the first output is (batch, classes).

    Raises `DataError` for no batches, and for outputs and labels that do not fit together.
    """

    def scores_of(inputs: Inputs, what: str) -> Tensor:
        return torch.from_numpy(outputs_of(run, feed(inputs, what), what=what)[0])

    return top1(data, scores_of, like=like)


def _in_order(names: Sequence[str], inputs: Inputs) -> list[Tensor]:
    """The tensors for these names; in the order given where they have none."""
    if not inputs.kwargs:
        return inputs.tensors()
    if set(inputs.kwargs) != set(names):
        raise DataError(f"the batches name {', '.join(inputs.kwargs)}, and the file's inputs are {', '.join(names)}")
    return [torch.as_tensor(inputs.kwargs[name]) for name in names]


@checked
def onnx_accuracy(
    path: str | Path, data: Iterable[Any], *, runtime: str = "onnxruntime", threads: int | None = None
) -> Accuracy:
    """Top-1 accuracy of an ONNX file over batches (inputs.., labels).

    Args:
        path: The file; its first output is (batch, classes).
        data: Batches whose inputs stand in the order of the file's inputs, or have their names; labels are (batch,)
            class indices.
        runtime: `onnxruntime`, `openvino` or `openvino-bf16`.
        threads: As many as torch uses by default.

    Raises:
        FileError: the file is missing or not an ONNX model.
        DataError: no batches, or outputs and labels that do not fit together.
        DependencyError, EngineError: the runtime is not installed, or cannot run the model.
    """
    require_quantizer()
    import onnx

    try:
        proto = onnx.load(path)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise FileError(f"{path} is not an ONNX model: {root_reason(error)}") from error
    feed = feed_of(proto, partial(_in_order, input_names(proto)))
    return accuracy_of(engine(proto, runtime=runtime, threads=threads), feed, data)
