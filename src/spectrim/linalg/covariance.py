"""Covariances: as a matrix, or of fewer samples than inputs as the product of their rows, which is never formed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectrim.linalg.products import gram, in_range, times_rounded
from spectrim.linalg.spectra import to_float64

MOST_DOUBLE_INPUTS = 2048
"""Inputs of a layer up to which statistics are in float64; of more they are in float32, and of few vectors these."""


@dataclass(frozen=True, eq=False)
class LowRankCovariance:
    """F^T F + D with D diagonal, (groups, n, n), or of one group (n, n).

    Attributes:
        rows: F, (groups, m, n), float32 or float64: m centred vectors, divided by the root of their number.
        ridge: The diagonal of D, float64 (groups, n), or (groups, 1) where all of it is equal.
    """

    rows: Tensor
    ridge: Tensor

    def __iter__(self) -> Iterator["LowRankCovariance"]:
        """That of each group."""
        return map(LowRankCovariance, self.rows, self.ridge)

    @property
    def matrix(self) -> Tensor:
        """The matrix itself, float64."""
        product = gram(to_float64(self.rows))
        product.diagonal(dim1=-2, dim2=-1).add_(self.ridge.to(product.device))
        return product

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return *self.rows.shape[:-2], self.rows.shape[-1], self.rows.shape[-1]

    def lifted(self, by: Tensor) -> "LowRankCovariance":
        """With `by`, (groups, n), added to the diagonals."""
        return replace(self, ridge=self.ridge + by.to(self.ridge.device))

    @property
    def variances(self) -> Tensor:
        """The diagonal, float64 (groups, n), or (n,)."""
        seen: Tensor = torch.linalg.vector_norm(self.rows, dim=-2, dtype=torch.float64).square()
        return seen + self.ridge.to(seen.device)

    def to(self, device: torch.device) -> "LowRankCovariance":
        """On another device."""
        return LowRankCovariance(self.rows.to(device), self.ridge.to(device))


@dataclass(frozen=True, eq=False)
class DiagonalCovariance:
    """A diagonal matrix, (groups, n, n), or of one group (n, n).

    Attributes:
        variances: Float64 (groups, n).
    """

    variances: Tensor

    def __iter__(self) -> Iterator["DiagonalCovariance"]:
        """That of each group."""
        return map(DiagonalCovariance, self.variances)

    @property
    def matrix(self) -> Tensor:
        """The matrix itself."""
        return torch.diag_embed(self.variances)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return *self.variances.shape, self.variances.shape[-1]

    def lifted(self, by: Tensor) -> "DiagonalCovariance":
        """With `by`, (groups, n), added to the diagonals."""
        return DiagonalCovariance(self.variances + by.to(self.variances.device))

    def to(self, device: torch.device) -> "DiagonalCovariance":
        """On another device."""
        return DiagonalCovariance(self.variances.to(device))


Covariance = Tensor | LowRankCovariance | DiagonalCovariance
"""(groups, n, n), symmetric and positive semi-definite up to rounding."""


def matrix_of(C: Covariance) -> Tensor:
    """As a matrix in float64."""
    return to_float64(dense_of(C))


def dense_of(C: Covariance) -> Tensor:
    """As a matrix; in float32 where it is held as one in float32."""
    return C if isinstance(C, Tensor) else C.matrix


def variances_of(C: Covariance) -> Tensor:
    """The diagonal, float64 (groups, n)."""
    return to_float64(C.diagonal(dim1=-2, dim2=-1)).clamp(min=0) if isinstance(C, Tensor) else C.variances


def mean_variance(C: Covariance) -> Tensor:
    """The trace divided by n, float64 (groups,)."""
    return variances_of(C).mean(dim=-1)


def typical_variance(variances: Tensor) -> Tensor:
    """The square of the mean standard deviation, which few large ones do not decide; 1 where it is 0; (groups, 1)."""
    typical = variances.sqrt().mean(dim=-1, keepdim=True).square()
    return torch.where(typical > 0, typical, torch.ones_like(typical))


def square_of(C: Covariance) -> float:
    """The squared Frobenius norm of all groups together."""
    if isinstance(C, Tensor):
        return float(torch.linalg.vector_norm(C, dtype=torch.float64)) ** 2
    if isinstance(C, DiagonalCovariance):
        return float(C.variances.square().sum())
    gram, ridge = to_float64(C.rows @ C.rows.mT), C.ridge.to(C.rows.device)
    # |F^T F|^2, and of what D adds to the diagonal v of it: (v + D)^2 - v^2
    return float(gram.square().sum() + (ridge * (2 * C.variances - ridge)).sum())


def square_around(C: Covariance, v: Tensor) -> float:
    """The squared Frobenius norm of C + v v^T, v (groups, n), which is not formed."""
    row = v.unsqueeze(1)
    return square_of(C) + float((2 * (times(row, C) * row).sum(dim=(1, 2)) + v.square().sum(dim=1).square()).sum())


def shrunk(C: Covariance, share: float) -> Covariance:
    """C with a share of it exchanged for its diagonal, and that share of the diagonal for a typical variance.

    So a few inputs of large variance, as language models have them, do not hide the others. Of a diagonal matrix, of
    shares, it is exchanged for their mean.
    """
    if not share:
        return C
    own = variances_of(C)
    if isinstance(C, DiagonalCovariance):
        mean = own.mean(dim=-1, keepdim=True)
        return DiagonalCovariance(own * (1 - share)).lifted(share * torch.where(mean > 0, mean, torch.ones_like(mean)))
    by = share * ((1 - share) * own + share * typical_variance(own))
    if isinstance(C, LowRankCovariance):
        return LowRankCovariance(C.rows * (1 - share) ** 0.5, (1 - share) * C.ridge + by.to(C.ridge.device))
    part = C * (1 - share)
    part.diagonal(dim1=-2, dim2=-1).add_(by)
    return part


def times(M: Tensor, C: Covariance) -> Tensor:
    """M C in float64, of M (groups, k, n); of a matrix in float32 rounded as it is."""
    if isinstance(C, Tensor):
        return times_rounded(M, C)
    if isinstance(C, DiagonalCovariance):
        return M * C.variances.unsqueeze(-2)
    return times_rounded(times_rounded(M, C.rows.mT), C.rows).addcmul_(C.ridge.unsqueeze(-2).to(M), M)


def solver(C: LowRankCovariance | DiagonalCovariance) -> Callable[[Tensor], Tensor]:
    """Gives M C^-1 in float64, of M (groups, k, n); C is positive definite, with a ridge if it is of rows.

    That has the inverse of a matrix (m, m) inside (Woodbury 1950).
    """
    if isinstance(C, DiagonalCovariance):
        return lambda M: M / C.variances.unsqueeze(-2)
    rows, scale = to_float64(C.rows), C.ridge.sqrt().unsqueeze(-2)
    rows = rows / scale
    gram = rows @ rows.mT
    gram.diagonal(dim1=1, dim2=2).add_(1)
    root = torch.linalg.cholesky(gram)

    def solve(M: Tensor) -> Tensor:
        scaled = M / scale
        return scaled.sub_(torch.cholesky_solve((scaled @ rows.mT).mT, root).mT @ rows).div_(scale)

    return solve


def add_outer(C: Covariance, v: Tensor) -> Covariance:
    """C + v v^T, v (groups, n)."""
    if isinstance(C, Tensor):
        return C + (v.unsqueeze(2) * v.unsqueeze(1)).to(C.dtype)
    if isinstance(C, DiagonalCovariance):
        return C.matrix + v.unsqueeze(2) * v.unsqueeze(1)
    return replace(C, rows=torch.cat([C.rows, v.unsqueeze(1).to(C.rows)], dim=1))


def inner(M: Tensor, C: Covariance) -> Tensor:
    """M C M^T, float64 (groups, k, k)."""
    if not isinstance(C, LowRankCovariance):
        return times(M, C) @ M.mT
    seen = to_float64(times_rounded(M, C.rows.mT))
    product = seen @ seen.mT
    if bool(C.ridge.any()):
        rows, power = in_range(M * C.ridge.sqrt().unsqueeze(-2).to(M.dtype))
        product += to_float64(gram(rows.to(C.rows.dtype).mT)) * power**2
    return product


def add_covariances(parts: list[tuple[Covariance, float]]) -> Covariance:
    """The sum of covariances, each times its share; as rows if all of them are, and there are fewer than n."""
    diagonals = [C.variances * share for C, share in parts if isinstance(C, DiagonalCovariance)]
    if len(diagonals) == len(parts):
        return DiagonalCovariance(torch.stack(diagonals).sum(dim=0))
    rows = [C.rows * share**0.5 for C, share in parts if isinstance(C, LowRankCovariance)]
    if len(rows) == len(parts) and sum(part.shape[1] for part in rows) < rows[0].shape[2]:
        ridge = torch.stack([C.ridge * share for C, share in parts if isinstance(C, LowRankCovariance)]).sum(dim=0)
        return LowRankCovariance(torch.cat(rows, dim=1), ridge)
    return torch.stack([matrix_of(C) * share for C, share in parts]).sum(dim=0)
