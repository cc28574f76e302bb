"""Commands from functions and dataclasses, with groups of options that are dataclasses themselves."""

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

_Command = TypeVar("_Command")


@dataclass(frozen=True)
class Group:
    """How a command offers a group of options, where it is not as the group declares them.

    Fields in `without` are no options of this command and keep their defaults; those in `required` must be given;
    others have `defaults` of their own.
    """

    without: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)

    def parameters(self, kind: type) -> list[inspect.Parameter]:
        """A parameter for each option of the group."""
        hints = get_type_hints(kind, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in self.without:
                continue
            default = inspect.Parameter.empty if name in self.required else self.defaults.get(name, parameter.default)
            parameters.append(parameter.replace(default=default, annotation=hints[name]))
        return parameters


@dataclass(frozen=True)
class Invocation:
    """How a command was called, so that it can be called again: its name, and the value and default of every option."""

    command: str
    values: Mapping[str, object]
    defaults: Mapping[str, object]

    def arguments(self, *groups: type) -> list[str]:
        """The arguments that give the options of these groups, or all options; none for those at their defaults."""
        names = {option.name for group in groups for option in fields(group)} if groups else set(self.values)
        words: list[str] = []
        for name, value in self.values.items():
            if name not in names or value == self.defaults[name]:
                continue
            if isinstance(value, bool):
                words.append(flag(name if value else f"no_{name}"))
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [flag(name), str(item)]
        return words

    def __str__(self) -> str:
        return shlex.join(["spectrim", self.command, *self.arguments()])


def unfolded(
    command: Callable[..., _Command], *, perform: Callable[[_Command], None] = lambda command: None
) -> Callable[..., None]:
    """The command with an option for every field of its groups, since typer knows no dataclasses.

    `command` is a function, or a dataclass that `perform` is called with. A parameter that is a dataclass, or is
    annotated with a `Group`, is a group. One that is an `Invocation` is no option: it says how the command was called,
    less the groups of a class with `is_recorded = False`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[inspect.Parameter]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *extras = get_args(hints[name]) or (hints[name],)
        group = next((extra for extra in extras if isinstance(extra, Group)), Group())
        if kind is Invocation:
            continue
        if is_dataclass(kind) or group != Group():
            groups[name] = kind, group.parameters(kind)
        parameters += groups[name][1] if name in groups else [parameter]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    unrecorded = (options for kind, options in groups.values() if not getattr(kind, "is_recorded", True))
    excluded = {option.name for options in unrecorded for option in options}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        written = {name: value for name, value in values.items() if name not in excluded}
        invocation = Invocation(command.__name__.lower(), written, defaults)
        grouped = {
            name: kind(**{option.name: values.pop(option.name) for option in options})
            for name, (kind, options) in groups.items()
        }
        own = {name: invocation for name, hint in hints.items() if hint is Invocation}
        perform(command(**grouped, **own, **values))

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # where inspect looks for it
    return run


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"
