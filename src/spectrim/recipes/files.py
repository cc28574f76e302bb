"""Recipes as TOML files: those that come with Spectrim, and reading with one clear message for all mistakes."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spectrim.core.errors import DataError, FileError, did_you_mean, near
from spectrim.core.files import read_text
from spectrim.recipes.classifier import ClassifierStudy
from spectrim.recipes.convolutional import MiniResNetStudy
from spectrim.recipes.fully_connected import DynamicStudy, MlpStudy, ProjectedStudy
from spectrim.recipes.study import Recipe
from spectrim.recipes.texts import LanguageModelStudy, SentencePairStudy

_CLASSES: tuple[type[Recipe], ...] = (
    *(MlpStudy, DynamicStudy, ProjectedStudy, MiniResNetStudy, ClassifierStudy),
    *(SentencePairStudy, LanguageModelStudy),
)

KINDS: Mapping[str, type[Recipe]] = MappingProxyType(
    {str(kind.model_fields["kind"].default): kind for kind in _CLASSES}
)
"""The class of each kind of study, by the name that recipe files give it."""

NAMES = (
    "demo",
    "mnist-mlp",
    "mnist-factors",
    "mnist-dynamic",
    "mnist-projected",
    "miniresnet-mnist",
    "miniresnet-fashion",
    "miniresnet-emnist",
    "resnet18-cifar10",
    "minilm-stsb",
    "smollm2-wikitext",
)
"""The recipes that come with Spectrim, files in `library`; their settings were chosen on held-out training images."""

_MOST_FAULTS = 3


def find_study(name: str) -> Recipe:
    """The study of this name. Raises `DataError`, which lists near names, where there is none."""
    study = parse_recipe(recipe_file(name), origin=f"the recipe {name}")
    return study if study.command else study.model_copy(update={"command": f"spectrim recipe {name}"})


@cache
def recipe_file(name: str) -> str:
    """The recipe of this name as it stands in its file, remarks included. Raises `DataError` as `find_study`."""
    if name not in NAMES:
        raise DataError(f"there is no recipe {name!r}{near(name, NAMES)}")
    return (files("spectrim.recipes") / "library" / f"{name}.toml").read_text(encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """The study that a TOML file describes.

    Raises `FileError`, which names the file, the key and what is allowed, for a file that is missing, no TOML or no
    recipe.
    """
    study = parse_recipe(read_text(path), origin=str(path))
    return study if study.command else study.model_copy(update={"command": f"spectrim recipe run {path}"})


def parse_recipe(text: str, *, origin: str) -> Recipe:
    """The study that TOML `text` describes; `origin` names it in messages, as in `read_recipe`."""
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{origin} is not TOML: {error}") from error
    if "kind" not in settings:
        raise FileError(f'{origin} has no kind; begin it with kind = "mlp", or another of {", ".join(KINDS)}')
    kind = settings["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        kinds = f"{did_you_mean(str(kind), KINDS)}there are {', '.join(KINDS)}"
        raise FileError(f"{origin}: kind = {json.dumps(kind, default=str)} is unknown; {kinds}")
    model = KINDS[kind]
    try:
        # as JSON, since there a list may become a tuple, and yet "3" is no number
        return model.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        faults = [_fault(fault, model) for fault in error.errors()]
        more = f" (and {len(faults) - _MOST_FAULTS} more faults)" if len(faults) > _MOST_FAULTS else ""
        raise FileError(f"{origin}: {'; '.join(faults[:_MOST_FAULTS])}{more}") from error


def recipe_text(study: Recipe) -> str:
    """The study as TOML, with every setting; read back, it is the same study but for its command."""
    return tomli_w.dumps(study.model_dump(mode="json", exclude_none=True, exclude={"command"}))


def _fault(fault: ErrorDetails, model: type[BaseModel]) -> str:
    names, owner = _place(fault["loc"], model)
    key = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    fields = {field.alias or name: field for name, field in (owner.model_fields if owner else {}).items()}
    if fault["type"] == "extra_forbidden":
        return f"{key} is no key here; {did_you_mean(str(names[-1]), fields)}allowed are {', '.join(fields)}"
    if fault["type"] == "missing":
        required = [name for name, field in fields.items() if field.is_required()]
        return f"{key} is missing; needed here are {', '.join(required)}"
    value = "" if isinstance(fault["input"], dict | list) else f" = {json.dumps(fault['input'], default=str)}"
    return f"{key}{value} is not allowed: {fault['msg']}"


def _place(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[list[int | str], type[BaseModel] | None]:
    """The keys on the way to a fault without the names of alternatives, and the model that has the last one."""
    names: list[int | str] = []
    owner: type[BaseModel] | None = None
    models = [model]  # those that may have the next key
    for part in loc:
        if tagged := [alternative for alternative in models if part == alternative.__name__.lower()]:
            models = tagged
            continue
        names.append(part)
        if isinstance(part, str):
            owner = models[0] if models else None
            field = owner.model_fields.get(part) if owner else None
            models = list(_models(field.annotation)) if field else []
    return names, owner


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation such as `tuple[Phase, ...] | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        arguments = get_args(annotation)
        for argument in arguments[:1] if get_origin(annotation) is Annotated else arguments:
            yield from _models(argument)


STUDIES: tuple[Recipe, ...] = tuple(map(find_study, NAMES))
DEMO = STUDIES[0]
