"""How a run trains, as a value that is checked when it is made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from spectrim.core.errors import TrainingError


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


_WANTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: _whole(value) and value >= 1, "give at least one epoch, a whole number"),
    "lr": (lambda value: _number(value) and value > 0, "give a learning rate above 0, such as 1e-3"),
    "optimizer": (lambda value: value in ("adamw", "sgd"), 'there are "adamw" and "sgd"'),
    "momentum": (lambda value: _share(value) and value < 1, "give a momentum from 0 to below 1, such as 0.9"),
    "weight_decay": (lambda value: _number(value) and value >= 0, "give 0 or more, such as 1e-4"),
    "warm_up": (_share, "give the share of all steps with a rising learning rate, 0 to 1"),
    "clip": (lambda value: value is None or (_number(value) and value > 0), "give a norm above 0, or None"),
    "temperature": (lambda value: _number(value) and value > 0, "give a temperature above 0, such as 4.0"),
    "label_weight": (_share, "give the share of the cross-entropy in the loss, 0 to 1"),
    "precision": (lambda value: value in ("float32", "bf16"), 'there are "float32" and "bf16"'),
    "keep": (lambda value: value in ("last", "best"), 'there are "last" and "best"'),
    "patience": (
        lambda value: value is None or (_whole(value) and value >= 1),
        "give the epochs to wait for a better one, at least 1, or None",
    ),
    "seed": (lambda value: _whole(value) and value >= 0, "give a whole number of 0 or more"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides how a run goes, besides the network and the data; see `finetune` for each.

    Raises:
        TrainingError: a value that cannot be meant.
    """

    epochs: int
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    warm_up: float = 0.1
    clip: float | None = None
    temperature: float = 4.0
    label_weight: float = 0.0
    precision: Literal["float32", "bf16"] = "float32"
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _WANTED.items():
            value = getattr(self, name)
            if not fits(value):
                raise TrainingError(f"{name}={value!r}: {wanted}")

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """AdamW (Loshchilov 2019), or SGD with momentum and L2 decay as torch has it."""
        if self.optimizer == "sgd":
            return SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        # the fused update reads and writes every number once; on a CPU it is a third of a step otherwise
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)

    def rate(self, done: float) -> float:
        """The learning rate when `done` of all steps, in [0, 1), are taken: linear warm-up, then cosine decay to 0."""
        if done < self.warm_up:
            return self.lr * (0.04 + 0.96 * done / self.warm_up)
        left = 1 - self.warm_up
        return self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / left)) if left else self.lr
