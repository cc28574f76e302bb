"""Reproducible studies: each one a recipe file that says everything, and one function that runs it."""

from spectrim.recipes.classifier_study import ClassifierStudy
from spectrim.recipes.dynamic_study import DynamicStudy, Moving, Truncating
from spectrim.recipes.files import parse_recipe, read_recipe, recipe_text
from spectrim.recipes.images import Augment
from spectrim.recipes.kinds import KINDS
from spectrim.recipes.mini_resnet_study import MiniResNetStudy
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
    NAMES,
    STUDIES,
    find_study,
    recipe_file,
)
from spectrim.recipes.study import Phase, Study
from spectrim.recipes.tuning import Tuned
from spectrim.recipes.verify import Check, verify_run

__all__ = [
    "DEMO",
    "KINDS",
    "MNIST_DYNAMIC",
    "MNIST_FACTORS",
    "MNIST_MLP",
    "MNIST_PROJECTED",
    "NAMES",
    "STUDIES",
    "Augment",
    "Check",
    "ClassifierStudy",
    "DynamicStudy",
    "MiniResNetStudy",
    "MlpStudy",
    "Moving",
    "Phase",
    "Progress",
    "ProjectedStudy",
    "Study",
    "Truncating",
    "Tuned",
    "Tuning",
    "find_study",
    "parse_recipe",
    "read_recipe",
    "recipe_file",
    "recipe_text",
    "run_study",
    "verify_run",
]
