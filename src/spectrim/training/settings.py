"""How a training run goes: its settings, one value that is checked when it is made."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from spectrim.core.errors import TrainingError
from spectrim.core.files import Frozen
from spectrim.core.names import LossName as LossName


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
        loss: `"cross_entropy"` of class indices, (batch,) or with places, -100 for none; `"mse"`, mean squared error;
            `"bce"`, binary cross-entropy with logits, for several labels at once and for masks; `"kl"`, of a teacher's
            logits computed beforehand. None takes cross-entropy for class indices; other labels have to be named.
            With a teacher it compares the two networks' outputs: KL of the classes by default; mean squared error; or
            binary cross-entropy. By default outputs that are a structure without logits are compared by mean squared
            error over the variance of each of the teacher's.
        axis: Dimension of the logits that holds the classes, where shapes do not tell it: 1 for maps, -1 for sequences.
        temperature: Of the distillation; softens the outputs of both networks.
        label_weight: w in w * loss of the labels + (1 - w) * loss of the teacher's outputs (Hinton 2015), the latter
            KL * temperature^2 for classes.
        precision: `"bf16"` computes in bfloat16 where that is safe (autocast); weights and loss stay float32.
        keep: Whether the result has the weights of the last epoch, in which the schedule is made to end, or of the best
            on held-out data (the first of equals), whose figure there is biased by the choice. The best has the highest
            accuracy of classes, and for other losses the lowest loss.
        patience: Stop after this many epochs without a better one on the held-out data; None to run all epochs.
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
    loss: LossName | None = Field(
        default=None,
        description='there are "cross_entropy", "mse", "bce", "kl" and, for finetune and TrainingRun, a function',
    )
    axis: int | None = Field(default=None, description="give the dimension of the classes, such as 1 or -1, or None")
    temperature: float = Field(default=4.0, gt=0, description="give a temperature above 0, such as 4.0")
    label_weight: float = Field(default=0.0, ge=0, le=1, description="give the share of the labels, 0 to 1")
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
        """AdamW, or torch's SGD with momentum and L2 decay, for these parameters; `TrainingError` if there are none."""
        if not parameters:
            raise TrainingError("no parameter asks for gradients, so there is nothing to train")
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
