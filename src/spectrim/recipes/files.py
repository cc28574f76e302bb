"""Recipes as TOML files: read and checked with one clear message, and written."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spectrim.core.errors import FileError
from spectrim.core.files import read_text
from spectrim.recipes.kinds import KINDS
from spectrim.recipes.study import Study

_MOST = 3


def read_recipe(path: Path) -> Study:
    """The study that a TOML file describes.

    Raises:
        FileError: the file is missing or no TOML, or has a kind, key or value that a recipe cannot have; the message
            names the file, the key and what is allowed.
    """
    study = parse_recipe(read_text(path), origin=str(path))
    return study if study.command else study.model_copy(update={"command": f"spectrim recipe run {path}"})


def parse_recipe(text: str, *, origin: str) -> Study:
    """The study that TOML `text` describes; `origin` names it in messages, as in `read_recipe`."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{origin} is not TOML: {error}") from error
    if "kind" not in given:
        raise FileError(f'{origin} has no kind; begin it with kind = "mlp", or another of {", ".join(KINDS)}')
    kind = given["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise FileError(f"{origin}: kind = {_shown(kind)} is unknown; {_near(str(kind), KINDS)}there are {_all(KINDS)}")
    model = KINDS[kind]
    try:
        # as JSON, since there a list may become a tuple, and yet "3" is no number
        return model.model_validate_json(json.dumps(given, default=str), strict=True)
    except ValidationError as error:
        faults = [_said(fault, model) for fault in error.errors()]
        more = f" (and {len(faults) - _MOST} more faults)" if len(faults) > _MOST else ""
        raise FileError(f"{origin}: {'; '.join(faults[:_MOST])}{more}") from error


def recipe_text(study: Study) -> str:
    """The study as TOML, with every setting; read back, it is the same study but for its command."""
    return tomli_w.dumps(study.model_dump(mode="json", exclude_none=True, exclude={"command"}))


def _said(fault: ErrorDetails, model: type[BaseModel]) -> str:
    names, inside = _place(fault["loc"], model)
    key = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in names).lstrip(".")
    match fault["type"]:
        case "extra_forbidden":
            allowed = [] if inside is None else list(inside.model_fields)
            return f"{key} is no key here; {_near(str(names[-1]), allowed)}allowed are {_all(allowed)}"
        case "missing":
            wanted = [name for name, field in inside.model_fields.items() if field.is_required()] if inside else []
            return f"{key} is missing; needed here are {_all(wanted)}"
    if isinstance(fault["input"], dict | list):
        return f"{key} is not allowed: {fault['msg']}"
    return f"{key} = {_shown(fault['input'])} is not allowed: {fault['msg']}"


def _place(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[list[int | str], type[BaseModel] | None]:
    """The keys on the way to a fault without the names of alternatives, and the model that has the last one."""
    names: list[int | str] = []
    inside: type[BaseModel] | None = model
    within: list[type[BaseModel]] = []
    for part in loc:
        tagged = [one for one in within if part in (one.__name__, one.__name__.lower())]
        if tagged:
            within = tagged
            continue
        names.append(part)
        if isinstance(part, str):
            inside = within[0] if within else inside if len(names) == 1 else None
            field = inside.model_fields.get(part) if inside else None
            within = list(_models(field.annotation)) if field else []
    return names, inside


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The values of one's own that an annotation such as `tuple[Phase, ...] | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _models(get_args(annotation)[0])
    else:
        for one in get_args(annotation):
            yield from _models(one)


def _shown(value: object) -> str:
    return json.dumps(value, default=str)


def _near(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _all(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(names)
