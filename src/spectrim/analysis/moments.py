"""Means and second moments of vectors, added up batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.analysis.sampling import Samples, SamplingError, shrinkage
from spectrim.core.errors import DataError
from spectrim.core.memory import IN_PLACE, Storage
from spectrim.linalg import (
    MOST_DOUBLE_INPUTS,
    Covariance,
    DiagonalCovariance,
    LowRankCovariance,
    add_covariances,
    matrix_of,
    shrunk,
    square_around,
    square_of,
    to_float64,
)
from spectrim.linalg.products import gram, in_range

PROBES = 2
"""Random combinations of the outputs that gradients are taken of; of many samples one for each is enough."""

_CENTRED = 16

_POOLED = 512
"""Vectors that are multiplied together, if batches have fewer: each product is as large as all vectors' together."""


def concatenated(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Vectors (groups, n, ..) of several batches together, until they are 512, and so on."""
    pool = list[Tensor]()
    for rows in batches:
        pool.append(rows)
        if sum(own.shape[1] for own in pool) >= _POOLED:
            yield pool[0] if len(pool) == 1 else torch.cat(pool, dim=1)
            pool = []
    if pool:
        yield torch.cat(pool, dim=1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one layer's inputs.

    Attributes:
        count: Number of input vectors.
        mean: Their mean, float64 (groups, in); a convolution's input vectors are the patches that its kernel sees.
            Of indices the share of each.
        compact: Their covariance (divided by `count`): a matrix in float64, and of a wide layer in the type in which
            it got its inputs, at least float32; of fewer vectors than inputs of a wide layer the vectors themselves.
            Of indices the second moment of the vectors that are 1 there, which is diagonal: the shares.
        rounding_tolerance: Relative rounding error of the covariance, from the precision it was summed in.
        samples: Number of samples (images, texts) that the vectors are of.
        shrinkage: Share of the covariance, from 0 to 1, that is better exchanged for its diagonal, and of that for a
            typical variance: what so few samples do not know of others (Ledoit & Wolf 2004); 1 for a single sample.
        output_grad_covariance: Second moment of the gradient of random combinations of the network's outputs with
            respect to this layer's output, summed over a sample's places, float64 (groups, out, out); None if not
            asked for.
        output_grad_shrinkage: As `shrinkage`, of that moment.
    """

    count: int
    mean: Tensor
    compact: Covariance
    rounding_tolerance: float
    samples: int
    shrinkage: float
    output_grad_covariance: Tensor | None = None
    output_grad_shrinkage: float = 0.0

    @property
    def covariance(self) -> Tensor:
        """The covariance as a matrix, float64 (groups, in, in); made anew at each access if the vectors are held."""
        return matrix_of(self.compact)

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        compact = [self.compact] if isinstance(self.compact, Tensor) else vars(self.compact).values()
        tensors = [tensor for tensor in (*compact, self.mean, self.output_grad_covariance) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def covariance_bytes(width: int, *, vectors: int, itemsize: int) -> int:
    """What `Moments.compact` takes of a group, from vectors of `itemsize` bytes a number: these, or the matrix."""
    return itemsize * width * min(vectors, width) if width > MOST_DOUBLE_INPUTS else 8 * width**2


@dataclass(frozen=True, eq=False)
class PooledCovariance:
    """Statistics of the inputs of several call sites, each around its own mean, as each gets a bias of its own.

    Attributes:
        covariance: Float64 (groups, in, in), or the vectors it is made of.
        rounding_tolerance: See `Moments`.
        shrinkage: See `Moments`.
    """

    covariance: Covariance
    rounding_tolerance: float
    shrinkage: float


def pooled(moments: Sequence[Moments], *, name: str, width: int) -> PooledCovariance:
    """The statistics of all call sites of one weight.

    Raises:
        DataError: they are of another width than the weight.
    """
    for seen in moments:
        if seen.mean.shape[1] != width:
            raise DataError(
                f"the calibration saw inputs of size {seen.mean.shape[1]} at layer {name!r}, which takes {width}; "
                "it was made with another model"
            )
    total = sum(seen.count for seen in moments)
    whole = moments[0].compact
    if len(moments) > 1:
        whole = add_covariances([(seen.compact, seen.count / total) for seen in moments])
    shrunk_by = sum(seen.shrinkage * seen.count / total for seen in moments)
    return PooledCovariance(whole, max(seen.rounding_tolerance for seen in moments), shrunk_by)


def output_grads(moments: Sequence[Moments]) -> Tensor | None:
    """What gradients at all call sites of one weight sum up to, (groups, out, out); None if one site has none.

    Each counts as often as it was called: the error of a weight is made at every call.
    """
    most, total = max(seen.samples for seen in moments), torch.zeros(()).double()
    for seen in moments:
        if seen.output_grad_covariance is None:
            return None
        own = matrix_of(shrunk(seen.output_grad_covariance, seen.output_grad_shrinkage))
        total = total + own * (seen.samples / most if most else 1.0)
    return total


@dataclass(eq=False)
class RunningGradients:
    """Second moment of gradients, added up batch by batch, one probe at a time; those of wide layers by pools.

    Attributes:
        size: Of all batches; one with several probes counts with each.
    """

    size: int = 0
    scatter: Tensor = field(default_factory=lambda: torch.zeros(()).double())
    error: SamplingError = field(default_factory=SamplingError)
    storage: Storage = IN_PLACE
    batches: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, *, samples: int, size: int) -> None:
        """Add gradients (groups, n, out) of so many samples, with respect to a layer's batch of a size."""
        rows = self.storage.move(rows).to(torch.promote_types(rows.dtype, torch.float32))
        product = self.error.add(rows, samples=samples, weight=rows.shape[1] / size)
        self.size += size
        if product is not None:
            self._sum(product)
            return
        self.batches.append(rows.clone())  # what it is a view of may be written to
        if sum(own.shape[1] for own in self.batches) >= _POOLED:
            self.merge()

    def merge(self) -> None:
        """Turn vectors that are held into their scatter."""
        batches, self.batches = self.batches, []
        for rows in concatenated(batches):
            own, scale = in_range(rows)
            self._sum(to_float64(gram(own)).mul_(scale**2))

    def _sum(self, product: Tensor) -> None:
        self.scatter = self.scatter.add_(product) if self.scatter.ndim else self.storage.keep(product)

    @property
    def tells(self) -> bool:
        """Whether it is finite, and not zero."""
        self.merge()
        return bool(self.scatter.any() and torch.isfinite(self.scatter).all())

    def finish(self) -> tuple[Tensor, float]:
        """The moment, float64 (groups, out, out), in the place of the sum, and its shrinkage: see `Moments`."""
        self.merge()
        mean = self.scatter.div_(self.size)
        return mean, shrinkage(mean, samples=self.error.samples, variation=self.error.variation(square_of(mean)))


@dataclass(eq=False)
class RunningFrequencies:
    """How often each index of a layer's entries was looked up."""

    counts: Tensor
    samples: int = 0

    @property
    def count(self) -> int:
        """Of all together."""
        return int(self.counts.sum())

    def add(self, rows: Tensor, *, samples: Samples) -> None:
        """Add indices (1, n, 1) of so many samples."""
        self.samples += samples if isinstance(samples, int) else len(samples)
        self.counts += torch.bincount(rows.flatten().to(self.counts.device), minlength=len(self.counts))

    def finish(self, _: str) -> Moments:
        """The moments.

        Indices that were seen once are as many as those that other data would have and these do not (Good 1953): their
        share is given to all entries alike.
        """
        shares = (self.counts / self.count).unsqueeze(0)
        unseen = float((self.counts == 1).sum()) / self.count
        return Moments(self.count, shares, DiagonalCovariance(shares), 0.0, self.samples, unseen)


@dataclass(eq=False)
class RunningCovariance:
    """Mean and centred second moment, merged pool by pool (Chan, Golub & LeVeque 1979), never cancelling.

    Vectors are held in `batches` until they are enough for a pool; of a wide layer until they are as many as its
    inputs.
    """

    count: int = 0
    rounding_tolerance: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))
    batches: list[Tensor] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    merged: int = 0
    centre: Tensor = field(default_factory=lambda: torch.empty(0))
    error: SamplingError = field(default_factory=SamplingError)
    storage: Storage = IN_PLACE
    accumulated: int = 0

    @torch.inference_mode(False)  # what is summed in a forward pass in inference mode is written to outside of it
    def add(self, rows: Tensor, *, samples: Samples) -> None:
        """Add input vectors (groups, n, in) of so many samples, those of each one after the other.

        Products are summed in at least float32; batches are merged in float64, of a wide layer in the products' type.
        """
        number, width = rows.shape[1:]
        rows = self.storage.move(rows.detach()).to(torch.promote_types(rows.dtype, torch.float32))
        self.rounding_tolerance = max(self.rounding_tolerance, 4 * torch.finfo(rows.dtype).eps)
        self.count += number
        if number:
            self.samples.append(samples)
            is_enough = self.count - self.accumulated >= (width if self._holds_vectors(width) else _POOLED)
            self.batches.append(rows if is_enough else rows.clone())
            if is_enough:
                self.merge()

    def merge(self) -> None:
        """Turn vectors that are held into their scatter."""
        self._compare()
        batches, self.batches = self.batches, []
        for rows in concatenated(batches):
            self._merge(rows)

    def _compare(self) -> None:
        """Add to `error` what is held, around the mean of the first: of 16 samples, or all of the first pool."""
        first, number = list[Tensor](), 0
        for rows, own in zip(self.batches, self.samples, strict=True):
            if number >= _CENTRED or self.centre.numel():
                break
            first.append(rows)
            number += own if isinstance(own, int) else len(own)
        self.centre = torch.cat(first, dim=1).mean(dim=1) if first else self.centre
        samples, self.samples = self.samples, []
        for rows, own in zip(self.batches, samples, strict=True):
            self.error.add(rows - self.centre.to(rows).unsqueeze(1), samples=own)

    def _holds_vectors(self, width: int) -> bool:
        """Whether the vectors themselves are the statistics, as long as they are fewer than a wide layer's inputs."""
        return width > MOST_DOUBLE_INPUTS and not self.scatter.numel()

    def _merge(self, rows: Tensor) -> None:
        number = rows.shape[1]
        self.accumulated += number
        mean = rows.mean(dim=1)
        centred = rows - mean.unsqueeze(1)
        groups, _, width = rows.shape
        size = groups * width**2 * (4 if width > MOST_DOUBLE_INPUTS else 12)
        self.storage.require(size, device=rows.device, what=f"the statistics of {groups * width:,} inputs")
        centred, scale = in_range(centred)
        scatter, mean = gram(centred), to_float64(mean)
        if self.accumulated == number:
            # half the memory of a wide layer, whose products are in float32 in any case
            scatter = scatter if rows.shape[2] > MOST_DOUBLE_INPUTS else to_float64(scatter)
            self.mean, self.scatter = mean, self.storage.keep(scatter.mul_(scale**2))
            return
        shift = mean - self.mean
        # in place, since these are the largest arrays there are
        self.scatter.add_(scatter.to(self.scatter), alpha=scale**2)
        step = shift.to(self.scatter.dtype)
        self.scatter.baddbmm_(
            step.unsqueeze(2), step.unsqueeze(1), alpha=(self.accumulated - number) * number / self.accumulated
        )
        # rounding of single sums adds up like a random walk: measured at 0.14 epsilon times the root of their number
        self.merged += 1
        rounding = self.merged**0.5 / 2 * torch.finfo(self.scatter.dtype).eps
        self.rounding_tolerance = max(self.rounding_tolerance, rounding)
        self.mean = self.mean + shift * (number / self.accumulated)

    def around(self, mean: Tensor) -> Tensor:
        """The scatter around another mean (groups, in)."""
        shift = self.mean - mean
        return self.scatter + self.count * shift.unsqueeze(2) * shift.unsqueeze(1)

    def finish(self, name: str) -> Moments:
        """The moments, which take the place of the sums; `name` is for the message when they are not finite."""
        if self.batches and not self._holds_vectors(self.batches[0].shape[2]):
            self.merge()
        mean, compact = self._compact() if self.batches else (self.mean, self.scatter.div_(self.count))
        values = compact if isinstance(compact, Tensor) else compact.rows
        # the extremes are not numbers if any entry is not, and take no memory
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            raise DataError(f"the inputs of layer {name!r} are NaN or infinite on the calibration data; check the data")
        samples = self.error.samples
        share = shrinkage(compact, samples=samples, variation=self.variation(mean, compact))
        return Moments(self.count, mean, compact, self.rounding_tolerance, samples, share)

    def variation(self, mean: Tensor, covariance: Covariance) -> float:
        """How much the samples differ, see `SamplingError`."""
        away = mean - self.centre.to(mean)
        return self.error.variation(square_around(covariance, away))

    def _compact(self) -> tuple[Tensor, LowRankCovariance]:
        """The mean, and the vectors around it."""
        self._compare()
        mean = torch.stack([to_float64(rows).sum(dim=1) for rows in self.batches]).sum(dim=0) / self.count
        middle, root = mean.unsqueeze(1), self.count**0.5
        rows = torch.cat([((to_float64(rows) - middle) / root).to(rows.dtype) for rows in self.batches], dim=1)
        self.batches = []
        return mean, LowRankCovariance(self.storage.keep(rows), mean.new_zeros(len(mean), 1))
