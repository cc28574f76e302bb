"""The loss of a batch: of the outputs against labels, against what a teacher gives, or against both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.benchmark.measurement import accuracy
from spectrim.core.batches import batches_of, split_labels
from spectrim.core.errors import DataError, ModelError, TrainingError
from spectrim.core.execution import Forward, ForwardFunction, Inputs, call, device_of, evaluating
from spectrim.core.layout import ImageLayout
from spectrim.core.nested import describe, logits_of, map_tensors, tensor_of, tensors
from spectrim.training.settings import Settings

LossFunction = Callable[[Any, Any], Tensor]
"""From the network's outputs, as they are, and the labels to a scalar."""

IGNORED = -100
"""The class index of places without a label, as in torch."""

_NAMED = (
    'give loss="mse" (values), loss="bce" (several labels at once, or masks; with logits), loss="kl" (a teacher\'s '
    "logits computed beforehand), or a function loss(outputs, labels)"
)


@dataclass(frozen=True, eq=False)
class StepResult:
    """The loss, and how many of the `labelled` places are right; None if the labels are not class indices."""

    loss: Tensor
    correct: int | None
    labelled: int


@dataclass(eq=False)
class Objective:
    """What a run makes smaller: the loss that its settings name, or a function.

    Where the shapes of a batch say which dimension holds the classes, that holds for later batches whose shapes allow
    several.
    """

    settings: Settings
    name: str = "the network"
    teacher: nn.Module | None = None
    function: LossFunction | None = None
    forward: ForwardFunction | None = None
    _axis: int | None = None
    _by_accuracy: bool | None = None
    _layout: ImageLayout | None = None

    @property
    def needs_labels(self) -> bool:
        """Whether the data must have labels."""
        return self.teacher is None or self.settings.label_weight > 0

    def step(self, model: nn.Module, inputs: Inputs, labels: Any, *, position: int) -> StepResult:
        """Run a batch through the model, and through the teacher if there is one.

        Raises `DataError` for labels that do not fit the outputs, `ModelError` for a batch that the model cannot run,
        and `TrainingError` for one that is too small for BatchNorm, or a loss that does not fit the outputs.
        """
        outputs, taught = self._outputs(model, inputs, position)
        if self.function is None and self.settings.loss in (None, "cross_entropy") and self.needs_labels:
            _require_other_labels(inputs, labels, position)
        return StepResult(self._loss(outputs, labels, taught, position), *self._right(outputs, labels))

    def held_out(self, model: nn.Module, data: Iterable[Any]) -> tuple[float | None, float | None]:
        """Accuracy in [0, 1], or, where the loss or the labels are not those of classes, the mean loss of a sample.

        Raises as `accuracy` and `step`.
        """
        total, samples, batches = 0.0, 0, batches_of(data, what="held_out")
        with evaluating(model):  # data that draw random numbers leave no trace either
            first = next(batches, None)
            if first is None:
                raise DataError("held_out is empty; give at least one batch")
            batches = chain([first], batches)
            if self._by_accuracy is None:
                self._by_accuracy = self._has_accuracy(model, first)
            if self._by_accuracy:
                return accuracy(model, batches, forward=self.forward).value, None
            for position, batch in enumerate(batches):
                inputs, labels = split_labels(batch, position=position, model=model, required=self.needs_labels)
                outputs, taught = self._outputs(model, inputs, position)
                total += float(self._loss(outputs, labels, taught, position)) * inputs.samples
                samples += inputs.samples
        if not samples:
            raise DataError("held_out has no samples in its batches; give at least one")
        return None, total / samples

    def _has_accuracy(self, model: nn.Module, batch: Any) -> bool:
        """Whether the labels of a batch are one class index a sample."""
        if self.function is not None or self.settings.loss in ("mse", "bce"):
            return False
        inputs, labels = split_labels(batch, position=0, model=model, required=self.needs_labels)
        outputs, known = logits_of(self._run(model, inputs, 0)), tensor_of(labels)
        return isinstance(outputs, Tensor) and outputs.ndim == 2 and known is not None and known.ndim == 1

    def _run(self, model: nn.Module, inputs: Inputs, position: int) -> Any:
        """The outputs, as they are."""
        try:
            network = model if self.forward is None else Forward(model, self.forward)
            return call(network, inputs, what=f"batch {position}")
        except ModelError as error:
            if "Expected more than 1 value per channel" in str(error.__cause__):
                raise TrainingError(
                    f"batch {position} ({inputs.describe()}) is too small for BatchNorm, which takes a mean and a "
                    "variance of it; leave the last, smaller batch out (DataLoader(.., drop_last=True)), or freeze "
                    "the norms' statistics (frozen_norms=True)"
                ) from error
            raise

    def _outputs(self, model: nn.Module, inputs: Inputs, position: int) -> tuple[Any, Any]:
        """Of the model, and of the teacher; in low precision while training only."""
        self._layout = self._layout or ImageLayout((model, self.teacher), self.forward, training=True)
        inputs = self._layout.of(inputs)
        is_low = self.settings.precision == "bf16" and torch.is_grad_enabled()
        with torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=is_low):
            outputs = self._run(model, inputs, position)
            if self.teacher is None:
                return outputs, None
            with torch.no_grad():
                return outputs, self._run(self.teacher, inputs, position)

    def _loss(self, outputs: Any, labels: Any, taught: Any, position: int) -> Tensor:
        weight = self.settings.label_weight
        if self.teacher is None:
            return self._of_labels(outputs, labels, position)
        loss = self._of_teacher(outputs, taught, labels, position)
        return weight * self._of_labels(outputs, labels, position) + (1 - weight) * loss if weight > 0 else loss

    def _of_labels(self, outputs: Any, labels: Any, position: int) -> Tensor:
        """The loss against what the data says."""
        if self.function is not None:
            device = next((tensor.device for tensor in tensors(outputs)), torch.device("cpu"))
            return _called(self.function, outputs, map_tensors(labels, lambda label: label.to(device)), position)
        name = self.settings.loss
        if name in ("mse", "bce"):
            error = functional.mse_loss if name == "mse" else _bce
            return _mean([error(own, target) for own, target in _pairs(outputs, labels, position)])
        known = tensor_of(labels)
        if known is None:
            raise DataError(f"the labels of batch {position}, {describe(labels)}, make no tensor; give class indices")
        if name is None:
            _require_clear(outputs, known, position)
        logits = _logits(outputs, of=self.name)
        known = known.to(logits.device)
        if name == "kl":
            return self._kl(logits, known, self._axis_of(outputs, None))
        axis = self._axis_of(outputs, known)
        classes = _classes(known, logits, axis, position)
        return functional.cross_entropy(logits if axis == 1 else logits.movedim(axis, 1), classes)

    def _of_teacher(self, outputs: Any, taught: Any, labels: Any, position: int) -> Tensor:
        """The loss against the teacher's outputs."""
        if self.function is not None:
            return _called(self.function, outputs, taught, position)
        name, known = self.settings.loss, tensor_of(labels)
        if name in ("mse", "bce"):
            pairs = _pairs(outputs, taught, position, whose="the teacher's")
            if name == "mse":
                return _mean([functional.mse_loss(own, target) for own, target in pairs])
            T = self.settings.temperature
            return _mean([_binary_kl(own / T, target / T) for own, target in pairs]) * T**2
        if name is None and known is not None:
            _require_clear(outputs, known, position)
        if name is None and _is_unknown(outputs) and _is_unknown(taught):
            return _mean([scaled_error(*pair) for pair in _pairs(outputs, taught, position, whose="the teacher's")])
        goal = _logits(taught, of=type(self.teacher).__name__)
        return self._kl(_logits(outputs, of=self.name), goal, self._axis_of(outputs, known))

    def _kl(self, logits: Tensor, goal: Tensor, axis: int) -> Tensor:
        """Of the softened outputs, times the temperature squared (Hinton 2015); the mean over samples and places."""
        if logits.shape != goal.shape or not goal.is_floating_point():
            raise DataError(f"the teacher's logits {list(goal.shape)} do not fit the outputs {list(logits.shape)}")
        _require_classes(logits, axis)
        return divergence(logits, goal.to(logits), axis=axis, temperature=self.settings.temperature)

    def _axis_of(self, outputs: Any, labels: Tensor | None) -> int:
        """The dimension of the logits that holds the classes, from 1."""
        logits, axis = _logits(outputs, of=self.name), self.settings.axis
        if axis is not None:
            if not -logits.ndim < axis < logits.ndim or axis == 0:
                raise TrainingError(f"axis={axis} is no dimension of classes of outputs {list(logits.shape)}")
            self._axis = axis % logits.ndim
            return self._axis
        if logits.ndim == 2:
            return 1
        shape = list(labels.shape) if labels is not None and _is_whole(labels) else None
        fitting = [at for at in range(1, logits.ndim) if _without(logits.shape, at) == shape]
        if len(fitting) == 1:
            self._axis = fitting[0]
        elif self._axis is None and logits_of(outputs) is not outputs and logits.ndim in (3, 4):
            self._axis = 2 if logits.ndim == 3 else 1  # sequences and maps of Hugging Face's models
        if self._axis is None or (fitting and self._axis not in fitting):
            shapes = f"outputs {list(logits.shape)}" + ("" if shape is None else f" and labels {shape}")
            raise TrainingError(
                f"{shapes} do not say which dimension holds the classes; give axis=1 for maps (batch, classes, "
                f"places..), axis=-1 for sequences (batch, time, classes); where they are no classes, {_NAMED}"
            )
        return self._axis

    def _right(self, outputs: Any, labels: Any) -> tuple[int | None, int]:
        """How many places are right, and how many have a class as their label."""
        logits, known = logits_of(outputs), tensor_of(labels)
        if self.function is not None or self.settings.loss in ("mse", "bce") or known is None or not _is_whole(known):
            return None, 0
        axis = 1 if getattr(logits, "ndim", 0) == 2 else self._axis
        if not isinstance(logits, Tensor) or axis is None or _without(logits.shape, axis) != list(known.shape):
            return None, 0
        known = known.to(logits.device)
        return int((logits.detach().argmax(dim=axis) == known).sum()), int((known != IGNORED).sum())


def divergence(logits: Tensor, goal: Tensor, *, axis: int, temperature: float = 1.0) -> Tensor:
    """KL of the softened classes along an axis, times the temperature squared; the mean over samples and places."""
    own, other = (functional.log_softmax(values / temperature, dim=axis) for values in (logits, goal))
    loss = functional.kl_div(own, other, reduction="batchmean", log_target=True)
    places = logits.numel() // max(1, len(logits) * logits.shape[axis])
    return loss * temperature**2 / max(1, places)


def _called(function: LossFunction, outputs: Any, labels: Any, position: int) -> Tensor:
    """The scalar that the caller's own loss gives."""
    try:
        loss = function(outputs, labels)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        arguments = f"outputs {describe(outputs)}, labels {describe(labels)}"
        raise TrainingError(f"loss= failed on batch {position} ({arguments}): {reason}") from error
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        raise TrainingError(f"loss= gave {describe(loss)} for batch {position}, not a scalar; take the mean")
    return loss


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor


def _logits(outputs: Any, *, of: str) -> Tensor:
    """The logits, (batch, classes) or with places, in float32 at least."""
    logits = logits_of(outputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        outputs_kind = describe(logits) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise DataError(f"{of} gives {outputs_kind}, not logits (batch, classes); where that is right, {_NAMED}")
    return _full(logits)


def _is_unknown(outputs: Any) -> bool:
    """Whether nothing says what the outputs mean: a structure without logits."""
    return not isinstance(logits_of(outputs), Tensor) and next(tensors(outputs), None) is not None


def _floats(outputs: Any) -> list[Tensor]:
    return [_full(tensor) for tensor in tensors(logits_of(outputs)) if tensor.is_floating_point()]


def _pairs(outputs: Any, targets: Any, position: int, *, whose: str = "the labels") -> list[tuple[Tensor, Tensor]]:
    """Each output that is a float, with its target in the same shape; shapes may differ in dimensions of 1."""
    fits = True
    if isinstance(outputs, Mapping) and isinstance(targets, Mapping):
        fits = outputs.keys() == targets.keys()
        targets = {name: targets[name] for name in outputs} if fits else targets
    own = _floats(outputs)
    others = list(tensors(logits_of(targets))) or [tensor for tensor in (tensor_of(targets),) if tensor is not None]
    if whose != "the labels":
        others = _floats(targets)
    fits = fits and 0 < len(own) == len(others)
    if not fits or any(_places(first) != _places(second) for first, second in zip(own, others, strict=True)):
        raise DataError(
            f"batch {position}: {whose} {describe(targets)} do not fit the outputs {describe(outputs)}; give one of "
            "the same shape for each output, or a function loss(outputs, labels)"
        )
    return [(first, second.to(first).reshape(first.shape)) for first, second in zip(own, others, strict=True)]


def _bce(outputs: Tensor, targets: Tensor) -> Tensor:
    if bool(((targets < 0) | (targets > 1)).any()):
        low, high = float(targets.min()), float(targets.max())
        raise DataError(f'loss="bce" takes labels from 0 to 1, and they go from {low:g} to {high:g}')
    return functional.binary_cross_entropy_with_logits(outputs, targets)


def _binary_kl(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with the targets' probabilities, less its least value."""
    soft = targets.sigmoid()
    return _bce(outputs, soft) - _bce(targets, soft)


def scaled_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error over the variance of the targets, so that every output counts alike."""
    variance = targets.var(unbiased=False)
    return functional.mse_loss(outputs, targets) / torch.where(variance > 0, variance, torch.ones_like(variance))


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean()


def _require_clear(outputs: Any, labels: Tensor, position: int) -> None:
    """Labels of the outputs' own shape may be values, masks or logits: raise unless something says which."""
    logits = logits_of(outputs)
    same = isinstance(logits, Tensor) and _places(logits) == _places(labels)
    if same and (labels.is_floating_point() or labels.dtype == torch.bool or labels.shape == logits.shape):
        raise TrainingError(
            f"batch {position} has labels {describe(labels)} for outputs {describe(logits)}, which can mean more than "
            f"one thing; {_NAMED}"
        )


def _require_other_labels(inputs: Inputs, labels: Any, position: int) -> None:
    """Raise for labels that are the inputs: the losses of Hugging Face's language models shift them, these do not."""
    known = tensor_of(labels)
    if known is None or known.ndim < 2 or not _is_whole(known):
        return
    for tensor in inputs.tensors():
        if not _is_whole(tensor) or tensor.shape != known.shape:
            continue
        known = known.to(tensor.device)
        if bool(((tensor == known) | (known == IGNORED)).all()):
            raise DataError(
                f"batch {position} has its inputs as labels {describe(known)}, and a network would learn to repeat "
                "them; for a causal language model shift them, labels[:, :-1] = ids[:, 1:] and labels[:, -1] = -100, "
                "or give a function loss(outputs, labels)"
            )


def _require_classes(logits: Tensor, axis: int) -> None:
    if logits.shape[axis] < 2:
        raise TrainingError(
            f"outputs {list(logits.shape)} have a single entry in dimension {axis}, whose softmax is always 1, so that "
            f"nothing could be learnt; {_NAMED}"
        )


def _classes(labels: Tensor, logits: Tensor, axis: int, position: int) -> Tensor:
    """The labels, int64."""
    if not _is_whole(labels):
        raise DataError(
            f"batch {position} has labels {describe(labels)}: class indices are whole numbers (use labels.long()), and "
            f"a teacher's logits are {list(logits.shape)}; for other labels {_NAMED}"
        )
    if _without(logits.shape, axis) != list(labels.shape):
        raise DataError(
            f"labels {list(labels.shape)} do not fit the outputs {list(logits.shape)}: class indices are "
            f"{_without(logits.shape, axis)}"
        )
    _require_classes(logits, axis)
    known = labels[labels != IGNORED]
    if len(labels) and not len(known):
        raise DataError(f"batch {position} has no labels but {IGNORED}, which are ignored; leave it out")
    if len(labels) and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[axis]:
        raise DataError(
            f"batch {position} has labels {int(known.min())}..{int(known.max())}, outside 0..{logits.shape[axis] - 1}, "
            "the model's classes"
        )
    return labels.long()


def _is_whole(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [size for at, size in enumerate(shape) if at != axis]


def _places(tensor: Tensor) -> list[int]:
    """The shape without dimensions of 1."""
    return [size for size in tensor.shape if size != 1]
