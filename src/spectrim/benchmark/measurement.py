"""What a model costs and how good it is: parameters, bytes, MACs, paired latency, accuracy with its interval."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.batches import NamedLabels, batches_of, split_labels
from spectrim.core.display import Displayed
from spectrim.core.errors import DataError
from spectrim.core.execution import (
    Forward,
    ForwardFunction,
    Inputs,
    as_inputs,
    call,
    evaluating,
    require_repeatable,
    require_values,
)
from spectrim.core.files import Frozen
from spectrim.core.nested import describe, logits_of, tensor_of
from spectrim.layers.cost import NetworkCost, count as count_cost
from spectrim.runtimes.sessions import Runtime, RuntimeName, require_runtime, timed_together
from spectrim.runtimes.timing import Z95, Comparison, Interval, Timing, Verdict, compare, interleaved


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
        scale = 1 + Z95**2 / n
        centre = (p + Z95**2 / (2 * n)) / scale
        half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return Interval(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


class Epoch(Frozen):
    """One epoch of training: mean loss, accuracy on held-out data in [0, 1] or their mean loss if taken, seconds."""

    epoch: int
    loss: float
    held_out: float | None = None
    held_out_loss: float | None = None
    seconds: float


class Measurement(Displayed, NetworkCost):
    """One model, measured; against a reference also the ratios. Its params, bytes and MACs are as in `NetworkCost`.

    Attributes:
        latency_ms: Median time of one forward pass of the example inputs, in milliseconds on the wall.
        cpu_ms: The same in processor time, where one thread did the work; ratios are taken from it then.
        reference_ms: The reference's median time, as `latency_ms`.
        runtime: What it was timed in; see `spectrim.runtimes.RUNTIMES`.
        threads: Threads it was timed with.
        batch: Samples of one pass, where the example was made larger or smaller for it.
        accuracy: On the data given, if any.
        params_ratio: kept / dense.
        bytes_ratio: kept / dense.
        macs_ratio: kept / dense.
        cache_bytes_ratio: kept / dense.
        speedup: Time of the reference over time of the model, both in this runtime: median of paired rounds and its
            95 % interval.
        drift: Time of the reference in the first half of the rounds over that in the second: 1 on a quiet machine.
    """

    latency_ms: float | None = None
    cpu_ms: float | None = None
    reference_ms: float | None = None
    runtime: RuntimeName | None = None
    threads: int | None = None
    batch: int | None = None
    accuracy: Accuracy | None = None
    params_ratio: float | None = None
    bytes_ratio: float | None = None
    macs_ratio: float | None = None
    cache_bytes_ratio: float | None = None
    speedup: Interval | None = None
    drift: float | None = None

    @property
    def macs_speedup(self) -> float | None:
        """The speed-up that the arithmetic promises: dense MACs over kept MACs."""
        return 1 / self.macs_ratio if self.macs_ratio else None

    @property
    def efficiency(self) -> Interval | None:
        """How much of that speed-up the clock sees: `speedup` over `macs_speedup`, with its 95 % interval."""
        if self.speedup is None or not self.macs_ratio:
            return None
        return Interval(**{name: value * self.macs_ratio for name, value in self.speedup})

    @property
    def verdict(self) -> Verdict | None:
        """Whether it is faster than the reference, or the machine was too noisy to tell; see `Comparison.verdict`."""
        return None if self.speedup is None else Comparison(ratio=self.speedup, drift=self.drift or 1.0).verdict

    def against(self, dense: NetworkCost) -> "Measurement":
        """This measurement with its ratios to a dense one filled in."""
        names = ("params", "bytes", "macs", "cache_bytes")
        pairs = ((name, getattr(self, name), getattr(dense, name)) for name in names)
        ratios = {f"{name}_ratio": own / whole if whole and own is not None else None for name, own, whole in pairs}
        return self.model_copy(update=ratios)


@checked
def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    reference: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    latency: bool = True,
    runtime: str = "torch",
    threads: int = 1,
    batch: int | None = None,
    rounds: int = 31,
) -> Measurement:
    """Measure a model, and compare it with a reference (its dense self) when one is given.

    The two are timed in the same process and runtime in interleaved rounds of alternating order, and the ratio is taken
    round by round, so that drift of the machine cancels. Both models stay as they are.

    Args:
        model: The model to measure.
        example_inputs: One call's inputs; MACs and latency are for this call, batch size included.
        reference: What to compare with.
        data: Batches (inputs.., labels) for the accuracy, inputs as in the example.
        latency: Time the model; off saves a second or more.
        runtime: `torch`, `channels_last`, `compile`, `onnxruntime`, `openvino`, `openvino-bf16` or `torch-bf16`; see
            `spectrim.runtimes.RUNTIMES`. Those of ONNX and OpenVINO take a model on the CPU only.
        threads: Threads of one pass, at most as many as there are processor cores; torch's former number is restored.
        batch: Repeat or cut the example along its first dimension to so many samples: that of the first tensor, and of
            every other one with as many.
        rounds: Paired rounds, at least 5; fewer are done when they would take more than half a minute.

    Raises:
        ModelError: the model cannot run `example_inputs`, changes its output between runs, or cannot be exported.
        DataError: empty data, outputs that are not (batch, classes), fewer than 5 rounds or 1 thread, or an example
            without a batch dimension to change.
        EngineError: an unknown runtime, more threads than cores, or a runtime that refuses the model.
        DependencyError: the runtime is not installed.
    """
    _require_enough(rounds, threads)
    if latency:
        require_runtime(runtime, threads=threads)
    example = as_inputs(example_inputs)
    scored = {} if data is None else {"accuracy": accuracy(model, data, example_inputs=example)}
    if latency:
        (own,) = measure_each(
            [model], example, reference=reference, runtime=runtime, threads=threads, batch=batch, rounds=rounds
        )
    else:
        (own,) = _counted([model], resized(example, batch), reference)
    return own.model_copy(update=scored)


def measure_each(
    models: Sequence[nn.Module],
    example_inputs: Any,
    *,
    reference: nn.Module | None,
    runtime: str = "torch",
    threads: int = 1,
    batch: int | None = None,
    rounds: int = 31,
    on_model: Callable[[int], object] = lambda _: None,
) -> list[Measurement]:
    """Measure several models, each as `measure` does, whose arguments and errors these are.

    The reference is brought into the runtime once, not once a model: where that means an export, it takes longer than
    the timing. `on_model` is called with the position of a model before it is timed.
    """
    _require_enough(rounds, threads)
    chosen, example = require_runtime(runtime, threads=threads), as_inputs(example_inputs)
    inputs = resized(example, batch)
    counted = _counted(models, inputs, reference)
    others = () if reference is None else (reference,)
    for model in (*models, *others):
        require_repeatable(model, example)
    setting = {"runtime": chosen.name, "threads": threads, "batch": batch}
    measured = []
    with ExitStack() as stack:
        timers = [stack.enter_context(chosen.prepare(model, inputs, checked=True)).timer() for model in others]
        for position, (model, own) in enumerate(zip(models, counted, strict=True)):
            on_model(position)
            with chosen.prepare(model, inputs, checked=True) as session:
                timings = interleaved([session.timer(), *timers], rounds=rounds)
            measured.append(own.model_copy(update=setting | _figures(timings)))
    return measured


@checked
def runtime_gain(
    model: nn.Module,
    example_inputs: Any,
    *,
    runtime: str,
    reference: nn.Module | None = None,
    threads: int = 1,
    batch: int | None = None,
    rounds: int = 31,
) -> Comparison:
    """What a runtime gains by itself: time of a model in torch eager over its time in the runtime.

    Times as `measure` does; arguments that are not listed are those of it.

    Args:
        model: The dense model, so that the runtime's part in a gain is separated from that of low rank.
        runtime: The runtime to compare with torch eager.
        reference: What to run in torch eager instead of the model itself. With a compressed model and its dense self,
            the result is the gain of both together.

    Raises:
        SpectrimError: one of its kinds, as `measure`.
    """
    _require_enough(rounds, threads)
    chosen, example = require_runtime(runtime, threads=threads), as_inputs(example_inputs)
    networks = (model, chosen), (model if reference is None else reference, Runtime("torch", threads))
    for network, _ in networks:
        require_repeatable(network, example)
    inputs = resized(example, batch)
    sessions = (its_runtime.prepare(network, inputs, checked=True) for network, its_runtime in networks)
    return compare(*timed_together(sessions, rounds=rounds))


def resized(inputs: Inputs, batch: int | None) -> Inputs:
    """The inputs with so many samples: those there are, repeated in turn or cut off; None leaves them as they are.

    Samples lie along the first dimension of the first tensor, and of every other one of as many.

    Raises:
        DataError: there is no such dimension, or `batch` is below 1.
    """
    if batch is None:
        return inputs
    sizes = [len(tensor) for tensor in inputs.tensors() if tensor.ndim]
    if not sizes or not sizes[0] or batch < 1 or inputs.is_ragged:
        needed = f"{inputs.describe()} have samples of one size to repeat"
        raise DataError(f"batch={batch}: it must be at least 1, and {needed}")

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != sizes[0]:
            return tensor
        return tensor[torch.arange(batch, device=tensor.device) % len(tensor)]

    return inputs.map(repeated)


def count(model: nn.Module, example_inputs: Any) -> Measurement:
    """Parameters, bytes and MACs alone: what can be known without timing or data."""
    return Measurement(**count_cost(model, example_inputs).model_dump())


@checked
def accuracy(
    model: nn.Module,
    data: Iterable[Any],
    *,
    example_inputs: Any = None,
    labels: str | None = None,
    forward: ForwardFunction | None = None,
) -> Accuracy:
    """Top-1 accuracy over batches; outputs (batch, classes), or a mapping with such `logits`.

    Args:
        model: The model.
        data: Batches (inputs.., labels), ((inputs..), labels) or ({name: input}, labels), or mappings with the entry
            "labels" or "label". Labels are class indices (batch,).
        example_inputs: One call's inputs; decides what is a label where it is not the last of a batch's parts.
        labels: The entry of mappings that is the labels, where it has another name.
        forward: A function of the model and a batch's inputs that gives the outputs, where the model is not called with
            just these, or gives scores among other things: `lambda model, batch: model(batch["x"])["scores"]`.

    Raises:
        DataError: no batches, or outputs and labels that do not fit together.
        ModelError: weights without values, or a model that cannot run the batches.
    """
    require_values(model)
    like = None if example_inputs is None else as_inputs(example_inputs)
    data = data if labels is None else NamedLabels(data, labels)
    network = model if forward is None else Forward(model, forward)
    signature = model if forward is None else None
    with evaluating(model):
        return top1(data, lambda inputs, what: call(network, inputs, what=what), like=like, model=signature)


def top1(
    data: Iterable[Any],
    scores_of: Callable[[Inputs, str], Any],
    *,
    like: Inputs | None = None,
    model: nn.Module | None = None,
) -> Accuracy:
    """As `accuracy`, of any function from one call's inputs, and how a message names them, to the outputs.

    `like` and `model` are as in `split_labels`.
    """
    correct = total = 0
    for right in correct_samples(data, scores_of, like=like, model=model):
        correct, total = correct + int(right.sum()), total + len(right)
    if not total:
        raise DataError("the data for the accuracy is empty; give at least one batch")
    return Accuracy(correct=correct, total=total)


def correct_samples(
    data: Iterable[Any],
    scores_of: Callable[[Inputs, str], Any],
    *,
    like: Inputs | None = None,
    model: nn.Module | None = None,
) -> Iterator[Tensor]:
    """Which samples of each batch are answered right, bool (batch,); arguments and errors are those of `top1`."""
    for position, batch in enumerate(batches_of(data, what="the data for the accuracy")):
        inputs, labels = split_labels(batch, position=position, like=like, model=model)
        outputs, known = logits_of(scores_of(inputs, f"batch {position}")), tensor_of(labels)
        if known is None or not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[:1] != known.shape:
            raise DataError(
                f"batch {position}: outputs {describe(outputs)} and labels {describe(labels)} do not give an accuracy; "
                "it needs outputs (batch, classes) and labels (batch,), such as labels.flatten() or, of vectors, "
                "labels.argmax(dim=1)"
            )
        if len(known) and (highest := int(known.max())) >= (classes := outputs.shape[1]):
            text = f"batch {position}: there is a label {highest}, and the outputs are of {classes} classes"
            raise DataError(f"{text}, 0 to {classes - 1}; give labels that are numbered as in training")
        yield outputs.argmax(dim=1) == known.to(outputs.device)


def paired_difference(total: int, *, worse: int, better: int) -> Interval:
    """Change of an accuracy in [-1, 1] with its 95 % interval, of two networks that answer the same examples.

    Only examples whose answer changed add to the uncertainty (Agresti & Min 2005: the paired difference with half an
    example added to each kind of change): `worse` became wrong, and `better` right.
    """
    changed, shift, enlarged = worse + better + 1, better - worse, total + 2
    half = Z95 * math.sqrt(max(0.0, changed - shift * shift / enlarged)) / enlarged
    value, centre = shift / max(1, total), shift / enlarged
    return Interval(value=value, low=max(-1.0, min(value, centre - half)), high=min(1.0, max(value, centre + half)))


def _require_enough(rounds: int, threads: int) -> None:
    if rounds < 5 or threads < 1:
        raise DataError(f"rounds={rounds}, threads={threads}: give at least 5 rounds and 1 thread")


def _counted(models: Sequence[nn.Module], inputs: Inputs, reference: nn.Module | None) -> list[Measurement]:
    """The models without their times; with a reference also the ratios."""
    dense = None if reference is None else count(reference, inputs)
    counted = [count(model, inputs) for model in models]
    return counted if dense is None else [own.against(dense) for own in counted]


def _figures(timings: Sequence[Sequence[Timing]]) -> dict[str, Any]:
    own, *references = timings
    cpu = [timing.cpu for timing in own if timing.cpu is not None]
    figures: dict[str, Any] = {
        "latency_ms": statistics.median(timing.wall for timing in own) * 1e3,
        "cpu_ms": statistics.median(cpu) * 1e3 if len(cpu) == len(own) else None,
    }
    for reference in references:
        comparison, reference_ms = compare(own, reference), statistics.median(timing.wall for timing in reference) * 1e3
        figures |= {"reference_ms": reference_ms, "speedup": comparison.ratio, "drift": comparison.drift}
    return figures
