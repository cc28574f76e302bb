"""Reproducible studies: each one a recipe file that says everything, and one function that runs it."""

from spectrim.recipes.classifier import ClassifierStudy
from spectrim.recipes.convolutional import MiniResNetStudy
from spectrim.recipes.files import (
    DEMO,
    KINDS,
    NAMES,
    STUDIES,
    find_study,
    parse_recipe,
    read_recipe,
    recipe_file,
    recipe_text,
)
from spectrim.recipes.fully_connected import DynamicStudy, MlpStudy, Moving, ProjectedStudy, Truncating, Tuning
from spectrim.recipes.images import Augment
from spectrim.recipes.run import run_study
from spectrim.recipes.study import Phase, Progress, Study, Tuned
from spectrim.recipes.verification import Check, verify_run

__all__ = [
    "DEMO",
    "KINDS",
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
