"""A weight that reads only some of its inputs: which ones, and what it then has to be, in a metric."""

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

_ROUNDS, _CANDIDATES, _ROWS = 32, 4, 64


@dataclass(frozen=True, eq=False)
class SubsetDecomposition(Decomposition):
    """Inputs in the order in which they are worth reading: greedy forward selection, nested over the ranks.

    The input to take next is the one whose part that the others do not explain explains most of the outputs (orthogonal
    least squares; Chen, Billings & Luo 1989). Inputs are taken several at a time. Only weights of one group.

    Attributes:
        problem: What is approximated; weight (1, out, in).
        order: int64 (in,), best first.
        lost: Energy lost after each round, float64.
    """

    problem: Problem
    order: Tensor
    lost: FloatArray

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """All inputs."""
        return (shape[2],)

    @classmethod
    def rank_grid(cls, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """After each round."""
        step = _step(shape[2])
        return np.append(np.arange(step, shape[2], step, dtype=np.int64), shape[2])[:, None]

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """Select, as in the plain metric by the columns' norms; or take the inputs that the factors `near` read."""
        (W,), C = to_float64(problem.matrices), problem.full_metric
        step, n = _step(W.shape[1]), W.shape[1]
        if near:
            is_read = near[1][0].any(dim=0).to(torch.int8)
            return cls(problem, is_read.argsort(descending=True, stable=True), np.zeros(0))
        if problem.covariance is None:
            norms, columns = W.square().sum(dim=0).sort(descending=True)
            unread = norms.flip(0).cumsum(0).flip(0) - norms
            return cls(problem, columns, unread[step - 1 :: step].cpu().numpy())
        residual, products = C.clone(), W @ C
        energy, order, lost = float((products * W).sum()), list[int](), list[float]()
        least = 1e-9 * float(C.diagonal().max())
        free = torch.ones(n, dtype=torch.bool, device=C.device)
        while len(order) < n:
            batch = _next(residual, products, free, number=min(step, n - len(order)), least=least)
            free[batch] = False
            order += batch.tolist()
            among = residual[batch[:, None], batch]
            factor = torch.linalg.cholesky(among + least * torch.eye(len(among), dtype=C.dtype, device=C.device))
            explained = torch.cholesky_solve(residual[batch], factor)
            gained = torch.linalg.solve_triangular(factor, products[:, batch].mT, upper=False).square().sum()
            products.addmm_(products[:, batch], explained, alpha=-1)
            residual.addmm_(residual[:, batch], explained, alpha=-1)
            energy -= float(gained)
            lost.append(max(0.0, energy))
        return cls(problem, torch.tensor(order), np.array(lost))

    @classmethod
    def working_bytes(cls, shape: Sequence[int], *, vectors: int | None, rank: int | None = None) -> int:
        """The metric, what of it is not explained yet, and as much again twice; the same of the products."""
        _, out, n = shape
        return 8 * (4 * n * n + 4 * out * n)

    @cached_property
    def tails(self) -> FloatArray:
        """At full rank nothing is lost."""
        ranks = len(self.rank_grid(self.problem.weight.shape))
        return np.append(self.lost[: ranks - 1], 0.0)

    def factors(self, ranks: Ranks) -> Factors:
        """Which inputs are read, as rows that are 1 there, (1, rank, in), twice, and their weight, (1, out, rank)."""
        (W,), C = to_float64(self.problem.matrices), self.problem.full_metric
        inputs = self.order[: ranks[0]].sort().values.to(C.device)
        selection = torch.zeros(len(inputs), C.shape[0], dtype=C.dtype, device=C.device)
        selection[torch.arange(len(inputs)), inputs] = 1.0
        factor = torch.linalg.cholesky(C[inputs[:, None], inputs])
        weight = torch.cholesky_solve((W @ C[:, inputs]).mT, factor).mT
        return selection.unsqueeze(0), selection.unsqueeze(0), self.problem.unweighted(weight.unsqueeze(0))


def _step(inputs: int) -> int:
    """How many inputs are taken at a time: a power of two, so that there are 32 to 64 rounds or fewer."""
    return 1 << max(0, (inputs // _ROUNDS).bit_length() - 1)


def _next(residual: Tensor, products: Tensor, free: Tensor, *, number: int, least: float) -> Tensor:
    """The inputs that explain most, batch one after the other among those that explain most by themselves."""
    variances = residual.diagonal()
    # by blocks of rows, which stay in the processor's cache
    explained = torch.stack([part.square().sum(dim=0) for part in products.split(_ROWS)]).sum(dim=0)
    scores = torch.where(free & (variances > least), explained / variances.clamp(min=least), -1.0)
    scores = torch.where(free, scores, -2.0)
    few = scores.topk(min(_CANDIDATES * number, int(free.sum()))).indices
    if number == 1:
        return few[:1]
    P, places = products[:, few], list[int]()
    R, H = residual[few[:, None], few], P.mT @ P  # of the columns of P their squares alone count
    for _ in range(number):
        variances = R.diagonal()
        scores = torch.where(variances > least, H.diagonal() / variances.clamp(min=least), -1.0)
        scores[places] = -2.0
        best = int(scores.argmax())
        places.append(best)
        if float(R[best, best]) > least:
            row, square = R[best] / R[best, best], float(H[best, best])
            both = H[best] - square / 2 * row
            H.addr_(both, row, alpha=-1).addr_(row, both, alpha=-1)
            R.addr_(R[:, best].clone(), row, alpha=-1)
    return few[places]
