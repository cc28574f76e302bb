"""Arguments of public functions, held to the types that their signatures name."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
from torch import Tensor, nn

from spectrim.core.errors import ArgumentError
from spectrim.core.file_kinds import STATES, why_no_weights
from spectrim.core.nested import describe

_P = ParamSpec("_P")
_R = TypeVar("_R")


_EXPLAINED = {*("rule", "rule_or_plan", "rank_multiple"), *("value", "source", "figure", "report.results", "treat_as")}
"""Arguments of which the functions themselves say more than a type does."""


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, which raises `ArgumentError` for values of other types than its signature names.

    A truth value is no number. Which strings and numbers have a meaning, and what an iterable gives, the function finds
    out itself.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            values = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a name that it does not have: Python's own message says so
            return function(*args, **kwargs)
        for name, value in values.items():
            kind = signature.parameters[name].annotation
            if not _EXPLAINED & {name, f"{function.__name__}.{name}"} and not _fits(value, kind):
                raise ArgumentError(f"{name}={_shortened(value)}: give {_in_words(kind)}{_hint(value, kind)}")
        return function(*args, **kwargs)

    return call


def _fits(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return any(isinstance(value, type(option)) for option in inner)
    if origin is Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, inner[0])
    if origin is not None:
        return _holds(value, origin, inner)
    if kind in _NUMBERS:
        return _is_number(value, kind)
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_"))
    unchecked = kind is Any or kind is inspect.Parameter.empty or not isinstance(kind, type)
    return unchecked or isinstance(value, kind)


def _holds(value: object, origin: type, inner: tuple[Any, ...]) -> bool:
    """Whether a value is of a collection's type and has members of the types inside."""
    if not issubclass(origin, Collection):  # to look into an iterable is to use it up
        return True
    if not isinstance(value, origin) or isinstance(value, Tensor):
        return False
    if isinstance(value, Mapping) and len(inner) == 2:
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    return all(_fits(item, inner[0]) for item in value)


def _is_number(value: object, kind: type) -> bool:
    truth = isinstance(value, bool | np.bool_)
    if kind is float:
        return isinstance(value, Real) and not truth
    return truth if kind is bool else isinstance(value, Integral) and not truth and abs(int(value)) < 2**63


_NUMBERS: Mapping[object, str] = {int: "a whole number", float: "a number", bool: "True or False"}


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(option) for option in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Callable:
        return "a function"
    if origin is not None:
        members = [_in_words(option) for option in inner if option is not ...]
        return f"a {origin.__name__} of {' to '.join(members)}".replace("NoneType", "None")
    if kind is NoneType:
        return "None"
    if kind is nn.Module:
        return "a model (an object of torch.nn.Module)"
    return _NUMBERS.get(kind) or {"str": "a string"}.get(getattr(kind, "__name__", ""), f"a {kind.__name__}")


def _hint(value: object, kind: Any) -> str:
    options: Iterable[Any] = get_args(kind) or (kind,)
    if isinstance(value, type) and any(option in value.__mro__ for option in options):
        return f"; this is the class, make one: {value.__name__}(..)"
    if nn.Module not in options:
        return ""
    if isinstance(value, Mapping):
        entries = [f"checkpoint[{name!r}]" for name in STATES if isinstance(value.get(name), Mapping)]
        return f"; this is a state, which goes into your network: model.load_state_dict({(*entries, 'state')[0]})"
    if isinstance(value, str | Path) and not Path(value).exists():
        name = str(value) if ":" in str(value) else f"torchvision:{value}"
        other = f"or transformers.AutoModel.from_pretrained({str(value)!r})"
        return f"; there is no such file; a network by name: spectrim.models.resolve({name!r}) {other}"
    if isinstance(value, str | Path):
        reason = why_no_weights(value)
        return f"; it is {reason}" if reason else f"; load it into your network: st.load({str(value)!r}, model)"
    if isinstance(getattr(value, "model", None), nn.Module):
        return "; give the network in it: result.model"
    return f"; call it: {value.__name__}()" if inspect.isfunction(value) else ""


def _shortened(value: object) -> str:
    plain = isinstance(value, str | bytes | int | float | type | NoneType | Path)
    text = repr(value) if plain else describe(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
