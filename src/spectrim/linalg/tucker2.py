"""The tucker2 form: fewer channels in, the kernel between few channels, then out (Kim 2016), fitted in the metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.linalg.problem import Factors, Problem, Ranks
from spectrim.linalg.shared import (
    Progress,
    better_projection,
    energy,
    explained_by,
    least_squares,
    most_sweeps,
    nested_start,
    orthonormal,
    top_rows,
)
from spectrim.linalg.spectra import FloatArray

_GRID = 64


@dataclass(frozen=True, eq=False)
class Tucker2Decomposition:
    """A nested basis of the input channels, from which the factors of any pair of ranks are fitted.

    Attributes:
        problem: What is approximated; weight (groups, out, in, *kernel).
        basis: float64 (groups, k, in), orthonormal rows, best first; k = min(in, out * places).
    """

    problem: Problem
    basis: Tensor

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(in, out * places), min(out, in * places))."""
        _, out, into, *kernel = shape
        return min(into, out * prod(kernel)), min(out, into * prod(kernel))

    @staticmethod
    def rank_grid(shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ranks of `tails`, (n, 2): every pair of an input rank and an output rank, of each at most about 64."""
        return np.array(list(product(*map(_spread, Tucker2Decomposition.full_ranks(shape)))), dtype=np.int64)

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """The start: the channel directions that matter if inputs at different kernel places were independent.

        With factors of a problem that is nearly the same, the first of them is the start, up to its rank.
        """
        if near:
            return cls(problem, near[0].flatten(2))
        return cls(problem, torch.stack([nested_start(M, A) for M, A in _each(problem)]))

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at each pair of ranks of `rank_grid`, (n,), before `factors` improves on the start."""
        into, out = map(_spread, self.full_ranks(self.problem.weight.shape))
        lost = np.zeros((len(into), len(out)))
        for (M, A), V in zip(_each(self.problem), self.basis, strict=True):
            places = M.shape[2]
            explained = explained_by(M, A, V)
            total, gram, done = energy(M, A), torch.zeros(len(M), len(M), dtype=M.dtype, device=M.device), 0
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
        fitted = [
            _fitted(M, A, start[:rank_in], rank, sweeps)
            for (M, A), start in zip(_each(self.problem), self.basis, strict=True)
        ]
        first, core, last = (torch.stack(parts) for parts in zip(*fitted, strict=True))
        return (
            first.reshape(groups, rank_in, into, *[1] * len(kernel)),
            core.reshape(groups, rank, rank_in, *kernel),
            self.problem.unweighted(last),
        )


def _spread(full: int) -> npt.NDArray[np.int64]:
    """1..full if these are few, else about 64 multiples of a power of two, and `full` itself."""
    step = 1
    while full > _GRID * step:
        step *= 2
    return np.unique([*range(step, full + 1, step), full]).astype(np.int64)


def _fitted(M: Tensor, A: Tensor | None, V: Tensor, rank: int, sweeps: int | None) -> tuple[Tensor, Tensor, Tensor]:
    core, last, explained = _core(M, A, V, rank)
    progress = Progress(energy(M, A))
    for _ in range(most_sweeps(A) if sweeps is None else sweeps):
        if progress.stalled(explained):
            break
        V = _better(M, A, V, core, last)
        core, last, explained = _core(M, A, V, rank)
    return V, core, last


def _better(M: Tensor, A: Tensor | None, V: Tensor, core: Tensor, last: Tensor) -> Tensor:
    """A V with a smaller error for a given core and last factor.

    In the plain metric the best one for that last factor: a step of higher-order orthogonal iteration (De Lathauwer
    2000).
    """
    if A is None:
        best = top_rows((last.T @ M.flatten(1)).reshape(-1, *M.shape[1:]))
        # few outputs span few directions, and what fills them up does not matter
        return best[: len(V)] if len(best) >= len(V) else orthonormal(torch.cat([best, V]))[: len(V)]
    return orthonormal(better_projection(M, A, last @ core, V))


def _core(M: Tensor, A: Tensor | None, V: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best core (rank, rank_in * places) and last factor (out, rank) for a given V, and the energy they explain.

    Least squares, then the channel form's closed solution in the metric that V leaves.
    """
    H, weighed = least_squares(M, A, V)
    gram = weighed @ H.T
    if rank == len(H):
        return H, torch.eye(rank, dtype=H.dtype, device=H.device), gram.trace()
    values, vectors = torch.linalg.eigh(gram)
    last = vectors.flip(1)[:, :rank]
    return last.T @ H, last, values[-rank:].sum()


def _each(problem: Problem) -> list[tuple[Tensor, Tensor | None]]:
    weights = problem.matrices.reshape(*problem.weight.shape[:3], -1)
    return list(zip(weights, problem.metrics, strict=True))
