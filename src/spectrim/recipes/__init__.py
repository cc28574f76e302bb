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
from spectrim.recipes.study import Phase, Progress, Recipe, Study, Tuned
from spectrim.recipes.text_run import ScoredModel, TextResults, run_text_study
from spectrim.recipes.texts import LanguageModelStudy, SentencePairStudy, TextStudy
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
    "LanguageModelStudy",
    "MiniResNetStudy",
    "MlpStudy",
    "Moving",
    "Phase",
    "Progress",
    "ProjectedStudy",
    "Recipe",
    "ScoredModel",
    "SentencePairStudy",
    "Study",
    "TextResults",
    "TextStudy",
    "Truncating",
    "Tuned",
    "Tuning",
    "find_study",
    "parse_recipe",
    "read_recipe",
    "recipe_file",
    "recipe_text",
    "run_study",
    "run_text_study",
    "verify_run",
]
