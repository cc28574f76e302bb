"""What a form is: one way to approximate a unit."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.plans import Cost
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.types import Geometry, LayerType, Positions
from spectrim.layers.units import SingleWeight, Unit, Weight
from spectrim.linalg import Decomposition, Factors, Problem, Ranks
from spectrim.linalg.products import times_rounded


@dataclass(frozen=True, eq=False)
class RankCosts:
    """What every rank of a unit in one form costs: known from its shape alone.

    Attributes:
        form: The form's name.
        ranks: Whole numbers (n, number of ranks of the form).
        params: Numbers stored, (n,).
        macs: Multiply-accumulates of a pass, (n,).
    """

    form: str
    ranks: npt.NDArray[np.int64]
    params: npt.NDArray[np.int64]
    macs: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.params) == len(self.macs)


class Form(ABC):
    """One way to approximate a unit. A new one is a file here and an entry in `FORMS` or `JOINT_FORMS`.

    It owns the grid of ranks, the cost of each, the decomposition, and what is built: they belong together.

    Attributes:
        name: As it stands in plans.
        rank_count: Ranks that an approximation has: 1, or 2 in the tucker2 form.
        closed_form: Whether one decomposition solves it for every rank. Rules for single layers use such forms, and the
            spectrum is theirs.
        is_joint: Whether it is one of a weight together with the layers that feed it.
        saves_time: Whether it is for budgets of time; if not, only those of params and bytes take it unasked.
        solved_as: The form whose decomposition serves; its own by default.
        narrows_outputs: Whether it is the weight's outputs that are narrowed; its energies are not theirs then.
    """

    name: ClassVar[str]
    rank_count: ClassVar[int] = 1
    closed_form: ClassVar[bool] = False
    is_joint: ClassVar[bool] = False
    saves_time: ClassVar[bool] = True
    solved_as: ClassVar[str | None] = None
    narrows_outputs: ClassVar[bool] = False

    @abstractmethod
    def fits(self, unit: Unit) -> bool:
        """Whether the unit can take this form."""

    @abstractmethod
    def full_ranks(self, unit: Unit) -> Ranks:
        """The largest ranks that change anything, each group by itself."""

    @abstractmethod
    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        """Every rank that is looked at, (n, rank_count): that of each entry in a decomposition's `tails`."""

    @abstractmethod
    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        """The cost at each of some ranks (n, rank_count), with so many biases."""

    def cost(self, unit: Unit, ranks: Ranks, *, biases: int = 0) -> Cost:
        """The cost at `ranks`, with so many biases."""
        costs = self.costs(unit, np.array([ranks], dtype=np.int64), biases=biases)
        return Cost(params=int(costs.params[0]), macs=int(costs.macs[0]))

    @abstractmethod
    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        """What factors of any rank of a unit are made from.

        Where factors are found by iteration, those of a problem that is nearly the same are a better start, up to their
        own rank, and save finding one: `near`.
        """

    def index_bytes(self, unit: Unit) -> int:
        """Bytes of the file that are no parameters."""
        return 0

    def basis_bytes(self, unit: Unit, *, rank: int | None = None) -> int:
        """Bytes of a decomposition, or of what it keeps for one rank; 0 where that is not known."""
        return 0

    def working_bytes(self, unit: Unit, *, vectors: int | None, rank: int | None = None) -> int:
        """Bytes held at most while it is worked out in the metric of so many vectors; None is the plain metric."""
        return 0


class SingleWeightForm(Form):
    """A form of a single weight: the product of factors.

    Attributes:
        decomposition: The class whose `full_ranks` and `rank_grid` are those of the form.
    """

    decomposition: ClassVar[type[Decomposition]]

    def fits(self, unit: Unit) -> bool:
        return isinstance(unit, SingleWeight) and unit.weight.geometry is not None and self.fits_shape(unit.geometry)

    @abstractmethod
    def fits_shape(self, geometry: Geometry) -> bool:
        """Whether a weight of these sizes can take this form."""

    @abstractmethod
    def factor_shapes(self, geometry: Geometry, ranks: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """Shapes of the factors of a group, first to last, each (its outputs, its inputs, *its kernel).

        The ranks may be numbers, or arrays of as many numbers.
        """

    @abstractmethod
    def factor_positions(self, positions: Positions) -> tuple[int, ...]:
        """How many vectors each factor handles."""

    @abstractmethod
    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        """The replacement on the meta device; `ranks` are those of all groups together."""

    def full_ranks(self, unit: Unit) -> Ranks:
        return self.decomposition.full_ranks(unit_geometry(unit).shape)

    def rank_grid(self, unit: Unit) -> npt.NDArray[np.int64]:
        return self.decomposition.rank_grid(unit_geometry(unit).shape)

    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        geometry, (weight,) = unit_geometry(unit), unit.weights
        params = [geometry.groups * prod(shape) for shape in self.factor_shapes(geometry, list(ranks.T))]
        positions = self.factor_positions(weight.positions)
        macs = sum(number * places for number, places in zip(params, positions, strict=True))
        stored = sum(params, start=biases * geometry.outputs)
        return RankCosts(self.name, ranks, np.asarray(stored), np.asarray(macs))

    def basis_bytes(self, unit: Unit, *, rank: int | None = None) -> int:
        (weight,) = unit.weights
        return self.decomposition.basis_bytes(unit_geometry(unit).shape, itemsize=weight.itemsize, rank=rank)

    def working_bytes(self, unit: Unit, *, vectors: int | None, rank: int | None = None) -> int:
        return self.decomposition.working_bytes(unit_geometry(unit).shape, vectors=vectors, rank=rank)

    def decompose_unit(self, problem: Problem, unit: Unit, *, near: Factors = ()) -> Decomposition:
        return self.decompose(problem, near=near)

    def decompose(self, problem: Problem, *, near: Factors = ()) -> Decomposition:
        """As `decompose_unit`: of a weight by itself, what is to be approximated says all."""
        return self.decomposition.of(problem, near=near)

    def build(self, layer: nn.Module, *, layer_type: LayerType, ranks: Ranks, bias: bool) -> FactoredLayer:
        """An unset replacement for `layer`, with its options, device, type and flags. Draws no random numbers."""
        geometry, weight = layer_type.geometry(layer), layer.get_parameter("weight")
        if not self.fits_shape(geometry):
            raise ModelError(f"{type(layer).__name__} {list(weight.shape)} has no {self.name} form")
        replacement = self.chain(layer, layer_type, tuple(rank * geometry.groups for rank in ranks), bias=bias)
        if not weight.is_meta:
            replacement.to_empty(device=weight.device)
        return replacement.train(layer.training).requires_grad_(weight.requires_grad)

    def random_factors(self, unit: Unit, ranks: Ranks, *, generator: torch.Generator) -> Factors:
        """Factors to time with, float64, scaled so that no signal grows or dies out."""
        geometry = unit_geometry(unit)
        return tuple(
            torch.randn(geometry.groups, *shape, generator=generator, dtype=torch.float64) / sqrt(prod(shape[1:]))
            for shape in self.factor_shapes(geometry, ranks)
        )


class JointForm(Form):
    """A form of a weight together with others: what lies between them is narrowed, and no layer is added.

    The factors are (F, R, W'): F (1, m, k) says what becomes of the k numbers that a feeding layer gives, R (1, l, n)
    of the n numbers that the weight reads, and W' (1, out, l) is the weight of these: it stands for W' R.

    Attributes:
        by_head: Whether the rank is the mean over the heads of an attention.
    """

    is_joint = True
    by_head: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, unit: Unit, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What each feeding layer gives, and what the weight reads (or gives), at ranks (n, 1)."""

    def costs(self, unit: Unit, ranks: npt.NDArray[np.int64], *, biases: int = 0) -> RankCosts:
        """Those of the weight alone."""
        geometry, (weight,), (_, read) = unit_geometry(unit), unit.weights, self.sizes(unit, ranks)
        params = read * geometry.out
        return RankCosts(self.name, ranks, params + biases * geometry.outputs, params * weight.positions.kernel)

    def product(self, factors: Factors) -> Tensor:
        """The weight (1, out, n) that factors stand for."""
        _, reading, weight = factors
        return weight @ reading

    def fed(self, feeding: Tensor, kernels: Tensor) -> Tensor:
        """The weights (1, l, n) of a layer that feeds it, of these dense ones."""
        return times_rounded(feeding, kernels)

    def feeder_costs(self, unit: Unit, feeder: Weight, ranks: npt.NDArray[np.int64]) -> RankCosts:
        """Those of a layer that feeds it."""
        assert feeder.geometry is not None
        fed, _ = self.sizes(unit, ranks)
        params = fed * feeder.geometry.into
        return RankCosts(self.name, ranks, params + feeder.biases * fed, params * feeder.positions.kernel)

    def feeder_cost(self, unit: Unit, feeder: Weight, ranks: Ranks) -> Cost:
        """The same at `ranks`."""
        costs = self.feeder_costs(unit, feeder, np.array([ranks], dtype=np.int64))
        return Cost(params=int(costs.params[0]), macs=int(costs.macs[0]))

    def working_bytes(self, unit: Unit, *, vectors: int | None, rank: int | None = None) -> int:
        """The metric, what becomes of it, and as much again twice; the same of its product with the weight."""
        _, out, n = unit_geometry(unit).shape
        return 8 * (4 * n * n + 4 * out * n)


def unit_geometry(unit: Unit) -> Geometry:
    """The sizes of the weight that a form approximates."""
    assert isinstance(unit, SingleWeight)
    return unit.geometry
