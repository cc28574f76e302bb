"""The recipes that come with Spectrim, read from the files in `library`; chosen on held-out training images."""

from functools import cache
from importlib.resources import files
from typing import TypeVar

from spectrim.core.errors import DataError
from spectrim.layers.selection import near
from spectrim.recipes.dynamic_study import DynamicStudy
from spectrim.recipes.files import parse_recipe
from spectrim.recipes.mlp_study import MlpStudy
from spectrim.recipes.projected_study import ProjectedStudy
from spectrim.recipes.study import Study

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
)

_Kind = TypeVar("_Kind", bound=Study)


def find_study(name: str) -> Study:
    """The study of this name.

    Raises:
        DataError: there is none; lists near names.
    """
    study = parse_recipe(recipe_file(name), origin=f"the recipe {name}")
    return study if study.command else study.model_copy(update={"command": f"spectrim recipe {name}"})


@cache
def recipe_file(name: str) -> str:
    """The recipe of this name as it stands in its file, remarks included.

    Raises:
        DataError: there is none; lists near names.
    """
    if name not in NAMES:
        raise DataError(f"there is no recipe {name!r}{near(name, NAMES)}")
    return (files("spectrim.recipes") / "library" / f"{name}.toml").read_text(encoding="utf-8")


def _found(name: str, kind: type[_Kind]) -> _Kind:
    study = find_study(name)
    if not isinstance(study, kind):
        raise DataError(f"the recipe {name} is of kind {study.kind}")
    return study


DEMO = _found("demo", MlpStudy)
MNIST_MLP = _found("mnist-mlp", MlpStudy)
MNIST_FACTORS = _found("mnist-factors", MlpStudy)
MNIST_DYNAMIC = _found("mnist-dynamic", DynamicStudy)
MNIST_PROJECTED = _found("mnist-projected", ProjectedStudy)
STUDIES: tuple[Study, ...] = tuple(map(find_study, NAMES))
