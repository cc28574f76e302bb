"""What a model costs and how good it is: parameters, bytes, MACs, paired latency, accuracy with its interval."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spectrim.errors import DataError
from spectrim.execution import Inputs, as_inputs, call, device_of, evaluating, split_labels, to_device
from spectrim.files import Frozen
from spectrim.surgery import unique_tensors

_Z95 = 1.959963984540054


class Interval(Frozen):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Accuracy(Frozen):
    """Top-1 accuracy as counts, so that intervals and means can be taken from it."""

    correct: int = Field(ge=0)
    total: int = Field(ge=1)

    @property
    def value(self) -> float:
        """Share of correct answers, in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> Interval:
        """The share with its 95 % Wilson score interval (Wilson 1927), which covers the sampling of the test set."""
        n, p = self.total, self.value
        scale = 1 + _Z95**2 / n
        centre = (p + _Z95**2 / (2 * n)) / scale
        half = _Z95 / scale * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
        return Interval(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


class Epoch(Frozen):
    """One epoch of training: mean loss, accuracy on held-out data in [0, 1] if it was taken, seconds."""

    epoch: int
    loss: float
    held_out: float | None = None
    seconds: float


class Measurement(Frozen):
    """One model, measured; against a reference also the ratios.

    Attributes:
        params: Stored numbers, shared ones once.
        bytes: Size of the model's safetensors file.
        macs: Multiply-accumulates of one forward pass of the example inputs (1 MAC = 2 FLOPs), in matrix products,
            convolutions and attention; element-wise operations, norms and look-ups are not counted.
        latency_ms: Median time of one forward pass of the example inputs, in milliseconds.
        threads: Threads it was timed with.
        accuracy: On the data given, if any.
        params_ratio: kept / dense.
        bytes_ratio: kept / dense.
        macs_ratio: kept / dense.
        speedup: Time of the reference over time of the model: median of paired rounds and its 95 % interval.
    """

    params: int
    bytes: int
    macs: int
    latency_ms: float | None = None
    threads: int | None = None
    accuracy: Accuracy | None = None
    params_ratio: float | None = None
    bytes_ratio: float | None = None
    macs_ratio: float | None = None
    speedup: Interval | None = None

    @property
    def macs_speedup(self) -> float | None:
        """The speed-up that the arithmetic promises: dense MACs over kept MACs."""
        return 1 / self.macs_ratio if self.macs_ratio else None

    def against(self, dense: "Measurement") -> "Measurement":
        """This measurement with its three ratios to a dense one filled in."""
        ratios = {
            f"{name}_ratio": getattr(self, name) / whole if (whole := getattr(dense, name)) else None
            for name in ("params", "bytes", "macs")
        }
        return self.model_copy(update=ratios)


def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    reference: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    latency: bool = True,
    threads: int = 1,
    rounds: int = 31,
) -> Measurement:
    """Measure a model, and compare it with a reference (its dense self) when one is given.

    The two are timed in the same process in interleaved rounds of alternating order, and the ratio is taken round by
    round, so that drift of the machine cancels. Both models stay as they are.

    Args:
        model: The model to measure.
        example_inputs: One call's inputs; MACs and latency are for this call, batch size included.
        reference: What to compare with.
        data: Batches (inputs.., labels) for the accuracy.
        latency: Time the model; off saves a second or more.
        threads: Torch threads while timing; the former number is restored.
        rounds: Paired rounds, at least 5; fewer are done when they would take more than half a minute.

    Raises:
        ModelError: the model cannot run `example_inputs`.
        DataError: empty data, outputs that are not (batch, classes), or fewer than 5 rounds or 1 thread.
    """
    if rounds < 5 or threads < 1:
        raise DataError(f"rounds={rounds}, threads={threads}: give at least 5 rounds and 1 thread")
    inputs = as_inputs(example_inputs)
    own = count(model, inputs)
    if data is not None:
        own = own.model_copy(update={"accuracy": accuracy(model, data)})
    if reference is not None:
        own = own.against(count(reference, inputs))
    return own.model_copy(update=_timing(model, reference, inputs, threads, rounds)) if latency else own


def count(model: nn.Module, example_inputs: Any) -> Measurement:
    """Parameters, bytes and MACs alone: what can be known without timing or data."""
    params = sum(parameter.numel() for parameter in model.parameters())
    return Measurement(params=params, bytes=file_size(model), macs=count_macs(model, example_inputs))


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass, as half of the FLOPs that torch counts; see `Measurement.macs`."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        call(model, as_inputs(example_inputs))
    return int(counter.get_total_flops()) // 2


def file_size(model: nn.Module) -> int:
    """Bytes of the model as a plain safetensors file: header and every distinct tensor once."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in unique_tensors(model)[0].items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(text / 8) * 8 + end


def accuracy(model: nn.Module, data: Iterable[Any]) -> Accuracy:
    """Top-1 accuracy over batches (inputs.., labels); outputs (batch, classes), labels (batch,) of class indices.

    Raises:
        DataError: no batches, or outputs and labels that do not fit together.
    """
    correct = total = 0
    with evaluating(model):
        for position, batch in enumerate(data):
            inputs, labels = split_labels(batch, position=position)
            outputs = call(model, inputs, what=f"batch {position}")
            labels = torch.as_tensor(labels)
            if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[:1] != labels.shape:
                shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise DataError(
                    f"batch {position}: outputs {shape} and labels {list(labels.shape)} do not give an accuracy; "
                    "it needs outputs (batch, classes) and labels (batch,)"
                )
            labels = labels.to(outputs.device)
            correct += int((outputs.argmax(dim=1) == labels).sum())
            total += len(labels)
    if not total:
        raise DataError("the data for the accuracy is empty; give at least one batch")
    return Accuracy(correct=correct, total=total)


def _timing(model: nn.Module, reference: nn.Module | None, inputs: Inputs, threads: int, rounds: int) -> dict[str, Any]:
    with _threads(threads), evaluating(model), evaluating(reference or model), torch.inference_mode():
        run = _runner(model, inputs)
        if reference is None:
            times = _interleaved([run], rounds)[0]
            return {"latency_ms": statistics.median(times) * 1e3, "threads": threads}
        times, others = _interleaved([run, _runner(reference, inputs)], rounds)
        ratios = sorted(other / own for own, other in zip(times, others, strict=True))
    return {"latency_ms": statistics.median(times) * 1e3, "threads": threads, "speedup": _median_interval(ratios)}


def _runner(model: nn.Module, inputs: Inputs) -> Callable[[], float]:
    """A function that times enough passes to outlast the clock's grain, and gives seconds a pass."""
    device = device_of(model)
    moved = to_device(inputs, device)

    def passes(number: int) -> float:
        _finish(device)
        start = time.perf_counter()
        for _ in range(number):
            model(*moved.args, **moved.kwargs)
        _finish(device)
        return (time.perf_counter() - start) / number

    call(model, inputs)
    passes(2)
    number = max(1, math.ceil(2e-3 / max(passes(3), 1e-7)))
    return lambda: passes(number)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _interleaved(runs: list[Callable[[], float]], rounds: int, *, patience: float = 30.0) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for number in range(rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for which in order:
            times[which].append(runs[which]())
        if number >= 4 and time.perf_counter() - start > patience:
            break
    return times


def _median_interval(ordered: list[float]) -> Interval:
    """Median and its distribution-free 95 % interval from order statistics."""
    n = len(ordered)
    reach = _Z95 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return Interval(value=statistics.median(ordered), low=ordered[max(0, low)], high=ordered[min(n - 1, high)])


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
