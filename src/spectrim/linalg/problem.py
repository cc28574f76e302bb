"""What is to be approximated, and in which metric."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from spectrim.linalg.covariance import (
    Covariance,
    DiagonalCovariance,
    LowRankCovariance,
    dense_of,
    matrix_of,
    shrunk,
    solver,
    times,
    typical_variance,
    variances_of,
)
from spectrim.linalg.products import matmul, times_rounded
from spectrim.linalg.spectra import FloatArray, to_float64

Ranks = tuple[int, ...]
"""The ranks of one layer in one form: (rank,), or (rank_in, rank) in the tucker2 form."""

Factors = tuple[Tensor, ...]
"""The factors of one layer from its input to its output, each with the groups first."""

_FLOOR, _BLOCK = 1e-7, 1024
_LEAST_WEIGHT, _POWERS = 1e-3, 16
"""Share of its largest eigenvalue that is added to the metric of the outputs, and steps to find that."""
_WIDE = 2**22
"""Entries of a matrix above which a full singular value decomposition takes minutes, and copies are not kept."""


def is_wide(shape: Sequence[int]) -> bool:
    """Whether a full decomposition of a weight (groups, out, in, *kernel) takes minutes."""
    return prod(shape[1:]) > _WIDE


def working_type(shape: Sequence[int], dtype: torch.dtype) -> torch.dtype:
    """Float64, but of a wide weight its own type, at least float32."""
    return torch.promote_types(dtype, torch.float32) if is_wide(shape) else torch.float64


class Decomposition(ABC):
    """What factors of any rank are made from, and what each rank loses.

    The class says of a weight's shape alone which ranks there are, so that costs and losses cannot come apart.

    Attributes:
        problem: What is approximated.
    """

    problem: "Problem"

    @staticmethod
    @abstractmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """The largest ranks that change anything, of a weight (groups, out, in, *kernel)."""

    @classmethod
    def rank_grid(cls, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ranks of `tails`, (n, number of ranks): here every one up to the full rank."""
        return np.arange(1, cls.full_ranks(shape)[0] + 1, dtype=np.int64)[:, None]

    @classmethod
    @abstractmethod
    def of(cls, problem: "Problem", *, near: Factors = ()) -> Self:
        """Solve, or prepare to solve; where it is done by iteration, it starts from the factors `near`, if given."""

    @property
    @abstractmethod
    def tails(self) -> FloatArray:
        """Energy lost at each of the ranks of `rank_grid`, (n,)."""

    @abstractmethod
    def factors(self, ranks: Ranks) -> Factors:
        """The factors of these ranks."""

    @property
    def start(self) -> Factors:
        """Where a search for those of a similar problem may begin, which takes the covariance as a matrix, many times.

        Nothing where there is no search.
        """
        return ()

    @classmethod
    def basis_bytes(cls, shape: Sequence[int], *, itemsize: int, rank: int | None = None) -> int:
        """What a decomposition of a weight with numbers of `itemsize` bytes keeps: its bases.

        With `rank` only that one is asked for, without all the others being worked out.
        """
        return 8 * prod(shape)

    @classmethod
    def working_bytes(cls, shape: Sequence[int], *, vectors: int | None, rank: int | None = None) -> int:
        """What is held at most while it is worked out, what is kept of it aside.

        `vectors` is how many the covariance is made of; None in the plain metric.
        """
        return 8 * (6 * prod(shape) + (0 if vectors is None else 4 * shape[0] * prod(shape[2:]) ** 2))

    def tail_at(self, ranks: Ranks) -> float:
        """Energy lost at `ranks`; between the ranks of a coarse grid that of the next smaller ones, if there are."""
        below = (self.rank_grid(self.problem.weight.shape) <= np.array(ranks)).all(axis=1)
        return float(self.tails[below].min(initial=np.inf))


@dataclass(frozen=True, eq=False)
class PartnerMoments:
    """Of what the outputs of a weight are multiplied with: the queries, where it gives keys, or the keys.

    Attributes:
        second: Second moment of queries, covariance of keys, float64 (n, n).
        gradients: That of the gradients with respect to them, or None.
        own_mean: Mean of the weight's own outputs (out,) where these are queries.
    """

    second: Tensor
    gradients: Tensor | None = None
    own_mean: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """Find factors whose product Q makes the mean of (W x - Q x)^T G (W x - Q x) small.

    Attributes:
        weight: W, (groups, out, in, *kernel); a linear layer has no kernel dimensions.
        covariance: C = cov(x), (groups, n, n) with n = in times the kernel's size; None for the identity, which is the
            plain metric.
        output: G, (groups, out, out), positive semi-definite; None for the identity.
        shrinkage: Share of C, from 0 to 1, that the statistics do not know; see `shrunk`.
        rounding_tolerance: Variance below this share of the largest is taken as rounding of the statistics.
        is_definite: Whether C has an inverse as it is.
        partner: Of what the outputs are multiplied with, if that is known.
        _shared: What problems that differ in their output metric only have in common.
    """

    weight: Tensor
    covariance: Covariance | None = None
    output: Tensor | None = None
    shrinkage: float = 0.0
    rounding_tolerance: float = 0.0
    is_definite: bool = False
    partner: PartnerMoments | None = None
    _shared: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def of_weight(self, weight: Tensor, covariance: Covariance) -> "Problem":
        """Another weight and covariance, which has an inverse as it is, in the same metric of the outputs."""
        other = Problem(weight, covariance, output=self.output, is_definite=True, partner=self.partner)
        if self.output is not None:
            other.__dict__["_root"] = self._root
        return other

    @property
    def is_wide(self) -> bool:
        """Whether a full decomposition takes minutes."""
        return is_wide(self.weight.shape)

    @property
    def device(self) -> torch.device:
        """Where the algebra is done: that of the weight if it has float64."""
        return to_float64(self.weight[:0]).device

    @property
    def matrices(self) -> Tensor:
        """G^1/2 W, (groups, out, n): with it the metric of the outputs is the identity.

        In float64, and of a wide weight in its own type, at least float32. As large as the weight, so never kept.
        """
        flat = self._in_type(self.weight.flatten(2))
        return flat if self.output is None else self.weighted(flat)

    def times_matrices(self, rows: Tensor) -> Tensor:
        """Float64 rows (groups, k, out) times `matrices`, which of a wide weight are not formed."""
        if self.output is None or not self.is_wide:
            return times_rounded(rows, self.matrices)
        flat = self._in_type(self.weight.flatten(2))
        return times_rounded(times_rounded(rows, self._root.to(flat.dtype)), flat)

    def _in_type(self, matrices: Tensor) -> Tensor:
        return matrices.detach().to(self.device, working_type(self.weight.shape, self.weight.dtype))

    @property
    def shrunk_covariance(self) -> Covariance:
        """C with its share exchanged, on `device`; not of the plain metric. Large, so never kept."""
        assert self.covariance is not None
        return shrunk(self.covariance, self.shrinkage).to(self.device)

    @property
    def roots(self) -> Sequence[Tensor] | None:
        """By group M (out, m) with M M^T = G^1/2 W C W^T G^1/2; None where C is a matrix, whose root takes too long."""
        if self.covariance is None:
            # what is multiplied many times stays in its own type
            own = self.weight.flatten(2).to(torch.promote_types(self.weight.dtype, torch.float32))
            return list(own if self.output is None else self.matrices)
        C, W = self.shrunk_covariance, self.matrices
        if isinstance(C, DiagonalCovariance):
            return list(W * C.variances.sqrt().unsqueeze(1).to(W.dtype))
        if not isinstance(C, LowRankCovariance):
            return None
        seen = matmul(W, C.rows.to(W).mT)
        if not bool(C.ridge.any()):
            return list(seen)
        kind = C.rows.dtype
        return list(torch.cat([seen.to(kind), W.to(kind) * C.ridge.sqrt().to(kind).unsqueeze(-2)], dim=2))

    @property
    def metric(self) -> Tensor:
        """C with its share exchanged, as matrices in float64, (groups, n, n), on `device`."""
        if self.covariance is not None:
            return matrix_of(self.shrunk_covariance)
        groups, _, n = self.weight.flatten(2).shape
        return torch.eye(n, dtype=torch.float64, device=self.device).expand(groups, n, n)

    @property
    def metrics(self) -> Sequence[Tensor | None]:
        """By group the metric with a floor, so that it has an inverse; None for the identity. Large, so never kept."""
        if self.covariance is None:
            return [None] * len(self.weight)
        if self.is_definite:
            return list(dense_of(self.shrunk_covariance))
        C = dense_of(self.shrunk_covariance)
        C = to_float64((C + C.mT).div_(2))  # in its place, since all of them would be the most that is alive at once
        if "floor" in self._shared:
            return list(lifted(C, self._shared["floor"].to(C.device)))
        self._shared["floor"], _ = rooted(C)
        return list(lifted(C, self._shared["floor"]))

    @property
    def full_metric(self) -> Tensor:
        """That of a single group as a matrix with an inverse, also where it is the identity."""
        (C,) = self.metrics
        return self.metric[0] if C is None else to_float64(C)

    @cached_property
    def total(self) -> float:
        """The energy: the sum of the outputs' variances, or of the weight's squares in the plain metric."""
        is_factored = isinstance(self.covariance, LowRankCovariance | DiagonalCovariance)
        if (self.is_wide or is_factored) and (roots := self.roots) is not None:
            return sum(float(torch.linalg.vector_norm(M, dtype=torch.float64).square()) for M in roots)
        if self.covariance is None:
            return float(self.matrices.square().sum())
        W = to_float64(self.matrices)
        return max(0.0, float((times(W, self.shrunk_covariance) * W).sum()))

    def seen_error(self, product: Tensor | int) -> float:
        """The energy that a product (groups, out, n), or 0, loses on the very inputs that C was taken from."""
        C, weight = self.covariance, self.weight.flatten(2)
        if isinstance(product, int):
            product = weight.new_zeros(()).expand(weight.shape)
        C = None if C is None else C.to(self.device)
        are_few = isinstance(C, LowRankCovariance) and not bool(C.ridge.any())
        if self.output is not None and not are_few:
            weight = self.weighted(self._in_type(weight) - self._in_type(product))
            product = weight.new_zeros(()).expand(weight.shape)
        energy, seen = 0.0, list[Tensor]()
        # by blocks of outputs, since the difference of the whole matrices may be the largest array of all
        for dense, low in zip(weight.split(_BLOCK, dim=1), product.split(_BLOCK, dim=1), strict=True):
            lost = to_float64(dense) - low
            if are_few:  # what becomes of the vectors says it all, and takes less time in the metric of the outputs
                seen.append(times_rounded(lost, cast(LowRankCovariance, C).rows.mT))
            else:
                energy += float(((lost if C is None else times(lost, C)) * lost).sum())
        if are_few:
            rows = torch.cat(seen, dim=1)
            energy = float((rows if self.output is None else self.weighted(rows)).square().sum())
        return energy

    def weighted(self, rows: Tensor) -> Tensor:
        """G^1/2 times (groups, out, ..), in their type, float32 or float64."""
        return matmul(self._root.to(rows.dtype), rows.flatten(2)).reshape(rows.shape)

    def unweighted(self, last: Tensor) -> Tensor:
        """G^-1/2 times the last factor (groups, out, ..), back from the metric of `matrices`."""
        if self.output is None:
            return last
        solved: Tensor = torch.linalg.solve_triangular(self._root, last.flatten(2), upper=True)
        return solved.reshape(last.shape)

    def release(self) -> None:
        """Give back memory, at the price that a root is worked out again when it is next needed."""
        self.__dict__.pop("_root", None)

    @cached_property
    def _root(self) -> Tensor:
        """G^1/2 up to a rotation, which changes no product of factors: upper triangular R with R^T R = G."""
        assert self.output is not None
        G = to_float64(self.output).to(self.weight.device)
        trace = G.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        G = G / trace[:, None, None]
        top = _largest_eigenvalue(G).clamp(min=torch.finfo(torch.float64).eps)
        # directions without effect on the loss keep a small weight, so that the root has an inverse
        root: Tensor = torch.linalg.cholesky(lifted(G / top[:, None, None], torch.full_like(top, _LEAST_WEIGHT)))
        return root.mT


def _largest_eigenvalue(G: Tensor) -> Tensor:
    """Of positive semi-definite matrices (groups, n, n), (groups,), within some per cent: by power iteration."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(*G.shape[:2], 1, generator=draw, dtype=G.dtype).to(G.device)
    for _ in range(_POWERS):
        vectors = functional.normalize(G @ vectors, dim=1)
    return (vectors * (G @ vectors)).sum(dim=(1, 2))


Solver = Callable[[Tensor], Tensor]
"""Gives M (groups, k, n) times the inverse of a metric, float64."""


def ridged(C: Covariance, *, share: float) -> tuple[Covariance, Tensor, Callable[[], Solver]]:
    """C with a share of the typical variance, or more, added to its diagonals; how much that is, and a solver.

    The root of a matrix in float32, which takes twice as much memory, is kept until the solver is asked for, and worked
    out again after that.
    """
    by = share * typical_variance(variances_of(C))
    if not isinstance(C, Tensor):
        raised = C.lifted(by)
        solve = solver(raised)
        return raised, by, lambda: solve
    symmetric = (C + C.mT).div_(2)  # what passes here is then the matrix that is taken
    floor, root = rooted(symmetric, least=by.squeeze(-1))
    metric, roots = lifted(symmetric, floor.to(symmetric)), [root]

    def of_root() -> Solver:
        # the metric has its floor; what rounding to float32 took of that is far less than this
        lower = roots[0] if roots else rooted(metric, least=1e-6 * floor)[1]
        if C.dtype != lower.dtype:
            roots.clear()

        def solve(M: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(lower, M.mT, upper=False)  # cholesky_solve would copy the root
            return cast(Tensor, torch.linalg.solve_triangular(lower.mT, half, upper=True).mT)

        return solve

    return metric, floor.unsqueeze(-1), of_root


def lifted(metric: Tensor, floor: Tensor) -> Tensor:
    """`metric` itself, with the floor added to its diagonals."""
    metric.diagonal(dim1=-2, dim2=-1).add_(floor.unsqueeze(-1))
    return metric


def rooted(metric: Tensor, *, share: float = _FLOOR, least: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What to add to the diagonals of (groups, n, n), (groups,), and the Cholesky factors after it, float64.

    That is `least`, or a share of the mean variance; more where statistics were summed in float32, whose rounding
    leaves negative variances.
    """
    mean = to_float64(metric.diagonal(dim1=-2, dim2=-1)).mean(dim=-1)
    floor = torch.where(mean > 0, mean * share, torch.ones_like(mean)) if least is None else least
    device, attempts = floor.device, 8
    while True:
        attempts -= 1
        # by columns, as LAPACK has them, so that the factors take the place of the one copy
        root = lifted(metric.detach().to(device, torch.float64, copy=True), floor).mT
        failures = torch.empty(len(root), dtype=torch.int32, device=root.device)
        torch.linalg.cholesky_ex(root, check_errors=not attempts, out=(root, failures))  # the last one says why
        if not bool(failures.any()):
            return floor, root
        floor = torch.where(failures > 0, 10 * floor, floor)


def balanced(factors: Factors) -> Factors:
    """The same product with each component at the same norm on both sides of every contraction.

    The best start for fine-tuning, and the widest margin in half precision.
    """
    parts = list(factors)
    for place in range(len(parts) - 1):
        first, second = parts[place], parts[place + 1]
        into, out = first.flatten(2).norm(dim=2), second.transpose(1, 2).flatten(2).norm(dim=2)
        scale = torch.where((into > 0) & (out > 0), (out / into.clamp(min=1e-300)).sqrt(), torch.ones_like(into))
        parts[place] = first * scale.reshape(*scale.shape, *[1] * (first.ndim - 2))
        parts[place + 1] = second / scale.reshape(len(scale), 1, -1, *[1] * (second.ndim - 3))
    return tuple(parts)
