"""Ridge regression from what a layer receives in a compressed network to what it should give."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.analysis.moments import Moments, RunningCovariance, concatenated, pooled
from spectrim.analysis.sampling import Samples
from spectrim.layers.types import layer_type_of
from spectrim.linalg import Covariance, to_float64
from spectrim.linalg.covariance import add_outer, times
from spectrim.linalg.problem import Solver, ridged, working_type
from spectrim.linalg.products import matmul, times_rounded

_RIDGE, _RIDGE_OF_TOKENS, _MOST_RIDGE = 1e-2, 1e-1, 1e4
_BLOCK = 1024
"""Outputs at a time, as arrays in float64 of all outputs of wide layers may be too large."""

Rows = Mapping[str, Sequence[Tensor]]
"""By call site and batch: (groups, n, ..)."""


class LazyRows(list[Any]):
    """Rows by batch; those that take much more memory than the input that they come from are worked out when needed."""

    def __getitem__(self, batch: Any) -> Any:
        part = super().__getitem__(batch)
        return part() if callable(part) else part

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))


@dataclass(eq=False)
class InputRows:
    """What one call site receives in the compressed network, batch by batch: rows (groups, n, in).

    Attributes:
        name: The call site's.
        rows: The vectors.
        samples: How many samples each entry of `rows` is of, or how many vectors each of them has.
        sizes: How many vectors each entry has.
        is_shared: Whether other layers receive them as well, for which what is worked out is kept.
    """

    name: str = ""
    rows: list[Tensor] = field(default_factory=LazyRows)
    samples: list[Samples] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    is_shared: bool = False

    def __post_init__(self) -> None:
        self.sizes = self.sizes or [rows.shape[1] for rows in self.rows]

    def add(self, x: Tensor, rows_of: Callable[[Tensor], tuple[Tensor, Samples]]) -> None:
        """Add the rows of a call's input, which `rows_of` gives with their samples."""
        rows, samples = rows_of(x)
        if rows.nbytes > 2 * x.nbytes:
            own = x.clone()
            self.rows.append(cast(Tensor, lambda: rows_of(own)[0]))
        else:
            self.rows.append(rows.clone() if rows.data_ptr() == x.data_ptr() else rows)
        self.samples.append(samples)
        self.sizes.append(rows.shape[1])

    def to(self, device: torch.device) -> "InputRows":
        """On another device; itself where it is there."""
        if not self.rows or self.rows[0].device == device:
            return self
        return InputRows(self.name, [rows.to(device) for rows in self.rows], self.samples, self.sizes)

    @property
    def are_tokens(self) -> bool:
        """Whether they are several to a sample, without a kernel that sees them together, as words of a text are."""
        return sum(self.sizes) > sum(map(_number, self.samples))

    @property
    def moments(self) -> Moments:
        """Their statistics."""
        return self._shared_moments if self.is_shared else self._statistics()

    @cached_property
    def _shared_moments(self) -> Moments:
        return self._statistics()

    def _statistics(self) -> Moments:
        statistics = RunningCovariance(centre=_mean(self.rows))
        for rows, samples in zip(self.rows, self.samples, strict=True):
            statistics.add(rows, samples=samples)
        return statistics.finish(self.name)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Ridge regression from what a weight's call sites receive to what they should give, drawn towards the weight.

    Attributes:
        dense: The weight W, (groups, out, n), float64, of a wide one its own type.
        inputs: The rows that the call sites receive.
        means: Their means by call site, (groups, n).
        metric: Their covariance with the ridge, (groups, n, n); around each call site's own mean, since each has a bias
            of its own.
        ridge: What the metric has on its diagonal beside the covariance, (groups, n) or (groups, 1).
        solver: Gives what multiplies by the inverse of the metric.
        biased: Whether the call sites may have a bias; if not, moments are taken around zero.
    """

    dense: Tensor
    inputs: Rows
    means: dict[str, Tensor]
    metric: Covariance
    ridge: Tensor
    solver: Callable[[], Solver]
    biased: bool

    @classmethod
    def of(cls, layer: nn.Module, received: Mapping[str, InputRows], *, biased: bool) -> "RidgeFit":
        """From what each call site receives; without `biased` the layer gets no bias."""
        inputs = {site: own.rows for site, own in received.items()}
        moments = {site: own.moments for site, own in received.items()}
        device = next(own.mean.device for own in moments.values())
        kernels = layer_type_of(layer).kernels(layer).detach()
        W = kernels.to(device, working_type(kernels.shape, kernels.dtype)).flatten(2)
        together = pooled(list(moments.values()), name=next(iter(inputs)), width=W.shape[2])
        C = together.covariance.to(W.device)
        means = {site: seen.mean.to(W.device) for site, seen in moments.items()}
        if not biased:
            total = sum(seen.count for seen in moments.values())
            for site, seen in moments.items():
                C = add_outer(C, means[site] * (seen.count / total) ** 0.5)
            means = {site: torch.zeros_like(mean) for site, mean in means.items()}
        # (1 - s) C + s I but for a factor, where s is what so few samples do not know
        unknown = min(together.shrinkage / max(1 - together.shrinkage, 1e-9), _MOST_RIDGE)
        of_tokens = layer_type_of(layer).feature_dim(layer) == -1 and any(own.are_tokens for own in received.values())
        return cls(W, inputs, means, *ridged(C, share=max(_RIDGE_OF_TOKENS if of_tokens else _RIDGE, unknown)), biased)

    def cross(self, targets: Rows) -> Tensor:
        """cov(y, x), (groups, out, n)."""
        total = sum(rows.shape[1] for batches in targets.values() for rows in batches)
        cross = torch.zeros_like(self.dense)
        for site, batches in self.inputs.items():
            middle, mean = self.means[site].unsqueeze(1), _mean(targets[site]).unsqueeze(1) * self.biased
            for x, y in zip(concatenated(batches), concatenated(targets[site]), strict=True):
                kind = torch.promote_types(y.dtype, torch.float32)  # sums of products overflow in half precision
                cross += matmul((y.to(kind) - mean.to(kind)).mT, x.to(kind) - middle.to(kind)).to(cross.dtype) / total
        return cross

    def weight(self, cross: Tensor) -> Tensor:
        """(cov(y, x) + r W)(cov(x) + r I)^-1, written as a correction of W."""
        blocks = zip(self.dense.split(_BLOCK, dim=1), cross.split(_BLOCK, dim=1), strict=True)
        # in place where that can be done: each array of a wide layer is some hundred megabytes
        away: Iterable[Tensor] = (self._varied(to_float64(W)).neg_().add_(part) for W, part in blocks)
        if isinstance(self.metric, Tensor):  # whose root takes more memory than these, and is only needed after them
            away = list(away)
        solve = self.solver()
        return torch.cat([solve(part).to(self.dense.dtype) for part in away], dim=1).add_(self.dense)

    def _varied(self, M: Tensor) -> Tensor:
        """M cov(x), float64, from the metric, so that there need not be both."""
        return times(M, self.metric).addcmul_(self.ridge.unsqueeze(-2).to(M), M, value=-1)

    def excess(self, whole: Tensor, other: Tensor, *, cross: Tensor, G: Tensor | None) -> float:
        """By how much the mean of (y - Q x)^T G (y - Q x) is larger for Q = `whole` than for Q = `other`.

        Both with the bias that makes the mean exact. C is symmetric, so that one product with it is enough.
        """
        away, excess = whole - other, 0.0
        for start in range(0, whole.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            part = self._varied(to_float64(whole[:, block]) + other[:, block]).sub_(cross[:, block], alpha=2)
            own = away if G is None else G.to(part)
            excess += float((part if G is None else times_rounded(part, away.mT)).mul_(own[:, block]).sum())
        return excess

    def bias(self, site: str, whole: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """(out,): what makes the mean output exact for the weight `whole`, (groups, out, n); zero without a bias."""
        if not self.biased:
            return torch.zeros_like(whole[..., 0]).flatten()
        mean = self.means[site].unsqueeze(-1).to(whole.dtype)
        return (_mean(targets) - matmul(whole.to(self.dense.device), mean).squeeze(-1)).flatten()


def _number(samples: Samples) -> int:
    return samples if isinstance(samples, int) else len(samples)


def _mean(batches: Sequence[Tensor]) -> Tensor:
    """The mean of rows (groups, n, ..) over all batches, float64."""
    total = sum(rows.shape[1] for rows in batches)
    means = [to_float64(rows.mean(dim=1)) * (rows.shape[1] / total) for rows in batches if rows.shape[1]]
    return torch.stack(means).sum(dim=0)
