"""Two factors through a narrower space, in closed form: the linear form, and the channel form of convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Self

import torch
from torch import Tensor

from spectrim.linalg.covariance import Covariance, LowRankCovariance, inner, matrix_of
from spectrim.linalg.problem import Decomposition, Factors, Problem, Ranks, is_wide, rooted
from spectrim.linalg.spectra import FloatArray, Spectrum, over_groups, to_float64
from spectrim.linalg.subspace import leading_vectors


@dataclass(frozen=True, eq=False)
class ChannelDecomposition(Decomposition):
    """Orthonormal bases of a weight's output space, best direction first: every rank is a prefix of them.

    Of a wide weight, few ranks are found by themselves (block Krylov iteration), within 1e-4 of the least error.

    Attributes:
        problem: What is approximated.
    """

    problem: Problem
    _values: Spectrum | None = None
    _truncated: dict[int, tuple[Tensor, float] | None] = field(repr=False, default_factory=dict)

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(out, in * places),) of a weight (groups, out, in, *kernel)."""
        return (min(shape[1], prod(shape[2:])),)

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """The best basis for every rank, worked out when first asked for; `near` is not needed."""
        return cls(problem)

    @classmethod
    def of_values(cls, problem: Problem, values: Spectrum | None = None) -> Self:
        """What each rank loses and no factors: from the values, or from eigenvalues alone, a quarter of the time."""
        return cls(problem, _values_alone(problem) if values is None else values)

    @classmethod
    def basis_bytes(cls, shape: Sequence[int], *, itemsize: int, rank: int | None = None) -> int:
        """The basis, with as many columns as are asked for."""
        columns = rank if rank is not None and _is_truncated(shape, rank) else cls.full_ranks(shape)[0]
        return shape[0] * shape[1] * columns * (max(4, itemsize) if is_wide(shape) and columns != rank else 8)

    @classmethod
    def working_bytes(cls, shape: Sequence[int], *, vectors: int | None, rank: int | None = None) -> int:
        """The matrices, what `torch.linalg` copies of them, and C where it is a matrix."""
        groups, out, n = shape[0], shape[1], prod(shape[2:])
        full, whole = min(out, n), out * n
        is_matrix = vectors is not None and vectors >= n
        if rank is not None and _is_truncated(shape, rank) and not is_matrix:
            # the root in the metric as it is made, or a subspace of at most half of the space, and its Gram matrix
            root = 0 if vectors is None else 5 * whole // 2 + vectors * (2 * out + n)
            return 8 * max(root, full**2 + 5 * (full // 2) ** 2)
        if vectors is None and not is_wide(shape):
            return 8 * (groups * (whole + full * (out + n)) + 5 * full**2)
        # QR of a tall weight, the Gram matrix with eigenvectors and LAPACK's workspace of two more
        solved = whole + (whole + n * n if out > n else 0) + 6 * full**2
        if is_matrix:
            return 8 * ((groups + 1) * n * n + 2 * full * n + solved)
        return 8 * (solved + (vectors or 0) * (full + n))

    @property
    def basis(self) -> Tensor:
        """(groups, out, k), k = min(out, in); each group's weight lies in its span: rank k loses nothing.

        Float64, and of a wide weight in its own type, at least float32: these are as large as the weight, and kept.
        """
        return self._solved[0]

    @property
    def spectrum(self) -> Spectrum:
        """The values that belong to the k directions."""
        return self._solved[1] if self._values is None else self._values

    @property
    def tails(self) -> FloatArray:
        """Energy lost at rank 1..k."""
        return self.spectrum.tail_energy

    def tail_at(self, ranks: Ranks) -> float:
        """Energy lost at a rank: what the factors of this rank lose."""
        truncated = self._truncated_at(ranks[0])
        return super().tail_at(ranks) if truncated is None else max(0.0, self.problem.total - truncated[1])

    def factors(self, ranks: Ranks) -> Factors:
        """(down, up), (groups, rank, in, *kernel) and (groups, out, rank), with up @ down = U_r U_r^T W."""
        truncated = self._truncated_at(ranks[0])
        up = self.basis[:, :, : ranks[0]].double() if truncated is None else truncated[0]
        down = self.problem.times_matrices(up.mT)
        groups, _, *sizes = self.problem.weight.shape
        return down.reshape(groups, ranks[0], *sizes), self.problem.unweighted(up)

    @cached_property
    def _solved(self) -> tuple[Tensor, Spectrum]:
        """Basis and spectrum of all ranks.

        Plain metric: the left singular vectors (Eckart & Young 1936). In a metric: the eigenvectors U of W C W^T, for
        which A = U_r, B = U_r^T W minimise the mean of |W x - A B x|^2, no inverse needed (activation-aware SVD;
        Yuan 2023, Wang 2024). Directions in which the outputs do not vary leave U undetermined; they follow in the
        order of the plain metric, so that singular covariances, constant inputs or a single sample still give
        sensible factors.
        """
        problem = self.problem
        if problem.covariance is None:
            bases, values = _left_vectors(to_float64(problem.matrices), wide=problem.is_wide)
            return bases.to(self._basis_type), over_groups(values)
        C, matrices = problem.shrunk_covariance, problem.matrices
        if not isinstance(C, LowRankCovariance) or C.rows.dtype != matrices.dtype:
            matrices = to_float64(matrices)
        each = zip(matrices, C, strict=True)
        solved = [
            _metric_basis(weight, C, tolerance=problem.rounding_tolerance, wide=problem.is_wide) for weight, C in each
        ]
        bases, values = (torch.stack(parts) for parts in zip(*solved, strict=True))
        if problem.is_wide:  # for which the root times the weight would be worked out once more
            problem.__dict__.setdefault("total", float(values.square().sum()))
        return bases.to(self._basis_type), over_groups(values)

    def _truncated_at(self, rank: int) -> tuple[Tensor, float] | None:
        """The first columns of the bases, (groups, out, rank), and their energy; None where all are to be worked out.

        So they are where they are known already, where the weight is not wide or the rank not small, and where the
        outputs do not vary in so many directions.
        """
        if self._values is not None or "_solved" in self.__dict__ or not _is_truncated(self._shape, rank):
            return None
        if rank not in self._truncated:
            self._truncated[rank] = _truncate(self.problem, rank)
        return self._truncated[rank]

    @property
    def _basis_type(self) -> torch.dtype:
        weight = self.problem.weight
        return torch.promote_types(weight.dtype, torch.float32) if self.problem.is_wide else torch.float64

    @property
    def _shape(self) -> torch.Size:
        return self.problem.weight.shape


def _is_truncated(shape: Sequence[int], rank: int) -> bool:
    """Whether the weight is wide, and the rank so small that it is worked out without the others."""
    return is_wide(shape) and 8 * rank <= ChannelDecomposition.full_ranks(shape)[0]


def _truncate(problem: Problem, rank: int) -> tuple[Tensor, float] | None:
    bases, whole = [], 0.0
    for M in problem.roots or ():
        basis = leading_vectors(M, rank)
        if basis is None:
            return None
        squares = torch.linalg.vector_norm(basis.mT @ M.double(), dim=1).square()
        if float(squares.min()) <= problem.rounding_tolerance * float(squares.max()):
            return None
        bases.append(basis)
        whole += float(squares.sum())
    return (torch.stack(bases), whole) if bases else None


def _values_alone(problem: Problem) -> Spectrum:
    """The spectrum without the basis."""
    if problem.covariance is None:
        grams = [_small_gram(W, None) for W in to_float64(problem.matrices)]
    else:
        grams = [
            _small_gram(W, C) for W, C in zip(to_float64(problem.matrices), problem.shrunk_covariance, strict=True)
        ]
    squares = torch.stack([torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0).clamp(min=0) for gram in grams])
    if problem.covariance is not None:
        unseen = squares <= problem.rounding_tolerance * squares[:, :1]  # rounding, spread evenly as in the basis
        mean = (squares * unseen).sum(dim=1, keepdim=True) / unseen.sum(dim=1, keepdim=True).clamp(min=1)
        squares = torch.where(unseen, mean, squares)
    return over_groups(squares.sqrt())


def _small_gram(W: Tensor, C: Covariance | None) -> Tensor:
    """A matrix with the eigenvalues of W C W^T that can differ from 0, and a few zeros."""
    if W.shape[0] <= W.shape[1]:
        return W @ W.mT if C is None else inner(W, C)
    gram = W.mT @ W
    if C is None:
        return gram
    matrix = matrix_of(C)
    ((root,),) = rooted(matrix.unsqueeze(0))[1:]
    product: Tensor = root.mT @ gram @ root
    return product


def _left_vectors(W: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of (.., out, in).

    Of a wide one with more inputs by its Gram matrix, a sixth of the time and a third of the memory: what is below
    1e-8 of the largest value is rounding, as it is in weights of float32.
    """
    if not wide:
        vectors, values, _ = torch.linalg.svd(W, full_matrices=False)
        return vectors, values
    if W.shape[-2] > W.shape[-1]:
        Q, R = torch.linalg.qr(W)
        vectors, values = _left_vectors(R, wide=True)
        return Q @ vectors, values
    values, vectors = torch.linalg.eigh(W @ W.mT)
    return vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt()


def _metric_basis(W: Tensor, C: Covariance, *, tolerance: float, wide: bool) -> tuple[Tensor, Tensor]:
    out_features, in_features = W.shape
    Q, R = torch.linalg.qr(to_float64(W)) if out_features > in_features else (None, W)
    RCR = inner(R, C)
    variances, vectors = torch.linalg.eigh((RCR + RCR.T) / 2)
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    seen = int((variances > tolerance * variances[0]).sum())
    if seen < len(variances):
        # the unseen directions turn to the principal axes of what the weight has left in them
        rest = vectors[:, seen:]
        axes, _ = _left_vectors(rest.T @ to_float64(R), wide=wide)
        vectors = torch.cat([vectors[:, :seen], rest @ axes], dim=1)
        # Rotating the unseen directions among themselves leaves their total variance: it is rounding, spread evenly.
        variances[seen:] = variances[seen:].mean()
    return vectors if Q is None else Q @ vectors, variances.sqrt()
