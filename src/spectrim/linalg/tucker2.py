"""The tucker2 form: fewer channels in, the kernel between few channels, then out (Kim 2016), fitted in the metric."""

from collections.abc import Sequence
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.linalg import shared
from spectrim.linalg.problem import Factors, Ranks
from spectrim.linalg.spectra import FloatArray

_GRID = 64


class Tucker2Decomposition(shared.SharedProjection):
    """V takes the input channels, (rank_in, in); a core and a last factor follow."""

    first_shared = 3

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(in, out * places), min(out, in * places))."""
        _, out, into, *kernel = shape
        return min(into, out * prod(kernel)), min(out, into * prod(kernel))

    @classmethod
    def rank_grid(cls, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ranks of `tails`, (n, 2): every pair of an input rank and an output rank, of each at most about 64."""
        return np.array(list(product(*map(_spread, cls.full_ranks(shape)))), dtype=np.int64)

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at each pair of ranks of `rank_grid`, (n,), before `factors` improves on the start."""
        into, out = map(_spread, self.full_ranks(self.problem.weight.shape))
        lost = np.zeros((len(into), len(out)))
        for (M, A), V in zip(self.groups(self.problem), self.basis, strict=True):
            places = M.shape[2]
            explained = shared.explained_by(M, A, V, rounding=self.problem.rounding_tolerance)
            total, gram, done = shared.energy(M, A), torch.zeros(len(M), len(M), dtype=M.dtype, device=M.device), 0
            for row, rank in enumerate(into):
                new = explained[done * places : int(rank) * places]
                gram, done = gram + new.T @ new, int(rank)
                explained_energy = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(dim=0)
                lost[row] += (total - explained_energy).clamp(min=0).cpu().numpy()[out - 1]
        return lost.reshape(-1)

    def factors(self, ranks: Ranks, *, sweeps: int | None = None) -> Factors:
        """(first, core, last): (groups, rank_in, in, 1, ..), (groups, rank, rank_in, *kernel), (groups, out, rank)."""
        groups, _, into, *kernel = self.problem.weight.shape
        rank_in, rank = ranks
        first, core, last = self.fitted(ranks, sweeps=sweeps)
        return (
            first.reshape(groups, rank_in, into, *[1] * len(kernel)),
            core.reshape(groups, rank, rank_in, *kernel),
            self.problem.unweighted(last),
        )

    def fit(self, M: Tensor, A: Tensor | None, V: Tensor, rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The core (rank, rank_in * places) and the last factor (out, rank).

        Least squares, then the channel form's closed solution in the metric that V leaves.
        """
        H, weighed = shared.least_squares(M, A, V)
        gram = weighed @ H.T
        if rank == len(H):
            return (H, torch.eye(rank, dtype=H.dtype, device=H.device)), gram.trace()
        values, vectors = torch.linalg.eigh(gram)
        last = vectors.flip(1)[:, :rank]
        return (last.T @ H, last), values[-rank:].sum()

    def improve(self, M: Tensor, A: Tensor | None, V: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Some steps of conjugate gradients.

        In the plain metric the best V for the last factor: a step of higher-order orthogonal iteration (De Lathauwer
        2000).
        """
        core, last = others
        if A is not None:
            return shared.orthonormal(shared.better_projection(M, A, last @ core, V))
        best = shared.top_rows((last.T @ M.flatten(1)).reshape(-1, *M.shape[1:]))
        # few outputs span few directions, and what fills them up does not matter
        return best[: len(V)] if len(best) >= len(V) else shared.orthonormal(torch.cat([best, V]))[: len(V)]


def _spread(full: int) -> npt.NDArray[np.int64]:
    """1..full if these are few, else about 64 multiples of a power of two, and `full` itself."""
    step = 1
    while full > _GRID * step:
        step *= 2
    return np.unique([*range(step, full + 1, step), full]).astype(np.int64)
