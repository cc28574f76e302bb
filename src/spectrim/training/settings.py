"""How a training run goes: its settings, one value that is checked when it is made, and the loss of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from spectrim.core.batches import split_labels
from spectrim.core.errors import DataError, ModelError, TrainingError
from spectrim.core.execution import Inputs, call, device_of
from spectrim.core.files import Frozen


class Settings(Frozen):
    """How a run goes. Each field is a keyword argument of `st.finetune` as well, with the same default but for `keep`.

    Attributes:
        epochs: Passes over the data.
        lr: Peak learning rate; after the warm-up it decays to 0 along a cosine.
        optimizer: `"adamw"` (Loshchilov 2019), or `"sgd"` with `momentum`.
        momentum: Of SGD.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD; acts on trained parameters only.
        warm_up: Share of all steps with a rising learning rate.
        clip: Largest norm of the gradient; None for no limit.
        temperature: Of the distillation; softens the outputs of both networks.
        label_weight: w in w * cross-entropy + (1 - w) * KL * temperature^2, the loss with a teacher (Hinton 2015).
        precision: `"bf16"` computes in bfloat16 where that is safe (autocast); weights and loss stay float32.
        keep: Whether the result has the weights of the last epoch, in which the schedule is made to end, or of the best
            on held-out data (the first of equals), whose accuracy there is biased upwards by the choice.
        patience: Stop after this many epochs without a better accuracy on the held-out data; None to run all epochs.
        seed: Of what the model and the data draw. The caller's random states are restored.

    Raises:
        TrainingError: a value that is not allowed; names the field, the value and what to give.
    """

    model_config = ConfigDict(strict=True)

    epochs: int = Field(default=3, ge=1, description="give at least one epoch, a whole number")
    lr: float = Field(default=1e-3, gt=0, description="give a learning rate above 0, such as 1e-3")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description='there are "adamw" and "sgd"')
    momentum: float = Field(default=0.9, ge=0, lt=1, description="give a momentum from 0 to below 1, such as 0.9")
    weight_decay: float = Field(default=0.0, ge=0, description="give 0 or more, such as 1e-4")
    warm_up: float = Field(default=0.1, ge=0, le=1, description="give the share of all steps, 0 to 1")
    clip: float | None = Field(default=1.0, gt=0, description="give a norm above 0, or None")
    temperature: float = Field(default=4.0, gt=0, description="give a temperature above 0, such as 4.0")
    label_weight: float = Field(default=0.0, ge=0, le=1, description="give the share of the cross-entropy, 0 to 1")
    precision: Literal["float32", "bf16"] = Field(default="float32", description='there are "float32" and "bf16"')
    keep: Literal["last", "best"] = Field(default="last", description='there are "last" and "best"')
    patience: int | None = Field(default=None, ge=1, description="give a whole number of epochs, at least 1, or None")
    seed: int = Field(default=0, ge=0, description="give a whole number of 0 or more")

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"]))
            known = cls.model_fields.get(name)
            advice = known.description if known else f"there is no such setting, only {', '.join(cls.model_fields)}"
            raise TrainingError(f"{name}={fault['input']!r}: {advice}") from error

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """AdamW, or torch's SGD with momentum and L2 decay, for these parameters."""
        if self.optimizer == "sgd":
            return SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        # the fused update reads and writes every number once; the other one takes a third of a step on a CPU
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)

    def rate(self, done: float) -> float:
        """The learning rate when the share `done` of all steps, in [0, 1), is taken: linear warm-up, cosine decay."""
        if done < self.warm_up:
            return self.lr * (0.04 + 0.96 * done / self.warm_up)
        rest = 1 - self.warm_up
        return self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / rest)) if rest else self.lr


@dataclass(frozen=True, eq=False)
class StepResult:
    """The loss, and how many of the `labelled` answers are right; None if the labels are not class indices."""

    loss: Tensor
    correct: int | None
    labelled: int


def step_result(
    model: nn.Module, batch: Any, *, position: int, teacher: nn.Module | None, settings: Settings
) -> StepResult:
    """Run a batch (inputs.., targets) through the model, and through the teacher if there is one.

    Raises `DataError` for a batch without labels that fit the outputs, `ModelError` for one that the model cannot run,
    and `TrainingError` for one that is too small for BatchNorm.
    """
    inputs, targets = split_labels(batch, position=position, model=model)
    with torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
        outputs = _outputs(model, inputs, position)
        with torch.no_grad():
            logits = None if teacher is None else _outputs(teacher, inputs, position)
    try:
        targets = torch.as_tensor(targets).to(outputs.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels of batch {position} make no tensor ({error}); give class indices") from error
    if logits is None and targets.is_floating_point() and targets.ndim >= 2:
        logits = targets
    if logits is None:
        loss = functional.cross_entropy(outputs, _classes(targets, outputs, position))
    else:
        if logits.shape != outputs.shape:
            raise DataError(f"the teacher's logits {list(logits.shape)} do not fit the outputs {list(outputs.shape)}")
        # of the softened outputs, times the temperature squared (Hinton 2015)
        soft, goal = (functional.log_softmax(values / settings.temperature, dim=1) for values in (outputs, logits))
        loss = functional.kl_div(soft, goal, reduction="batchmean", log_target=True) * settings.temperature**2
        if settings.label_weight > 0:
            entropy = functional.cross_entropy(outputs, _classes(targets, outputs, position))
            loss = settings.label_weight * entropy + (1 - settings.label_weight) * loss
    if not _whole(targets) or outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        return StepResult(loss, None, 0)
    return StepResult(loss, int((outputs.detach().argmax(dim=1) == targets).sum()), len(targets))


def _outputs(model: nn.Module, inputs: Inputs, position: int) -> Tensor:
    """(batch, classes), in float32 at least."""
    try:
        outputs = call(model, inputs, what=f"batch {position}")
    except ModelError as error:
        if "Expected more than 1 value per channel" in str(error.__cause__):
            raise TrainingError(
                f"batch {position} ({inputs.describe()}) is too small for BatchNorm, which takes a mean and a variance "
                "of it; leave the last, smaller batch out (DataLoader(.., drop_last=True)), or freeze the norms' "
                "statistics (frozen_norms=True)"
            ) from error
        raise
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or not outputs.is_floating_point():
        got = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise DataError(
            f"{type(model).__name__} gives {got}, not logits (batch, classes); train a network that gives these alone"
        )
    return outputs.float() if outputs.itemsize < 4 else outputs


def _classes(labels: Tensor, outputs: Tensor, position: int) -> Tensor:
    """The labels, int64."""
    if not _whole(labels):
        kind = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise DataError(
            f"batch {position} has labels {kind}: class indices are whole numbers (use labels.long()), and a teacher's "
            f"logits are {list(outputs.shape)}"
        )
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise DataError(f"labels {list(labels.shape)} do not fit the outputs {list(outputs.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
        raise DataError(
            f"batch {position} has labels {int(labels.min())}..{int(labels.max())}, outside 0..{outputs.shape[1] - 1}, "
            "the model's classes"
        )
    return labels.long()


def _whole(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
