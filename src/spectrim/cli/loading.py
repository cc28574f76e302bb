"""What the commands work on: a network, one input, and data as the network takes them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from spectrim.benchmark.measurement import Accuracy, Measurement, measure
from spectrim.cli.commands import MODEL
from spectrim.cli.data_reference import DataReference, data_reference, load_data, load_loaders, preparation
from spectrim.cli.machine import find_device, set_threads
from spectrim.cli.options import Machine, Source
from spectrim.cli.samples import Data, LoaderData, Preparation, StoredData
from spectrim.cli.stages import Stages
from spectrim.core.batches import length_of, split_labels
from spectrim.core.errors import DataError
from spectrim.core.execution import Inputs, as_inputs, call, evaluating
from spectrim.core.nested import describe, logits_of
from spectrim.layers.cost import count_macs
from spectrim.layers.saving import load
from spectrim.models import CIFAR_MEAN, CIFAR_STD, resolve
from spectrim.models.folders import require_length
from spectrim.models.weights import is_saved
from spectrim.reporting import words

_CHECKED, _GUESSING, _BELOW, _SEPARABLE = 128, 0.1, 0.02, 0.7
_USUAL = (
    Preparation(),
    Preparation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Preparation(CIFAR_MEAN, CIFAR_STD),
    Preparation((0.5,), (0.5,)),
    Preparation((0.1307,), (0.3081,)),
    Preparation((0.0,), (1 / 255,)),
)
"""What networks are often trained on: the pixel's share, ImageNet, CIFAR-10, -1 to 1, MNIST, and pixels as they are."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network in evaluation mode, one input, the network's output for that, and its data if there are some."""

    model: nn.Module
    example: Inputs
    output: object
    data: Data | None

    @property
    def calibration(self) -> tuple[Inputs, ...] | None:
        """The calibration batches, if there are data."""
        return self.data.calibration if self.data else None

    def why_untested(self, *, asked: bool | None = None) -> str | None:
        """Why no accuracy is measured, or None if it is. Raises `BadParameter` if one is asked for all the same."""
        if asked is False:
            return "--no-test"
        reason = self.why_unscored
        if reason is None and self.data is not None:
            first = next(iter(self.data.tests or ()), ())
            if split_labels(first, position=0, model=self.model, required=False)[1] is None:
                reason = f"{self.data.name} has no test data with labels"
        if asked and reason is not None:
            raise typer.BadParameter(f"--test: {reason}")
        return reason

    @property
    def why_unscored(self) -> str | None:
        """Why outputs and labels give no accuracy, or None if they do."""
        data = self.data
        if data is None:
            return "there is no --data"
        scores = logits_of(self.output)
        shape = list(getattr(scores, "shape", ()))
        gives = f"gives outputs {shape}" if shape else f"gives a {type(scores).__name__}"
        if isinstance(data, LoaderData):
            labels = split_labels(data.first(1)[0], position=0, model=self.model, required=False)[1]
            is_index = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
            fits = is_index and len(shape) == 2 and shape[1] > 1
            return None if fits else f"{data.name} gives labels {describe(labels)}, and the network {gives}"
        if not data.classes:
            return f"{data.name} has no class indices as labels"
        fits = len(shape) == 2 and (shape[1] == data.classes or (data.is_open and shape[1] > data.classes))
        has = f"{data.name} has {data.classes} classes (labels 0 to {data.classes - 1})"
        return None if fits else f"{has}, and for one {data.noun[:-1]} the network {gives}"

    def measured(
        self, network: nn.Module, name: str, *, progress: Stages, tested: bool, dense: nn.Module | None = None
    ) -> Measurement:
        """What a network costs, in relation to `dense` if given, with its accuracy on the test data if `tested`."""
        tests = self.data.tests if tested and self.data else None
        if tests is not None:
            progress.begin(f"test the {name}", total=length_of(tests) or None)
        batches = None if tests is None else progress.each(tests)
        return measure(network, self.example, reference=dense, data=batches, latency=False)


def load_source(source: Source, progress: Stages, machine: Machine) -> Loaded:
    """Make the network, on its device, and obtain the data; mistakes that need neither are reported first.

    Raises a `SpectrimError` where they cannot be had or do not fit together.
    """
    device, reference = find_device(machine), data_reference(source)
    shape = source.shape if reference is None else ()
    _ = source.options, source.expected, preparation(source, None)
    model = load_model(source, progress, device=device)  # first, since weights of another kind are refused at once
    data = None if reference is None else load_batches(reference, source, progress, model)
    is_text = source.folder is not None and len(shape) == 1
    if is_text:
        require_length(model, *shape, option="--tokens")
    zeros = torch.zeros(1, *shape, dtype=torch.int64 if is_text else None)
    example = data.example if data else as_inputs(zeros.flatten(1) if source.flatten else zeros)
    hint = " Does the network want other images or shapes? See --data, --input, --flatten and --option."
    if is_text or (reference and reference.kind == "text"):
        hint = " Does the network take texts of so many tokens? See --tokens."
    with evaluating(model):
        output = call(model, example, what="one input" if data else "--input", hint=hint)
    network = Loaded(model, example, output, data)
    set_threads(machine, source.batch * count_macs(model, example), closing=progress.closing, say=progress.say)
    if source.weights is not None or source.expect is not None:
        _check_accuracy(network, source, progress)
    return network


def load_model(source: Source, progress: Stages, *, device: torch.device) -> nn.Module:
    """The network on its device, after what there is to say of where it comes from."""
    progress.begin(f"load {source.model}")
    kind, colon, _ = source.model.partition(":")
    named = source.folder is None and colon
    if named and kind not in ("spectrim", "torchvision", "timm"):
        progress.say(f"--model {source.model} runs the code of that module")
    elif named and source.weights is None:
        progress.say("without --weights this network is untrained")
    return load_network(source, source.weights).to(device)


def load_batches(reference: DataReference, source: Source, progress: Stages, model: nn.Module) -> Data:
    """The data. Raises `DataError` where they cannot be had, or hold tokens that the network does not know."""
    if reference.kind == "loaders":
        progress.say(f"--data {source.data} runs the code of that module")
        return load_loaders(reference, source, model)
    data = load_data(reference, source, progress)
    if reference.kind == "text":
        _require_known_tokens(data.train.inputs, model, source)
    return data


def _require_known_tokens(tokens: Any, model: nn.Module, source: Source) -> None:
    require_length(model, tokens.shape[1], option="--tokens")
    words, largest = getattr(getattr(model, "config", None), "vocab_size", None), int(tokens.max())
    if words is not None and largest >= words:
        raise DataError(
            f"the tokenizer {source.tokenizer or source.folder} gives a token {largest}, and the network knows 0 to "
            f"{words - 1}; give the network's own tokenizer"
        )


def load_network(source: Source, weights: Path | None) -> nn.Module:
    """The network with the weights of a file that `spectrim.save` wrote, or of a plain one; in evaluation mode."""
    if weights is not None and source.folder is not None:
        raise typer.BadParameter(
            f"--weights does not go with --model {source.model}: the folder holds its weights; what needs --weights "
            "(bench, quantize, finetune) takes such models in Python only"
        )
    if weights is not None and weights.is_dir():
        weights = weights / MODEL
    if weights is not None and is_saved(weights):
        return load(weights, resolve(source.model, options=source.options)).eval()
    return resolve(source.model, weights=weights, options=source.options).eval()


def _check_accuracy(network: Loaded, source: Source, progress: Stages) -> None:
    """Warn, before time is spent, of a network that guesses, or is far below what the user says it has."""
    data, expected = network.data, source.expected
    if data is None or network.why_unscored is not None:
        if expected is not None:
            raise typer.BadParameter(f"--expect: {network.why_unscored}")
        if data is not None and data.classes:
            progress.say(f"note: there will be no accuracy, since {network.why_unscored}")
        return
    progress.begin("check the network")
    scores, labels = _scored(network.model, data.first(_CHECKED))
    own = _accuracy(scores, labels)
    guesses = own.value < _guessing(labels, classes=scores.shape[1])
    below = expected is not None and own.interval.high < expected - _BELOW
    if not guesses and not below:
        return
    text = f"warning: the network has {words.percent(own.value)} on {own.total} training samples of {data.name}"
    text += ", little more than by guessing" if guesses else ""
    text += f", and --expect says {words.percent(expected)}" if below and expected is not None else ""
    progress.say(f"{text}. {_likely_cause(network.model, data, own, scores=scores, labels=labels)}")


def _likely_cause(model: nn.Module, data: Data, own: Accuracy, *, scores: Tensor, labels: Tensor) -> str:
    """What would mend it, if that can be seen: another order of the classes, or other mean and deviation."""
    predictions = scores.argmax(dim=1)
    numbers = {
        int(each): Counter(labels[predictions == each].tolist()).most_common(1)[0][0] for each in predictions.unique()
    }
    right = [numbers[int(prediction)] == int(label) for prediction, label in zip(predictions, labels, strict=True)]
    share = sum(right) / len(right)
    if share > max(_SEPARABLE, own.interval.high) and len(set(numbers.values())) == len(numbers):
        pairs = [f"{label} comes out as {number}" for number, label in sorted(numbers.items()) if label != number]
        return (
            f"It tells the classes apart ({words.percent(share)}), but numbers them in another order "
            f"({', '.join([*pairs[:3], '..'][: len(pairs)])}): "
            "number them as in training; class folders are numbered in the order of their names"
        )
    if isinstance(data, StoredData) and data.is_pixels:
        tried = []
        for usual in _USUAL:
            prepare = replace(usual, flatten=data.prepare.flatten)
            if prepare != data.prepare and len(prepare.mean) in (1, data.channels):
                tried.append((_accuracy(*_scored(model, data.first(_CHECKED, prepare))), prepare))
        best, prepare = max(tried, key=lambda pair: pair[0].value)
        if best.interval.low > own.interval.high and best.value > _guessing(labels, classes=scores.shape[1]):
            return f"With {prepare.options} it has {words.percent(best.value)}: give these, or those of its training"
    return "Are --weights, --mean and --std those it was trained with, and classes numbered as in training?"


def _scored(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits (samples, classes) and labels (samples,)."""
    rows = []
    with evaluating(model):
        for position, batch in enumerate(batches):
            inputs, labels = split_labels(batch, position=position, model=model)
            rows.append((logits_of(call(model, inputs, what=f"batch {position}")).float().cpu(), labels.cpu()))
    return torch.cat([scores for scores, _ in rows]), torch.cat([labels for _, labels in rows])


def _guessing(labels: Tensor, *, classes: int) -> float:
    """An accuracy that is little more than that of the most frequent class."""
    baseline = max(1 / classes, max(Counter(labels.tolist()).values()) / len(labels))
    return baseline + _GUESSING * (1 - baseline)


def _accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    return Accuracy(correct=int((scores.argmax(dim=1) == labels).sum()), total=len(labels))
