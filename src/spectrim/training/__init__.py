"""Training after compression: getting back the accuracy that was lost."""

from spectrim.training.finetune import Finetuned, finetune
from spectrim.training.loop import Step, fit

__all__ = ["Finetuned", "Step", "finetune", "fit"]
