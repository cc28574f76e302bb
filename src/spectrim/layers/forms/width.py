"""The width form: fewer neurons between two layers; those that stay are chosen, and what reads them is refitted."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spectrim.layers.forms.base import JointForm, unit_geometry
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import Decomposition, Factors, Problem, Ranks, SubsetDecomposition


class WidthForm(JointForm):
    """A subset of the neurons of an MLP: rows of the layers before them, columns of the weight after them."""

    name = "width"

    def fits(self, unit: Unit) -> bool:
        return isinstance(unit, SingleWeight) and bool(unit.feeders) and not (unit.heads or unit.scores)

    def full_ranks(self, unit: Unit) -> Ranks:
        return SubsetDecomposition.full_ranks(unit_geometry(unit).shape)

    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        return SubsetDecomposition.rank_grid(unit_geometry(unit).shape)

    def sizes(self, unit: Unit, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return ranks[:, 0], ranks[:, 0]

    def product(self, factors: Factors) -> Tensor:
        _, reading, weight = factors
        whole = weight.new_zeros(*weight.shape[:2], reading.shape[2])
        whole[:, :, reading[0].argmax(dim=1)] = weight
        return whole

    def fed(self, feeding: Tensor, kernels: Tensor) -> Tensor:
        return kernels[:, feeding[0].argmax(dim=1)]

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return SubsetDecomposition.of(problem, near=near)
