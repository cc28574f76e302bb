"""Training after compression, to get back the accuracy that was lost, and training towards low rank."""

from spectrim.training.finetune import Finetuned, finetune
from spectrim.training.loop import Step, fit
from spectrim.training.project import ProjectEachEpoch
from spectrim.training.truncated import Truncation, truncated_

__all__ = ["Finetuned", "ProjectEachEpoch", "Step", "Truncation", "finetune", "fit", "truncated_"]
