"""Training after compression, to get back the accuracy that was lost, and training towards low rank."""

from spectrim.training.checkpoint import Checkpoint, resumed
from spectrim.training.distillation import Distillation, distill
from spectrim.training.finetuning import Finetuned, finetune
from spectrim.training.history import History
from spectrim.training.loop import Step, TrainingRun, train_in_place
from spectrim.training.project import ProjectEachEpoch, Spectral, frobenius_decay, spectral
from spectrim.training.schedule import NuclearNorm, RankSchedule, RankStep
from spectrim.training.settings import Settings
from spectrim.training.switch import StableRanks, Switch
from spectrim.training.truncated import Truncation, truncated_

__all__ = [
    "Checkpoint",
    "Distillation",
    "Finetuned",
    "History",
    "NuclearNorm",
    "ProjectEachEpoch",
    "RankSchedule",
    "RankStep",
    "Settings",
    "Spectral",
    "StableRanks",
    "Step",
    "Switch",
    "TrainingRun",
    "Truncation",
    "distill",
    "finetune",
    "frobenius_decay",
    "resumed",
    "spectral",
    "train_in_place",
    "truncated_",
]
