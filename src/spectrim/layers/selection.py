"""Which layers of a model are meant: patterns of names, and what else a user says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from spectrim.core.errors import ModelError, PatternError, near
from spectrim.layers.types import LAYER_TYPES

Patterns = str | Sequence[str]
TreatAs = Mapping[type[nn.Module], type[nn.Module]]
"""By a class of layers that overrides `forward`: the class of torch whose forward pass it has all the same."""


LOOKUP = (
    "its rows are looked up, which costs no MACs, and a product of factors would; Budget(params=..) or "
    "Budget(bytes=..), of the whole network, may make it smaller"
)
"""Why embeddings stay dense under other rules."""


@dataclass(frozen=True)
class LayerSelection:
    """Which layers may be factored.

    Attributes:
        include: Patterns of layer names, as in a shell (`*`, `?`); one or several.
        exclude: Patterns of layers to leave out.
        keep_last: Leave out the layer that is called last.
        lookups: Whether embeddings may be factored, which makes them smaller, but not faster.
        together: Whether it is tried which layers can be narrowed together, which takes some passes.
        treat_as: See `TreatAs`. Where its outputs are not those of that class, the layer stays as it is.

    Raises:
        ModelError: `treat_as` names a class that is not a subclass of the other, or one that has no factored form.
    """

    include: Patterns = ("*",)
    exclude: Patterns = ()
    keep_last: bool = False
    treat_as: TreatAs = field(default_factory=dict)
    lookups: bool = True
    together: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.treat_as, Mapping):
            raise ModelError(f"treat_as={self.treat_as!r}: give classes by class, such as {{MyConv2d: nn.Conv2d}}")
        for own, base in self.treat_as.items():
            if not (isinstance(own, type) and isinstance(base, type) and issubclass(own, base)):
                raise ModelError(f"treat_as={{{own!r}: {base!r}}}: give classes, the first a subclass of the second")
            if not any(kind.base_of(base) is base for kind in LAYER_TYPES):
                known = ", ".join(kind.name for kind in LAYER_TYPES)
                raise ModelError(f"treat_as={{..: {base.__name__}}}: it has no factored form; there are {known}")

    @property
    def takes_all(self) -> bool:
        """Whether no layer is left out."""
        return tuple(self.include) == ("*",) and not (self.exclude or self.keep_last)

    def unfuses(self, part: str, whole: str) -> bool:
        """Whether it takes a layer that a module can be taken apart for, and does not leave that out by its name."""
        return _matches(part, self.include) and not _matches(whole, self.exclude)

    def matching(self, names: Sequence[str]) -> set[str]:
        """Those of the names that are included and not excluded.

        Raises:
            PatternError: a pattern matches none of them.
        """
        return _matching(names, self.include) - _matching(names, self.exclude)


def _matching(names: Sequence[str], patterns: Patterns) -> set[str]:
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise PatternError(f"the pattern {pattern!r} matches no layer{near(pattern, names)}")
        matched |= hits
    return matched


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
