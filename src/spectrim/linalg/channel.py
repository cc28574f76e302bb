"""Two factors through a narrower space, in closed form: the linear form, and the channel form of convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from spectrim.linalg.problem import Decomposition, Factors, Problem, Ranks
from spectrim.linalg.spectra import FloatArray, Spectrum, over_groups


@dataclass(frozen=True, eq=False)
class ChannelDecomposition(Decomposition):
    """Orthonormal bases of a weight's output space, best direction first: every rank is a prefix of them.

    Attributes:
        problem: What is approximated.
        basis: float64 (groups, out, k), k = min(out, in); each group's weight lies in its span, so that rank k loses
            nothing.
        spectrum: The values that belong to the k directions.
    """

    problem: Problem
    basis: Tensor
    spectrum: Spectrum

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """(min(out, in * places),) of a weight (groups, out, in, *kernel)."""
        return (min(shape[1], prod(shape[2:])),)

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """The best basis for every rank at once; `near` is not needed.

        Plain metric: the left singular vectors (Eckart & Young 1936). In a metric: the eigenvectors U of W C W^T, for
        which A = U_r, B = U_r^T W minimise the mean of |W x - A B x|^2, no inverse needed (activation-aware SVD;
        Yuan 2023, Wang 2024). Directions in which the outputs do not vary leave U undetermined; they follow in the
        order of the plain metric, so that singular covariances, constant inputs or a single sample still give
        sensible factors.
        """
        if problem.covariance is None:
            basis, values, _ = torch.linalg.svd(problem.matrices, full_matrices=False)
            return cls(problem, basis, over_groups(values))
        each = zip(problem.matrices, problem.metric, strict=True)
        solved = [_metric_basis(weight, metric, tolerance=problem.rounding_tolerance) for weight, metric in each]
        bases, values = (torch.stack(parts) for parts in zip(*solved, strict=True))
        return cls(problem, bases, over_groups(values))

    @property
    def tails(self) -> FloatArray:
        """Energy lost at rank 1..k."""
        return self.spectrum.tail_energy

    def factors(self, ranks: Ranks) -> Factors:
        """(down, up), (groups, rank, in, *kernel) and (groups, out, rank), with up @ down = U_r U_r^T W."""
        up = self.basis[:, :, : ranks[0]]
        down = up.mT @ self.problem.matrices
        groups, _, *sizes = self.problem.weight.shape
        return down.reshape(groups, ranks[0], *sizes), self.problem.unweighted(up)


def _metric_basis(W: Tensor, C: Tensor, *, tolerance: float) -> tuple[Tensor, Tensor]:
    out_features, in_features = W.shape
    Q, R = torch.linalg.qr(W) if out_features > in_features else (None, W)
    RCR = R @ C @ R.T
    variances, vectors = torch.linalg.eigh((RCR + RCR.T) / 2)
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    seen = int((variances > tolerance * variances[0]).sum())
    if seen < len(variances):
        # the unseen directions turn to the principal axes of what the weight has left in them
        rest = vectors[:, seen:]
        axes, _, _ = torch.linalg.svd(rest.T @ R, full_matrices=True)
        vectors = torch.cat([vectors[:, :seen], rest @ axes], dim=1)
        # Rotating the unseen directions among themselves leaves their total variance: it is rounding, spread evenly.
        variances[seen:] = variances[seen:].mean()
    return vectors if Q is None else Q @ vectors, variances.sqrt()
