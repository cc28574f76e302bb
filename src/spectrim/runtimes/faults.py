"""What to say of an error of another package: which module was at work, and its reason in one line."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import fx, nn

from spectrim.core.errors import SpectrimError, did_you_mean


def module_at(model: nn.Module, error: BaseException) -> str:
    """`'name' (Class)` of the innermost module that was at work when `error` was raised, or the model's own forward."""
    names = {id(module): name for name, module in model.named_modules()}
    innermost: str | None = None
    for cause in _causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            variables = dict(frame.f_locals)
            if id(variables.get("self")) in names:
                innermost = names[id(variables["self"])]
            for node in variables.values():
                if isinstance(node, fx.Node):
                    stack = list(node.meta.get("nn_module_stack", {}).values())
                    innermost = stack[-1][0] if stack else None
    return described(model, innermost)


def described(model: nn.Module, name: str | None) -> str:
    """A module for a message."""
    if not name:
        return f"the forward of {type(model).__name__} itself"
    return f"{name!r} ({type(model.get_submodule(name)).__name__})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def root_reason(error: BaseException) -> str:
    """What the first cause of an error says, in one line."""
    *_, first = _causes(error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    reason = (details or lines or [type(first).__name__])[0]
    return reason.split(". If you're using")[0].rstrip(".")


@contextmanager
def raised_as(kind: type[SpectrimError], what: str, *, advice: str = "") -> Iterator[None]:
    """Raise another package's error as one of this `kind`: what failed, the reason in one line, and what to do."""
    try:
        yield
    except SpectrimError:
        raise
    except Exception as error:
        raise kind(f"{what}: {root_reason(error)}{advice}") from error


def unknown(what: str, name: object, known: Sequence[str]) -> str:
    """The message for a name that is not among the known ones, with the nearest of these."""
    return f"{what} {name!r} is unknown; {did_you_mean(str(name), known)}there are {', '.join(known)}"
