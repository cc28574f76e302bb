"""Reproducible studies: each one a frozen value that says everything, and one function that runs it."""

from spectrim.recipes.mlp_study import MlpStudy, Phase, run_study
from spectrim.recipes.progress import Progress
from spectrim.recipes.studies import DEMO, MNIST_MLP, STUDIES, find_study

__all__ = ["DEMO", "MNIST_MLP", "STUDIES", "MlpStudy", "Phase", "Progress", "find_study", "run_study"]
