"""Training after compression, to get back the accuracy that was lost, and training towards low rank."""

from spectrim.training.checkpoint import Checkpoint, resumed
from spectrim.training.decay import Spectral, frobenius_decay, spectral
from spectrim.training.finetune import Finetuned, finetune
from spectrim.training.history import History
from spectrim.training.job import Step
from spectrim.training.loop import fit
from spectrim.training.project import ProjectEachEpoch
from spectrim.training.schedule import NuclearNorm, RankSchedule, RankStep
from spectrim.training.switch import StableRanks, Switch
from spectrim.training.truncated import Truncation, truncated_

__all__ = [
    "Checkpoint",
    "Finetuned",
    "History",
    "NuclearNorm",
    "ProjectEachEpoch",
    "RankSchedule",
    "RankStep",
    "Spectral",
    "StableRanks",
    "Step",
    "Switch",
    "Truncation",
    "finetune",
    "fit",
    "frobenius_decay",
    "resumed",
    "spectral",
    "truncated_",
]
