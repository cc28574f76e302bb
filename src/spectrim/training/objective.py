"""The loss of a batch: from labels, from a teacher, or from both."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.errors import DataError, ModelError, TrainingError
from spectrim.core.execution import Inputs, call, device_of, split_labels
from spectrim.training.settings import Settings


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
    inputs, targets = split_labels(batch, position=position)
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
