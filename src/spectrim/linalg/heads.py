"""A weight that reads the heads of an attention, each of which may hold fewer numbers, in a metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.linalg.problem import Decomposition, Factors, Problem, Ranks
from spectrim.linalg.spectra import FloatArray


@dataclass(frozen=True)
class HeadLayout:
    """How heads lie in a vector, one after the other.

    Attributes:
        heads: How many the weight reads.
        groups: How many sets of values there are; each is read by as many heads in a row.
        size: Numbers of a head.
    """

    heads: int
    groups: int
    size: int


@dataclass(frozen=True, eq=False)
class HeadDecomposition(Decomposition):
    """Each head's part of the weight at lower ranks, nested, and all parts together refitted to what is left.

    Within a group of heads the directions are the best for each head by itself (the truncated SVD of its part of the
    weight times the root of its covariance; Lin et al. 2024, MoDeGPT); with the directions given, the weight is the
    least squares solution over all heads, whose error is exact at every rank.

    Attributes:
        problem: What is approximated; weight (1, out, heads * size).
        layout: How the heads lie.
        directions: (groups, size, size), rows best first.
        factor: Cholesky factor of the covariance of the numbers in these directions, ordered by rank, then head.
        projected: The weight for these numbers times that, (out, heads * size).
    """

    problem: Problem
    layout: HeadLayout
    directions: Tensor
    factor: Tensor
    projected: Tensor

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """Of a single head."""
        return (shape[2],)

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """As `of_heads`, of a single head."""
        size = problem.weight.shape[2]
        return cls.of_heads(problem, HeadLayout(1, 1, size))

    @classmethod
    def of_heads(cls, problem: Problem, layout: HeadLayout) -> Self:
        """Solve for every rank."""
        (W,), C = problem.matrices, problem.full_metric
        heads, size, n = layout.heads, layout.size, W.shape[1]
        parts = W.reshape(-1, heads, size).transpose(0, 1)
        own = C.reshape(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        by_group = (layout.groups, heads // layout.groups, size, size)
        effect = (parts.mT @ parts).reshape(by_group).sum(dim=1)
        values, vectors = torch.linalg.eigh(own.reshape(by_group).mean(dim=1))
        roots = values.clamp(min=1e-12 * float(values.max())).sqrt().unsqueeze(1)
        # numbers stay as large as they were on average, since the attention may clip them
        roots = roots / roots.square().mean().sqrt()
        root, inverse = (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
        best = torch.linalg.eigh(root @ effect @ root)[1].flip(2).mT
        directions = best @ inverse
        each = directions.repeat_interleave(heads // layout.groups, dim=0)
        back = (root @ best.mT).repeat_interleave(heads // layout.groups, dim=0)
        # (heads, size) -> (size, heads), so that the first r * heads are those of rank r
        mixed = (each @ C.reshape(heads, size, n)).transpose(0, 1).reshape(n, heads, size)
        mixed = (mixed.transpose(0, 1) @ each.mT).permute(1, 2, 0).reshape(n, n)
        coefficients = (parts @ back).permute(1, 2, 0).reshape(-1, n)
        mixed = (mixed + mixed.mT) / 2
        mixed.diagonal().add_(1e-12 * float(mixed.diagonal().max()))
        factor = torch.linalg.cholesky(mixed)
        return cls(problem, layout, directions, factor, coefficients @ factor)

    @cached_property
    def tails(self) -> FloatArray:
        """At ranks 1 to the size of a head."""
        energies = self.projected.square().sum(dim=0).reshape(self.layout.size, self.layout.heads).sum(dim=1)
        after = energies.flip(0).cumsum(0).flip(0)
        return np.append(after[1:].cpu().numpy(), 0.0)

    def tail_at(self, ranks: Ranks) -> float:
        """Energy lost at a rank of each head."""
        return float(self.tails[ranks[0] - 1])

    def factors(self, ranks: Ranks) -> Factors:
        """What becomes of the values, what becomes of the heads, and the weight that reads these."""
        (rank,), layout = ranks, self.layout
        columns = rank * layout.heads
        solved = torch.linalg.solve_triangular(
            self.factor[:columns, :columns], self.projected[:, :columns], upper=False, left=False
        )
        weight = solved.reshape(-1, rank, layout.heads).transpose(1, 2).reshape(1, -1, columns)
        few = self.directions[:, :rank]
        feeding = torch.block_diag(*few)
        reading = torch.block_diag(*few.repeat_interleave(layout.heads // layout.groups, dim=0))
        return feeding.unsqueeze(0), reading.unsqueeze(0), self.problem.unweighted(weight)


def head_ranks(layout: HeadLayout) -> npt.NDArray[np.int64]:
    """The ranks of `HeadDecomposition.tails`, (n, 1)."""
    return np.arange(1, layout.size + 1, dtype=np.int64)[:, None]
