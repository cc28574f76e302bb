"""Reproducible studies: each one a frozen value that says everything, and one function that runs them."""

from spectrim.recipes.dynamic_study import DynamicStudy, Moving, Truncating
from spectrim.recipes.mlp_study import MlpStudy, Tuning
from spectrim.recipes.progress import Progress
from spectrim.recipes.projected_study import ProjectedStudy
from spectrim.recipes.run import run_study
from spectrim.recipes.studies import (
    DEMO,
    MNIST_DYNAMIC,
    MNIST_FACTORS,
    MNIST_MLP,
    MNIST_PROJECTED,
    STUDIES,
    find_study,
)
from spectrim.recipes.study import Phase, Study

__all__ = [
    "DEMO",
    "MNIST_DYNAMIC",
    "MNIST_FACTORS",
    "MNIST_MLP",
    "MNIST_PROJECTED",
    "STUDIES",
    "DynamicStudy",
    "MlpStudy",
    "Moving",
    "Phase",
    "Progress",
    "ProjectedStudy",
    "Study",
    "Truncating",
    "Tuning",
    "find_study",
    "run_study",
]
