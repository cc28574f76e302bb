"""The form of an attention's values and output: fewer numbers in the heads, more in those that need more."""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from spectrim.layers.forms.base import JointForm
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, HeadDecomposition, HeadLayout, Problem, Ranks, head_ranks


class HeadForm(JointForm):
    """A form of the heads of an attention, whose rank is the mean of theirs."""

    by_head = True

    @abstractmethod
    def layout(self, unit: Unit) -> HeadLayout | None:
        """How the heads lie; None for a unit that is not of this kind."""

    def fits(self, unit: Unit) -> bool:
        return self.layout(unit) is not None

    def full_ranks(self, unit: Unit) -> Ranks:
        return (self._known(unit).size,)

    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        return head_ranks(self._known(unit))

    def sizes(self, unit: Unit, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        heads, groups = ranks[:, 0] * self._known(unit).heads, ranks[:, 0] * self._known(unit).groups
        return (heads, groups) if self.narrows_outputs else (groups, heads)

    def _known(self, unit: Unit) -> HeadLayout:
        layout = self.layout(unit)
        assert layout is not None
        return layout


class HeadValueOutputForm(HeadForm):
    """The products of value and output of heads at lower ranks; what reads them is refitted."""

    name = "head_vo"

    def layout(self, unit: Unit) -> HeadLayout | None:
        return unit.heads if isinstance(unit, SingleWeight) else None

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return HeadDecomposition.of_heads(problem, self._known(unit))
