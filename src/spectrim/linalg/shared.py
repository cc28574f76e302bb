"""One projection shared by several places of a kernel, fitted in a metric by alternating least squares.

A weight W (out, P, Q) is to become H (V kron I_Q): V (r, P) is applied at each of the Q places alike, and H (out, r, Q)
gathers them. With Q the columns of a kernel this is the spatial form; with Q all of its places it is the first step of
Tucker-2. The metric A (P Q, P Q) is the covariance of the inputs; None is the identity, where all of this is in closed
form. Everything is for one group, in float64.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from spectrim.linalg.covariance import MOST_DOUBLE_INPUTS, dense_of
from spectrim.linalg.problem import Decomposition, Factors, Problem, Ranks, rooted
from spectrim.linalg.products import matmul, times_rounded
from spectrim.linalg.spectra import to_float64

_SWEEPS = 4
_SLOW, _NEAR = 1e-2, 8
WIDE = 1024
"""Inputs of a kernel above which the iterations are fewer."""


@dataclass(frozen=True, eq=False)
class SharedProjection(Decomposition):
    """A nested start for every rank, from which the factors of given ranks are fitted.

    Attributes:
        problem: What is approximated; weight (groups, out, in, *kernel).
        basis: float64 (groups, k, P), orthonormal rows, best first; k = min(P, out * Q).
        first_shared: The first dimension of the weight that belongs to Q, not to P.
    """

    problem: Problem
    basis: Tensor
    first_shared: ClassVar[int]

    @classmethod
    def basis_bytes(cls, shape: Sequence[int], *, itemsize: int, rank: int | None = None) -> int:
        """The start."""
        P, Q = prod(shape[2 : cls.first_shared]), prod(shape[cls.first_shared :])
        return 8 * shape[0] * min(P, shape[1] * Q) * P

    @classmethod
    def working_bytes(cls, shape: Sequence[int], *, vectors: int | None, rank: int | None = None) -> int:
        """The metric with its floor and its Cholesky factor, and of one group T A, T A T^T and its factor."""
        groups, out, n = shape[0], shape[1], prod(shape[2:])
        P, Q = prod(shape[2 : cls.first_shared]), prod(shape[cls.first_shared :])
        rows = min(P, out * Q) * Q
        if vectors is None:
            return 8 * (2 * groups * out * n + 3 * out * rows + 5 * P * P)
        if vectors >= n > MOST_DOUBLE_INPUTS:
            products = 4 * (2 * groups * n * n + 2 * rows * n + rows * rows) + 16 * rows * rows
        else:
            products = 8 * (3 * groups * n * n + 2 * rows * n + 3 * rows * rows)
        return products + 8 * (3 * out * max(rows, n) + 5 * P * P)

    @property
    def start(self) -> Factors:
        """The basis, of which a fit takes the first rows."""
        return (self.basis,)

    @abstractmethod
    def fit(self, M: Tensor, A: Tensor | None, V: Tensor, rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The best other factors for a given V, and the energy that they explain."""

    @abstractmethod
    def improve(self, M: Tensor, A: Tensor | None, V: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """A V with a smaller error for given other factors."""

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """The start: the best projection for inputs that are independent from place to place.

        With factors of a problem that is nearly the same, the first of them is the start, up to its rank.
        """
        if near:
            return cls(problem, near[0].flatten(2))
        return cls(problem, torch.stack([nested_start(M, A) for M, A in cls.groups(problem)]))

    @classmethod
    def groups(cls, problem: Problem, *, inverted: bool = False) -> list[tuple[Tensor, Tensor | None]]:
        """The weight (out, P, Q) and the metric of each group; one with an inverse takes longer."""
        shape = problem.weight.shape
        weights = to_float64(problem.matrices).reshape(*shape[:2], -1, prod(shape[cls.first_shared :]))
        if inverted or problem.covariance is None:
            return list(zip(weights, problem.metrics, strict=True))
        return list(zip(weights, dense_of(problem.shrunk_covariance), strict=True))

    def fitted(self, ranks: Ranks, *, sweeps: int | None) -> list[Tensor]:
        """V and the other factors, each (groups, ..), after at most so many sweeps of alternating least squares.

        A sweep improves V and fits the others anew. It ends earlier once a sweep lessens the error by less than a
        hundredth. By default 4 sweeps, and of a wide metric 1.
        """
        starts = zip(self.groups(self.problem, inverted=True), self.basis, strict=True)
        each = [self._alternate(M, A, start[: ranks[0]], ranks[-1], sweeps) for (M, A), start in starts]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def _alternate(self, M: Tensor, A: Tensor | None, V: Tensor, rank: int, sweeps: int | None) -> tuple[Tensor, ...]:
        is_wide = A is not None and len(A) > WIDE
        sweeps = (1 if is_wide else _SWEEPS) if sweeps is None else sweeps
        others, explained = self.fit(M, A, V, rank)
        whole = energy(M, A) if sweeps > 1 else explained
        remaining = float("inf")
        for _ in range(sweeps):
            before, remaining = remaining, float(whole - explained)
            if remaining > (1 - _SLOW) * before:
                break
            V = self.improve(M, A, V, others)
            others, explained = self.fit(M, A, V, rank)
        return V, *others


def top_rows(M: Tensor) -> Tensor:
    """Rows whose first r are the best V for every r in the plain metric, orthonormal, (min(P, out Q), P).

    The right singular vectors of all M_q above each other.
    """
    out, P, Q = M.shape
    rows = M.permute(0, 2, 1).reshape(out * Q, P)
    if len(rows) < P:
        return cast(Tensor, torch.linalg.svd(rows, full_matrices=False)[2])
    # all directions are there, so nothing is lost by squaring but the order of the last ones
    return cast(Tensor, torch.linalg.eigh(rows.T @ rows)[1].flip(1).T)


def nested_start(M: Tensor, A: Tensor | None) -> Tensor:
    """Rows whose first r are a good V for every r, orthonormal, (min(P, out Q), P).

    The eigenvectors of L^T (sum_q M_q^T M_q) L brought back by L^-1, with L L^T the metric summed over the places.
    """
    if A is None:
        return top_rows(M)
    _, P, Q = M.shape
    S = to_float64(A.reshape(P, Q, P, Q).diagonal(dim1=1, dim2=3).sum(dim=-1))
    ((L,),) = rooted(((S + S.T) / 2).unsqueeze(0))[1:]
    return orthonormal(torch.linalg.solve_triangular(L, top_rows(_applied(L.T, M)), upper=False, left=False))


def projected(V: Tensor, A: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """T A, (r Q, P Q), and T A T^T, (r Q, r Q), for T = V kron I_Q."""
    r, P = V.shape
    TA = matmul(V, A.reshape(P, -1)).reshape(r * Q, P * Q)
    # one large product: batched over r Q small ones it is ten times slower
    columns = matmul(TA.reshape(r * Q, P, Q).transpose(1, 2).reshape(-1, P), V.T)
    TAT = columns.reshape(r * Q, Q, r).transpose(1, 2).reshape(r * Q, r * Q)
    del columns  # as large as the metric
    return TA, (TAT + TAT.T).div_(2)


def _applied(V: Tensor, M: Tensor) -> Tensor:
    """V M_q for every place q, (out, r, Q): one large product, where a batched one is ten times slower."""
    return torch.einsum("rp,opq->orq", V, M)


def least_squares(M: Tensor, A: Tensor | None, V: Tensor) -> tuple[Tensor, Tensor]:
    """The H (out, r Q) that minimises the error for a given V, and H T A T^T.

    Written as a correction of M T^T, so that it is exact where V already spans everything, however ill A may be.
    """
    out, _, Q = M.shape
    H = _applied(V, M).reshape(out, -1)
    if A is None:
        return H, H
    TA, TAT = projected(V.to(A.dtype), A, Q)
    rest, TAT = M - _applied(V.T, H.reshape(out, -1, Q)), TAT.to(V.dtype)
    H = H + solver(TAT)(times_rounded(rest.reshape(out, -1), TA.T).T).T
    return H, H @ TAT


def explained_by(M: Tensor, A: Tensor | None, V: Tensor, *, rounding: float) -> Tensor:
    """Rows (r Q, out) whose squares add up to the energy that the first rows of T explain, for every number at once.

    Directions in which the inputs vary by less than `rounding` of what is usual explain next to nothing.
    """
    if A is None:
        return _applied(V, M).permute(1, 2, 0).reshape(-1, len(M))
    TA, TAT = projected(V.to(A.dtype), A, M.shape[2])
    share, goal = max(rounding, 10 * torch.finfo(A.dtype).eps), times_rounded(M.flatten(1), TA.T).T
    del TA  # as large as the metric
    ((factor,),) = rooted(TAT.unsqueeze(0), share=share)[1:]
    return cast(Tensor, torch.linalg.solve_triangular(factor, goal, upper=False))


def energy(M: Tensor, A: Tensor | None) -> Tensor:
    """The whole energy of M in the metric A."""
    if A is None:
        return M.square().sum()
    rows = M.flatten(1)
    return (times_rounded(rows, A) * rows).sum()


def better_projection(M: Tensor, A: Tensor, H: Tensor, V: Tensor, *, steps: int = 5) -> Tensor:
    """A V with a smaller error for a given H: conjugate gradients on the normal equations, from the V at hand.

    In the type of the metric: a direction need not be exact, since the H that follows is.
    """
    out, P, Q = M.shape
    r, kind = len(V), V.dtype
    # V is the same for any multiple of A, of which some leave the range of float32 in the products below
    exponent = torch.frexp(A.diagonal().mean()).exponent
    exponent = torch.where(exponent.abs() > _NEAR, -exponent, 0)
    rest = torch.ldexp(times_rounded((M - _applied(V.T, H.reshape(out, r, Q))).reshape(out, -1), A), exponent)
    weighed, H, V = (matrix.to(A.dtype) for matrix in (rest.reshape(out, P, Q), H, V))
    K = matmul(H.T, H).reshape(r, Q, r, Q).permute(0, 3, 1, 2).reshape(r, -1)
    places = H.reshape(out, r, Q).transpose(0, 1).reshape(r, -1)
    residual = matmul(places, weighed.transpose(1, 2).reshape(-1, P))
    columns = A.reshape(P, -1).T.clone(memory_format=torch.contiguous_format).ldexp_(exponent)
    solve_rows = solver(torch.einsum("rqqs->rs", K.reshape(r, Q, Q, r)))
    solve_columns = solver(columns.reshape(Q, P, Q, P).diagonal(dim1=0, dim2=2).sum(dim=-1))
    step, direction = torch.zeros_like(V), solve_columns(solve_rows(residual).T).T
    power = float((residual * direction).sum())
    for _ in range(steps):
        spread = matmul(columns, direction.T).reshape(Q, P, Q, r).transpose(0, 1)
        image = matmul(K, spread.reshape(P, -1).T)
        curvature = float((direction * image).sum())
        if power <= 0 or curvature <= 0:
            break
        step += (power / curvature) * direction
        residual = residual - (power / curvature) * image
        conditioned = solve_columns(solve_rows(residual).T).T
        before, power = power, float((residual * conditioned).sum())
        direction = conditioned + (power / before) * direction
    return (V + step).to(kind)


def orthonormal(V: Tensor) -> Tensor:
    """Rows with the same span."""
    return cast(Tensor, torch.linalg.qr(V.T)[0].T)


def solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Gives matrix^-1 times its argument; `matrix` is symmetric and positive semi-definite, perhaps singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return lambda right: torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    tolerance = max(1e-12, 10 * torch.finfo(matrix.dtype).eps)
    inverse = torch.where(values > tolerance * values[-1], 1 / values, torch.zeros_like(values))
    return lambda right: vectors @ (inverse.unsqueeze(1) * (vectors.T @ right))
