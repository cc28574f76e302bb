"""Units: what is approximated as one thing. A new kind is a file here and a line in `UNIT_FINDERS`."""

from torch import nn

from spectrim.layers.selection import LayerSelection
from spectrim.layers.tracing import Trace
from spectrim.layers.units.base import Unit, Weight
from spectrim.layers.units.single_weight import SingleWeight, find_single_weights

__all__ = ["UNIT_FINDERS", "SingleWeight", "Unit", "Weight", "find_units"]

UNIT_FINDERS = (find_single_weights,)


def find_units(model: nn.Module, trace: Trace, selection: LayerSelection) -> tuple[Unit, ...]:
    """All units of a model, those of each kind in order of execution.

    Raises:
        ModelError: the model has nothing that can be factored, or a state that cannot be counted.
        PatternError: a pattern matches no layer.
    """
    return tuple(unit for find in UNIT_FINDERS for unit in find(model, trace, selection))
