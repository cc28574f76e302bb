"""The best rank-D approximation of a matrix that changes a little at a time, each from the last one's subspace."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spectrim.core.errors import ModelError
from spectrim.linalg.shared import orthonormal

_OVERSAMPLING = 10
_ROUNDS = 8
# of the energy lost above the least possible, as a share of that: half as much of the error, and a margin of 4
_TOLERANCE = 5e-5


@dataclass(frozen=True, eq=False)
class Truncated:
    """A matrix of rank D as `left_factor @ right_factor.mT`.

    Attributes:
        left_factor: (out, rank), of the matrix's type.
        right_factor: (in, rank); one of the two has orthonormal columns.
        basis: (min(out, in), n) orthonormal columns to start from after the next change; n is 0 where a full
            decomposition is always as fast.
        decomposed: Whether this took a full decomposition.
    """

    left_factor: Tensor
    right_factor: Tensor
    basis: Tensor
    decomposed: bool

    @property
    def matrix(self) -> Tensor:
        """W_D, (out, in)."""
        # as rows without gaps the product takes two thirds of the time
        return self.left_factor.contiguous() @ self.right_factor.contiguous().mT


def truncate_exactly(W: Tensor, rank: int) -> Truncated:
    """The best approximation of W (out, in) of rank `rank`, from `torch.linalg.svd` (Eckart & Young 1936).

    Raises:
        ModelError: NaN or infinite entries.
    """
    _energy(W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Truncated(U[:, :rank] * S[:rank], Vh[:rank].mT, W.new_empty(min(W.shape), 0), decomposed=True)


def truncate(W: Tensor, rank: int, *, basis: Tensor | None = None) -> Truncated:
    """The best approximation of W of rank `rank`, within 1e-4 of the least error |W - W_D|_F that there is.

    Block Krylov iteration (Halko 2011, Musco & Musco 2015) on W^T W, or W W^T if that is smaller, from the basis of the
    last call: the Ritz vectors of the span of V and W^T W V. Their residual says how much energy the subspace misses at
    most; while that is too much another round follows, and after a few a full decomposition. An error below rounding
    (2 roots of the type's epsilon, relative to W) counts as this size.

    Args:
        W: (out, in), float32 or float64, without gradient.
        rank: D, 1 to min(out, in).
        basis: `Truncated.basis` of the last call; None to start with a full decomposition.

    Raises:
        ModelError: NaN or infinite entries.
    """
    energy = _energy(W)
    # A is tall, so that the basis lives on the shorter side
    A = W if W.shape[0] >= W.shape[1] else W.mT
    # no basis where twice as many columns would be half of the space or more: a full decomposition is as fast
    size = rank + _OVERSAMPLING if 4 * (rank + _OVERSAMPLING) <= A.shape[1] else 0
    warm = _iterated(A, basis, rank, energy=energy) if basis is not None and basis.shape[1] == size > 0 else None
    if warm is None:
        wide = A.double()
        V = torch.linalg.eigh(wide.mT @ wide)[1].flip(1)[:, : max(size, rank)].to(A.dtype)
        B = A @ V
    else:
        V, B = warm
    factors = (B, V) if A is W else (V, B)
    return Truncated(factors[0][:, :rank], factors[1][:, :rank], V[:, :size].contiguous(), decomposed=warm is None)


def leading_vectors(W: Tensor, rank: int) -> Tensor | None:
    """Orthonormal columns (out, rank), float64: the leading left singular vectors of W (out, in).

    What they miss of the energy is within 1e-4 of the least possible, as in `truncate`. Block Lanczos with all blocks
    kept (Golub & Underwood 1977, Musco & Musco 2015), from random vectors; None where the subspace outgrows half of
    the space before that, and a full decomposition is about as fast.

    Raises:
        ModelError: NaN or infinite entries.
    """
    energy = _energy(W)
    A = W if W.shape[0] >= W.shape[1] else W.mT
    size = rank + _OVERSAMPLING
    if 8 * size > A.shape[1]:
        return cast(Tensor, torch.linalg.svd(W.double(), full_matrices=False)[0])[:, :rank]
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(A.shape[1], size, generator=draw, dtype=torch.float64).to(A.device)
    V, gram, step = block[:, :0], block[:0, :0], 0
    while 2 * (V.shape[1] + size) <= A.shape[1]:
        block, step = _orthonormal(block, outside=V if step else None), step + 1
        V, block = torch.cat([V, block], dim=1), _times_transposed(A, _times(A, block))
        columns = V.mT @ block
        gram = torch.cat([torch.cat([gram, columns[:-size].mT]), columns], dim=1)
        block = block - V @ columns
        if step % 3:
            continue
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)[:, :rank]
        missed = _missed(torch.linalg.vector_norm(block @ vectors[-size:], dim=0), values[:size], rank)
        if missed <= _TOLERANCE * max(energy - float(values[:rank].sum()), 4 * torch.finfo(A.dtype).eps * energy):
            # V has its columns in the space of W's outputs, or A V does
            right = V @ vectors
            return orthonormal((_times(A, right).double() if A is W else right).mT).mT
    return None


def _energy(W: Tensor) -> float:
    """|W|_F^2; rows in the matrix's own type, their sum in float64."""
    energy = float(torch.linalg.vector_norm(W, dim=1).double().square().sum())
    if not math.isfinite(energy):
        raise ModelError(f"the {W.shape[0]} x {W.shape[1]} weight has NaN or infinite entries, so it has no best rank")
    return energy


def _iterated(A: Tensor, V: Tensor, rank: int, *, energy: float) -> tuple[Tensor, Tensor] | None:
    """The k leading right singular vectors V (n, k) of A (m, n), and A V, from the basis V of a matrix near A.

    None when that does not find them.
    """
    size = V.shape[1]
    # the last column shows directions that are orthogonal to the basis: a fixed vector without any structure
    probe = torch.randn(len(V), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    V = _orthonormal(torch.cat([V[:, :-1].double(), probe.to(V.device)], dim=1))
    B = _times(A, V)
    Z = _times_transposed(A, B)
    floor = 4 * torch.finfo(A.dtype).eps * energy
    for _ in range(_ROUNDS):
        # all products with A in its own type, all algebra of the few columns in float64
        beyond = Z - V @ (V.mT @ Z)
        # of the oversampling only the last, which is the probe at first: the others follow as they are
        outside = torch.cat([beyond[:, :rank], beyond[:, -1:]], dim=1)
        U = _orthonormal(outside, outside=V)
        both = torch.cat([B, _times(A, U)], dim=1).double()
        values, vectors = torch.linalg.eigh(both.mT @ both)
        values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
        top_vectors = vectors[:, :rank]
        # A^T A times a Ritz vector leaves the span in two ways: by the columns left out above, which are known, and by
        # what U brings, of which A^T has yet to be taken
        rest = beyond[:, rank:-1]
        rest = (rest - U @ (U.mT @ rest)) @ top_vectors[rank : size - 1]
        brought = torch.linalg.vector_norm(both[:, size:] @ top_vectors[size:], dim=0)
        V = torch.cat([V, U], dim=1) @ vectors
        B = (both @ vectors).to(A.dtype)
        enough = _TOLERANCE * max(energy - float(values[:rank].sum()), floor)
        at_most = torch.linalg.vector_norm(rest, dim=0) + brought * _outside(values, rank).clamp(min=0).sqrt()
        if _missed(at_most, values, rank) <= enough:
            return V.to(A.dtype), B
        Z = _times_transposed(A, B)
        residual = torch.linalg.vector_norm(Z[:, :rank] - V[:, :rank] * values[:rank], dim=0)
        if _missed(residual, values, rank) <= enough:
            return V.to(A.dtype), B
    return None


def _times(A: Tensor, V: Tensor) -> Tensor:
    """A V in A's type; the transposes are the faster order for a few columns, by a third."""
    return (V.to(A.dtype).mT @ A.mT).mT


def _times_transposed(A: Tensor, B: Tensor) -> Tensor:
    """A^T B in float64; the transposes are the faster order for row-major A."""
    return (B.mT @ A).mT.double()


def _outside(values: Tensor, rank: int) -> Tensor:
    """About where the spectrum outside the subspace ends: a Ritz value half way into the oversampling.

    The last Ritz value would be too optimistic: in a cluster of values it converges late.
    """
    return values[(rank + len(values)) // 2]


def _missed(residual: Tensor, values: Tensor, rank: int) -> float:
    """Energy that the first `rank` Ritz vectors may miss, from the norms (rank,) of A^T A v - t v.

    A residual of norm p couples a Ritz value t to what is outside the subspace, whose spectrum ends near some s: the
    eigenvalue of [[t, p], [p, s]] lies above t by less than p^2 / (t - s), and by at most p.
    """
    half = (values[:rank] - _outside(values, rank)) / 2
    return float((torch.hypot(half, residual) - half).sum())


def _orthonormal(block: Tensor, *, outside: Tensor | None = None) -> Tensor:
    """Orthonormal columns with the span of `block` (n, k), float64, and orthogonal to `outside`, if given.

    By the Cholesky factor of the Gram matrix, again where one pass leaves rounding, and by Householder's QR where
    columns are nearly dependent, as they are when little is left outside.
    """
    columns: Tensor | None = block
    for _ in range(2):
        columns = None if columns is None else _cholesky_qr(columns)
        if columns is None or outside is None:
            break
        overlap = outside.mT @ columns
        if float(overlap.abs().max()) < 1e-10:
            break
        columns = columns - outside @ overlap
    if columns is not None:
        return columns
    if outside is None:
        return orthonormal(block.mT).mT
    scaled = block / torch.linalg.vector_norm(block, dim=0).clamp(min=1e-300)
    return orthonormal(torch.cat([outside, scaled], dim=1).mT).mT[:, outside.shape[1] :]


def _cholesky_qr(block: Tensor) -> Tensor | None:
    """Orthonormal to about 1e-10, or None where the columns are too near to dependent for that."""
    gram = block.mT @ block
    scale = gram.diagonal().clamp(min=1e-300).rsqrt()
    L, failed = torch.linalg.cholesky_ex(gram * scale * scale.unsqueeze(1))
    if int(failed) > 0 or float(L.diagonal().min()) < 1e-3:
        return None
    inverse: Tensor = torch.linalg.solve_triangular(L, torch.diag(scale), upper=False)
    return block @ inverse.mT
