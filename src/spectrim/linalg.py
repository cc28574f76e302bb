"""Tensors in, tensors out: spectra, and the best low-rank bases in the plain and in a data metric.

All algebra is done in float64 whatever the weights' type, on the weights' device where it has float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one weight, largest first.

    In the plain metric these are the weight's own; in the activation metric, those of the weight times the square
    root of the input covariance, so that their squares add up to the variance of the layer's output. For a weight of
    several groups, entry j is the root of the sum of the squares of every group's j-th value, so that energies and
    errors are those of the same rank in every group.

    Attributes:
        values: float64 array (k,), non-negative, descending.
    """

    values: FloatArray

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def cumulative_energy(self) -> FloatArray:
        """Share of the energy held by the first 1..k values, (k,); all ones when there is no energy at all."""
        squares = self.values**2
        total = squares.sum()
        shares: FloatArray = np.cumsum(squares) / total if total > 0 else np.ones_like(squares)
        return np.minimum(shares, 1.0)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised values (Roy & Vetterli 2007); 0 for a zero weight."""
        total = self.values.sum()
        if total <= 0:
            return 0.0
        shares = self.values[self.values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm (Rudelson & Vershynin 2007); 0 for a zero weight."""
        if not len(self.values) or self.values[0] <= 0:
            return 0.0
        return float(((self.values / self.values[0]) ** 2).sum())

    def rank_for(self, energy: float) -> int:
        """The smallest rank whose share of the energy is at least `energy`, in (0, 1]."""
        squares = self.values**2
        missing = squares.sum() * (1.0 - energy)
        enough = self.tail_energy <= missing * (1 + 1e-12)
        return int(np.argmax(enough)) + 1 if enough.any() else len(self.values)

    @property
    def tail_energy(self) -> FloatArray:
        """Energy discarded at rank 1..k, (k,): summed from the small end, so that small tails keep their digits."""
        squares = self.values**2
        tails: FloatArray = np.concatenate([np.cumsum(squares[::-1])[::-1][1:], [0.0]])
        return tails

    def error_at(self, rank: int) -> float:
        """Relative error (root of discarded over total energy) at `rank`; 0 for a zero weight."""
        total = float((self.values**2).sum())
        return math.sqrt(float(self.tail_energy[rank - 1]) / total) if total > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Orthonormal bases of a weight's output space, best direction first: every rank is a prefix of them.

    Attributes:
        basis: float64 (groups, out, k), k = min(out, in); each group's weight lies in its span, so that rank k loses
            nothing.
        spectrum: The values that belong to the k directions.
    """

    basis: Tensor
    spectrum: Spectrum


def algebra(tensor: Tensor) -> Tensor:
    """`tensor` detached in float64, moved to the CPU where its device has no float64."""
    tensor = tensor.detach()
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def spectrum(matrices: Tensor) -> Spectrum:
    """Singular values of (groups, out, in) matrices."""
    return _over_groups(torch.linalg.svdvals(algebra(matrices)))


def plain_decomposition(weight: Tensor) -> Decomposition:
    """Left singular vectors of `weight` (groups, out, in): the best basis for the weight (Eckart & Young 1936)."""
    left, values, _ = torch.linalg.svd(algebra(weight), full_matrices=False)
    return Decomposition(left, _over_groups(values))


def metric_decomposition(weight: Tensor, covariance: Tensor, *, noise: float) -> Decomposition:
    """The basis U that minimises the mean of |W x - U_r U_r^T W x|^2 at every rank r at once.

    U are the eigenvectors of W C W^T, no inverse needed (activation-aware SVD; Yuan 2023, Wang 2024). Directions
    in which the outputs do not vary leave U undetermined; they follow in the order of the plain metric, so that
    singular covariances, constant inputs or a single sample still give sensible factors.

    Args:
        weight: W, (groups, out, in).
        covariance: C, (groups, in, in), symmetric and positive semi-definite up to rounding.
        noise: Variance below this share of the largest is taken as rounding noise of the statistics.
    """
    W, C = algebra(weight), algebra(covariance).to(algebra(weight).device)
    found = [_metric_basis(each, metric, noise=noise) for each, metric in zip(W, C, strict=True)]
    return Decomposition(
        torch.stack([basis for basis, _ in found]), _over_groups(torch.stack([values for _, values in found]))
    )


def _metric_basis(W: Tensor, C: Tensor, *, noise: float) -> tuple[Tensor, Tensor]:
    out_features, in_features = W.shape
    Q, R = torch.linalg.qr(W) if out_features > in_features else (None, W)
    variances, vectors = torch.linalg.eigh(_symmetric(R @ C @ R.T))
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    seen = int((variances > noise * variances[0]).sum())
    if seen < len(variances):
        vectors = _complete(vectors, R, seen)
        # Rotating the unseen directions among themselves leaves their total variance: it is noise, spread evenly.
        variances[seen:] = variances[seen:].mean()
    return vectors if Q is None else Q @ vectors, variances.sqrt()


def factors(weight: Tensor, decomposition: Decomposition, *, rank: int) -> tuple[Tensor, Tensor]:
    """The pair (down, up) in float64, (groups, rank, in) and (groups, out, rank), with up @ down = U_r U_r^T W.

    Each of the `rank` components has the same norm in both factors, the best start for fine-tuning and the widest
    margin in half precision.
    """
    up = decomposition.basis[:, :, :rank]
    down = up.mT @ algebra(weight).to(up.device)
    scale = down.norm(dim=2).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return down / scale[:, :, None], up * scale[:, None, :]


def _over_groups(values: Tensor) -> Spectrum:
    """One spectrum from the values (groups, k) of every group."""
    return Spectrum(values.square().sum(dim=0).sqrt().cpu().numpy())


def _complete(vectors: Tensor, weight: Tensor, seen: int) -> Tensor:
    """Keep the first `seen` vectors; turn the rest to the principal axes of what `weight` has left outside them."""
    rest = vectors[:, seen:]
    axes, _, _ = torch.linalg.svd(rest.T @ weight, full_matrices=True)
    return torch.cat([vectors[:, :seen], rest @ axes], dim=1)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    finite: Any = torch.isfinite(tensor).all().item()
    return bool(finite)
