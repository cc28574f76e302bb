"""The spatial form: a column of the kernel first, a row second (Jaderberg 2014), fitted in the metric of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.linalg.problem import Factors, Problem, Ranks, every_rank
from spectrim.linalg.shared import (
    Progress,
    better_projection,
    energy,
    explained_by,
    least_squares,
    most_sweeps,
    nested_start,
    orthonormal,
)
from spectrim.linalg.spectra import FloatArray


@dataclass(frozen=True, eq=False)
class SpatialDecomposition:
    """A nested start for every rank, from which the factors of one rank are fitted.

    Attributes:
        problem: What is approximated; weight (groups, out, in, kernel height, kernel width).
        basis: float64 (groups, k, in * height), orthonormal rows; k = min(in * height, out * width).
    """

    problem: Problem
    basis: Tensor

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(in * height, out * width),)."""
        _, out, into, height, width = shape
        return (min(into * height, out * width),)

    @staticmethod
    def rank_grid(shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ranks of `tails`, (n, 1): every one."""
        return every_rank(SpatialDecomposition.full_ranks(shape))

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """The start: the closed-form solution for inputs that are independent from one kernel column to the next.

        With factors of a problem that is nearly the same, the first of them is the start, up to its rank.
        """
        if near:
            return cls(problem, near[0].flatten(2))
        return cls(problem, torch.stack([nested_start(M, A) for M, A in _each(problem)]))

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at rank 1..k with the start as it is and the second factor fitted: a bound for `factors`."""
        width = self.problem.weight.shape[-1]
        lost = np.zeros(self.basis.shape[1])
        for (M, A), V in zip(_each(self.problem), self.basis, strict=True):
            explained = explained_by(M, A, V).square().sum(dim=1)
            explained_energy = explained.reshape(-1, width).sum(dim=1).cumsum(dim=0)
            lost += (energy(M, A) - explained_energy).clamp(min=0).cpu().numpy()
        return lost

    def factors(self, ranks: Ranks, *, sweeps: int | None = None) -> Factors:
        """(down, up), (groups, rank, in, height, 1) and (groups, out, rank, 1, width).

        Alternating least squares: at most `sweeps` times some steps on the first factor, then the second anew. In the
        plain metric the start is the solution already.
        """
        groups, out, into, height, width = self.problem.weight.shape
        downs, ups = [], []
        for (M, A), start in zip(_each(self.problem), self.basis, strict=True):
            V, H = _fitted(M, A, start[: ranks[0]], sweeps)
            downs.append(V)
            ups.append(H)
        down = torch.stack(downs).reshape(groups, ranks[0], into, height, 1)
        up = torch.stack(ups).reshape(groups, out, ranks[0], 1, width)
        return down, self.problem.unweighted(up)


def _fitted(M: Tensor, A: Tensor | None, V: Tensor, sweeps: int | None) -> tuple[Tensor, Tensor]:
    H, weighed = least_squares(M, A, V)
    if A is None:
        return V, H
    progress = Progress(energy(M, A))
    for _ in range(most_sweeps(A) if sweeps is None else sweeps):
        if progress.stalled((weighed * H).sum()):
            break
        V = orthonormal(better_projection(M, A, H, V))
        H, weighed = least_squares(M, A, V)
    return V, H


def _each(problem: Problem) -> list[tuple[Tensor, Tensor | None]]:
    groups, out, into, height, width = problem.weight.shape
    weights = problem.matrices.reshape(groups, out, into * height, width)
    return list(zip(weights, problem.metrics, strict=True))
