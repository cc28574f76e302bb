"""The spatial form: a column of the kernel first, a row second (Jaderberg 2014), fitted in the metric of the data."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from spectrim.linalg.problem import Factors, Ranks
from spectrim.linalg.shared import SharedProjection, better_projection, energy, explained_by, least_squares, orthonormal
from spectrim.linalg.spectra import FloatArray


class SpatialDecomposition(SharedProjection):
    """V is a column of the kernel, (rank, in * height), and H a row, (out, rank, width)."""

    first_shared = 4

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(in * height, out * width),)."""
        _, out, into, height, width = shape
        return (min(into * height, out * width),)

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at rank 1..k with the start as it is and the second factor fitted: a bound for `factors`."""
        width = self.problem.weight.shape[-1]
        lost = np.zeros(self.basis.shape[1])
        for (M, A), V in zip(self.groups(self.problem), self.basis, strict=True):
            explained = explained_by(M, A, V).square().sum(dim=1)
            explained_energy = explained.reshape(-1, width).sum(dim=1).cumsum(dim=0)
            lost += (energy(M, A) - explained_energy).clamp(min=0).cpu().numpy()
        return lost

    def factors(self, ranks: Ranks, *, sweeps: int | None = None) -> Factors:
        """(down, up), (groups, rank, in, height, 1) and (groups, out, rank, 1, width).

        Fitted by at most `sweeps` sweeps; in the plain metric the start is the solution already.
        """
        groups, out, into, height, width = self.problem.weight.shape
        down, up = self.fitted(ranks, sweeps=0 if self.problem.covariance is None else sweeps)
        up = up.reshape(groups, out, ranks[0], 1, width)
        return down.reshape(groups, ranks[0], into, height, 1), self.problem.unweighted(up)

    def fit(self, M: Tensor, A: Tensor | None, V: Tensor, rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """H by least squares."""
        H, weighed = least_squares(M, A, V)
        return (H,), (weighed * H).sum()

    def improve(self, M: Tensor, A: Tensor | None, V: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Some steps of conjugate gradients."""
        assert A is not None
        return orthonormal(better_projection(M, A, others[0], V))
