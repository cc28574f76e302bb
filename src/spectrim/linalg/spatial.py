"""The spatial form: a column of the kernel first, a row second (Jaderberg 2014), fitted in the metric of the data."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spectrim.linalg import shared
from spectrim.linalg.problem import Factors, Ranks
from spectrim.linalg.spectra import FloatArray


class SpatialDecomposition(shared.SharedProjection):
    """V is a column of the kernel, (rank, in * height), and H a row, (out, rank, width)."""

    first_shared = 4

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(in * height, out * width),)."""
        _, out, into, height, width = shape
        return (min(into * height, out * width),)

    @classmethod
    def rank_grid(cls, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ranks of `tails`: every one; of a wide kernel those with less weights than it has, and the full one."""
        _, out, into, height, width = shape
        (full,) = cls.full_ranks(shape)
        smaller = out * into * height * width // (into * height + out * width)
        last = max(1, min(full, smaller)) if into * height * width > shared.WIDE else full
        return np.unique([*range(1, last + 1), full]).astype(np.int64)[:, None]

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at the ranks of `rank_grid` with the start as it is and the second factor fitted.

        A bound for `factors`; at the full rank nothing is lost.
        """
        shape = self.problem.weight.shape
        ranks, (full,) = self.rank_grid(shape), self.full_ranks(shape)
        lost = np.zeros(len(ranks))
        needed = full if len(ranks) == full else len(ranks) - 1
        for (M, A), V in zip(self.groups(self.problem), self.basis, strict=True):
            explained = (
                shared.explained_by(M, A, V[:needed], rounding=self.problem.rounding_tolerance).square().sum(dim=1)
            )
            explained_energy = explained.reshape(-1, shape[-1]).sum(dim=1).cumsum(dim=0)
            lost[:needed] += (shared.energy(M, A) - explained_energy).clamp(min=0).cpu().numpy()
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
        H, weighed = shared.least_squares(M, A, V)
        return (H,), (weighed * H).sum()

    def improve(self, M: Tensor, A: Tensor | None, V: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Some steps of conjugate gradients."""
        assert A is not None
        return shared.orthonormal(shared.better_projection(M, A, others[0], V))
