"""How far statistics of few samples can be trusted, and what to put in the place of what they do not know."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spectrim.core.errors import DataError, warn
from spectrim.core.execution import Inputs
from spectrim.linalg import Covariance, mean_variance, square_of, to_float64
from spectrim.linalg.products import in_range

_ALIKE = 1e-5
_FEW, _ENOUGH = 16, 128

Samples = int | Sequence[int]
"""How many samples vectors are of, or how many vectors each of the samples has."""


@dataclass(eq=False)
class SampleCount:
    """How many samples there are, and whether any two differ; see `Inputs.samples`."""

    number: int = 0
    differ: bool = False
    _first: Sequence[Tensor] | None = None

    def add(self, batch: Inputs) -> None:
        """Count a batch."""
        samples = batch.samples
        self.number += samples
        if not samples or self.differ:
            return
        dense = [tensor if tensor.layout == torch.strided else tensor.to_dense() for tensor in batch.rows()]
        if self._first is None:  # of what has no rows of samples, such as a mask, all
            self._first = [(tensor[:1] if len(tensor) == samples else tensor).clone() for tensor in dense]
        self.differ = any(not _repeats(tensor, first) for tensor, first in zip(dense, self._first, strict=False))

    def __str__(self) -> str:
        """For messages."""
        if self.differ:
            return f"{self.number} samples"
        return "one sample" if self.number == 1 else f"{self.number} times the same sample"


def _repeats(tensor: Tensor, first: Tensor) -> bool:
    """Whether a tensor is another one, or copies of its only row; NaN equals itself."""
    if tensor.shape[1:] != first.shape[1:] or len(first) not in (1, len(tensor)):
        return False
    return bool(((tensor == first) | ((tensor != tensor) & (first != first))).all())


def warn_of_few(samples: SampleCount, metric: str | None) -> None:
    """Warn of calibration data that tell little or nothing of other samples.

    Raises:
        DataError: it is nothing, and a metric that needs data was asked for.
    """
    if not samples.number:
        raise DataError("the calibration data is empty: its batches have no samples; give at least one")
    enough = f"{_ENOUGH} samples or more"
    if not samples.differ and metric is not None:
        raise DataError(f"the calibration data are {samples}, which metric={metric!r} cannot be taken from; give more")
    if not samples.differ:
        warn(
            f"the calibration data are {samples}, which says nothing of others: the weights are approximated by "
            f"themselves, as without data; give {enough}"
        )
    elif samples.number < _FEW:
        warn(
            f"the calibration data are {samples}; what so few cannot tell of others is taken from the weights alone, "
            f"and with {enough} the result would be better"
        )


@dataclass(eq=False)
class SamplingError:
    """How much a mean of second moments would change with other samples, from how much these differ among themselves.

    The vectors of one sample (patches of an image, tokens of a text) are alike, so that a sample counts once, however
    many vectors it has.

    Attributes:
        samples: How many there were.
        squares: Sum over the samples of the squared Frobenius norm of each one's second moment.
    """

    samples: int = 0
    squares: float = 0.0

    def add(self, rows: Tensor, *, samples: Samples, weight: float = 1.0) -> Tensor | None:
        """Add vectors (groups, n, width), those of a sample one after the other, around a point that stays the same.

        Their second moments count `weight` times. Gives X^T X of all vectors, float64 (groups, width, width), if each
        sample has the same number of them, and at least as many as they are wide: then it comes by the way.
        """
        rows, scale = in_range(rows)
        rows, each = _by_sample(rows, samples)
        is_narrow = rows.shape[2] >= rows.shape[3]
        products = rows.mT @ rows if is_narrow else rows @ rows.mT
        square = float(torch.linalg.vector_norm(products, dtype=torch.float64)) ** 2
        self.squares += square * (weight / each) ** 2 * scale**4
        self.samples += rows.shape[1]
        return to_float64(products.sum(dim=1)) * scale**2 if is_narrow and isinstance(samples, int) else None

    def variation(self, square: float) -> float:
        """Sum over the samples of squared distances between each one's second moment and the mean of all.

        `square` is the squared Frobenius norm of that mean.
        """
        return max(0.0, self.squares - self.samples * square)


def _by_sample(rows: Tensor, samples: Samples) -> tuple[Tensor, int]:
    """Vectors (groups, n, width) as (groups, samples, each, width), and by what to divide a sample's second moment."""
    groups, number, width = rows.shape
    if isinstance(samples, int):
        samples = max(1, min(samples, number))
        each = -(-number // samples)
        missing = samples * each - number
        whole = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        return whole.reshape(groups, samples, each, width), each
    sizes = torch.tensor([size for size in samples if size], device=rows.device)
    places = torch.arange(int(sizes.max()), device=rows.device) < sizes.unsqueeze(1)
    whole = rows.new_zeros(groups, *places.shape, width)
    whole[:, places] = rows / sizes.repeat_interleave(sizes).sqrt().to(rows).unsqueeze(1)
    return whole, 1


def shrinkage(moment: Covariance, *, samples: int, variation: float) -> float:
    """Which share of a second moment (groups, n, n), from 0 to 1, few samples do not know; see `shrunk`.

    The share with the least mean squared error: the variance of the estimate over its squared distance to a multiple of
    the identity (Ledoit & Wolf 2004, with samples in the place of vectors). It is 1 for a single sample, or several
    that do not differ: what is seen of these says nothing of others.
    """
    square = square_of(moment)
    if samples < 2 or variation <= _ALIKE * samples * square:
        return 1.0
    isotropic = moment.shape[-1] * float(mean_variance(moment).square().sum())
    away = square - isotropic
    return min(1.0, variation / (samples * (samples - 1)) / away) if away > 0 else 1.0
