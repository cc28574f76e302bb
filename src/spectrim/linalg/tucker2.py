"""The tucker2 form: fewer channels in, the kernel between few channels, then out (Kim 2016), fitted in the metric."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.linalg.problem import Factors, Problem, Ranks
from spectrim.linalg.shared import (
    Progress,
    best_gather,
    better_projection,
    energy,
    explained_by,
    leading,
    most_sweeps,
    nested_start,
    orthonormal,
)
from spectrim.linalg.spectra import FloatArray

_GRID = 64


@dataclass(frozen=True, eq=False)
class Tucker2Decomposition:
    """A nested basis of the input channels, from which the factors of any pair of ranks are fitted.

    Attributes:
        problem: What is approximated; weight (groups, out, in, *kernel).
        basis: float64 (groups, in, in), orthonormal rows, best first.
    """

    problem: Problem
    basis: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """The start: the channel directions that matter if inputs at different kernel places were independent."""
        return cls(problem, torch.stack([nested_start(M, A) for M, A in _each(problem)]))

    @cached_property
    def grid(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The input ranks and the output ranks of `tails`: all of them up to 64, then as many, evenly spaced."""
        return rank_grid(self.basis.shape[1]), rank_grid(self.problem.weight.shape[1])

    @cached_property
    def tails(self) -> FloatArray:
        """Energy lost at every pair of `grid`, (input ranks, output ranks), before `factors` improves on the start."""
        into, out = self.grid
        lost = np.zeros((len(into), len(out)))
        for (M, A), V in zip(_each(self.problem), self.basis, strict=True):
            places = M.shape[2]
            explained = explained_by(M, A, V)
            total, gram, done = energy(M, A), torch.zeros(len(M), len(M), dtype=M.dtype, device=M.device), 0
            for row, rank in enumerate(into):
                new = explained[done * places : int(rank) * places]
                gram, done = gram + new.T @ new, int(rank)
                kept = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(dim=0)
                lost[row] += (total - kept).clamp(min=0).cpu().numpy()[out - 1]
        return lost

    def factors(self, ranks: Ranks, *, sweeps: int | None = None) -> Factors:
        """(first, core, last): (groups, rank_in, in, 1, ..), (groups, rank, rank_in, *kernel), (groups, out, rank)."""
        groups, _, into, *kernel = self.problem.weight.shape
        rank_in, rank = ranks
        found = [
            _fitted(M, A, start[:rank_in], rank, sweeps)
            for (M, A), start in zip(_each(self.problem), self.basis, strict=True)
        ]
        first, core, last = (torch.stack(parts) for parts in zip(*found, strict=True))
        return (
            first.reshape(groups, rank_in, into, *[1] * len(kernel)),
            core.reshape(groups, rank, rank_in, *kernel),
            self.problem.unweighted(last),
        )


def rank_grid(full: int) -> npt.NDArray[np.int64]:
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
        best = leading((last.T @ M.flatten(1)).reshape(-1, *M.shape[1:]))
        # few outputs span few directions, and what fills them up does not matter
        return best[: len(V)] if len(best) >= len(V) else orthonormal(torch.cat([best, V]))[: len(V)]
    return orthonormal(better_projection(M, A, last @ core, V))


def _core(M: Tensor, A: Tensor | None, V: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best core (rank, rank_in * places) and last factor (out, rank) for a given V, and the energy they explain.

    Least squares, then the channel form's closed solution in the metric that V leaves.
    """
    H, weighed = best_gather(M, A, V)
    gram = weighed @ H.T
    if rank == len(H):
        return H, torch.eye(rank, dtype=H.dtype, device=H.device), gram.trace()
    values, vectors = torch.linalg.eigh(gram)
    last = vectors.flip(1)[:, :rank]
    return last.T @ H, last, values[-rank:].sum()


def _each(problem: Problem) -> list[tuple[Tensor, Tensor | None]]:
    weights = problem.matrices.reshape(*problem.weight.shape[:3], -1)
    return list(zip(weights, problem.metrics, strict=True))
