"""The form of an attention's values and output: fewer numbers in the heads, more in those that need more."""

import numpy as np
import numpy.typing as npt

from spectrim.layers.forms.base import JointForm
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, HeadDecomposition, HeadLayout, Problem, Ranks, head_ranks


class HeadValueOutputForm(JointForm):
    """The products of value and output of heads at lower ranks, whose mean is the rank; what reads them is refitted."""

    name = "head_vo"
    by_head = True

    def fits(self, unit: Unit) -> bool:
        return isinstance(unit, SingleWeight) and unit.heads is not None

    def full_ranks(self, unit: Unit) -> Ranks:
        return (_layout(unit).size,)

    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        return head_ranks(_layout(unit))

    def sizes(self, unit: Unit, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return ranks[:, 0] * _layout(unit).groups, ranks[:, 0] * _layout(unit).heads

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return HeadDecomposition.of_heads(problem, _layout(unit))


def _layout(unit: Unit) -> HeadLayout:
    assert isinstance(unit, SingleWeight)
    assert unit.heads is not None
    return unit.heads
