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
from spectrim.linalg.spectra import FloatArray, to_float64


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

    def columns(self, directions: Tensor) -> Tensor:
        """Where the numbers of some directions of groups are in all heads: those of a direction one after the other."""
        each = self.heads // self.groups
        group, row = directions.unsqueeze(1) // self.size, directions.unsqueeze(1) % self.size
        heads = group * each + torch.arange(each, device=directions.device)
        return (heads * self.size + row).flatten()


@dataclass(frozen=True, eq=False)
class HeadDecomposition(Decomposition):
    """Each head's part of the weight at lower ranks, nested, and all parts together refitted to what is left.

    Within a group of heads the directions are the best for each head by itself (the truncated SVD of its part of the
    weight times the root of its covariance; Lin et al. 2024, MoDeGPT). Those of all groups are taken by their energy,
    after the first one of each, so that a rank is the mean over the groups: heads that matter more keep more. With the
    directions given, the weight is the least squares solution over all heads, whose error is exact at every rank.

    Attributes:
        problem: What is approximated; weight (1, out, heads * size).
        layout: How the heads lie.
        directions: (groups, size, size), rows best first.
        order: int64 (groups * size,), all directions, the first to be taken first: row `order % size` of a group.
        factor: Cholesky factor of the covariance of the numbers in these directions: by `order`, then head of a group.
        projected: The weight for these numbers times that, (out, heads * size).
    """

    problem: Problem
    layout: HeadLayout
    directions: Tensor
    order: Tensor
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
        (W,), C = to_float64(problem.matrices), problem.full_metric
        heads, size = layout.heads, layout.size
        parts = W.reshape(-1, heads, size).transpose(0, 1)
        own = C.reshape(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        by_group = (layout.groups, heads // layout.groups, size, size)
        effect = (parts.mT @ parts).reshape(by_group).sum(dim=1)
        values, vectors = torch.linalg.eigh(own.reshape(by_group).mean(dim=1))
        roots = values.clamp(min=1e-12 * float(values.max())).sqrt().unsqueeze(1)
        # numbers stay as large as they were on average, since the attention may clip them
        roots = roots / roots.square().mean().sqrt()
        root, inverse = (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
        energies, best = (part.flip(-1) for part in torch.linalg.eigh(root @ effect @ root))
        best = best.mT
        directions, order = best @ inverse, by_energy(energies)
        columns = layout.columns(order)
        each = torch.block_diag(*directions.repeat_interleave(heads // layout.groups, dim=0))[columns]
        back = torch.block_diag(*(root @ best.mT).repeat_interleave(heads // layout.groups, dim=0))
        mixed, coefficients = each @ C @ each.mT, W @ back[:, columns]
        mixed = (mixed + mixed.mT) / 2
        mixed.diagonal().add_(1e-12 * float(mixed.diagonal().max()))
        factor = torch.linalg.cholesky(mixed)
        return cls(problem, layout, directions, order, factor, coefficients @ factor)

    @cached_property
    def tails(self) -> FloatArray:
        """At ranks 1 to the size of a head."""
        energies = self.projected.square().sum(dim=0).reshape(self.layout.size, self.layout.heads).sum(dim=1)
        after = energies.flip(0).cumsum(0).flip(0)
        return np.append(after[1:].cpu().numpy(), 0.0)

    def tail_at(self, ranks: Ranks) -> float:
        """Energy lost at a rank."""
        return float(self.tails[ranks[0] - 1])

    def factors(self, ranks: Ranks) -> Factors:
        """What becomes of the values, what becomes of the heads, and the weight that reads these, head by head."""
        (rank,), layout = ranks, self.layout
        chosen = self.order[: rank * layout.groups]
        columns = layout.columns(chosen)
        solved = torch.linalg.solve_triangular(
            self.factor[: len(columns), : len(columns)], self.projected[:, : len(columns)], upper=False, left=False
        )
        few = [self.directions[group, : int((chosen // layout.size == group).sum())] for group in range(layout.groups)]
        reading = [rows for rows in few for _ in range(layout.heads // layout.groups)]
        factors = torch.block_diag(*few), torch.block_diag(*reading), solved[:, columns.argsort()]
        feeding, reads, weight = (part.unsqueeze(0) for part in factors)
        return feeding, reads, self.problem.unweighted(weight)


def by_energy(energies: Tensor) -> Tensor:
    """The order of (groups, size) directions, falling in each group: the first ones, then all others by energy."""
    first = torch.full_like(energies[:, :1], torch.inf)
    # rounding may not let one overtake those before it in its group
    falling = torch.cat([first, energies[:, 1:]], dim=1).cummin(dim=1).values
    return falling.flatten().argsort(descending=True, stable=True)


def head_ranks(layout: HeadLayout) -> npt.NDArray[np.int64]:
    """The ranks of `HeadDecomposition.tails`, (n, 1)."""
    return np.arange(1, layout.size + 1, dtype=np.int64)[:, None]
