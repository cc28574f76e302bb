"""Singular values, and what can be read from them."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.core.errors import ArgumentError
from spectrim.core.nested import describe

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
        try:
            values = np.array(self.values, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError):
            values = np.empty(())
        if values.ndim != 1:
            raise ArgumentError(f"Spectrum({describe(self.values)}): give singular values, (k,)")
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


def to_float64(tensor: Tensor) -> Tensor:
    """`tensor` detached in float64, moved to the CPU where its device has no float64."""
    tensor = tensor.detach()
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def spectrum(matrices: Tensor) -> Spectrum:
    """Singular values of (groups, out, in) matrices."""
    return over_groups(torch.linalg.svdvals(to_float64(matrices)))


def over_groups(values: Tensor) -> Spectrum:
    """One spectrum from the values (groups, k) of every group."""
    return Spectrum(values.square().sum(dim=0).sqrt().cpu().numpy())
