"""The errors a user can cause. Each says what came, why it is wrong and what to do."""

import difflib
import sys
import warnings
from collections.abc import Iterable


class SpectrimError(Exception):
    """Base of every error that Spectrim raises on purpose."""


class ArgumentError(SpectrimError, TypeError, ValueError):
    """An argument of another type than the function takes, or a field of another type or range than the value has."""


class RuleError(SpectrimError, ValueError):
    """A rank, ratio, energy or budget that is impossible."""


class ModelError(SpectrimError, ValueError):
    """A model or a weight that cannot be processed: NaN weights, inputs of the wrong shape, no layer to factor."""


class PatternError(SpectrimError, ValueError):
    """A name pattern that matches no layer."""


class PlanError(SpectrimError, ValueError):
    """A plan that does not belong to this model, or contradicts itself."""


class DataError(SpectrimError, ValueError):
    """Data that is empty, has the wrong shape, or cannot be obtained."""


class FileError(SpectrimError, OSError):
    """A file that is missing, damaged, of another kind, or cannot be written."""


class TrainingError(SpectrimError, RuntimeError):
    """Training that cannot go on, such as a loss that became NaN."""


class DependencyError(SpectrimError, ImportError):
    """An optional package that is needed and not installed; the message says how to install it."""


class EngineError(SpectrimError, RuntimeError):
    """A runtime that cannot do what was asked: unknown, more threads than cores, outputs that change between runs."""


class ResourceError(SpectrimError, MemoryError):
    """Work that needs more memory than is free; the message says how much, and what would need less."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'a' or 'b'? ` for a message, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def near(name: str, known: Iterable[str]) -> str:
    """`; near names: ..` for a message, or the first few known ones when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near names: {', '.join(close)}" if close else f"; there are: {', '.join(known[:8])}"


def warn(message: str) -> None:
    """Warn, at the line of the caller's own program that called this library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
