"""The form of an attention's queries and keys: fewer numbers in the heads, more in those that need more."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spectrim.layers.forms.base import JointForm, RankCosts
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, HeadLayout, Problem, Ranks, ScoreDecomposition, head_ranks


class HeadQueryKeyForm(JointForm):
    """The products of queries and keys of heads at lower ranks, whose mean is the rank.

    The factors are (F, U, W'): F (1, m, k) says what becomes of the queries, W' (1, l, in) is the weight of the keys
    that are left, and U (1, out, l) makes whole keys of these: the weight of the keys is taken to be U W'.
    """

    name = "head_qk"
    by_head = True
    narrows_outputs = True

    def fits(self, unit: Unit) -> bool:
        return isinstance(unit, SingleWeight) and unit.scores is not None

    def full_ranks(self, unit: Unit) -> Ranks:
        return (_layout(unit).size,)

    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        return head_ranks(_layout(unit))

    def sizes(self, unit: Unit, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What the layer of the queries gives, and what the weight gives, at ranks (n, 1)."""
        return ranks[:, 0] * _layout(unit).heads, ranks[:, 0] * _layout(unit).groups

    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        """Those of the weight alone, with the bias that it has: a key that all have in common changes nothing."""
        (weight,), (_, out) = unit.weights, self.sizes(unit, ranks)
        assert weight.geometry is not None
        params = out * weight.geometry.into
        return RankCosts(self.name, ranks, params + weight.biases * out, params * weight.positions.kernel)

    def product(self, factors: Factors) -> Tensor:
        _, back, weight = factors
        return back @ weight

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return ScoreDecomposition.of_heads(problem, _layout(unit))


def _layout(unit: Unit) -> HeadLayout:
    assert isinstance(unit, SingleWeight)
    assert unit.scores is not None
    return unit.scores
