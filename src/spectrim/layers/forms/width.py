"""The width form: fewer neurons between two layers; those that stay are chosen, and what reads them is refitted."""

from spectrim.layers.forms.base import JointForm
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import SubsetDecomposition


class WidthForm(JointForm):
    """A subset of the neurons of an MLP: rows of the layers before them, columns of the weight after them."""

    name = "width"
    decomposition = SubsetDecomposition

    def fits(self, unit: Unit) -> bool:
        return isinstance(unit, SingleWeight) and bool(unit.feeders)
