"""The form of an attention's queries and keys: fewer numbers in the heads, more in those that need more."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spectrim.layers.forms.base import RankCosts, unit_geometry
from spectrim.layers.forms.head_vo import HeadForm
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, HeadLayout, Problem, ScoreDecomposition


class HeadQueryKeyForm(HeadForm):
    """The products of queries and keys of heads at lower ranks.

    The factors are (F, U, W', R): F (1, m, k) says what becomes of the queries and R (1, l, out) of the keys, W' = R W
    is the weight of the keys that are left, and U (1, out, l) makes whole keys of these: the weight of the keys is
    taken to be U W'. Where the keys come before the queries it is the other way round.
    """

    name = "head_qk"
    narrows_outputs = True

    def layout(self, unit: Unit) -> HeadLayout | None:
        return unit.scores if isinstance(unit, SingleWeight) else None

    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        """Those of the weight alone, with the bias that it has."""
        (weight,), (_, out) = unit.weights, self.sizes(unit, ranks)
        params = out * unit_geometry(unit).into
        return RankCosts(self.name, ranks, params + weight.biases * out, params * weight.positions.kernel)

    def product(self, factors: Factors) -> Tensor:
        _, back, weight, _ = factors
        return back @ weight

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return ScoreDecomposition.of_heads(problem, self._known(unit))
